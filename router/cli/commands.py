"""The commands of the program: their groups and examples in the help, and the advice on a wrong one.

A command's module is imported when it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

LOOK, MODELS, CONFIGURATION = "Run and look", "Models", "Configuration"
"""Groups of commands."""

_USE = "`llama-router {}`"
_ELSEWHERE = {
    **dict.fromkeys(("status", "running", "state"), _USE.format("ps")),
    **dict.fromkeys(("models", "ls-models", "available"), _USE.format("list")),
    **dict.fromkeys(("info", "inspect", "describe"), _USE.format("show MODEL")),
    **dict.fromkeys(("start", "server", "up"), _USE.format("serve") + ", or `llama-router load MODEL`"),
    **dict.fromkeys(("download", "install", "fetch", "get"), _USE.format("pull MODEL")),
    **dict.fromkeys(("delete", "remove", "uninstall", "del"), _USE.format("rm MODEL")),
    **dict.fromkeys(("eject", "kill", "sleep"), _USE.format("unload MODEL")),
    **dict.fromkeys(("preload", "warm", "pin", "keep"), _USE.format("load MODEL --keep 1h")),
    **dict.fromkeys(("copy", "alias", "tag"), _USE.format("cp MODEL NAME")),
    **dict.fromkeys(("chat", "ask", "generate", "cli"), _USE.format("run MODEL")),
    **dict.fromkeys(("cancel", "abort"), _USE.format("requests cancel ID")),
    **dict.fromkeys(("history", "activity"), _USE.format("requests")),
    **dict.fromkeys(("log", "tail"), _USE.format("logs MODEL")),
    **dict.fromkeys(("restart", "refresh"), _USE.format("reload")),
    **dict.fromkeys(("config", "validate", "test", "doctor"), _USE.format("check")),
    **dict.fromkeys(("convert", "migrate"), _USE.format("import FILE")),
    **dict.fromkeys(("perf", "benchmark", "llama-bench"), _USE.format("bench MODEL")),
    **dict.fromkeys(("fit", "fit-params", "size", "vram", "memory"), _USE.format("estimate MODEL")),
    "version": _USE.format("--version"),
    "push": "the hub's own tool (hf upload)",
}
"""Commands of other programs, and what people try, with the command that does it here."""


class Help(argparse.HelpFormatter):
    """Formats help: paragraphs are wrapped, and indented lines, such as examples, are left as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line.startswith(" ") or not line else super(Help, self)._fill_text(line, width, indent)
            for line in lines
        )


class Command(argparse.ArgumentParser):
    """Parser of one command."""

    takes_options_anywhere = False
    """Whether options may also stand between the command's words, which argparse does not allow by itself."""
    _is_inside = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", Help)
        super().__init__(*arguments, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_inside or not self.takes_options_anywhere:
            return super().parse_known_args(args, namespace)
        self._is_inside = True  # the function below calls this one
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


class Commands:
    """All commands by group."""

    def __init__(self, program: argparse.ArgumentParser) -> None:
        self._program = program
        self._parsers: argparse._SubParsersAction[Command] = program.add_subparsers(
            required=True, metavar="COMMAND", prog="llama-router", parser_class=Command
        )
        self.groups: dict[str, list[tuple[str, str]]] = {LOOK: [], MODELS: [], CONFIGURATION: []}
        """Each command with its help in one line."""

    @property
    def names(self) -> Iterable[str]:
        """The commands, also under further names."""
        return self._parsers.choices

    @property
    def parsers(self) -> Mapping[str, Command]:
        """The parser of each command, by each of its names."""
        return self._parsers.choices

    def add(
        self,
        group: str,
        name: str,
        run: str | None,
        text: str,
        *shared: Command,
        examples: Sequence[str],
        description: str = "",
        notes: str = "",
        also: Sequence[str] = (),
        **options: Any,
    ) -> Command:
        """Add a command, which is run by the function `run`: `module.function`, in this package.

        `text` is its help in one line, `shared` are parsers with options that it has in common with others, and
        `also` are further names.
        """
        self.groups[group].append((f"{name}, {', '.join(also)}" if also else name, text))
        shown = "\n".join(f"  {example}" for example in examples)
        heading = "Example:" if len(examples) == 1 else "Examples:"
        epilog = "\n\n".join(filter(None, (notes, f"{heading}\n{shown}")))
        parser = self._parsers.add_parser(
            name,
            aliases=list(also),
            parents=list(shared),
            help=text,
            description=description or f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            **options,
        )
        parser.set_defaults(run=_Later(run) if run is not None else None)
        return parser

    def advice_on(self, word: str) -> str:
        """Return what to do instead of a command that there is not."""
        if (instead := _ELSEWHERE.get(word.lower())) is not None:
            return f"use {instead}"
        if close := get_close_matches(word.lower(), self.names, 3):
            return f"did you mean {' or '.join(close)}?"
        path = Path(word)
        try:
            if path.is_dir():
                return f"to serve the models of a folder: `llama-router --models-dir {word}`"
            if path.is_file():
                kind = "--config" if path.suffix in (".json", ".yaml", ".yml") else "estimate"
                folder = f", or `llama-router --models-dir {path.parent}`" if kind == "estimate" else ""
                return f"use `llama-router {kind} {word}`{folder}"
        except OSError:  # the word is too long for a file
            pass
        return "`llama-router --help` lists the commands"


class _Later:
    """A function that is imported when it is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, options: argparse.Namespace) -> None:
        self.function(options)

    @property
    def function(self) -> Callable[[argparse.Namespace], None]:
        module, _, name = self.name.rpartition(".")
        function: Callable[[argparse.Namespace], None] = getattr(import_module(f"router.cli.{module}"), name)
        return function
