"""Reader of GGUF headers: metadata, and each tensor's name, type, shape and size.

Reads neither weights nor the vocabulary. Long arrays (tokens, scores, merges) are skipped, so that a vocabulary of
150,000 tokens takes milliseconds. The rules are those of llama.cpp's own reader (ggml/src/gguf.cpp): a file that
fails here is loaded by no engine. A damaged or hostile file raises `GGUFError`, which gives the offending byte, in
bounded time and memory.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from router.formats.ggml import EMBEDDING_ARCHITECTURES, FILE_TYPES, POOLING_TYPES, TENSOR_TYPES
from router.formats.gguf_cursor import Cursor, GGUFError, TruncatedGGUF

# Far above any real model (262k tokens and 0.5M merges in Gemma, 47k tensors in an unmerged mixture of
# experts); they bound the cost of a malicious header.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAY_LENGTH = 1 << 30
MAX_KEPT_NUMBERS = 4096
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_INT64 = (1 << 63) - 1
_UNKNOWN_SIZE = -1

VERSIONS = (2, 3)
STRING, ARRAY, UINT32 = 8, 9, 4
# Metadata value types: name and struct letter by number.
SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    UINT32: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}


_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


class SplitName(NamedTuple):
    """The name of a file that is one part of a split model; parts count from 1."""

    stem: str
    part: int
    parts: int

    @classmethod
    def of(cls, name: str) -> SplitName | None:
        """Take a file's name apart; None if it is not that of a part."""
        found = _SPLIT_NAME.fullmatch(name)
        return cls(found[1], int(found[2]), int(found[3])) if found else None

    def name(self, part: int = 1) -> str:
        """The name of another part's file, by default the first one's."""
        return f"{self.stem}-{part:05}-of-{self.parts:05}.gguf"

    @property
    def names(self) -> list[str]:
        """The names of all parts' files, in order."""
        return [self.name(part) for part in range(1, self.parts + 1)]


class NotGGUF(GGUFError):
    """Raised for a file that is not in GGUF format."""


class UnsupportedGGUF(GGUFError):
    """Raised for a version of the format that this reader does not support; a newer engine may."""


@dataclass(frozen=True, slots=True)
class ArrayStub:
    """A skipped array: its element type (`str`, `f32`, …) and length."""

    type: str
    length: int


