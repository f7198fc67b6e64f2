"""YAML files and `key=value` words, read by the types of a schema.

A field of text keeps its text as it was written: `no`, `1e5` and `007` stay names. In a path, `~` and
environment variables are replaced. Fields of other types are read as YAML. `${train.lr}` stands for the value
of another key; no other `${...}` is read, because files come from other people.
"""

from __future__ import annotations

import json
import os
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache, lru_cache, reduce
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from soluscope.errors import UserError

FilePath = Annotated[str, "path"]
"""Type of a field that holds a path, a glob or a name that may be a path."""
AsWritten = Annotated[Any, "as written"]
"""Type of a field whose values keep their text, at any depth, because their types are not known yet."""

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Z_]\w*)\})")
"""An environment variable. Lower-case names in braces are keys of the configuration, as in ${train.lr}."""
_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w.]*\}")
"""The value of another key, as in ${train.lr}."""
_SECRET = re.compile(
    r"(^|_)(API)?(KEY|TOKEN|SECRET|PASS|PASSWD|PASSWORD|CREDENTIALS?)$", re.IGNORECASE
)
"""Name of an environment variable whose value is a secret, such as HF_TOKEN."""
MOST_BYTES_OF_YAML = 1_000_000
"""Largest configuration file; larger ones take seconds to read."""
MOST_DIGITS = 400
"""Most characters of a number; 1e308 has 309 digits, and Python prints no number of more than 4300."""
MOST_VALUES, DEEPEST = 100_000, 50
"""Largest number of values of a YAML text, and deepest level. A text of some lines can have billions of values,
because an alias repeats the values of its anchor."""
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?|\.\d)[\d_]*([eE][-+]?\d+)?$")
"""A number with an exponent; YAML 1.1 takes 1e-3, which has no point, for text."""


class _Loader(yaml.SafeLoader):
    """YAML's loader without dates and without a meaning of `=`, and with 1e-3 as a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":value"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_yaml(path: Path, schema: Any = Any) -> dict[str, Any]:
    """Return the keys of a YAML file, with text and paths as `schema` declares them.

    Raises:
        UserError: if the file does not exist, is too large, is not YAML, has no keys, or a path in it names an
            environment variable that does not exist.
    """
    if not path.is_file():
        raise UserError(f"no configuration file {path}: give the path of a .yaml file")
    try:
        n_bytes = path.stat().st_size
        if n_bytes > MOST_BYTES_OF_YAML:
            raise ValueError(
                f"it has {n_bytes:,} bytes, but at most {MOST_BYTES_OF_YAML:,} are read"
            )
        content = _parsed(path.read_text(encoding="utf-8-sig"), schema, empty={})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains no keys: write lines such as 'key: value'")
    return content


def read_word(key: str, text: str, schema: Any) -> Any:
    """Return the value of `key=text`.

    The text of a text field is taken as it stands. Only `null` and quotes around the whole text have their
    meaning in YAML.

    Raises:
        ValueError: if the text is not YAML, for a field that is not text.
    """
    _encodable(text)
    hint = reduce(_below, key.split("."), schema)
    is_section = hint == AsWritten and "." not in key
    if is_section or not _is_text(hint) or (_is_number(hint) and _NUMBER.match(text)):
        if _is_path(_below(hint)):  # YAML refuses the braces of [${HOME}/x]
            text = _with_variables(text)
        return _parsed(text, hint)
    if text in ("", "null") and hint is not str:
        return None
    if _is_quoted(text):
        try:
            return _parsed(text, hint)
        except ValueError:  # a separator of quotes
            return text
    return expanded(text) if _is_path(hint) else text


def is_path(word: str) -> bool:
    """Return whether a word of the command line is a path: it exists, or cannot be `key=value`."""
    key, equals, _ = word.partition("=")
    return not equals or "/" in key or os.path.exists(word)


def as_word(value: Any) -> str:
    """Return the text with which `read_word` gives back a value that was read as `AsWritten`."""
    if value is None:
        return "null"
    text = str(value)
    if isinstance(value, list | dict) or text == "null" or _is_quoted(text):
        return json.dumps(value, ensure_ascii=False)
    return text


def expanded(path: str) -> str:
    """Return a path in which `~` and environment variables are replaced.

    Raises:
        UserError: if there is no such variable or home folder, and no file of this name either.
    """
    result = os.path.expanduser(_with_variables(path))
    missing = _VARIABLE.search(result)
    if missing and missing[0] in path and not os.path.lexists(path):
        raise UserError(
            f"the path {path!r} needs the environment variable {missing[0].strip('${}')}, which is not set: "
            "set it, or write the path without $"
        )
    home, slash, _ = result.partition("/")
    if slash and home.startswith("~") and not os.path.lexists(home):
        raise UserError(
            f"the path {path!r} begins with {home}, but there is no such user: write it out"
        )
    return _encodable(result)


def _encodable(text: str) -> str:
    """Return `text`, or refuse it if this locale cannot hold its characters in files and their names."""
    try:
        os.fsencode(text)
        text.encode("utf8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text!r} is not text in the encoding {sys.getfilesystemencoding()}: set PYTHONUTF8=1, or "
            "choose another name"
        ) from error
    return text


def _with_variables(text: str) -> str:
    """Replace environment variables by their values; a variable that is not set stays in the text.

    Raises:
        UserError: if a variable's name says that its value is a secret.
    """
    return _VARIABLE.sub(_variable, text)


def _variable(match: re.Match[str]) -> str:
    """Return the value of an environment variable, or the text of one that is not set.

    Raises:
        UserError: if the variable's name says that its value is a secret.
    """
    name = match[1] or match[2]
    if name in os.environ and _SECRET.search(name):
        raise UserError(
            f"a path contains {match[0]}, whose name says that its value is secret: write the path without it"
        )
    return os.environ.get(name, match[0])


def only_references(value: Any) -> None:
    """Refuse a value with a text that contains `${` for anything but the value of another key.

    OmegaConf would replace `${oc.env:NAME}` by an environment variable, which may be a secret.

    Raises:
        ValueError: with the text.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            only_references(key)
            only_references(each)
    elif isinstance(value, list):
        for each in value:
            only_references(each)
    elif isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise ValueError(
            f"{value!r} contains ${{, which may only stand for the value of another key, as in ${{train.lr}}"
        )


