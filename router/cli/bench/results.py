"""Results of `llama-router bench`: what is measured, saved, printed and compared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from router.cli.client import CannotAsk
from router.cli.columns import print_columns


class Figure(msgspec.Struct, frozen=True):
    """A figure of several rounds."""

    median: float
    lowest: float
    highest: float
    rounds: list[float]

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figure | None:
        """Return the figure of these rounds; None if one of them is not known."""
        known = [round(value, 4) for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known), known) if known else None

    @property
    def spread(self) -> float:
        """Half the range of the rounds, as a share of the median."""
        return (self.highest - self.lowest) / 2 / self.median if self.median else 0.0

    def overlaps(self, other: Figure) -> bool:
        """Return whether there are values that both may have."""
        return self.lowest <= other.highest and other.lowest <= self.highest


class Row(msgspec.Struct, frozen=True):
    """What a number of clients got at once, with one priority. Rates are tokens per second."""

    clients: int
    priority: str
    failed: int
    """Requests that failed, of all rounds."""
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    prefill_per_sec: Figure | None
    """Per client, of the part of the prompt that was not cached."""
    decode_per_sec: Figure | None
    """Per client, after the first token."""
    output_per_sec: Figure | None
    """Of all these clients together, from their first request to their last token."""
    first_sec: Figure | None
    """From the request to the first token."""
    waited_sec: Figure | None
    """The part of that until an engine had a place, according to the router."""
    prefill_by: str
    """Who measured it: `engine` or `client`."""
    decode_by: str


class Results(msgspec.Struct, frozen=True):
    """A run of the benchmark."""

    model: str
    url: str
    at: str
    prompt: int
    output: int
    repeat: int
    cached: bool
    rows: list[Row]
    engine: str | None = None
    slots: int | None = None
    quantization: str | None = None
    size: int | None = None

    def save(self, path: Path) -> None:
        """Write the results to a file. Raises CannotAsk."""
        try:
            path.write_bytes(self.document())
        except OSError as error:
            raise CannotAsk(f"{path} cannot be written: {error.strerror}.") from None

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read saved results. Raises CannotAsk."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise CannotAsk(f"{path} cannot be read: {error.strerror}.") from None
        except msgspec.MsgspecError as error:
            raise CannotAsk(f"{path} was not saved by `llama-router bench --save`: {error}.") from None

    def document(self) -> bytes:
        """Return the results as JSON."""
        return msgspec.json.format(msgspec.json.encode(self)) + b"\n"

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        said = [self.engine, self.quantization, None if self.slots is None else _counted(self.slots, "slot")]
        of_it = ", ".join(word for word in said if word)
        cached = ", cached" if self.cached else ""
        times = _counted(self.repeat, "round")
        model = f"{self.model} ({of_it})" if of_it else self.model
        return f"{model}: prompts of {self.prompt} tokens{cached}, answers of {self.output}, {times}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


_HEAD = ("CLIENTS", "PRIORITY", "PROMPT", "CACHED", "OUTPUT", "PREFILL", "DECODE", "TOGETHER", "FIRST", "WAITED")


def print_results(results: Results) -> None:
    """Print a table: medians of the rounds, each with half their range."""
    print(results.title)
    print_columns([_HEAD, *map(_cells, results.rows)])
    print(
        "PREFILL and DECODE: tokens/s of each client; TOGETHER: tokens/s of all; FIRST: time to the first token."
    )
    if any(row.prefill_per_sec and row.prefill_by == "client" for row in results.rows):
        print(
            "PREFILL was measured at the client: with the network, and with waits that the server does not report."
        )
    if any(row.decode_per_sec and row.decode_by == "client" for row in results.rows):
        print("DECODE was measured at the client.")
    if failed := sum(row.failed for row in results.rows):
        print(f"{_counted(failed, 'request')} failed, and not part of the figures.")


def _cells(row: Row) -> tuple[str, ...]:
    counts = (row.prompt_tokens, row.cached_tokens, row.output_tokens)
    rates = (row.prefill_per_sec, row.decode_per_sec, row.output_per_sec)
    return (
        str(row.clients),
        row.priority,
        *("-" if count is None else str(count) for count in counts),
        *(_with_spread(rate) for rate in rates),
        *(_with_spread(time, "s") for time in (row.first_sec, row.waited_sec)),
    )


def _with_spread(figure: Figure | None, unit: str = "") -> str:
    if figure is None:
        return "-"
    spread = f"±{figure.spread:.0%}" if len(figure.rounds) > 1 else ""
    return f"{_short(figure.median)}{unit}{spread}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# --- comparing ----------------------------------------------------------------------------------------------

_COMPARED = (
    ("prefill", "prefill_per_sec", True),
    ("decode", "decode_per_sec", True),
    ("together", "output_per_sec", True),
    ("first", "first_sec", False),
)
"""Figures with their fields, and whether more is better."""
_CONDITIONS = ("model", "engine", "quantization", "slots", "prompt", "output", "cached")


def print_comparison(before: Results, after: Results) -> None:
    """Print how much faster or slower the second results are. Raises CannotAsk if nothing can be compared."""
    print(f"A  {before.title}, {before.at}")
    print(f"B  {after.title}, {after.at}")
    changed = [name for name in _CONDITIONS if getattr(before, name) != getattr(after, name)]
    if changed:
        print(f"They differ in: {', '.join(changed)}.")
    rows = list(_compared(before.rows, after.rows))
    if not rows:
        raise CannotAsk("These runs have no number of clients and priority in common.")
    print_columns([("CLIENTS", "PRIORITY", "FIGURE", "A", "B", "B/A", "RESULT"), *rows])


def _compared(before: Sequence[Row], after: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    known = {(row.clients, row.priority): row for row in before}
    for new in after:
        old = known.get((new.clients, new.priority))
        if old is None:
            continue
        for name, field, more_is_better in _COMPARED:
            a, b = getattr(old, field), getattr(new, field)
            if a is not None and b is not None and a.median and b.median:
                unit = "" if more_is_better else "s"
                shown = (_with_spread(a, unit), _with_spread(b, unit), f"{b.median / a.median:.2f}")
                yield (str(new.clients), new.priority, name, *shown, _verdict(a, b, more_is_better))


def _verdict(a: Figure, b: Figure, more_is_better: bool) -> str:
    """Return what the ratio of two figures means: where their ranges overlap, nothing."""
    if min(len(a.rounds), len(b.rounds)) < 2:
        return "unknown: one round has no spread"
    if a.overlaps(b):
        return "within noise"
    word = "faster" if (b.median > a.median) == more_is_better else "slower"
    return f"{word} ({b.lowest / a.highest:.2f} to {b.highest / a.lowest:.2f})"
