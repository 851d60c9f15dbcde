"""Stories about folders full of models."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path, PurePath
from typing import Any

import pytest
from hf_models import LLAMA, write_model
from tiny_models import RawTensor, gguf_bytes, write_embedding, write_llama, write_projector

from router.formats import gguf
from router.formats.gguf import GGUF
from router.store.discovery import SETTLE_SEC, Discovery, Headers, discover, fits, projector_of


def model(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_llama(path, n_layer=1)


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


UNUSED = "is a projector that no model in its folder uses"


def test_a_projector_of_another_width_or_another_name_is_left_alone(tmp_path: Path) -> None:
    """llama-server does not start with the one, and makes nothing of the other."""
    model(tmp_path / "one" / "gemma-3-1b-it-Q8_0.gguf")
    write_projector(tmp_path / "one" / "mmproj-gemma-3-4b-it-f16.gguf", n_embd=2560)
    (tmp_path / "two").mkdir()
    write_llama(tmp_path / "two" / "qwen3-8b.gguf", n_layer=1, name="Qwen3 8B")
    write_projector(tmp_path / "two" / "mmproj-F16.gguf", name="Gemma 3 4b It")
    discovery = discover(tmp_path)
    assert projectors(discovery) == {"gemma-3-1b-it-Q8_0": None, "qwen3-8b": None}
    assert reasons(discovery) == {"mmproj-gemma-3-4b-it-f16.gguf": UNUSED, "mmproj-F16.gguf": UNUSED}


@pytest.mark.parametrize(
    ("model_name", "projector_name", "goes"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M", "mmproj-Qwen2.5-VL-7B-Instruct-f16", False),
        ("Qwen2.5-VL-7B-Instruct-Q4_K_M", "mmproj-Qwen2.5-VL-7B-Instruct-f16", True),
        ("qwen2-7b", "mmproj-qwen2-audio-7b", False),
        ("granite-3.2-2b-it", "granite-vision-3.2-2b-mmproj-f16", False),
        ("granite-vision-3.2-2b", "granite-vision-3.2-2b-mmproj-f16", True),
        ("Llama-3.2-1B-Instruct", "mmproj-ultravox-v0_5-llama-3_2-1b-f16", True),  # which is made for that
        ("gemma-3-4b-it", "mmproj-vision-f16", True),
    ],
)
def test_a_projector_for_a_sister_that_sees_or_hears_is_left_alone(
    tmp_path: Path, model_name: str, projector_name: str, goes: bool
) -> None:
    """Of the same width, and nearly the same name."""
    write_llama(tmp_path / f"{model_name}.gguf", n_layer=1, name="")
    write_projector(tmp_path / f"{projector_name}.gguf", name="")
    (chosen,) = projectors(discover(tmp_path)).values()
    assert (chosen is not None) == goes


@pytest.mark.parametrize(
    ("architecture", "kind", "goes"),
    [
        ("qwen2", "qwen2.5vl_merger", False),
        ("qwen2vl", "qwen2.5vl_merger", True),
        ("qwen3", "qwen3vl_merger", False),
        ("qwen35", "qwen3vl_merger", True),
        ("llama", "qwen2vl_merger", True),  # Sarashina2-Vision
        ("qwen2", "qwen2a", True),
        ("qwen2", "internvl", True),
    ],
)
def test_a_projector_fits_no_architecture_that_takes_no_pictures(architecture: str, kind: str, goes: bool) -> None:
    def header(*metadata: tuple[str, str, Any]) -> GGUF:
        raw = gguf_bytes(list(metadata), [])
        return gguf.parse(raw, file_bytes=len(raw))

    seer = header(("general.architecture", "str", "clip"), ("clip.projector_type", "str", kind))
    assert fits(header(("general.architecture", "str", architecture)), seer) == goes


def test_the_width_of_a_projector_is_what_was_written_down_unless_no_tensor_has_it(tmp_path: Path) -> None:
    chat = gguf.read(write_llama(tmp_path / "chat.gguf", n_layer=1, n_embd=64))

    def projecting(*metadata: tuple[str, str, Any], shape: tuple[int, int]) -> GGUF:
        tensors = [
            RawTensor("v.blk.0.ffn_up.weight", (64, 8), 0, 2048),
            RawTensor("mm.2.weight", shape, 0, 4 * shape[0] * shape[1]),
        ]
        raw = gguf_bytes([("general.architecture", "str", "clip"), *metadata], tensors)
        return gguf.parse(raw, file_bytes=len(raw))

    said = "clip.vision.projection_dim"
    assert fits(chat, projecting((said, "u32", 64), shape=(96, 64)))
    # So it is with gemma-3-1b, which is as wide as the encoder for gemma-3-4b.
    assert not fits(chat, projecting((said, "u32", 96), shape=(96, 64)))
    # LLaVA's first converter wrote down what CLIP itself projects to.
    assert fits(chat, projecting((said, "u32", 768), shape=(96, 64)))
    assert not fits(chat, projecting((said, "u32", 768), shape=(96, 96)))
    assert fits(chat, projecting(shape=(96, 64)))


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
        "mtp-good.gguf": "is a draft for speculative decoding, not a model of its own: give it to its model with "
        "--spec-draft-model",
        "dangling.gguf": "No such file or directory",
        "loop.gguf": "Too many levels of symbolic links",
        "pipe.gguf": "is not a regular file",
    }


DRAFT = "is a draft for speculative decoding, not a model of its own: give it to its model with --spec-draft-model"


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("eagle3", DRAFT),
        ("dflash", DRAFT),
        ("dream", "is a diffusion model, which llama-server does not run"),
        ("controlvector", "is a control vector, not a model: give it to one with --control-vector"),
        ("wavtokenizer-dec", "is a vocoder, which turns the output of another model into sound"),
        ("t5", "is an encoder with a decoder, which llama-server does not run"),
        ("flux", "has no vocabulary: it is no model that reads or writes text"),
    ],
)
def test_what_neither_chats_nor_embeds_is_named_with_what_it_is(
    tmp_path: Path, architecture: str, reason: str
) -> None:
    metadata = [("general.architecture", "str", architecture)]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(metadata, [RawTensor("blk.0.w", (8,), 0, 32)]))
    discovery = discover(tmp_path)
    assert (aliases(discovery), reasons(discovery)) == ([], {"m.gguf": reason})


def test_layers_that_predict_tokens_are_no_model_without_the_others(tmp_path: Path) -> None:
    """As converters write them for speculative decoding, under whatever name."""
    metadata = [
        ("general.architecture", "str", "qwen35"),
        ("tokenizer.ggml.model", "str", "gpt2"),
        ("qwen35.block_count", "u32", 3),
        ("qwen35.nextn_predict_layers", "u32", 1),
    ]
    for name, layers in (("whole", range(3)), ("rest", range(2, 3))):
        tensors = [RawTensor(f"blk.{layer}.attn_norm.weight", (8,), 0, 32) for layer in layers]
        (tmp_path / f"{name}.gguf").write_bytes(gguf_bytes(metadata, tensors))
    discovery = discover(tmp_path)
    assert (aliases(discovery), reasons(discovery)) == (["whole"], {"rest.gguf": DRAFT})


def test_a_model_with_tensors_of_types_that_only_other_engines_know_is_offered(tmp_path: Path) -> None:
    metadata = [("general.architecture", "str", "llama"), ("tokenizer.ggml.model", "str", "gpt2")]
    tensors = [RawTensor("blk.0.ffn_up.weight", (256, 2), 139, 320), RawTensor("output.weight", (8,), 0, 32)]
    (tmp_path / "forked.gguf").write_bytes(gguf_bytes(metadata, tensors))
    assert aliases(discover(tmp_path)) == ["forked"]


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


def test_what_programs_that_download_have_not_finished_is_not_offered(tmp_path: Path) -> None:
    for name, beside in (("a", "a.gguf.aria2"), ("b", "b.gguf.part"), ("c", "c.gguf.crdownload"), ("d", "d.part")):
        model(tmp_path / f"{name}.gguf")
        (tmp_path / beside).touch()
    write_llama(tmp_path / "e.gguf", parts=2)
    (tmp_path / "e-00002-of-00002.gguf.aria2").touch()
    discovery = discover(tmp_path)
    assert aliases(discovery) == ["d"]
    assert {name: reason.split()[3] for name, reason in reasons(discovery).items()} == {
        "a.gguf": "a.gguf.aria2",
        "b.gguf": "b.gguf.part",
        "c.gguf": "c.gguf.crdownload",
        "e-00001-of-00002.gguf": "e-00002-of-00002.gguf.aria2",
    }


def test_a_download_that_has_reserved_its_size_and_stopped_is_not_offered(tmp_path: Path) -> None:
    """A hole as large as a tensor tells; zeros that were written, and smaller holes, do not."""
    whole = write_llama(tmp_path / "whole.gguf", target_bytes=12 << 20).read_bytes()
    for name, arrived in (
        ("begun", 2 << 20),
        ("nearly", len(whole) - (2 << 20)),
        ("but-for-a-page", len(whole) - 4096),
    ):
        with (tmp_path / f"{name}.gguf").open("wb") as file:
            file.write(whole[:arrived])
            file.truncate(len(whole))
    (tmp_path / "zeros.gguf").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    discovery = discover(tmp_path)
    if "begun" in aliases(discovery):
        pytest.skip("this file system does not tell of holes")
    assert aliases(discovery) == ["but-for-a-page", "whole", "zeros"]
    assert {reason.partition("tensor")[0] for reason in reasons(discovery).values()} == {"is incomplete: its "}


def test_a_file_that_is_replaced_is_what_it_was_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path, old = model(tmp_path / "m.gguf"), time.time() - 60
    os.utime(path, (old, old))
    before = Headers()
    (found,) = discover(tmp_path, before, settle_sec=SETTLE_SEC).models
    new = write_llama(tmp_path / "new", context_length=512).read_bytes()

    def look(content: bytes, age_sec: float) -> tuple[int | None, bool, bool]:
        path.write_bytes(content)
        os.utime(path, (time.time() - age_sec,) * 2)
        headers = Headers(before)
        (found,) = discover(tmp_path, headers, settle_sec=SETTLE_SEC).models
        return found.model.context_length, headers.identity(path) != before.identity(path), headers.settling

    assert found.model.context_length == 2048
    assert look(new, 0) == (2048, False, True)
    assert look(new[:-4096], 5) == (2048, False, False)
    assert look(new, 5) == (512, True, False)


def test_only_what_has_changed_a_moment_ago_counts_as_being_written(tmp_path: Path) -> None:
    now = time.time()
    for name, age_sec in (("old", 3600), ("new", 0), ("of-a-clock-that-was-set-back", -3600)):
        os.utime(model(tmp_path / f"{name}.gguf"), (now - age_sec, now - age_sec))
    discovery = discover(tmp_path, settle_sec=60)
    assert aliases(discovery) == ["of-a-clock-that-was-set-back", "old"]
    assert [(skipped.path.name, skipped.reason) for skipped in discovery.skipped] == [
        ("new.gguf", "is still being written")
    ]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        discover(tmp_path / "absent")


# --- models in safetensors ------------------------------------------------------------------------------------


def test_a_folder_in_safetensors_is_a_model_of_its_name(tmp_path: Path) -> None:
    write_model(tmp_path / "org" / "Qwen3 0.6B", shards=2)
    write_model(tmp_path / "a")
    model(tmp_path / "a.gguf")
    model(tmp_path / "org" / "Qwen3 0.6B" / "Qwen3-Q8_0.gguf")
    discovery = discover(tmp_path)
    assert {found.alias: found.path.name for found in discovery.models} == {
        "a": "a.gguf",  # keeps its name
        "a/": "a",
        "Qwen3-Q8_0": "Qwen3-Q8_0.gguf",
        "Qwen3-0.6B": "Qwen3 0.6B",
    }
    assert discovery.skipped == ()
    assert aliases(discover(tmp_path / "a")) == ["a"]


def test_of_models_in_safetensors_only_whole_ones_are_offered(tmp_path: Path) -> None:
    folders = {name: write_model(tmp_path / name, shards=2) for name in ("cut", "missing", "loading", "part")}
    last = "model-00002-of-00002.safetensors"
    (folders["cut"] / last).write_bytes((folders["cut"] / last).read_bytes()[:-1])
    (folders["missing"] / last).unlink()
    (folders["loading"] / f"{last}.aria2").touch()
    write_model(folders["part"], {"in_features": 9}, shards=2)
    (tmp_path / "only-settings").mkdir()
    (tmp_path / "only-settings" / "config.json").write_text("{}")
    discovery = discover(tmp_path)
    assert discovery.models == ()
    told = reasons(discovery)
    assert told.keys() == folders.keys()
    assert told["cut"].startswith(f"{last}: is incomplete")
    assert told["missing"] == f"is incomplete: 1 of 2 files are missing: {last}"
    assert told["loading"] == f"is incomplete, as {last}.aria2 beside it shows: remove that if it is a leftover"
    assert told["part"] == "its config.json names no kind of model"


def test_a_model_in_safetensors_is_what_it_was_until_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    before = Headers()
    first = before.of_folder(folder)
    (folder / "model.safetensors").unlink()
    now = Headers(before)
    assert now.of_folder(folder) == first
    write_model(folder, {**LLAMA, "max_position_embeddings": 99})
    os.utime(folder / "model.safetensors", (1, 1))
    os.utime(folder / "config.json", (1, 1))
    os.utime(folder / "tokenizer_config.json", (1, 1))
    assert Headers(now).of_folder(folder).context == 99


def test_a_tensor_that_has_only_been_reserved_makes_a_folder_incomplete(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tensors=dict.fromkeys(("first", "second"), ("F32", (1 << 9, 1 << 10))))
    assert reasons(discover(tmp_path)) == {"m": "is incomplete: its tensor 'second' has not been written yet"}
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"\1" * (1 << 20))
    assert aliases(discover(tmp_path)) == ["m"]
