"""HTTP client of a running router, for the commands `top`, `ps`, `queue`, `logs`, `kv` and `rm`.

Based on `http.client`: one request at a time, and a stream of server-sent events read line by line. It uses no
proxy of the environment and follows no redirect, so that the key is sent only to the router.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE = "LLAMA_ROUTER_API_KEY"
_ANSWER_SEC = 10.0
_SILENCE_SEC = 75.0
"""Streams send something every 30 s at the latest."""


class CannotAsk(Exception):
    """Raised when the router does not respond or refuses; the message says why and what to do."""


class Unreachable(CannotAsk):
    """Raised when the router cannot be reached or the connection broke; trying again may help."""


@dataclass(frozen=True, slots=True)
class Happened:
    """One server-sent event."""

    name: str
    text: str
    id: str

    def json(self) -> Any:
        return json.loads(self.text)


class RouterClient:
    """Client of the router at `url`. Raises ValueError if the URL or the key is invalid."""

    def __init__(self, url: str, key: str | None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE} is not a valid key: keys consist of printable ASCII characters")
        self.url = url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> Any:
        """Return the JSON document at `path`. Raises CannotAsk."""
        with self._ask(path, {}, _ANSWER_SEC) as answer:
            return json.loads(answer.read())

    def delete(self, path: str) -> Any:
        """Send DELETE for `path` and return the JSON document of the answer. Raises CannotAsk."""
        with self._ask(path, {}, _ANSWER_SEC, "DELETE") as answer:
            return json.loads(answer.read())

    def text(self, path: str) -> str:
        """Return the plain text at `path`. Raises CannotAsk."""
        with self._ask(path, {}, _ANSWER_SEC) as answer:
            return answer.read().decode(errors="replace")

    def events(self, path: str, after: str = "") -> Iterator[Happened]:
        """Yield server-sent events until the router ends the stream. Raises CannotAsk; Unreachable if it breaks.

        `after` is the id of the last event received: later ones that the router still has come first.
        """
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after else {})}
        with self._ask(path, headers, _SILENCE_SEC) as answer:
            fields: dict[str, list[str]] = {}
            for line in iter(answer.readline, b""):
                name, _, value = line.decode(errors="replace").rstrip("\r\n").partition(":")
                if name:
                    fields.setdefault(name, []).append(value.removeprefix(" "))
                elif fields and not line.strip():
                    if "data" in fields:
                        yield Happened(
                            fields.get("event", ["message"])[-1],
                            "\n".join(fields["data"]),
                            fields.get("id", [""])[-1],
                        )
                    fields = {}

    @contextmanager
    def _ask(
        self, path: str, headers: dict[str, str], timeout_sec: float, method: str = "GET"
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_sec)
        try:
            connection.request(method, self._prefix + path, headers={**self._headers, **headers})
            answer = connection.getresponse()
            if answer.status != 200:
                raise self._refusal(answer)
            yield answer
        except TimeoutError:
            raise Unreachable(f"The router at {self.url} does not answer.") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(f"No router can be reached at {self.url}: {reason}.") from None
        except ValueError:  # not JSON
            raise CannotAsk(f"The server at {self.url} is not a llama-router.") from None
        finally:
            connection.close()

    def _refusal(self, answer: http.client.HTTPResponse) -> CannotAsk:
        try:
            said = json.loads(answer.read())["error"]
            code, message = said["code"], said["message"]
        except (ValueError, KeyError, TypeError):
            return CannotAsk(f"The server at {self.url} is not a llama-router: HTTP {answer.status}.")
        if answer.status == 401:
            return CannotAsk(f"The router at {self.url} requires a valid API key: set {KEY_VARIABLE}.")
        if code == "insufficient_permissions":
            return CannotAsk(f"{message} Set {KEY_VARIABLE} to one of api.api_keys.")
        return CannotAsk(str(message))
