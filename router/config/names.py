"""Matches the model names in requests to configured names, by the same rule for all routes.

`NAME` and `NAME:latest` are equivalent, as with Ollama. Models from the Hugging Face hub may be named with the
hub's host, in any case, and without their quantization: of several models of a repository, the one that a pull
would choose is meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from router.formats.hf_cache import NEW_NAMES
from router.formats.quantizations import closeness

LONGEST = 256
"""Most characters of a name: looking up longer ones, and similar names, would block the event loop."""
HUB_HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
ALLOWED = f"up to {LONGEST} printable characters without spaces"
"""Description of valid names, for messages."""
_TAG = ":latest"
"""The tag of a name without one."""


class Names(Protocol):
    """The names to choose from."""

    def __contains__(self, name: object, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


def is_alias(text: str) -> bool:
    """Whether a model, an alias or a client can have this name."""
    return 0 < len(text) <= LONGEST and text.isprintable() and not any(map(str.isspace, text))


def meant(name: str, names: Names) -> str | None:
    """Return the one of the `names` that a client's name refers to, if any."""
    return min(candidates(name, names), key=_closeness, default=None)


def candidates(name: str, names: Names) -> list[str]:
    """Return those of the `names` that a client may mean: several if it leaves the quantization open."""
    if (same := same_name(name, names)) is not None:
        return [same]
    local = _without_host(name)
    if (same := same_name(local, names)) is not None:
        return [same]
    local = NEW_NAMES.get(local, local)
    if "/" not in local:
        return []
    folded, of_hub = untagged(local).casefold(), _of_hub(tuple(names))
    if alike := of_hub.whole.get(folded):
        return list(alike) if len(alike) == 1 else []
    return list(of_hub.unquantized.get(folded, ()))


class _OfHub(NamedTuple):
    """Names that match in any case and without the hub's host, by their folded forms."""

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
    """Return the one of the `names` that equals `name` up to the tag `:latest`, if any."""
    plain = untagged(name)
    return next((same for same in (name, plain, f"{plain}{_TAG}") if same in names), None)


def _without_host(name: str) -> str:
    host, slash, path = name.partition("/")
    return path if slash and host.lower() in HUB_HOSTS else name


def untagged(name: str) -> str:
    return name.removesuffix(_TAG)


def listed_name(alias: str) -> str:
    """Return a name as Ollama lists it, always with a tag."""
    return alias if ":" in alias.rpartition("/")[2] else f"{alias}{_TAG}"


def some_of(aliases: list[str]) -> str:
    """List the first ten names for a message."""
    shown = ", ".join(repr(alias) for alias in aliases[:10])
    return f"{shown} and {len(aliases) - 10} more (GET /v1/models)" if len(aliases) > 10 else shown
