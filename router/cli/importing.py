"""`llama-router import`: reads a configuration of llama-swap, writes one of the router, and prints the remarks.

The conversion itself is in `llama_swap.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from router.cli.llama_swap import Remark, Words, imported
from router.config.file import read_file
from router.config.problems import ConfigError, KeyPath, Problem, dotted
from router.system.printable import line as printable_line


def run(options: argparse.Namespace) -> None:
    """Run the command. Raises ConfigError."""
    source: Path = options.file
    tree = read_file(source, str(source))
    document, remarks = imported(
        tree, _lines_of(source.read_text("utf-8-sig")), source.absolute().parent, os.environ
    )
    if not document.get("models"):
        _tell(source, remarks)
        raise ConfigError([Problem("models", "none could be imported", str(source))])
    _write(options.output, f"# Converted from {source} by `llama-router import`.\n{_dumped(document)}")
    _tell(source, remarks)


def _tell(source: Path, remarks: Sequence[Remark]) -> None:
    for remark in remarks:
        text = f"{source}:{remark.line}: {dotted(remark.path)}: {remark.message}"
        print(printable_line(text), file=sys.stderr)


def _write(path: Path | None, text: str) -> None:
    """Write a new file for its owner only, as it may hold keys. Raises ConfigError, also if the file exists."""
    if path is None:
        print(text, end="")
        return
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        problem = "already exists and was not changed: name another file with -o, or remove it"
        raise ConfigError([Problem("", problem, str(path))]) from None
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be written: {error.strerror}", str(path))]) from None


def _lines_of(text: str) -> dict[KeyPath, int]:
    """Return the line number of each key and list item of a YAML or JSON text."""
    lines: dict[KeyPath, int] = {}

    def note(value: yaml.Node, path: KeyPath, mark: yaml.Mark) -> None:
        lines[path] = mark.line + 1
        walk(value, path)

    def walk(node: yaml.Node | None, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                note(value, (*path, str(key.value)), key.start_mark)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                note(item, (*path, index), item.start_mark)

    walk(yaml.compose(text, yaml.SafeLoader), ())
    return lines


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which YAML 1.1 or 1.2 would read as another type, and that writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    Words, lambda dumper, words: dumper.represent_sequence("tag:yaml.org,2002:seq", words, flow_style=True)
)


def _dumped(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
