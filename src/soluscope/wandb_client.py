"""Access to the wandb package: a late and quiet import, and one function that checks the login."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from soluscope.errors import UserError

PROJECT = "soluscope"
"""Name of the wandb project of runs and sweeps, unless WANDB_PROJECT sets another name."""
ANONYMOUS = {
    "disable_git": True, "disable_code": True, "disable_job_creation": True, "x_disable_meta": True,
    "x_disable_machine_info": True, "x_save_requirements": False, "host": "", "username": "", "email": "",
}  # fmt: skip
"""Settings without which wandb stores the names of machine and user, the command line, paths, the git remote, the
source and the installed packages. The facts about the model hold the commit and the versions that matter."""


def package() -> Any:
    """Import and return the wandb package, without crash reports and output unless the environment enables them.

    Raises:
        ImportError: if wandb is not installed.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb.env import CACHE_DIR, get_cache_dir

    folder = get_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # wandb's service would print its log on stderr
        os.environ[CACHE_DIR] = tempfile.mkdtemp(prefix="wandb-")
    return wandb


def sign_in(asked: str, instead: str) -> None:
    """Check that the server accepts this user's key, before anything is trained or sent.

    Args:
        asked: the setting that needs the key, as the user wrote it: `wandb=online`.
        instead: advice for a user without a key: `set wandb=offline`.

    Raises:
        UserError: if wandb is not installed, there is no key, or the server refuses it or cannot be reached.
    """
    try:
        wandb = package()
    except ImportError as error:
        raise UserError(
            f"{asked} needs the wandb package ({error}): run 'pip install wandb', or {instead}"
        ) from error
    service = os.environ.get("WANDB_SERVICE")
    try:
        known = wandb.login(prompt=False, verify=True)
    except Exception as error:  # of wandb, of its service, or of pydantic for a bad setting
        raise UserError(
            f"{asked}, but the login to wandb fails: {one_line(error)}; run 'wandb login', set WANDB_API_KEY "
            f"or WANDB_BASE_URL, or {instead}"
        ) from error
    finally:
        # The login has started wandb's service. Each job that this process starts needs a separate service.
        if service is None:
            os.environ.pop("WANDB_SERVICE", None)
    if not known:
        raise UserError(
            f"{asked}, but there is no key for wandb: run 'wandb login', set WANDB_API_KEY, or {instead}"
        )


def is_disabled() -> bool:
    """Return whether WANDB_DISABLED is set to a word that means yes, as other libraries read it."""
    return os.environ.get("WANDB_DISABLED", "").lower() in {"1", "true", "t", "yes", "y", "on"}


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line and without a full stop, or its type if it has no message."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
