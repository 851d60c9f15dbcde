"""Bodies of the last requests and of their answers, kept in memory while `system.capture` says so.

They are for operators who look for a mistake; nothing of them is logged or written to disk. A `RecordedWire`
stands between an answer and its connection: a router that captures nothing only looks once per request whether it
should.
Pictures and recordings in base64 are shortened before they are kept, and secrets are left out of what is shown.
"""

from __future__ import annotations

import re
import string
from collections import OrderedDict
from contextlib import suppress
from typing import NamedTuple

import httptools

from router.config.schema import Capture
from router.dataplane.answer import Answer, Wire

_MOST_BYTES = 256 << 10
"""Bytes kept of one body."""
_SEARCHED_BYTES = 1 << 20
"""Size up to which all of a body is searched for base64; of a larger one, only its ends are kept."""
_SHORTEST_BASE64 = 400
_STRIDE = _SHORTEST_BASE64 // 2
_BASE64 = string.ascii_letters.encode() + string.digits.encode() + b"+/_-\\"
"""Its letters; a slash may be escaped in JSON."""
_IN_BASE64 = re.compile(b"[%b]{%d,}={0,2}" % (re.escape(_BASE64), _STRIDE))

# The time that the following take grows with the text alone, whatever is in it.
_HIDDEN = "[redacted]"
_BEGINNINGS = ("access", "api", "auth", "bearer", "credential", "id", "pass", "refresh", "secret", "session")
"""Beginnings of `_NAME`, which are found much faster than that."""
_NAME = (
    r"(?i)(?:api[-_ ]?key|secret|passw(?:or)?d|passphrase|credentials?|authorization"
    r"|(?:access|auth|refresh|id|bearer|session)[-_ ]?token)"
)
_FIELD = re.compile(
    rf'{_NAME}[\w.\- ]{{0,40}}(\\{{0,8}})"\s{{0,99}}:\s{{0,99}}\1"(?!\1")(?P<value>.{{1,8192}}?)(?=(?<!\\)\1")',
    re.DOTALL,
)
"""A JSON field with a name of secrets; quotes are escaped in JSON within a text."""
_ASSIGNMENT = re.compile(
    rf"{_NAME}\\{{0,8}}[\"']?\s{{0,99}}[:=]\s{{0,99}}\\{{0,8}}[\"']?(?:(?:bearer|basic|token)\s{{1,99}})?"
    r"(?!\[redacted)(?P<value>[^\s\"'\\,;&]{4,})"
)
_BEARER = re.compile(r"(?i)(bearer)(\s+)[\w.~+/=-]{8,}")
_WITH_PASSWORD = re.compile(r"(://[^/\s:@\"']{1,128}:)[^/\s@\"']{1,256}(?=@)")
_KEYS = re.compile(
    r"(?<![\w-])(?:[spr]k-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|gsk_\w{16,}|xai-[\w-]{16,}|nvapi-[\w-]{16,}|[spr]k_(?:live|test)_\w{16,}|npm_\w{16,}|pypi-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}\b|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]+)"
)
"""What is known by its form: keys of OpenAI, Hugging Face, GitHub, GitLab, Groq, xAI, Nvidia, Stripe, npm, PyPI,
Slack, AWS and Google; tokens (JWT)."""


class Captured(NamedTuple):
    """Texts of a request and of its answer, as far as they were kept, without secrets."""

    request: str
    answer: str


class Recording:
    """The bodies of a request and of its answer, as far as they are kept."""

    def __init__(self) -> None:
        self._question = b""
        self._parts: list[bytes] = []
        """The answer, in HTTP."""
        self._room = _MOST_BYTES

    @property
    def size(self) -> int:
        return len(self._question) + _MOST_BYTES - max(0, self._room)

    def note_question(self, body: bytes | memoryview) -> None:
        self._question = _shortened(body)

    def note_answer(self, data: bytes) -> None:
        if self._room > 0:
            self._parts.append(data[: self._room])
            self._room -= len(data)

    def captured(self) -> Captured:
        """Return both bodies as they may be shown. Takes some milliseconds."""
        answer = _Answer(self._parts)
        return Captured(_shown(self._question), _shown(_without_base64(answer.body), is_cut=self._room <= 0))


