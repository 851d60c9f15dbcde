"""Clients that leave a stream: after its last event, or in the middle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Router, Start, eventually, fake, models

LAST = {
    "/v1/chat/completions": ({"choices": []}, b"[DONE]"),
    "/v1/responses": ({"type": "response.completed", "response": {"id": "resp_1"}}, b"response.completed"),
}
PIECE = {"choices": [{"delta": {"content": "one"}}]}


@pytest.fixture(scope="module")
def player(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Engines that end their answers long after their last event, or write a token now and then."""
    directory = tmp_path_factory.mktemp("player")
    entries = {}
    for alias, (last, _) in zip(("chat", "respond"), LAST.values(), strict=True):
        (directory / alias).write_text(json.dumps(last))
        env = {"FAKE_EVENTS": str(directory / alias), "FAKE_LINGER_SEC": "30"}
        entries |= models(tiny, alias, env=env)
    (directory / "slow").write_text("\n".join([json.dumps(PIECE)] * 100))
    slow = {"FAKE_EVENTS": str(directory / "slow"), "FAKE_CHUNK_SEC": "0.1"}
    entries |= models(tiny, "slow", "slow-of-two", flags=["-np", "2"], env=slow)
    return start_shared({"system": {"llama_server_path": fake(directory)}, "models": entries})


@pytest.mark.parametrize(("alias", "path"), [("chat", "/v1/chat/completions"), ("respond", "/v1/responses")])
def test_who_leaves_with_the_last_event_was_served(player: Router, alias: str, path: str) -> None:
    read_until(player, alias, path, LAST[path][1])
    assert outcomes(player, alias) == {"served": 1}


@pytest.mark.parametrize(("alias", "choices"), [("slow", 1), ("slow-of-two", 2)])
def test_tokens_of_who_leaves_in_the_middle_are_counted(player: Router, alias: str, choices: int) -> None:
    read_until(player, alias, "/v1/chat/completions", b"one", times=5, n=choices)
    assert outcomes(player, alias) == {"cancelled": 1}
    metrics = player.http.get("/metrics").text
    counted = metrics.partition(f'router_output_tokens_total{{model="{alias}"}} ')[2].partition("\n")[0]
    assert 5 <= float(counted) < 50  # of 100, on however busy a machine


def read_until(router: Router, alias: str, path: str, end: bytes, times: int = 1, **more: int) -> None:
    body = {"model": alias, "messages": [], "input": "hi", "stream": True, **more}
    received = b""
    with router.http.stream("POST", path, json=body) as answer:
        for part in answer.iter_raw():
            received += part
            if received.count(end) >= times:
                return


def outcomes(router: Router, alias: str) -> dict[str, int]:
    def count() -> dict[str, int]:
        samples = re.findall(r"^router_requests_total{(.*)} (.*)$", router.http.get("/metrics").text, re.MULTILINE)
        ours = ((labels, value) for labels, value in samples if f'model="{alias}"' in labels)
        return {re.findall('status="(.*?)"', labels)[0]: int(float(value)) for labels, value in ours}

    eventually(lambda: count() != {})
    return count()
