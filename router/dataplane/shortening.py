"""Large JSON documents made short enough to be read at once: what is long is taken out, and put back later.

Whoever decodes 100 MiB holds Python's lock for a fifth of a second or longer, on whatever thread, and every token
of every stream waits for it. Here each step takes a fraction of a millisecond, so that other threads get their
turns, and what was taken out is never copied. No key has a meaning here: the short document has all keys of the
long one, down to a depth, with placeholders for long strings, of which the beginning stays, and for long objects
and what is in long arrays below that depth.

What is taken out is not looked at: whoever reads it in the end will say if it is not valid. What stays is bounded:
a document of a million small values is not made into objects, which would take many times its size.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import msgspec

from router.system.large_memory import Pieces

Text = bytes | memoryview
"""What lies together."""

ALL_DEPTHS = 1 << 30
_STEP = 128 << 10
_LONG = 512
_BEGINNING = 260
"""Bytes of a long string that stay, by which an image is told from another. Where fewer do, what stands for the
rest is longer: a name that is too long is so in the short form, too."""
_DEEPEST = 200
_LONGEST_TEXT = 8 << 20
"""Of the short form. To go through it once, in one go, takes some milliseconds."""
MOST_VALUES = 1 << 16
"""Of the short form, to make objects of: twenty thousand messages have as many. No context is as long."""

_PLACE = re.compile(rb"([sv])(\d+)-*>(\\?)")
"""Of a placeholder, what is behind its beginning."""
_PLAIN = re.compile(rb"[ !#-\[\]-~]{0,%d}" % _BEGINNING)
"""Characters of a string that stand for themselves."""
_BRACKET = re.compile(rb"[\[\]{}]")
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALL_BUT_MARKS = bytes(set(range(256)) - set(b",[{"))
"""Nearly every value of a document has one of these before it."""


@dataclass(slots=True)
class Count:
    """How many values a document has, or a few more or less."""

    values: int = 0
    """Of all kinds."""
    composed: int = 0
    """Those that take most memory: texts, keys among them, lists and objects."""


class TooManyValues(Exception):
    """A document has too many values to be made into objects."""


class Shortened:
    """A document, of which `text` is the short form."""

    def __init__(self, document: Text, depth: int) -> None:
        """Depth 1 is that of the values of the outermost object.

        Raises msgspec.DecodeError if it is cut off or its brackets do not match, RecursionError if they are too
        many, TooManyValues.
        """
        self._document = memoryview(document)
        self._name = secrets.token_hex(8).encode()
        """Of the placeholders: none that a client could write."""
        self._taken: list[memoryview] = []
        self.count = Count()
        """Of the whole document."""
        kept: list[bytes] = []
        at = size = 0
        for run in _long_runs(self._document, depth, self.count):
            begin = run.begin
            if run.is_string:
                plain = _PLAIN.match(self._document, begin, run.end)
                begin = begin if plain is None else plain.end()
            place = self._name, len(self._taken)
            if run.is_string:
                placeholder = b"<%b-s%d%b>" % (*place, b"-" * (run.begin + _BEGINNING - begin))
            else:
                placeholder = b'"<%b-v%d>"' % place
            size += begin - at + len(placeholder)
            if size > _LONGEST_TEXT:
                raise TooManyValues
            kept += (*self._copied(at, begin), placeholder)
            self._taken.append(self._document[begin : run.end])
            at = run.end
        if size + len(document) - at > _LONGEST_TEXT:
            raise TooManyValues
        kept += self._copied(at, len(document))
        self.text = b"".join(kept)
        if _values(memoryview(self.text)) > MOST_VALUES:
            raise TooManyValues

    def _copied(self, begin: int, end: int) -> Iterator[bytes]:
        return (bytes(self._document[at : min(end, at + _STEP)]) for at in range(begin, end, _STEP))

    def restored(self, text: Text) -> Pieces:
        """The long form of what was made of `text`."""
        if text is self.text:
            return Pieces(self._document)
        text = bytes(text)
        mark = b"<%b-" % self._name
        view, pieces, at = memoryview(text), Pieces(), 0
        while (begin := text.find(mark, at)) >= 0:
            found = _PLACE.match(text, begin + len(mark))
            assert found is not None
            taken, end = self._taken[int(found[2])], found.start(3)
            is_escaped = bool(found[3])  # within a string, of which the text is JSON itself
            if found[1] == b"v":  # the quotes are not its own
                begin, end = begin - 1 - is_escaped, found.end(3) + 1
            pieces.add(view[at:begin])
            at = end
            if not is_escaped:
                pieces.add(taken)
                continue
            for place in range(0, len(taken), _STEP):
                step = bytes(taken[place : place + _STEP])
                pieces.add(memoryview(step.replace(b"\\", rb"\\").replace(b'"', rb"\"")))
        pieces.add(view[at:])
        pieces.end()
        return pieces

    def mentions(self, words: bytes) -> bool:
        """Whether the document has these somewhere, as they are written here."""
        return any(words in step for step in self.in_steps(len(words)))

    def in_steps(self, overlap: int) -> Iterator[bytes]:
        """The document, each step with so much of the next one."""
        steps = range(0, len(self._document), _STEP)
        return (bytes(self._document[at : at + _STEP + overlap]) for at in steps)

    def first_of_list(self, text: bytes) -> bytes:
        """The first character of the first element of a list, of which `text` may be the short form."""
        found = re.match(rb'\[\s*(?:"<%b-v(\d+)>"|(.?))' % self._name, text)
        if found is None or found[1] is None:
            return found[2] if found is not None else b""
        return bytes(self._taken[int(found[1])][:_LONG]).lstrip()[:1]


def most_values(document: bytes) -> int:
    """No fewer than the values of a small document, or a few: what is in its strings counts, too."""
    return len(document.translate(None, _ALL_BUT_MARKS))


def _values(document: memoryview) -> int:
    """The same without what is in its strings."""
    count, begin, in_string = 0, 0, False
    while begin < len(document):
        texts, begin = _between_quotes(document, begin)
        count += len(b"".join(texts[in_string::2]).translate(None, _ALL_BUT_MARKS))
        in_string ^= len(texts) % 2 == 0
    return count


class _Run(NamedTuple):
    """What is to be taken out: of a long string its content; a long object; what is in a long array."""

    is_string: bool
    begin: int
    end: int


def _long_runs(document: memoryview, depth: int, count: Count) -> Iterator[_Run]:
    """In their order. Counts what there is besides."""
    level, in_string = 0, False
    string, value = 0, 0
    """Where the string and the value that we are in began, if they may have to be taken out."""
    begin = 0
    while begin < len(document):
        texts, end = _between_quotes(document, begin)
        outside = b"".join(texts[in_string::2])
        brackets = outside.translate(None, _ALL_BUT_BRACKETS)
        levels = _levels(brackets, level)
        count.values += outside.count(b",") + len(brackets) // 2
        count.composed += (len(brackets) + len(texts) - 1) // 2
        if levels.highest <= depth:
            yield from _long_strings(texts, begin, string if in_string else None)
        elif levels.lowest <= depth:
            value = yield from _mixed(texts, begin, string if in_string else None, level, depth, value)
        level = levels.last
        if len(texts) > 1:
            in_string ^= len(texts) % 2 == 0
            string = end - len(texts[-1])
        begin = end
    if in_string or level > 0:
        raise msgspec.DecodeError("Input data was truncated")


def _long_strings(texts: list[bytes], begin: int, string: int | None) -> Iterator[_Run]:
    """Of those that end here. `texts` are what is between quotes, from `begin` on; `string` is where one began in
    which the first of them is."""
    if string is not None and len(texts) > 1 and begin + len(texts[0]) - string >= _LONG:
        yield _Run(True, string, begin + len(texts[0]))
    whole = range(1 if string is None else 2, len(texts) - 1, 2)
    if any(len(texts[index]) >= _LONG for index in whole):
        ends = list(accumulate(map(len, texts), initial=begin - 1))
        for index in whole:
            if len(texts[index]) >= _LONG:
                end = ends[index + 1] + index + 1
                yield _Run(True, end - len(texts[index]), end)


def _mixed(
    texts: list[bytes], begin: int, string: int | None, level: int, depth: int, value: int
) -> Generator[_Run, None, int]:
    """The same where something begins or ends that is nested too deeply. Returns where the last of that began."""
    at = begin
    for index, text in enumerate(texts):
        end = at + len(text)
        if string is None:
            for found in _BRACKET.finditer(text):
                place = at + found.start()
                if found[0] in b"[{":
                    level += 1
                    if level == depth + 1:
                        value = place + (found[0] == b"[")
                else:
                    stop = place + (found[0] == b"}")
                    if level == depth + 1 and stop - value >= _LONG:
                        yield _Run(False, value, stop)
                    level -= 1
            string = end + 1
        elif index < len(texts) - 1:
            if level <= depth and end - string >= _LONG:
                yield _Run(True, string, end)
            string = None
        at = end + 1
    return value


def _between_quotes(document: memoryview, begin: int) -> tuple[list[bytes], int]:
    """What comes next of it, cut at the quotes that begin and end strings; and where that ends."""
    end = min(begin + _STEP, len(document))
    step = bytes(document[begin:end])
    if (len(step) - len(step.rstrip(b"\\"))) % 2:  # what is escaped stays with what escapes it
        end = min(end + 1, len(document))
        step = bytes(document[begin:end])
    if b"\\" in step:
        step = step.replace(rb"\\", b"__").replace(rb"\"", b"__")
    return step.split(b'"'), end


class _Levels(NamedTuple):
    """How deeply nested what comes next is."""

    lowest: int
    highest: int
    """Or a few less."""
    last: int


def _levels(brackets: bytes, level: int) -> _Levels:
    """Of these. Raises msgspec.DecodeError and RecursionError."""
    for pairs in range(_DEEPEST):
        length = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) == length:
            opening = brackets.lstrip(b"]}")
            if b"]" in opening or b"}" in opening:
                raise msgspec.DecodeError("JSON is malformed: brackets do not match")
            lowest = level - length + len(opening)
            last = lowest + len(opening)
            if last + pairs > _DEEPEST:
                break
            return _Levels(lowest, max(level, last) + pairs, last)
    raise RecursionError
