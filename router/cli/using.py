"""Command lines of the commands that use a model: `run` and `bench`; and `completion`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from router.cli.client import JSON_OBJECT, PRIORITIES, CannotAsk
from router.cli.commands import CONFIGURATION, LOOK, Command, Commands
from router.cli.remote import KEY_NOTE, place, positive


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
    bench = commands.add(
        LOOK,
        "bench",
        "bench.command.run",
        "measure the rates of a model, and compare them",
        at,
        description="Ask a model with several clients at once, and print the rates that they get: medians of the "
        "rounds, with half their range. Prompts are new in each round, so that nothing is cached.",
        notes=KEY_NOTE,
        examples=(
            "llama-router bench qwen -p 512 -n 128 --clients 1,4 --save before.json",
            "llama-router bench qwen --clients 4 --priority high,low",
            "llama-router bench --compare before.json after.json",
        ),
    )
    _add_bench(bench)


def add_completion(commands: Commands) -> None:
    completion = commands.add(
        CONFIGURATION,
        "completion",
        "completion.script",
        "print a script that completes commands and models in a shell",
        description="Print a script by which a shell completes commands, options, files, and the names of the "
        "models of a running router.",
        examples=(
            "llama-router completion bash > ~/.local/share/bash-completion/completions/llama-router",
            "llama-router completion zsh > ~/.zfunc/_llama-router",
            "llama-router completion fish > ~/.config/fish/completions/llama-router.fish",
        ),
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _add_run(run: Command) -> None:
    """Add the arguments of `run`."""
    run.takes_options_anywhere = True
    run.add_argument("model", metavar="MODEL")
    prompt = run.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="*",
        help="what to ask, followed by standard input if that is piped; without either, chat in the terminal",
    )
    prompt.required = False  # otherwise argparse reports it as missing, too, if MODEL is missing
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
    run.add_argument("--json", dest="format", action="store_const", const=JSON_OBJECT, help="answer in JSON")
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


def _add_bench(bench: Command) -> None:
    """Add the arguments of `bench`."""
    bench.takes_options_anywhere = True
    bench.add_argument("model", metavar="MODEL", nargs="?")
    bench.add_argument("-p", "--prompt", type=positive, default=512, metavar="N", help="tokens of a prompt (512)")
    bench.add_argument("-n", "--output", type=positive, default=128, metavar="N", help="tokens of an answer (128)")
    bench.add_argument("-r", "--repeat", type=positive, default=3, metavar="N", help="rounds (3)")
    bench.add_argument(
        "-c", "--clients", type=_counts, default=(1,), metavar="N,…", help="clients at once, such as 1,4,16 (1)"
    )
    bench.add_argument(
        "--priority",
        type=_priorities,
        default=("",),
        metavar="NAME,…",
        help="priorities, such as high,low: so many clients of each, all at once",
    )
    bench.add_argument(
        "--cached", action="store_true", help="ask the same prompts again, instead of new ones in each round"
    )
    bench.add_argument("--json", action="store_true", help="print the results as JSON")
    bench.add_argument("--save", type=Path, metavar="FILE", help="write the results to a file, to compare with")
    bench.add_argument("--against", type=Path, metavar="FILE", help="compare with saved results")
    bench.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="only compare two saved results")
    bench.set_defaults(wrong=bench.error)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(each) for each in text.split(",")))


def _priorities(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PRIORITIES]:
        raise argparse.ArgumentTypeError(f"there is no priority {unknown[0]!r}, only {', '.join(PRIORITIES)}")
    return names


def _setting(name: str) -> Any:
    """Return the type of an option that is a setting of chats."""

    def read(text: str) -> Any:
        try:
            return import_module("router.cli.chat.settings").value_of(name, text)
        except CannotAsk as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
