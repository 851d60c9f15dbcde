"""What came of reloads of the configuration, for metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Reloads:
    """Reloads since the start, which itself loads the configuration and counts as none."""

    fingerprint: int
    """That of the configuration as it was loaded last; see `show.fingerprint`."""
    successes: int = 0
    failures: int = 0
    is_last_good: bool = True
    loaded_at: float = field(default_factory=time.time)
    """When it was loaded last, in seconds since the epoch."""

    def succeeded(self, fingerprint: int) -> None:
        self.fingerprint = fingerprint
        self.successes += 1
        self.is_last_good = True
        self.loaded_at = time.time()

    def failed(self) -> None:
        self.failures += 1
        self.is_last_good = False
