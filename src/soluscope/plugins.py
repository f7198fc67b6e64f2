"""Open sets: folders of modules, each of which defines one object under an agreed name.

The files in the folder are the list of members. `names` reads the folder without importing a member, so that
an error about a misspelt name appears at once. `pick` imports only the requested file.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

from soluscope.errors import UserError


def names(package: str) -> list[str]:
    """Return the sorted names of the modules in `package`, except names with a leading underscore."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def pick(package: str, name: str) -> Any:
    """Return the object that `package`/`name`.py defines. It is named by the package's singular, in capitals.

    A file of `soluscope.variants` defines VARIANT, and a file of `soluscope.proxies` defines PROXY.

    Raises:
        UserError: if the folder has no such file; the message suggests the nearest name.
    """
    folder = package.rsplit(".", 1)[-1]
    kind = f"{folder[:-3]}y" if folder.endswith("ies") else folder.removesuffix("s")
    check_name(kind, name, names(package))
    return getattr(importlib.import_module(f"{package}.{name}"), kind.upper())


def check_name(kind: str, name: str, known: list[str]) -> None:
    """Refuse a `name` that is not among `known`, and suggest the nearest known name."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"no {kind} called {name!r}.{hint} There are: {', '.join(known)}")
