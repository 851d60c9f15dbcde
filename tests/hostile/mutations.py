"""Mutations of bytes, deterministic for a seed: cut, doubled, truncated, with troublesome values inserted."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable

LONG = os.environ.get("HOSTILE") == "long"
"""Fifty thousand of each; else a share of a few seconds."""

SEED = int(os.environ.get("HOSTILE_SEED", "7"))

_BREAKERS = (
    b"", b"\0", b"\r\n", b"\r\n\r\n", b"\n\n", b"{", b"}", b"[", b"]", b'"', b"\\", b"\xff", b"\xed\xa0\x80",
    b"null", b"true", b"{}", b"[]", b"-1", b"0", b"1e999", b"-1e-999", b"NaN", b"9" * 25, b"9" * 5000, b"1.5",
    b'""', b'"a"', b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000, b"data: ", b"data:", b"event: error\n", b":", b";",
    b"0\r\n\r\n", b"data: [DONE]\n\n", b"\xe2\x80\xa8", b"a" * 70_000, b"%s", b"..%2f", b"\x7f",
)  # fmt: skip
_SCALAR = re.compile(rb'(?<=[:,\[])\s*("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)')

Mutation = Callable[[random.Random, bytearray], None]


def mutated(chance: random.Random, told: bytes, *, most: int = 4) -> bytes:
    """Return the bytes with one to `most` mutations."""
    text = bytearray(told)
    for _ in range(chance.randint(1, most)):
        chance.choice(_MUTATIONS)(chance, text)
    return bytes(text)


def _range(chance: random.Random, text: bytearray) -> slice:
    begin = chance.randrange(len(text) + 1)
    return slice(begin, min(len(text), begin + chance.choice((1, 2, 4, 8, 20, 200))))


def _flip(chance: random.Random, text: bytearray) -> None:
    if text:
        text[chance.randrange(len(text))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, text: bytearray) -> None:
    if text:
        text[chance.randrange(len(text))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _delete(chance: random.Random, text: bytearray) -> None:
    del text[_range(chance, text)]


def _double(chance: random.Random, text: bytearray) -> None:
    place = _range(chance, text)
    text[place.start : place.start] = text[place] * chance.choice((1, 1, 1, 50))


def _cut(chance: random.Random, text: bytearray) -> None:
    del text[chance.randrange(len(text) + 1) :]


def _insert(chance: random.Random, text: bytearray) -> None:
    begin = chance.randrange(len(text) + 1)
    text[begin:begin] = chance.choice(_BREAKERS)


def _replace(chance: random.Random, text: bytearray) -> None:
    """A value of a JSON document."""
    found = list(_SCALAR.finditer(text))
    if found:
        begin, end = chance.choice(found).span(1)
        text[begin:end] = chance.choice(_BREAKERS)


_MUTATIONS: tuple[Mutation, ...] = (_flip, _set, _delete, _double, _cut, _insert, _replace, _replace, _replace)
