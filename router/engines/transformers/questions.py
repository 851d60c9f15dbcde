"""Requests of OpenAI's API as `transformers serve` understands them.

Measured with transformers 5.24.0: it refuses fields that it does not know (422), and ignores many that it does.
What it would ignore is refused here unless it changes nothing; what it has under another name is translated;
hints, and fields that nobody knows, are left out, as llama-server ignores them, too.

It is always asked for a stream: an answer that is not streamed is computed to its end even when nobody waits for
it any more, and everybody else waits until then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from router.config.resolved import ModelConfig
from router.engines.manner import Question
from router.engines.transformers.answers import Understood
from router.engines.transformers.model import TransformersModel
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError, Unable
from router.http.routes import served_routes
from router.http.tools import OF_CHATS, unreadable

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
ROUTES = frozenset({CHAT, COMPLETION})

MOST_TOKENS = 1024
"""Of an answer whose request sets no limit: the engine's own default."""
_ALL_DEPTHS = 1 << 30
_MESSAGES = 3
"""How deep the roles of messages are, and texts in other lists less."""
_LONGEST_TOKEN_BYTES = 48
"""No text is as long for each of its tokens, even with its characters as `\\uXXXX`. Nobody here can count tokens,
and the engine computes whatever it gets: it takes many GiB for a prompt that is far beyond the context."""
_MEDIA = (b'"image_url"', b'"input_audio"', b'"video_url"', b'"audio_url"', b'"file"')
_SYSTEM = frozenset({"system", "developer"})
_SPEAKERS = {"user": "User", "assistant": "Assistant", **dict.fromkeys(_SYSTEM, "System")}
"""Of the plain template, for models that have none of their own."""
_PLAIN_STOPS = ("\nUser:", "\nSystem:")

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_value_of = msgspec.json.Decoder().decode
_encode = msgspec.json.encode


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value == each and type(value) is type(each) for each in values)


def _is_empty(value: Any) -> bool:
    return not value


