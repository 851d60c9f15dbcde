"""Commands that query a running router, local or remote: `llama-router top`, `ps`, `queue`, `logs`, `kv`.

The router is the one at `--url` or `LLAMA_ROUTER_URL`, else the one of the configuration. Keys come from the
environment or the configuration, never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from router.cli.client import KEY_VARIABLE, CannotAsk, RouterClient
from router.cli.columns import duration, model_row, print_columns, size_text
from router.system.printable import line, printable

if TYPE_CHECKING:
    from router.config.schema import Api

URL_VARIABLE = "LLAMA_ROUTER_URL"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--url", metavar="URL", help=f"URL of the router (default: {URL_VARIABLE}, or as configured)"
    )
    place.add_argument("--config", type=Path, metavar="FILE", help="configuration that names the router's address")
    key = f"The API key is read from {KEY_VARIABLE}."
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print the router's JSON response")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str, *more: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, parents=[place, *more], help=text, description=text, epilog=key)
        parser.set_defaults(run=run)
        return parser

    add("top", _top, "watch a running router: models, memory, queues, decisions")
    add("ps", _ps, "show the models of a running router", as_json)
    add("queue", _queue, "show the waiting requests of a running router, and why they wait", as_json)
    logs = add("logs", _logs, "show the engine log of a model")
    logs.add_argument("alias", metavar="ALIAS")
    logs.add_argument("-f", "--follow", action="store_true", help="follow new output")
    logs.add_argument(
        "-n", "--lines", type=_positive, default=200, metavar="N", help="lines to start with (default: 200)"
    )
    kv = add("kv", _kv, "show the conversations that a router keeps on disk, or delete them", as_json)
    kv.add_argument("action", nargs="?", choices=("clear",), help="delete them instead")
    kv.add_argument("model", nargs="?", metavar="MODEL", help="only those of this model")


def connect(options: argparse.Namespace) -> RouterClient:
    """Return a client of the router named by the command line, the environment or the configuration.

    A key of the configuration is sent only to the address in the configuration. Raises CannotAsk, ConfigError.
    """
    if url := options.url or os.environ.get(URL_VARIABLE):
        return _client(url, os.environ.get(KEY_VARIABLE))
    from router.catalog.load import load  # takes 0.2 s, not needed with a URL

    return connect_here(load(options.config, environ=os.environ, cwd=Path.cwd(), check_files=False).config.api)


def connect_here(api: Api) -> RouterClient:
    """Return a client of the router with this configuration."""
    configured = api.api_keys[0].get_secret_value() if api.api_keys else None
    return _client(_own_url(api), os.environ.get(KEY_VARIABLE) or configured)


def _client(url: str, key: str | None) -> RouterClient:
    try:
        return RouterClient(url, key)
    except ValueError as error:
        raise CannotAsk(f"{error}.") from None


def _own_url(api: Api) -> str:
    host = _ANY_ADDRESS.get(api.host, api.host)
    return f"http://[{host}]:{api.port}" if ":" in host else f"http://{host}:{api.port}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _top(options: argparse.Namespace) -> None:
    from router.cli import top  # rich takes its time to import

    top.run(connect(options))


def _ps(options: argparse.Namespace) -> None:
    status = connect(options).get("/v1/models/status")
    if options.json:
        print(json.dumps(status, indent=2))
        return
    head = ("MODEL", "STATE", "PID", "PORT", "MEMORY", "SLOTS", "QUEUE", "UP", "UNLOADS IN")
    print_columns([head, *(model_row(model) for model in status["models"].values())])


def _queue(options: argparse.Namespace) -> None:
    stats = connect(options).get("/v1/queue/stats")
    if options.json:
        print(json.dumps(stats, indent=2))
        return
    queues = [model["waiting"] for model in stats["per_model"].values() if model["waiting"]]
    if not queues:
        print(f"No requests waiting; {stats['summary']['total_processing']} in flight.")
        return
    queues.sort(key=lambda queue: -max(request["waited_sec"] for request in queue))
    waiting = [request for queue in queues for request in queue]
    head = ("MODEL", "PRIORITY", "POSITION", "WAITED", "EXPECTED", "REQUEST", "WHY")
    print_columns([head, *(_request_row(request) for request in waiting)])
    if (more := stats["summary"]["total_queued"] - len(waiting)) > 0:
        print(f"… and {more} more")


def _request_row(request: dict[str, Any]) -> tuple[str, ...]:
    return (
        request["alias"],
        request["priority"],
        str(request["position"]),
        duration(request["waited_sec"]),
        "unknown" if request["expected_wait_sec"] is None else duration(request["expected_wait_sec"]),
        request["id"],
        request["why"],
    )


def _kv(options: argparse.Namespace) -> None:
    client = connect(options)
    if options.action == "clear":
        chosen = "" if options.model is None else f"?model={quote(options.model, safe='')}"
        cleared = client.delete(f"/v1/kv{chosen}")
        if options.json:
            print(json.dumps(cleared, indent=2))
        else:
            gone = cleared["deleted"]
            print(f"{_conversations(gone['count'])} deleted, {size_text(gone['bytes'])} freed")
        return
    kept = client.get("/v1/kv")
    if options.json:
        print(json.dumps(kept, indent=2))
        return
    rows = [_kv_row(alias, each) for alias, of in kept["models"].items() for each in of["conversations"]]
    if rows:
        print_columns([("MODEL", "TOKENS", "SIZE", "AGE", "USES", "CLIENT"), *rows])
    for each in kept["distrusted"]:
        models = ", ".join(each["models"]) or "a model that is not loaded"
        print(line(f"Not kept for {models}: {each['reason']}"))
    print(line(_kv_summary(kept)))


def _kv_row(alias: str, each: dict[str, Any]) -> tuple[str, ...]:
    return (
        alias,
        str(each["tokens"]),
        size_text(each["bytes"]).replace(" ", ""),
        duration(each["age_sec"]),
        str(each["uses"]),
        each["client"] or "-",
    )


def _kv_summary(kept: dict[str, Any]) -> str:
    total, limits = kept["total"], kept["limits"]
    if not kept["enabled"]:
        why = "kv_store.enabled is false" if kept["folder"] else "there is no folder for them"
        return f"Conversations are not kept: {why}. {_conversations(total['count'])} on disk."
    limit = f"{size_text(limits['bytes'])}, {duration(limits['age_sec'])}"
    return f"{_conversations(total['count'])}, {size_text(total['bytes'])} of at most {limit}, in {kept['folder']}"


def _conversations(count: int) -> str:
    return f"{count} conversation{'' if count == 1 else 's'}"


def _logs(options: argparse.Namespace) -> None:
    client = connect(options)
    path = f"/v1/logs/{quote(options.alias, safe='')}"
    # Engine output may quote control sequences from a model file, which a terminal would interpret.
    shown = printable if sys.stdout.isatty() else str
    if not options.follow:
        sys.stdout.write(shown(client.text(f"{path}?lines={options.lines}")))
        return
    for event in client.events(f"{path}/stream?lines={options.lines}"):
        if event.name == "log":
            print(shown(event.text), flush=True)
        elif event.name == "missed":
            print(f"… {shown(event.text)} lines missed", flush=True)
    raise CannotAsk(f"The router at {client.url} has closed the stream.")
