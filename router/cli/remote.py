"""Commands that ask a running router, local or remote: their options, and the connection.

The router is the one at `--url` or `LLAMA_ROUTER_URL`, else the one of the configuration. Keys come from the
environment or the configuration, never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from router.cli.client import KEY_VARIABLE, CannotAsk, RouterClient
from router.cli.commands import CONFIGURATION, LOOK, MODELS, Command, Commands

if TYPE_CHECKING:
    from router.config.schema import Api

URL_VARIABLE = "LLAMA_ROUTER_URL"
KEY_NOTE = f"The API key is read from {KEY_VARIABLE}."


def place() -> Command:
    """Return a parser of the options that say which router is meant."""
    parser = Command(add_help=False)
    parser.add_argument(
        "--url",
        metavar="URL",
        help=f"the router: HOST:PORT, or a URL, with or without /v1 (default: {URL_VARIABLE}, or as configured)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration that names the router's address"
    )
    return parser


def add_parsers(commands: Commands) -> None:
    at = place()
    as_json = Command(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print the router's JSON response")
    _add_looks(commands, at, as_json)
    _add_models(commands, at, as_json)
    _add_makers(commands, at, as_json)
    commands.add(
        CONFIGURATION,
        "reload",
        "models.reload",
        "have the router read its configuration again",
        at,
        as_json,
        description="Apply the changed configuration file of a running router, like SIGHUP, and print what has "
        "changed. Engines of models whose entry is the same go on. A file with errors changes nothing.",
        notes=KEY_NOTE,
        examples=("llama-router reload",),
    )


def _add_looks(commands: Commands, at: Command, as_json: Command) -> None:
    ps = commands.add(
        LOOK,
        "ps",
        "looking.ps",
        "show the models that are loaded, wait or failed, and why",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router ps", "llama-router ps --url gpu-box:8000"),
    )
    ps.add_argument("-a", "--all", action="store_true", help="show models that are off, too")
    commands.add(
        LOOK,
        "top",
        "top.top",
        "watch models, memory, queues and decisions; q leaves",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router top",),
    )
    commands.add(
        LOOK,
        "queue",
        "looking.queue",
        "show the waiting requests, and why they wait",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router queue",),
    )
    requests = commands.add(
        LOOK,
        "requests",
        "requests.run",
        "show live and past requests, or one of them; cancel one",
        at,
        as_json,
        usage="llama-router requests [OPTIONS] [ID]\n       llama-router requests [OPTIONS] cancel ID…",
        description="Show the requests of a running router, live ones first. With an ID, show that one, with what "
        "has happened to it; a unique beginning of the ID is enough. `cancel` ends live requests.",
        notes=f"{KEY_NOTE} A key for inference sees its own client's requests. With --json, --follow prints one "
        "JSON document a line.",
        examples=(
            "llama-router requests --live",
            "llama-router requests --model qwen --outcome queue_full -n 100",
            "llama-router requests 8cfdf00564706c14294936cd",
            "llama-router requests cancel 8cfdf00564706c14294936cd",
        ),
    )
    requests.takes_options_anywhere = True
    requests.add_argument("words", nargs="*", metavar="ID", help="a request, or `cancel` and one or more")
    requests.add_argument("--model", metavar="MODEL", help="only those of this model")
    requests.add_argument("--client", metavar="NAME", help="only those of this client (api.clients)")
    requests.add_argument(
        "--outcome", metavar="OUTCOME", help="only those that ended so, such as served, cancelled or queue_full"
    )
    which = requests.add_mutually_exclusive_group()
    which.add_argument("--live", action="store_true", help="only those that wait or are being answered")
    requests.add_argument(
        "-n", "--limit", type=positive, default=20, metavar="N", help="show at most so many (default: 20)"
    )
    which.add_argument("-f", "--follow", action="store_true", help="print each request once it has ended")
    logs = commands.add(
        LOOK,
        "logs",
        "looking.logs",
        "show the output of a model's engine",
        at,
        as_json,
        notes=f"{KEY_NOTE} With --json, --follow prints one JSON document a line.",
        examples=("llama-router logs qwen -n 50", "llama-router logs -f qwen"),
    )
    logs.add_argument("model", metavar="MODEL", help="a model, or one of its engines by its name, such as qwen#3")
    logs.add_argument("-f", "--follow", action="store_true", help="follow new output")
    logs.add_argument(
        "-n", "--lines", type=positive, default=200, metavar="N", help="lines to start with (default: 200)"
    )
    kv = commands.add(
        LOOK,
        "kv",
        "looking.kv",
        "show the conversations that are kept on disk, or delete them",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router kv", "llama-router kv clear qwen"),
    )
    kv.add_argument("action", nargs="?", choices=("clear",), help="delete them instead")
    kv.add_argument("model", nargs="?", metavar="MODEL", help="only those of this model")


def _add_models(commands: Commands, at: Command, as_json: Command) -> None:
    listing = commands.add(
        MODELS,
        "list",
        "models.listing",
        "list the models, loaded or not",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router list", "llama-router list gemma 4b"),
        also=("ls",),
    )
    listing.takes_options_anywhere = True
    listing.add_argument("words", nargs="*", metavar="WORD", help="only those whose line has every WORD")
    show = commands.add(
        MODELS,
        "show",
        "models.show",
        "show everything about a model: file, state, memory, parameters, why it failed",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router show qwen", "llama-router show qwen --template"),
    )
    show.add_argument("model", metavar="MODEL")
    only = show.add_mutually_exclusive_group()
    for part, text in (
        ("template", "chat template"),
        ("system", "system prompt"),
        ("parameters", "parameters"),
        ("license", "license"),
        ("modelfile", "Modelfile, from which `llama-router create` makes the same model"),
    ):
        only.add_argument(
            f"--{part}", dest="part", action="store_const", const=part, help=f"print only its {text}"
        )
    load = commands.add(
        MODELS,
        "load",
        "models.load",
        "load a model now, making room if necessary",
        at,
        as_json,
        description="Load a model, and wait until it is ready; meanwhile, standard error says what it waits for.",
        notes=KEY_NOTE,
        examples=("llama-router load qwen --keep 1h", "llama-router load qwen --no-wait"),
    )
    load.add_argument("model", metavar="MODEL")
    load.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="wait until it is ready (the default)"
    )
    load.add_argument(
        "--keep",
        type=_duration,
        metavar="TIME",
        help="then pin it for so long (90s, 30m, 1h30m, 2d): it is neither unloaded when idle nor to make room; "
        "0: as configured",
    )
    unload = commands.add(
        MODELS,
        "unload",
        "models.unload",
        "unload a model once its requests in flight are done",
        at,
        as_json,
        description="Unload a model once its requests in flight are done, or cancel a load that waits.",
        notes=KEY_NOTE,
        examples=("llama-router unload qwen", "llama-router unload --all"),
        also=("stop",),
    )
    _add_one_or_all(unload, "all that are loaded")
    reset = commands.add(
        MODELS,
        "reset",
        "models.reset",
        "clear the failures of a model, so that it may be loaded at once",
        at,
        as_json,
        notes=KEY_NOTE,
        examples=("llama-router reset qwen", "llama-router reset --all"),
    )
    _add_one_or_all(reset, "all that have failed")


def _add_makers(commands: Commands, at: Command, as_json: Command) -> None:
    create = commands.add(
        MODELS,
        "create",
        "creating.create",
        "create a model from a Modelfile, as `ollama create` does",
        at,
        as_json,
        description="Create a model, or replace one that was created, from a Modelfile: FROM (a model, or a GGUF "
        "file, which is sent to the router), SYSTEM, PARAMETER, MESSAGE, LICENSE, and TEMPLATE in Jinja.",
        notes=KEY_NOTE,
        examples=(
            "llama-router create pirate -f Modelfile",
            "llama-router show qwen --modelfile | llama-router create qwen2 -f -",
        ),
    )
    create.add_argument("name", metavar="NAME")
    create.add_argument(
        "-f",
        "--file",
        type=Path,
        default=Path("Modelfile"),
        metavar="FILE",
        help="default: Modelfile; -: standard input",
    )
    copy = commands.add(
        MODELS,
        "cp",
        "creating.copy",
        "give a model a further name, with its present parameters",
        at,
        as_json,
        description="Give a model a further name, with its present parameters, as `ollama cp` does. Nothing is "
        "copied on the disk; `llama-router rm` removes the name.",
        notes=KEY_NOTE,
        examples=("llama-router cp qwen my-qwen",),
    )
    copy.add_argument("source", metavar="MODEL")
    copy.add_argument("name", metavar="NAME")


def _add_one_or_all(parser: Command, all_of_them: str) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL", nargs="?")
    which.add_argument("--all", action="store_true", help=all_of_them)


def connect(options: argparse.Namespace) -> RouterClient:
    """Return a client of the router named by the command line, the environment or the configuration.

    A key of the configuration is sent only to the address in the configuration. Raises CannotAsk, ConfigError.
    """
    if url := url_given(options):
        return _client(url, os.environ.get(KEY_VARIABLE))
    from router.catalog.load import load  # takes 0.2 s, not needed with a URL

    return connect_here(load(options.config, environ=os.environ, cwd=Path.cwd(), check_files=False).config.api)


def url_given(options: argparse.Namespace) -> str | None:
    """Return the URL of the command line or the environment, as it is written there."""
    return options.url or os.environ.get(URL_VARIABLE) or None


def connect_here(api: Api) -> RouterClient:
    """Return a client of the router with this configuration."""
    configured = api.api_keys[0].get_secret_value() if api.api_keys else None
    host = f"[{api.host}]" if ":" in api.host else api.host
    return _client(f"http://{host}:{api.port}", os.environ.get(KEY_VARIABLE) or configured)


def _client(url: str, key: str | None) -> RouterClient:
    try:
        return RouterClient(url, key)
    except ValueError as error:
        raise CannotAsk(f"{error}.") from None


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PARTS = re.compile(r"(\d+(?:\.\d+)?)([dhms])")


def _duration(text: str) -> float:
    """Return the seconds of a duration such as `1h30m`, or of a number. Raises ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < math.inf:
            return seconds
    parts = _PARTS.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 30m or 1h30m")
    return math.fsum(float(number) * _UNITS[unit] for number, unit in parts)


def positive(text: str) -> int:
    """Return a number of at least 1. Raises ArgumentTypeError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
