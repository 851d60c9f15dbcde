"""Short forms of large JSON documents, fit to be decoded at once: long values are taken out, and put back later.

Decoding 100 MiB holds Python's global lock for a fifth of a second or longer, on whatever thread, and every token
of every stream waits for it. Here each step takes a fraction of a millisecond, so that other threads can run, and
values that are taken out are never copied. Keys have no meaning here: the short form has all keys of the document
down to a depth, with placeholders for long strings, of which the beginning stays, and for long objects and the
content of long arrays below that depth.

Values that are taken out are not validated: the engine that parses them does that. The short form is bounded: a
document of a million small values is not made into objects, which would take many times its size.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import msgspec

from router.system.large_memory import Pieces

Text = bytes | memoryview
"""A document in one contiguous buffer."""

ALL_DEPTHS = 1 << 30
_STEP = 32 << 10
"""Bytes of a step: each callback of the event loop may wait for Python's lock as long as a call on them takes."""
_LONG = 512
_BEGINNING = 260
"""Bytes of a long string that stay, enough to tell images apart. If fewer do, the placeholder is longer: a name
that is too long is too long in the short form, too."""
_DEEPEST = 200
_LONGEST_TEXT = 8 << 20
"""Maximum size of the short form. Going through it in one step takes a few milliseconds."""
MOST_VALUES = 1 << 16
"""Maximum number of values of the short form. Twenty thousand messages, which fit no context, have as many."""

_PLACE = re.compile(rb"([sv])(\d+)-*>(\\?)")
"""A placeholder after its mark."""
_PLAIN = re.compile(rb"[ !#-\[\]-~]{0,%d}" % _BEGINNING)
"""Characters of a string that stand for themselves."""
_BRACKET = re.compile(rb"[\[\]{}]")
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALL_BUT_MARKS = bytes(set(range(256)) - set(b",[{"))
"""All bytes but those of which nearly every value of a document has one before it."""


@dataclass(slots=True)
class Count:
    """The approximate number of values of a document."""

    values: int = 0
    """Values of all kinds."""
    composed: int = 0
    """Values that take most memory: texts (including keys), lists and objects."""


class TooManyValues(Exception):
    """Raised for a document with too many values to be made into objects."""


class Shortened:
    """A document and its short form, `text`."""

    def __init__(self, document: Text, depth: int, check: Callable[[Count], object]) -> None:
        """Depth 1 is that of the values of the outermost object. `check` may raise for what was counted so far.

        Raises msgspec.DecodeError for a document that is cut off or has brackets that do not match, RecursionError
        for one that is nested too deeply, and TooManyValues.
        """
        self._document = memoryview(document)
        self._name = secrets.token_hex(8).encode()
        """The name in all placeholders, which no client can guess."""
        self._taken: list[memoryview] = []
        self.count = Count()
        """The values of the whole document."""
        kept: list[bytes] = []
        at = size = 0
        for run in _long_runs(self._document, depth, self.count, check):
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
        """Put the values that were taken out back into `text`, the short form after changes."""
        if text is self.text:
            return Pieces(self._document)
        text = bytes(text)
        mark = b"<%b-" % self._name
        view, pieces, at = memoryview(text), Pieces(), 0
        while (begin := text.find(mark, at)) >= 0:
            found = _PLACE.match(text, begin + len(mark))
            assert found is not None
            taken, end = self._taken[int(found[2])], found.start(3)
            is_escaped = bool(found[3])  # within a string whose text is JSON itself
            if found[1] == b"v":  # the quotes are part of the placeholder
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
        """Whether the document contains these bytes anywhere."""
        return any(words in step for step in self.in_steps(len(words)))

    def in_steps(self, overlap: int) -> Iterator[bytes]:
        """Return the document in steps, each with `overlap` bytes of the next one."""
        steps = range(0, len(self._document), _STEP)
        return (bytes(self._document[at : at + _STEP + overlap]) for at in steps)

    def first_of_list(self, text: bytes) -> bytes:
        """Return the first character of the first element of a list, which may be taken out of `text`."""
        found = re.match(rb'\[\s*(?:"<%b-v(\d+)>"|(.?))' % self._name, text)
        if found is None or found[1] is None:
            return found[2] if found is not None else b""
        return bytes(self._taken[int(found[1])][:_LONG]).lstrip()[:1]


def most_values(document: bytes) -> int:
    """Return an upper bound of a small document's values, give or take a few: strings are searched, too."""
    return len(document.translate(None, _ALL_BUT_MARKS))


def _values(document: memoryview) -> int:
    """Return the approximate number of values, without what looks like values in strings."""
    count, begin, in_string = 0, 0, False
    while begin < len(document):
        texts, begin = _between_quotes(document, begin)
        count += len(b"".join(texts[in_string::2]).translate(None, _ALL_BUT_MARKS))
        in_string ^= len(texts) % 2 == 0
    return count


class _Run(NamedTuple):
    """A range to take out: the content of a long string or array, or a long object."""

    is_string: bool
    begin: int
    end: int


def _long_runs(document: memoryview, depth: int, count: Count, check: Callable[[Count], object]) -> Iterator[_Run]:
    """Yield the ranges to take out, in order, and count all values on the way, with a `check` after each step."""
    level, in_string = 0, False
    string, value = 0, 0
    """Offsets of the current string and of the current nested value, which may have to be taken out."""
    begin = 0
    while begin < len(document):
        texts, end = _between_quotes(document, begin)
        outside = b"".join(texts[in_string::2])
        brackets = outside.translate(None, _ALL_BUT_BRACKETS)
        count.values += outside.count(b",") + len(brackets) // 2
        count.composed += (len(brackets) + len(texts) - 1) // 2
        check(count)
        levels = _levels(brackets, level)
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
    """Yield the long strings that end in this step.

    `texts` are the parts between quotes, from `begin` on; `string` is the offset of the string to which the first
    of them belongs, if any.
    """
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
    """Yield long strings, and long values below `depth`. Returns the offset of the last such value."""
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
    """Return the next step of the document, split at the quotes that delimit strings, and the step's end."""
    end = min(begin + _STEP, len(document))
    step = bytes(document[begin:end])
    if (len(step) - len(step.rstrip(b"\\"))) % 2:  # an escaped character stays with its backslash
        end = min(end + 1, len(document))
        step = bytes(document[begin:end])
    if b"\\" in step:
        step = step.replace(rb"\\", b"__").replace(rb"\"", b"__")
    return step.split(b'"'), end


class _Levels(NamedTuple):
    """Levels of nesting within a step."""

    lowest: int
    highest: int
    """The highest level, or a few below it."""
    last: int


def _levels(brackets: bytes, level: int) -> _Levels:
    """Return the levels within these brackets. Raises msgspec.DecodeError and RecursionError."""
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
