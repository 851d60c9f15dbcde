"""Access by API key: full keys, keys for inference, or free access if no key is set. Compared in constant time.

Clients with a key for inference see nothing of the machine that runs the models: no files, processes or ports, no
engine's output, no other client's name, and no alias's system prompt.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from starlette.requests import Request

from router.config.schema import Api
from router.http.errors import ApiError
from router.scheduling.queue import BY_NAME, Priority, PriorityName


@dataclass(frozen=True, slots=True)
class Client:
    """A client that may only use models, identified by its key for inference."""

    name: str
    """Empty for a key in `inference_keys`."""
    priority: PriorityName | None
    """Priority of requests that name none; None: that of their model."""
    highest: Priority
    owner: str
    """Whose conversations its requests belong to: its name, or what stands for a key without one."""
    kv_store: bool = True
    """Whether they may be saved."""


def sees_all(request: Request) -> bool:
    """Whether the requester has full access: by a full key, or because no keys are configured."""
    return request.state.client is None


class Keyring:
    """The configured keys."""

    def __init__(self, api: Api) -> None:
        self.set(api)

    def set(self, api: Api) -> None:
        self._full = [key.get_secret_value().encode() for key in api.api_keys]
        keys = [key.get_secret_value().encode() for key in api.inference_keys]
        self._inference = [(key, Client("", None, Priority.HIGH, _standing_for(key))) for key in keys]
        for name, entry in api.clients.items():
            client = Client(name, entry.priority, BY_NAME[entry.highest_priority], name, entry.kv_store)
            self._inference.append((entry.key.get_secret_value().encode(), client))
        self.required = bool(self._full or self._inference)

    def check(self, headers: Iterable[tuple[bytes, bytes]], *, manages: bool) -> Client | None:
        """Return the client; None for full access. Of two keys, one has to be valid.

        Raises ApiError 401 without a valid key, 403 if `manages` is set and no key has full access.
        """
        if not self.required:
            return None
        given = _given_keys(headers)
        if not given:
            raise ApiError(401, "missing_api_key", "Send an API key as `Authorization: Bearer KEY`.")
        # All keys are compared, so that the time taken reveals nothing.
        full = [hmac.compare_digest(one, key) for one in given for key in self._full]
        inference = [client for one in given for key, client in self._inference if hmac.compare_digest(one, key)]
        if any(full):
            return None
        if not inference:
            raise ApiError(401, "invalid_api_key", "This API key is not valid.")
        if manages:
            raise ApiError(403, "insufficient_permissions", "This API key is for inference only.")
        return inference[0]


def _standing_for(key: bytes) -> str:
    """Return a name for an unnamed key that no client can have: names begin neither with `_` nor with a space."""
    return f"_{blake2b(key, digest_size=8).hexdigest()}"


def _given_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Return the key of each header: Anthropic's clients send both, one perhaps with a key for other servers."""
    given: dict[bytes, bytes] = {}
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            given.setdefault(name, value[7:].strip())
        elif name == b"x-api-key":
            given.setdefault(name, value.strip())
    return list(given.values())
