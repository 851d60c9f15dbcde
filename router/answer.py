"""The answer to one request of the data plane, as it goes over the client's connection.

It knows HTTP's framing, and of what it frames no more than where a translator of it has its turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import Protocol

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
    """Either `whole`, or `start` and then `write` until `end`."""

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

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        """`lines` are headers, each with its end; those for the framing are added."""
        self.started = True
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
        """More of it; nothing is no part."""
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
        lines = (_STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status) + self._wire.default_lines
        return lines if self.keep_alive else lines + b"connection: close\r\n"


class NotUnderstood(Exception):
    """An engine has answered something else than it does."""

    def __init__(self, body: bytes) -> None:
        """`body` is a document that says so in the words of the client's API."""
        self.body = body


class Translator(ABC):
    """Knows what an engine's answer is in the words of the client's API. Of a stream it sees one event at a time,
    however the network tears it."""

    stream_type = b"content-type: text/event-stream\r\n"
    streams = True
    """An engine's stream is one for the client, too. Else `last_events` is the document that it comes to."""

    def __init__(self) -> None:
        self._rest = b""
        """A line that is not all here."""

    @abstractmethod
    def document(self, body: bytes) -> bytes:
        """Raises NotUnderstood."""

    def events(self, part: bytes) -> bytes:
        """Of the next bytes of a stream, as many events as are whole."""
        events = b""
        for line in self._lines(part):
            if line.startswith(b"data:"):
                events += self._event(line[5:].strip())
            elif line.startswith(b":"):
                events += self._comment(line)
        return events

    def last_events(self) -> bytes:
        """What is still to be said when the engine has said its last."""
        return b""

    def _lines(self, part: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + part).split(b"\n")
        return lines

    @abstractmethod
    def _event(self, data: bytes) -> bytes:
        """What an event comes to, of which this is the data."""

    def _comment(self, line: bytes) -> bytes:
        """A sign of life, the engine's or the router's."""
        return line + b"\n\n"


class TranslatedAnswer(Answer):
    """Takes an engine's answer, and gives the client another one: of a document, once all of it is here."""

    __slots__ = ("_lines", "_parts", "_status", "_streams", "_translator")

    def __init__(self, plain: Answer, translator: Translator) -> None:
        """Instead of `plain`, of which nothing is written yet."""
        super().__init__(plain._wire, keep_alive=plain.keep_alive, http_1_0=plain._http_1_0)
        self._translator = translator
        self._streams = False
        self._status = 200
        self._lines = b""
        self._parts: list[bytes] = []

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        if status == 200:
            try:
                body = self._translator.document(body)
            except NotUnderstood as error:
                status, body = 502, error.body
        self._whole(status, lines, body)

    def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        self._streams = b"text/event-stream" in lines
        if self._streams and self._translator.streams:
            super().start(status, with_type(lines, self._translator.stream_type), length)
        else:
            self._status, self._lines = status, lines

    def write(self, part: bytes) -> None:
        if not self._streams:
            self._parts.append(part)
        elif events := self._translator.events(part):
            super().write(events)

    def end(self, part: bytes = b"") -> None:
        if not self._streams:
            self.whole(self._status, self._lines, b"".join((*self._parts, part)))
            return
        rest = self._translator.events(part) + self._translator.last_events()
        if self._translator.streams:
            super().end(rest)
        else:
            self._whole(self._status, self._lines, rest)

    def break_off(self, reason: bytes) -> None:
        super().end(reason)

    def _whole(self, status: int, lines: bytes, body: bytes) -> None:
        super().whole(status, with_type(lines, DOCUMENT), body)


def with_type(lines: bytes, content_type: bytes) -> bytes:
    """Headers, each with its end, with that one instead of any other of its name."""
    kept = [line for line in lines.splitlines(keepends=True) if not line.startswith(b"content-type:")]
    return b"".join((content_type, *kept))
