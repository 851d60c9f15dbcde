"""Log lines: for people on a terminal, JSON otherwise. Never a prompt, never a key."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(*, debug: bool, structured: bool | None) -> None:
    """Everything goes to standard error; `structured` None means: JSON unless that is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    if structured is None:
        structured = not sys.stderr.isatty()
    handler.setFormatter(
        _JsonFormatter()
        if structured
        else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("router").setLevel(logging.DEBUG if debug else logging.INFO)
