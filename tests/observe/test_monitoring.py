"""The metrics, the dashboards and the alerts, on a real Prometheus that scrapes a real router under mixed load.

Without `prometheus` and `promtool` on the machine (Debian: `apt-get install prometheus`) most of it is skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from conftest import ROOT, Router, Start, eventually, models
from played_nvml import Gpu, llama_server
from test_metrics import OLDER_NAMES, ROW

MONITORING = ROOT / "monitoring"
RULES = MONITORING / "rules"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
KEY = "the-key-of-prometheus"

STARTS = "Starts of the router"
"""The annotation that is asked for when the router has been started again."""

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="prometheus is not installed"
)

# What a healthy router must not return, although it is asked: each would need minutes of something broken, and is
# tried by promtool on made-up series instead. All series that they read must be there.
SILENT = {
    "LlamaRouterDown": "the router answers; tried at the end, when it is gone",
    "LlamaRouterWaitOverBound": "nothing waits a minute beyond its bound",
    "LlamaRouterWaitNearTimeout": "nothing waits for minutes",
    "LlamaRouterMemoryPressure": "the machine has memory left",
    "LlamaRouterThrashing": "models of this size load in no time",
    "LlamaRouterNoProgress": "requests end all the time",
    "LlamaRouterConnectionsNearlyFull": "a few clients are connected",
    "LlamaRouterLag": "it comes to its work in time",
    "LlamaRouterOpenFiles": "hardly any are open",
    "LlamaRouterDiskFull": "there is space left",
    "LlamaRouterReloadFailed": "nobody has changed the configuration",
}

TOTAL = 'non-counter metrics should not have "_total" suffix'


def promtool(*arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def panels(dashboard: Path) -> Iterator[dict[str, Any]]:
    yield from (panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row")


def alerts() -> dict[str, str]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def expressions() -> dict[str, str]:
    """Every PromQL expression that we ship, with its variables filled, by where it is."""
    found: dict[str, str] = {}
    for dashboard in DASHBOARDS:
        board = json.loads(dashboard.read_text())
        for panel in panels(dashboard):
            for target in panel["targets"]:
                found[f"{dashboard.stem} / {panel['title']} / {target['refId']}"] = target["expr"]
        for annotation in board["annotations"]["list"]:
            found[f"{dashboard.stem} / {annotation['name']}"] = annotation["expr"]
        for variable in board["templating"]["list"]:
            if asked := re.fullmatch(r"label_values\((.*), \w+\)", variable.get("query", "")):
                found[f"{dashboard.stem} / ${variable['name']}"] = asked[1]
    for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"]:
        found |= {rule["record"]: rule["expr"] for rule in group["rules"]}
    found |= alerts()
    return {place: filled(expression) for place, expression in found.items()}


def filled(expression: str) -> str:
    values = {"$instance": ".+", "$model": ".+", "$__rate_interval": "20s", "$__range": "1h"}
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


class Prometheus:
    """A server of its own, configured as we ship it, but for the address of the router and the pace."""

    def __init__(self, folder: Path, target: str) -> None:
        shutil.copytree(MONITORING, folder)
        settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "llama-router-key").write_text(KEY)
        self.config = folder / "prometheus.yml"
        self.config.write_text(yaml.safe_dump(settings))
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = ["prometheus", f"--config.file={self.config}", f"--storage.tsdb.path={folder / 'db'}"]
            command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[float]:
        """The figures that it has now, NaN left out."""
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        result = answer["data"]["result"]
        figures = [result[1]] if answer["data"]["resultType"] == "scalar" else [s["value"][1] for s in result]
        return [float(figure) for figure in figures if not math.isnan(float(figure))]


class Load:
    """Clients of every kind, each over and over until the end: streams, priorities, mistakes, impatience."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._over = threading.Event()
        self._prompts = itertools.count()
        clients = [
            *((self._stream, alias, priority) for alias in "abc" for priority in ("high", "normal", "low")),
            *[(self._stream, "a", "normal")] * 3,
            (self._whole, "b", "normal"),
            *[(self._whole, "broken", "normal")] * 3,
            (self._whole, "nobody", "normal"),
            (self._impatient, "c", "low"),
            (self._known, "a", "normal"),
            (self._known, "nobody", "normal"),
            *[(self._unknown, "a", "normal")] * 3,
            (self._no_http, "a", "normal"),
        ]
        self._threads = [threading.Thread(target=self._again, args=client) for client in clients]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _again(self, act: Any, alias: str, priority: str) -> None:
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Priority": priority}
        with httpx.Client(base_url=self._router.url, headers=headers, timeout=60) as http:
            while not self._over.is_set():
                act(http, alias)
                self._over.wait(0.3)  # people who read what they get

    def _body(self, alias: str, **more: Any) -> dict[str, Any]:
        content = "The same words at the beginning of every prompt, so that a part of it is in the cache. " * 2
        content += str(next(self._prompts))
        message = {"role": "user", "content": content}
        return {"model": alias, "messages": [message], "max_tokens": 24, **more}

    def _whole(self, http: httpx.Client, alias: str) -> None:
        http.post("/v1/chat/completions", json=self._body(alias))

    def _known(self, http: httpx.Client, alias: str) -> None:
        http.post("/v1/chat/completions", json=self._body(alias), headers={"Authorization": "Bearer of-a-client"})

    def _unknown(self, http: httpx.Client, alias: str) -> None:
        wrong = {"Authorization": "Bearer wrong"}
        assert http.post("/v1/chat/completions", json=self._body(alias), headers=wrong).status_code == 401
        assert http.get("/v1/models", headers=wrong).status_code == 401

    def _no_http(self, _http: httpx.Client, _alias: str) -> None:
        with socket.create_connection(self._router.address) as client:
            client.sendall(b"\r\nnonsense\r\n\r\n")
            client.recv(1000)

    def _stream(self, http: httpx.Client, alias: str) -> None:
        body = self._body(alias, stream=True, stream_options={"include_usage": True})
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            for _ in answer.iter_raw():
                pass

    def _impatient(self, http: httpx.Client, alias: str) -> None:
        body = self._body(alias, stream=True, max_tokens=900)
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_raw(), None)


