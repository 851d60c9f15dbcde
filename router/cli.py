"""The command line: `llama-router [serve]`, `check`, `estimate`, `schema`, and `top`, `ps`, `queue`, `logs`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from router import __version__, created, estimate, footprint, hang_up, store_cli, terminal
from router.client import CannotAsk
from router.config import Config, schema
from router.config_errors import ConfigError
from router.config_load import Loaded, load
from router.config_show import render
from router.demo import MODEL_PATH
from router.flags import FlagError, Flags
from router.launcher import NoEngine
from router.sizing import Unusable, read_files

_DEMO = "built in, nothing is configured"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.

    Exit codes: 0 ended in order, 1 cannot serve or ask, 2 wrong configuration or command line; interrupted: 130.
    """
    _open_standard_files()
    options = _parser().parse_args(_with_command(sys.argv[1:] if arguments is None else list(arguments)))
    if options.run is not _serve:
        hang_up.release()
    try:
        options.run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (CannotAsk, NoEngine) as error:
        _give_up(error)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_files() -> None:
    """Who starts us may have closed them: no socket must get their numbers, and what is said there is lost."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, TextIOWrapper):  # as standard error does with what it has no characters for
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up(error: Exception) -> NoReturn:
    print(f"llama-router: {error}", file=sys.stderr)
    sys.exit(1)


def _with_command(arguments: list[str]) -> list[str]:
    """`serve` is the default command."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        return ["serve", *arguments]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-router",
        usage="llama-router [COMMAND] [--config FILE] [--models-dir DIR] [--hf-cache] [--ollama-store] "
        "[--host HOST] [--port PORT] [--ollama-port PORT]",
        description="One OpenAI-compatible endpoint in front of any number of GGUF models.",
        epilog="Without a command it serves. `llama-router COMMAND --help` tells what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"llama-router {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="llama-router")

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--config", type=Path, metavar="FILE", help="configuration, JSON or YAML")
    source.add_argument(
        "--models-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="serve every GGUF in this folder under its file name; may be repeated",
    )
    source.add_argument(
        "--hf-cache", action="store_true", help="serve the models in the Hugging Face cache (system.hf_cache)"
    )
    source.add_argument(
        "--ollama-store", action="store_true", help="serve the models of Ollama (system.ollama_store)"
    )
    source.add_argument("--host", help="address to listen on (api.host)")
    source.add_argument("--port", type=int, help="port to listen on (api.port)")
    source.add_argument("--ollama-port", type=int, help="a second one, for Ollama's clients (api.ollama_port)")

    run = commands.add_parser("serve", parents=[source], help="serve models (the default command)")
    run.set_defaults(run=_serve)

    check = commands.add_parser("check", parents=[source], help="validate the configuration and show it")
    check.set_defaults(run=_check)

    store_cli.add_parsers(commands)
    terminal.add_parsers(commands)
    estimate.add_parser(commands)

    show = commands.add_parser("schema", help="print the JSON Schema of the configuration")
    show.set_defaults(run=lambda options: print(json.dumps(schema(), indent=2)))
    return parser


def _serve(options: argparse.Namespace) -> None:
    from router.serve import CannotServe, serve  # half a second that `ps` need not wait

    try:
        serve(partial(_load, options))
    except CannotServe as error:
        _give_up(error)
    finally:
        try:
            sys.stderr.flush()
        except OSError:  # what cannot be written must not be the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _load(options: argparse.Namespace, state_dir: Path | None = None) -> Loaded:
    """The configuration that the command line asks for; without any, the demo. `state_dir` as for `load`."""
    overrides: dict[str, tuple[str, Any]] = {}
    if options.host is not None:
        overrides["api.host"] = ("--host", options.host)
    if options.port is not None:
        overrides["api.port"] = ("--port", options.port)
    if options.ollama_port is not None:
        overrides["api.ollama_port"] = ("--ollama-port", options.ollama_port)
    if options.hf_cache:
        overrides["system.hf_cache"] = ("--hf-cache", True)
    if options.ollama_store:
        overrides["system.ollama_store"] = ("--ollama-store", True)
    read = partial(
        load,
        options.config,
        environ=os.environ,
        cwd=Path.cwd(),
        models_dirs=options.models_dir,
        state_dir=state_dir,
    )
    loaded = read(overrides=overrides)
    folders = options.models_dir or options.hf_cache or options.ollama_store
    own = [model for model in loaded.config.models.values() if model.source != created.SOURCE]
    if loaded.source is not None or folders or own:  # what was created may be made from the demo
        return loaded
    demo: dict[str, Any] = {"model_path": str(MODEL_PATH), "description": "A tiny model to try the router with."}
    overrides["models.demo"] = (_DEMO, {**demo, "flags": ["-np", "2"]})
    overrides["models.demo-embed"] = (_DEMO, {**demo, "flags": ["--embedding", "--pooling", "mean"]})
    return read(overrides=overrides)


def _check(options: argparse.Namespace) -> None:
    loaded = _load(options)
    print("\n".join(render(loaded.config, loaded.origins)))
    for warning in (*loaded.warnings, *_would_not_load(loaded.config)):
        print(f"warning: {warning}", file=sys.stderr)


def _would_not_load(config: Config) -> Iterator[str]:
    """Models whose file or flags are found to be wrong only when somebody asks for them."""
    for alias, model in config.models.items():
        flags = Flags(model.flags, model.env)
        try:
            files = read_files(model.model_path, flags)
            if files.model is not None:
                footprint.estimate(files.model, flags, projector=files.projector, draft=files.draft)
        except (Unusable, FlagError, OSError) as error:
            yield f"models.{alias} will not load: {error}"
