"""The wandb package: imported where it is needed, quiet, and its key asked about in one place."""

from __future__ import annotations

import os
from typing import Any

from soluscope.errors import UserError

PROJECT = "soluscope"
"""Where runs go unless WANDB_PROJECT says otherwise."""


def package() -> Any:
    """The wandb package, its crash reports and its talk turned off unless the environment asks for them.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def sign_in(asked: str, instead: str) -> None:
    """Have the server accept this user's key, before anything is sent or trained.

    Args:
        asked: what wants it, as the user wrote it: `wandb=online`.
        instead: what the user may do without a key: `set wandb=offline`.

    Raises:
        UserError: if wandb is not installed, there is no key, or the server refuses it or is not there.
    """
    try:
        wandb = package()
    except ImportError as error:
        raise UserError(
            f"{asked} wants the wandb package ({error}): pip install wandb, or {instead}"
        ) from error
    service = os.environ.get("WANDB_SERVICE")
    try:
        known = wandb.login(prompt=False, verify=True)
    except Exception as error:  # wandb's own, pydantic's for a setting, the service's
        raise UserError(
            f"{asked}, but the login fails: {one_line(error)}; run 'wandb login', set WANDB_API_KEY or "
            f"WANDB_BASE_URL, or {instead}"
        ) from error
    finally:
        # Asking has started wandb's service. Jobs that this process starts need their own.
        if service is None:
            os.environ.pop("WANDB_SERVICE", None)
    if not known:
        raise UserError(
            f"{asked}, but there is no key: run 'wandb login', set WANDB_API_KEY, or {instead}"
        )


def one_line(error: BaseException) -> str:
    """What an error says, on one line and without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
