"""Real engines under a budget that holds three of five: the ledger never exceeds it, and no load fails for memory.

`MEMORY_STORM=long python -m pytest tests/memory/test_memory_storm.py` does so for longer, with 300 MB models in
1.2 GB.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Start, models
from tiny_models import write_llama

LONG = os.environ.get("MEMORY_STORM") == "long"
MODEL_MB, BUDGET_MB, SECONDS = (300, 1200, 120) if LONG else (60, 400, 6)


@pytest.mark.timeout(SECONDS + 120)
def test_the_ledger_never_exceeds_the_budget_and_no_load_fails(start: Start, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", target_bytes=MODEL_MB << 20, context_length=2048)
    aliases = ["a", "b", "c", "d", "e"]
    system: dict[str, Any] = {"memory_budget_mb": BUDGET_MB, "max_concurrent_models": 5}
    config = {
        "system": system,
        "scheduling": {"residency_factor": 0, "max_wait_sec": {"normal": 0.2}, "max_linger_sec": 0},
        "models": models(path, *aliases, flags=["-c", "1024", "-t", "1"]),
    }
    router = start(config)
    until = time.monotonic() + SECONDS
    codes: list[int] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            codes.append(router.chat(rng.choice(aliases)).status_code)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for each in clients:
        each.start()
    looks, most = 0, 0
    while any(each.is_alive() for each in clients):
        vram = router.http.get("/vram").json()
        (host,) = vram["devices"]
        assert host["booked_mb"] <= host["budget_mb"] <= BUDGET_MB
        most = max(most, vram["loaded_models_count"])
        looks += 1
        time.sleep(0.02)
    assert set(codes) == {200}
    assert looks > 10
    assert most >= 2, "they share the budget"
    assert router.log.count(": loading (") > len(aliases), "and take turns"
    assert "not load" not in router.log