MetadataValue: TypeAlias = "str | int | float | bool | tuple[int | float | bool, ...] | ArrayStub"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor: contiguous dimension first, offset in bytes from the start of its file's tensor data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    part: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUF:
    """The header of a model file; for a split model, the first part's metadata and the tensors of all parts."""

    path: Path | None
    version: int
    byte_order: Literal["little", "big"]
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[Tensor, ...]
    data_offsets: tuple[int, ...]
    """Offset in bytes of the tensor data in each part."""
    file_bytes: int
    files: tuple[Path, ...]

    def hyperparameter(self, key: str) -> MetadataValue | None:
        """Return the value of `{architecture}.{key}`."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def architecture(self) -> str:
        """The architecture, such as `llama` or `qwen3`; empty if the file does not name one."""
        return _text(self.metadata.get("general.architecture")) or ""

    @property
    def kind(self) -> str:
        """The kind of file: `model`, `mmproj`, `adapter` or `imatrix`."""
        if self.architecture == "clip":
            return "mmproj"
        return _text(self.metadata.get("general.type")) or "model"

    @property
    def name(self) -> str | None:
        return _text(self.metadata.get("general.name"))

    @property
    def context_length(self) -> int | None:
        return _integer(self.hyperparameter("context_length"))

    @property
    def block_count(self) -> int | None:
        return _integer(self.hyperparameter("block_count"))

    @property
    def embedding_length(self) -> int | None:
        return _integer(self.hyperparameter("embedding_length"))

    @property
    def has_chat_template(self) -> bool:
        return bool(_text(self.metadata.get("tokenizer.chat_template")))

    @property
    def pooling_type(self) -> str | None:
        number = _integer(self.hyperparameter("pooling_type"))
        return None if number is None else POOLING_TYPES.get(number)

    @property
    def is_embedding_model(self) -> bool:
        """Whether the model embeds text: it pools tokens, or is an encoder. A reranker is not one."""
        if self.pooling_type == "rank":
            return False
        return self.pooling_type in ("mean", "cls", "last") or self.architecture in EMBEDDING_ARCHITECTURES

    @property
    def parameter_count(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def quantization(self) -> str | None:
        """The quantization that the file names (`Q4_K_M`), else the tensor type that takes the most bytes."""
        file_type = _integer(self.metadata.get("general.file_type"))
        if file_type is not None and file_type in FILE_TYPES:
            return FILE_TYPES[file_type]
        nbytes: Counter[str] = Counter()
        for tensor in self.tensors:
            nbytes[tensor.type] += tensor.nbytes
        return nbytes.most_common(1)[0][0] if nbytes else None

    @property
    def part_count(self) -> int:
        """Number of files into which the model is split, according to its metadata."""
        return _integer(self.metadata.get("split.count")) or 1


def read(path: Path, *, require_data: bool = True, remember: bool = True) -> GGUF:
    """Return the header of a model file and, for the first part of a split model, of its other parts.

    Raises GGUFError, and OSError if a file cannot be opened. With `require_data`, a file that ends before its last
    tensor is an error. With `remember`, an unchanged file is not read again, which takes 100 KB of memory for 327
    tensors.
    """
    first = _read_part(path, 0, require_data, remember)
    parts = first.part_count
    if parts <= 1:
        return first

    number = _integer(first.metadata.get("split.no")) or 0
    if number != 0:
        raise GGUFError(str(path), f"is part {number + 1} of {parts}: use the first part")
    named = SplitName.of(path.name)
    if named is None or (named.part, named.parts) != (1, parts):
        ending = f"-00001-of-{parts:05d}.gguf"
        raise GGUFError(str(path), f"is the first of {parts} parts, but its name does not end in {ending}")

    tensors = list(first.tensors)
    files, data_offsets = [path], [*first.data_offsets]
    file_bytes = first.file_bytes
    for index in range(1, parts):
        sibling = path.with_name(named.name(index + 1))
        try:
            part = _read_part(sibling, index, require_data, remember)
        except FileNotFoundError:
            raise GGUFError(str(path), f"part {index + 1} of {parts} is missing: {sibling.name}") from None
        if part.metadata.get("split.no") != index:
            raise GGUFError(str(sibling), f"is not part {index + 1} of {parts}, as its name says")
        tensors += part.tensors
        files.append(sibling)
        data_offsets += part.data_offsets
        file_bytes += part.file_bytes

    expected = _integer(first.metadata.get("split.tensors.count"))
    if expected not in (None, len(tensors)):
        raise GGUFError(str(path), f"its {parts} parts have {len(tensors)} tensors instead of {expected}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError(str(path), "has the same tensor in two of its parts")
    return replace(
        first,
        tensors=tuple(tensors),
        data_offsets=tuple(data_offsets),
        files=tuple(files),
        file_bytes=file_bytes,
    )


def parse(buffer: bytes | memoryview, *, file_bytes: int, source: str = "<buffer>") -> GGUF:
    """Parse the header of a file of `file_bytes` bytes from its first bytes; `source` names it in errors.

    Raises GGUFError: `TruncatedGGUF` if the header continues after `buffer`; then retry with more bytes.
    """
    head = io.BytesIO(memoryview(buffer)[:file_bytes])
    header = _parse(head, source, min(len(buffer), file_bytes), file_bytes)
    _check_data(header, source)
    return header


def capabilities(model: GGUF, projector: GGUF | None = None) -> tuple[str, ...]:
    """Return what the model can be used for, according to its files and regardless of engine flags."""
    if model.kind != "model":
        return ()
    if model.pooling_type == "rank":
        return ("rerank",)
    if model.is_embedding_model:
        return ("embedding",)
    return ("completion", *(senses(projector) if projector is not None else ()))


def senses(projector: GGUF) -> tuple[str, ...]:
    """Return the input modalities that a projector adds: `vision`, `audio`."""
    return tuple(
        sense for sense in ("vision", "audio") if projector.metadata.get(f"clip.has_{sense}_encoder") is True
    )


def _read_part(path: Path, part: int, require_data: bool, remember: bool) -> GGUF:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block forever
        raise GGUFError(str(path), "is not a regular file")
    if remember:
        path.open("rb").close()  # a cached file may have become unreadable, and then no engine can load it
        header = _remembered(path, part, status.st_ino, status.st_mtime_ns, status.st_size)
    else:
        header = _header(path, part)
    if require_data:
        _check_data(header, str(path))
    return header


@functools.lru_cache(maxsize=1024)
def _remembered(path: Path, part: int, *_version: int) -> GGUF:
    """Return the cached header: skipping the 300,000 strings of a vocabulary takes 60 ms before every load."""
    return _header(path, part)


def _header(path: Path, part: int) -> GGUF:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header = _parse(file, str(path), size, size, part)
    return replace(header, path=path, files=(path,))


def _check_data(header: GGUF, source: str) -> None:
    last = header.tensors[-1] if header.tensors else None
    end = header.data_offsets[0] + (last.offset + last.nbytes if last else 0)
    if end > header.file_bytes:
        reason = f"incomplete: its tensors end at byte {end:,}, but the file has {header.file_bytes:,} bytes"
        raise TruncatedGGUF(source, reason, header.file_bytes)


def _parse(
    file: io.FileIO | io.BytesIO,
    path: str,
    available: int,
    file_bytes: int,
    part: int = 0,
) -> GGUF:
    cursor = Cursor(file, path, available, file_bytes)
    version = _read_version(cursor)
    tensor_count, key_count = cursor.unpack("QQ")
    if tensor_count > MAX_TENSORS:
        cursor.fail(f"claims {tensor_count:,} tensors", cursor.offset - 16)
    if key_count > MAX_KEYS:
        cursor.fail(f"claims {key_count:,} metadata keys", cursor.offset - 8)
    metadata = _read_metadata(cursor, key_count)
    alignment = metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)
    tensors = _read_tensors(cursor, tensor_count, alignment, part)
    data_offset = cursor.offset + (-cursor.offset % alignment if tensors else 0)
    if tensors and tensors[-1].nbytes == _UNKNOWN_SIZE:
        rest = max(0, file_bytes - data_offset - tensors[-1].offset)
        tensors = (*tensors[:-1], replace(tensors[-1], nbytes=rest))
    return GGUF(
        path=None,
        version=version,
        byte_order="big" if cursor.order == ">" else "little",
        metadata=metadata,
        tensors=tensors,
        data_offsets=(data_offset,),
        file_bytes=file_bytes,
        files=(),
    )


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(min(4, cursor.available))
    if not b"GGUF".startswith(magic):
        if magic == b"vers":
            reason = "not a GGUF file but perhaps a Git LFS pointer to one: fetch it with `git lfs pull`"
        else:
            reason = f"not a GGUF file: it starts with {magic!r}"
        raise NotGGUF(cursor.path, reason, 0)
    if len(magic) < 4:
        cursor.truncated(0)
    (version,) = cursor.unpack("I")
    if version & 0xFFFF == 0:  # the other byte order: no version is a multiple of 65,536
        cursor.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS:
        raise UnsupportedGGUF(cursor.path, f"is GGUF version {version}; versions 2 and 3 are supported", 4)
    assert isinstance(version, int)
    return version


def _read_metadata(cursor: Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(count):
        start = cursor.offset
        key = cursor.name("metadata key", MAX_KEY_BYTES)
        cursor.reading = f"metadata key {key[:99]!r}"
        if not key or key in metadata:
            cursor.fail(f"has {cursor.reading} twice" if key else "has an empty metadata key", start)
        (type_id,) = cursor.unpack("I")
        if type_id == STRING:
            metadata[key] = cursor.string().decode("utf-8", "replace")
        elif type_id == ARRAY:
            metadata[key] = _read_array(cursor)
        elif type_id in SCALARS:
            (metadata[key],) = cursor.unpack(SCALARS[type_id][1])
        else:
            cursor.fail(f"has an unknown value type {type_id} in {cursor.reading}", cursor.offset - 4)
        if key == "general.alignment":
            alignment = metadata[key]
            if type_id != UINT32 or not isinstance(alignment, int) or alignment.bit_count() != 1:
                cursor.fail("has a general.alignment that is not a power of two of type u32", start)
    return metadata


def _read_array(cursor: Cursor) -> MetadataValue:
    start = cursor.offset
    type_id, length = cursor.unpack("IQ")
    if length > MAX_ARRAY_LENGTH:
        cursor.fail(f"claims an array of {length:,} in {cursor.reading}", start + 4)
    if type_id == STRING:
        cursor.skip_strings(length)
        return ArrayStub("str", length)
    if type_id not in SCALARS:
        what = "a nested array" if type_id == ARRAY else f"an unknown array type {type_id}"
        cursor.fail(f"has {what} in {cursor.reading}", start)
    name, letter = SCALARS[type_id]
    if length > MAX_KEPT_NUMBERS:
        cursor.skip(length * struct.calcsize("<" + letter))
        return ArrayStub(name, length)
    return cursor.numbers(length, letter)


def _read_tensors(cursor: Cursor, count: int, alignment: int, part: int) -> tuple[Tensor, ...]:
    """Read the tensor infos. A tensor of an unknown type is assumed to take the space up to the next one."""
    tensors: dict[str, Tensor] = {}
    data_bytes = 0
    before: Tensor | None = None
    for _ in range(count):
        start = cursor.offset
        tensor = _read_tensor(cursor, part)
        if tensor.name in tensors:
            cursor.fail(f"has {cursor.reading} twice", start)
        if before is not None and before.nbytes == _UNKNOWN_SIZE:
            if tensor.offset < data_bytes or tensor.offset % alignment:
                cursor.fail(f"has the data of {cursor.reading} at {tensor.offset:,}, amid others", start)
            tensors[before.name] = replace(before, nbytes=tensor.offset - data_bytes)
        elif tensor.offset != data_bytes:
            cursor.fail(f"has the data of {cursor.reading} at {tensor.offset:,} instead of {data_bytes:,}", start)
        data_bytes = tensor.offset
        if tensor.nbytes != _UNKNOWN_SIZE:
            data_bytes += tensor.nbytes + -tensor.nbytes % alignment
        tensors[tensor.name] = before = tensor
    return tuple(tensors.values())


def _read_tensor(cursor: Cursor, part: int) -> Tensor:
    start = cursor.offset
    name = cursor.name("tensor name", MAX_NAME_BYTES)
    cursor.reading = f"tensor {name!r}"
    (dimensions,) = cursor.unpack("I")
    if dimensions > MAX_DIMENSIONS:
        cursor.fail(f"has {dimensions:,} dimensions in {cursor.reading}", start)
    *sizes, type_id, offset = cursor.unpack(f"{dimensions}QIQ")
    shape = tuple(sizes)
    elements = math.prod(shape)
    if type_id in TENSOR_TYPES:
        type_name, block, block_bytes = TENSOR_TYPES[type_id]
        row = shape[0] if shape else 1
        if row % block:
            cursor.fail(f"has {row:,} elements in a row of {type_name} {cursor.reading}", start)
        nbytes = elements // block * block_bytes
    else:
        type_name, nbytes = f"type {type_id}", _UNKNOWN_SIZE
    if max(elements, nbytes, *shape) > MAX_INT64:
        cursor.fail(f"has an impossible shape {shape} in {cursor.reading}", start)
    return Tensor(name, shape, type_name, offset, nbytes, part)


def _integer(value: MetadataValue | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: MetadataValue | None) -> str | None:
    return value if isinstance(value, str) else None
