"""Translates Ollama's options, which are also the parameters of a Modelfile, to those of llama-server.

Some apply to one response and become request parameters; others apply when a model is loaded and become engine
flags. Sources: api/types.go of Ollama, `--help` of llama-server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_NUMBERS = {
    name: name
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
        "mirostat_tau",
        "mirostat_eta",
    )
}
_INTEGERS = {
    "num_predict": "n_predict",
    "num_keep": "n_keep",
    **{name: name for name in ("top_k", "seed", "repeat_last_n", "mirostat")},
}
_OF_ANSWERS = {**_NUMBERS, **_INTEGERS, "stop": "stop"}
_OLLAMAS = {ours: theirs for theirs, ours in _OF_ANSWERS.items()} | {"max_tokens": "num_predict"}

_UNLIMITED = -1
"""llama-server's value. Ollama accepts any number below 1; llama-server reads 0 as no tokens and rejects -2."""

_FLAGS = {"num_batch": "batch-size", "num_gpu": "n-gpu-layers", "num_thread": "threads"}
_LEFT_TO_THE_ENGINE = {"num_batch": 0, "num_gpu": -1, "num_thread": 0}
OF_LOADS = ("num_ctx", *_FLAGS, "use_mmap")
_LARGEST_FLAG = 2**31 - 1


class BadOption(ValueError):
    """Raised for an invalid value of an option."""

    def __init__(self, name: str, wanted: str) -> None:
        super().__init__(f'option "{name}" must be {wanted}')
        self.param = f"options.{name}"


def request_parameters(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the request parameters among the options; like Ollama, ignore unknown ones. Raises BadOption."""
    translated: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name in _NUMBERS:
            translated[_NUMBERS[name]] = _number(name, value)
        elif name in _INTEGERS:
            number = _integer(name, value)
            if name == "num_predict" and number < 1:
                number = _UNLIMITED
            translated[_INTEGERS[name]] = number
        elif name == "stop":
            translated["stop"] = _texts(value)
    return translated


def unknown_options(options: Mapping[str, Any]) -> list[str]:
    """Return the names of options that are set and not supported."""
    return [name for name, value in options.items() if value is not None and name not in (*_OF_ANSWERS, *OF_LOADS)]


def load_flags(
    options: Mapping[str, Any], slots: int, context: int | None, given: Callable[[str], str | None]
) -> dict[str, str]:
    """Return the flags and values that an engine needs in addition to its current ones; empty if these suffice.

    `slots` is the number of slots that share the context size set by a flag; `context` is the current context of
    each in tokens (None: unknown), and `given` returns the current value of a flag. Raises BadOption.
    """
    return dict(_load_flags(options, slots, context, given))


def _load_flags(
    options: Mapping[str, Any], slots: int, context: int | None, given: Callable[[str], str | None]
) -> Iterator[tuple[str, str]]:
    wanted = options.get("num_ctx")
    if wanted is not None:
        tokens = _integer("num_ctx", wanted)
        if not 1 <= tokens * slots <= _LARGEST_FLAG:
            raise BadOption("num_ctx", f"from 1 to {_LARGEST_FLAG // slots}")
        if context is None or tokens > context:
            yield "--ctx-size", str(tokens * slots)
    for name, flag in _FLAGS.items():
        value = options.get(name)
        if value is None or _integer(name, value) <= _LEFT_TO_THE_ENGINE[name]:
            continue
        if _integer(name, value) > _LARGEST_FLAG:
            raise BadOption(name, f"at most {_LARGEST_FLAG}")
        if given(flag) != str(_integer(name, value)):
            yield f"--{flag}", str(_integer(name, value))
    mapped = options.get("use_mmap")
    if mapped is not None and not isinstance(mapped, bool):
        raise BadOption("use_mmap", "true or false")
    if mapped is False and given("load-mode") != "none":
        yield "--load-mode", "none"


def as_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Translate request parameters back to Ollama's names; those without one are left out."""
    return {_OLLAMAS[name]: value for name, value in parameters.items() if name in _OLLAMAS}


def option_lines(options: Mapping[str, Any]) -> list[str]:
    """Format options as `ollama show` does: one line per value, text in quotes."""
    each = (
        (name, item) for name, value in options.items() for item in (value if isinstance(value, list) else [value])
    )
    return [f"{name:<30} {_quoted(item)}" for name, item in each]


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _integer(name: str, value: Any) -> int:
    return int(_number(name, value))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadOption(name, "a number")
    return value


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadOption("stop", "an array of texts")
    return texts
