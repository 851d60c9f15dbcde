"""Metrics of the router as a service, read for each scrape: connections, pulls, reloads and disks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from router.config.reloads import Reloads
from router.dataplane.limits import Door
from router.hardware.disks import Disks
from router.http.errors import ApiError
from router.observe.prometheus import Counter, Counts, Family, Gauges
from router.runtime.gauges import single
from router.store.downloads import Downloads

_REFUSALS = ("missing_api_key", "invalid_api_key", "insufficient_permissions", "too_many_pulls")
"""Codes that are there before they are first counted, so that rates include that."""


@dataclass(frozen=True, slots=True)
class Service:
    """What these metrics are read from."""

    door: Door
    downloads: Downloads
    reloads: Reloads
    disks: Disks


class ServiceMetrics:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._refused = Counter(
            "router_pages_refused_total",
            "Requests refused outside of the data plane, by the error's code: keys that are missing, wrong or not "
            "sufficient, and too much at once",
            "code",
        )
        for code in _REFUSALS:
            self._refused.of(code)

    def note_refused(self, error: ApiError) -> None:
        """Count the error of a page if it refuses who asks."""
        if error.status in (401, 403, 429):
            self._refused.of(error.code).value += 1

    def families(self) -> Iterator[Family]:
        door = self._service.door
        yield single("router_connections", "Open connections of clients", door.connections)
        yield single(
            "router_connections_limit",
            "Maximum number of connections of clients: api.max_connections, or less if open files require it",
            door.limit,
        )
        yield self._refused
        yield from self._pulls()
        yield from self._reloads()
        yield from self._disks()

    def _pulls(self) -> Iterator[Family]:
        downloads = self._service.downloads
        yield single("router_pulls_running", "Pulls of models that are running", downloads.running)
        ended = Counts("router_pulls_total", "Pulls that ended, by outcome: success, failed, cancelled", "outcome")
        for outcome, count in downloads.ended.items():
            ended.set(count, outcome)
        yield ended
        received = Counts("router_pull_bytes_total", "Bytes downloaded by pulls")
        received.set(downloads.received_bytes)
        yield received

    def _reloads(self) -> Iterator[Family]:
        reloads = self._service.reloads
        ended = Counts(
            "router_config_reloads_total", "Reloads of the configuration by outcome: success, failed", "outcome"
        )
        ended.set(reloads.successes, "success")
        ended.set(reloads.failures, "failed")
        yield ended
        yield single(
            "router_config_last_reload_successful",
            "Whether the last reload of the configuration succeeded; also 1 before the first",
            int(reloads.is_last_good),
        )
        yield single(
            "router_config_last_load_timestamp_seconds",
            "When the configuration in effect was loaded, in seconds since the epoch",
            reloads.loaded_at,
        )
        yield single(
            "router_config_hash",
            "Number that stands for the configuration in effect, without its secrets",
            reloads.fingerprint,
        )

    def _disks(self) -> Iterator[Family]:
        spaces = self._service.disks.spaces()
        free = Gauges("router_disk_free_bytes", "Free space of the disk with a folder of the router's", "place")
        total = Gauges("router_disk_total_bytes", "Size of the disk with a folder of the router's", "place")
        for place, space in spaces.items():
            free.set(space.free, place)
            total.set(space.total, place)
        yield free
        yield total
