"""Streams of engines that report usage on request only: it is removed for clients that did not request it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from router.dataplane.answer import Answer
from router.dataplane.shortening import Text
from router.formats.unreadable import UNREADABLE

_LONGEST_EVENT = 16 << 10
"""Maximum size in bytes of an event with usage only."""


class _Options(msgspec.Struct):
    include_usage: Any = None


class _Wanted(msgspec.Struct):
    stream_options: Any = None


class _Event(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"null")
    choices: list[msgspec.Raw] | None = None


_CHOICES = b"}]}\n\n"
"""The end of an event whose last field is its choices."""
_EVENT = re.compile(rb".*?\n\r?\n", re.DOTALL)
"""An event with its end."""

_decode_wanted = msgspec.json.Decoder(_Wanted).decode
_decode_event = msgspec.json.Decoder(_Event).decode


def asks_for_usage(body: Text) -> bool:
    """Whether a request for a stream asks for usage."""
    options = _decode_wanted(body).stream_options
    return isinstance(options, dict) and options.get("include_usage") is True


class AnswerWithoutUsage(Answer):
    """Passes on an engine's stream without the event that has usage and no choice.

    Usage comes after all choices: a part that ends with an event of choices, as nearly all do, passes at once.
    """

    __slots__ = ("_streams", "_torn")

    def __init__(self, plain: Answer) -> None:
        """Replace `plain`, of which nothing is written yet."""
        super().__init__(plain._wire, keep_alive=plain.keep_alive, http_1_0=plain._http_1_0)
        self._streams = False
        self._torn = b""
        """The beginning of an incomplete event."""

    def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        self._streams = b"content-type: text/event-stream" in lines
        super().start(status, lines, None if self._streams else length)

    def write(self, part: bytes) -> None:
        if (part.endswith(_CHOICES) and not self._torn) or (part := self._shown(part)):
            super().write(part)

    def rest(self, part: bytes) -> bytes:
        shown = self._shown(part) + self._torn
        self._torn = b""
        return shown

    def _shown(self, part: bytes) -> bytes:
        if not self._streams:
            return part
        part = self._torn + part
        events, self._torn = _whole_events(part)
        if b'"usage"' in events:
            events = b"".join(event for event in _EVENT.findall(events) if not _is_usage(event))
        if len(self._torn) > _LONGEST_EVENT:
            events += self._torn
            self._torn = b""
        return events


def _whole_events(part: bytes) -> tuple[bytes, bytes]:
    """Split a part of a stream after the last complete event."""
    found = [at + len(end) for end in (b"\n\n", b"\n\r\n") if (at := part.rfind(end)) >= 0]
    at = max(found, default=0)
    return part[:at], part[at:]


def _is_usage(event: bytes) -> bool:
    if b'"usage"' not in event or len(event) > _LONGEST_EVENT or not event.startswith(b"data:"):
        return False
    try:
        told = _decode_event(event[5:])
    except UNREADABLE:
        return False
    return told.choices == [] and bytes(told.usage) != b"null"
