"""Engine flags: those of the model's entry, and those derived from other keys and from the model's file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from router.config.draft import Draft
from router.config.errors import did_you_mean
from router.config.problems import KeyPath, dotted
from router.config.schema import ModelEntry, System
from router.engines.llamacpp import adapters
from router.engines.llamacpp.flags import (
    FORMS,
    OWNED,
    OWNED_VARIABLES,
    SPELLINGS,
    Flag,
    FlagError,
    Flags,
    Purpose,
    argv,
    as_started,
    from_environment,
    parse,
)
from router.engines.llamacpp.purpose import SAYS_IF_IT_EMBEDS, flags_for
from router.formats.gguf import GGUF


def final_flags(
    draft: Draft, path: KeyPath, entry: ModelEntry, system: System, mmproj: Path | None, header: GGUF | None
) -> tuple[tuple[str, ...], int]:
    """Return all flags of a model, and its number of slots. Problems go into the draft.

    The entry's own flags come first, then those derived from other keys, then those that the file requires.
    """
    where = (*path, "flags")
    for variable in sorted(OWNED_VARIABLES.intersection(entry.env)):
        draft.problem((*path, "env", variable), "cannot be set: the router sets it itself")
    slots = 0
    try:
        own = parse(entry.flags)
        given = (*from_environment(entry.env), *own)
        named = {flag.name: flag.spelling for flag in given}
        if draft.origin_of((*path, "mmproj")) != draft.file_name and any(map(_is_of_a_projector, given)):
            mmproj = None  # it was only discovered beside the model
        if "parallel" in named:
            slots = Flags(entry.flags, entry.env).slots
    except FlagError as error:
        by_variable = error.index < 0
        draft.problem((*path, "env") if by_variable else (*where, error.index), error.message)
        own, named = parse(entry.flags if by_variable else entry.flags[: error.index]), {}
    for flag in own:
        if flag.name in OWNED:
            draft.problem((*where, flag.index), f"{flag.spelling} cannot be set: {OWNED[flag.name]}")
        elif flag.name not in FORMS:
            message = f"{flag.spelling} is not a flag of any llama-server known here"
            draft.warn((*where, flag.index), message + did_you_mean(flag.spelling, SPELLINGS))
    flags = argv(own)
    origins = [draft.origin_of(where)] if flags else []
    for key, name, *value in _derived_flags(path, entry, system, mmproj):
        rival = next((named[other] for other in _SAME.get(name, (name,)) if other in named), None)
        own_key = key[: len(path)] == path
        if rival is None:
            named[name] = f"--{name}"
            flags += [f"--{name}", *value]
            origins.append(f"--{name} from {dotted(key[len(path) :] if own_key else key)}")
            if name == "parallel":
                slots = int(value[0])
        elif name == "mmproj":
            draft.problem(key, f"is also set by {rival}")
        elif key == (*path, "device"):
            draft.problem(key, f"cpu means -ngl 0, but {rival} is also set: keep one of them")
        elif own_key and key in draft.origins:
            draft.warn(key, f"is overridden by {rival}")
    for name, *value in _flags_of_file(header, flags, {**draft.environ, **entry.env}):
        flags += [f"--{name}", *value]
        origins.append(f"--{name} from its file")
    draft.origins[where] = ", ".join(origins)
    return tuple(flags), slots


def _flags_of_file(
    header: GGUF | None, flags: Sequence[str], environ: Mapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    if header is None or not SAYS_IF_IT_EMBEDS.isdisjoint(environ):
        return ()
    try:
        return tuple(flags_for(header, Flags(flags, environ)))
    except FlagError:  # reported when the model is loaded
        return ()


def _derived_flags(
    path: KeyPath, entry: ModelEntry, system: System, mmproj: Path | None
) -> Iterator[tuple[KeyPath, str] | tuple[KeyPath, str, str]]:
    """Yield the flags derived from other keys: key, flag name, value. The first of a name takes precedence."""
    if mmproj is not None:
        yield (*path, "mmproj"), "mmproj", str(mmproj)
    if entry.device == "cpu":
        yield (*path, "device"), "n-gpu-layers", "0"
    if entry.params is not None:
        for param, name in _PARAMS.items():
            value = getattr(entry.params, param)
            if value is True:
                yield (*path, "params", param), name
            elif value is not None and value is not False:
                yield (*path, "params", param), name, str(value)
    if system.cpu_threads is not None:
        yield ("system", "cpu_threads"), "threads", str(system.cpu_threads)
    if system.use_mmap is False:
        yield ("system", "use_mmap"), "load-mode", "none"
    if system.flash_attention is not None:
        yield ("system", "flash_attention"), "flash-attn", system.flash_attention
    yield ("system", "default_parallel"), "parallel", str(system.default_parallel)


_PARAMS = {
    "n_gpu_layers": "n-gpu-layers",
    "n_ctx": "ctx-size",
    "batch_override": "batch-size",
    "n_batch": "batch-size",
    "parallel_override": "parallel",
    "rope_freq_base": "rope-freq-base",
    "type_k": "cache-type-k",
    "type_v": "cache-type-v",
    "chat_template": "chat-template",
    "embedding": "embedding",
}
_SAME = {"load-mode": ("load-mode", "mmap", "mlock", "direct-io")}
"""Flags with the same meaning: older engines have `--no-mmap`, newer ones `--load-mode`."""


def told_by(flags: tuple[str, ...], environ: Mapping[str, str]) -> tuple[frozenset[Purpose], int | None]:
    """Return the purposes and the token limit set by the flags; neither if they are invalid, which is reported
    elsewhere."""
    try:
        started = as_started(flags, environ)
        return started.purposes, started.most_tokens
    except FlagError:
        return frozenset(), None


_FILES = ("mmproj", "spec-draft-model", "chat-template-file", "grammar-file", "json-schema-file", "control-vector")


def files_of(flags: Flags) -> Iterator[Path]:
    """Yield the files that an engine reads at its start besides the model."""
    yield from (Path(flag.text) for flag in flags.given if flag.name in _FILES)
    yield from map(Path, adapters.files(flags))


def _is_of_a_projector(flag: Flag) -> bool:
    """Whether the flag chooses the model's projector, or disables it."""
    return flag.name in ("mmproj", "mmproj-url") or (flag.name == "mmproj-auto" and flag.negated)
