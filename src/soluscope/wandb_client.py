"""Access to the wandb package: a late and quiet import, the login, and the limits that the user has set.

The environment and the user's settings of wandb decide about sending, and name the server. The files of a study do
neither, because they may come from another person.
"""

from __future__ import annotations

import configparser
import os
import re
import tempfile
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from soluscope.errors import UserError

Mode = Literal["online", "offline", "off"]
ORDER: tuple[Mode, ...] = ("off", "offline", "online")
"""The modes; each sends or keeps more than the one before it."""
MODES: dict[str, Mode] = {"disabled": "off", "offline": "offline", "dryrun": "offline"}
"""Modes by wandb's words for them. Other words do not limit anything."""
PROJECT = "soluscope"
"""Name of the wandb project of runs and sweeps, unless WANDB_PROJECT sets another name."""
ANONYMOUS = {
    "disable_git": True, "disable_code": True, "disable_job_creation": True, "x_disable_meta": True,
    "x_disable_machine_info": True, "x_save_requirements": False, "host": "", "username": "", "email": "",
}  # fmt: skip
"""Settings without which wandb stores the names of machine and user, the command line, paths, the git remote, the
source and the installed packages. The facts about the model hold the commit and the versions that matter."""


@dataclass(frozen=True)
class Place:
    """Entity and project in wandb."""

    entity: str
    project: str


def place(knob: str, text: str) -> Place:
    """Parse `entity/project`, given after `knob`, such as `--wandb `.

    Raises:
        UserError: if `text` does not have that form.
    """
    if not re.fullmatch(r"[^\s/\\#?%:]+/[^/\\#?%:]+", text.strip()):
        raise UserError(f"{knob}{text!r} is not entity/project, as in: {knob}my-team/soluscope")
    return Place(*text.strip().split("/"))


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
    _load_settings(get_cache_dir())
    return wandb


def _load_settings(folder: Path) -> None:
    """Let wandb load its settings from the environment and the home folder, unless it has loaded them.

    It would also read the file wandb/settings of the working directory, which may be the study of another person.
    """
    from wandb.sdk import wandb_setup

    setup = wandb_setup.singleton()
    if setup.settings_if_loaded is None:
        with chdir(folder):
            _ = setup.settings


def sign_in(asked: str, instead: str) -> None:
    """Check that the server accepts this user's key, before anything is trained or sent.

    Args:
        asked: the setting that needs the key, as the user wrote it: `wandb=online`.
        instead: advice for a user without a key: `set wandb=offline`.

    Raises:
        UserError: if wandb is not installed or not allowed to send anything, there is no key, or the server
            refuses it or cannot be reached.
    """
    if allowed() != "online":
        raise UserError(
            f"{asked}, but WANDB_MODE, WANDB_DISABLED or 'wandb offline' limits wandb to {allowed()}: unset it, "
            f"or {instead}"
        )
    service = os.environ.get("WANDB_SERVICE")
    try:
        known = package().login(prompt=False, verify=True)
    except ImportError as error:
        raise UserError(
            f"{asked} needs the wandb package ({error}): run 'pip install wandb', or {instead}"
        ) from error
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


def allowed() -> Mode:
    """Return the most that WANDB_MODE, WANDB_DISABLED and `wandb offline` allow; without them, `online`."""
    word = os.environ.get("WANDB_DISABLED", "").lower()
    if word in {"1", "true", "t", "yes", "y", "on"}:  # as other libraries read it
        return "off"
    asked = (os.environ.get("WANDB_MODE", ""), _mode_here())
    return min((MODES.get(each, "online") for each in asked), key=ORDER.index)


def limited(asked: Mode) -> Mode:
    """Return the mode `asked`, or a lesser one that is allowed."""
    return min(asked, allowed(), key=ORDER.index)


def _mode_here() -> str:
    """Return the mode that `wandb offline` has stored in the working directory, or an empty text.

    The other settings of that file are not read: in a study of another person, they could send the key to any
    server.
    """
    parser = configparser.ConfigParser(interpolation=None)
    for folder in ("wandb", ".wandb"):
        with suppress(OSError, ValueError, configparser.Error):
            parser.read_string(Path(folder, "settings").read_text(encoding="utf8"))
    return parser.get("default", "mode", fallback="")


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line and without a full stop, or its type if it has no message."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
