"""Reads Ollama's Modelfiles, and writes their parameters.

An instruction is a word in any case and its value, which may be in quotes, and then take several lines; lines that
begin with `#` are comments. Source: parser/parser.go of Ollama.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_ROLES = ("system", "user", "assistant")
_PLAIN = ("from", "system", "template", "license", "adapter", "renderer", "parser", "requires")
_INSTRUCTION = re.compile(r"[ \t]*(\w+)[ \t]*")
_QUOTED = re.compile(r'"""(.*?)"""[ \t]*(?=\n|\Z)|"(?!"")([^"]*)"[ \t]*(?=\n|\Z)', re.DOTALL)
_WORD = re.compile(r'[^\s"]+[ \t]*')
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class BadModelfile(ValueError):
    """Raised for a file that is no Modelfile; the message names the line."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")


@dataclass(slots=True)
class Modelfile:
    """The instructions of a Modelfile."""

    sources: list[tuple[int, str]] = field(default_factory=list)
    """Values of FROM with their lines: a model, or the files of one."""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    """Values of the other instructions by their names in lower case: `system`, `template` …"""


def parsed(text: str) -> Modelfile:
    """Return the instructions. Raises BadModelfile."""
    made = Modelfile()
    for number, name, value in _instructions(text.replace("\r\n", "\n").removeprefix("\ufeff")):
        if name == "parameter":
            _add_parameter(made.parameters, number, value)
        elif name == "message":
            role, _, content = value.partition(" ")
            if role not in _ROLES or not content.strip():
                raise BadModelfile(number, f"MESSAGE takes a role ({', '.join(_ROLES)}) and a text")
            made.messages.append({"role": role, "content": _unquoted(content.strip())})
        elif name == "from":
            made.sources.append((number, value))
        elif name == "adapter":
            made.adapters.append(value)
        elif name == "license":
            made.licenses.append(value)
        else:
            made.others[name] = value
    if not made.sources:
        raise BadModelfile(max(1, text.count("\n")), "there is no FROM, which names the model or its file")
    return made


def parameter_lines(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name and the value of each parameter as `PARAMETER` takes them."""
    for name, value in parameters.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                quotes = '"""' if '"' in item or "\n" in item else '"'
                yield f"{name} {quotes}{item}{quotes}"
            else:
                yield f"{name} {str(item).lower() if isinstance(item, bool) else item}"


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield each instruction with its line, its name in lower case, and its value. Raises BadModelfile."""
    position = 0
    while position < len(text):
        end = _end_of_line(text, position)
        if not (stripped := text[position:end].strip()) or stripped.startswith("#"):
            position = end + 1
            continue
        number = text.count("\n", 0, position) + 1
        found = _INSTRUCTION.match(text, position)
        name = found[1].lower() if found else ""
        if found is None or name not in (*_PLAIN, "parameter", "message"):
            raise BadModelfile(number, f"{stripped.split()[0]!r} is no instruction of a Modelfile")
        value, position = _value(text, found.end(), name, number)
        if not value.strip() and name != "system":
            raise BadModelfile(number, f"{name.upper()} needs a value")
        yield number, name, value


def _value(text: str, start: int, name: str, number: int) -> tuple[str, int]:
    """Return the value that begins at `start`, and where the next line begins.

    It is without its quotes; behind the name of a parameter or a role, with plain ones.
    """
    before = ""
    if name in ("parameter", "message") and (word := _WORD.match(text, start)):
        before, start = word[0], word.end()
    if quoted := _QUOTED.match(text, start):
        inner = quoted[1] if quoted[1] is not None else quoted[2]
        return before + (f'"{inner}"' if before else inner), _end_of_line(text, quoted.end()) + 1
    if text.startswith('"""', start):
        raise BadModelfile(number, 'the text that begins with """ has no end')
    end = _end_of_line(text, start)
    return before + text[start:end].strip(), end + 1


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _add_parameter(parameters: dict[str, Any], number: int, text: str) -> None:
    """Add a parameter; `stop` may be repeated, and is a list."""
    name, _, written = text.partition(" ")
    if not written.strip():
        raise BadModelfile(number, "PARAMETER takes a name and a value")
    name = name.lower()
    if name == "stop":
        parameters.setdefault(name, []).append(_unquoted(written.strip()))
    else:
        parameters[name] = _typed(written.strip())


def _typed(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if _NUMBER.fullmatch(text):
        return float(text) if any(mark in text for mark in ".eE") else int(text)
    return _unquoted(text)
