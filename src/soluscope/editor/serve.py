"""The server of the editor and of a study's neuron pages, on this machine only."""

from __future__ import annotations

import secrets
from pathlib import Path

from soluscope.config import EditorConfig
from soluscope.editor import app
from soluscope.editor.models import Models
from soluscope.errors import UserError
from soluscope.evaluation.one_run import check_device, device_of
from soluscope.serving import server
from soluscope.terminal import answer, say


def serve(folder: Path, config: EditorConfig) -> None:
    """Serve a study's neuron pages and the editor until Ctrl-C, and print their address.

    Args:
        folder: the study, or one of its runs.
        config: port and device.

    Raises:
        UserError: if the study has no neurons or the port is in use.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name a study or a run, as in runs/demo")
    study_dir = folder.parent if (folder / "model.json").is_file() else folder
    check_device(config)
    found = app.ready(study_dir)
    listening = server.listening(config.port)
    token = secrets.token_urlsafe(32)
    say("Open this link in a browser; Ctrl-C ends the page.")
    answer(server.link(listening, token))
    server.run(app.build(study_dir, Models(found, device_of(config)), token), listening)
