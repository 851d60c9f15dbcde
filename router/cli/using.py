"""Command lines of the commands that use a model: `run`."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from router.cli.client import CannotAsk
from router.cli.commands import LOOK, Command, Commands
from router.cli.remote import KEY_NOTE, place

PRIORITIES = ("high", "normal", "low")


def add_parsers(commands: Commands) -> None:
    at = place()
    run = commands.add(
        LOOK,
        "run",
        "chat.command.run",
        "ask a model, or chat with it",
        at,
        description="Ask a model. Without a prompt, in a terminal, chat with it; /help shows the commands there. "
        "What is piped in follows the prompt. If the output is no terminal, it is the text of the answer only.",
        notes=KEY_NOTE,
        examples=(
            "llama-router run qwen",
            'llama-router run qwen "Why is the sky blue?"',
            'git diff | llama-router run qwen "Write a commit message" > message',
        ),
    )
    _add_run(run)


def _add_run(run: Command) -> None:
    """Add the arguments of `run`."""
    run.takes_options_anywhere = True
    run.add_argument("model", metavar="MODEL")
    run.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="*",
        help="what to ask, followed by standard input if that is piped; without either, chat in the terminal",
    )
    run.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    for name, what in (("--image", "an image"), ("--file", "a text")):
        text = f"{what} that goes with the prompt; may be repeated"
        run.add_argument(name, action="append", default=[], metavar="FILE", help=text)
    run.add_argument("--temperature", type=float, metavar="NUMBER", help="0 always takes the likeliest token")
    run.add_argument(
        "--top-p", type=float, metavar="NUMBER", help="take only the likeliest tokens, up to this sum"
    )
    run.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    run.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    run.add_argument(
        "--think", type=_setting("think"), metavar="WORD", help="on, off, low, medium or high, if the model can"
    )
    run.add_argument(
        "--json", dest="format", action="store_const", const={"type": "json_object"}, help="answer in JSON"
    )
    run.add_argument(
        "--format", type=_setting("format"), metavar="FORMAT", help="json, a JSON Schema, or a file with one"
    )
    run.add_argument("--priority", choices=PRIORITIES, default="", help="priority of the requests")
    run.add_argument(
        "--no-stream", dest="stream", action="store_false", help="print the answer when it is complete"
    )
    run.add_argument("-v", "--verbose", action="store_true", help="print the figures of each answer")
    run.add_argument(
        "--no-history", dest="history", action="store_false", help="do not keep what is typed in the chat"
    )


def _setting(name: str) -> Any:
    """Return the type of an option that is a setting of chats."""

    def read(text: str) -> Any:
        try:
            return import_module("router.cli.chat.settings").value_of(name, text)
        except CannotAsk as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
