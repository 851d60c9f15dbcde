"""Internals of uvicorn that the router uses: a version that changed them is reported before anything hangs."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator

import uvicorn
from conftest import ROOT
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import Server, ServerState

CYCLE = ("scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers", "message_event")
CYCLE += ("expect_100_continue", "keep_alive", "on_response")
PARAMETERS = {
    RequestResponseCycle.__init__: ("self", *CYCLE),
    RequestResponseCycle.run_asgi: ("self", "app"),
    FlowControl.__init__: ("self", "transport"),
    get_local_addr: ("transport",),
    get_remote_addr: ("transport",),
    Server.startup: ("self", "sockets"),
    Server.main_loop: ("self",),
    Server.on_tick: ("self", "counter"),
    Server.capture_signals: ("self",),
}
OF_A_CYCLE = ("body", "disconnected", "keep_alive", "message_event", "more_body", "response_complete", "scope")
OF_THE_FLOW = ("drain", "pause_reading", "pause_writing", "resume_reading", "resume_writing", "write_paused")
OF_THE_STATE = ("connections", "default_headers", "tasks")
OF_THE_CONFIG = ("asgi_version", "load", "loaded", "timeout_keep_alive")
ASKED_OF_A_FLOW = {"drain", "resume_reading", "write_paused"}
ASKED_OF_A_TRANSPORT = {"close", "is_closing", "write"}
"""By a cycle: `Page` is both to it."""


def changed() -> Iterator[str]:
    for function, expected in PARAMETERS.items():
        if (now := tuple(inspect.signature(function).parameters)) != expected:
            yield f"{function.__qualname__} takes {now}, not {expected}"
    config = uvicorn.Config(lambda: None, interface="asgi3", log_config=None)
    parts = {
        "a cycle": (cycle(), OF_A_CYCLE),
        "the flow": (FlowControl(asyncio.Transport()), OF_THE_FLOW),
        "the server's state": (ServerState(), OF_THE_STATE),
        "its configuration": (config, OF_THE_CONFIG),
    }
    for what, (part, names) in parts.items():
        for name in names:
            if not hasattr(part, name):
                yield f"{what} has no {name!r}"
    source = inspect.getsource(RequestResponseCycle)
    for name, expected in (("flow", ASKED_OF_A_FLOW), ("transport", ASKED_OF_A_TRANSPORT)):
        if (asked := set(re.findall(rf"self\.{name}\.(\w+)", source))) != expected:
            yield f"a cycle asks {asked} of its {name}, not {expected}"
    if HIGH_WATER_LIMIT != 65536:
        yield f"a body is held up at {HIGH_WATER_LIMIT} bytes"


def cycle() -> RequestResponseCycle:
    return RequestResponseCycle(**dict.fromkeys(CYCLE))  # type: ignore[arg-type]


def test_the_inside_of_uvicorn_is_as_it_was() -> None:
    differences = list(changed())
    where = f"uvicorn {uvicorn.__version__} is another than router/dataplane/on_uvicorn.py was written for"
    assert not differences, "\n- ".join((where, *differences))


def test_the_version_that_is_tested_is_the_one_that_is_pinned() -> None:
    pin = re.search(r'"uvicorn>=(\d+\.\d+),<', (ROOT / "pyproject.toml").read_text())
    assert pin is not None
    assert uvicorn.__version__.startswith(f"{pin[1]}."), "pin what the tests have run with"
