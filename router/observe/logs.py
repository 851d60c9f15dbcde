"""The log: text on a terminal, JSON otherwise. It never contains prompts or keys.

Standard `logging`, with a thread that formats and writes: a slow reader of standard error, or a slow disk, delays
no request. Lines that do not fit into its queue are dropped and counted. Each line begins with its time; text from
outside cannot begin a line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import Full, Queue
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from router.observe.events import ClientRefused, Events, RequestDone, RequestsDone
from router.observe.log_limits import Sparing
from router.system.printable import LINE_SEPARATORS, TURNS_OF_DIRECTION
from router.system.privacy import FILE_MODE, FOLDER_MODE, keep_to_owner

_log = logging.getLogger("router")

_FIELDS = ("alias", "state", "request_id", "reason", "priority", "outcome", "status", "client", "count")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x0A), *range(0x0B, 0x20), *range(0x7F, 0xA0))} | {
    code: f"\\u{code:04x}" for code in (*LINE_SEPARATORS, *TURNS_OF_DIRECTION)
}
_MOST_WAITING = 10_000
_CLOSE_SEC = 2.0
_FILE_BYTES = 10 << 20
_OLDER_FILES = 3


class Logs:
    """The log of this process, from `set_up` to `close`."""

    def __init__(self, queue: Queue[logging.LogRecord], log_dir: Path | None) -> None:
        self._queue = queue
        self._log_dir = log_dir
        self._refused_requests = Sparing(_tell_of_more_requests)
        self._refused_clients = Sparing(_tell_of_more_clients)

    def log_requests(self, events: Events) -> None:
        """Log a line for every request that ended; for refused ones, at most one per second by kind and client.

        A client may send thousands of those; `/metrics` counts all of them.
        """
        events.listen(RequestsDone, self._note_requests)

    def log_refusals(self, events: Events) -> None:
        """Log a line for connections that violate HTTP or were refused, with the same limit."""
        events.listen(ClientRefused, self._note_refusal)

    def _note_requests(self, happening: RequestsDone) -> None:
        done = happening.requests
        if any(each.refused for each in done):
            done = [each for each in done if not each.refused or self._is_new(each)]
        if done:
            self._put("router.access", done=done)

    def _is_new(self, refused: RequestDone) -> bool:
        kind = _Kind(refused.alias, refused.priority, refused.outcome, refused.status)
        return self._refused_requests.lets_in(kind, refused.client or refused.peer)

    def _note_refusal(self, happening: ClientRefused) -> None:
        if self._refused_clients.lets_in(happening.reason, happening.peer):
            _log.warning("client %s: %s", happening.peer, happening.message)

    def engine_file(self, alias: str) -> Callable[[bytes], None] | None:
        """Return a function that appends an engine's output to `LOG_DIR/ALIAS.log`; None without `log_dir`."""
        if self._log_dir is None:
            return None
        path = self._log_dir / f"{quote(alias, safe=' @:+,')}.log"

        def take(chunk: bytes) -> None:
            self._put("engine", chunk=chunk, path=path)

        return take

    def close(self) -> None:
        """Write pending lines, but do not wait forever for a reader that does not read."""
        self._refused_requests.settle()
        self._refused_clients.settle()
        with self._queue.all_tasks_done:
            self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, _CLOSE_SEC)

    def _put(self, name: str, **fields: object) -> None:
        record = logging.makeLogRecord({"name": name, "levelno": logging.INFO, "levelname": "INFO", **fields})
        try:
            self._queue.put_nowait(record)
        except Full:
            done = fields.get("done")
            _lost.count += len(done) if isinstance(done, list) else 1


def set_up(*, debug: bool, structured: bool | None, log_dir: Path | None = None) -> Logs:
    """Set up logging to standard error; `structured` None means JSON unless that is a terminal.

    Raises OSError if `log_dir` cannot be created.
    """
    if log_dir is not None:
        log_dir.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    if structured is None:
        structured = not sys.stderr.isatty()
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(_JsonFormatter() if structured else _TextFormatter())
    stderr.addFilter(lambda record: record.name != "engine")
    engines = _EngineFiles()
    engines.addFilter(lambda record: record.name == "engine")
    queue: Queue[logging.LogRecord] = Queue(_MOST_WAITING)
    QueueListener(queue, stderr, engines).start()
    root = logging.getLogger()
    root.handlers[:] = [_Enqueue(queue)]
    root.setLevel(logging.WARNING)
    logging.getLogger("router").setLevel(logging.DEBUG if debug else logging.INFO)
    return Logs(queue, log_dir)


class _Kind(NamedTuple):
    """Refused requests that are logged together."""

    alias: str
    priority: str
    outcome: str
    status: int


def _tell_of_more_requests(kind: _Kind, client: str, count: int) -> None:
    extra = {**kind._asdict(), "client": client, "count": count}
    _log.info("%s: %s, %d more requests within a second", client, kind.outcome, count, extra=extra)


def _tell_of_more_clients(reason: str, client: str, count: int) -> None:
    _log.info("client %s: %d more connections within a second: %s", client, count, reason)


class _Lost:
    """Number of lines dropped since the log last reported them."""

    count = 0


_lost = _Lost()


