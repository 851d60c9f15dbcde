"""Access of web pages to the router: accepted Host names and accepted origins.

A browser lets pages of any site send requests to machines that only the browser's machine may reach; it only
withholds the responses. Requests without a key are therefore checked: `Host` must be a name that no such page can
have pointed here, and requests with side effects must come from the router's own origin or an allowed one.
Requests without an Origin header, such as those of curl and the SDKs, do not come from pages. If keys are
configured, nothing of this is checked: browsers do not add keys by themselves, as they do cookies, so a page that
sends a key was given it.

Every request is checked here, including those of the data plane; without browser headers the check is cheap.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from router.config.schema import OLLAMAS_ORIGINS, Api
from router.http.auth import Keyring
from router.http.errors import ApiError
from router.http.routes import OLLAMAS_PAGES
from router.system.readings import apart

_ONE_HOST = "Send exactly one Host header."
_UNKNOWN_HOST = (
    "This router does not answer to the name {0!r} in the Host header, because any web page can point a DNS name "
    "at this machine. If it is yours, add {0!r} to api.allowed_hosts in the configuration and restart the router; "
    "or use the router's IP address, or set api.api_keys."
)
_FOREIGN_PAGE = (
    "Web pages of {0!r} may not use this router. If the site is yours, add {0!r} to api.cors_origins in the "
    "configuration and restart the router."
)
_NAMELESS_PAGE = (
    "Web pages without an origin, such as local files and sandboxed frames, may not use this router. Serve the "
    "page from http://localhost, or set api.api_keys and send a key from the page."
)
_FOREIGN_LINK = (
    "Links, images and frames of other sites may not send this request. If you followed a link, enter its address "
    "in the browser instead."
)
_LONGEST_HOST = 300
"""Maximum length of a Host header that is read: longer than any name with its port."""


_EXPOSED = (
    "X-Request-Id",
    "X-Model-Alias",
    "X-Queue-Ms",
    "X-Load-Ms",
    "X-KV",
    "X-Queue-Position",
    "X-Queue-Expected-Ms",
    "X-Queue-Reason",
    "X-Request-Priority",
    "Retry-After",
    "X-Should-Retry",
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class _Host(NamedTuple):
    """A parsed Host header."""

    place: str
    """The whole value, in lower case."""
    name: str
    """The name without a port."""
    cannot_be_rebound: bool
    """True if no web page can have pointed that name at this machine."""


class Browsers:
    """The accepted host names and origins."""

    def __init__(self, api: Api, keyring: Keyring) -> None:
        self._keyring = keyring
        self._hosts = _any_of(map(_host_expression, api.allowed_hosts))
        self._own = _names_of_this_machine(asks=False)
        self._all_may = "*" in api.cors_origins
        self._configured = _matching(api.cors_origins)
        self._ollamas = _matching((*api.cors_origins, *OLLAMAS_ORIGINS))

    async def ask_for_own_names(self) -> None:
        """Look up this machine's name with its domain, which may need slow name servers."""
        self._own = await apart(lambda: _names_of_this_machine(asks=True))

    def check(self, headers: Sequence[tuple[bytes, bytes]], version: str, path: str, *, has_effect: bool) -> None:
        """Raise ApiError 400 without exactly one Host (HTTP/1.0: at most one), 403 for foreign names and pages."""
        hosts, origin, site = [], b"", b""
        for name, value in headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        if len(hosts) > 1 or (version != "1.0" and not any(hosts)):
            raise ApiError(400, "invalid_request", _ONE_HOST)
        if self._keyring.required:
            return
        host = _read(hosts[0][:_LONGEST_HOST] if hosts else b"localhost")
        if not (host.cannot_be_rebound or host.name in self._own or self._hosts.fullmatch(host.name)):
            raise ApiError(403, "unknown_host", _UNKNOWN_HOST.format(host.name))
        if has_effect and (origin or site):
            self._check_page(origin.decode("latin-1").lower(), site, host, path)

    def _check_page(self, origin: str, site: bytes, host: _Host, path: str) -> None:
        """Raise ApiError 403 for requests of foreign pages.

        Sec-Fetch-Site, which browsers send over TLS or to their own machine only, identifies the router's own page
        behind a proxy that changes Host, and links and images, which have no Origin.
        """
        if site == b"same-origin" or self._all_may:
            return
        if not origin:
            if site == b"cross-site":
                raise ApiError(403, "unknown_origin", _FOREIGN_LINK)
        elif not (_is_at(origin, host.place) or self._allowed(path).fullmatch(origin)):
            foreign = _NAMELESS_PAGE if origin == "null" else _FOREIGN_PAGE.format(origin[:_LONGEST_HOST])
            raise ApiError(403, "unknown_origin", foreign)

    def cross_origin(self, app: ASGIApp) -> ASGIApp:
        """Wrap `app` for requests with an Origin header."""
        of_ollama, of_others = (self._middleware(app, path) for path in (OLLAMAS_PAGES, "/"))

        async def for_browsers(scope: Scope, receive: Receive, send: Send) -> None:
            of_its_path = of_ollama if scope["path"].startswith(OLLAMAS_PAGES) else of_others
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
        """Return the header lines of an answer to a page of this origin, like those that `cross_origin` adds."""
        lines = b"access-control-expose-headers: %b\r\nvary: Origin\r\n" % ", ".join(_EXPOSED).encode()
        if self._all_may:
            return lines + b"access-control-allow-origin: *\r\n"
        if self._allowed(path).fullmatch(origin.decode("latin-1")):
            return lines + b"access-control-allow-origin: %b\r\n" % origin
        return lines

    def _allowed(self, path: str) -> re.Pattern[str]:
        return self._ollamas if path.startswith(OLLAMAS_PAGES) else self._configured


