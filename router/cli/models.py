"""Commands about models of a running router: `llama-router list`, `show`, `load`, `unload`, `reset`, `reload`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import quote

from router.cli.client import CannotAsk, Refused, RouterClient
from router.cli.columns import Ticker, duration, memory, print_columns, print_json, print_section, size_text
from router.cli.remote import connect
from router.system.printable import line, printable

_LOOK_SEC = 0.5
T = TypeVar("T")


# --- list and show --------------------------------------------------------------------------------------


def listing(options: argparse.Namespace) -> None:
    """List the models, or those whose line has all the words."""
    answer = connect(options).get("/v1/models")
    wanted = [_spaced(word) for word in options.words]
    cards = answer["data"]
    rows = [_card_row(card) for card in cards]
    chosen = [
        (card, row)
        for card, row in zip(cards, rows, strict=True)
        if all(word in _spaced(" ".join((*row, *card["aliases"]))) for word in wanted)
    ]
    if options.json:
        print_json({**answer, "data": [card for card, _ in chosen]})
        return
    if chosen:
        print_columns([("MODEL", "STATE", "SIZE", "QUANT", "CONTEXT", "SOURCE"), *(row for _, row in chosen)])
    elif cards:
        print(line(f"None of {len(cards)} models has {' '.join(options.words)!r}."), file=sys.stderr)
    else:
        print("There are no models: `llama-router pull MODEL` downloads one.", file=sys.stderr)


def _spaced(text: str) -> str:
    """Return text for comparison, in which `gemma 4b` is found in `gemma-3-4b` word by word."""
    return text.casefold().translate(_SEPARATORS)


_SEPARATORS = str.maketrans(dict.fromkeys("-_./:", " "))


def _card_row(card: Mapping[str, Any]) -> tuple[str, ...]:
    source = str(card.get("source") or "-")
    return (
        card["id"],
        card["state"],
        size_text(card["size"]).replace(" ", "") if card.get("size") else "-",
        card.get("quantization") or "-",
        str(card.get("context_length") or "-"),
        f"{source}, another name of {card['uses']}" if card.get("uses") else source,
    )


def show(options: argparse.Namespace) -> None:
    """Show what is known of a model, or one part of it."""
    client = connect(options)
    name = quote(options.model, safe="")
    card = client.get(f"/v1/models/{name}")
    try:
        described = client.post("/api/show", {"model": options.model})
    except Refused as error:  # its file cannot be read, which is what somebody may want to know
        if options.part is not None:
            raise
        described = {"error": str(error)}
    if options.part is not None:
        text = described.get(options.part) or ""
        if options.json:
            print_json({options.part: text})
        else:
            sys.stdout.write(printable(text) + "\n" * (not text.endswith("\n")))
        return
    status = client.get(f"/v1/models/{name}/status")
    health = _health(client, status["alias"])
    estimate = _estimate(client, status["alias"]) if status["memory"] is None else None
    if options.json:
        print_json({"model": card, "status": status, "health": health, "estimate": estimate, "show": described})
        return
    for heading, facts in _facts(card, status, health, estimate, described):
        print_section(heading, facts)


def _health(client: RouterClient, alias: str) -> dict[str, Any] | None:
    """Return how a model's last engine ended; None if there was none, or the key may not know."""
    try:
        health: dict[str, Any] | None = client.get("/v1/health/models")["models"].get(alias)
        return health
    except Refused:
        return None


def _estimate(client: RouterClient, alias: str) -> dict[str, Any] | None:
    """Return what a model would take that is not loaded; None if that is unknown, or the key may not know."""
    try:
        estimate: dict[str, Any] = client.post("/v1/models/estimate", {"model": alias})
        return estimate
    except Refused:
        return None


_Facts = list[tuple[str, str]]


def _facts(
    card: Mapping[str, Any],
    status: Mapping[str, Any],
    health: Mapping[str, Any] | None,
    estimate: Mapping[str, Any] | None,
    described: Mapping[str, Any],
) -> Iterator[tuple[str, _Facts]]:
    """Yield each section with its facts; those that are empty are not printed."""
    yield _model_section(card, described)
    yield _state_section(status, health)
    yield _memory_section(status["memory"])
    if estimate is not None:
        yield (
            "Memory, once it is loaded",
            [
                ("estimated", f"{_by_device(estimate['need_mib'])} ({estimate['source']})"),
                ("now", estimate["message"]),
            ],
        )
    yield "Parameters", [_pair(text) for text in (described.get("parameters") or "").splitlines()]
    yield "System prompt", [("", described.get("system", ""))]
    yield "License", [("", described.get("license", "").partition("\n")[0])]


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition(" ")
    return name, value.strip()


