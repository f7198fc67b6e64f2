"""Parts of requests and answers that the pages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import Response


def form(request: Request) -> dict[str, str]:
    """Return the fields of a form that was sent, each once."""
    fields = parse_qs(request.scope["body"].decode("utf8", "replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}


def constant(path: Path, kind: str) -> Callable[[Request], Response]:
    """Return an endpoint that answers with the content of a file, which is read once."""
    content = path.read_bytes()

    def endpoint(_: Request) -> Response:
        return Response(content, media_type=kind)

    return endpoint
