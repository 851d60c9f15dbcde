"""What decoding raises for a document that is not JSON, not of the expected shape, or nested too deeply."""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeError, RecursionError)
