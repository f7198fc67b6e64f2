"""Settings of the pages' templates, and hashes by which a page's policy allows its own style and scripts."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import BaseLoader, Environment, StrictUndefined


def environment(loader: BaseLoader) -> Environment:
    """Return an environment in which text is escaped and a missing value is an error."""
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def hashes(*contents: str) -> str:
    """Return the sources of a content security policy that allow elements with exactly these contents."""
    sums = (base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in contents)
    return " ".join(f"'sha256-{each.decode()}'" for each in sums)
