"""What coding agents are made of, against a running router: the libraries of npm.

The libraries are installed once, by npm, into a folder that goes with the test; without Node.js 20 or newer, or
without a package index within reach, they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from apart import UNREACHABLE, Apart, asking
from conftest import ROOT, Router, Start, fake, models
from played_responses import stories

GREETING = "Hello! I am a tiny demo model"
CITIES = ({"city": "Oslo"}, {"city": "Rome"})
LIBRARIES = ("openai@6", "@anthropic-ai/sdk@1", "ai@6", "@ai-sdk/openai@3", "@ai-sdk/openai-compatible@2", "zod@4")
OLDEST_NODE = 20

pytestmark = pytest.mark.timeout(600)  # the first one waits for the installation


@pytest.fixture(scope="module")
def router(start_shared: Start) -> Router:
    return start_shared()


@pytest.fixture(scope="module")
def player(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    directory = tmp_path_factory.mktemp("player")
    entries = {alias: models(tiny, alias, env=env)[alias] for alias, env in stories(directory).items()}
    system = {"llama_server_path": fake(directory), "max_concurrent_models": len(entries)}
    return start_shared({"system": system, "models": entries})


def install(folder: Path, *packages: str) -> dict[str, str]:
    """From npm, into a folder; returns the environment in which they run."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        pytest.skip("there is no Node.js")
    version = subprocess.run([node, "--version"], stdout=subprocess.PIPE, text=True).stdout
    if int(version.strip("v\n").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"Node.js is {version}")
    folder.joinpath("package.json").write_text("{}")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-save", "--loglevel", "error", *packages]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if re.search(UNREACHABLE, made.stderr):
        pytest.skip(f"no package index can be reached: {made.stderr}")
    assert made.returncode == 0, made.stderr
    return dict(os.environ)


@pytest.fixture(scope="module")
def npm(router: Router, player: Router, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Asks `clients_apart.mjs` for what a library makes of a cell."""
    folder = tmp_path_factory.mktemp("npm")
    environ = install(folder, *LIBRARIES)
    script = str(ROOT / "tests" / "clients_apart.mjs")
    with asking(["node", script, router.url, player.url, str(folder)], environ) as ask:
        yield ask


class TestOpenai:
    def test_responses(self, npm: Apart) -> None:
        assert npm("openai", "responses").startswith(GREETING)

    def test_stream(self, npm: Apart) -> None:
        streamed = npm("openai", "stream")
        assert streamed["text"].startswith(GREETING)
        assert "".join(streamed["deltas"]) == streamed["text"]
        assert streamed["numbers"] == list(range(len(streamed["numbers"])))

    def test_tools(self, npm: Apart) -> None:
        thought, message, call = npm("openai", "tools")
        assert (thought["content"][0]["text"], message["content"][0]["text"]) == ("Where?", "Let me see.")
        assert (call["name"], json.loads(call["arguments"]) in CITIES) == ("weather", True)

    def test_structured_output(self, npm: Apart) -> None:
        assert npm("openai", "structured_output") in CITIES

    def test_errors(self, npm: Apart) -> None:
        failure = npm("openai", "failure")
        assert (failure["name"], failure["code"]) == ("APIError", "engine_error")
        refused = npm("openai", "too_long")
        assert (refused["name"], refused["code"]) == ("BadRequestError", "context_length_exceeded")


class TestAnthropic:
    def test_chat(self, npm: Apart) -> None:
        assert npm("anthropic", "chat").startswith(GREETING)

    def test_stream(self, npm: Apart) -> None:
        assert npm("anthropic", "stream").startswith(GREETING)

    def test_structured_output(self, npm: Apart) -> None:
        assert npm("anthropic", "structured_output") in CITIES

    def test_errors(self, npm: Apart) -> None:
        refused = npm("anthropic", "too_long")
        assert (refused["name"], refused["status"]) == ("BadRequestError", 400)
        assert re.search(r"prompt is too long: \d+ tokens > \d+ maximum", refused["message"])


class TestAiSdk:
    """Vercel's, with its default provider, which speaks `/v1/responses`, and with that for servers like ours."""

    @pytest.mark.parametrize("client", ["ai-sdk", "ai-sdk-compatible"])
    def test_chat_and_stream(self, npm: Apart, client: str) -> None:
        assert npm(client, "chat").startswith(GREETING)
        streamed = npm(client, "stream")
        assert "".join(streamed["pieces"]).startswith(GREETING)
        assert (streamed["reason"], len(streamed["pieces"]) > 5) == ("stop", True)
        assert streamed["tokens"] > 5
        assert npm(client, "cut") == "length"

    @pytest.mark.parametrize("client", ["ai-sdk", "ai-sdk-compatible"])
    def test_structured_output(self, npm: Apart, client: str) -> None:
        assert npm(client, "structured_output") in CITIES

    def test_tools(self, npm: Apart) -> None:
        ((name, arguments),) = npm("ai-sdk", "tools")
        assert (name, arguments in CITIES) == ("weather", True)

    def test_errors(self, npm: Apart) -> None:
        failure = npm("ai-sdk", "failure")
        assert len(failure["errors"]) == 1
        assert "Compute error." in failure["errors"][0]
        assert failure["reason"] == "error"
        for client in ("ai-sdk", "ai-sdk-compatible"):
            assert "exceeds the available context size" in npm(client, "too_long")["message"]
