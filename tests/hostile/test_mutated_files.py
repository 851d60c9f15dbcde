"""Model files with anything in their headers: each is read and sized, or unreadable with a reason."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

from mutations import LONG, SEED, mutated
from tiny_models import QUANTIZED_TYPES, RawTensor, gguf_bytes

from router.catalog.cards import card_of
from router.engines.llamacpp.flags import FlagError, Flags
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.llamacpp.purpose import flags_for
from router.engines.llamacpp.sizing import Sizer, read_files
from router.formats.gguf_cursor import GGUFError
from router.memory.measurements import Learned
from router.memory.plan import Unusable
from router.store.discovery import Headers, Survey
from router.system.devices import HOST, Device

_COUNT = 50_000 if LONG else 300
_FLAGS: tuple[tuple[str, ...], ...] = (
    (),
    ("-c", "4096"),
    ("-np", "2"),
    ("-fa", "off"),
    ("-ctk", "q8_0"),
    ("-ngl", "1"),
    ("-c", "0", "--swa-full"),
)
_ARCHITECTURES = json.loads((Path(__file__).parents[1] / "engines" / "llamacpp" / "archs_11434.json").read_text())
_ODD: tuple[tuple[str, Any], ...] = (
    *(("u32", value) for value in (0, 1, 2, 3, 7, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)),
    *(("i32", value) for value in (-1, -(1 << 31))),
    *(("u64", value) for value in (0, 1 << 40, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)),
    ("i64", -(1 << 63)),
    *(("f32", value) for value in (0.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 3e38)),
    ("f64", 1e308),
    ("bool", True),
    *(("str", value) for value in ("", "llama", "9" * 5000, "clip", "\x1b[31m", "\u202e")),
    *(("[u32]", value) for value in ((), (0,), (1,), (1, 0) * 40, ((1 << 32) - 1,) * 3)),
    *(("[i32]", value) for value in ((-1, -1), (-(1 << 31),))),
    ("[f32]", (math.nan,) * 4),
    ("[bool]", (True, False)),
    ("[str]", ("a", "b")),
)


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        return f"[{_type_of(value[0])}]" if value else "[u32]"
    kind = {bool: "bool", int: "u32", float: "f32", str: "str"}[type(value)]
    return "i32" if kind == "u32" and value < 0 else kind


def _header(chance: random.Random) -> bytes:
    """Of a model of any architecture: some of its keys say what no model says, or some bytes are wrong."""
    metadata = chance.choice(list(_ARCHITECTURES.values()))["metadata"]
    architecture = metadata["general.architecture"]
    keys = {key: (_type_of(value), value) for key, value in metadata.items()}
    further = ("general.alignment", "general.type", "general.file_type", "split.count", "split.no", "pooling_type")
    further += ("vocab_size", "context_length", "rope.dimension_count", "expert_count")
    if chance.random() < 0.7:
        for key in chance.sample([*keys, *further], chance.randint(1, 4)):
            named = key if key in keys or key.startswith(("general", "split")) else f"{architecture}.{key}"
            keys[named] = chance.choice(_ODD)
    if chance.random() < 0.9:
        keys["tokenizer.ggml.tokens"] = ("[str]", ("a", "b", "c"))
        keys["tokenizer.ggml.model"] = ("str", "gpt2")
    shape = chance.choice((*[(64, 4)] * 5, (64, 1 << 20), (64, 4, 2, 2), (0, 4), (1 << 54, 2)))
    names = ("token_embd.weight", "blk.0.attn_k.weight", f"blk.{'9' * 30}.x", "output.weight", "mm.0.weight")
    tensors = []
    for index, name in enumerate(chance.sample(names, 3)):
        number, block, nbytes = chance.choice(list(QUANTIZED_TYPES.values()))
        number, block, nbytes = (0, 1, 4) if block > 32 else (number, block, nbytes)
        own = shape if index == 1 else (64, 4)
        tensors.append(RawTensor(name, own, number, math.prod(own) // block * nbytes))
    told = gguf_bytes([(key, *value) for key, value in keys.items()], tensors, data=False)
    return mutated(chance, told) if chance.random() < 0.4 else told


def _write(path: Path, header: bytes) -> None:
    path.write_bytes(header)
    os.truncate(path, len(header) + (1 << 30))  # a hole, for whatever is said to lie there


def _look_at(path: Path, flags: Flags) -> None:
    """As the router does: to list it, to find it in a folder, to size it. Raises what broken files raise."""
    card_of(LlamaCppModel("a", path, ()))
    survey = Survey(Headers())
    header = survey.read(path)
    assert all(skipped.reason for skipped in survey.skipped)
    if header is not None:
        asked = [word for name, *value in flags_for(header, flags) for word in (f"--{name}", *value)]
        flags = Flags([*asked, *(word for flag in flags.given for word in flag.words)])
    sizer = Sizer(read_files(path, flags), flags, {}, None, Learned())
    for gpus in (0, 2):
        size = sizer.parts((), gpus, {}) if sizer.knows_parts else sizer.whole([1] * gpus)
        assert size is not None
        assert all(mib >= 0 for mib in size.mib.values()), size.mib
    if sizer.knows_parts:
        assert sizer.largest_context((), {HOST: 8000, Device.shown(0): 4000}) >= 0


def test_every_header_is_sized_or_unreadable_with_a_reason(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    path = tmp_path / "model.gguf"
    sized = 0
    for number in range(_COUNT):
        header = _header(chance)
        _write(path, header)
        try:
            _look_at(path, Flags(chance.choice(_FLAGS)))
            sized += 1
        except (GGUFError, Unusable, FlagError):
            pass
        except Exception as error:
            kept = tmp_path.parent / f"breaks-{number}.gguf"
            kept.write_bytes(header)
            raise AssertionError(f"header {number}, kept at {kept}") from error
    assert sized > _COUNT / 5
