"""The answer to one request of the data plane, framed for the client's connection.

This module knows HTTP's framing. Of the content, it knows only when a translator has to be called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from http import HTTPStatus
from typing import Protocol

from router.formats.unreadable import UNREADABLE
from router.http.errors import CANCELLED, ApiError

_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_STATUS[CANCELLED] = b"HTTP/1.1 %d Client Closed Request\r\n" % CANCELLED

DOCUMENT = b"content-type: application/json; charset=utf-8\r\n"

_BODILESS = frozenset({204, 304})
"""Statuses of responses without a body (RFC 9112, 6.3), which may not have headers for framing either."""


class Wire(Protocol):
    """The connection to which an answer is written."""

    def write(self, data: bytes) -> None: ...

    def answered(self, *, keep_alive: bool) -> None:
        """Note that the answer is complete, so that the connection's next request may begin."""

    @property
    def peer(self) -> str:
        """The client's address."""

    def abort(self) -> None:
        """Reset the connection, so that the client does not take a partial answer for a complete one."""

    def invite_body(self) -> None:
        """Answer 100 to a client that waits for it before it sends its body (Expect: 100-continue)."""

    @property
    def default_lines(self) -> bytes:
        """Header lines of every answer, each with its line end."""


class Answer:
    """An answer in the engine's own words: either `whole`, or `start` and then `write` until `end`.

    A complete document goes through `told` first, the last part of a started answer through `rest`: both may find
    that it makes no sense.
    """

    __slots__ = ("_chunked", "_head", "_http_1_0", "_wire", "has_length", "keep_alive", "started")

    def __init__(self, wire: Wire, *, keep_alive: bool, http_1_0: bool) -> None:
        self._wire = wire
        self._http_1_0 = http_1_0
        self._chunked = False
        self._head = b""
        self.keep_alive = keep_alive
        self.started = False
        """True once the client has been sent a head, or will be with the next write."""
        self.has_length = False
        """True if the length was announced, so that nothing can be added."""

    @property
    def wire(self) -> Wire:
        """The connection to which it is written."""
        return self._wire

    @property
    def peer(self) -> str:
        """The address of the client."""
        return self._wire.peer

    def invite_body(self) -> None:
        self._wire.invite_body()

    def told(self, body: bytes) -> bytes:
        """Return an engine's complete document that is no error as the client gets it. Raises BrokenAnswer."""
        return body

    def rest(self, part: bytes) -> bytes:
        """Return the last part of a started answer, perhaps empty, as the client gets it. Raises BrokenAnswer."""
        return part

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a complete answer. `lines` are header lines with their line ends; those for framing are added."""
        self.started = self.has_length = True
        first = self._first_lines(status)
        if status in _BODILESS:
            self._wire.write(b"%b%b\r\n" % (first, lines))
        else:
            self._wire.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (first, lines, len(body), body))
        self._wire.answered(keep_alive=self.keep_alive)

    def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        """Begin an answer, whose head is sent together with the first part. `length`: None if it is not known."""
        self.started = True
        self.has_length = length is not None or status in _BODILESS
        self._chunked = not (self.has_length or self._http_1_0)
        if self._chunked:
            lines += b"transfer-encoding: chunked\r\n"
        elif not self.has_length:
            self.keep_alive = False
        elif length is not None and status not in _BODILESS:
            lines += b"content-length: %d\r\n" % length
        self._head = self._first_lines(status) + lines + b"\r\n"

    def write(self, part: bytes) -> None:
        """Send the next part, which is not empty. Raises BrokenAnswer."""
        if self._chunked:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        if self._head:
            part = self._head + part
            self._head = b""
        self._wire.write(part)

    def end(self, part: bytes = b"") -> None:
        """Send the last part, perhaps empty, and end the answer."""
        if self._chunked:
            part = (b"%x\r\n%b\r\n" % (len(part), part) if part else b"") + b"0\r\n\r\n"
        if self._head or part:
            self._wire.write(self._head + part)
        self._wire.answered(keep_alive=self.keep_alive)

    def break_off(self, reason: bytes) -> None:
        """End a started answer with an error event."""
        self.end(reason)

    def abort(self) -> None:
        self._wire.abort()

    def _first_lines(self, status: int) -> bytes:
        lines = _STATUS[status] + self._wire.default_lines
        return lines if self.keep_alive else lines + b"connection: close\r\n"


LONGEST_EVENT = 16 << 20
"""Maximum size in bytes of a parsed event: `response.completed` repeats all text of a response."""
_LONGEST_DOCUMENT = 256 << 20
"""Maximum size in bytes of a translated document with a Content-Length: the vectors of two thousand texts take
half of it. A document of unknown length may be as long as an event."""


class BrokenAnswer(Exception):
    """Raised if an engine's answer cannot be understood, or says that the engine failed."""

    def __init__(self, error: ApiError) -> None:
        """`error` is sent to the client."""
        super().__init__(error.message)
        self.error = error
        self.before = b""
        """Events for the client that precede the error: they arrived together with it."""

    @classmethod
    def unreadable(cls, why: object) -> BrokenAnswer:
        return cls(ApiError(502, "engine_error", f"The engine's response cannot be read: {why}."))

    @classmethod
    def of(cls, error: Exception, before: bytes = b"") -> BrokenAnswer:
        """Return `error` as a BrokenAnswer.

        A frame that raises the result may not bind it to a name: exception and frame would keep each other alive.
        """
        broken = error if isinstance(error, cls) else cls.unreadable(error)
        broken.before = before
        return broken


