"""The guard before the page: only this machine's browser, with the token of this start, may use it.

Refused are requests that name another host (a foreign name that resolves to this machine), that come from
another origin (another site, or another port of this machine), or that have no session. A policy in every answer
allows style sheets and scripts of the same address, and nothing else, unless the answer has a policy already.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HOSTS = ("127.0.0.1", "localhost")
MOST_BYTES = 64_000
"""Most bytes of a request's body."""
MOST_SESSIONS = 100
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Under no-referrer, a browser sends the origin `null` with a form, which could not be checked.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An application that answers only requests of a browser that has presented the token."""

    def __init__(self, app: App, token: str, command: str, new_session: Callable[[], Any]) -> None:
        """Guard an application.

        Args:
            app: the application. Its requests have a `session` and a `body` in their scope.
            token: the secret of the link that opens the page.
            command: the command that prints this link.
            new_session: function that returns the state of a browser that has presented the token.
        """
        self.app = app
        self.token = token
        self.command = command
        self.new_session = new_session
        self.sessions: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        problem = _foreign(scope["method"], headers, self.command)
        if problem:
            return await _refuse(send, 403, problem)
        name = f"soluscope-{headers['host'].rpartition(':')[2]}"  # cookies of a host are common to its ports
        key = _cookie(headers.get("cookie", ""), name)
        cookie = ""
        if key not in self.sessions and self._has_token(scope):
            if len(self.sessions) >= MOST_SESSIONS:
                return await _refuse(
                    send, 403, "Too many browsers have opened this page. Start it again."
                )
            key = secrets.token_urlsafe(32)
            self.sessions[key] = self.new_session()
            cookie = f"{name}={key}; HttpOnly; SameSite=Strict; Path=/"
        if key not in self.sessions:
            return await _refuse(
                send,
                403,
                f"This page needs the link that '{self.command}' has printed. Open that link.",
            )
        body = await _body(receive)
        if body is None:
            return await _refuse(send, 413, "The request is too long.")
        scope["session"], scope["body"] = self.sessions[key], body
        return await self.app(scope, receive, _with_headers(send, cookie))

    def _has_token(self, scope: Scope) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        first = scope["method"] == "GET" and scope["path"] == "/"
        return first and secrets.compare_digest(given.encode(), self.token.encode())


def _foreign(method: str, headers: dict[str, str], command: str) -> str:
    """Return the reason to refuse a request that another site may have made; empty if there is none."""
    host = headers.get("host", "")
    name, _, port = host.rpartition(":")
    if name not in HOSTS or not port.isdigit():
        return f"This page answers only at 127.0.0.1. Open the link that '{command}' has printed."
    origin = headers.get("origin")
    if method not in ("GET", "HEAD") and origin != f"http://{host}":
        return "This request comes from another page, and is refused."
    if origin is not None and origin != f"http://{host}":
        return "This request comes from another page, and is refused."
    site = headers.get("sec-fetch-site", "none")
    is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if site not in ("none", "same-origin") and not is_link:
        return "This request comes from another page, and is refused."
    return ""


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


async def _body(receive: Receive) -> bytes | None:
    """Return a request's body, or None for a body that is too long."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return bytes(body)


def _with_headers(send: Send, cookie: str = "") -> Send:
    """Return a `send` that adds the guard's headers to every answer, where the answer does not have them."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [*message.get("headers", ())]
            known = {name.lower() for name, _ in own}
            added = {**HEADERS, **({"set-cookie": cookie} if cookie else {})}
            message["headers"] = [
                *own,
                *(
                    (name.encode(), value.encode())
                    for name, value in added.items()
                    if name.encode() not in known
                ),
            ]
        await send(message)

    return sending


async def _refuse(send: Send, status: int, text: str) -> None:
    """Answer with one line of plain text."""
    body = f"{text}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
