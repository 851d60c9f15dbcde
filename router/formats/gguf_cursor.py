"""Sequential reader of the numbers, names and strings in a GGUF file; errors give the offending byte.

The file is read through a small window instead of being mapped: a file that shrinks while it is read (a download
that starts again) would kill a process that maps it.
"""

from __future__ import annotations

import functools
import io
import struct
from typing import Any, NoReturn

WINDOW_BYTES = 256 * 1024

# Far above any real model, as those in `gguf.py`; they bound the cost of a malicious header.
MAX_KEPT_BYTES = 8 << 20
MAX_STRINGS = 1 << 22


class GGUFError(ValueError):
    """Raised for a file that no engine can load; gives the file, the reason, and the offset in bytes."""

    def __init__(self, path: str, reason: str, offset: int | None = None) -> None:
        super().__init__(path, reason, offset)
        self.path = path
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (at byte {self.offset:,})"
        return f"{self.path}: {self.reason}{where}"


class TruncatedGGUF(GGUFError):
    """Raised when the file, or the given part of it, ends before its header or tensor data does."""


class Cursor:
    """Reads the first `available` bytes of a file sequentially, through a window of bounded size."""

    def __init__(self, file: io.FileIO | io.BytesIO, path: str, available: int, file_bytes: int) -> None:
        self.path = path
        self.available = available
        self.order = "<"
        self.reading = "the header"
        self._file = file
        self._file_bytes = file_bytes
        self._window = b""
        self._base = 0
        self._position = 0
        self._kept = 0
        self._strings = 0

    @property
    def offset(self) -> int:
        return self._base + self._position

    def fail(self, reason: str, offset: int) -> NoReturn:
        raise GGUFError(self.path, reason, offset)

    def truncated(self, offset: int) -> NoReturn:
        if self.available < self._file_bytes:
            reason = f"the header goes on after its first {self.available:,} bytes, in {self.reading}"
        else:
            reason = f"truncated: the file ends after {self.available:,} bytes, in {self.reading}"
        raise TruncatedGGUF(self.path, reason, offset)

    def unpack(self, letters: str) -> tuple[Any, ...]:
        layout = _layout(self.order + letters)
        start = self._advance(layout.size)
        return layout.unpack_from(self._window, start)

    def take(self, nbytes: int) -> bytes:
        start = self._advance(nbytes)
        return self._window[start : start + nbytes]

    def numbers(self, count: int, letter: str) -> tuple[Any, ...]:
        letters = f"{count}{letter}"
        self._keep(struct.calcsize("<" + letters))
        return self.unpack(letters)

    def string(self) -> bytes:
        (length,) = self.unpack("Q")
        self._keep(length)
        return self.take(length)

    def name(self, what: str, max_bytes: int) -> str:
        start = self.offset
        name = self.string()
        if len(name) > max_bytes:
            self.fail(f"has a {what} of {len(name):,} bytes", start)
        try:
            return name.decode()
        except UnicodeDecodeError:
            self.fail(f"has a {what} that is not UTF-8", start)

    def skip(self, nbytes: int) -> None:
        if self.offset + nbytes > self.available:
            self.truncated(self.offset)
        self._position += nbytes

    def skip_strings(self, count: int) -> None:
        """Skip an array of strings. This loop dominates the cost of a vocabulary, so it does little per string."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            self.fail(f"claims {self._strings:,} strings in its arrays", self.offset - 8)
        start = self.offset
        unpack = _layout(self.order + "Q").unpack_from
        window, position = self._window, self._position
        todo = iter(range(count))
        while True:
            try:
                for _ in todo:
                    (length,) = unpack(window, position)
                    position += length + 8
                break
            except (struct.error, OverflowError):  # the next length lies outside the window
                if self._base + position > self.available:
                    self.truncated(start)
                self._position = position
                (length,) = self.unpack("Q")
                window, position = self._window, self._position + length
        if self._base + position > self.available:
            self.truncated(start)
        self._position = position

    def _keep(self, nbytes: int) -> None:
        self._kept += nbytes
        if self._kept > MAX_KEPT_BYTES:
            self.fail(f"claims {self._kept:,} bytes of names and values, in {self.reading}", self.offset)

    def _advance(self, nbytes: int) -> int:
        """Advance by `nbytes` bytes and return their position in the window."""
        start = self._position
        if start + nbytes > len(self._window):
            offset = self.offset
            if offset + nbytes > self.available:
                self.truncated(offset)
            self._file.seek(offset)
            self._window = self._file.read(max(nbytes, WINDOW_BYTES))
            self._base, start = offset, 0
            if len(self._window) < nbytes:  # the file has shrunk since it was opened
                self.truncated(offset)
        self._position = start + nbytes
        return start


_layout = functools.lru_cache(maxsize=512)(struct.Struct)
