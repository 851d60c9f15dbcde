"""Command line: `llama-router [serve]` and the other commands.

Modules are imported when their command runs: those of `serve` take most of a second, and `ps` must be fast.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from router.cli import remote
from router.cli.client import CannotAsk
from router.config.problems import CannotServe, ConfigError
from router.system import sighup
from router.system.printable import printable

if TYPE_CHECKING:
    from router.catalog.load import Load


def main(serve: Callable[[Load], None], arguments: Sequence[str] | None = None) -> None:
    """Run the command of the arguments, by default those of the process; `serve` runs the router.

    Exit codes: 0 ended in order, 1 cannot serve or ask, 2 wrong configuration or command line; interrupted: 130.
    """
    _open_standard_files()
    options = _parser().parse_args(_with_command(sys.argv[1:] if arguments is None else list(arguments)))
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


def _with_command(arguments: list[str]) -> list[str]:
    """Insert `serve`, the default command, if no command is given."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        return ["serve", *arguments]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-router",
        usage="llama-router [COMMAND] [--config FILE] [--models-dir DIR] [--hf-cache] [--ollama-store] "
        "[--host HOST] [--port PORT] [--ollama-port PORT]",
        description="One OpenAI-compatible endpoint in front of any number of models.",
        epilog="The default command is serve. `llama-router COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="llama-router")

    source = argparse.ArgumentParser(add_help=False)
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

    run = commands.add_parser("serve", parents=[source], help="serve models (the default command)")
    run.set_defaults(run=None)

    check = commands.add_parser("check", parents=[source], help="validate the configuration and show it")
    check.set_defaults(run=_check)

    _add_pull_and_rm(commands)
    remote.add_parsers(commands)
    _add_estimate(commands)
    _add_import(commands)

    show = commands.add_parser("schema", help="print the JSON Schema of the configuration")
    show.set_defaults(run=_schema)
    return parser


def _add_pull_and_rm(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pull = commands.add_parser(
        "pull",
        help="download a model from the Hugging Face hub",
        description="Download a model into the Hugging Face cache (HF_HOME) and serve it. An interrupted download "
        "is resumed. HF_TOKEN gives access to gated and private repositories.",
    )
    pull.add_argument(
        "model",
        metavar="MODEL",
        help="hf.co/USER/REPO[:QUANT] (default: Q4_K_M, or the closest) or hf.co/USER/REPO/FILE.gguf",
    )
    pull.add_argument("--alias", metavar="NAME", help="serve it under this name instead of USER/REPO:QUANT")
    pull.add_argument("--json", action="store_true", help="print progress as JSON lines")
    pull.add_argument("--config", type=Path, metavar="FILE", help="configuration whose model names are reserved")
    pull.set_defaults(run=_pull)

    remove = commands.add_parser(
        "rm",
        help="remove a pulled or created model",
        description="Remove a pulled model, even if only partly downloaded, or a model created by a client "
        "(`ollama create`, `ollama cp`). Files that were cached before, or that another model needs, are kept.",
    )
    remove.add_argument("alias", metavar="ALIAS")
    remove.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration of the router where it was created"
    )
    remove.add_argument("--port", type=int, help="port of that router, if not the configured one")
    remove.set_defaults(run=_remove)


def _add_estimate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    estimate = commands.add_parser(
        "estimate",
        prog="llama-router estimate",
        help="estimate a model's memory use before downloading it",
        usage="llama-router estimate MODEL [flags of llama-server]",
        description="Print the memory that a model needs on each device, and the largest context that fits. A "
        "model in safetensors is counted for vLLM if that is installed and can run it, else for Transformers; of "
        "the flags, only -c counts for it.",
    )
    estimate.add_argument(
        "model",
        metavar="MODEL",
        help="a file, an http(s) URL, hf.co/USER/REPO/FILE.gguf, hf.co/USER/REPO[:QUANT], or a model folder",
    )
    flags = estimate.add_argument("flags", metavar="FLAGS", nargs=argparse.REMAINDER, help="flags of llama-server")
    flags.required = False  # otherwise argparse reports them as missing, too, if MODEL is missing
    estimate.set_defaults(run=_estimate)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bring = commands.add_parser(
        "import",
        help="convert a configuration of llama-swap",
        description="Write a configuration equivalent to one of llama-swap. Settings without a counterpart are "
        "listed on standard error with their lines.",
    )
    bring.add_argument("file", type=Path, metavar="FILE", help="llama-swap's configuration")
    bring.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, which must not exist yet (default: standard output)",
    )
    bring.set_defaults(run=_import)


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


def _check(options: argparse.Namespace) -> None:
    from router.cli.check import check

    check(options)


def _pull(options: argparse.Namespace) -> None:
    from router.cli.store import pull

    pull(options)


def _remove(options: argparse.Namespace) -> None:
    from router.cli.store import remove

    remove(options)


def _estimate(options: argparse.Namespace) -> None:
    from router.cli.estimate import run

    run(options)


def _import(options: argparse.Namespace) -> None:
    from router.cli.importing import run

    run(options)


def _schema(_: argparse.Namespace) -> None:
    from router.config.schema import schema

    print(json.dumps(schema(), indent=2))
