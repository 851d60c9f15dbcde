"""Command line: `llama-router [serve]` and the other commands.

Modules are imported when their command runs: those of `serve` take most of a second, and `ps` must be fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from router.cli import remote, using
from router.cli.client import CannotAsk
from router.cli.commands import CONFIGURATION, LOOK, MODELS, Command, Commands, Help
from router.config.problems import CannotServe, ConfigError
from router.system import sighup
from router.system.printable import line, printable

if TYPE_CHECKING:
    from router.catalog.load import Load


def main(serve: Callable[[Load], None], arguments: Sequence[str] | None = None) -> None:
    """Run the command of the arguments, by default those of the process; `serve` runs the router.

    Exit codes: 0 done, 1 it failed or was refused, 2 wrong configuration or command line; interrupted: 130.
    """
    _open_standard_files()
    program = Program()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        from router.cli.completion import complete

        complete(program, program.commands)
    options = program.parsed(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if options.run is None:
            _serve(options, serve)
        else:
            sighup.release()
            options.run(options)
            sys.stdout.flush()  # a reader that has gone must not be noticed at the exit only
    except ConfigError as error:
        print(printable(str(error)), file=sys.stderr)
        sys.exit(2)
    except CannotAsk as error:
        _give_up(error)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_files() -> None:
    """Open standard files that the parent process has closed, so that no socket gets their descriptors."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, TextIOWrapper):  # as standard error does for characters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up(error: Exception) -> NoReturn:
    print(printable(f"llama-router: {error}"), file=sys.stderr)
    sys.exit(1)


class Program(argparse.ArgumentParser):
    """Parser of the whole command line."""

    def __init__(self) -> None:
        super().__init__(
            prog="llama-router",
            usage="llama-router [COMMAND] [OPTIONS]",
            description="One address for all your models, for OpenAI, Anthropic and Ollama clients.",
            formatter_class=Help,
        )
        self.add_argument("--version", action=_Version, help="show the version and exit")
        self.commands = Commands(self)
        _add_serve_and_check(self.commands)
        using.add_parsers(self.commands)
        remote.add_parsers(self.commands)
        _add_pull_and_rm(self.commands)
        _add_estimate(self.commands)
        _add_import(self.commands)
        using.add_completion(self.commands)
        self.commands.add(
            CONFIGURATION,
            "schema",
            "check.schema",
            "print the JSON Schema of the configuration",
            examples=("llama-router schema > schema.json",),
        )

    def parsed(self, arguments: list[str]) -> argparse.Namespace:
        """Return the options of a command line. Exits with 2 for a wrong one."""
        words = self.with_command(arguments)
        options, extra = self.parse_known_args(words)
        if extra:
            parser = self.commands.parsers[words[0]]
            wrong = [word for word in extra if word.startswith("-")] or extra
            parser.error(f"unrecognized: {' '.join(map(line, wrong))}{_closest(wrong[0], parser)}")
        return options

    def with_command(self, arguments: list[str]) -> list[str]:
        """Return the arguments with `serve`, the default command, if they name none. Exits with 2 for a wrong
        one."""
        if not arguments:
            return ["serve"]
        first, *others = arguments
        if first in ("-h", "--help", "--version"):
            return arguments
        if first == "help":
            if not others or others[0].startswith("-") or others[0] in self.commands.names:
                return [*others[:1], "--help"]
            first = others[0]
        if first.startswith("-"):
            if first.partition("=")[0] in ("--url", "--json") and (
                named := _first_of(others, self.commands.names)
            ):
                self.error(f"the command comes first: llama-router {named} {first} …")
            return ["serve", *arguments]
        if first not in self.commands.names:
            self.error(f"there is no command {line(repr(first))}: {self.commands.advice_on(first)}")
        return arguments

    def format_help(self) -> str:
        """Return the help of the program: commands by group."""
        known = [command for group in self.commands.groups.values() for command in group]
        width = max(len(name) for name, _ in known) + 2
        groups = [
            "\n".join([f"{group}:", *(f"  {name:<{width}}{text}" for name, text in commands)])
            for group, commands in self.commands.groups.items()
        ]
        return "\n\n".join([f"{self.format_usage()}\n{self.description}", *groups, _MORE])


_MORE = """\
`llama-router COMMAND --help` describes a command, with examples; `llama-router --version` prints the version.

Commands that ask a running router ask the one at --url or LLAMA_ROUTER_URL, else the one that is configured
here, with the key in LLAMA_ROUTER_API_KEY. --json prints one document with the names of the router's API.

Exit codes: 0 done; 1 it failed, or the router refused or did not answer; 2 wrong command line or configuration;
130 interrupted.
"""


def _closest(word: str, parser: argparse.ArgumentParser) -> str:
    """Return a suggestion to append to a message about an unknown option; empty if none is close."""
    known = [name for action in parser._actions for name in action.option_strings]
    if word.partition("=")[0] in ("--host", "--port") and "--url" in known:
        return "; name the router by --url HOST:PORT"
    close = get_close_matches(word.partition("=")[0], known, 1) if word.startswith("-") else []
    return f"; did you mean {close[0]}?" if close else ""


def _first_of(words: Sequence[str], names: Iterable[str]) -> str | None:
    known = set(names)
    return next((word for word in words if word in known), None)