class RecordedWire:
    """A connection whose answer is recorded on its way (a `Wire`). The recording outlives it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.recording: Recording | None = Recording()
        """None: capturing was switched off meanwhile."""

    def write(self, data: bytes) -> None:
        if self.recording is not None:
            self.recording.note_answer(data)
        self._wire.write(data)

    def answered(self, *, keep_alive: bool) -> None:
        self._wire.answered(keep_alive=keep_alive)

    @property
    def peer(self) -> str:
        return self._wire.peer

    def abort(self) -> None:
        self._wire.abort()

    def invite_body(self) -> None:
        self._wire.invite_body()

    @property
    def default_lines(self) -> bytes:
        return self._wire.default_lines


def recording_of(answer: Answer) -> Recording | None:
    """Return the recording of an answer; None if nothing was captured when it began, or at any time since."""
    return answer.wire.recording if isinstance(answer.wire, RecordedWire) else None


def forget(answer: Answer) -> None:
    """Forget what is recorded of an answer that has not ended, and record no more of it."""
    if isinstance(answer.wire, RecordedWire):
        answer.wire.recording = None


class Captures:
    """The last recordings, by request id; of several with one id, the last."""

    def __init__(self, limits: Capture) -> None:
        self.enabled = False
        self._limits = limits
        self._kept: OrderedDict[str, tuple[int, Recording]] = OrderedDict()
        self._size = 0
        self.set(limits)

    def set(self, limits: Capture) -> None:
        """Apply new limits; whatever is beyond them is forgotten at once."""
        self._limits = limits
        self.enabled = limits.requests > 0
        self._trim()

    def keep(self, request_id: str, answer: Answer) -> None:
        """Keep the recording of a request that has ended, if there is one."""
        self._drop(request_id)
        recording = recording_of(answer)
        if recording is None:
            return
        size = recording.size
        self._kept[request_id] = size, recording
        self._size += size
        self._trim()

    def of(self, request_id: str) -> Recording | None:
        kept = self._kept.get(request_id)
        return None if kept is None else kept[1]

    def _trim(self) -> None:
        while self._kept and (len(self._kept) > self._limits.requests or self._size > self._limits.max_mb << 20):
            self._drop(next(iter(self._kept)))

    def _drop(self, request_id: str) -> None:
        size, _ = self._kept.pop(request_id, (0, None))
        self._size -= size


class _Answer:
    """Reads the body of an answer out of its HTTP, as far as it was kept."""

    def __init__(self, parts: list[bytes]) -> None:
        self._found: list[bytes] = []
        self.on_body = self._found.append
        parser = httptools.HttpResponseParser(self)
        with suppress(httptools.HttpParserError):
            for part in parts:
                parser.feed_data(part)
        self.body = b"".join(self._found)
        del self.on_body  # a reference cycle


def _shortened(body: bytes | memoryview) -> bytes:
    """Return what is kept of a body."""
    half = _MOST_BYTES // 2
    if len(body) > _SEARCHED_BYTES:
        return _joined(_without_base64(bytes(body[:half])), _without_base64(bytes(body[-half:])), len(body))
    short = _without_base64(bytes(body))
    return short if len(short) <= _MOST_BYTES else _joined(short[:half], short[-half:], len(short))


def _joined(begin: bytes, end: bytes, size: int) -> bytes:
    return b"%b\n[... %d bytes are left out ...]\n%b" % (begin, size - len(begin) - len(end), end)


def _without_base64(body: bytes) -> bytes:
    """Return a body with long runs of base64 shortened. Only every so many bytes are looked at."""
    parts: list[bytes] = []
    end = 0
    for place in range(0, len(body), _STRIDE):
        if place < end or (found := _IN_BASE64.match(body, place)) is None:
            continue
        before = body[max(end, place - _STRIDE) : place]
        begin = place - len(before) + len(before.rstrip(_BASE64))
        if found.end() - begin >= _SHORTEST_BASE64:
            parts += (body[end : begin + 24], b"[... %d bytes of base64]" % (found.end() - begin))
            end = found.end()
    return b"".join((*parts, body[end:])) if parts else body


def _shown(body: bytes, *, is_cut: bool = False) -> str:
    """Return a body as text without secrets."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        if not (is_cut or b"[... " in body) and error.end < len(body) - 4:
            return f"[{len(body)} bytes that are not text]"
        text = body.decode(errors="replace")
    return redacted(text) + ("\n[... the rest is left out ...]" if is_cut else "")


def redacted(text: str) -> str:
    """Return a text without what looks like a key, a password or a token."""
    text = _without_named_secrets(text)
    text = _BEARER.sub(rf"\1\2{_HIDDEN}", text)
    text = _KEYS.sub(_HIDDEN, text)
    return _WITH_PASSWORD.sub(rf"\1{_HIDDEN}", text)


def _without_named_secrets(text: str) -> str:
    parts: list[str] = []
    end = 0
    for place in _places(text):
        if place < end:
            continue
        found = _FIELD.match(text, place) or _ASSIGNMENT.match(text, place)
        if found is not None:
            parts += (text[end : found.start("value")], _HIDDEN)
            end = found.end("value")
    return "".join((*parts, text[end:])) if parts else text


def _places(text: str) -> list[int]:
    """Return where a name of secrets may begin."""
    small = text.lower()
    if len(small) != len(text):  # a few letters are more than one when they are small
        small = "".join(letter.lower() if letter.isascii() else letter for letter in text)
    places: list[int] = []
    for name in _BEGINNINGS:
        place = small.find(name)
        while place >= 0:
            places.append(place)
            place = small.find(name, place + 1)
    return sorted(places)
