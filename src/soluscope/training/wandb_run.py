"""A run in wandb: its curves and its model. Online, offline, or not at all.

runs/<study>/<run>/wandb.json  which wandb run it is, so that a resumed run and its probes go on in it
runs/<study>/<run>/wandb/      wandb's own files; `wandb sync` uploads those that were written offline

wandb only listens: where it fails, that is said once on stderr, and what it listened to goes on. The
package is imported when it is needed, and never where it is off.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.files import write_text
from soluscope.wandb_client import PROJECT, one_line, package, sign_in

Mode = Literal["online", "offline", "off"]

FLUSH_SECONDS = 0.1
"""wandb's own 15 seconds are what a SIGKILL would take from an offline run."""
SENT_AGAIN = 100
"""Rows that a resumed run sends once more: the last ones before the kill may not have been flushed."""
START_SECONDS, FINISH_SECONDS = 30, 60
"""How long an unreachable server holds a run up, at its start and at its end."""
IDENTITY = "wandb.json"


# --- which mode -----------------------------------------------------------------------------------


def check_login(chosen: Mode | None) -> None:
    """Refuse what `wandb=` asks for in words and cannot be had.

    Raises:
        UserError: wandb is not installed; or `online`, and there is no key, or the server refuses it.
    """
    if chosen == "online":
        sign_in("wandb=online", "set wandb=offline")
    elif chosen == "offline":
        try:
            package()
        except ImportError as error:
            raise UserError(
                f"wandb=offline wants the wandb package ({error}): pip install wandb, or set wandb=off"
            ) from error


def mode_of(chosen: Mode | None) -> Mode:
    """What `wandb=` comes to here. Nothing is sent to find out; unset, it never fails."""
    if chosen is not None:
        return chosen
    if os.environ.get("WANDB_MODE") == "disabled":
        return "off"
    try:
        package()
        from wandb.sdk import wandb_setup

        mode = wandb_setup.singleton().settings.mode  # WANDB_MODE, or what `wandb offline` has set
        if mode == "disabled":
            return "off"
        return "online" if mode == "online" and _credentials() else "offline"
    except ImportError:
        return "off"
    except Exception as error:  # a key of the wrong length, for one
        _warn(f"kept offline: {one_line(error)}")
        return "offline"


def _credentials() -> Any:
    """What wandb would log in with, or None: from the environment, netrc or its settings."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    host = wbauth.HostUrl(settings.base_url, app_url=settings.app_url)
    return wbauth.authenticate_session(
        host=host, source=PROJECT, prompt=False, update_session=False
    )


# --- one run --------------------------------------------------------------------------------------


class Tracker:
    """A wandb run that never raises: its first failure is told, and ends it."""

    def __init__(self, run: Any = None, run_dir: Path = Path(), is_new: bool = True) -> None:
        """Follow `run`, wandb's own, which `is_new` where wandb has seen nothing of it; None: nothing."""
        self._run = run
        self._run_dir = run_dir
        self._is_new = is_new
        self._curves = {"step"}

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl. Its `step` is the curves' x, so that a row sent twice is one point."""

        def send(run: Any) -> None:
            for name in row.keys() - self._curves:
                run.define_metric(name, step_metric="step")
                self._curves.add(name)
            run.log(dict(row))

        self._spare(send)

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of a resumed run that wandb may not have: all of them where the run is new to it."""
        for row in rows if self._is_new else rows[-SENT_AGAIN:]:
            self.log(row)

    def finish(self, done: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """What done.json and model.json say, and the model with all that is needed to load it."""

        def send(run: Any) -> None:
            run.summary.update(dict(done))
            run.log_artifact(_model_artifact(self._run_dir, facts))

        self._spare(send)

    def send(self, make: Callable[[], Mapping[str, Any]]) -> bool:
        """Log the values that `make` returns. Return whether the run is still tracked afterwards."""
        self._spare(lambda run: run.log(dict(make())))
        return self._run is not None

    def close(self, exit_code: int = 0) -> None:
        """Send what is left. The run is then marked finished, or failed if the code is not 0."""
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
                f"{self._run_dir.name} is no longer tracked ({one_line(error)}); its folder has every row"
            )
            _abandon(self._run)
            self._run = None


@contextmanager
def tracked(config: Config) -> Iterator[Tracker]:
    """The tracker of a run while it trains. In one process of those that train a model together."""
    tracker = start(config, config.run_dir, tell=True)
    try:
        yield tracker
    except BaseException:
        tracker.close(exit_code=1)
        raise
    tracker.close()


def start(config: Config, run_dir: Path, tell: bool = False) -> Tracker:
    """Begin the run's wandb run or go on in it; a server that is not there leaves it offline.

    Args:
        config: of the run, which may have been moved since.
        run_dir: where it is now.
        tell: print the address of an online run.
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
                package().teardown()  # it holds on to the id
            run = _init(config, run_dir, known, "offline")
        now = {"id": run.id, "project": run.project, "entity": run.entity or known.get("entity")}
        is_new = known.get("id") != run.id
        if is_new:
            write_text(run_dir / IDENTITY, json.dumps(now | {"config": config.hash}) + "\n")
        if tell and run.url:
            print(f"wandb: {run_dir.name} is at {run.url}", file=sys.stderr)
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
    under_agent = "WANDB_SWEEP_ID" in os.environ  # it says which run this is, and where
    return wandb.init(
        **({} if under_agent else destination),
        dir=run_dir,
        name=config.run_name,
        group=config.study,
        config=_config(config),
        mode=mode,
        resume="allow",
        reinit="create_new",  # a notebook's own run is left alone
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        ),
    )


