"""Reader of safetensors headers: each tensor's name, type, shape and size. Weights are not read.

The rules are those of the library that engines use (huggingface/safetensors, `tensor.rs`): a file that fails here
is loaded by none. A damaged or hostile file raises `Unreadable` in bounded time and memory: the length of the
header and everything in it are the file's own claims.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from router.formats.unreadable import UNREADABLE

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 32 << 20
"""Far above any real header (91,000 tensors of DeepSeek-V3 in one file: 12 MB); the format allows 100 MB."""
MOST_TENSORS = 1 << 17
MOST_DIMENSIONS = 16

BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, by type. Tensors of other types are not checked: a newer library may know them."""


class Unreadable(ValueError):
    """Raised for files that no engine can load; the message begins with the path and says why."""


class Incomplete(Unreadable):
    """Raised for files of which a part is missing, perhaps because it is still being written."""


class Truncated(Unreadable):
    """Raised when the given bytes end before the header does; `needed` is how many are needed."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Tensor(msgspec.Struct, frozen=True, gc=False):
    dtype: str
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[_Count, _Count]
    """Of its first byte and of the one after its last, from the end of the header."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


@dataclass(frozen=True, slots=True)
class Header:
    tensors: Mapping[str, Tensor]
    data_offset: int
    """Of the tensors in the file."""
    file_bytes: int


_entries = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_tensor = msgspec.json.Decoder(Tensor).decode


def read(path: Path) -> Header:
    """Return the header of a file. Raises Unreadable, and OSError if it cannot be opened."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block forever
        raise Unreadable(f"{path}: is not a regular file")
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH_BYTES)
        try:
            return parse(start, file_bytes=size, source=str(path))
        except Truncated as error:
            return parse(start + file.read(error.needed - len(start)), file_bytes=size, source=str(path))


def parse(buffer: bytes, *, file_bytes: int, source: str) -> Header:
    """Parse the header of a file of `file_bytes` bytes from its first bytes; `source` names it in errors.

    Raises Unreadable: `Truncated` if the header continues after `buffer`.
    """
    if file_bytes < LENGTH_BYTES:
        raise Incomplete(f"{source}: is incomplete: it has {file_bytes} bytes")
    if len(buffer) < LENGTH_BYTES:
        raise Truncated(f"{source}: ends before its header does", LENGTH_BYTES)
    length = int.from_bytes(buffer[:LENGTH_BYTES], "little")
    if buffer.startswith(b"version "):
        pointer = "a Git LFS pointer instead of the file: fetch it with `git lfs pull`"
        raise Unreadable(f"{source}: is {pointer}")
    end = LENGTH_BYTES + length
    if length > MOST_HEADER_BYTES:
        raise Incomplete(f"{source}: is not a safetensors file: it claims a header of {length:,} bytes")
    if end > file_bytes:
        raise Incomplete(
            f"{source}: is incomplete: its header takes {end:,} bytes, but the file has {file_bytes:,}"
        )
    if len(buffer) < end:
        raise Truncated(f"{source}: ends before its header does", end)
    tensors = _tensors(buffer[LENGTH_BYTES:end], source)
    expected = end + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if expected != file_bytes:
        reason = f"its tensors end at byte {expected:,}, but the file has {file_bytes:,} bytes"
        if expected > file_bytes:
            raise Incomplete(f"{source}: is incomplete: {reason}")
        raise Unreadable(f"{source}: {reason}")
    return Header(tensors, end, file_bytes)


def _tensors(text: bytes, source: str) -> dict[str, Tensor]:
    name = ""
    tensors: dict[str, Tensor] = {}
    try:
        entries = _entries(text)
        if len(entries) > MOST_TENSORS:
            raise Unreadable(f"{source}: claims {len(entries):,} tensors")
        for name, entry in entries.items():
            if name != "__metadata__":
                tensors[name] = _tensor(entry)
    except UNREADABLE as error:
        where = f"in its header, tensor {name[:99]!r}" if name else "its header"
        raise Unreadable(f"{source}: {where} is not valid: {error}") from None
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, following = tensor.data_offsets
        bits = BITS.get(tensor.dtype)
        if start != end or following < start:
            raise Unreadable(f"{source}: tensor {name[:99]!r} does not begin where the one before it ends")
        if bits is not None and tensor.elements * bits != tensor.nbytes * 8:
            raise Unreadable(f"{source}: tensor {name[:99]!r} does not have the size of its shape")
        end = following
    return tensors
