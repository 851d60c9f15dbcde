"""What pages in a browser may do here: by which names they may call the router, and from which origins.

Every request passes by here, those of the data plane too; where no browser sent it, that costs next to nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from router.api.errors import ApiError
from router.config import Api

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OF_THIS_MACHINE = "host.docker.internal"
"""What containers call the machine that they run on. Public name servers know no such name."""
_UNKNOWN_HOST = (
    "This router listens for this machine only, and does not know the name in your Host header. "
    "Add it to api.allowed_hosts if it is yours."
)


_EXPOSED = (
    "X-Request-Id",
    "X-Model-Alias",
    "X-Queue-Ms",
    "X-Load-Ms",
    "X-Queue-Position",
    "X-Queue-Expected-Ms",
    "X-Queue-Reason",
    "X-Request-Priority",
    "Retry-After",
    "X-Should-Retry",
)
_OLLAMAS_ORIGINS = (
    *(f"{scheme}://{name}:*" for name in ("localhost", "127.0.0.1", "0.0.0.0") for scheme in ("http", "https")),  # noqa: S104
    *(f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
)
"""Those that Ollama allows without being told (envconfig/config.go), for what was written for it."""
_OLLAMAS_ROUTES = "/api/"
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class Browsers:
    """The configured names and origins."""

    def __init__(self, api: Api) -> None:
        self._hosts = _answered_hosts(api)
        self._all_may = "*" in api.cors_origins
        self._configured = _matching(api.cors_origins)
        self._ollamas = _matching((*api.cors_origins, *_OLLAMAS_ORIGINS))

    def check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises ApiError 403."""
        if not self._hosts:
            return
        host = _without_port(headers.get(b"host", b"localhost"))
        if host not in self._hosts and not _cannot_be_rebound(host):
            raise ApiError(403, "unknown_host", _UNKNOWN_HOST)

    def cross_origin(self, app: ASGIApp) -> ASGIApp:
        """`app`, for requests with an Origin header."""
        of_ollama, of_others = (self._middleware(app, path) for path in (_OLLAMAS_ROUTES, "/"))

        async def for_browsers(scope: Scope, receive: Receive, send: Send) -> None:
            of_its_path = of_ollama if scope["path"].startswith(_OLLAMAS_ROUTES) else of_others
            await of_its_path(scope, receive, send)

        return for_browsers

    def _middleware(self, app: ASGIApp, path: str) -> CORSMiddleware:
        return CORSMiddleware(
            app,
            allow_origins=["*"] if self._all_may else [],
            allow_origin_regex=self._allowed(path).pattern,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )

    def origin_lines(self, origin: bytes, path: str) -> bytes:
        """Headers of an answer to a page of this origin, as `cross_origin` adds them to its app's."""
        lines = b"access-control-expose-headers: %b\r\nvary: Origin\r\n" % ", ".join(_EXPOSED).encode()
        if self._all_may:
            return lines + b"access-control-allow-origin: *\r\n"
        if self._allowed(path).fullmatch(origin.decode("latin-1")):
            return lines + b"access-control-allow-origin: %b\r\n" % origin
        return lines

    def _allowed(self, path: str) -> re.Pattern[str]:
        return self._ollamas if path.startswith(_OLLAMAS_ROUTES) else self._configured


def _matching(origins: Iterable[str]) -> re.Pattern[str]:
    """What an origin must match in full to be one of these, as `api.cors_origins` has them, but for `*`."""
    return re.compile("|".join(_expression(origin) for origin in origins if origin != "*") or "(?!)")


def _expression(origin: str) -> str:
    """`*` is any part of a host, and as a port any, also the default one, which browsers leave out."""
    scheme, _, rest = origin.lower().partition("://")
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]"):
        host, port = rest, ""
    numbers = "[0-9]+" if port == "*" else port
    wanted = f":{numbers}" if numbers else ""
    if port == "*" or (port and port == _DEFAULT_PORTS.get(scheme)):
        wanted = f"(?:{wanted})?"
    return f"{re.escape(scheme)}://" + re.escape(host).replace(r"\*", "[^/:]*") + wanted


def _answered_hosts(api: Api) -> frozenset[bytes]:
    """On a loopback address: the names that mean it. Else nobody can tell, and the set is empty.

    A page that has pointed its own name at 127.0.0.1 (DNS rebinding) shares its origin with what listens there,
    so that no rule of the browser keeps it out; but its name is in the Host header.
    """
    if api.host not in _LOOPBACK:
        return frozenset()
    return frozenset(name.lower().encode() for name in (*_LOOPBACK, _OF_THIS_MACHINE, *api.allowed_hosts))


def _cannot_be_rebound(host: bytes) -> bool:
    """Whether no page can have pointed this at us: an address is no name, and .localhost asks no name server."""
    if host.endswith(b".localhost"):
        return True
    try:
        ipaddress.ip_address(host.decode("latin-1"))
    except ValueError:
        return False
    return True


def _without_port(host: bytes) -> bytes:
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0]
    return host.partition(b":")[0].lower()
