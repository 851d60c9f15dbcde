"""Answers that an engine must not give, as a table: each kind by its name, with the outcome that it must have.

`garbage_engine.py` says it, `test_garbage_engines.py` asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

End = Literal["broken", "read", "odd", "endless", "fine"]
"""Required outcomes. `broken` never counts as served. `read` does not where the router reads answers, and does
where it only passes bytes on; `odd` may end either way. `endless` ends where the router reads answers; elsewhere
the client leaves at some point. `fine` is served. None of them counts as a mistake of the router."""

SILENCE = b"<silence>"
RESET = b"<reset>"
FOREVER = b"<forever>"
"""Not said, but done: nothing more is said; the connection is reset; what follows is said again and again."""

_DEEP = b'{"a":' * 20_000
_ENDS = {
    "/v1/messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "/v1/responses": b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r"}}\n\n',
}
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Kind:
    end: End
    said: tuple[bytes, ...] | None = None
    """All of the answer with its head, or what is done instead."""
    document: bytes | None = None
    """Or what is in it, when no stream is asked for."""
    event: bytes | None = None
    """Or in an event of a stream, before its proper end."""


def answer_of(name: str, path: str, *, streams: bool) -> Iterator[bytes]:
    """What the engine says, in its pieces."""
    kind = KINDS[name]
    if kind.said is not None:
        yield from kind.said
    elif streams and kind.event is not None:
        yield from _stream(b"data: %b\n\n" % kind.event, _ENDS.get(path, _DONE))
    else:
        yield _document(kind.document or b"{}")


def _head(*lines: bytes, status: bytes = b"200 OK") -> bytes:
    return b"\r\n".join((b"HTTP/1.1 " + status, *lines, b"\r\n"))


def _document(body: bytes, *lines: bytes, status: bytes = b"200 OK") -> bytes:
    return _head(_JSON, b"Content-Length: %d" % len(body), *lines, status=status) + body


def _chunk(part: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(part), extension, part)


_SSE = b"Content-Type: text/event-stream"
_JSON = b"Content-Type: application/json"
_CHUNKED = b"Transfer-Encoding: chunked"
_LAST = b"0\r\n\r\n"
_HELLO = json.dumps({"choices": [{"index": 0, "delta": {"content": "a"}, "message": {"content": "a"}}]}).encode()
_EVENT = b"data: %b\n\n" % _HELLO
_BEGUN = _head(_SSE, _CHUNKED) + _chunk(_EVENT)


def _stream(*parts: bytes) -> Iterator[bytes]:
    yield _head(_SSE, _CHUNKED)
    yield from map(_chunk, parts)
    yield _LAST


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


def _said(end: End, *parts: bytes) -> Kind:
    return Kind(end, parts)


def _content(end: End, value: object) -> Kind:
    body = value if isinstance(value, bytes) else _json(value)
    return Kind(end, document=body, event=body)


def _choice(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, **fields}]}


KINDS: dict[str, Kind] = {
    # --- no HTTP ------------------------------------------------------------------------------------------
    "nothing at all": _said("broken"),
    "a text": _said("broken", b"hello there\n"),
    "zeros": _said("broken", b"\0" * 1000),
    "a TLS handshake": _said("broken", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "HTTP/2": _said("broken", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\0" * 18),
    "a reset": _said("broken", RESET),
    "a status of two digits": _said("broken", _document(b"{}", status=b"20 OK")),
    "a status of four digits": _said("broken", _document(b"{}", status=b"2000 OK")),
    "status 099": _said("broken", _document(b"{}", status=b"099 OK")),
    "status 999": _said("broken", _document(b"{}", status=b"999 OK")),
    "another protocol": _said(
        "broken", _head(b"Upgrade: x", b"Connection: upgrade", status=b"101 Switching"), b"hello"
    ),
    # --- heads --------------------------------------------------------------------------------------------
    "half a head": _said("broken", b"HTTP/1.1 200 OK\r\nContent-Ty"),
    "half a head, then silence": _said("broken", b"HTTP/1.1 200 OK\r\nContent-Ty", SILENCE),
    "endless lines": _said("broken", b"HTTP/1.1 200 OK\r\n", FOREVER, b"X-%d: %b\r\n" % (1, b"a" * 1000) * 50),
    "an endless line": _said("broken", b"HTTP/1.1 200 OK\r\nX: ", FOREVER, b"a" * 50_000),
    "endless announcements": _said("broken", FOREVER, b"HTTP/1.1 102 Processing\r\n\r\n" * 1000),
    "an endless reason": _said("broken", b"HTTP/1.1 200 ", FOREVER, b"OK " * 10_000),
    "NUL in a header": _said("broken", _document(b"{}", b"X: a\0b")),
    "NUL in a header's name": _said("broken", _document(b"{}", b"X\0: a")),
    "a folded header": _said("broken", _document(b"{}", b"X: a\r\n b")),
    "a bare CR in a header": _said("broken", _document(b"{}", b"X: a\rSet-Cookie: b")),
    "a header without a colon": _said("broken", _document(b"{}", b"X")),
    "a blank before a colon": _said("broken", _document(b"{}", b"X : 5")),
    "lines that end in LF": _said("broken", b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}"),
    "a header that is no UTF-8": _said("fine", _document(_HELLO, b"X: \xff\xfe")),
    "an announcement before": _said("fine", _head(status=b"100 Continue") + _document(_HELLO)),
    "HTTP/1.0": _said("fine", b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + _HELLO),
    # --- lengths ------------------------------------------------------------------------------------------
    "more than the length": _said("broken", _head(b"Content-Length: 2") + b"{} and more"),
    "less than the length": _said("broken", _head(b"Content-Length: 100") + b'{"choi'),
    "half a document, then silence": _said("broken", _head(b"Content-Length: 100") + b'{"choi', SILENCE),
    "two lengths": _said("broken", _document(_HELLO, b"Content-Length: 3")),
    "the same length twice": _said("broken", _document(_HELLO, b"Content-Length: %d" % len(_HELLO))),
    "a length and chunks": _said("broken", _document(_HELLO, _CHUNKED)),
    "a length below zero": _said("broken", _head(b"Content-Length: -1") + b"{}"),
    "a length beyond all bounds": _said("broken", _head(b"Content-Length: 99999999999999999999999") + b"{}"),
    "a length of terabytes": _said("broken", _head(b"Content-Length: 999999999999999") + b"{}"),
    "a length that is no number": _said("broken", _head(b"Content-Length: many") + b"{}"),
    "another coding": _said("broken", _head(b"Transfer-Encoding: gzip, chunked") + _chunk(_HELLO) + _LAST),
    "204 with a body": _said("broken", _document(_HELLO, status=b"204 No Content")),
    "304 with a body": _said("broken", _document(_HELLO, status=b"304 Not Modified")),
    "an error without an end": _said("broken", _head(_CHUNKED, status=b"500 X"), FOREVER, _chunk(b"x" * 50_000)),
    # --- chunks -------------------------------------------------------------------------------------------
    "no size of a chunk": _said("broken", _BEGUN + b"zz\r\nhello\r\n"),
    "a size beyond all bounds": _said("broken", _BEGUN + b"fffffffffffffffff\r\nhello\r\n"),
    "a chunk that is longer": _said("broken", _BEGUN + b"2\r\nhello\r\n"),
    "an endless extension": _said("broken", _BEGUN + b"5;", FOREVER, b"a" * 50_000),
    "an endless trailer": _said("broken", _BEGUN + b"0\r\n", FOREVER, b"X: %b\r\n" % (b"a" * 1000) * 50),
    "a length in a trailer": _said("broken", _BEGUN + b"0\r\nContent-Length: 5\r\n\r\n"),
    "chunks of one byte": _said("fine", _head(_JSON, _CHUNKED), *(_chunk(b"%c" % b) for b in _HELLO), _LAST),
    # --- streams ------------------------------------------------------------------------------------------
    "half a stream, then a reset": _said("broken", _BEGUN, RESET),
    "half a stream, then its end": _said("broken", _BEGUN),
    "half a stream, then silence": _said("broken", _BEGUN, SILENCE),
    "half an event, then silence": _said("broken", _head(_SSE, _CHUNKED) + _chunk(_EVENT[:9]), SILENCE),
    "a stream that just ends": _said("broken", _BEGUN + _LAST),
    "a stream of nothing": _said("broken", _head(_SSE, _CHUNKED) + _LAST),
    "a stream without data": _said(
        "broken", _head(_SSE, _CHUNKED) + _chunk(b"event: a\n\nid: 5\n\n:\n\n") + _LAST
    ),
    "a stream until the connection ends": _said("broken", _head(_SSE, b"Connection: close") + _EVENT),
    "an endless event": _said("endless", _BEGUN, FOREVER, _chunk(b"data: " + b"a" * 50_000)),
    "an endless document": _said("endless", _head(_JSON, _CHUNKED), FOREVER, _chunk(b"[" * 50_000)),
    "a compressed document": _said("broken", _document(b"\x1f\x8b\x08\0\0\0\0\0", b"Content-Encoding: gzip")),
    "a compressed stream": _said(
        "broken", _head(_SSE, _CHUNKED, b"Content-Encoding: gzip") + _chunk(b"\x1f\x8b\x08\0\0\0\0\0") + _LAST
    ),
    # --- what is in them ----------------------------------------------------------------------------------
    "no JSON": _content("read", b"{"),
    "a page": _content("read", b"<html>Bad gateway</html>"),
    "no UTF-8": _content("odd", b'{"choices":[{"index":0,"delta":{"content":"\xff"}}]}'),
    "deeply nested": _content("read", _DEEP + b"1" + b"}" * 20_000),
    "nested without end": _content("read", _DEEP),
    "deeply nested beside": _content("odd", b'{"choices":[],"x":%b}' % (b"[" * 9000 + b"]" * 9000)),
    "deep arguments": _content(
        "odd",
        _choice(
            delta={"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a":' * 9000}}]},
            message={"tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 9000}}]},
        ),
    ),
    "a deep error": _content("odd", b'{"error":%b}' % (b"[" * 9000 + b"]" * 9000)),
    "deep figures": _content("odd", b'{"choices":[],"timings":%b' % (b"[" * 3000)),
    "an array": _content("odd", [1]),
    "a number": _content("odd", 5),
    "NaN": _content("odd", b'{"choices": [{"index": NaN}]}'),
    "a huge number": _content("odd", b'{"choices": [], "timings": {"predicted_ms": 1e999}}'),
    "a long number": _content("odd", b'{"choices": [], "timings": {"predicted_n": %b}}' % (b"9" * 5000)),
    "figures below zero": _content("odd", {"choices": [], "timings": {"predicted_n": -5, "prompt_ms": -1.0}}),
    "figures beyond all bounds": _content("odd", {"choices": [], "timings": {"predicted_n": 10**18}}),
    "a key twice": _content("odd", b'{"choices": 5, "choices": []}'),
    "choices that are none": _content("odd", {"choices": {}, "type": 5}),
    "choices of numbers": _content("odd", {"choices": [5]}),
    "a choice of billions": _content("odd", {"choices": [{"index": 10**9, "delta": {"content": "a"}}]}),
    "a choice below zero": _content("odd", {"choices": [{"index": -1, "delta": {"content": "a"}}]}),
    "a delta that is none": _content("odd", _choice(delta=5, message=5)),
    "content that is a number": _content("odd", _choice(delta={"content": 5}, message={"content": 5})),
    "calls that are none": _content("odd", _choice(delta={"tool_calls": 5}, message={"tool_calls": 5})),
    "calls without a function": _content("odd", _choice(delta={"tool_calls": [{}]}, message={"tool_calls": [{}]})),
    "usage that is a text": _content("odd", {"choices": [], "usage": "many"}),
    "lone surrogates": _content("odd", b'{"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}'),
    "an error that is a number": _content("odd", {"error": 5}),
    "an error without a message": _content("odd", {"error": {}}),
    "a type that is a number": _content("odd", {"type": 5, "response": 5}),
    "a response that is none": _content("odd", {"type": "response.completed", "response": 5}),
    "an item that is none": _content("odd", {"type": "response.output_item.added", "item": 5}),
    "an item of nothing": _content("odd", {"type": "response.output_item.done", "item": {}}),
    "an error that is a page": _said("broken", _document(b"<html>" * 999, status=b"502 Bad Gateway")),
    "an error of megabytes": _said("broken", _document(b"x" * (3 << 20), status=b"500 X")),
    "an error of deep JSON": _said("broken", _document(_DEEP, status=b"400 X")),
    "an error of nothing": _said("broken", _document(b"", status=b"500 X")),
    "a success that there is not": _said("broken", _document(_HELLO, status=b"299 X")),
    "an error that there is not": _said("broken", _document(b'{"error":{"message":"X"}}', status=b"599 X")),
    "a stream of a status that there is not": _said(
        "broken", _head(_SSE, _CHUNKED, status=b"299 X") + _chunk(_EVENT) + _chunk(_DONE) + _LAST
    ),
}
