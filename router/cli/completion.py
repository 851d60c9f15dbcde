"""Completion in shells, by argcomplete: the script that a shell reads once, and the answers for each Tab.

For an answer, the script runs the program with the line in the environment. Candidates go to a descriptor of their
own, so whatever else is printed meanwhile is not seen.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.completers import BaseCompleter, DirectoriesCompleter, FilesCompleter, SuppressCompleter
from argcomplete.shell_integration import shellcode

from router.cli.client import CannotAsk
from router.cli.commands import Commands
from router.cli.remote import connect
from router.config.problems import ConfigError

_FROM_ELSEWHERE = ("pull", "estimate")
"""Commands whose MODEL is none of the router's."""
_FILES = ("FILE", "FORMAT", "PROMPT")
_ANSWER_SEC = 0.5
"""A shell that waits longer for a Tab seems to hang."""


def script(options: argparse.Namespace) -> None:
    """Print the script for a shell."""
    print(shellcode(["llama-router"], shell=options.shell).strip())


def complete(program: argparse.ArgumentParser, commands: Commands) -> None:
    """Print the candidates for the line in the environment, and end the process."""
    words = os.environ.get("COMP_LINE", "").split()
    is_serve = len(words) > 1 and words[1].startswith("-")  # the default command
    for name, parser in commands.parsers.items():
        parser.takes_options_anywhere = False  # argcomplete follows argparse's own order
        for action in parser._actions:
            if (completer := _completer(name, action)) is not None:
                setattr(action, "completer", completer)  # noqa: B010
    argcomplete.autocomplete(
        commands.parsers["serve"] if is_serve else program,
        always_complete_options=False,
        default_completer=SuppressCompleter(),
    )


def _completer(command: str, action: argparse.Action) -> BaseCompleter | None:
    if action.metavar == "MODEL" and command not in _FROM_ELSEWHERE:
        return _Models()
    if command == "requests" and action.metavar == "ID":
        return _Requests()
    if action.metavar == "DIR":
        return DirectoriesCompleter()
    if action.type is Path or action.metavar in _FILES or (command == "estimate" and not action.option_strings):
        return FilesCompleter()
    return None


class _Models(BaseCompleter):
    """Names of the models of the router."""

    def __call__(self, *, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
        return _ids(parsed_args, "/v1/models", "data")


class _Requests(BaseCompleter):
    """`cancel`, and the ids of live requests."""

    def __call__(self, *, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
        return ["cancel", *_ids(parsed_args, "/v1/requests?state=live", "requests")]


def _ids(options: argparse.Namespace, path: str, name: str) -> list[str]:
    """Return ids from a list of the router that the line means; none if that does not answer at once."""
    asked = argparse.Namespace(url=None, config=None)
    asked.__dict__.update(vars(options))
    try:
        rows = connect(asked).get(path, timeout_sec=_ANSWER_SEC)[name]
        return [row["id"] for row in rows if row["id"].isprintable()]
    except (CannotAsk, ConfigError, KeyError, TypeError):
        return []