def _model_section(card: Mapping[str, Any], described: Mapping[str, Any]) -> tuple[str, _Facts]:
    meta, details = card.get("meta", {}), described.get("details", {})
    context, trained = card.get("context_length"), meta.get("n_ctx_train")
    tokens = f"{context} tokens" if context else ""
    if trained and trained != context:
        tokens += f" (trained for {trained})"
    return "Model", [
        ("name", card["id"]),
        ("another name of", card.get("uses", "")),
        ("further names", ", ".join(card["aliases"])),
        ("description", card.get("description", "")),
        ("source", str(card.get("source") or "")),
        ("architecture", card.get("family", "")),
        ("parameters", details.get("parameter_size", "") if card.get("parameters") else ""),
        ("quantization", card.get("quantization") or ""),
        ("size", size_text(card["size"]) if card.get("size") else ""),
        ("context", tokens),
        ("embedding length", str(meta.get("n_embd") or "")),
        ("capabilities", ", ".join(card.get("capabilities", []))),
        ("unreadable", described.get("error", "")),
    ]


def _state_section(status: Mapping[str, Any], health: Mapping[str, Any] | None) -> tuple[str, _Facts]:
    """Return its state, why it is in it, and how its last engine ended."""
    health = health or {}
    ended = health.get("last_exit")
    retry_sec = health.get("retry_in_sec")
    failure, failed = status["error_message"] or "", status["status"] == "failed"
    if ended is not None and ended["wanted"]:
        ended = None
    log = [] if ended is None else [text for text in ended["log_tail"] if text not in failure]
    engines = ", ".join(
        f"{engine['name']} {engine['status']}"
        + (f" (pid {engine['pid']}, port {engine['port']})" * bool(engine["pid"]))
        for engine in status["engines"]
    )
    requests = [f"{status['in_flight'] + status['slotless']} in flight", f"{status['waiting']} waiting"]
    return "State", [
        ("state", status["status"]),
        ("waits because", status["why_waiting"] or ""),
        ("failed because" if failed else "last failure", failure),
        ("may be loaded in", f"{duration(retry_sec)}, or at once after `llama-router reset`" if retry_sec else ""),
        ("last exit", "" if ended is None or ended["reason"] in failure else ended["reason"]),
        ("last log lines", "\n".join(log[-5:])),
        ("runs otherwise", status["fallback"] or ""),
        ("engine", status["engine"] or ""),
        ("chosen because", status["engine_reason"] or ""),
        ("engines", engines),
        ("slots", str(status["slots"])),
        ("requests", ", ".join(requests) if status["engines"] or status["waiting"] else ""),
        ("loads in", duration(status["load_sec"]) if status["load_sec"] is not None else ""),
        ("pinned", _pinned(status)),
        ("command line", shlex.join(status.get("command") or ())),
        ("crashes", str(health.get("crashes") or "")),
    ]


def _pinned(status: Mapping[str, Any]) -> str:
    if not status["pinned"]:
        return ""
    if status["pinned_until"] is None:
        return "yes"
    return f"until {datetime.fromisoformat(status['pinned_until']).astimezone():%Y-%m-%d %H:%M:%S}"


def _memory_section(booked: Mapping[str, Any] | None) -> tuple[str, _Facts]:
    if booked is None:
        return "Memory", []
    return "Memory", [
        ("booked", _by_device(booked["booked_mb"])),
        ("measured", _by_device(booked["measured_mb"])),
        ("estimated", f"{_by_device(booked['estimated_mb'])} ({booked['source']})"),
        ("asleep", _by_device(booked["asleep_mb"])),
        ("flags added", " ".join(booked["added_flags"])),
        ("remark", booked["remark"] or ""),
    ]


def _by_device(figures: Mapping[str, float] | None) -> str:
    return ", ".join(f"{memory(mib)} on {device}" for device, mib in (figures or {}).items())


# --- load, unload, reset --------------------------------------------------------------------------------


def load(options: argparse.Namespace) -> None:
    """Load a model. Raises CannotAsk if it cannot be loaded."""
    client = connect(options)
    body = {"model": options.model, "wait": options.wait}
    if options.wait:
        try:
            answer = _meanwhile(
                lambda: client.post("/v1/models/load", body, timeout_sec=None),
                lambda: _loading_text(_status(client, options.model)),
            )
        except KeyboardInterrupt:
            print(
                line(f"llama-router: the load goes on: `llama-router unload {options.model}` cancels it"),
                file=sys.stderr,
            )
            raise
    else:
        answer = client.post("/v1/models/load", body)
    kept: dict[str, Any] | None = None
    if options.keep is not None:
        for_sec = {"for_sec": options.keep} if options.keep else {}  # without, its entry decides
        kept = client.post(f"/v1/models/{quote(answer['model'], safe='')}/keep", for_sec)
    if options.json:
        print_json(answer if kept is None else {**answer, "pinned_until": kept["pinned_until"]})
        return
    if answer["status"] == "success":
        status = _status(client, answer["model"])
        taken = f", takes {memory(status['vram_used_mb'])}" if status["vram_used_mb"] else ""
        print(line(f"{answer['message']}{taken}"))
    else:
        print(line(f"{answer['model']} is {answer['status']}: {answer['message']}"))
    if kept is not None and kept["pinned_until"]:
        until = datetime.fromisoformat(kept["pinned_until"]).astimezone()
        print(line(f"{answer['model']} is pinned until {until:%Y-%m-%d %H:%M:%S}"))
    elif kept is not None:
        print(line(kept["message"]))


