"""Arguments of `vllm serve`, as far as the router has to understand them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

OWNED: Mapping[str, str] = {
    "host": "the router chooses where engines listen",
    "port": "the router chooses where engines listen",
    "uds": "the router chooses where engines listen",
    "api-key": "engines have a key of the router's; set api.api_keys for clients",
    "served-model-name": "it is the name of the entry; give further names in `aliases`",
    "model": "set model_path or repo in the entry",
    "root-path": "the router talks to engines without a prefix",
    "ssl-keyfile": "the router talks to engines on this machine without TLS",
    "ssl-certfile": "the router talks to engines on this machine without TLS",
    "headless": "the router needs the API server",
    "enable-sleep-mode": "set `sleep` to true in the entry",
}
"""Flags that are the router's to set, each with the reason."""
_SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-q": "quantization",
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


class Flags:
    """Parsed arguments; the last value of each flag counts, as for argparse."""

    def __init__(self, words: Sequence[str]) -> None:
        self._values = dict(_pairs(words))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str) -> str | None:
        """Return the value of a flag; None if it is missing or has none."""
        return self._values.get(name) or None

    def size(self, name: str) -> int | None:
        """Return a number, also one such as `32k` or `32K`; None if the flag is missing or has another value."""
        found = _SIZE.fullmatch(self.text(name) or "")
        return int(float(found[1]) * _POWERS[found[2]]) if found is not None else None

    def share(self, name: str) -> float | None:
        """Return a share between 0 and 1; None if the flag is missing or has another value."""
        try:
            value = float(self.text(name) or "")
        except ValueError:
            return None
        return value if 0 < value <= 1 else None

    @property
    def devices(self) -> int | None:
        """Number of GPUs that the flags demand; None if they leave it open."""
        sizes = [self.size(f"{way}-parallel-size") for way in ("tensor", "pipeline", "data")]
        if all(size is None for size in sizes):
            return None
        product = 1
        for size in sizes:
            product *= size or 1
        return product


def owned(words: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield the position, name and reason of each argument that is the router's to set."""
    for index, word in enumerate(words):
        name = _name(word)
        if name is not None and name in OWNED:
            yield index, f"--{name}", OWNED[name]


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for index, word in enumerate(words):
        name = _name(word)
        if name is None:
            continue
        _, has_value, value = word.partition("=")
        following = words[index + 1] if index + 1 < len(words) else "-"
        yield name, value if has_value else "" if _name(following) is not None else following


def _name(word: str) -> str | None:
    """Return the name of a flag as vLLM's documentation has it; None for a value."""
    flag = word.partition("=")[0]
    if flag in _SHORT:
        return _SHORT[flag]
    return flag[2:].replace("_", "-") if flag.startswith("--") else None
