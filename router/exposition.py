"""Counters and histograms in Prometheus's text formats: cheap to count, cheap to scrape.

prometheus-client takes 1 to 3 us for each count, and some 5 us for each line of a scrape, which with 200 models is
a tenth of a second in which no token is relayed. Here a count is an addition, and a line that did not change since
the last scrape is not written again. What it keeps: names, types and escaping of the text format 0.0.4, and of
OpenMetrics 1.0 (prometheus.io/docs/specs/om), which differ in how counters are announced.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """`model="a",endpoint="/x"`, escaped."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def head(name: str, kind: str, text: str, *, openmetrics: bool) -> str:
    """What announces a metric: its help and its type."""
    if openmetrics and kind == "counter":
        name = name.removesuffix("_total")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


class CounterCell:
    """One counter: `cell.value += 1`."""

    __slots__ = ("_name", "value")

    def __init__(self, name: str, labels: str) -> None:
        self._name = f"{name}{{{labels}}}" if labels else name
        self.value: float = 0

    def text(self) -> str:
        return f"{self._name} {self.value}\n"


class HistogramCell:
    """One histogram."""

    __slots__ = ("_bounds", "_counts", "_names", "_sum", "_text")

    def __init__(self, name: str, labels: str, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._text = ""
        comma = "," if labels else ""
        steps = [f"{float(bound)}" for bound in bounds]
        self._names = [f'{name}_bucket{{{labels}{comma}le="{step}"}}' for step in (*steps, "+Inf")]
        self._names += (
            [f"{name}_count{{{labels}}}", f"{name}_sum{{{labels}}}"]
            if labels
            else [
                f"{name}_count",
                f"{name}_sum",
            ]
        )

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value
        self._text = ""

    def text(self) -> str:
        if not self._text:
            total = 0
            figures: list[float] = []
            for count in self._counts:
                total += count
                figures.append(total)
            figures += (total, self._sum)
            self._text = "".join([f"{name} {figure}\n" for name, figure in zip(self._names, figures, strict=True)])
        return self._text


class Counter:
    """A counter per combination of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._cells: dict[tuple[str, ...], CounterCell] = {}

    def of(self, *values: str) -> CounterCell:
        """The one with these labels; from then on it is in every scrape."""
        cell = self._cells.get(values)
        if cell is None:
            cell = self._cells[values] = CounterCell(self.name, label_text(self.labels, values))
        return cell

    def text(self) -> Iterable[str]:
        return (cell.text() for cell in self._cells.values())


class Histogram:
    """A histogram per combination of labels."""

    kind = "histogram"

    def __init__(self, name: str, text: str, *labels: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._bounds = bounds
        self._cells: dict[tuple[str, ...], HistogramCell] = {}

    def of(self, *values: str) -> HistogramCell:
        """The one with these labels; from then on it is in every scrape."""
        cell = self._cells.get(values)
        if cell is None:
            cell = self._cells[values] = HistogramCell(self.name, label_text(self.labels, values), self._bounds)
        return cell

    def text(self) -> Iterable[str]:
        return (cell.text() for cell in self._cells.values())


class Gauges:
    """A gauge per combination of labels, known anew at every scrape."""

    kind = "gauge"

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name = name
        self.help = text
        self.labels = labels
        self._lines: list[str] = []

    def set(self, value: float, *values: str) -> None:
        self.line(label_text(self.labels, values), value)

    def line(self, labels: str, value: float) -> None:
        """The same with the text of the labels at hand."""
        self._lines.append(f"{self.name}{{{labels}}} {value}\n" if labels else f"{self.name} {value}\n")

    def text(self) -> Iterator[str]:
        lines, self._lines = self._lines, []
        return iter(lines)


Family = Counter | Histogram | Gauges


def exposition(families: Iterable[Family], *, openmetrics: bool) -> str:
    """All of them as text; OpenMetrics still wants its `# EOF`."""
    parts: list[str] = []
    for family in families:
        parts.append(head(family.name, family.kind, family.help, openmetrics=openmetrics))
        parts.extend(family.text())
    return "".join(parts)
