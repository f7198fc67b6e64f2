"""A run in wandb: its curves and its model, tracked online, offline or not at all.

runs/<study>/<run>/wandb.json  id of the wandb run, so that a resumed run and its probes continue it; signed with
                               a key of this user that lies outside the study
runs/<study>/<run>/wandb/      wandb's own files; `wandb sync` uploads the files of an offline run

wandb never affects training: if wandb fails, one warning appears on stderr and the run continues. The
package is imported only when it is needed, and never with wandb=off.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soluscope.config import Config, for_others, read_config, to_yaml
from soluscope.errors import UserError
from soluscope.files import digest, read_json, write_text
from soluscope.terminal import say
from soluscope.wandb_client import (
    ANONYMOUS,
    PROJECT,
    Mode,
    allowed,
    limited,
    one_line,
    package,
    sign_in,
)

FLUSH_SECONDS = 0.1
"""Seconds between flushes of an offline run. With wandb's default, 15, a SIGKILL would lose 15 seconds."""
SENT_AGAIN = 100
"""Number of last rows that a resumed run sends again, because they may not have been flushed before a kill."""
START_SECONDS, FINISH_SECONDS = 30, 60
"""Longest delays of a run by an unreachable server: when the run starts and when it finishes."""
MOST_LETTERS = 128
"""Longest name of a run, group or artifact that wandb accepts."""
IDENTITY = "wandb.json"


# --- the mode -------------------------------------------------------------------------------------


def check_login(chosen: Mode | None) -> None:
    """Refuse an explicit `wandb=online` or `wandb=offline` that cannot work here, unless the environment limits it.

    Raises:
        UserError: if wandb is not installed; or, with `online`, if there is no key or the server refuses it.
    """
    chosen = chosen and limited(chosen)
    if chosen == "online":
        sign_in("wandb=online", "set wandb=offline")
    elif chosen == "offline":
        try:
            package()
        except ImportError as error:
            raise UserError(
                f"wandb=offline needs the wandb package ({error}): run 'pip install wandb', or set wandb=off"
            ) from error


def mode_of(chosen: Mode | None) -> Mode:
    """Return the mode that `wandb=` means on this machine, without any request to a server.

    The environment and the command `wandb offline` limit it. If `wandb` is unset, wandb's own settings determine
    the mode. A problem with them prints a warning and raises no error.
    """
    if chosen is not None or allowed() == "off":
        return limited(chosen or "off")
    try:
        package()
        from wandb.sdk import wandb_setup

        # The mode comes from WANDB_MODE or from the command `wandb offline`.
        mode = wandb_setup.singleton().settings.mode
        if mode == "disabled":
            return "off"
        return limited("online" if mode == "online" and _credentials() else "offline")
    except ImportError:
        return "off"
    except Exception as error:  # for example, a key of the wrong length
        _warn(f"runs are kept offline: {one_line(error)}")
        return "offline"


