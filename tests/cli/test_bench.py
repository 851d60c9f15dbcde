"""`llama-router bench`: rates of a model, and whether two runs differ."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import openai_server
import pytest
from conftest import Router, Start, models, run
from tiny_models import write_llama

from router.cli.bench.results import Figure, Results, Row, print_comparison
from router.cli.client import CannotAsk

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def router(start_shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Router:
    tiny = write_llama(tmp_path_factory.mktemp("bench") / "tiny.gguf")
    # Streams begin while they wait: then the router's headers do not say how long that was.
    return start_shared(
        {"api": {"heartbeat_sec": 0.001}, "models": models(tiny, "a", flags=["-c", "4096", "-t", "1", "-np", "2"])}
    )


def test_rates_are_those_of_the_engine_for_each_number_of_clients(router: Router, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    options = [
        "-p",
        "60",
        "-n",
        "8",
        "-r",
        "2",
        "--clients",
        "1,3",
        "--priority",
        "high,low",
        "--save",
        str(saved),
    ]
    done = run("bench", "a", *options, "--url", router.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warm-up" in done.stderr
    title, head, *lines = done.stdout.splitlines()
    assert title.startswith("a (embedded, ")
    assert title.endswith("2 slots): prompts of 60 tokens, answers of 8, 2 rounds")
    names = head.split()
    rows = [dict(zip(names, line.split(), strict=True)) for line in lines if line[0].isdigit()]
    assert [(row["CLIENTS"], row["PRIORITY"]) for row in rows] == [
        ("1", "high"),
        ("1", "low"),
        ("3", "high"),
        ("3", "low"),
    ]
    for row in rows:
        assert abs(int(row["PROMPT"]) - 60) <= 10
        assert int(row["CACHED"]) < 30, "prompts differ"
        assert row["OUTPUT"] == "8"
        assert all("±" in row[name] for name in ("PREFILL", "DECODE", "TOGETHER", "FIRST"))
    assert "measured at the client" not in done.stdout
    read = Results.load(saved)
    assert [len(row.first_sec.rounds) for row in read.rows if row.first_sec] == [2] * 4
    high, low = (row.waited_sec for row in read.rows[2:])
    assert high is not None
    assert low is not None
    assert max(high.highest, low.highest) > 0, "three of each for two slots"


def test_asked_again_the_same_prompts_are_cached(router: Router, tmp_path: Path) -> None:
    done = run(
        "bench", "a", "-p", "90", "-n", "2", "-r", "1", "--cached", "--json", "--url", router.url, cwd=tmp_path
    )
    (row,) = json.loads(done.stdout)["rows"]
    assert row["cached_tokens"] >= row["prompt_tokens"] - 5
    assert row["prefill_per_sec"] is None
    against = tmp_path / "before.json"
    against.write_text(done.stdout)
    both = run(
        "bench",
        "a",
        "-p",
        "90",
        "-n",
        "2",
        "-r",
        "1",
        "--against",
        str(against),
        "--url",
        router.url,
        cwd=tmp_path,
    )
    assert "They differ in: cached." in both.stdout
    assert "one round has no spread" in both.stdout


def test_a_server_that_reports_less_is_measured_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "KNOWN", openai_server.KNOWN - {"ignore_eos"})
    with openai_server.Server("127.0.0.1", 0, "served") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        done = run("bench", "served", "-p", "50", "-n", "20", "-r", "1", "--url", url, cwd=tmp_path)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    title, head, row, *legend = done.stdout.splitlines()
    assert title == "served: prompts of 50 tokens, answers of 20, 1 round"
    cells = dict(zip(head.split(), row.split(), strict=True))
    assert (cells["PROMPT"], cells["CACHED"], cells["OUTPUT"], cells["WAITED"]) == ("50", "-", "20", "-")
    assert float(cells["DECODE"]) > 0
    assert [line.split()[0] for line in legend if "measured at the client" in line] == ["PREFILL", "DECODE"]


def test_what_cannot_be_measured_is_an_error(router: Router, tmp_path: Path) -> None:
    unknown = run("bench", "b", "--url", router.url, cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "'b' not found" in unknown.stderr
    long = run("bench", "a", "-p", "5000", "-n", "1", "-r", "1", "--url", router.url, cwd=tmp_path)
    assert long.returncode == 1
    assert "context" in long.stderr
    assert run("bench", cwd=tmp_path).returncode == 2
    assert run("bench", "a", "--priority", "urgent", cwd=tmp_path).returncode == 2


def results(rates: list[float], first: list[float], **changed: Any) -> Results:
    row = Row(
        1, "default", 0, 512, 0, 128, Figure.of(rates), None, None, Figure.of(first), None, "engine", "client"
    )
    run_of = {
        "model": "a",
        "url": "http://x",
        "at": "now",
        "prompt": 512,
        "output": 128,
        "repeat": 3,
        "cached": False,
    }
    return Results(**{**run_of, **changed}, rows=[row])


def test_a_difference_within_the_spread_is_called_noise(capsys: Printed) -> None:
    before = results([100.0, 102.0, 98.0], [1.0, 1.1, 0.9])
    print_comparison(before, results([101.0, 150.0, 104.0], [2.0, 2.2, 1.8], model="b"))
    printed = capsys.readouterr().out
    assert "They differ in: model." in printed
    prefill, first = (line.split(maxsplit=6) for line in printed.splitlines()[-2:])
    assert prefill[2:] == ["prefill", "100.0±2%", "104.0±24%", "1.04", "within noise"]
    assert first[2:] == ["first", "1.00s±10%", "2.00s±10%", "2.00", "slower (1.64 to 2.44)"]


def test_runs_without_anything_in_common_are_not_compared(capsys: Printed) -> None:
    with pytest.raises(CannotAsk, match="in common"):
        print_comparison(results([1.0], [1.0]), Results("a", "", "", 1, 1, 1, False, []))


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"model": "a"}')
    done = run("bench", "--compare", str(other), "nowhere.json", cwd=tmp_path)
    assert done.returncode == 1
    assert f"{other} was not saved by" in done.stderr
