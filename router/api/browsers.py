"""What pages in a browser may do here: by which names they may call the router, and from which origins.

Every request passes by here, those of the data plane too; where no browser sent it, that costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from router.api.errors import ApiError
from router.config import Api

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
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
)


class Browsers:
    """The configured names and origins."""

    def __init__(self, api: Api) -> None:
        self._hosts = _answered_hosts(api)
        self._origins = api.cors_origins

    def check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises ApiError 403."""
        if self._hosts and _without_port(headers.get(b"host", b"localhost")) not in self._hosts:
            raise ApiError(403, "unknown_host", _UNKNOWN_HOST)

    def cross_origin(self, app: ASGIApp) -> ASGIApp:
        """`app`, for requests with an Origin header."""
        return CORSMiddleware(
            app,
            allow_origins=list(self._origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )

    def origin_lines(self, origin: bytes) -> bytes:
        """Headers of an answer to a page of this origin, as `cross_origin` adds them to its app's."""
        lines = b"access-control-expose-headers: %b\r\nvary: Origin\r\n" % ", ".join(_EXPOSED).encode()
        if "*" in self._origins:
            return lines + b"access-control-allow-origin: *\r\n"
        if origin.decode("latin-1") in self._origins:
            return lines + b"access-control-allow-origin: %b\r\n" % origin
        return lines


def _answered_hosts(api: Api) -> frozenset[bytes]:
    """On a loopback address: the names that mean it. Else nobody can tell, and the set is empty.

    A page that has pointed its own name at 127.0.0.1 (DNS rebinding) shares its origin with what listens there,
    so that no rule of the browser keeps it out; but its name is in the Host header.
    """
    if api.host not in _LOOPBACK:
        return frozenset()
    return frozenset(name.lower().encode() for name in (*_LOOPBACK, *api.allowed_hosts))


def _without_port(host: bytes) -> bytes:
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0]
    return host.partition(b":")[0].lower()
