"""Coding agents themselves, from npm and PyPI, against a running router. Only with AGENTS=long in the environment:
they are 2 GB, and read prompts of up to 20,000 tokens.

    AGENTS=long pytest tests/clients/test_coding_agents.py

The demo model, with more room than it was made for, says something to whatever it is asked. What matters is that
an agent takes it, and what it makes of a context that is too small and of a key that is wrong.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from conftest import Router, models, starting
from test_agents import install
from test_clients import with_index

from router.store.demo import MODEL_PATH

pytestmark = [
    pytest.mark.skipif(os.environ.get("AGENTS") != "long", reason="only with AGENTS=long"),
    pytest.mark.timeout(1200),
]

PACKAGES = {
    "claude": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "opencode": "opencode-ai",
    "pi": "@mariozechner/pi-coding-agent",
    "qwen": "@qwen-code/qwen-code",
}
AGENTS = [*PACKAGES, "aider"]
ROOM = 65536
KEY = "secret"
TOO_LONG = {
    "aider": "has hit a token limit",
    "claude": "Prompt is too long",
    "codex": "ran out of room in the model's context window",
    "opencode": "exceeds the available context size",
    "qwen": "exceeds the available context size",
}
"""What they say of a context that is too small. (pi says nothing, when it is asked but once.)"""


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """A demo model with much room, and one with little; for those who have the key."""
    folder = tmp_path_factory.mktemp("router")
    roomy = folder / "roomy.gguf"
    roomy.write_bytes(MODEL_PATH.read_bytes())
    field = gguf.GGUFReader(roomy, "r+").get_field("llama.context_length")
    assert field is not None
    field.parts[field.data[0]][0] = ROOM
    entries = {
        **models(roomy, "demo", flags=["-c", str(ROOM), "-np", "1"]),
        **models(MODEL_PATH, "cramped", flags=["-c", "512", "-np", "1"]),
    }
    with starting(folder) as start:
        yield start({"api": {"api_keys": [KEY]}, "models": entries})


class Agents:
    """Programs in a folder of their own, with a home of their own."""

    def __init__(self, folder: Path, router: Router) -> None:
        self.folder = folder
        self.router = router
        self.environ = install(folder, *PACKAGES.values())
        for script in ("claude-code/install.cjs", "opencode-ai/postinstall.mjs"):  # npm asks before it runs them
            path = next(folder.glob(f"node_modules/**/{script}"))
            subprocess.run(["node", path.name], cwd=path.parent, capture_output=True, check=True)
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config", "--system-certs", "tool", "install"]
        places = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "node_modules" / ".bin")}
        command = [*uv, "--python", sys.executable, "aider-chat"]
        subprocess.run(command, env={**with_index(self.environ), **places}, check=True)

    def ask(self, agent: str, model: str, key: str = KEY, timeout_sec: float = 600) -> str:
        """What it says in the end, and on the way there."""
        home = self.folder / f"home-{model}-{key}"
        self._furnish(home, model, key)
        url = self.router.url
        environ = {
            **self.environ,
            "HOME": str(home),
            "ROUTER_KEY": key,
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": key,
            "ANTHROPIC_MODEL": model,
            "ANTHROPIC_SMALL_FAST_MODEL": model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "OPENAI_API_BASE": f"{url}/v1",
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": key,
            "OPENAI_MODEL": model,
        }
        alone = ["--no-git", "--yes-always", "--no-check-update", "--analytics-disable"]
        arguments = {
            "aider": ["--model", f"openai/{model}", *alone, "--message", "Hello"],
            "claude": ["-p", "Hello"],
            "codex": ["exec", "--skip-git-repo-check", "Hello"],
            "opencode": ["run", "-m", f"router/{model}", "Hello"],
            "pi": ["-p", "--provider", "router", "--model", model, "Hello"],
            "qwen": ["--auth-type", "openai", "-p", "Hello"],
        }[agent]
        program = str(self.folder / "node_modules" / ".bin" / agent)
        pipe = subprocess.PIPE
        ended = subprocess.run(
            [program, *arguments],
            cwd=home,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_sec,
        )
        return re.sub(r"\x1b\[\d*m", "", ended.stdout)

    def _furnish(self, home: Path, model: str, key: str) -> None:
        url = f"{self.router.url}/v1"
        limits = {"contextWindow": ROOM, "maxTokens": 200, "input": ["text"], "reasoning": False}
        free = dict.fromkeys(("input", "output", "cacheRead", "cacheWrite"), 0)
        pi = {
            "baseUrl": url,
            "api": "openai-completions",
            "apiKey": key,
            "models": [{"id": model, "name": model, "cost": free, **limits}],
        }
        opencode = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "router",
            "options": {"baseURL": url, "apiKey": key},
            "models": {model: {"name": model, "limit": {"context": ROOM, "output": 200}}},
        }
        codex = (
            f'model = "{model}"\nmodel_provider = "router"\n[model_providers.router]\nname = "router"\n'
            f'base_url = "{url}"\nenv_key = "ROUTER_KEY"\nwire_api = "responses"\n'
        )
        for name, text in {
            ".codex/config.toml": codex,
            ".pi/agent/models.json": json.dumps({"providers": {"router": pi}}),
            ".config/opencode/opencode.json": json.dumps({"autoupdate": False, "provider": {"router": opencode}}),
        }.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


@pytest.fixture(scope="module")
def agents(router: Router, tmp_path_factory: pytest.TempPathFactory) -> Agents:
    return Agents(tmp_path_factory.mktemp("agents"), router)


@pytest.mark.parametrize("agent", AGENTS)
def test_it_takes_an_answer(agents: Agents, agent: str) -> None:
    said = agents.ask(agent, "demo")
    assert re.search("I am|llama|model", said), said


@pytest.mark.parametrize("agent", TOO_LONG)
def test_it_knows_a_context_that_is_too_small(agents: Agents, agent: str) -> None:
    assert TOO_LONG[agent] in agents.ask(agent, "cramped")


@pytest.mark.parametrize("agent", AGENTS)
def test_it_does_not_hammer_with_a_wrong_key(agents: Agents, agent: str) -> None:
    since_sec = time.monotonic()
    agents.ask(agent, "cramped", key="wrong")
    assert time.monotonic() - since_sec < 45