_UNREADABLE = (*UNREADABLE, OverflowError)
"""Exceptions of decoding an engine's JSON, whose numbers may be out of range, too."""


class Translator(ABC):
    """Translates an engine's answer to the client's API, a stream event by event, however packets split it.

    Methods of subclasses may raise any of `_UNREADABLE` for an answer that cannot be decoded.
    """

    stream_type = b"content-type: text/event-stream\r\n"
    streams = True
    """False if the engine's stream becomes one document for the client, which `last_events` returns."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        """Parts of a line whose end has not arrived."""
        self._rest_size = 0

    @abstractmethod
    def document(self, body: bytes) -> bytes:
        """Translate a complete document. May raise BrokenAnswer."""

    def events(self, part: bytes) -> bytes:
        """Translate the events that the next bytes of a stream complete. Raises BrokenAnswer."""
        events = b""
        try:
            for line in self._lines(part):
                events += self._line(line)
        except (BrokenAnswer, *_UNREADABLE) as error:
            raise BrokenAnswer.of(error, events) from None
        return events

    def last_events(self) -> bytes:
        """Return what follows the engine's last event. May raise BrokenAnswer."""
        return b""

    def _lines(self, part: bytes) -> Iterator[bytes]:
        lines = part.split(b"\n")
        rest = lines.pop()
        if lines and self._rest:
            lines[0] = b"".join((*self._rest, lines[0]))
            self._rest, self._rest_size = [], 0
        yield from lines
        if rest:
            self._rest.append(rest)
            self._rest_size += len(rest)
            if self._rest_size > LONGEST_EVENT:
                raise BrokenAnswer.unreadable(f"an event of its stream is longer than {LONGEST_EVENT >> 20} MiB")

    def _line(self, line: bytes) -> bytes:
        """Translate one line of a stream."""
        if line.startswith(b"data:"):
            return self._event(line[5:].strip())
        return self._comment(line) if line.startswith(b":") else b""

    @abstractmethod
    def _event(self, data: bytes) -> bytes:
        """Translate one event, of which `data` is the content."""

    def _comment(self, line: bytes) -> bytes:
        """Return a heartbeat for the client, unless its answer is a document."""
        return line + b"\n\n" if self.streams else b""


class TranslatedAnswer(Answer):
    """An answer that is translated: a stream event by event, a document once it is complete."""

    __slots__ = ("_left", "_lines", "_parts", "_status", "_streams", "_takes_stream", "_translator")

    def __init__(self, plain: Answer, translator: Translator, *, streams: bool) -> None:
        """Replace `plain`, of which nothing is written yet. `streams`: the client asked for a stream."""
        super().__init__(plain._wire, keep_alive=plain.keep_alive, http_1_0=plain._http_1_0)
        self._translator = translator
        self._takes_stream = streams or not translator.streams
        self._streams = False
        self._status = 200
        self._lines = b""
        self._parts: list[bytes] = []
        """Parts of a document that is not complete."""
        self._left = 0
        """Bytes that the document may still have."""

    def told(self, body: bytes) -> bytes:
        try:
            return self._translator.document(body)
        except _UNREADABLE as error:
            raise BrokenAnswer.unreadable(error) from error

    def rest(self, part: bytes) -> bytes:
        if not self._streams:
            self._keep(part)
            return self.told(b"".join(self._parts))
        said = self._translated(part)
        try:
            return said + self._translator.last_events()
        except (BrokenAnswer, *_UNREADABLE) as error:
            if said and self.started:
                super().write(said)
            raise BrokenAnswer.of(error) from None

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        super().whole(status, with_type(lines, DOCUMENT), body)

    def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        self._streams = self._takes_stream and status == 200 and b"content-type: text/event-stream" in lines
        if self._streams and self._translator.streams:
            super().start(status, with_type(lines, self._translator.stream_type))
        else:
            self._status, self._lines = status, lines
            self._parts.clear()
            self._left = LONGEST_EVENT if length is None else _LONGEST_DOCUMENT

    def write(self, part: bytes) -> None:
        if not self._streams:
            self._keep(part)
        elif events := self._translated(part):
            super().write(events)

    def end(self, part: bytes = b"") -> None:
        if self.started:
            super().end(part)
        else:
            self.whole(self._status, self._lines, part)

    def _translated(self, part: bytes) -> bytes:
        try:
            return self._translator.events(part)
        except BrokenAnswer as broken:
            if broken.before and self.started:
                super().write(broken.before)
            raise

    def _keep(self, part: bytes) -> None:
        self._parts.append(part)
        self._left -= len(part)
        if self._left < 0:
            raise BrokenAnswer.unreadable("it is too long")


def with_type(lines: bytes, content_type: bytes) -> bytes:
    """Return header lines with this Content-Type line in place of any other."""
    kept = [line for line in lines.splitlines(keepends=True) if not line.startswith(b"content-type:")]
    return b"".join((content_type, *kept))