def _is_text(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


_IGNORED: Mapping[str, Callable[[Any], bool]] = {
    "n": _one_of(1),
    "best_of": _one_of(1),
    "echo": _is_empty,
    "logprobs": _one_of(False),
    "top_logprobs": _one_of(0),
    "response_format": _is_text,
    "structured_outputs": _is_empty,
    "guided_json": _is_empty,
    "guided_regex": _is_empty,
    "guided_choice": _is_empty,
    "guided_grammar": _is_empty,
    "presence_penalty": _is_empty,
    "parallel_tool_calls": _one_of(True),
    "functions": _is_empty,
    "function_call": _one_of("none"),
    "modalities": lambda value: value == ["text"],
    "audio": _is_empty,
    "web_search_options": lambda _: False,
    "generation_config": lambda _: False,
}
"""Fields that the engine ignores or does not know, and what may be in them because it changes nothing."""
_SAMPLING = {
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
}
"""Fields of llama-server and vLLM that are attributes of a generation configuration."""
_SAMPLERS = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Those that have an effect only where the engine samples; most models do not unless they are told to."""


class Transformers:
    """How `transformers serve` is spoken to: see `Manner`."""

    def depth(self, model: ModelConfig, path: str, body: bytes | memoryview) -> int:
        model = _of_this_kind(model)
        if path == CHAT and (not model.has_template or _may_hold_media(body)):
            return _ALL_DEPTHS
        return _MESSAGES

    def question(self, model: ModelConfig, path: str, body: bytes | memoryview, size: int) -> Question | None:
        if path not in ROUTES:
            return None
        asked = _Asked(_of_this_kind(model), path, body)
        asked.check_size(size)
        return asked.question()


MANNER = Transformers()


def _of_this_kind(model: ModelConfig) -> TransformersModel:
    assert isinstance(model, TransformersModel)
    return model


def _may_hold_media(body: bytes | memoryview) -> bool:
    text = bytes(body)
    return any(name in text for name in _MEDIA)


class _Asked:
    """One request, on its way into the engine's words."""

    def __init__(self, model: TransformersModel, path: str, body: bytes | memoryview) -> None:
        """Raises ApiError for what is no JSON object."""
        self._model = model
        self._path = path
        self._text = body
        try:
            self._raw = _decode(body)
        except UNREADABLE as error:
            raise ApiError(400, "invalid_json", f"The body is not a JSON object: {error}.") from None

    def question(self) -> Question:
        """Raises ApiError 400."""
        for name, changes_nothing in _IGNORED.items():
            value = self._value(name)
            if value is not None and not changes_nothing(value):
                raise self._not_supported(name)
        streams = self._value("stream") is True
        options = self._value("stream_options")
        tells_usage = isinstance(options, dict) and options.get("include_usage") is True
        stops = self._stops()
        as_chat = self._path == CHAT
        asked = {**self._sampled(), "stream": True, "max_tokens": self._limit()}
        path = self._path
        if not as_chat:
            asked |= {"prompt": self._prompt()}
            if "suffix" in self._raw and self._value("suffix"):
                raise self._not_supported("suffix")
        elif self._model.has_template:
            asked |= self._chat()
        else:
            path, stops = COMPLETION, (*stops, *_PLAIN_STOPS)
            asked |= {"prompt": self._as_text()}
        if stops:
            asked["stop"] = stops
        understood_by = partial(
            Understood,
            model=self._model.alias,
            context=self._model.longest,
            as_chat=as_chat,
            streams=streams,
            tells_usage=tells_usage,
            stops=stops,
        )
        return Question(path, _encode(asked), understood_by)

    def check_size(self, size: int) -> None:
        """Raises ApiError 400 for a request of so many bytes that it cannot be within the context."""
        context = self._model.longest
        if context is None or size <= context * _LONGEST_TOKEN_BYTES or _may_hold_media(self._text):
            return
        told = f"This model's maximum context length is {context} tokens, and {size} bytes are more. Shorten them."
        raise ApiError(400, "context_length_exceeded", told)

    # --- fields ----------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Any:
        raw = self._raw.get(name)
        return None if raw is None else _value_of(raw)

    def _number(self, name: str, *, least: float | None = None) -> float | int | None:
        """Raises ApiError 400."""
        value = self._value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or (least is not None and value < least):
            at_least = "" if least is None else f" of at least {least:g}"
            raise _invalid(name, f"`{name}` must be a number{at_least}.")
        return value

    def _limit(self) -> int:
        """How long the answer may be; by default, what the prompt certainly leaves of the context. Raises ApiError
        400."""
        context = self._model.longest
        for name in ("max_completion_tokens", "max_tokens"):
            value = self._value(name)
            if value is None or value == -1:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _invalid(name, f"`{name}` must be a whole number of at least 1.")
            return value if context is None else min(value, context)
        if context is None:
            return MOST_TOKENS
        left = context - len(self._text)  # a byte is a token at most
        return min(MOST_TOKENS, max(left, context // 4))

    def _stops(self) -> tuple[str, ...]:
        """Raises ApiError 400."""
        value = self._value("stop")
        if value is None:
            return ()
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise _invalid("stop", "`stop` must be a text or a list of texts.")
        return tuple(filter(None, stops))

    def _sampled(self) -> dict[str, Any]:
        """How tokens are chosen. Raises ApiError 400."""
        asked: dict[str, Any] = {}
        for name in ("temperature", "top_p"):
            if (value := self._number(name, least=0)) is not None:
                asked[name] = float(value)
        if (seed := self._value("seed")) is not None and seed != -1:
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise _invalid("seed", "`seed` must be a whole number.")
            asked["seed"] = seed
        if penalty := self._number("frequency_penalty", least=0):
            asked["frequency_penalty"] = penalty  # which it takes for a repetition penalty of 1 + x
        settings: dict[str, Any] = {}
        for name, attribute in _SAMPLING.items():
            if (value := self._number(name, least=0)) is not None:
                settings[attribute] = value
        if biases := self._value("logit_bias"):
            if self._path != CHAT or not self._model.has_template:
                raise self._not_supported("logit_bias")
            if not isinstance(biases, dict) or not all(isinstance(each, int | float) for each in biases.values()):
                raise _invalid("logit_bias", "`logit_bias` must map numbers of tokens to numbers.")
            asked["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
        if asked.get("temperature") != 0 and any(name in asked or name in settings for name in _SAMPLERS):
            settings["do_sample"] = True
        if settings:
            asked["generation_config"] = json.dumps(settings)
        return asked

    def _prompt(self) -> str:
        """Raises ApiError 400."""
        prompt = self._value("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            what = "a text; Transformers takes neither several prompts in one request nor tokens"
            raise _invalid("prompt", f"`prompt` must be {what}.")
        return prompt

    # --- chats -----------------------------------------------------------------------------------------------

    def _chat(self) -> dict[str, Any]:
        """Raises ApiError 400."""
        self._check_messages()
        asked: dict[str, Any] = {"messages": self._raw["messages"]}
        choice, tools = self._value("tool_choice"), self._raw.get("tools")
        if choice not in (None, "auto", "none"):
            raise self._not_supported("tool_choice", "it calls tools as it likes (`auto`) or not at all (`none`)")
        if choice != "none" and tools is not None and (offered := _value_of(tools)):
            for index, tool in enumerate(offered if isinstance(offered, list) else [None]):
                if not _is_function(tool):
                    raise unreadable(index, OF_CHATS)
            asked["tools"] = tools
        settings = self._value("chat_template_kwargs") or {}
        if not isinstance(settings, dict):
            raise _invalid("chat_template_kwargs", "`chat_template_kwargs` must be an object.")
        if (effort := self._value("reasoning_effort")) is not None:
            settings = {"reasoning_effort": effort, "enable_thinking": effort != "none", **settings}
        if settings:
            asked["chat_template_kwargs"] = settings
        return asked

    def _check_messages(self) -> None:
        """Raises ApiError 400 for what the engine would call its own error, or leave out without a word."""
        messages = self._messages()
        if self._model.takes_media or not _may_hold_media(self._text):
            return
        for message in messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in ("text", "input_text", "output_text"):
                    told = f"{self._model.alias!r} takes text only, and the messages hold a part of type {kind!r}."
                    raise Unable.to(told, "messages", ModelConfig.takes_images)

    def _messages(self) -> list[dict[str, Any]]:
        """Raises ApiError 400."""
        messages = self._value("messages")
        if not isinstance(messages, list) or not messages:
            raise _invalid("messages", "`messages` must be a list of at least one message.")
        if not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages):
            raise _invalid("messages", "Each of `messages` must be an object with a `role`.")
        return messages

    def _as_text(self) -> str:
        """The conversation by the plain template. Raises ApiError 400."""
        for name in ("tools", "chat_template_kwargs"):
            if self._value(name) and not (name == "tools" and self._value("tool_choice") == "none"):
                raise self._not_supported(name, "the model has no chat template")
        lines = []
        for message in self._messages():
            speaker = _SPEAKERS.get(message["role"])
            if speaker is None:
                told = f"A message has the role {message['role']!r}, and the model has no chat template for it."
                raise _invalid("messages", told)
            lines.append(f"{speaker}: {_text_of(message.get('content'))}\n")
        return f"{''.join(lines)}Assistant:"

    def _not_supported(self, name: str, why: str = "") -> ApiError:
        because = f": {why}" if why else ""
        told = (
            f"{self._model.alias!r} runs on Transformers, which does not support this `{name}`{because}. "
            "Leave it out."
        )
        return Unable.to(told, name, _is_of_another_kind)


def _is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _is_of_another_kind(model: ModelConfig) -> bool:
    """Whether a model answers chats, on an engine that does not ignore parameters."""
    return CHAT in served_routes(model.routes) and not isinstance(model, TransformersModel)


def _text_of(content: Any) -> str:
    """Raises ApiError 400."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            told = "The model takes text only, and the messages hold more."
            raise Unable.to(told, "messages", ModelConfig.takes_images)
        texts.append(text)
    return " ".join(texts)


def _invalid(name: str, message: str) -> ApiError:
    return ApiError(400, "invalid_request", message, name)
