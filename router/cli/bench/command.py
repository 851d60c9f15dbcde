"""`llama-router bench`: measure a model, or compare saved measurements."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from router.cli.bench.measure import Asker, measured
from router.cli.bench.results import Results, Row, print_comparison, print_results
from router.cli.client import CannotAsk, RouterClient
from router.cli.columns import duration
from router.cli.remote import connect
from router.system.printable import line


def run(options: argparse.Namespace) -> None:
    """Measure and print, or compare. Raises CannotAsk, ConfigError."""
    if options.compare is not None:
        print_comparison(*map(Results.load, options.compare))
        return
    if options.model is None:
        options.wrong("name a model to measure, or two saved results to --compare")
    before = None if options.against is None else Results.load(options.against)
    results = _measure(options)
    if options.save is not None:
        results.save(options.save)
    if options.json:
        print(results.document().decode(), end="")
        return
    print_results(results)
    if before is not None:
        print()
        print_comparison(before, results)


def _measure(options: argparse.Namespace) -> Results:
    client = connect(options)
    told = _Progress()
    asker = Asker(client, options.model, options.output, options.cached)
    since = time.monotonic()
    told("warming up")
    prompts = asker.prompts(options.prompt, told.remark)
    told.remark(f"Warm-up, with the load if there was one: {duration(time.monotonic() - since)}, not counted.")
    rows: list[Row] = []
    for clients in options.clients:
        rows += measured(asker, prompts, clients, options.priority, options.repeat, told)
    told.end()
    return Results(
        model=options.model,
        url=client.url,
        at=datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        prompt=options.prompt,
        output=options.output,
        repeat=options.repeat,
        cached=options.cached,
        rows=rows,
        **_described(client, options.model),
    )


def _described(client: RouterClient, model: str) -> dict[str, Any]:
    """Return what the router knows of a model; of another server's, nothing."""
    path = f"/v1/models/{quote(model, safe='')}"
    try:
        card, status = client.get(path), client.get(f"{path}/status")
        return {
            "engine": status["engine"],
            "slots": status["slots"],
            "quantization": card.get("quantization"),
            "size": card.get("size"),
        }
    except (CannotAsk, KeyError, TypeError, AttributeError):
        return {}


class _Progress:
    """A line on standard error, if that is a terminal, which says what is being measured."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{line(text)} …")
            sys.stderr.flush()

    def remark(self, text: str) -> None:
        """Print a line that stays."""
        self.end()
        print(line(text), file=sys.stderr)

    def end(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
