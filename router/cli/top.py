"""`llama-router top`: a live view of a running router on the terminal.

One thread polls the status once a second, another follows the stream of decisions; both update one immutable
`View`, which the main thread draws. If the router disappears, both retry until it is back; meanwhile the screen
says so and keeps the last known values.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from router.cli.client import CannotAsk, Happened, RouterClient
from router.cli.columns import duration, memory, model_row, print_json
from router.cli.looking import is_of_interest
from router.cli.remote import connect
from router.system.printable import printable

_LOOK_SEC = 1.0
_DRAW_SEC = 0.5
_RATE_SEC = 10.0
"""Period over which rates are averaged."""
_DECISIONS = 100
_PRIORITIES = ("high", "normal", "low")
_STYLES = {
    "ready": "green",
    "loading": "yellow",
    "asleep": "blue",
    "draining": "magenta",
    "stopping": "magenta",
    "failed": "red",
}
_RANK = {"failed": 0, "loading": 1, "draining": 1, "stopping": 1, "ready": 1, "asleep": 2, "off": 3}
_HEADING = "bold"
_NARROW = 60
_SERIES = re.compile(
    r"^router_(memory_(?:total|reserved|external)_bytes|output_tokens_total|requests_total"
    r"|queue_by_priority|queue_oldest_wait_seconds|active_requests|uptime_seconds)(?:\{(.*)\})? (\S+)$",
    re.MULTILINE,
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of a model's state or of the router."""

    at: datetime
    """In the local time zone of the viewer."""
    about: str
    state: str
    reason: str
    id: str = ""
    """Id of the router's event; empty for changes noticed by this program."""


@dataclass(slots=True)
class Waiting:
    """Requests waiting for one model."""

    counts: Counter[str] = field(default_factory=Counter)
    """By priority."""
    oldest_sec: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(slots=True)
