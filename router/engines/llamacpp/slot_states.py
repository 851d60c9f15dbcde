"""States of slots: which engines save and restore them, what a state is good for, and how an engine is asked.

Measured on builds 9294 to 11549. An engine takes a state of any model of the same shape without a word and answers
wrongly, and one with another number of streams or other types of its cache is refused. So a state belongs to the
engine's build, to all files that it is started with, and to the flags below. Context size, batches, layers on GPUs
and sampling do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from router.engines.base import Endpoint
from router.engines.llamacpp.capability import error_of_engine
from router.engines.llamacpp.flags import Flags
from router.engines.questions import document
from router.kv.keeper import Said
from router.kv.store import KvStore, Saved

_LIMIT_SEC = 60.0
_MATTERING = ("cache-type-", "control-vector", "kv-unified", "lora", "rope-", "spec-", "yarn-")
_MATTERING_TOO = frozenset(
    {"flash-attn", "grp-attn-n", "grp-attn-w", "model-draft", "override-kv", "parallel", "swa-full"}
)


class _Timings(msgspec.Struct):
    save_ms: float = 0.0
    restore_ms: float = 0.0


class _Saved(msgspec.Struct):
    n_saved: int = 0
    n_written: int = 0
    n_restored: int = 0
    n_read: int = 0
    timings: _Timings = msgspec.field(default_factory=_Timings)


def can_be_saved(flags: Flags) -> bool:
    """Whether an engine with these flags can be told to save states: not where the flags name a folder themselves,
    nor of models that see or hear, nor where nothing is written.

    Nor where several slots share one cache: with each new request, such an engine moves what the other slots hold
    into its cache in RAM, where it does not look for the prompt of a request that names an empty slot.
    """
    shares = flags.slots > 1 and flags.kv_unified
    return not flags.purposes and not shares and flags.last("slot-save-path") is None


def group(files: Sequence[tuple[str, int, int]], build: str, flags: Flags) -> str:
    """Return a name for all that a state depends on. `files`: path, size and modification time of each.

    Its first part is a name for the files alone: see `outdated`.
    """
    mattering = sorted(
        (flag.name, *flag.words)
        for flag in flags.given
        if flag.name in _MATTERING_TOO or flag.name.startswith(_MATTERING)
    )
    return f"{_digest(tuple(files))}-{_digest((build, mattering))}"


def outdated(store: KvStore, model: str, group: str) -> list[Saved]:
    """Return the saved states of a model that no engine can use again, once one with this group has started: those
    of other files. Another build or other flags may come back."""
    files = group.partition("-")[0]
    return [saved for saved in store if saved.model == model and saved.group.partition("-")[0] != files]


def _digest(of: object) -> str:
    return blake2b(repr(of).encode(), digest_size=12).hexdigest()


async def ask(endpoint: Endpoint, slot: int, action: str, name: str) -> Said | None:
    """Ask an engine to `save` or `restore` a slot; None: it does not answer."""
    body = msgspec.json.encode({"filename": name})
    answer = await document(endpoint, f"/slots/{slot}?action={action}", _LIMIT_SEC, body)
    if answer is None:
        return None
    if answer.status != 200:
        error = error_of_engine(answer.status, answer.body)
        return Said(refusal=error.message, is_final=error.is_final)
    try:
        said = msgspec.json.decode(answer.body, type=_Saved)
    except msgspec.MsgspecError:
        return Said(refusal="its answer cannot be read")
    took_ms = said.timings.save_ms or said.timings.restore_ms
    return Said(said.n_saved or said.n_restored, said.n_written or said.n_read, took_ms / 1000)
