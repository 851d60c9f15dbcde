"""Short text fields of a multipart body (RFC 7578), found without copying the files beside them.

A body is searched in steps, so that other threads get their turns while a large one is. Whoever makes its parts so
that there is much to do for each is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import NamedTuple

from router.http.errors import ApiError
from router.system.large_memory import Pieces

_STEP = 64 << 10
_LONGEST_HEAD = 4096
"""Bytes of a part's head, or of a Content-Type."""
_LONGEST_TEXT = 4096
"""Bytes of a field that are read."""
_MOST_PARTS = 1024
"""llama-server takes no more either. What only begins like a part's boundary counts, too."""
_MOST_LINES = 32
"""Of a part's head: by RFC 7578 there are three at most."""

_KIND = b"multipart/form-data"


def is_form(content_type: bytes) -> bool:
    return content_type[: len(_KIND)].lower() == _KIND


def text_fields(body: bytes | memoryview, content_type: bytes, names: Collection[str]) -> dict[str, str]:
    """Those of these names; of a long one the beginning. Of one that is there twice, the last. Raises ApiError."""
    fields: dict[str, str] = {}
    for part in _parts(body, _boundary(content_type)):
        head = bytes(body[part.head : part.content])
        if head.count(b"\n") > _MOST_LINES:
            raise _malformed(f"has a part with more than {_MOST_LINES} lines of headers")
        if any(name.encode() in head for name in names):
            told = BytesHeaderParser().parsebytes(head)
            name = told.get_param("name", header="content-disposition")
            if isinstance(name, str) and name in names and told.get_filename() is None:
                text = bytes(body[part.content : min(part.end, part.content + _LONGEST_TEXT)])
                fields[name] = text.decode("utf-8", "replace").strip()
    return fields


def with_text(body: bytes | memoryview, content_type: bytes, name: str, text: str) -> Pieces:
    """The form with this field, instead of any of its name. Nothing else of it is copied. Raises ApiError."""
    boundary = _boundary(content_type)
    said = f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode()
    view = memoryview(body)
    kept, at = Pieces(), 0
    first: _Part | None = None
    is_there = False
    for part in _parts(body, boundary):
        first = first or part
        told = BytesHeaderParser().parsebytes(bytes(body[part.head : part.content]))
        if told.get_param("name", header="content-disposition") == name:
            kept.parts += (view[at : part.head], memoryview(said))
            at, is_there = part.end, True
    if not is_there and first is not None:
        kept.parts += (view[: first.head], memoryview(b"%b\r\n--%b\r\n" % (said, boundary)))
        at = first.head
    kept.parts.append(view[at:])
    return kept


def as_engines_read_it(content_type: bytes) -> bytes:
    """One that says the same: llama-server knows a form and its boundary by small letters only."""
    boundary = _told_boundary(content_type) if is_form(content_type) else None
    return b'%b; boundary="%b"' % (_KIND, boundary) if boundary else content_type


def _boundary(content_type: bytes) -> bytes:
    boundary = _told_boundary(content_type)
    if not boundary:
        raise ApiError(400, "invalid_multipart", "The Content-Type header has no multipart boundary.")
    return boundary


def _told_boundary(content_type: bytes) -> bytes | None:
    told = Message()
    told["content-type"] = content_type[:_LONGEST_HEAD].decode("latin-1")
    boundary = told.get_boundary()
    return boundary.encode("latin-1", "replace") if boundary else None


class _Part(NamedTuple):
    """Where in the body its head, its content and the end of that are."""

    head: int
    content: int
    end: int


def _parts(body: bytes | memoryview, boundary: bytes) -> Iterator[_Part]:
    """Raises ApiError after the last one, unless the body ends as it should, and when there are too many."""
    delimiter = b"\r\n--" + boundary
    at = -2 if body[: len(delimiter) - 2] == delimiter[2:] else _find(body, delimiter, 0)
    for _ in range(_MOST_PARTS + 1):
        line = at + len(delimiter)
        if at == -1 or body[line : line + 2] == b"--":
            break
        ahead = bytes(body[line : line + 2 * _LONGEST_HEAD])
        line_end = ahead.find(b"\r\n", 0, _LONGEST_HEAD)
        if line_end < 0 or ahead[:line_end].strip(b" \t"):  # it only begins like one
            at = _find(body, delimiter, line)
            continue
        head_end = ahead.find(b"\r\n\r\n", line_end, line_end + _LONGEST_HEAD)
        if head_end < 0:
            at = -1
            break
        at = _find(body, delimiter, line + head_end + 2)
        if at != -1:
            yield _Part(line + line_end + 2, line + head_end + 4, at)
    else:
        raise _malformed(f"has more than {_MOST_PARTS} parts")
    if at == -1:
        raise _malformed("is cut off or malformed")


def _find(body: bytes | memoryview, what: bytes, begin: int) -> int:
    for step in range(begin, len(body), _STEP):
        found = bytes(body[step : step + _STEP + len(what)]).find(what)
        if found >= 0:
            return step + found
    return -1


def _malformed(how: str) -> ApiError:
    return ApiError(400, "invalid_multipart", f"The multipart body {how}.")
