"""Makes `docs/page.png`: the page of a router that really runs, the demo model under several names, asked for by
several clients, where two of them have room. Needs `pip install playwright` and a Chromium.

    python tools/picture.py [FILE.png]
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "router" / "store" / "demo" / "demo.gguf")
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
SEEN_SEC = 14
QUESTION = "Why does my request wait?"


def model(*flags: str, **entry: Any) -> dict[str, Any]:
    return {"model_path": DEMO, "flags": ["-t", "1", *flags], **entry}


CONFIG = {
    "models": {
        "chat": model("-c", "4096", "-np", "2", "--ignore-eos"),
        "coder": model("-c", "2048", "--ignore-eos"),
        "summaries": model("-c", "2048", "--ignore-eos", idle_timeout_sec=900),
        "embed": model("--embedding", "--pooling", "mean", pinned=True),
        "broken": model("--no-such-flag"),
    },
    "aliases": {"gpt-4o-mini": "chat"},
    "system": {"max_concurrent_models": 2},
    "api": {"heartbeat_sec": 2},
}


class Clients:
    """They ask again and again until they are told to leave."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=120)
        self.leave = threading.Event()

    def keep_asking(self, model: str, priority: str, tokens: int) -> None:
        while not self.leave.is_set():
            messages = [{"role": "user", "content": QUESTION}]
            body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
            headers = {"x-request-priority": priority}
            with self.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                for _ in answer.iter_lines():
                    if self.leave.is_set():
                        return


def take(url: str, picture: Path) -> None:
    program = next(filter(None, map(shutil.which, BROWSERS)))
    clients = Clients(url)
    with ThreadPoolExecutor() as pool, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1260, "height": 730})
        page.goto(url)
        for alias in ("embed", "broken"):
            clients.http.post("/v1/models/load", json={"model": alias})
        page.get_by_label("Model to chat with").select_option("gpt-4o-mini")
        page.get_by_label("Message").fill(QUESTION)
        asked = [("chat", "normal", 1500)] * 4 + [("coder", "high", 600), ("summaries", "low", 600)]
        working = [pool.submit(clients.keep_asking, *each) for each in asked]
        page.wait_for_timeout(SEEN_SEC * 1000)
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        page.screenshot(path=picture)
        clients.leave.set()
        for work in working:
            work.result()
        browser.close()


def main() -> None:
    picture = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "page.png")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(CONFIG))
        command = [sys.executable, str(ROOT / "run.py"), "--config", str(config), "--port", "0"]
        environ = {"LLAMA_ROUTER_STATE_DIR": folder, "HOME": folder, "PATH": "/usr/bin:/bin"}
        router = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        try:
            assert router.stderr is not None
            for line in router.stderr:
                if found := re.search(r"listens on (http://\S+)", line):
                    threading.Thread(target=router.stderr.read, daemon=True).start()
                    take(found[1], picture)
                    break
        finally:
            router.terminate()
            router.wait()


if __name__ == "__main__":
    main()