class Figures:
    """The values of `/metrics` that the screen shows."""

    reserved_mib: dict[str, float] = field(default_factory=dict)
    """By device."""
    others_mib: dict[str, float] = field(default_factory=dict)
    total_mib: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=lambda: defaultdict(Waiting))
    """By alias."""
    uptime_sec: float = 0.0
    in_flight: int = 0
    requests: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the screen shows."""

    status: dict[str, Any] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)
    requests_per_sec: float = 0.0
    tokens_per_sec: float = 0.0
    decisions: tuple[Decision, ...] = ()
    problem: str = ""
    """Why the other values are out of date; empty while the router responds."""


def top(options: argparse.Namespace) -> None:
    """Watch the router. Raises CannotAsk, ConfigError."""
    client = connect(options)
    if options.json:
        print_json(
            {
                "status": client.get("/v1/models/status"),
                "queue": client.get("/v1/queue/stats"),
                "memory": client.get("/vram"),
                "decisions": client.get("/v1/decisions")["decisions"],
            }
        )
    else:
        run(client)


def run(client: RouterClient) -> None:
    """Draw until q or Ctrl-C; without a terminal, once. Raises CannotAsk if the first request fails."""
    watch = Watch(client)
    watch.look()
    console = Console(highlight=False)
    if not console.is_terminal:
        watch.look_back()
        console.print(drawing(watch.view, console.width, 1000, is_brief=True))
        return
    watch.start()
    signal.signal(signal.SIGTERM, _leave)  # so that the terminal is restored
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as next_keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        keys = b""
        while b"q" not in keys:
            live.update(drawing(watch.view, *console.size), refresh=True)
            keys = next_keys(_DRAW_SEC)


def _leave(*_: object) -> NoReturn:
    sys.exit(0)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """Provide a function that returns typed keys, without waiting for the end of a line and without echo."""
    terminal = sys.stdin.fileno()

    def next_keys(wait_sec: float) -> bytes:
        typed, _, _ = select.select([terminal], [], [], wait_sec)
        return (os.read(terminal, 1024) or b"q") if typed else b""

    def no_keys(wait_sec: float) -> bytes:
        time.sleep(wait_sec)
        return b""

    if not sys.stdin.isatty():
        yield no_keys
        return
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield next_keys
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class Watch:
    """Keeps `view` up to date in two threads, which end with the program."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._totals: deque[tuple[float, float, float]] = deque()
        self.view = View()

    def start(self) -> None:
        for forever in (self._look_again, self._follow):
            threading.Thread(target=forever, daemon=True).start()

    def look(self) -> None:
        """Update the view once. Raises CannotAsk."""
        status = self._client.get("/v1/models/status")
        figures = read_figures(self._client.text("/metrics"))
        requests, tokens = self._rates(figures)
        self._update(status=status, figures=figures, requests_per_sec=requests, tokens_per_sec=tokens, problem="")

    def look_back(self) -> None:
        """Add the last decisions to the view. Raises CannotAsk."""
        for decision in self._client.get("/v1/decisions")["decisions"]:
            self._decide_as(decision)

    def _look_again(self) -> None:
        lost_sec: float | None = None
        while True:
            time.sleep(_LOOK_SEC)
            before = self.view.status["server"]["started_at"]
            try:
                self.look()
            except CannotAsk as error:
                if lost_sec is None:
                    lost_sec = time.monotonic()
                    self._decide("router", "lost", str(error))
                self._update(problem=f"No response for {duration(time.monotonic() - lost_sec)}; retrying. {error}")
                continue
            if self.view.status["server"]["started_at"] != before:
                self._decide("router", "back", "it was started again")
            elif lost_sec is not None:
                self._decide("router", "back", f"after {duration(time.monotonic() - lost_sec)}")
            lost_sec = None

    def _follow(self) -> None:
        last = ""
        while True:
            with contextlib.suppress(CannotAsk):  # the other thread reports it
                for event in self._client.events("/v1/models/status/stream", after=last):
                    last = event.id or last
                    self._note(event)
            time.sleep(_LOOK_SEC)

    def _note(self, event: Happened) -> None:
        if event.name == "full_status":  # sent first: decisions before or between streams are fetched
            with contextlib.suppress(CannotAsk):  # older routers do not have this route
                self.look_back()
        elif event.name == "model_update":
            change = event.json()
            if "reason" in change:  # events without a reason report the progress of a load
                self._decide_as({**change, "id": event.id, "model": change["alias"], "at": change["updated_at"]})

    def _decide_as(self, told: dict[str, Any]) -> None:
        """Add a decision reported by the router, except `stopping`: `off` or `asleep` follows for its reason."""
        if told["model"] is not None and told["status"] != "stopping":
            at = datetime.fromisoformat(told["at"]).astimezone()
            self._decide(told["model"], told["status"], told["reason"], at, told["id"])

    def _decide(self, about: str, state: str, reason: str, at: datetime | None = None, key: str = "") -> None:
        decision = Decision(at or datetime.now().astimezone(), about, state, printable(reason), key)
        with self._lock:
            known = self.view.decisions
            if not key or all(key != other.id for other in known):
                decisions = sorted((*known, decision), key=lambda decision: decision.at)[-_DECISIONS:]
                self.view = replace(self.view, decisions=tuple(decisions))

    def _update(self, **news: Any) -> None:
        with self._lock:
            self.view = replace(self.view, **news)

    def _rates(self, figures: Figures) -> tuple[float, float]:
        """Return requests and tokens per second, from totals that only grow until the router restarts."""
        now = time.monotonic()
        if self._totals and figures.requests < self._totals[-1][1]:
            self._totals.clear()
        self._totals.append((now, figures.requests, figures.tokens))
        while len(self._totals) > 2 and self._totals[1][0] < now - _RATE_SEC:
            self._totals.popleft()
        then, requests, tokens = self._totals[0]
        passed_sec = max(now - then, _LOOK_SEC)
        return (figures.requests - requests) / passed_sec, (figures.tokens - tokens) / passed_sec


def read_figures(metrics: str) -> Figures:
    """Parse the figures from Prometheus's text format."""
    figures = Figures()
    for name, label_text, number in _SERIES.findall(metrics):
        labels: dict[str, str] = dict(_LABEL.findall(label_text))
        value = float(number)
        match name:
            case "memory_total_bytes":
                figures.total_mib[labels["device"]] = value / (1 << 20)
            case "memory_reserved_bytes":
                figures.reserved_mib[labels["device"]] = value / (1 << 20)
            case "memory_external_bytes":
                figures.others_mib[labels["device"]] = value / (1 << 20)
            case "uptime_seconds":
                figures.uptime_sec = value
            case "output_tokens_total":
                figures.tokens += value
            case "requests_total":
                figures.requests += value
            case "active_requests":
                figures.in_flight += round(value)
            case "queue_by_priority" if value:
                figures.waiting[labels["model"]].counts[labels["priority"]] += round(value)
            case "queue_oldest_wait_seconds" if value:
                figures.waiting[labels["model"]].oldest_sec[labels["priority"]] = value
    return figures


def drawing(view: View, width: int, height: int, *, is_brief: bool = False) -> Group:
    """Draw the screen, in at most `height` lines. `is_brief`: models that are off are counted only."""
    models = sorted(view.status["models"].values(), key=lambda model: _RANK[model["status"]])
    known = len(models)
    if is_brief:
        models = [model for model in models if is_of_interest(model)]
    waiting = sorted(view.figures.waiting.items(), key=lambda item: -max(item[1].oldest_sec.values(), default=0))
    bars = [_memory_bar(view.figures, device, width) for device in view.figures.total_mib]
    spare = max(0, height - 4 - len(bars))
    shares = _shares(spare, (len(models), len(waiting), len(view.decisions)))
    return Group(
        _headline(view, width),
        *bars,
        _models_table(models, shares[0], width),
        *([_line((f"… and {known - len(models)} off", "dim"))] if len(models) < known else []),
        _waiting_heading(view.figures),
        *_waiting_lines(waiting, view.status["models"], shares[1]),
        Text("DECISIONS", style=_HEADING),
        *_decision_lines(view.decisions, shares[2]),
    )