def _add_serve_and_check(commands: Commands) -> None:
    source = Command(add_help=False)
    source.add_argument("--config", type=Path, metavar="FILE", help="configuration, JSON or YAML")
    source.add_argument(
        "--models-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="serve every GGUF file and every model in safetensors in this folder, by its name; may be repeated",
    )
    source.add_argument(
        "--hf-cache", action="store_true", help="serve the models in the Hugging Face cache (system.hf_cache)"
    )
    source.add_argument(
        "--ollama-store", action="store_true", help="serve the models of Ollama (system.ollama_store)"
    )
    source.add_argument("--host", help="address to listen on (api.host)")
    source.add_argument("--port", type=int, help="port to listen on (api.port)")
    source.add_argument("--ollama-port", type=int, help="additional port for Ollama's clients (api.ollama_port)")
    commands.add(
        LOOK,
        "serve",
        None,
        "serve models (the default command)",
        source,
        examples=("llama-router", "llama-router --models-dir ~/models --port 8001"),
    )
    check = commands.add(
        CONFIGURATION,
        "check",
        "check.check",
        "validate the configuration and show it",
        source,
        description="Validate the configuration, read the models' files, and print every value with its origin. "
        "Warnings go to standard error.",
        examples=("llama-router check", "llama-router check --config other.yaml | grep models.qwen"),
    )
    check.add_argument("--json", action="store_true", help="print one JSON document")


def _add_pull_and_rm(commands: Commands) -> None:
    pull = commands.add(
        MODELS,
        "pull",
        "store.pull",
        "download a model from the Hugging Face hub",
        description="Download a model into the Hugging Face cache (HF_HOME) and serve it. An interrupted download "
        "is resumed. HF_TOKEN gives access to gated and private repositories. With --url or LLAMA_ROUTER_URL, "
        "that router downloads it, with its own token.",
        examples=(
            "llama-router pull hf.co/ggml-org/Qwen3-4B-GGUF:Q4_K_M",
            "llama-router pull ggml-org/Qwen3-4B-GGUF --alias qwen --url gpu-box:8000",
        ),
    )
    pull.add_argument(
        "model",
        metavar="MODEL",
        help="hf.co/USER/REPO[:QUANT] (default: Q4_K_M, or the closest) or hf.co/USER/REPO/FILE.gguf",
    )
    pull.add_argument("--alias", metavar="NAME", help="serve it under this name instead of USER/REPO:QUANT")
    pull.add_argument("--json", action="store_true", help="print progress as JSON lines")
    pull.add_argument("--config", type=Path, metavar="FILE", help="configuration whose model names are reserved")
    _add_url(pull)

    remove = commands.add(
        MODELS,
        "rm",
        "store.remove",
        "remove a pulled or created model",
        description="Remove a pulled model, even if only partly downloaded, or a model created by a client "
        "(`create`, `cp`). Files that were cached before, or that another model needs, are kept.",
        examples=("llama-router rm ggml-org/Qwen3-4B-GGUF:Q4_K_M",),
    )
    remove.add_argument("alias", metavar="MODEL")
    remove.add_argument("--json", action="store_true", help="print one JSON document")
    _add_url(remove)
    remove.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration of the router where it was created"
    )
    remove.add_argument("--port", type=int, help="port of that router, if not the configured one")


def _add_url(parser: Command) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help=f"have this router do it, on its machine (default: {remote.URL_VARIABLE}, else it is done here)",
    )


def _add_estimate(commands: Commands) -> None:
    estimate = commands.add(
        MODELS,
        "estimate",
        "estimate.run",
        "estimate a model's memory use before downloading it",
        prog="llama-router estimate",
        usage="llama-router estimate [--json] MODEL [flags of llama-server]",
        description="Print the memory that a model needs on each device, and the largest context that fits. A "
        "model in safetensors is counted for vLLM if that is installed and can run it, else for Transformers; of "
        "the flags, only -c counts for it. Flags that are unknown, or make no difference, are named.",
        examples=(
            "llama-router estimate hf.co/ggml-org/Qwen3-4B-GGUF:Q4_K_M",
            "llama-router estimate ~/models/qwen.gguf -c 32768 -np 2 -ctk q8_0 -ctv q8_0",
        ),
    )
    estimate.add_argument("--json", action="store_true", help="print one JSON document")
    estimate.add_argument(
        "model",
        metavar="MODEL",
        help="a file, an http(s) URL, hf.co/USER/REPO/FILE.gguf, hf.co/USER/REPO[:QUANT], or a model folder",
    )
    flags = estimate.add_argument("flags", metavar="FLAGS", nargs=argparse.REMAINDER, help="flags of llama-server")
    flags.required = False  # otherwise argparse reports them as missing, too, if MODEL is missing


def _add_import(commands: Commands) -> None:
    bring = commands.add(
        CONFIGURATION,
        "import",
        "importing.run",
        "convert a configuration of llama-swap",
        description="Write a configuration equivalent to one of llama-swap. Settings without a counterpart are "
        "listed on standard error with their lines.",
        examples=("llama-router import llama-swap.yaml -o llama-router.yaml",),
    )
    bring.add_argument("file", type=Path, metavar="FILE", help="llama-swap's configuration")
    bring.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, which must not exist yet (default: standard output)",
    )


class _Version(argparse.Action):
    """Version action that looks the version up only when requested."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from router import __version__

        print(f"llama-router {__version__}")
        parser.exit()


def _serve(options: argparse.Namespace, serve: Callable[[Load], None]) -> None:
    from router.cli.check import asked_for

    try:
        serve(partial(asked_for, options))
    except CannotServe as error:
        _give_up(error)
    finally:
        try:
            sys.stderr.flush()
        except OSError:  # a failed write must not determine the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
