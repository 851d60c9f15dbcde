"""The beginning of a request as a chain of digests, by which a conversation is recognized without being kept.

The prompt is taken as it is sent to the engine, in bytes, and cut into blocks. Each digest covers its block and
all before it, so that two requests have as many digests in common as blocks. Whatever comes before the messages in
the engine's prompt is part of every digest: tools, arguments of the template, adapters.

A few hundred bytes more or less are no matter: an engine compares tokens, and reuses those that are equal.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from hashlib import blake2b
from struct import unpack
from typing import Any

import msgspec

from router.formats.unreadable import UNREADABLE

Chain = tuple[int, ...]
"""Digests of 64 bits; the first is that of the first block."""

BLOCK = 1024
"""Size of a block in bytes, some 250 tokens of English."""
SHORTEST = 256
_FIRST = (SHORTEST, 512)
"""Ends of the first blocks in bytes, which are shorter: most conversations begin short."""
_SEVERAL = re.compile(rb'\[\s*["\[{]')
"""The beginning of a list of prompts."""
LONGEST = 1 << 20
"""Longest body, in bytes, of which a chain is made: longer ones hold images, or are parsed on a thread."""
_ABSENT = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    """What decides the beginning of an engine's prompt, of all APIs that llama-server has, and what forbids to
    choose its slot."""

    messages: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    input_prefix: msgspec.Raw = _ABSENT
    """The text before the gap that `/infill` fills, which changes with each request."""
    system: msgspec.Raw = _ABSENT
    instructions: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT
    chat_template_kwargs: msgspec.Raw = _ABSENT
    reasoning_effort: msgspec.Raw = _ABSENT
    reasoning: msgspec.Raw = _ABSENT
    thinking: msgspec.Raw = _ABSENT
    lora: msgspec.Raw = _ABSENT
    id_slot: Any = None
    cache_prompt: Any = True
    n: Any = None
    n_cmpl: Any = None
    previous_response_id: Any = None


_decode = msgspec.json.Decoder(_Body).decode


def chain_of(body: bytes, key: bytes) -> Chain | None:
    """Return the chain of a request's body, which is empty if the prompt is shorter than a block, or fills a gap.

    None: the request has several prompts, wants several answers or a slot of its own choice, or it is unreadable.
    `key` keeps digests from being compared with those of guessed prompts.
    """
    try:
        read = _decode(body)
    except UNREADABLE:
        return None
    if read.id_slot is not None or read.cache_prompt is not True or read.previous_response_id is not None:
        return None
    if read.n not in (None, 1) or read.n_cmpl not in (None, 1) or _SEVERAL.match(read.prompt):
        return None
    if read.input_prefix is not _ABSENT:
        return ()
    content = memoryview(read.messages) or memoryview(read.prompt) or memoryview(read.input)
    size = len(content) - 1  # without the end of the list or text, which the next request goes on with
    if size < SHORTEST:
        return ()
    before = (read.system, read.instructions, read.tools, read.chat_template_kwargs, read.reasoning_effort)
    hashed = blake2b(b"\0".join((*before, read.reasoning, read.thinking, read.lora)), digest_size=8, key=key)
    digests: list[bytes] = []
    begin = 0
    for end in (*_FIRST, *range(BLOCK, size + 1, BLOCK)):
        if end > size:
            break
        hashed.update(content[begin:end])
        digests.append(hashed.digest())
        begin = end
    return unpack(f">{len(digests)}Q", b"".join(digests))


def opening_of(body: bytes) -> bytes:
    """Return a body up to the end of its messages: the next request of the conversation begins so, even if that is
    too short for a chain. Empty if nothing goes on with it."""
    try:
        read = _decode(body)
    except UNREADABLE:
        return b""
    content = bytes(read.messages or read.prompt or read.input)
    end = content[:-1].rstrip()
    return b"" if len(end) < 2 or read.input_prefix is not _ABSENT else body[: body.rfind(content) + len(end)]


def covered(blocks: int) -> int:
    """Return the number of bytes in so many blocks."""
    return (0, *_FIRST)[blocks] if blocks <= len(_FIRST) else (blocks - len(_FIRST)) * BLOCK


def common(one: Chain, other: Chain) -> int:
    """Return the number of blocks that two chains have in common."""
    if one[:1] != other[:1]:  # most have nothing in common
        return 0
    shorter = min(len(one), len(other))
    return bisect_left(range(shorter), True, key=lambda block: one[block] != other[block])
