"""Requests for engines other than llama-server: the engine's name of the model, and its names of parameters.

llama-server's parameters come from its own clients, and from Ollama's and Anthropic's, whose requests are
translated to them. Parameters that the engine lacks are left out; a request that cannot do without one is refused.
Only top-level keys are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from router.dataplane.routing import Wish
from router.dataplane.shortening import Text
from router.engines.parameters import BINDING, OF_LLAMA_SERVER
from router.http.routes import Dialect, Route

_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_limit = msgspec.json.Decoder(int).decode
_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw] | None).decode
_encode = msgspec.json.encode
_NOTHING = msgspec.Raw(b"null")


class Lacking(Exception):
    """Raised for a parameter that the engine does not have and the request cannot do without."""

    def __init__(self, parameter: str) -> None:
        super().__init__(parameter)
        self.parameter = parameter


def fitted(body: Text, wish: Wish, route: Route | None) -> bytes:
    """Return the body, a JSON object, as the engine of `wish` expects it at `route`.

    Streams are requested with usage, which such engines report nowhere else. Raises Lacking, and `UNREADABLE` of
    `router.http.documents`.
    """
    fields: dict[str, Any] = dict(_fields_of(body))
    if wish.known_as is not None:
        fields["model"] = wish.known_as
    if wish.parameters is not None and route is not None and route.dialect is Dialect.OPENAI:
        _rename(fields, wish.parameters)
        if wish.streams and route.asks in ("chat", "completion"):
            options = _decode_options(fields.get("stream_options", _NOTHING)) or {}
            fields["stream_options"] = {**options, "include_usage": True}
    return _encode(fields)


def _rename(fields: dict[str, Any], parameters: Mapping[str, str]) -> None:
    for name in OF_LLAMA_SERVER.intersection(fields):
        value = fields.pop(name)
        if bytes(value) == b"null":
            continue
        if (theirs := parameters.get(name)) is not None:
            fields.setdefault(theirs, value)
        elif name == "n_predict":
            if _decode_limit(value) >= 0:  # else there is no limit
                fields.setdefault("max_tokens", value)
        elif name == "n_cmpl":
            fields.setdefault("n", value)
        elif name == "json_schema":
            wrapped = {"name": "format", "schema": value}
            fields.setdefault("response_format", {"type": "json_schema", "json_schema": wrapped})
        elif name in BINDING:
            raise Lacking(name)