def _shares(spare: int, wanted: Sequence[int]) -> list[int]:
    """Divide `spare` lines among the sections: an equal share each, plus what others do not need."""
    shares = [min(want, spare // len(wanted)) for want in wanted]
    for index, want in enumerate(wanted):
        shares[index] += min(want - shares[index], spare - sum(shares))
    return shares


def _line(*parts: str | tuple[str, str]) -> Text:
    """Return one line, truncated at the edge of the screen."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _headline(view: View, width: int) -> Text:
    if view.problem:
        return _line((view.problem, "bold red"))
    server = view.status["server"]
    left = f"llama-router {server['status']}, up {duration(view.figures.uptime_sec)}"
    rates = f"{view.requests_per_sec:.1f} requests/s, {view.tokens_per_sec:.0f} tokens/s"
    right = f"{view.figures.in_flight} in flight, {rates}"
    return _line((left, _HEADING), " " * max(2, width - len(left) - len(right)), right)


def _memory_bar(figures: Figures, device: str, width: int) -> Text:
    total, ours = figures.total_mib[device], figures.reserved_mib.get(device, 0.0)
    others = figures.others_mib.get(device, 0.0)
    amounts = f" {memory(ours)} models + {memory(others)} others of {memory(total)}"
    room = max(10, width - len(device) - len(amounts) - 1)
    of_models, of_others = (round(room * mib / total) if total else 0 for mib in (ours, others))
    free = max(0, room - of_models - of_others)
    return _line(f"{device} ", ("█" * of_models, "cyan"), ("▒" * of_others, "blue"), ("·" * free, "dim"), amounts)


def _models_table(models: Sequence[dict[str, Any]], lines: int, width: int) -> Table:
    names = ("STATE", "QUEUE", "SLOTS", "MEMORY", "UP", "UNLOADS IN")[: 6 if width >= _NARROW else 2]
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style=_HEADING)
    table.add_column("MODEL", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in names:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    shown = _shown(models, lines)
    for model in models[:shown]:
        alias, state, _pid, _port, size, slots, queue, up, unloads = model_row(model)
        cells = (Text(state, style=_STYLES.get(model["status"], "dim")), queue, slots, size, up, unloads)
        table.add_row(Text(alias), *cells[: len(names)])
    if lines and shown < len(models):
        table.add_row(Text(f"… and {len(models) - shown} more", style="dim"))
    return table


def _shown(rows: Sequence[object], lines: int) -> int:
    """Return how many rows fit, if one line is needed to count the others."""
    return lines if len(rows) <= lines else max(0, lines - 1)


def _waiting_heading(figures: Figures) -> Text:
    parts: list[str | tuple[str, str]] = [("WAITING", _HEADING)]
    for priority in _PRIORITIES:
        count = sum(waiting.counts[priority] for waiting in figures.waiting.values())
        oldest_sec = max((waiting.oldest_sec[priority] for waiting in figures.waiting.values()), default=0.0)
        oldest = f" (oldest {duration(oldest_sec)})" if count else ""
        parts.append((f"  {priority} {count}{oldest}", "yellow" if count else "dim"))
    return _line(*parts)


def _waiting_lines(
    waiting: Sequence[tuple[str, Waiting]], models: dict[str, dict[str, Any]], lines: int
) -> Iterator[Text]:
    shown = _shown(waiting, lines)
    for alias, those in waiting[:shown]:
        counts = ", ".join(
            f"{those.counts[priority]} {priority}" for priority in _PRIORITIES if those.counts[priority]
        )
        why = models.get(alias, {}).get("why_waiting") or "its slots are taken"
        oldest = duration(max(those.oldest_sec.values(), default=0))
        yield _line(f"  {alias}: {counts}, {oldest}: {printable(why)}")
    if lines and shown < len(waiting):
        yield _line((f"  … and {len(waiting) - shown} more", "dim"))


def _decision_lines(decisions: Sequence[Decision], lines: int) -> Iterator[Text]:
    for decision in decisions[::-1][:lines]:
        yield _line(
            (f"  {decision.at:%H:%M:%S} ", "dim"),
            f"{decision.about} ",
            (decision.state, _STYLES.get(decision.state, "")),
            f": {decision.reason}" if decision.reason else "",
        )
