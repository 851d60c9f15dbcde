"""What `/metrics` says: in both formats, as documented, and right."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ROOT, Start, fake, models
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

ROW = re.compile(r"\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*) \| (?P<text>.*) \|")


def test_every_metric_is_documented_and_in_both_formats(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a", "b/c")})
    assert router.chat("a").status_code == 200
    assert router.chat("a", stream=True).status_code == 200
    assert router.chat("no such model").status_code == 404
    plain = router.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    described = [line.split(" ", 3)[2:] for line in plain.text.splitlines() if line.startswith("# HELP router_")]
    kinds = dict(line.split(" ")[2:] for line in plain.text.splitlines() if line.startswith("# TYPE "))
    documented = {row["name"]: row for row in ROW.finditer((ROOT / "monitoring" / "README.md").read_text())}
    assert {name: (kinds[name], text) for name, text in described} == {
        name: (row["kind"], row["text"]) for name, row in documented.items()
    }
    labels: dict[str, set[str]] = {}
    families = list(parse(plain.text))
    for sample in (sample for family in families for sample in family.samples):
        name = re.sub(r"_(bucket|sum|count)$", "", sample.name)
        labels.setdefault(name, set()).update(sample.labels.keys() - {"le"})
    for name, row in documented.items():
        if name in labels:
            assert labels[name] == set(re.findall(r"\w+", row["labels"])), name

    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = router.http.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert names(list(parse_openmetrics(answer.text))) == names(families)


def names(families: list[Metric]) -> set[str]:
    return {sample.name for family in families for sample in family.samples}


def test_no_client_makes_a_label(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    for strange in ('x"} 1', "x\n", "é", ""):
        assert router.chat(strange).status_code == 404
    text = router.http.get("/metrics").text
    labels = 'model="",endpoint="/v1/chat/completions",priority="",status="model_not_found"'
    assert f"router_requests_total{{{labels}}} 4\n" in text
    assert set(re.findall(r'model="([^"]*)"', text)) == {"", "a"}


def test_engines_that_end_are_counted_by_cause(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start(
        {
            "system": {"llama_server_path": fake(tmp_path, die=f"once {tmp_path}/witness")},
            "models": models(tiny, "a"),
        }
    )
    assert router.chat("a").status_code == 200  # served by the second engine
    router.http.post("/v1/models/eject", json={"model": "a"})
    text = router.http.get("/metrics").text
    for line in (
        'router_engine_exits_total{model="a",reason="crashed"} 1',
        'router_engine_exits_total{model="a",reason="manual"} 1',
        'router_engine_restarts_total{model="a"} 1',
        'router_model_loads_total{model="a"} 2',
        'router_model_ejects_total{model="a",cause="manual"} 1',
        'router_retry_attempts_total{model="a"} 1',
        'router_retry_success_total{model="a"} 1',
        'router_model_state{model="a",state="off"} 1',
    ):
        assert f"{line}\n" in text, router.log
