"""All attacks at once beside honest clients, who lose nothing and hardly wait; and nothing stays of the attackers.

`benchmarks/hostile.py` does the same for longer, and holds what is promised against what is measured; here bounds
are wide, as for two busy cores. `HOSTILE=long` goes on for a minute.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
from bookkeeping import books, observed
from conftest import ROOT, Router, Start, eventually
from honest import FULL_KEY, be_honest
from mutations import LONG
from trial import ATTACKS, LOADED, attacked, configuration

SECONDS = 60 if LONG else 4
FEW = 20
"""Connections, requests and the like: of five hundred who wait, and are gone all at once."""


def test_honest_clients_lose_nothing_beside_all_attacks_at_once(start: Start, tiny: Path, tmp_path: Path) -> None:
    demo = ROOT / "router" / "store" / "demo" / "demo.gguf"
    router = start(configuration(tmp_path, large=demo, small=tiny), **observed(tmp_path))
    process, port = psutil.Process(router.process.pid), int(router.url.rpartition(":")[2])
    for model in LOADED:
        headers = {"authorization": f"Bearer {FULL_KEY}"}
        assert router.http.post("/v1/models/load", json={"model": model}, headers=headers).status_code == 200
    before_mib = process.memory_info().rss / 2**20
    with attacked(port, process.pid, tmp_path / "config.json", SECONDS) as told:
        tally = asyncio.run(be_honest(port, SECONDS))
    after_mib = process.memory_info().rss / 2**20
    refused = told["mob"]["foreign pages"]
    figures = (
        f"/live p99 {tally.slow_sec('/live') * 1000:.0f} ms, "
        f"largest gap in a stream {max(tally.gaps_sec) * 1000:.0f} ms, RSS {before_mib:.0f} → {after_mib:.0f} MiB"
    )
    print(figures, told, sep="\n")
    assert tally.lost == []
    assert tally.slow_sec("/live") < 2, figures
    assert after_mib - before_mib < 150, figures
    assert set(told["mob"]) == set(ATTACKS) - {"floods"}
    assert set(refused) <= {"401", "403", "nothing"}
    assert "Traceback" not in router.log
    eventually(lambda: waiting(router) == 0)
    assert books(router, tmp_path)["waiting for the garbage collector"] < FEW


def waiting(router: Router) -> int:
    stats = router.http.get("/v1/queue/stats", headers={"authorization": f"Bearer {FULL_KEY}"}).json()
    total: int = stats["summary"]["total_queued"]
    return total