def _matching(origins: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for these origins, which are in the format of `api.cors_origins`; `*` is ignored."""
    return _any_of(_expression(origin) for origin in origins if origin != "*")


def _any_of(expressions: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(expressions) or "(?!)")


def _expression(origin: str) -> str:
    """Return an expression for an origin. `*` is any part of a host, or any port, even an omitted default one."""
    scheme, _, rest = origin.lower().partition("://")
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]"):
        host, port = rest, ""
    numbers = "[0-9]+" if port == "*" else port
    wanted = f":{numbers}" if numbers else ""
    if port == "*" or (port and port == _DEFAULT_PORTS.get(scheme)):
        wanted = f"(?:{wanted})?"
    return f"{re.escape(scheme)}://" + re.escape(host).replace(r"\*", "[^/:]*") + wanted


def _is_at(origin: str, host: str) -> bool:
    """Whether a page of this origin comes from this host. A proxy may have terminated TLS."""
    scheme, _, place = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return port is not None and _with_port(place, port) == _with_port(host, port)


def _with_port(place: str, port: str) -> str:
    return place if place.rpartition(":")[2].isdecimal() else f"{place.rstrip(':')}:{port}"


def _host_expression(name: str) -> str:
    """Return an expression for a host name. `*` is any part of it, or all."""
    return re.escape(name.lower()).replace(r"\*", ".*")


def _cannot_be_rebound(name: str) -> bool:
    """Whether no web page can have pointed a name at this machine.

    IP addresses are not looked up. Names without a dot, such as those of containers, are known in the local
    network only: public name servers have none, and will have none under .localhost or .internal (RFC 6761; ICANN,
    2024).
    """
    if name.endswith((".localhost", ".internal")) or not ("." in name or ":" in name):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=128)
def _read(value: bytes) -> _Host:
    place = value.decode("latin-1").strip().lower()
    name = place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
    name = name.rstrip(".")
    return _Host(place, name, _cannot_be_rebound(name))


def _names_of_this_machine(*, asks: bool) -> frozenset[str]:
    """Return the machine's own name, its mDNS name, and if `asks` is set the one that name servers report."""
    name = socket.gethostname().lower()
    names = {name, f"{name.partition('.')[0]}.local"}
    if asks:
        with contextlib.suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(name, None, flags=socket.AI_CANONNAME)
            names |= {canonical.lower().rstrip(".") for *_, canonical, _ in found if canonical}
    return frozenset(names)
