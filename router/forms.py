"""Short text fields of a multipart body (RFC 7578), found without copying the files beside them.

A body is searched in steps, so that other threads get their turns while a large one is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import NamedTuple

from router.api.errors import ApiError

_STEP = 1 << 20
_LONGEST_HEAD = 4096
"""Bytes of a part's head, or of a Content-Type."""
_LONGEST_TEXT = 4096
"""Bytes of a field that are read."""
_MOST_PARTS = 1024
"""llama-server takes no more either."""

_KIND = b"multipart/form-data"


def is_form(content_type: bytes) -> bool:
    return content_type[: len(_KIND)].lower() == _KIND


def text_fields(body: bytes | bytearray, content_type: bytes, names: Collection[str]) -> dict[str, str]:
    """Those of these names; of a long one the beginning. Of one that is there twice, the last. Raises ApiError."""
    fields: dict[str, str] = {}
    for number, part in enumerate(_parts(body, _boundary(content_type))):
        if number == _MOST_PARTS:
            raise _malformed(f"has more than {_MOST_PARTS} parts")
        head = bytes(body[part.head : part.content])
        if any(name.encode() in head for name in names):
            told = BytesHeaderParser().parsebytes(head)
            name = told.get_param("name", header="content-disposition")
            if isinstance(name, str) and name in names and told.get_filename() is None:
                text = body[part.content : min(part.end, part.content + _LONGEST_TEXT)]
                fields[name] = text.decode("utf-8", "replace").strip()
    return fields


def as_engines_read_it(content_type: bytes) -> bytes:
    """One that says the same: llama-server knows a form and its boundary by small letters only."""
    boundary = _told_boundary(content_type) if is_form(content_type) else None
    return b'%b; boundary="%b"' % (_KIND, boundary) if boundary else content_type


def _boundary(content_type: bytes) -> bytes:
    boundary = _told_boundary(content_type)
    if not boundary:
        raise ApiError(400, "invalid_multipart", "The Content-Type names no multipart boundary.")
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


def _parts(body: bytes | bytearray, boundary: bytes) -> Iterator[_Part]:
    """Raises ApiError after the last one, unless the body ends as it should."""
    delimiter = b"\r\n--" + boundary
    at = -2 if body.startswith(delimiter[2:]) else _find(body, delimiter, 0)
    while at != -1:
        line = at + len(delimiter)
        if body.startswith(b"--", line):
            return
        line_end = body.find(b"\r\n", line, line + _LONGEST_HEAD)
        if line_end < 0 or body[line:line_end].strip(b" \t"):  # it only begins like one
            at = _find(body, delimiter, line)
            continue
        head_end = body.find(b"\r\n\r\n", line_end, line_end + _LONGEST_HEAD)
        if head_end < 0:
            break
        at = _find(body, delimiter, head_end + 2)
        if at != -1:
            yield _Part(line_end + 2, head_end + 4, at)
    raise _malformed("is cut off or malformed")


def _find(body: bytes | bytearray, what: bytes, begin: int) -> int:
    for step in range(begin, len(body), _STEP):
        found = body.find(what, step, step + _STEP + len(what))
        if found >= 0:
            return found
    return -1


def _malformed(how: str) -> ApiError:
    return ApiError(400, "invalid_multipart", f"The multipart body {how}.")