def _status(client: RouterClient, name: str) -> dict[str, Any]:
    status: dict[str, Any] = client.get(f"/v1/models/{quote(name, safe='')}/status")
    return status


def _loading_text(status: Mapping[str, Any]) -> str:
    alias, told = status["alias"], status["load"]
    if told is not None:
        stage = f" ({told['stage']})" if told["stage"] else ""
        share = "" if told["fraction"] is None else f", {told['fraction']:.0%}"
        return f"{alias} is loading{stage}{share}: {told['elapsed_sec']:.1f} of ~{told['expected_sec']:.1f} s"
    return f"{alias} waits: {status['why_waiting']}" if status["why_waiting"] else ""


def _meanwhile(call: Callable[[], T], look: Callable[[], str]) -> T:
    """Return what `call` does, or raise it, and tell meanwhile on standard error what `look` sees."""
    outcomes: list[T] = []
    problems: list[BaseException] = []

    def wait() -> None:
        try:
            outcomes.append(call())
        except BaseException as error:
            problems.append(error)

    waiting = Thread(target=wait, daemon=True)  # it must not keep the program from ending
    waiting.start()
    waiting.join(_LOOK_SEC)
    with Ticker() as tell:
        while waiting.is_alive():
            try:
                tell(look())
            except CannotAsk:  # the other one will say so
                tell("")
            waiting.join(_LOOK_SEC)
    if problems:
        raise problems[0]
    return outcomes[0]


def unload(options: argparse.Namespace) -> None:
    """Unload one model, or all that are loaded or waited for."""
    client = connect(options)
    if options.all:
        models = client.get("/v1/models/status")["models"].values()
        chosen = [model["alias"] for model in models if model["engines"] or model["load_asked_at"]]
    else:
        chosen = [_status(client, options.model)["alias"]]
    answers = []
    for alias in chosen:
        try:
            answers.append(
                _meanwhile(
                    lambda alias=alias: client.post("/v1/models/eject", {"model": alias}, timeout_sec=None),  # type: ignore[misc]
                    lambda alias=alias: _unloading_text(_status(client, alias)),  # type: ignore[misc]
                )
            )
        except Refused as error:
            if error.code != "not_found":
                raise
            answers.append({"status": "not_found", "model_ejected": None, "message": str(error)})
    _print_each(options, answers, "nothing is loaded")


def _unloading_text(status: Mapping[str, Any]) -> str:
    count = status["in_flight"] + status["slotless"]
    left = "1 request is not done yet" if count == 1 else f"{count} requests are not done yet"
    return f"{status['alias']} is {status['status']}{f': {left}' if count else ''}"


def reset(options: argparse.Namespace) -> None:
    """Clear the failures of one model, or of all that have failed."""
    client = connect(options)
    chosen = [options.model]
    if options.all:
        chosen = [failed["model"] for failed in client.get("/v1/models/failed")["failed_models"]]
    answers = [client.post(f"/v1/models/{quote(name, safe='')}/reset") for name in chosen]
    for answer in answers:
        answer["message"] = f"{answer['model']} {answer['message']}"
    _print_each(options, answers, "no model has failed")


def _print_each(options: argparse.Namespace, answers: Sequence[Mapping[str, Any]], none: str) -> None:
    """Print the answers: one document for one model, a list for `--all`."""
    if options.json:
        print_json(answers if options.all else answers[0])
    else:
        print("\n".join(line(answer["message"]) for answer in answers) or none)


# --- the configuration ----------------------------------------------------------------------------------


def reload(options: argparse.Namespace) -> None:
    """Have the router read its configuration again. Exits with 2 if there is a mistake in it."""
    try:
        changes = connect(options).post("/v1/config/reload", timeout_sec=60)
    except Refused as error:
        if error.code != "invalid_config":
            raise
        print(printable(f"llama-router: {error}"), file=sys.stderr)
        sys.exit(2)
    if options.json:
        print_json(changes)
        return
    words = {
        "added": "added",
        "removed": "removed",
        "changed": "changed",
        "settings": "changed setting",
        "needs_restart": "takes a restart",
    }
    told = [f"{word}: {', '.join(changes[how])}" for how, word in words.items() if changes.get(how)]
    print("\n".join(map(line, told)) or "nothing has changed")
    for warning in changes["warnings"]:
        print(line(f"warning: {warning}"), file=sys.stderr)
