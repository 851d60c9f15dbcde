"""`llama-router requests`: live and past requests of a running router, the story of one, and cancelling them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from router.cli.client import CannotAsk, Refused, RouterClient, Unreachable
from router.cli.columns import duration, print_columns, print_json, print_section, row_of, size_text
from router.cli.remote import connect
from router.system.printable import line, printable

_PATH = "/v1/requests"
_LOOK_SEC = 1.0
_MOST = 10_000
_HEAD = (
    *("REQUEST", "STATE", "MODEL", "CLIENT", "PRIORITY", "ARRIVED", "WAITED", "FIRST", "TOTAL"),
    *("IN", "CACHED", "OUT", "WHY"),
)
_FOLLOWED = (24, 9, 12, 8, 8, 8, 6, 6, 6, 5, 6, 5)
"""Widths of columns whose rows come one by one."""


def run(options: argparse.Namespace) -> None:
    """List requests, show one, or cancel some: exits with 1 if one is not. Raises CannotAsk, ConfigError."""
    client = connect(options)
    words: list[str] = options.words
    if not words:
        (_follow if options.follow else _list)(client, options)
    elif words[0] == "cancel" and len(words) > 1:
        _cancel(client, words[1:], options)
    elif len(words) == 1 and words[0] != "cancel":
        _show(client, words[0], options)
    else:
        print("llama-router: name one request, or `cancel` and one or more of them", file=sys.stderr)
        sys.exit(2)


def _asked(client: RouterClient, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    query = {
        "limit": options.limit,
        "model": options.model,
        "client": options.client,
        "outcome": options.outcome,
        "state": "live" if options.live else None,
        **more,
    }
    given = {name: value for name, value in query.items() if value is not None}
    answer: dict[str, Any] = client.get(f"{_PATH}?{urlencode(given)}")
    return answer


def _list(client: RouterClient, options: argparse.Namespace) -> None:
    answer = _asked(client, options)
    if options.json:
        print_json(answer)
        return
    rows = answer["requests"]
    if rows:
        print_columns([_HEAD, *map(_row, rows)])
        return
    of_these = " of these" if options.model or options.client or options.outcome else ""
    if options.live or answer["kept"]:
        live = " in flight or waiting" if options.live else ""
        text = f"No requests{of_these}{live}."
    else:
        text = f"No requests{of_these} in flight or waiting; ended ones are not kept (system.requests_kept is 0)."
    print(text, file=sys.stderr)


def _follow(client: RouterClient, options: argparse.Namespace) -> None:
    """Print the last requests that have ended, and each further one."""
    since: str | None = None
    if not options.json:
        print(row_of(_HEAD, _FOLLOWED), flush=True)
    while True:
        limit = options.limit if since is None else _MOST
        answer = _asked(client, options, state="done", limit=limit, since=since)
        for request in reversed(answer["requests"]):
            print(json.dumps(request) if options.json else row_of(_row(request), _FOLLOWED), flush=True)
        since = answer["cursor"]
        time.sleep(_LOOK_SEC)


def _row(request: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        request["id"],
        request["outcome"] or request["state"],
        request["model"] or "-",
        request["client"] or "-",
        request["priority"] or "-",
        _clock(request["arrived_at"]),
        duration(request["waited_sec"]),
        _duration(request["ttft_sec"]),
        duration(request["total_sec"]),
        _count(request["prompt_tokens"]),
        _count(request["cached_tokens"]),
        _count(request["output_tokens"]),
        _why(request),
    )


def _clock(at: str) -> str:
    """Return a time of the router in the local time zone; older ones with the day."""
    then, now = datetime.fromisoformat(at).astimezone(), datetime.now().astimezone()
    return f"{then:%H:%M:%S}" if then.date() == now.date() else f"{then:%m-%dT%H:%M:%S}"


def _duration(sec: float | None) -> str:
    return "-" if sec is None else duration(sec)


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _why(request: Mapping[str, Any]) -> str:
    """Return why a request waits, or why it failed."""
    if request["state"] == "done":
        return str(request["reason"] or "")
    if not request["why"]:
        return ""
    expected = request["expected_wait_sec"]
    ahead = [f"position {request['position']}"] if request["position"] is not None else []
    ahead += [f"~{duration(expected)} to go"] if expected is not None else []
    return ": ".join(filter(None, (", ".join(ahead), request["why"])))


# --- one request ----------------------------------------------------------------------------------------


def _show(client: RouterClient, wanted: str, options: argparse.Namespace) -> None:
    request = _found(client, wanted)
    if options.json:
        print_json(request)
        return
    tokens = [
        f"{request[name]} {text}"
        for name, text in (("prompt_tokens", "in"), ("cached_tokens", "cached"), ("output_tokens", "out"))
        if request[name] is not None
    ]
    status = f" ({request['status']})" if request["status"] else ""
    print_section(
        "Request",
        [
            ("id", request["id"]),
            ("state", request["state"] if request["outcome"] is None else f"{request['outcome']}{status}"),
            ("why", _why(request)),
            ("model", request["model"] or ""),
            ("engine", request["engine"] or ""),
            ("client", ", ".join(filter(None, (request["client"], request["peer"])))),
            ("route", f"{request['route']}{' (streamed)' * request['streamed']}"),
            ("priority", request["priority"] or ""),
            ("arrived", _clock(request["arrived_at"])),
            ("waited", duration(request["waited_sec"]) + _loading(request["load_sec"])),
            ("first token", "" if request["ttft_sec"] is None else f"after {duration(request['ttft_sec'])}"),
            ("total", duration(request["total_sec"])),
            ("tokens", ", ".join(tokens)),
            ("sizes", f"{size_text(request['request_bytes'])} in, {size_text(request['answer_bytes'])} out"),
            ("conversation", {"slot": "in its slot", "disk": "restored from disk"}.get(request["kv"], "")),
            ("retries", str(request["retries"] or "")),
        ],
    )
    print_section("Timeline", _timeline(request))
    for name, text in (request["capture"] or {}).items():
        print(f"{name.capitalize()}\n{printable(text)}\n")


def _loading(sec: float) -> str:
    return f", {duration(sec)} of it for a load" if sec else ""


def _timeline(request: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what happened, with the time since the request arrived."""
    began = datetime.fromisoformat(request["arrived_at"])
    events = []
    for each in request["timeline"]:
        passed_sec = (datetime.fromisoformat(each["at"]) - began).total_seconds()
        event = each["event"].replace("_", " ")
        is_whole = "model" in each or not each["detail"]  # what a model did is told in a sentence
        events.append(
            (f"{passed_sec:+.2f}s", (each["detail"] or event) if is_whole else f"{event}: {each['detail']}")
        )
    return events