def _credentials() -> Any:
    """Return the login that wandb finds in the environment, netrc or its settings, or None."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    host = wbauth.HostUrl(settings.base_url, app_url=settings.app_url)
    return wbauth.authenticate_session(
        host=host, source=PROJECT, prompt=False, update_session=False
    )


# --- one run --------------------------------------------------------------------------------------


class Tracker:
    """A wandb run that never raises: its first failure prints a warning and ends the tracking."""

    def __init__(self, run: Any = None, run_dir: Path = Path(), is_new: bool = True) -> None:
        """Track a run.

        Args:
            run: wandb's run object, or None to track nothing.
            run_dir: the run's folder.
            is_new: True if wandb has no rows of this run yet.
        """
        self._run = run
        self._run_dir = run_dir
        self._is_new = is_new
        self._curves = {"step"}

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl. The x of its curves is `step`, so a row sent twice is one point."""

        def send(run: Any) -> None:
            for name in row.keys() - self._curves:
                run.define_metric(name, step_metric="step")
                self._curves.add(name)
            run.log(dict(row))

        self._spare(send)

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the rows of a resumed run that wandb may lack: the last rows, or all rows if the run is new."""
        for row in rows if self._is_new else rows[-SENT_AGAIN:]:
            self.log(row)

    def finish(self, done: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Log the content of done.json as the summary, and the model as an artifact that can be loaded."""

        def send(run: Any) -> None:
            run.summary.update(dict(done))
            run.log_artifact(_model_artifact(self._run_dir, facts))

        self._spare(send)

    def send(self, make: Callable[[], Mapping[str, Any]]) -> bool:
        """Log the values that `make` returns. Return whether the run is still tracked afterwards."""
        self._spare(lambda run: run.log(dict(make())))
        return self._run is not None

    def close(self, exit_code: int = 0) -> None:
        """Send the remaining data, and mark the run finished, or failed if `exit_code` is not 0."""
        self._spare(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _spare(self, send: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            with _staged_in(self._run_dir):
                send(self._run)
        except Exception as error:
            _warn(
                f"{self._run_dir.name} is no longer tracked ({one_line(error)}); its metrics.jsonl is complete"
            )
            _abandon(self._run)
            self._run = None


@contextmanager
def tracked(config: Config) -> Iterator[Tracker]:
    """Yield the tracker of a run while it trains, in the first process if several train one model."""
    tracker = start(config, config.run_dir, tell=True)
    try:
        yield tracker
    except BaseException:
        tracker.close(exit_code=1)
        raise
    tracker.close()


def start(config: Config, run_dir: Path, tell: bool = False) -> Tracker:
    """Begin or continue the wandb run of a run. If the server cannot be reached, the run is kept offline.

    Args:
        config: the run's configuration; its paths may be out of date if the run was moved.
        run_dir: the run's present folder.
        tell: True to print the address of an online run.
    """
    mode = mode_of(config.wandb)
    if mode == "off":
        return Tracker()
    try:
        known = identity(run_dir)
        known = known if known.get("config") == config.hash else {}
        try:
            run = _init(config, run_dir, known, mode)
        except Exception as error:
            if mode == "offline":
                raise
            _warn(f"{run_dir.name} is kept offline for 'wandb sync': {one_line(error)}")
            with suppress(Exception, SystemExit):
                package().teardown()  # otherwise the failed run would still occupy the id
            run = _init(config, run_dir, known, "offline")
        now = {"id": run.id, "project": run.project, "entity": run.entity or known.get("entity")}
        is_new = known.get("id") != run.id
        if is_new:
            write_identity(run_dir, now | {"config": config.hash, "wandb": config.wandb})
        if tell and run.url:
            say(f"wandb: {run_dir.name} is at {run.url}")
        return Tracker(run, run_dir, is_new)
    except Exception as error:
        _warn(f"{run_dir.name} is not tracked: {one_line(error)}")
        return Tracker()


def _init(config: Config, run_dir: Path, known: Mapping[str, Any], mode: Mode) -> Any:
    wandb = package()
    destination = {
        "id": known.get("id", secrets.token_hex(6)),
        "project": known.get("project", os.environ.get("WANDB_PROJECT", PROJECT)),
        "entity": known.get("entity", os.environ.get("WANDB_ENTITY")),
    }
    under_agent = "WANDB_SWEEP_ID" in os.environ  # an agent sets the run's id, project and entity
    return wandb.init(
        **({} if under_agent else destination),
        dir=run_dir,
        name=_shortened(config.run_name),
        group=_shortened(config.study),
        config=_config(config),
        mode=mode,
        resume="allow",
        reinit="create_new",  # leave a wandb run that a notebook started open
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            **ANONYMOUS,
        ),
    )


def identity(run_dir: Path) -> dict[str, Any]:
    """Return the content of wandb.json if this user has written it here; empty for any other file, or none.

    A run that was received from another person thus has no identity: its wandb.json could name any project.
    """
    try:
        known = read_json(run_dir / IDENTITY, dict[str, Any], "")
        signature = str(known.pop("signature", ""))
        is_own = hmac.compare_digest(signature.encode(), _signature(known).encode())
    except (OSError, UserError):
        return {}
    return known if is_own else {}


def write_identity(run_dir: Path, known: Mapping[str, Any]) -> None:
    """Write wandb.json, signed. Without a folder for the key it has no signature, so that nothing continues it.

    Raises:
        UserError: if the run's folder cannot be written.
    """
    content = dict(known)
    with suppress(OSError):
        content["signature"] = _signature(known)
    write_text(run_dir / IDENTITY, json.dumps(content) + "\n")


def _signature(known: Mapping[str, Any]) -> str:
    message = json.dumps(known, sort_keys=True).encode()
    return hmac.new(_key(), message, "sha256").hexdigest()


def _key() -> bytes:
    """Return the random key of this user on this machine, created at the first use.

    Raises:
        OSError: if the user has no such folder.
    """
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "soluscope"
    path = folder / "key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder) as made:  # only its owner may read it
            made.write(secrets.token_bytes(32))
            made.flush()
            with suppress(FileExistsError):  # another process was faster
                os.link(made.name, path)
    return path.read_bytes()


def _config(config: Config) -> dict[str, Any]:
    """Return flat keys for grouping and filtering in a dashboard, and the whole configuration under one key.

    The keys have no dots, because wandb's panels group dotted keys inconsistently. `arm` and `tag` are left
    out: under an agent, wandb fixes them at the sweep's values.
    """
    model, train, mid = config.model, config.train, config.mid
    gain = getattr(mid, "gain", None)
    # With an explicit gain, kappa has no effect.
    dosed = hasattr(mid, "epsilon") and gain in (None, "init")
    return {
        "variant": config.variant, "seed": config.seed, "study": config.study, "size": config.size,
        "data": config.data, "arm_name": config.arm, "config": config.hash,
        "lr": train.lr, "kappa": mid.dose(model.d_mlp) if dosed else None,
        "gain": gain, "d_model": model.d_model, "d_mlp": model.d_mlp, "n_layers": model.n_layers,
        "ctx": model.ctx, "steps": train.steps, "batch_size": train.batch_size,
        "tokens": train.steps * train.batch_size * model.ctx, "resolved": for_others(asdict(config)),
    }  # fmt: skip


def _model_artifact(run_dir: Path, facts: Mapping[str, Any]) -> Any:
    name = _shortened(re.sub(r"[^A-Za-z0-9_.-]", "-", f"{facts['study']}-{facts['run']}"))
    artifact = package().Artifact(name, type="model", metadata=dict(facts))
    config = read_config(run_dir / "config.yaml")
    with artifact.new_file("config.yaml", encoding="utf8") as file:
        file.write(to_yaml(for_others(asdict(config))))
    paths = [run_dir / file for file in ("model.safetensors", "model.json")]
    for path in (*paths, run_dir.parent / "tokenizer.json"):
        # skip_cache=True, because by default wandb first copies every model into the home folder.
        artifact.add_file(str(path.resolve()), policy="immutable", skip_cache=True)
    return artifact


def _shortened(name: str) -> str:
    """Return a name that wandb accepts. The end of a longer name is replaced by a hash of the whole name."""
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 13]}-{digest(name)}"


@contextmanager
def _staged_in(run_dir: Path) -> Iterator[None]:
    """Make wandb stage tables in the run's folder instead of the home folder, where they are hard to find."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str((run_dir / "wandb").resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


def _abandon(run: Any) -> None:
    """Finish a wandb run that has failed; if that fails too, stop wandb's service."""
    try:
        run.finish(exit_code=1)
    except Exception:
        with suppress(Exception, SystemExit):
            package().teardown(exit_code=1)


def _warn(message: str) -> None:
    say(f"warning: wandb: {message}")