def for_seed(path: str, seed: int) -> str:
    """Return a path in which {seed} is replaced by a run's seed."""
    return path.replace("{seed}", str(seed))


def only_seed_in_braces(key: str, path: str) -> None:
    """Refuse a path with other braces than {seed}.

    Raises:
        UserError: naming the key.
    """
    if {"{", "}"} & set(path.replace("{seed}", "")):
        raise UserError(f"{key}={path}: remove all braces except {{seed}}, the only placeholder")


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


# --- values ---------------------------------------------------------------------------------------


def _parsed(text: str, hint: Any, empty: Any = None) -> Any:
    """Return the value of a YAML text for a field of the type `hint`; `empty` for a text without a value.

    Raises:
        ValueError: if the text is not YAML.
    """
    try:
        node = _compose(text)
        return empty if node is None else _build(node, hint)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


@lru_cache(maxsize=256)
def _compose(text: str) -> yaml.Node | None:
    """Return the root of a YAML text. The jobs of a sweep share their files and most of their words.

    Raises:
        ValueError: if the text is nested too deeply, or has too many values once its aliases are replaced.
        yaml.YAMLError: if the text is not YAML.
    """
    n_values, sizes = 0, {}
    above: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, n_values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            sizes[anchor] = n_values - before
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in above]:
                raise ValueError(f"the alias *{event.anchor} stands inside its own anchor")
            n_values += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.NodeEvent):
            n_values += 1
        if len(above) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if n_values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
    return yaml.compose(text, Loader=_Loader)


def _build(node: yaml.Node, hint: Any) -> Any:
    """Return the value of a YAML node for a field of the type `hint`."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, hint)
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, _below(hint)) for child in node.value]
    value = _Loader("").construct_object(node)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and len(node.value) > MOST_DIGITS and not _is_text(hint):
        raise ValueError(f"a number has {len(node.value):,} digits")
    if value is None or not _is_text(hint) or (is_number and _is_number(hint)):
        return value
    return expanded(node.value) if _is_path(hint) else node.value


def without_folders(value: Any, schema: Any) -> Any:
    """Return `value` with only the last part of each absolute path, where `schema` declares paths."""
    if isinstance(value, Mapping):
        return {key: without_folders(each, _below(schema, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each, _below(schema)) for each in value]
    if isinstance(value, str) and _is_path(schema):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def _mapping(node: yaml.MappingNode, hint: Any) -> dict[str, Any]:
    """Return the values of a YAML mapping by key. `<<` adds the keys of other mappings that it lacks itself."""
    content: dict[str, Any] = {}
    added: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError("a key is a list or a mapping: write it as text")
        if key.tag == "tag:yaml.org,2002:merge":
            for other in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                if not isinstance(other, yaml.MappingNode):
                    raise ValueError("<< needs a mapping, as in '<<: *name'")
                added = _mapping(other, hint) | added
        elif key.value in content:
            raise ValueError(f"the key {key.value!r} is given twice")
        else:
            content[key.value] = _build(child, _below(hint, key.value))
    return added | content


# --- types ----------------------------------------------------------------------------------------


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_text(hint: Any) -> bool:
    texts = (str, FilePath, AsWritten)
    return any(each in texts or get_origin(each) is Literal for each in _options(hint))


def _is_path(hint: Any) -> bool:
    return FilePath in _options(hint)


def _is_number(hint: Any) -> bool:
    return any(each in (int, float) for each in _options(hint))


def _below(hint: Any, key: str = "") -> Any:
    """Return the type of the value at `key` of a field of the type `hint`; without a key, of a list's elements."""
    for each in _options(hint):
        if each == AsWritten:
            return each
        if isinstance(each, Mapping):
            return each.get(key, Any)
        if isinstance(each, type) and is_dataclass(each):
            return field_types(each).get(key, Any)
        if get_origin(each) in (list, dict):
            return get_args(each)[-1]
    return Any


@cache
def field_types(schema: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, `FilePath` and `AsWritten` included."""
    return get_type_hints(schema, include_extras=True)
