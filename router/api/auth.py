"""Who may do what: full keys, inference keys, or everybody when none is set. Compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from router.api.errors import ApiError
from router.config import Api

OPEN_PATHS = frozenset({"/health", "/ready", "/live"})


class Keyring:
    """The configured keys."""

    def __init__(self, api: Api) -> None:
        self.set(api)

    def set(self, api: Api) -> None:
        self._full = [key.get_secret_value().encode() for key in api.api_keys]
        self._inference = [key.get_secret_value().encode() for key in api.inference_keys]
        self.required = bool(self._full or self._inference)

    def check(self, headers: Iterable[tuple[bytes, bytes]], *, manages: bool) -> None:
        """Raises ApiError 401 without a valid key, 403 with one that may not manage."""
        if not self.required:
            return
        given = _given_key(headers)
        if given is None:
            raise ApiError(401, "missing_api_key", "Send the API key as `Authorization: Bearer KEY`.")
        # Every key is compared, so that the time tells nothing.
        full = [hmac.compare_digest(given, key) for key in self._full]
        inference = [hmac.compare_digest(given, key) for key in self._inference]
        if any(full):
            return
        if not any(inference):
            raise ApiError(401, "invalid_api_key", "This API key is not valid.")
        if manages:
            raise ApiError(403, "insufficient_permissions", "This API key is for inference only.")


def _given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":  # Anthropic's clients
            return value.strip()
    return None
