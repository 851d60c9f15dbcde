"""Commands that show a running router: `llama-router ps`, `queue`, `logs`, `kv`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from router.cli.client import CannotAsk
from router.cli.columns import duration, model_row, print_columns, print_json, size_text
from router.cli.remote import connect
from router.system.printable import line, printable

_RANK = {
    state: rank
    for rank, state in enumerate(("draining", "stopping", "loading", "ready", "asleep", "off", "failed"))
}


def ps(options: argparse.Namespace) -> None:
    """Show the models that are resident, wait or failed; with `--all`, the others, too."""
    client = connect(options)
    status = client.get("/v1/models/status")
    if options.json:
        print_json(status)
        return
    models = list(status["models"].values())
    shown = models if options.all else [model for model in models if is_of_interest(model)]
    if shown:
        on_their_way = [model for model in shown if model["status"] in ("draining", "stopping")]
        decided = client.get("/v1/decisions")["decisions"] if on_their_way else []
        reasons = {decision["model"]: decision["reason"] for decision in decided}
        head = ("MODEL", "STATE", "PID", "PORT", "MEMORY", "SLOTS", "QUEUE", "UP", "UNLOADS IN", "WHY")
        shown.sort(key=_rank)
        print_columns([head, *((*model_row(model), why(model, reasons)) for model in shown)])
    if (others := len(models) - len(shown)) or not models:
        print(_rest(others, not shown), file=sys.stderr)


def is_of_interest(model: Mapping[str, Any]) -> bool:
    """Whether a model is resident, waits, or has failed."""
    return model["status"] != "off" or bool(model["waiting"] or model["load_asked_at"] or model["error_message"])


def _rank(model: Mapping[str, Any]) -> tuple[bool, int]:
    """Return what to sort by: resident models first, then those that wait, then failed ones and others."""
    return model["started_at"] is None and not model["why_waiting"], _RANK[model["status"]]


def why(model: Mapping[str, Any], decided: Mapping[str, str]) -> str:
    """Return why a model is in its state, or what it does; `decided` are the reasons of the last decisions."""
    state = model["status"]
    if state == "failed":
        return str(model["error_message"] or "")
    if state == "off" and model["error_message"] and not model["why_waiting"]:
        return f"last failure: {model['error_message']}"  # its cause may be gone
    if state in ("draining", "stopping"):
        return decided.get(model["alias"], "")
    if state == "loading" and (load := model["load"]):
        stage = f"{load['stage']}, " if load["stage"] else ""
        return f"{stage}{load['elapsed_sec']:.1f} of ~{load['expected_sec']:.1f} s"
    if model["why_waiting"]:
        return str(model["why_waiting"])
    if count := model["in_flight"] + model["slotless"]:
        return f"{count} request{'s' * (count != 1)} in flight"
    return "idle" if state == "ready" else ""


def _rest(others: int, is_all: bool) -> str:
    if not others:
        return "There are no models: `llama-router pull MODEL` downloads one."
    if is_all:
        return f"Nothing is loaded; {_count(others, 'model')} off (`llama-router list` shows them)."
    return f"{_count(others, 'more model')} off (--all shows them)."


def _count(number: int, what: str) -> str:
    return f"1 {what} is" if number == 1 else f"{number} {what}s are"


def queue(options: argparse.Namespace) -> None:
    """Show the waiting requests."""
    stats = connect(options).get("/v1/queue/stats")
    if options.json:
        print_json(stats)
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


def kv(options: argparse.Namespace) -> None:
    """Show or delete the conversations that are kept on disk."""
    client = connect(options)
    if options.action == "clear":
        chosen = "" if options.model is None else f"?model={quote(options.model, safe='')}"
        cleared = client.delete(f"/v1/kv{chosen}")
        if options.json:
            print_json(cleared)
        else:
            gone = cleared["deleted"]
            print(f"{_conversations(gone['count'])} deleted, {size_text(gone['bytes'])} freed")
        return
    kept = client.get("/v1/kv")
    if options.json:
        print_json(kept)
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
    limit = f"{size_text(limits['bytes'])}, for at most {duration(limits['age_sec'])}"
    return f"{_conversations(total['count'])}, {size_text(total['bytes'])} of at most {limit}, in {kept['folder']}"


def _conversations(count: int) -> str:
    return f"{count} conversation{'' if count == 1 else 's'}"


def logs(options: argparse.Namespace) -> None:
    """Show the output of a model's engines."""
    client = connect(options)
    path = f"/v1/logs/{quote(options.model, safe='')}"
    # Engine output may quote control sequences from a model file, which a terminal would interpret.
    shown = printable if sys.stdout.isatty() else str
    if not options.follow:
        text = client.text(f"{path}?lines={options.lines}")
        if options.json:
            print_json({"model": options.model, "lines": text.splitlines()})
        else:
            sys.stdout.write(shown(text))
            if not text:
                print(
                    line(f"No engine of {options.model} has printed anything since the router started."),
                    file=sys.stderr,
                )
        return
    for event in client.events(f"{path}/stream?lines={options.lines}"):
        if event.name not in ("log", "missed"):
            continue
        if options.json:
            told = {"line": event.text} if event.name == "log" else {"missed": int(event.text)}
            print(json.dumps(told), flush=True)
        elif event.name == "log":
            print(shown(event.text), flush=True)
        else:
            print(f"… {shown(event.text)} lines missed", flush=True)
    raise CannotAsk(f"The router at {client.url} has closed the stream.")
