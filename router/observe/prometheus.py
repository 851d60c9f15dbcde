"""Counters and histograms in Prometheus's text formats, cheap to count and to scrape.

prometheus-client takes 1 to 3 us for each count, and about 5 us for each line of a scrape; with 200 models that is
a tenth of a second in which no token is relayed. Here a count is an addition, and a histogram that has not changed
since the last scrape is not formatted again. Names, types and escaping follow the text format 0.0.4 and
OpenMetrics 1.0 (prometheus.io/docs/specs/om), which differ in how counters are announced.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Sequence
from copy import copy
from itertools import accumulate
from typing import Any, Generic, TypeVar

_Cell = TypeVar("_Cell")
_Same = TypeVar("_Same", bound="_Counted[Any]")


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """Format labels as `model="a",endpoint="/x"`, escaped."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def head(name: str, kind: str, text: str, *, openmetrics: bool) -> str:
    """Return the lines that announce a metric: its help and its type."""
    if openmetrics and kind == "counter":
        name = name.removesuffix("_total")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


class CounterCell:
    """One counter; count with `cell.value += 1`."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, labels: str) -> None:
        self.name = f"{name}{{{labels}}}" if labels else name
        self.value: float = 0


class HistogramCell:
    """One histogram; `bounds` are the upper bounds of its buckets."""

    __slots__ = ("_bounds", "_counts", "_sum", "_template", "_text")

    def __init__(self, name: str, labels: str, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._text = b""
        inner, whole = (f"{labels},", f"{{{labels}}}") if labels else ("", "")
        steps = [f"{float(bound)}" for bound in bounds]
        lines = [f'{name}_bucket{{{inner}le="{step}"}}'.replace("%", "%%") + " %d\n" for step in (*steps, "+Inf")]
        whole = whole.replace("%", "%%")
        self._template = "".join([*lines, f"{name}_count{whole} %d\n", f"{name}_sum{whole} %r\n"]).encode()

    def observe(self, values: Iterable[float]) -> None:
        counts, bounds = self._counts, self._bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            self._sum += value
        self._text = b""

    def text(self) -> bytes:
        if not self._text:
            steps = list(accumulate(self._counts))
            self._text = self._template % (*steps, steps[-1], self._sum)
        return self._text


class _Counted(Generic[_Cell]):
    """A metric with a cell per combination of labels, which is kept from scrape to scrape."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._cells: dict[tuple[str, ...], _Cell] = {}

    def of(self, *values: str) -> _Cell:
        """Return the cell with these labels; from then on it is in every scrape."""
        cell = self._cells.get(values)
        if cell is None:
            cell = self._cells[values] = self._cell(label_text(self.labels, values))
        return cell

    def _cell(self, labels: str) -> _Cell:
        raise NotImplementedError

    def beginning_with(self: _Same, value: str) -> _Same:
        """Return a copy with only the cells whose first label has this value."""
        some = copy(self)
        some._cells = {values: cell for values, cell in self._cells.items() if values[0] == value}
        return some

    def forget(self, label: str, values: Container[str]) -> None:
        """Remove the cells whose label has one of these values."""
        if label in self.labels:
            place = self.labels.index(label)
            self._cells = {of: cell for of, cell in self._cells.items() if of[place] not in values}


class Counter(_Counted[CounterCell]):
    """A counter per combination of labels."""

    kind = "counter"

    def _cell(self, labels: str) -> CounterCell:
        return CounterCell(self.name, labels)

    def text(self) -> list[bytes]:
        return ["".join([f"{cell.name} {cell.value}\n" for cell in self._cells.values()]).encode()]


class Histogram(_Counted[HistogramCell]):
    """A histogram per combination of labels."""

    kind = "histogram"

    def __init__(self, name: str, text: str, *labels: str, bounds: Sequence[float]) -> None:
        super().__init__(name, text, *labels)
        self._bounds = bounds

    def _cell(self, labels: str) -> HistogramCell:
        return HistogramCell(self.name, labels, self._bounds)

    def text(self) -> list[bytes]:
        return [cell.text() for cell in self._cells.values()]


class Gauges:
    """A gauge per combination of labels, created for each scrape."""

    kind = "gauge"

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._lines: list[str] = []

    def set(self, value: float, *values: str) -> None:
        labels = label_text(self.labels, values)
        self._lines.append(f"{self.name}{{{labels}}} {value}\n" if labels else f"{self.name} {value}\n")

    def lines(self, values: Iterable[tuple[str, float]]) -> None:
        """Add many values at once, given with formatted labels."""
        name = self.name
        self._lines += [f"{name}{{{labels}}} {value}\n" for labels, value in values]

    def text(self) -> list[bytes]:
        return ["".join(self._lines).encode()]


class Counts(Gauges):
    """A counter per combination of labels that is counted elsewhere, and read for each scrape."""

    kind = "counter"


Family = Counter | Histogram | Gauges


def exposition(families: Iterable[Family], *, openmetrics: bool) -> list[bytes]:
    """Return the text in parts, so that it is copied only once. The caller adds `# EOF` for OpenMetrics."""
    parts: list[bytes] = []
    for family in families:
        parts.append(head(family.name, family.kind, family.help, openmetrics=openmetrics).encode())
        parts += family.text()
    return parts
