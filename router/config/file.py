"""Reads one configuration file, JSON or YAML, into plain dicts and lists.

Stricter than the underlying parsers: a key that is written twice is an error (so an alias is never silently
lost), and YAML follows version 1.2, where only `true` and `false` are booleans (so `-fa on` stays text). Keys
that begin with `_` are comments and dropped. Values that are never valid (NUL characters, infinite numbers,
endless nesting) are rejected with their keys. The meaning of values is not checked here.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from router.config.problems import ConfigError, KeyPath, Problem, dotted


def read_file(path: Path, name: str) -> dict[str, Any]:
    """Return the contents of `path`, which error messages call `name`. Raises ConfigError."""
    parsers = {".json": _json, ".yaml": _yaml, ".yml": _yaml}
    parse = parsers.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise ConfigError([Problem("", "is a folder; name the file in it", name)])
        if parse is None:
            raise ConfigError([Problem("", "must end in .json, .yaml or .yml", name)])
        tree = parse(path.read_text("utf-8-sig"), name)
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror or error}", name)]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"is not UTF-8 text (byte {error.start})", name)]) from None
    except RecursionError:
        raise ConfigError([Problem("", "is nested too deeply", name)]) from None
    if tree is None:  # an empty YAML file, or one with comments only
        return {}
    if not isinstance(tree, _Mapping):
        raise ConfigError([Problem("", "must be a mapping with keys such as api, system and models", name)])
    cleaning = _Cleaning(name)
    plain: dict[str, Any] = cleaning.plain(tree, ())
    if cleaning.problems:
        raise ConfigError(cleaning.problems)
    return plain


class _Mapping(dict[str, Any]):
    """A mapping as written, with the keys that occurred more than once."""

    twice: tuple[str, ...] = ()


def _mapping(pairs: Iterable[tuple[str, Any]], written: Iterable[str]) -> _Mapping:
    mapping = _Mapping(pairs)
    mapping.twice = tuple(key for key, times in Counter(written).items() if times > 1)
    return mapping


class _Cleaning:
    """Removes comments from the parsed values, and collects problems that do not depend on their meaning."""

    def __init__(self, name: str) -> None:
        self.problems: list[Problem] = []
        self._name = name
        self._values = 0

    def plain(self, value: Any, path: KeyPath) -> Any:
        self._values += 1
        if self._values == _MOST_VALUES:
            self._wrong((), f"has more than {_MOST_VALUES:,} values after its anchors are expanded")
        if self._values >= _MOST_VALUES:
            return None
        if len(path) > _DEEPEST:
            self._wrong(path, "is nested too deeply")
            return None
        if isinstance(value, list):
            return [self.plain(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, _Mapping):
            return self._mapping(value, path)
        if problem := _unusable(value):
            self._wrong(path, problem)
        return value

    def _mapping(self, mapping: _Mapping, path: KeyPath) -> dict[str, Any]:
        written = {key: item for key, item in mapping.items() if not key.startswith("_")}
        for key in written:
            if key in mapping.twice:
                self._wrong((*path, key), "is defined twice; remove one of them")
            elif problem := _unusable(key):
                self._wrong((*path, key), problem)
        return {key: self.plain(item, (*path, key)) for key, item in written.items()}

    def _wrong(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(dotted(path), message, self._name))


_MOST_VALUES = 200_000
"""Limit on values after anchors are expanded: a few hundred bytes of YAML can stand for billions of them."""
_DEEPEST = 100
_LONGEST_INTEGER = 100
_LARGEST_INTEGER = 2**64


def _unusable(value: Any) -> str:
    """Say why a value is invalid for any key; empty if it is not."""
    if isinstance(value, str):
        if "\0" in value:
            return "contains a NUL character, which paths, names and arguments cannot have"
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            return "contains half a character (a lone UTF-16 surrogate)"
    elif isinstance(value, float) and not math.isfinite(value):
        return "should be a finite number"
    elif isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        return "is too large a number (2^64 or more)"
    return ""


def _integer(text: str) -> int:
    """Convert text to an integer, truncating it if it is too long anyway: Python rejects thousands of digits."""
    return int(text[:_LONGEST_INTEGER])


def _json(text: str, name: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> _Mapping:
        return _mapping(pairs, [key for key, _ in pairs])

    try:
        return json.loads(text, object_pairs_hook=mapping, parse_int=_integer)
    except json.JSONDecodeError as error:
        rest, message = text[error.pos :].lstrip(), error.msg
        if rest.startswith(("//", "/*", "#")):
            message = "JSON has no comments: write them as keys that begin with _, or use YAML"
        elif rest.startswith(("}", "]")):
            message = f"a value is missing before this {rest[0]}; is there an extra comma?"
        raise _syntax_error(name, error.lineno, error.colno, message) from None


_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "null", "int", "float", "str", "seq", "map"))
_MANY_KEYS = 1000
_NEEDS_QUOTES = "a value that begins with ! needs quotes"


class _Loader(yaml.SafeLoader):
    """YAML loader with the scalars of YAML 1.2 only: `on`, `yes`, `1:30` and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and its type are PyYAML's

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Apply `<<`, and remove duplicates: repeated merges would otherwise multiply the keys."""
        super().flatten_mapping(node)
        if len(node.value) > _MANY_KEYS:
            node.value = list({_yaml_key(key): (key, item) for key, item in node.value}.values())


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _yaml(text: str, name: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            return None if root is None else _yaml_value(loader, root, {}, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = error.problem or "is not YAML"
        # PyYAML quotes the value here, which may be an unquoted API key.
        if "undefined alias" in message:
            message = "a value that begins with * needs quotes (as an alias, it refers to no anchor)"
        elif "undefined tag handle" in message:
            message = _NEEDS_QUOTES
        elif "found character '\\t'" in message:
            message = "YAML does not allow tabs here: indent with spaces"
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise _syntax_error(name, line, column, message) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise _syntax_error(name, line, column, error.reason) from None


def _yaml_value(loader: _Loader, node: yaml.Node, done: dict[yaml.Node, Any], above: tuple[yaml.Node, ...]) -> Any:
    """Return the value of a node. An anchor's value is built once, kept in `done`, and shared by its aliases."""
    if node.tag not in _TAGS:
        raise yaml.MarkedYAMLError(problem=_NEEDS_QUOTES, problem_mark=node.start_mark)
    if node in above:
        raise yaml.MarkedYAMLError(problem="refers to itself", problem_mark=node.start_mark)
    if node in done:
        return done[node]
    above = (*above, node)
    value: Any
    if isinstance(node, yaml.MappingNode):
        written = [_yaml_key(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        loader.flatten_mapping(node)
        pairs = [(_yaml_key(key), _yaml_value(loader, item, done, above)) for key, item in node.value]
        value = _mapping(pairs, written)
    elif isinstance(node, yaml.SequenceNode):
        value = [_yaml_value(loader, item, done, above) for item in node.value]
    else:
        try:
            value = loader.construct_object(node)
        except (ValueError, LookupError):  # `!!int x`
            message = "this value does not fit its tag"
            raise yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark) from None
    done[node] = value
    return value


def _yaml_key(node: yaml.Node) -> str:
    """Return a key as written: an alias may look like a number, or be called `on`."""
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=node.start_mark)
    return str(node.value)


def _syntax_error(name: str, line: int, column: int, message: str) -> ConfigError:
    return ConfigError([Problem("", message, f"{name}:{line}:{column}")])
