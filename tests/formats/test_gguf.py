"""Stories about model files: whole, split, cut off, old, foreign, lying and hostile."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    CHAT_TEMPLATE,
    RawTensor,
    gguf_bytes,
    write_embedding,
    write_llama,
    write_projector,
)

from router.formats import ggml, gguf, gguf_cursor
from router.formats.gguf import GGUF, ArrayStub, NotGGUF, UnsupportedGGUF, capabilities
from router.formats.gguf_cursor import GGUFError, TruncatedGGUF

ARCHITECTURE = ("general.architecture", "str", "llama")
WEIGHT = RawTensor("token_embd.weight", (32, 4), type=2, nbytes=4 * 18)


def parse(blob: bytes) -> GGUF:
    return gguf.parse(blob, file_bytes=len(blob), source="model.gguf")


def outcome(blob: bytes, window_bytes: int) -> str:
    """Return the header of a file or the error message; any other exception is a failure."""
    usual, gguf_cursor.WINDOW_BYTES = gguf_cursor.WINDOW_BYTES, window_bytes
    try:
        header = parse(blob)
    except GGUFError as error:
        complaint = error
    else:
        return repr((header, header.name, header.quantization, header.part_count, capabilities(header)))
    finally:
        gguf_cursor.WINDOW_BYTES = usual
    assert complaint.offset is not None
    assert 0 <= complaint.offset <= len(blob)
    return str(complaint)


def refusal(read: Callable[[], GGUF]) -> tuple[GGUFError, int]:
    """Why a file is refused, and the most memory that it took to find out, in bytes."""
    tracemalloc.start()
    try:
        read()
    except GGUFError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    pytest.fail("was not refused")


def parses_or_explains(blob: bytes) -> None:
    """True of every file, and the same whether it is read at once or by the spoonful."""
    assert outcome(blob, 16) == outcome(blob, 1 << 18)


def valid_files() -> list[bytes]:
    metadata = [
        ARCHITECTURE,
        ("general.name", "str", "Größe"),
        ("general.file_type", "u32", 2),
        ("general.alignment", "u32", 64),
        ("llama.context_length", "u64", 4096),
        ("llama.rope.freq_base", "f32", 1e4),
        ("llama.attention.head_count_kv", "[i32]", [8, 8, 0]),
        ("llama.attention.sliding_window_pattern", "[bool]", [True, False]),
        ("tokenizer.ggml.tokens", "[str]", ["<s>", "", "hello", "x" * 300]),
        ("tokenizer.ggml.token_type", "[u8]", [1] * 5000),
    ]
    tensors = [WEIGHT, RawTensor("output_norm.weight", (32,), 0, 128), RawTensor("scale", (), 1, 2)]
    return [
        gguf_bytes(metadata, tensors, alignment=64),
        gguf_bytes(metadata, tensors, alignment=64, order=">"),
        gguf_bytes([ARCHITECTURE, ("x", "[str]", ["a"] * 9)], [WEIGHT], version=2),
        gguf_bytes(),
    ]


# What a model says about itself


def test_header_of_a_model_tells_what_it_is(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", name="Tiny", n_layer=3, n_embd=32, context_length=1234)
    model = gguf.read(path)
    assert (model.architecture, model.name, model.kind) == ("llama", "Tiny", "model")
    assert (model.context_length, model.block_count, model.embedding_length) == (1234, 3, 32)
    assert (model.version, model.byte_order, model.quantization) == (3, "little", "F16")
    assert model.has_chat_template
    assert model.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert model.hyperparameter("attention.head_count") == 4
    assert model.files == (path,)
    assert model.file_bytes == path.stat().st_size
    assert capabilities(model) == ("completion",)


def test_what_the_file_does_not_say_is_absent_not_guessed() -> None:
    model = parse(gguf_bytes([("llama.context_length", "str", "long")]))
    assert (model.architecture, model.name, model.kind) == ("", None, "model")
    assert (model.context_length, model.block_count, model.embedding_length) == (None, None, None)
    assert (model.quantization, model.pooling_type, model.has_chat_template) == (None, None, False)
    assert (model.tensors, model.parameter_count, model.path, model.files) == ((), 0, None, ())


def test_embedding_models_rerankers_and_projectors_are_told_apart(tmp_path: Path) -> None:
    embedding = gguf.read(write_embedding(tmp_path / "embedding.gguf"))
    reranker = gguf.read(write_embedding(tmp_path / "reranker.gguf", pooling="rank"))
    chat = gguf.read(write_llama(tmp_path / "chat.gguf"))
    eye = gguf.read(write_projector(tmp_path / "eye.gguf"))
    ear = gguf.read(write_projector(tmp_path / "ear.gguf", vision=False, audio=True))
    pooling_decoder = parse(
        gguf_bytes([("general.architecture", "str", "qwen3"), ("qwen3.pooling_type", "u32", 3)])
    )
    assert capabilities(embedding) == capabilities(pooling_decoder) == ("embedding",)
    assert capabilities(reranker) == ("rerank",)
    assert not reranker.is_embedding_model
    assert capabilities(chat, eye) == ("completion", "vision")
    assert capabilities(chat, ear) == ("completion", "audio")
    assert capabilities(eye) == ()


def test_without_a_file_type_the_heaviest_tensor_type_names_the_quantization() -> None:
    tensors = [RawTensor(f"norm.{i}", (8,), 0, 32) for i in range(3)] + [RawTensor("w", (256, 9), 12, 9 * 144)]
    assert parse(gguf_bytes([ARCHITECTURE], tensors)).quantization == "Q4_K"
    assert parse(gguf_bytes([("general.file_type", "u32", 15)], tensors)).quantization == "Q4_K_M"
    assert parse(gguf_bytes([("general.file_type", "u32", 9999)], tensors)).quantization == "Q4_K"


def test_short_arrays_are_kept_and_long_ones_stepped_over() -> None:
    model = parse(
        gguf_bytes(
            [
                ("llama.attention.head_count_kv", "[u32]", [8, 0, 8]),
                ("pattern", "[bool]", [True, False]),
                ("empty", "[f64]", []),
                ("tokenizer.ggml.tokens", "[str]", ["a", "b"]),
                ("tokenizer.ggml.scores", "[f32]", [0.5] * 5000),
                ("last", "u8", 7),
            ]
        )
    )
    assert model.metadata == {
        "llama.attention.head_count_kv": (8, 0, 8),
        "pattern": (True, False),
        "empty": (),
        "tokenizer.ggml.tokens": ArrayStub("str", 2),
        "tokenizer.ggml.scores": ArrayStub("f32", 5000),
        "last": 7,
    }


def test_a_vocabulary_of_150_000_tokens_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf_bytes([("tokenizer.ggml.tokens", "[str]", [f"word{n}" for n in range(150_000)])]))
    tracemalloc.start()
    model = gguf.read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.metadata["tokenizer.ggml.tokens"] == ArrayStub("str", 150_000)
    assert peak_bytes < 2_000_000


# Agreement with the reference implementation


@pytest.mark.parametrize("endianess", [gguf_package.GGUFEndian.LITTLE, gguf_package.GGUFEndian.BIG])
def test_agrees_with_the_gguf_package(tmp_path: Path, endianess: gguf_package.GGUFEndian) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf_package.GGUFWriter(path, "llama", endianess=endianess)
    for integer in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{integer}")(f"test.{integer}", 100)
    writer.add_float32("test.f32", 0.25)
    writer.add_float64("test.f64", 1e300)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "naïve 模型")
    writer.add_array("test.floats", [0.5, 1.5])
    writer.add_custom_alignment(128)
    # Without Q8_1, whose size gguf 0.19 had wrong; it is a type for computing that no file contains.
    sizes = {kind: size for kind, size in gguf_package.GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}
    for kind, (block, block_bytes) in sizes.items():
        writer.add_tensor_info(kind.name, (3, 2 * block), np.dtype("uint32"), 6 * block_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, block_bytes in sizes.values():
        writer.write_tensor_data(np.zeros(6 * block_bytes, np.uint8))
    writer.close()

    theirs = gguf_package.GGUFReader(path)
    ours = gguf.read(path)
    for key, value in ours.metadata.items():
        contents: Any = theirs.fields[key].contents()
        assert value == (tuple(contents) if isinstance(contents, list) else contents)
    assert ours.data_offsets[0] == theirs.data_offset
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor, reference in zip(ours.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.type) == (reference.name, reference.tensor_type.name)
        assert (list(tensor.shape), tensor.elements) == (reference.shape.tolist(), reference.n_elements)
        assert (ours.data_offsets[0] + tensor.offset, tensor.nbytes) == (reference.data_offset, reference.n_bytes)


def test_file_types_are_called_as_in_the_gguf_package() -> None:
    theirs = {int(kind): kind.name for kind in gguf_package.LlamaFileType if kind.name != "GUESSED"}
    assert {number: ggml.FILE_TYPES[number] for number in theirs} == {
        number: name.removeprefix("MOSTLY_").removeprefix("ALL_") for number, name in theirs.items()
    }


def test_foreign_byte_order_and_the_older_version_read_the_same() -> None:
    metadata = [
        ARCHITECTURE,
        ("llama.block_count", "u32", 7),
        ("x", "[u16]", [1, 2]),
        ("y", "[str]", ["a", "bc"]),
    ]
    plain = parse(gguf_bytes(metadata, [WEIGHT]))
    for version in (2, 3):
        foreign = parse(gguf_bytes(metadata, [WEIGHT], version=version, order=">"))
        assert (foreign.version, foreign.byte_order) == (version, "big")
        assert (foreign.metadata, foreign.tensors) == (plain.metadata, plain.tensors)


# Split models


def test_split_model_is_read_as_one(tmp_path: Path) -> None:
    whole = gguf.read(write_llama(tmp_path / "whole.gguf"))
    first = write_llama(tmp_path / "split.gguf", parts=3)
    model = gguf.read(first)
    assert [path.name for path in model.files] == [f"split-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert model.file_bytes == sum(path.stat().st_size for path in model.files)
    assert model.part_count == 3
    assert {tensor.name: tensor.nbytes for tensor in model.tensors} == {
        tensor.name: tensor.nbytes for tensor in whole.tensors
    }
    assert {tensor.part for tensor in model.tensors} == {0, 1, 2}


def test_split_model_with_a_part_missing_says_which(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "big.gguf", parts=3)
    (tmp_path / "big-00002-of-00003.gguf").unlink()
    with pytest.raises(GGUFError, match=r"part 2 of 3 is missing: big-00002-of-00003\.gguf"):
        gguf.read(first)


def test_split_model_is_named_by_its_first_part(tmp_path: Path) -> None:
    write_llama(tmp_path / "big.gguf", parts=3)
    with pytest.raises(GGUFError, match="is part 2 of 3: use the first part"):
        gguf.read(tmp_path / "big-00002-of-00003.gguf")


def test_split_model_under_another_name_is_refused(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "big.gguf", parts=2)
    with pytest.raises(GGUFError, match=r"does not end in -00001-of-00002\.gguf"):
        gguf.read(first.rename(tmp_path / "renamed.gguf"))


def test_split_model_with_parts_mixed_up_is_refused(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "big.gguf", parts=3)
    second, third = tmp_path / "big-00002-of-00003.gguf", tmp_path / "big-00003-of-00003.gguf"
    third.write_bytes(second.read_bytes())
    with pytest.raises(GGUFError, match=r"big-00003-of-00003\.gguf: is not part 3 of 3"):
        gguf.read(first)


def test_split_model_with_a_part_of_another_model_is_refused(tmp_path: Path) -> None:
    def write(number: int, tensor: RawTensor, tensor_count: int = 2) -> Path:
        path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        counts = [
            ("split.no", "u16", number),
            ("split.count", "u16", 2),
            ("split.tensors.count", "i32", tensor_count),
        ]
        path.write_bytes(gguf_bytes(counts, [tensor]))
        return path

    write(1, WEIGHT)
    with pytest.raises(GGUFError, match="same tensor in two of its parts"):
        gguf.read(write(0, WEIGHT))
    with pytest.raises(GGUFError, match="2 parts have 2 tensors instead of 3"):
        gguf.read(write(0, RawTensor("other", (1,), 0, 4), tensor_count=3))


# Files cut off


@pytest.mark.parametrize("blob", valid_files())
def test_a_file_cut_off_anywhere_is_called_truncated(blob: bytes) -> None:
    whole = parse(blob)
    end = whole.data_offsets[0] + sum(tensor.offset + tensor.nbytes for tensor in whole.tensors[-1:])
    assert parse(blob[:end]).tensors == whole.tensors
    for length in (*range(0, end, 7), end - 1):
        with pytest.raises(TruncatedGGUF):
            parse(blob[:length])


def test_an_incomplete_download_is_recognised_and_its_header_still_readable(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf")
    whole = gguf.read(path)
    os.truncate(path, whole.file_bytes // 2)
    with pytest.raises(TruncatedGGUF, match=f"incomplete: its tensors end at byte {whole.file_bytes:,}"):
        gguf.read(path)
    assert gguf.read(path, require_data=False).tensors == whole.tensors


def test_a_file_is_read_again_when_it_is_another(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    names = [("general.name", "str", name) for name in ("one", "two", "six")]
    one, two, six = (gguf_bytes([ARCHITECTURE, name], [WEIGHT]) for name in names)
    path.write_bytes(one)
    header = gguf.read(path)
    assert header.name == "one"
    assert gguf.read(path) is header
    path.write_bytes(two)  # at another time
    assert gguf.read(path).name == "two"
    (tmp_path / "next").write_bytes(six)  # at the same time, with as many bytes
    os.utime(tmp_path / "next", ns=(0, path.stat().st_mtime_ns))
    (tmp_path / "next").replace(path)
    assert gguf.read(path).name == "six"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_be_read_no_longer_is_an_error_though_it_is_remembered(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf")
    gguf.read(path)
    path.chmod(0)
    with pytest.raises(PermissionError):
        gguf.read(path)


def test_the_first_bytes_of_a_remote_file_are_enough(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf")
    whole = gguf.read(path)
    blob = path.read_bytes()
    head = gguf.parse(memoryview(blob)[: whole.data_offsets[0]], file_bytes=len(blob))
    assert (head.metadata, head.tensors, head.file_bytes) == (whole.metadata, whole.tensors, whole.file_bytes)
    with pytest.raises(TruncatedGGUF, match="https://hub/m: the header goes on after its first 1,000 bytes"):
        gguf.parse(blob[:1000], file_bytes=len(blob), source="https://hub/m")


# Files that are something else


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04 a zip archive", "not a GGUF file: it starts with b'PK"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"x", "not a GGUF file"),
    ],
)
def test_a_file_of_another_kind_is_called_so(content: bytes, reason: str) -> None:
    with pytest.raises(NotGGUF, match=reason) as caught:
        parse(content)
    assert caught.value.path == "model.gguf"


@pytest.mark.parametrize("content", [b"", b"GG"])
def test_an_empty_file_is_truncated_rather_than_foreign(content: bytes) -> None:
    with pytest.raises(TruncatedGGUF, match=f"the file ends after {len(content)} bytes"):
        parse(content)


@pytest.mark.parametrize("version", [0, 1, 4, 0x7FFF])
@pytest.mark.parametrize("order", ["<", ">"])
def test_other_versions_are_unsupported_rather_than_damaged(version: int, order: Any) -> None:
    with pytest.raises(UnsupportedGGUF, match=f"GGUF version {version}; versions 2 and 3 are supported"):
        parse(gguf_bytes(version=version, order=order))


def test_a_tensor_of_a_type_that_only_other_engines_know_takes_the_room_up_to_the_next() -> None:
    """Forks have types of their own, with scales for whole rows in some: nothing but its place tells the size."""
    tensors = [RawTensor("first", (256, 3), 139, 700), WEIGHT, RawTensor("last", (32,), 99, 40)]
    header = parse(gguf_bytes([ARCHITECTURE], tensors))
    assert [(tensor.name, tensor.type, tensor.nbytes) for tensor in header.tensors] == [
        ("first", "type 139", 704),
        ("token_embd.weight", "Q4_0", 72),
        ("last", "type 99", 64),
    ]
    assert header.parameter_count == 256 * 3 + 32 * 4 + 32
    with pytest.raises(GGUFError, match=r"the data of tensor 'last' at 64, amid others"):
        parse(gguf_bytes([], [WEIGHT, RawTensor("new", (1,), 99, 1), RawTensor("last", (1,), 0, 4, offset=64)]))


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(GGUFError, match="not a regular file"):
        gguf.read(tmp_path / "pipe.gguf")
    with pytest.raises(FileNotFoundError):
        gguf.read(tmp_path / "absent.gguf")


# Files that lie

HUGE = 1 << 63


def array(type_id: int, length: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, type_id, length) + content


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


STRING = struct.pack("<I", 8)

LIES: Sequence[tuple[bytes, int, str]] = [
    (gguf_bytes(tensor_count=HUGE), 8, "claims 9,223,372,036,854,775,808 tensors"),
    (gguf_bytes(key_count=HUGE), 16, "claims 9,223,372,036,854,775,808 metadata keys"),
    (gguf_bytes(key_count=1)[:24], 24, "truncated: the file ends after 24 bytes"),
    (
        gguf_bytes([("k", "raw", STRING + u64(HUGE))]),
        45,
        "claims .* bytes of names and values, in metadata key 'k'",
    ),
    (gguf_bytes([("k", "raw", STRING + u64(1000))]), 45, "truncated: .* in metadata key 'k'"),
    (
        gguf_bytes([("k", "raw", array(0, 10 << 30))]),
        41,
        "claims an array of 10,737,418,240 in metadata key 'k'",
    ),
    (gguf_bytes([("k", "raw", array(0, 1 << 30))]), 49, "truncated"),
    (gguf_bytes([("k", "raw", array(8, HUGE))]), 41, "claims an array"),
    (gguf_bytes([("k", "raw", array(8, 1 << 29))]), 41, "claims 536,870,912 strings"),
    (gguf_bytes([("k", "raw", array(8, 3, u64(1, HUGE, HUGE)))]), 49, "truncated: .* in metadata key 'k'"),
    (gguf_bytes([("k", "raw", array(8, 1, u64(1000)))]), 49, "truncated: .* in metadata key 'k'"),
    (gguf_bytes([("k", "raw", array(9, 1, array(4, 1)))]), 37, "nested array in metadata key 'k'"),
    (gguf_bytes([("k", "raw", array(77, 1))]), 37, "unknown array type 77 in metadata key 'k'"),
    (gguf_bytes([("k", "raw", struct.pack("<I", 13))]), 33, "unknown value type 13 in metadata key 'k'"),
    (gguf_bytes([("k", "u8", 1), ("k", "u8", 2)]), 38, "metadata key 'k' twice"),
    (gguf_bytes([("", "u8", 1)]), 24, "empty metadata key"),
    (gguf_bytes([(b"\xff", "u8", 1)]), 24, "metadata key that is not UTF-8"),
    (gguf_bytes([("k" * 70_000, "u8", 1)]), 24, "metadata key of 70,000 bytes"),
    (gguf_bytes([("general.alignment", "u32", 0)]), 24, "alignment"),
    (gguf_bytes([("general.alignment", "u32", 48)]), 24, "alignment"),
    (gguf_bytes([("general.alignment", "u64", 32)]), 24, "alignment"),
    (gguf_bytes([], [RawTensor("n" * 64, (1,))]), 24, "tensor name of 64 bytes"),
    (gguf_bytes([], [RawTensor("w", (1,) * 5)]), 24, "5 dimensions in tensor 'w'"),
    (gguf_bytes([], [RawTensor("w", (HUGE,))]), 24, "impossible shape"),
    (gguf_bytes([], [RawTensor("w", (1 << 32, 1 << 32))]), 24, "impossible shape"),
    (gguf_bytes([], [RawTensor("w", (1 << 61,))]), 24, "impossible shape"),
    (gguf_bytes([], [RawTensor("w", (0, HUGE))]), 24, "impossible shape"),
    (gguf_bytes([], [RawTensor("w", (33,), type=2)]), 24, "33 elements in a row of Q4_0 tensor 'w'"),
    (gguf_bytes([], [RawTensor("w", (), type=2)]), 24, "1 elements in a row of Q4_0 tensor 'w'"),
    (gguf_bytes([], [RawTensor("w", (1,), offset=(1 << 64) - 32)]), 24, "instead of 0"),
    (gguf_bytes([], [WEIGHT, RawTensor("w", (1,), nbytes=4, offset=0)]), 81, "tensor 'w' at 0 instead of 96"),
    (gguf_bytes([], [WEIGHT, WEIGHT]), 81, "tensor 'token_embd.weight' twice"),
]


@pytest.mark.parametrize(("blob", "offset", "reason"), LIES, ids=range(len(LIES)))
def test_a_lying_file_is_refused_cheaply_with_the_byte_at_fault(blob: bytes, offset: int, reason: str) -> None:
    error, peak_bytes = refusal(lambda: parse(blob))
    assert re.search(reason, str(error))
    assert error.offset == offset
    assert peak_bytes < 1_000_000


EMPTY: Sequence[tuple[bytes, str]] = [
    (gguf_bytes(key_count=5)[:24], "empty metadata key"),
    (gguf_bytes(tensor_count=2)[:24], "tensor '' twice"),
    (gguf_bytes([("k", "raw", array(8, 1 << 17))], key_count=2)[:49], "empty metadata key"),
    (gguf_bytes([("k", "raw", array(0, 1 << 30))], key_count=2)[:49], "empty metadata key"),
    (gguf_bytes([("k", "raw", struct.pack("<I", 8) + u64(7 << 20))], key_count=2)[:45], "empty metadata key"),
]


@pytest.mark.parametrize(("header", "reason"), EMPTY, ids=range(len(EMPTY)))
def test_a_huge_file_of_nothing_is_refused_cheaply(tmp_path: Path, header: bytes, reason: str) -> None:
    """The bytes that the header claims are there, all zero, on a sparse file."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header)
    os.truncate(path, 10 << 30)
    error, peak_bytes = refusal(lambda: gguf.read(path))
    assert reason in error.reason
    assert peak_bytes < 3 * gguf_cursor.MAX_KEPT_BYTES


# Whatever the bytes


numbers = st.sampled_from(
    [0, 1, 8, 9, 12, 255, 1 << 16, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
snippets = st.one_of(
    st.binary(max_size=12),
    numbers.map(lambda number: struct.pack("<Q", number)),
    numbers.map(lambda number: struct.pack("<I", number & 0xFFFFFFFF)),
    numbers.map(lambda number: struct.pack(">Q", number)),
)


@given(st.binary(max_size=400))
@settings(max_examples=examples(50), deadline=2000)
def test_arbitrary_bytes_are_refused_or_parsed(tail: bytes) -> None:
    parses_or_explains(tail)
    parses_or_explains(b"GGUF\x03\0\0\0" + tail)
    parses_or_explains(b"GGUF\x03\0\0\0" + u64(2, 3) + tail)


@given(
    st.sampled_from(valid_files()),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 12), snippets), min_size=1, max_size=4),
)
@settings(max_examples=examples(100), deadline=2000)
def test_a_damaged_file_is_refused_or_parsed(blob: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    for position, removed, added in edits:
        blob = blob[:position] + added + blob[position + removed :]
    parses_or_explains(blob)
