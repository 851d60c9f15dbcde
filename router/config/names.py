"""What clients call models, and what these are called here: one rule for all routes.

`NAME` and `NAME:latest` are the same, as with Ollama. What comes from the Hugging Face hub may be named with the
hub's host, in whatever case, and without its quantization: of several of a repository, the one that a pull would
take is meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from router.formats.quantizations import closeness

LONGEST = 256
"""Characters of a name. To look for a longer one, and for what is like it, would keep everybody waiting."""
HUB_HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
ALLOWED = f"up to {LONGEST} printable characters without spaces"
"""What a name may be, for messages."""
_TAG = ":latest"
"""Of what has none."""


class Names(Protocol):
    """All that there are."""

    def __contains__(self, name: object, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


def is_alias(text: str) -> bool:
    """Whether a model, an alias or a client can have this name."""
    return 0 < len(text) <= LONGEST and text.isprintable() and not any(map(str.isspace, text))


def meant(name: str, names: Names) -> str | None:
    """The one of the `names` that a client means."""
    return min(candidates(name, names), key=_closeness, default=None)


def candidates(name: str, names: Names) -> list[str]:
    """Those of the `names` that a client may mean: several if it leaves the quantization open."""
    if (same := same_name(name, names)) is not None:
        return [same]
    local = _without_host(name)
    if (same := same_name(local, names)) is not None:
        return [same]
    if "/" not in local:
        return []
    folded, of_hub = untagged(local).casefold(), _of_hub(tuple(names))
    if alike := of_hub.whole.get(folded):
        return list(alike) if len(alike) == 1 else []
    return list(of_hub.unquantized.get(folded, ()))


class _OfHub(NamedTuple):
    """Names that may be said in another case and without the hub's host, by how they then are."""

    whole: Mapping[str, Sequence[str]]
    unquantized: Mapping[str, Sequence[str]]


@lru_cache(maxsize=4)
def _of_hub(names: tuple[str, ...]) -> _OfHub:
    whole, unquantized = defaultdict(list), defaultdict(list)
    for name in names:
        if "/" in name:
            folded = _without_host(name).casefold()
            whole[folded].append(name)
            for place, character in enumerate(folded):
                if character == ":":
                    unquantized[folded[:place]].append(name)
    return _OfHub(dict(whole), dict(unquantized))


def _closeness(name: str) -> tuple[object, ...]:
    return closeness(name.rpartition(":")[2].upper())


def same_name(name: str, names: Container[str]) -> str | None:
    """The one of the `names` that is this one, with or without the tag that every name has when it has none."""
    plain = untagged(name)
    return next((same for same in (name, plain, f"{plain}{_TAG}") if same in names), None)


def _without_host(name: str) -> str:
    host, slash, path = name.partition("/")
    return path if slash and host.lower() in HUB_HOSTS else name


def untagged(name: str) -> str:
    return name.removesuffix(_TAG)


def listed_name(alias: str) -> str:
    """How Ollama lists it: no name is without a tag."""
    return alias if ":" in alias.rpartition("/")[2] else f"{alias}{_TAG}"


def some_of(aliases: list[str]) -> str:
    """For people: the first ten."""
    shown = ", ".join(repr(alias) for alias in aliases[:10])
    return f"{shown} and {len(aliases) - 10} more (GET /v1/models)" if len(aliases) > 10 else shown