class Crashes:
    """Kills the engine of one model while it works, so many times."""

    def __init__(self, router: Router, alias: str, times: int) -> None:
        self._router = router
        self._alias = alias
        self._left = times

    def attempt(self) -> None:
        status = self._router.http.get(
            f"/v1/models/{self._alias}/status", headers={"Authorization": f"Bearer {KEY}"}
        ).json()
        if self._left and status["status"] == "ready" and status["in_flight"]:
            self._left -= 1
            with contextlib.suppress(ProcessLookupError):  # it has just gone by itself
                os.kill(status["pid"], signal.SIGKILL)


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Variables of a machine with a GPU; none without a compiler for the library that plays it."""
    try:
        gpus = request.getfixturevalue("gpus")
    except pytest.skip.Exception:
        return {}
    gpus.set(Gpu(utilization=73), engines=True)
    return {**gpus.environ, "LLAMA_SERVER_PATH": llama_server(tmp_path)}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[list[Prometheus]]:
    servers: list[Prometheus] = []
    yield servers
    for server in servers:
        server.process.terminate()
        server.process.wait(10)


@needs_prometheus
def test_every_query_we_ship_returns_data_on_a_real_prometheus(
    start: Start, tiny: Path, tmp_path: Path, prometheus: list[Prometheus], machine: dict[str, str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    system = {"max_concurrent_models": 2, "max_queue_size_per_model": 3, "model_load_max_retries": 1}
    system["model_load_cooldown_sec"] = 5
    entries = {**models(tiny, "a", "b", "c", "unused"), **models(broken, "broken")}
    api = {"api_keys": [KEY], "clients": {"notebook": {"key": "of-a-client"}}}
    router = start({"api": api, "system": system, "models": entries}, **machine)
    server = Prometheus(tmp_path / "prometheus", router.url.removeprefix("http://"))
    prometheus.append(server)
    eventually(server.is_ready, timeout_sec=30)

    assert promtool("check", "config", server.config).returncode == 0

    # It lets seconds pass before it asks anybody for the first time.
    eventually(lambda: server.query("up") == [1.0], timeout_sec=30)
    load = Load(router)
    try:
        asked = {place: query for place, query in expressions().items() if place not in SILENT}
        starts = {asked.pop(place) for place in list(asked) if place.endswith(f"/ {STARTS}")}.pop()
        open_ = {place: query for place, query in asked.items() if machine or "router_gpu_" not in query}
        crash = Crashes(router, "a", 4)
        deadline = time.monotonic() + 60
        while open_:
            assert time.monotonic() < deadline, f"{router.log[-3000:]}\nno data:\n" + "\n".join(
                f"{p}: {q}" for p, q in open_.items()
            )
            open_ = {place: query for place, query in open_.items() if not server.query(query)}
            crash.attempt()
            time.sleep(0.5)  # there is nothing new to be asked for between two scrapes
    finally:
        load.stop()
    timeline = asked["scheduler / Residency / A"]
    eventually(lambda: server.query(f"count({timeline})") == [4.0])  # of the models that were asked for
    for name in SILENT:
        assert not server.query(alerts()[name]), name
        for series in re.findall(r"\b(?:router_\w+|up)\b(?:\{[^}]*\})?", alerts()[name]):
            eventually(lambda series=series: bool(server.query(series)))  # type: ignore[misc]

    metrics = httpx.get(f"{router.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    checked = promtool("check", "metrics", text=metrics.text)
    complaints = set(filter(None, checked.stdout.splitlines() + checked.stderr.splitlines()))
    assert complaints <= {f"{name} {TOTAL}" for name in OLDER_NAMES}, complaints

    router.process.kill()
    eventually(lambda: bool(server.query(alerts()["LlamaRouterDown"])), timeout_sec=15)
    start({"api": {"api_keys": [KEY]}}, arguments=["--port", str(router.address[1])])
    eventually(lambda: bool(server.query(starts)), timeout_sec=15)


@needs_prometheus
def test_the_rules_are_clean_and_each_alert_comes_when_it_should_and_not_before() -> None:
    checked = promtool("check", "rules", RULES / "recording.yml", RULES / "alerts.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tried = promtool("test", "rules", RULES / "tests.yml")
    assert tried.returncode == 0, tried.stdout + tried.stderr


@needs_prometheus
def test_a_start_is_marked_however_long_the_router_was_down(tmp_path: Path) -> None:
    (starts,) = {query for place, query in expressions().items() if place.endswith(f"/ {STARTS}")}
    series = {
        "at once": "100+5x40 3+5x60",  # one sample every five seconds
        "minutes": "100+5x10 stale _x29 3+5x60",
        "not at all": "100+5x10 stale 160+5x90",
    }
    marked = [{"labels": f'{{instance="{name}"}}', "value": 1} for name in ("at once", "minutes")]
    trial = {
        "interval": "5s",
        "input_series": [
            {"series": f'router_uptime_seconds{{instance="{name}"}}', "values": values}
            for name, values in series.items()
        ],
        "promql_expr_test": [
            {"expr": f"count by (instance) ({starts})", "eval_time": at, "exp_samples": expected}
            for at, expected in (("195s", []), ("210s", marked), ("300s", []))
        ],
    }
    (tmp_path / "trial.yml").write_text(yaml.safe_dump({"tests": [trial]}))
    tried = promtool("test", "rules", tmp_path / "trial.yml")
    assert tried.returncode == 0, tried.stdout + tried.stderr


def test_every_alert_has_a_trial_in_which_it_comes_and_one_in_which_it_stays_away() -> None:
    trials = yaml.safe_load((RULES / "tests.yml").read_text())["tests"]
    quiet = {test["alertname"] for test in trials[0]["alert_rule_test"] if not test["exp_alerts"]}
    loud = yaml.safe_dump(trials[1:])
    assert quiet == set(alerts())
    assert [name for name in alerts() if name not in loud] == []


def test_everything_that_is_asked_for_is_there() -> None:
    """By its name, in the table of all metrics, which is compared with what a router has."""
    told = {row["name"] for row in ROW.finditer((MONITORING / "README.md").read_text())}
    groups = yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
    told |= {rule["record"] for group in groups for rule in group["rules"]}
    for place, expression in expressions().items():
        asked = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\brouter_\w+", expression)}
        assert asked <= told, place


def test_the_dashboards_are_those_that_the_generator_writes() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("Grafana's SDK wants Python 3.11")
    written = subprocess.run(
        [sys.executable, "-c", "import json, dashboards; print(json.dumps(dashboards.rendered()))"],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(written.stdout) == {path.name: path.read_text() for path in DASHBOARDS}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_is_for_and_in_which_unit(dashboard: Path) -> None:
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(titles) == len(set(titles))
    for panel in panels(dashboard):
        assert panel["description"].endswith((".", "?")), panel["title"]
        if panel["type"] != "state-timeline":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_the_containers_mount_what_is_there() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.monitoring.yml").read_text())
    mounted = [volume.split(":") for service in compose["services"].values() for volume in service["volumes"]]
    for source, _target, *_ in mounted:
        assert source in compose["volumes"] or (ROOT / source).exists(), source
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"]), "versions are pinned"
    inside = {target: source for source, target, *_ in mounted}
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    for rules in prometheus["rule_files"]:
        assert (ROOT / inside["/etc/prometheus/rules"] / Path(rules).name).exists()
    provider = yaml.safe_load(_only(MONITORING / "grafana" / "provisioning" / "dashboards").read_text())
    assert inside[provider["providers"][0]["options"]["path"]] == "./monitoring/grafana/dashboards"


def _only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file
