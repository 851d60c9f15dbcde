"""Stories about folders full of models."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path, PurePath

import pytest
from tiny_models import RawTensor, gguf_bytes, write_embedding, write_llama, write_projector

from router.hub import Discovery, discover, projector_of


def model(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_llama(path, n_layer=1, n_embd=8)


def projector(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_projector(path)


def aliases(discovery: Discovery) -> list[str]:
    return [found.alias for found in discovery.models]


def projectors(discovery: Discovery) -> dict[str, str | None]:
    names: dict[str, str | None] = {}
    for found in discovery.models:
        path = found.projector and found.projector.path
        names[found.alias] = path.name if path else None
    return names


def reasons(discovery: Discovery) -> dict[str, str]:
    return {skipped.path.name: skipped.reason for skipped in discovery.skipped}


def test_every_model_below_a_folder_is_found_and_named_after_its_file(tmp_path: Path) -> None:
    model(tmp_path / "b.Q4_K_M.gguf")
    model(tmp_path / "a.gguf")
    write_embedding(tmp_path / "embed.gguf")
    deep = model(tmp_path / "vendor" / "repo" / "Deep Model.GGUF")
    (tmp_path / "README.md").write_text("no model")
    discovery = discover(tmp_path)
    assert aliases(discovery) == ["a", "b.Q4_K_M", "embed", "Deep-Model"]
    assert discovery.models[-1].path == deep
    assert [found.capabilities for found in discovery.models[1:3]] == [("completion",), ("embedding",)]
    assert discovery.skipped == ()


def test_a_split_model_is_found_once_by_its_first_part(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "big.gguf", parts=3)
    discovery = discover(tmp_path)
    assert aliases(discovery) == ["big"]
    assert discovery.models[0].path == first
    assert len(discovery.models[0].model.files) == 3
    assert discovery.skipped == ()


def test_an_incomplete_split_model_is_reported_once_per_cause(tmp_path: Path) -> None:
    write_llama(tmp_path / "big.gguf", parts=3)
    write_llama(tmp_path / "headless.gguf", parts=2)
    (tmp_path / "big-00002-of-00003.gguf").unlink()
    (tmp_path / "headless-00001-of-00002.gguf").unlink()
    discovery = discover(tmp_path)
    assert discovery.models == ()
    assert reasons(discovery) == {
        "big-00001-of-00003.gguf": "part 2 of 3 is missing: big-00002-of-00003.gguf",
        "headless-00002-of-00002.gguf": "its first part is missing: headless-00001-of-00002.gguf",
    }


def test_models_of_the_same_name_are_told_apart_by_as_many_folders_as_it_takes(tmp_path: Path) -> None:
    for place in ("m.gguf", "x/m.gguf", "x/a/n.gguf", "y/a/n.gguf", "z/n.gguf", "z/only.gguf"):
        model(tmp_path / place)
    assert aliases(discover(tmp_path)) == ["m", "x/m", "x/a/n", "y/a/n", "z/n", "only"]


def test_even_files_of_one_folder_with_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("..gguf", "a b.gguf", "a-b.gguf", "m.gguf", "m.gguf.gguf"):
        model(tmp_path / name)
    write_llama(tmp_path / "m.gguf", parts=2)
    assert sorted(aliases(discover(tmp_path))) == [
        "..gguf",
        "a b.gguf",
        "a-b.gguf",
        "m-00001-of-00002.gguf",
        "m.gguf",
        "m.gguf.gguf",
    ]


def test_a_projector_goes_with_the_only_model_of_its_folder_whatever_it_is_called(tmp_path: Path) -> None:
    model(tmp_path / "gemma" / "gemma-3-4b-it-Q4_K_M.gguf")
    model(tmp_path / "gemma" / "gemma-3-4b-it-UD-Q8_K_XL.gguf")
    projector(tmp_path / "gemma" / "mmproj-model-f16.gguf")
    model(tmp_path / "plain" / "qwen.gguf")
    discovery = discover(tmp_path)
    assert projectors(discovery) == {
        "gemma-3-4b-it-Q4_K_M": "mmproj-model-f16.gguf",
        "gemma-3-4b-it-UD-Q8_K_XL": "mmproj-model-f16.gguf",
        "qwen": None,
    }
    assert discovery.models[0].capabilities == ("completion", "vision")


def test_among_many_models_a_projector_goes_with_the_longest_name_that_it_begins(tmp_path: Path) -> None:
    for name in (
        "qwen2.5-vl-7b-instruct-q4_k_m",
        "qwen2.5-vl-32b-q4_0",
        "qwen2.5-coder-7b",
        "gpt-oss-20b-mxfp4",
    ):
        model(tmp_path / f"{name}.gguf")
    projector(tmp_path / "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf")
    projector(tmp_path / "qwen2.5-vl-mmproj-bf16.gguf")
    projector(tmp_path / "mmproj-F32.gguf")
    discovery = discover(tmp_path)
    assert projectors(discovery) == {
        "gpt-oss-20b-mxfp4": None,
        "qwen2.5-coder-7b": None,
        "qwen2.5-vl-32b-q4_0": "qwen2.5-vl-mmproj-bf16.gguf",
        "qwen2.5-vl-7b-instruct-q4_k_m": "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf",
    }
    assert reasons(discovery) == {"mmproj-F32.gguf": "is a projector that no model in its folder uses"}


def test_projectors_are_found_as_soon_for_each_of_a_thousand_models_as_for_one() -> None:
    """By the square of their number, it took seconds in which nothing else was served."""
    models = [PurePath(f"{number}-model-Q4_K_M.gguf") for number in range(1000)]
    mmproj = PurePath("mmproj-7-model.gguf")
    before_sec = time.process_time()
    for there in ({}, {mmproj: 1}):
        found = [projector_of(each, models, there) for each in models]
        assert found == [mmproj if there and each == models[7] else None for each in models]
    assert time.process_time() - before_sec < 1


def test_what_is_no_model_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    model(tmp_path / "good.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "good.gguf").read_bytes()[:5000])
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04")
    (tmp_path / "lora.gguf").write_bytes(gguf_bytes([("general.type", "str", "adapter")]))
    (tmp_path / "words.gguf").write_bytes(gguf_bytes([("general.architecture", "str", "llama")]))
    model(tmp_path / "mtp-good.gguf")
    os.symlink("absent", tmp_path / "dangling.gguf")
    os.symlink("loop.gguf", tmp_path / "loop.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    discovery = discover(tmp_path)
    assert aliases(discovery) == ["good"]
    found = reasons(discovery)
    assert found.pop("cut.gguf").startswith("truncated: the file ends after 5,000 bytes")
    assert found == {
        "zip.gguf": r"not a GGUF file: it starts with b'PK\x03\x04' (at byte 0)",
        "lora.gguf": "is a GGUF of type 'adapter', not a model",
        "words.gguf": "has no tensors: it holds a vocabulary only",
        "mtp-good.gguf": "is a draft for speculative decoding, not a model of its own",
        "dangling.gguf": "No such file or directory",
        "loop.gguf": "Too many levels of symbolic links",
        "pipe.gguf": "is not a regular file",
    }


def test_a_big_endian_model_is_not_offered_on_a_little_endian_machine(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([], [RawTensor("w", (1,), 0, 4)], order=">"))
    assert reasons(discover(tmp_path))["m.gguf"].startswith("is big-endian, unlike this machine")


def test_a_file_reached_by_two_names_is_served_once(tmp_path: Path) -> None:
    """As in the Hugging Face cache: blobs, and links to them from every revision."""
    blob = model(tmp_path / "blobs" / "0123abcd")
    for revision in ("r1", "r2"):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "m.gguf").symlink_to(blob)
    discovery = discover(tmp_path)
    assert aliases(discovery) == ["m"]
    assert reasons(discovery) == {"m.gguf": f"is the same file as {tmp_path / 'r1' / 'm.gguf'}"}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "disk", tmp_path / "models"
    model(elsewhere / "m.gguf")
    root.mkdir()
    (root / "disk").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    discovery = discover(root)
    assert aliases(discovery) == ["m"]
    assert discovery.skipped == ()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse to make such a name")
def test_a_name_that_no_request_could_spell_is_reported(tmp_path: Path) -> None:
    path = os.fsencode(model(tmp_path / "m.gguf"))
    os.rename(path, path.replace(b"m.gguf", b"\xff.gguf"))
    assert [skipped.reason for skipped in discover(tmp_path).skipped] == [
        "its name is not UTF-8: no request could ask for it"
    ]


def test_only_what_has_changed_a_moment_ago_counts_as_being_written(tmp_path: Path) -> None:
    now = time.time()
    for name, age_sec in (("old", 3600), ("new", 0), ("of-a-clock-that-was-set-back", -3600)):
        os.utime(model(tmp_path / f"{name}.gguf"), (now - age_sec, now - age_sec))
    discovery = discover(tmp_path, settle_sec=60)
    assert aliases(discovery) == ["of-a-clock-that-was-set-back", "old"]
    assert [(skipped.path.name, skipped.settling) for skipped in discovery.skipped] == [("new.gguf", True)]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        discover(tmp_path / "absent")