class _Enqueue(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Format the message now, as the arguments may change; the writing thread does the rest."""
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text, record.exc_info = logging.Formatter().formatException(record.exc_info), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except Full:
            _lost.count += 1


class _EngineFile(RotatingFileHandler):
    """A log file of an engine. Output that cannot be written is lost, which is logged when it begins."""

    failing = False

    def _open(self) -> TextIOWrapper:
        """Open the file for its owner only, regardless of the umask, and restrict older files as well."""
        number = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
        keep_to_owner(number)
        for count in range(1, self.backupCount + 1):
            keep_to_owner(f"{self.baseFilename}.{count}")
        return TextIOWrapper(open(number, "ab"), self.encoding, self.errors)

    def flush(self) -> None:
        super().flush()
        self.failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failing:
            reason = sys.exc_info()[1]
            logging.getLogger("router").warning(
                "%s cannot be written: %s. Engine output is not saved there until it can be written",
                self.baseFilename,
                getattr(reason, "strerror", None) or reason,
            )
        self.failing = True


class _EngineFiles(logging.Handler):
    """Writes engine output unchanged to files that are rotated when they are full."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, _EngineFile] = {}

    def emit(self, record: logging.LogRecord) -> None:
        path: Path = record.__dict__["path"]
        if path not in self._files:
            file = _EngineFile(path, maxBytes=_FILE_BYTES, backupCount=_OLDER_FILES, encoding="utf-8", delay=True)
            file.terminator = ""
            self._files[path] = file
        text: bytes = record.__dict__["chunk"]
        self._files[path].handle(logging.makeLogRecord({"msg": text.decode("utf-8", "replace")}))


# --- lines ----------------------------------------------------------------------------------------------


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if "done" in record.__dict__:
            return "\n".join([_request_json(done) for done in record.__dict__["done"]])
        line = {"time": _iso(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        line.update({name: record.__dict__[name] for name in _FIELDS if record.__dict__.get(name) is not None})
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line) + _lines_lost(_JSON_LOST)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if "done" in record.__dict__:
            return "\n".join([_request_text(done) for done in record.__dict__["done"]])
        text = record.getMessage()
        if record.exc_text:
            text += f"\n{record.exc_text}"
        return f"{_clock(record.created)} {record.levelname:<7} {_harmless(text)}" + _lines_lost(
            "\n%d log lines lost"
        )


_JSON_LOST = '\n{"level": "warning", "message": "%d log lines lost: the reader of the log is too slow"}'


def _lines_lost(text: str) -> str:
    if not _lost.count:
        return ""
    count, _lost.count = _lost.count, 0
    return text % count


def _harmless(text: str) -> str:
    """Escape control characters and indent further lines, so that they cannot pass for lines of the log."""
    if text.isprintable():
        return text
    return text.translate(_CONTROLS).replace("\n", "\n    ")


class _RequestLine(msgspec.Struct, omit_defaults=True):
    time: str
    level: str
    message: str
    request_id: str
    alias: str = ""
    route: str = ""
    priority: str = ""
    outcome: str = ""
    status: int = 0
    queue_sec: float = 0
    load_sec: float = 0
    ttft_sec: float | None = None
    total_sec: float = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    request_bytes: int = 0
    answer_bytes: int = 0
    retries: int = 0
    resends: int = 0
    reason: str = ""
    client: str = ""
    peer: str = ""
    kv: str = ""


_encode = msgspec.json.Encoder().encode


def _request_json(done: RequestDone) -> str:
    usage = done.usage
    line = _RequestLine(
        _iso(done.at),
        "info",
        "request",
        done.request_id,
        done.alias,
        done.route,
        done.priority,
        done.outcome,
        done.status,
        int(done.queue_sec * 1e4) / 1e4,
        int(done.load_sec * 1e4) / 1e4 if done.load_sec else 0,
        None if done.ttft_sec is None else int(done.ttft_sec * 1e4) / 1e4,
        int(done.total_sec * 1e4) / 1e4,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        done.request_bytes,
        done.answer_bytes,
        done.retries,
        done.resends,
        done.reason,
        done.client,
        done.peer if done.refused else "",
        done.kv,
    )
    text = _encode(line)
    return text.decode() if text.isascii() else json.dumps(json.loads(text))


def _request_text(done: RequestDone) -> str:
    parts = [f"{_clock(done.at)} INFO    {done.alias or '-'}: {done.outcome} {done.status} {done.route}"]
    if done.priority:
        parts.append(f"{done.priority}, queue {done.queue_sec:.3f} s")
    if done.client:
        parts.append(f"by {done.client}")
    if done.refused:
        parts.append(f"from {done.peer}")
    if done.load_sec:
        parts.append(f"load {done.load_sec:.3f} s")
    if done.ttft_sec is not None:
        parts.append(f"first byte {done.ttft_sec:.3f} s")
    parts.append(f"total {done.total_sec:.3f} s")
    if done.usage.prompt_tokens:
        parts.append(f"{done.usage.prompt_tokens} + {done.usage.output_tokens} tokens")
    if done.kv:
        parts.append(f"kv {done.kv}")
    if done.retries:
        parts.append(f"{done.retries} retries")
    parts.append(f"id {done.request_id}")
    if done.reason:
        parts.append(done.reason)
    return _harmless(", ".join(parts))


_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))


def _iso(at: float) -> str:
    second = int(at)
    return _utc_second(second) + _MILLISECONDS[int((at - second) * 1000)]


@lru_cache(maxsize=16)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _clock(at: float) -> str:
    return _local_second(int(at))


@lru_cache(maxsize=16)
def _local_second(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))
