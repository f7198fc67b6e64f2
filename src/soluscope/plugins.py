"""Open sets: a folder of modules, each defining one thing of an agreed name.

The folder is the list. `names` reads it without importing anything, so that a misspelt name is
answered at once; `pick` imports the one file that was asked for.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

from soluscope.errors import UserError


def names(package: str) -> list[str]:
    """Names of the modules in `package`, sorted; those with a leading underscore are not members."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def pick(package: str, name: str) -> Any:
    """The object that `package`/`name`.py defines under the package's own singular, in capitals.

    `soluscope.variants` holds `VARIANT`s, `soluscope.probes` holds `PROBE`s.

    Raises:
        UserError: if the folder has no such file; the nearest name is suggested.
    """
    kind = package.rsplit(".", 1)[-1].removesuffix("s")
    check_name(kind, name, names(package))
    return getattr(importlib.import_module(f"{package}.{name}"), kind.upper())


def check_name(kind: str, name: str, known: list[str]) -> None:
    """Refuse a `name` that is not among `known`, naming the nearest one."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"no {kind} called {name!r}.{hint} There are: {', '.join(known)}")