def _found(client: RouterClient, wanted: str) -> dict[str, Any]:
    """Return the request with this id, or the only one whose id begins so. Raises CannotAsk."""
    try:
        return _got(client, wanted)
    except Refused as error:
        if error.code != "request_not_found":
            raise
        alike = _ids_that_begin_with(client, wanted)
        if len(alike) != 1:
            hint = f" Several begin so: {', '.join(alike[:5])}." if alike else ""
            raise CannotAsk(f"{error}{hint}") from None
        return _got(client, alike[0])


def _got(client: RouterClient, request_id: str) -> dict[str, Any]:
    request: dict[str, Any] = client.get(f"{_PATH}/{quote(request_id, safe='')}")
    return request


def _ids_that_begin_with(client: RouterClient, beginning: str) -> list[str]:
    rows = client.get(f"{_PATH}?limit={_MOST}")["requests"]
    return list(dict.fromkeys(row["id"] for row in rows if row["id"].startswith(beginning)))


def _cancel(client: RouterClient, wanted: Sequence[str], options: argparse.Namespace) -> None:
    answers, problems = [], []
    for each in wanted:
        try:
            request_id = each
            try:
                answers.append(client.delete(f"{_PATH}/{quote(request_id, safe='')}"))
            except Refused as error:
                if error.code != "request_not_found":
                    raise
                request_id = _found(client, each)["id"]
                answers.append(client.delete(f"{_PATH}/{quote(request_id, safe='')}"))
        except CannotAsk as error:
            if isinstance(error, Unreachable):
                raise
            problems.append(f"{each}: {error}")
        else:
            if not options.json:
                print(line(f"{request_id} was cancelled"))
    if options.json:
        print_json(answers if len(wanted) > 1 else answers[0] if answers else None)
    if problems:
        print("\n".join(printable(f"llama-router: {problem}") for problem in problems), file=sys.stderr)
        sys.exit(1)
