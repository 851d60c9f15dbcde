"""Event streams: changes of states, progress of loads, figures every two seconds; also after a reconnection."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, fake, models, starting

from router.api.streams import Feed
from router.observe.events import Events, ServerChanged


@pytest.fixture(scope="module")
def router(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """Its engines tell how far they are."""
    folder = tmp_path_factory.mktemp("live")
    with starting(folder) as start:
        system = {"llama_server_path": fake(folder, load_sec="0.3", progress="1")}
        yield start({"system": system, "models": models(tiny, "a", "b", "c")})


def events(router: Router, path: str, last_id: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, id and content of what comes."""
    headers = {"last-event-id": last_id} if last_id else {}
    name = identity = ""
    with router.http.stream("GET", path, headers=headers) as stream:
        for line in stream.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                identity = value
            elif field == "data":
                yield name, identity, json.loads(value)


def states(router: Router, last_id: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    return events(router, "/v1/models/status/stream", last_id)


def test_who_comes_back_gets_what_was_missed_as_it_was_then(router: Router) -> None:
    stream = states(router)
    name, seen, _ = next(stream)
    assert name == "full_status"
    stream.close()
    router.http.post("/v1/models/load", json={"model": "a"})
    missed = []
    for name, identity, change in states(router, seen):
        assert name == "model_update"
        missed.append((identity, change))
        if change["status"] == "ready":
            break
    begun = [change for _, change in missed if change["status"] != "off"]  # as long as the first stream is there
    first, last = begun[0], missed[-1][1]
    assert (first["status"], first["load_progress"], first["port"]) == ("loading", 0, None)
    assert (last["status"], last["load_progress"]) == ("ready", 100)
    assert first["updated_at"] < last["updated_at"]
    again = states(router, missed[-2][0])
    assert next(again) == ("model_update", *missed[-1])


def test_who_comes_back_too_late_or_to_another_router_gets_all_anew(router: Router) -> None:
    for stranger in ("0-1", "nonsense", "-", "1-" + "9" * 30):
        name, identity, data = next(states(router, stranger))
        assert name == "full_status"
        assert identity
        assert data["models"].keys() == {"a", "b", "c"}


def test_a_load_tells_how_far_it_is(router: Router) -> None:
    stream = states(router)
    next(stream)
    loads = []
    with router.http.stream("POST", "/v1/models/load", json={"model": "b"}):
        for name, _, data in stream:
            assert name == "model_update"
            if data["load"] is not None:
                loads.append(data["load"])
            if data["status"] == "ready":
                assert data["load_progress"] == 100
                break
    told = [load for load in loads if load["stage"] == "text_model"]
    assert [load["fraction"] for load in told] == [0.25, 0.5]
    assert all(load["elapsed_sec"] >= 0 and load["expected_sec"] > 0 for load in loads)


def test_who_watches_is_told_of_models_that_come_and_go(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "old", "both")})
    stream = states(router)
    assert next(stream)[2]["models"].keys() == {"old", "both"}
    (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "both", "new")}))
    assert router.http.post("/v1/config/reload").status_code == 200
    name, identity, data = next(stream)
    assert (name, data["models"].keys()) == ("full_status", {"both", "new"})
    assert next(states(router, identity.partition("-")[0] + "-0"))[0] == "full_status"  # of before


def test_what_was_decided_is_known_also_after_models_came_and_went(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    router = start({"models": models(tiny, "a", "b")})
    stream = states(router)
    next(stream)
    router.http.post("/v1/models/load", json={"model": "a"})
    told = []
    for _, identity, change in stream:
        if "reason" in change:
            told.append((identity, change["status"]))
        if change["status"] == "ready":
            break
    (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "b", "c")}))
    router.http.post("/v1/config/reload")
    eventually(lambda: router.engines == [])

    def decisions() -> list[dict[str, Any]]:
        known: list[dict[str, Any]] = router.http.get("/v1/decisions").json()["decisions"]
        return [decision for decision in known if decision["model"] == "a"]

    eventually(lambda: decisions()[-1]["status"] == "off")
    assert [(each["id"], each["status"]) for each in decisions()[:2]] == told
    assert told[0][1] == "loading"
    router.http.post("/v1/models/load", json={"model": "c"})
    known = router.http.get("/v1/decisions").json()["decisions"]
    assert len({each["id"] for each in known}) == len(known)


def test_a_listener_that_fails_keeps_the_others_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bus, heard = Events(), []
    bus.listen(ServerChanged, lambda change: heard.append(1 / 0))
    bus.listen(ServerChanged, heard.append)
    bus.publish(ServerChanged("ready", 0.0))
    assert heard == [ServerChanged("ready", 0.0)]
    assert "a listener for ServerChanged failed" in caplog.text


def feed(*, kept: int = 100) -> Feed:
    return Feed(lambda: b"everything", kept)


async def next_of(stream: AsyncIterator[bytes]) -> bytes:
    return await asyncio.wait_for(stream.__anext__(), 5)


def test_who_reads_too_slowly_starts_anew_and_disturbs_nobody() -> None:
    async def scene() -> None:
        source = feed(kept=10)
        slow, quick = source.follow(None), source.follow(None)
        assert await next_of(slow) == await next_of(quick) == b"everything"
        for number in range(30):
            source.send(b"%d" % number)
            assert await next_of(quick) == b"%d" % number
        assert await next_of(slow) == b"everything"
        source.send(b"30", last=True)
        assert await next_of(slow) == await next_of(quick) == b"30"
        with pytest.raises(StopAsyncIteration):
            await next_of(slow)

    asyncio.run(scene())


def test_a_thousand_who_watch_keep_no_token_waiting() -> None:
    """Between any two turns of the event loop, in which all else is done, only a few of them are served."""

    async def scene() -> None:
        source = feed()
        received = 0

        async def watch() -> None:
            nonlocal received
            async for _ in source.follow(source.last):
                received += 1

        watching = [asyncio.create_task(watch()) for _ in range(1000)]
        await asyncio.sleep(0)
        source.send(b"news", last=True)
        served = [0]
        while served[-1] < 1000:
            await asyncio.sleep(0)
            served.append(received)
        assert max(now - before for before, now in itertools.pairwise(served)) <= 50
        await asyncio.gather(*watching)
        assert source.followers == 0

    asyncio.run(scene())


def test_figures_come_every_two_seconds_until_the_end(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    stream = events(router, "/metrics/stream")
    name, _, data = next(stream)
    assert name == "metrics"
    assert data["server"]["status"] == "ready"
    assert data["models"]["a"] == {"status": "off", "queue_length": 0, "active_requests": 0, "vram_used_mb": 0}
    assert data["gpu"].keys() >= {"vram_total_mb", "vram_used_mb", "vram_free_mb", "vram_used_percent"}
    assert router.chat("a").status_code == 200
    name, _, data = next(stream)
    assert data["models"]["a"]["status"] == "ready"
    assert data["totals"]["processed"] == 1
    assert data["models"]["a"]["vram_used_mb"] == router.status("a")["vram_used_mb"] > 0
    report = router.http.get("/metrics/report").json()  # of the last five minutes
    assert report["requests"] == 1
    assert report["by_model"]["a"]["outcomes"] == {"served": 1}
    watched = states(router)
    assert next(watched)[0] == "full_status"
    router.process.terminate()
    assert [name for name, _, _ in stream][-1] == "shutdown"
    told = [(name, data["status"]) for name, _, data in watched]
    assert told[0] == ("server_update", "shutting_down")
    assert router.process.wait(10) == 0
    assert '"error"' not in router.log  # nothing had to be cut off
