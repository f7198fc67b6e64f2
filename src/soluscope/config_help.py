"""Help texts for the keys of a configuration: name, default and meaning, read from the schema's source."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from itertools import pairwise

from omegaconf import MISSING

from soluscope import plugins
from soluscope.config import (
    Config,
    EditorConfig,
    EvalConfig,
    NeuronsConfig,
    PretrainedConfig,
    PretrainedNeuronsConfig,
)

NARROW = 80
"""Columns of a terminal below which meanings are written under the keys instead of beside them."""


def train_help() -> str:
    """Return every key of a training run, with its default and meaning."""
    parts = [*help_lines(Config)]
    for section, package in (("mid", "soluscope.variants"), ("corpus", "soluscope.data.sources")):
        members: dict[type, list[str]] = {}
        for name in plugins.names(package):
            members.setdefault(plugins.pick(package, name).params, []).append(name)
        for params, owners in members.items():
            if fields(params):
                kind = "variant" if section == "mid" else "data"
                parts += [
                    "",
                    f"with {kind}={' or '.join(owners)}:",
                    *help_lines(params, f"{section}."),
                ]
    return "\n".join(parts)


def eval_help() -> str:
    """Return every key of an evaluation, and the additional keys for a pretrained model."""
    known = list(help_lines(EvalConfig))
    more = [line for line in help_lines(PretrainedConfig) if line not in known]
    probes = f"probes: {', '.join(plugins.names('soluscope.probes'))}"
    return "\n".join([*known, "", "with a pretrained model:", *more, "", probes])


def neurons_help() -> str:
    """Return every key of `soluscope neurons`, with a pretrained model and with --serve."""
    known = list(help_lines(NeuronsConfig))
    more = [line for line in help_lines(PretrainedNeuronsConfig) if line not in known]
    served = list(help_lines(EditorConfig))
    return "\n".join([*known, "", "with a pretrained model:", *more, "", "with --serve:", *served])


def help_lines(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield `key  default  meaning` for every key of a dataclass; nested keys have dotted names."""
    meanings = _docstrings(schema)
    for item in fields(schema):
        factory = item.default_factory
        default = item.default if factory is NO_DEFAULT else factory()
        if is_dataclass(default):
            yield from help_lines(type(default), f"{prefix}{item.name}.")
        elif item.name in meanings:
            shown = (
                "required" if default == MISSING else "null" if default is None else str(default)
            )
            columns = shutil.get_terminal_size().columns
            if columns < NARROW:
                yield f"  {prefix}{item.name}  {shown}"
                yield from textwrap.wrap(
                    meanings[item.name], columns, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
                continue
            lines = textwrap.wrap(meanings[item.name], width=72)
            yield f"  {prefix + item.name:<24} {shown:<10}  {lines[0]}"
            yield from (" " * 39 + line for line in lines[1:])


def _docstrings(schema: type) -> dict[str, str]:
    """Return the string under each field of a dataclass and of its parents, which is the field's meaning."""
    docs: dict[str, str] = {}
    for owner in reversed(schema.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for before, after in pairwise(definition.body):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs[ast.unparse(before.target)] = " ".join(ast.literal_eval(after.value).split())
    return docs
