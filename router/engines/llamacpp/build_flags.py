"""Translation of a model's flags to those of the installed llama-server, as builds rename and drop flags.

The flags of a build are read from its own `--help`. A flag with another name, or with a successor, is translated
in either direction, so that a configuration for another build means the same. Flags without an equivalent are
reported and passed on unchanged; the engine decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from router.engines.llamacpp.flags import AUTO_SLOTS, FORMS, Flag, canonical

_ENTRY = re.compile(r"((?:--?\w[\w.-]*,\s+)*--?\w[\w.-]*)( \S)?")
_REMOVED = "the argument has been removed"
"""Help text of a flag that is only kept to be rejected."""
_EXPECTED = ("--model", "--port")
"""Flags that every llama-server's help lists."""

_DEFAULT_SLOTS = re.compile(r"--parallel N\s.*?\(default: (-?\d+)", re.DOTALL)

_LOADING = ("mmap", "mlock", "direct-io", "load-mode")
"""Flags that together determine how weights are loaded."""
_MODES = {"auto": (True, False), "mmap": (True, False), "none": (False, False), "mlock": (False, True)}
_MODES |= {"mmap+mlock": (True, True), "dio": (False, False)}
"""Values of `--load-mode`: whether it maps and whether it locks."""
_DRAFTS = {"draft": "max", "draft-min": "min"}
"""Flags for the number of drafted tokens: formerly one, now one for each method of speculation."""
_NGRAMS = "ngram-mod"

Has = Mapping[str, bool]
"""Spellings of all flags of a build, and whether each takes a value."""


class Spoken(NamedTuple):
    words: tuple[str, ...]
    """Arguments for the command line."""
    unknown: tuple[str, ...]
    """Flags without an equivalent, as written."""


def read_help(text: str) -> Has:
    """Parse a help text; empty if it is not that of a llama-server."""
    has: dict[str, bool] = {}
    for entry in re.split(r"\n(?=-)", "\n" + text)[1:]:
        if (head := _ENTRY.match(entry)) is None or _REMOVED in " ".join(entry.split()):
            continue
        has |= dict.fromkeys(re.split(r",\s+", head[1]), head[2] is not None)
    return has if all(spelling in has for spelling in _EXPECTED) else {}


def default_slots(text: str) -> int:
    """Return a build's default number of slots by its help; negative: it decides itself."""
    found = _DEFAULT_SLOTS.search(text)
    return int(found[1]) if found is not None else -1


def slots_told(given: Sequence[Flag], has: Has) -> Sequence[Flag]:
    """Add the number of slots for builds before December 2025, which do not understand `--parallel -1`.

    The last of these builds also turn one slot into four unless it shares its cache, which makes no difference for
    a single slot.
    """
    last = next((flag for flag in reversed(given) if flag.name == "parallel"), None)
    if last is None or last.integer() > 1:
        return given
    count = AUTO_SLOTS if last.integer() < 0 else last.integer()
    told = [replace(last, spelling="--parallel", values=(str(count),), index=max(0, last.index))]
    if "--kv-unified" in has:
        told.append(Flag("kv-unified", "--kv-unified", index=max(0, last.index)))
    return [*(flag for flag in given if flag is not last), *told]


def spoken(given: Sequence[Flag], has: Has) -> Spoken:
    """Translate flags. `given` begins with those set by the environment, which an engine reads itself if it knows
    them."""
    words: list[str] = []
    unknown: list[str] = []
    loading = [flag for flag in given if flag.name in _LOADING]
    if all(_as_written(flag, has) is not None for flag in loading):
        loading = []
    else:
        words += _loading(loading, has)
    for flag in given:
        if flag in loading:
            continue
        written = _as_written(flag, has)
        if written is None:
            written = _succeeded(flag, given, has)
        elif flag.index < 0:
            continue
        if written is None:
            unknown.append(flag.spelling)
            written = flag.words if flag.index >= 0 else ()
        words += written
    return Spoken(tuple(words), tuple(dict.fromkeys(unknown)))


def _as_written(flag: Flag, has: Has) -> tuple[str, ...] | None:
    """Return the flag in a spelling that the build has; None if there is none."""
    form = FORMS.get(flag.name)
    known = () if form is None else form.negations if flag.negated else form.spellings
    for spelling in (flag.spelling, *known):
        takes_value = has.get(canonical(spelling))
        if takes_value is None:
            continue
        if flag.values and not takes_value:  # --flash-attn, before September 2025
            return {"on": (spelling,), "off": (), "auto": ()}.get(flag.text)
        return (spelling, *flag.values)
    return None


def _succeeded(flag: Flag, given: Iterable[Flag], has: Has) -> tuple[str, ...] | None:
    """Return an equivalent flag of the build; None if there is none."""
    types = [other.text for other in given if other.name == "spec-type"]
    drafts = _NGRAMS if types and _NGRAMS in types[-1] and "draft" not in types[-1] else "draft"
    for older, end in _DRAFTS.items():
        newer = f"spec-{drafts}-n-{end}"
        if flag.name in (older, newer):
            heir = FORMS[newer if flag.name == older else older]
            return next(((spelling, *flag.values) for spelling in heir.spellings if spelling in has), None)
    return None


def _loading(flags: Iterable[Flag], has: Has) -> list[str]:
    """Return the combined effect of several flags, applied in order."""
    maps, locks, direct = True, False, False
    for flag in flags:
        match flag.name:
            case "mmap":
                maps = not flag.negated
            case "mlock":
                locks = True
            case "direct-io":
                direct = not flag.negated
            case _:
                maps, locks = _MODES.get(flag.text, (True, False))
                direct = flag.text == "dio"
    if "--load-mode" in has:
        modes = {
            mapped_and_locked: mode for mode, mapped_and_locked in _MODES.items() if mode not in ("auto", "dio")
        }
        return ["--load-mode", "dio" if direct else modes[maps, locks]]
    wanted = {"--direct-io": direct, "--no-mmap": not maps, "--mlock": locks}
    return [spelling for spelling, is_wanted in wanted.items() if is_wanted and spelling in has]