def identity(run_dir: Path) -> dict[str, Any]:
    """wandb.json, empty if it is not there or broken."""
    try:
        known = json.loads((run_dir / IDENTITY).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _config(config: Config) -> dict[str, Any]:
    """What a dashboard groups and filters by, flat; the whole configuration under one key.

    Dotted keys group differently from one wandb panel to the next. `arm` and `tag` are not among them: under
    an agent, wandb holds these at the sweep's own words.
    """
    model, train, mid = config.model, config.train, config.mid
    gain = getattr(mid, "gain", None)
    dosed = hasattr(mid, "epsilon") and gain in (
        None,
        "init",
    )  # else the norm's gain is given outright
    return {
        "variant": config.variant, "seed": config.seed, "study": config.study, "size": config.size,
        "data": config.data, "arm_name": config.arm, "config": config.hash,
        "lr": train.lr, "kappa": mid.epsilon(model.d_mlp) * model.d_mlp**2 if dosed else None,
        "gain": gain, "d_model": model.d_model, "d_mlp": model.d_mlp, "n_layers": model.n_layers,
        "ctx": model.ctx, "steps": train.steps, "batch_size": train.batch_size,
        "tokens": train.steps * train.batch_size * model.ctx, "resolved": asdict(config),
    }  # fmt: skip


def _model_artifact(run_dir: Path, facts: Mapping[str, Any]) -> Any:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{facts['study']}-{facts['run']}")
    artifact = package().Artifact(name, type="model", metadata=dict(facts))
    paths = [run_dir / file for file in ("model.safetensors", "model.json", "config.yaml")]
    for path in (*paths, run_dir.parent / "tokenizer.json"):
        # From where it lies: by default wandb copies every model into the home folder first.
        artifact.add_file(str(path.resolve()), policy="immutable", skip_cache=True)
    return artifact


@contextmanager
def _staged_in(run_dir: Path) -> Iterator[None]:
    """wandb stages tables in the home folder, where nobody would look for a run's files."""
    given = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = given or str((run_dir / "wandb").resolve())
    try:
        yield
    finally:
        if given is None:
            del os.environ["WANDB_DATA_DIR"]


def _abandon(run: Any) -> None:
    """Let go of a run that has failed, and of wandb's service if that is what failed."""
    try:
        run.finish(exit_code=1)
    except Exception:
        with suppress(Exception, SystemExit):
            package().teardown(exit_code=1)


def _warn(what: str) -> None:
    print(f"warning: wandb: {what}", file=sys.stderr)
