"""The answer to one request of the data plane, as it goes over the client's connection.

It knows HTTP's framing, and of what it frames no more than where a translator of it has its turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from http import HTTPStatus
from typing import Protocol

from router.http.documents import UNREADABLE
from router.http.errors import ApiError

_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}

DOCUMENT = b"content-type: application/json; charset=utf-8\r\n"

_BODILESS = frozenset({204, 304})
"""Their heads are all of them (RFC 9112, 6.3), and nothing may frame what is not there."""


class Wire(Protocol):
    """The connection that an answer is for."""

    def write(self, data: bytes) -> None: ...

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is whole: the next request's turn."""

    @property
    def peer(self) -> str:
        """The client's address."""

    def abort(self) -> None:
        """Cut it, so that nobody takes what was sent for a whole answer."""

    def invite_body(self) -> None:
        """Have the client send its body, which waits for it (Expect: 100-continue)."""

    @property
    def default_lines(self) -> bytes:
        """Headers of every answer, each with its end."""


class Answer:
    """Either `whole`, or `start` and then `write` until `end`.

    What an engine says last goes through `told` or `rest` first, which may find that it makes no sense.
    """

    __slots__ = ("_chunked", "_head", "_http_1_0", "_wire", "has_length", "keep_alive", "started")

    def __init__(self, wire: Wire, *, keep_alive: bool, http_1_0: bool) -> None:
        self._wire = wire
        self._http_1_0 = http_1_0
        self._chunked = False
        self._head = b""
        self.keep_alive = keep_alive
        self.started = False
        """The client has got a head, or will with what is written next."""
        self.has_length = False
        """It was announced, so that nothing can be added."""

    @property
    def peer(self) -> str:
        """The address of the client."""
        return self._wire.peer

    def invite_body(self) -> None:
        self._wire.invite_body()

    def told(self, body: bytes) -> bytes:
        """A whole answer of the engine's that is no error, as the client gets it. Raises BrokenAnswer."""
        return body

    def rest(self, part: bytes) -> bytes:
        """The last part of an engine's answer that was begun, if anything, likewise. Raises BrokenAnswer."""
        return part

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        """`lines` are headers, each with its end; those for the framing are added."""
        self.started = self.has_length = True
        first = self._first_lines(status)
        if status in _BODILESS:
            self._wire.write(b"%b%b\r\n" % (first, lines))
        else:
            self._wire.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (first, lines, len(body), body))
        self._wire.answered(keep_alive=self.keep_alive)

    def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        """The head, which goes out together with the first part. None: the end is not known yet."""
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
        """More of it; nothing is no part. Raises BrokenAnswer."""
        if self._chunked:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        if self._head:
            part = self._head + part
            self._head = b""
        self._wire.write(part)

    def end(self, part: bytes = b"") -> None:
        """The last of it, if anything, and its end."""
        if self._chunked:
            part = (b"%x\r\n%b\r\n" % (len(part), part) if part else b"") + b"0\r\n\r\n"
        if self._head or part:
            self._wire.write(self._head + part)
        self._wire.answered(keep_alive=self.keep_alive)

    def break_off(self, reason: bytes) -> None:
        """End what was begun with this."""
        self.end(reason)

    def abort(self) -> None:
        self._wire.abort()

    def _first_lines(self, status: int) -> bytes:
        lines = _STATUS[status] + self._wire.default_lines
        return lines if self.keep_alive else lines + b"connection: close\r\n"


LONGEST_EVENT = 16 << 20
"""Bytes of one event of a stream, where it is read. That of a response that is complete has all of its text."""
_LONGEST_DOCUMENT = 256 << 20
"""Bytes of a document that is translated, if its engine says how long it is: the vectors of two thousand texts
take half of it. One that does not say is as long as an event at most."""


class BrokenAnswer(Exception):
    """An engine has answered something else than it does, or that it failed."""

    def __init__(self, error: ApiError) -> None:
        """`error` says so to the client."""
        super().__init__(error.message)
        self.error = error
        self.before = b""
        """What the client is told first: events that came with it."""

    @classmethod
    def unreadable(cls, why: object) -> BrokenAnswer:
        return cls(ApiError(502, "engine_error", f"The engine's response cannot be read: {why}."))

    @classmethod
    def of(cls, error: Exception, before: bytes = b"") -> BrokenAnswer:
        """That, or what cannot be read. No frame that raises it may name it: each would hold the other."""
        broken = error if isinstance(error, cls) else cls.unreadable(error)
        broken.before = before
        return broken


_UNREADABLE = (*UNREADABLE, OverflowError)
"""Raised for an engine's JSON, of which numbers may be beyond all bounds, too."""


class Translator(ABC):
    """Knows what an engine's answer is in the words of the client's API. Of a stream it sees one event at a time,
    however the network tears it.

    What cannot be read may raise whatever its reading raises.
    """

    stream_type = b"content-type: text/event-stream\r\n"
    streams = True
    """An engine's stream is one for the client, too. Else `last_events` is the document that it comes to."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        """Of a line that is not all here."""
        self._rest_size = 0

    @abstractmethod
    def document(self, body: bytes) -> bytes:
        """May raise BrokenAnswer."""

    def events(self, part: bytes) -> bytes:
        """Of the next bytes of a stream, as many events as are whole. Raises BrokenAnswer."""
        events = b""
        try:
            for line in self._lines(part):
                events += self._line(line)
        except (BrokenAnswer, *_UNREADABLE) as error:
            raise BrokenAnswer.of(error, events) from None
        return events

    def last_events(self) -> bytes:
        """What is still to be said when the engine has said its last. May raise BrokenAnswer."""
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
        """What a line of the stream comes to."""
        if line.startswith(b"data:"):
            return self._event(line[5:].strip())
        return self._comment(line) if line.startswith(b":") else b""

    @abstractmethod
    def _event(self, data: bytes) -> bytes:
        """What an event comes to, of which this is the data."""

    def _comment(self, line: bytes) -> bytes:
        """A sign of life, the engine's or the router's. A document has none."""
        return line + b"\n\n" if self.streams else b""


class TranslatedAnswer(Answer):
    """Takes an engine's answer, and gives the client another one: of a document, once all of it is here."""

    __slots__ = ("_left", "_lines", "_parts", "_status", "_streams", "_takes_stream", "_translator")

    def __init__(self, plain: Answer, translator: Translator, *, streams: bool) -> None:
        """Instead of `plain`, of which nothing is written yet. `streams`: the client has asked for a stream."""
        super().__init__(plain._wire, keep_alive=plain.keep_alive, http_1_0=plain._http_1_0)
        self._translator = translator
        self._takes_stream = streams or not translator.streams
        self._streams = False
        self._status = 200
        self._lines = b""
        self._parts: list[bytes] = []
        """Of a document, until all of it is here."""
        self._left = 0
        """Bytes that it may still have."""

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
    """Headers, each with its end, with that one instead of any other of its name."""
    kept = [line for line in lines.splitlines(keepends=True) if not line.startswith(b"content-type:")]
    return b"".join((content_type, *kept))
