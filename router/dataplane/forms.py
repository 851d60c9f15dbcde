"""Short text fields of a multipart body (RFC 7578), found without copying the files beside them.

A body is searched in steps, so that other threads can run while a large one is searched. Forms with more parts,
or with longer heads of parts, than a client has use for are refused.
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
"""Maximum size in bytes of a part's head, and of a Content-Type."""
_LONGEST_TEXT = 4096
"""Maximum number of bytes read of a field."""
_MOST_PARTS = 1024
"""llama-server accepts no more either. Text that only begins like a boundary counts, too."""
_MOST_LINES = 32
"""Maximum number of header lines of a part: RFC 7578 has three."""

_KIND = b"multipart/form-data"


def is_form(content_type: bytes) -> bool:
    return content_type[: len(_KIND)].lower() == _KIND


def text_fields(body: bytes | memoryview, content_type: bytes, names: Collection[str]) -> dict[str, str]:
    """Return the fields of these names, each cut to `_LONGEST_TEXT` bytes. The last of repeated fields counts.

    Raises ApiError.
    """
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
    """Return the form with this field in place of any of its name, without copying the rest. Raises ApiError."""
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
    """Return an equivalent Content-Type: llama-server recognizes forms and boundaries in lower case only."""
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
    """Offsets in the body: of a part's head, of its content, and of the content's end."""

    head: int
    content: int
    end: int


def _parts(body: bytes | memoryview, boundary: bytes) -> Iterator[_Part]:
    """Yield the parts. Raises ApiError for too many, and after the last one if the body does not end properly."""
    delimiter = b"\r\n--" + boundary
    at = -2 if body[: len(delimiter) - 2] == delimiter[2:] else _find(body, delimiter, 0)
    for _ in range(_MOST_PARTS + 1):
        line = at + len(delimiter)
        if at == -1 or body[line : line + 2] == b"--":
            break
        ahead = bytes(body[line : line + 2 * _LONGEST_HEAD])
        line_end = ahead.find(b"\r\n", 0, _LONGEST_HEAD)
        if line_end < 0 or ahead[:line_end].strip(b" \t"):  # a line that only begins like a boundary
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
