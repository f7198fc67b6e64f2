"""A language model behind an OpenAI-compatible HTTP address, as a function from a prompt to its answer.

The key comes from the environment and is sent to that address alone: redirects are not followed, and without TLS
only an address of this machine gets it. It is part of no error, file or setting.

Source: https://platform.openai.com/docs/api-reference/chat; llama.cpp, vLLM and Ollama serve the same path.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from soluscope.errors import UserError
from soluscope.files import from_json, reason
from soluscope.proxies import Complete

KEY = "SOLUSCOPE_LM_KEY"
"""Environment variable with the key; without it, requests have no key."""
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
TIMEOUT_S = 120
LARGEST = 2**20
"""Most bytes of an answer."""
BUSY = (429, 500, 502, 503, 504)
"""States after which the same request may succeed."""
WAITS_S = (1.0, 4.0, 16.0)
"""Seconds before each further attempt."""
MOST_TOKENS = 200


@dataclass(frozen=True)
class _Message:
    content: str


@dataclass(frozen=True)
class _Choice:
    message: _Message


@dataclass(frozen=True)
class _Answer:
    choices: list[_Choice] = field(default_factory=list)


class _Stay(HTTPRedirectHandler):
    """A handler that follows no redirect, since the key would go with it."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse a redirect."""


def over_http(
    url: str, model: str, key: str = "", sleep: Callable[[float], None] = time.sleep
) -> Complete:
    """Return a language model that is served at `url`/chat/completions.

    Args:
        url: address up to the version, such as http://127.0.0.1:8080/v1.
        model: name of the model, as the server knows it.
        key: key for the server; empty: none.
        sleep: function that waits before a further attempt.

    Raises:
        UserError: if the address is not usable. The returned function raises it if there is no usable answer.
    """
    check_address(url, key)
    opener = build_opener(_Stay)

    def complete(prompt: str) -> str:
        content = {
            "model": model, "temperature": 0, "max_tokens": MOST_TOKENS,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        request = Request(
            f"{url.rstrip('/')}/chat/completions", json.dumps(content).encode(), headers
        )
        for wait in (*WAITS_S, None):
            try:
                with opener.open(request, timeout=TIMEOUT_S) as response:
                    found = from_json(response.read(LARGEST), _Answer)
                return found.choices[0].message.content
            except HTTPError as error:
                error.close()
                if wait is None or error.code not in BUSY:
                    raise UserError(_problem(url, f"status {error.code}")) from None
                sleep(wait)
            except (URLError, OSError, HTTPException, ValueError, IndexError) as error:
                raise UserError(_problem(url, _reason(error))) from None
        raise AssertionError("the last attempt returns or raises")

    return complete


def check_address(url: str, key: str) -> None:
    """Refuse an address that is not HTTP, one that would get the key without TLS, and a key that is no header.

    Raises:
        UserError: if so.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query:
        raise UserError(
            f"lm_url is not an address such as http://127.0.0.1:8080/v1 (a key goes into {KEY}): set lm_url= to one"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{KEY} has characters that no key has: set it again")
    if key and parts.scheme == "http" and host not in THIS_MACHINE:
        raise UserError(f"{KEY} would go to {host} without TLS: set lm_url=https://{host}...")


def _problem(url: str, text: str) -> str:
    return f"no answer from lm_url={url} ({text}): check lm_url=, lm_model= and {KEY}"


def _reason(error: Exception) -> str:
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return reason(error.reason)
    return "it has no choices" if isinstance(error, IndexError) else reason(error)
