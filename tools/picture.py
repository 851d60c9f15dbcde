"""Makes the pictures of the page in `docs/`: of a router that really runs, with one model under several names,
that several clients ask for, where two of them have room. Needs `pip install playwright` and a Chromium.

    python tools/picture.py [--model FILE.gguf] [--llama-server PROGRAM] [FOLDER]

Without a model, the demo model speaks, in the embedded engine.
"""

from __future__ import annotations

import argparse
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
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "router" / "store" / "demo" / "demo.gguf"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
KEY = "llama-router key"
SEEN_SEC = 45
QUESTION = "Write a Python function that adds the numbers of a list. Explain it in one sentence."
WORK = (  # client, model, priority, tokens, pause
    ("alice", "chat", "normal", 150, 4.0),
    ("alice", "gpt-4o-mini", "normal", 100, 7.0),
    ("editor", "coder", "high", 60, 6.0),
    ("nightly", "summaries", "low", 120, 3.0),
    ("nightly", "summaries", "low", 80, 5.0),
)


def config(model: Path, llama_server: str | None) -> dict[str, Any]:
    def entry(*flags: str, **more: Any) -> dict[str, Any]:
        return {"model_path": str(model), "flags": ["-t", "1", *flags], **more}

    clients = {name: {"key": name} for name in ("alice", "editor", "nightly")}
    return {
        "models": {
            "chat": entry("-c", "8192", "-np", "2", description="For questions of every day"),
            "coder": entry("-c", "4096"),
            "summaries": entry("-c", "2048", idle_timeout_sec=900),
            "embed": entry("--embedding", "--pooling", "mean"),
            "broken": entry("--no-such-flag"),
        },
        "aliases": {"gpt-4o-mini": "chat"},
        "system": {"max_concurrent_models": 2, "llama_server_path": llama_server},
        "scheduling": {"max_linger_sec": 1},
        "api": {"heartbeat_sec": 2, "api_keys": ["operator"], "clients": clients},
    }


class Clients:
    """They ask again and again until they are told to leave."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=120)
        self.leave = threading.Event()

    def keep_asking(self, client: str, model: str, priority: str, tokens: int, pause_sec: float) -> None:
        while not self.leave.wait(pause_sec):
            messages = [{"role": "user", "content": QUESTION}]
            body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
            headers = {"x-request-priority": priority, "authorization": f"Bearer {client}"}
            with self.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                for _ in answer.iter_lines():
                    if self.leave.is_set():
                        return


def take(url: str, folder: Path) -> None:
    program = next(filter(None, map(shutil.which, BROWSERS)))
    clients = Clients(url)
    operator = {"authorization": "Bearer operator"}
    with ThreadPoolExecutor() as pool, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        window = browser.new_context(viewport={"width": 1260, "height": 800})
        window.add_init_script(f"sessionStorage.setItem({json.dumps(KEY)}, 'operator')")
        page = window.new_page()
        page.goto(f"{url}/#/chat?model=chat")
        page.get_by_label("Message", exact=True).fill(QUESTION)
        page.get_by_label("Message", exact=True).press("Enter")
        page.locator("#view-chat").get_by_text(re.compile(r"\d tokens/s")).last.wait_for(timeout=120_000)
        shoot(page, folder / "page-chat.png")
        clients.http.post("/v1/models/load", json={"model": "broken"}, headers=operator)
        clients.http.post("/v1/models/chat/keep", json={"for_sec": 3600}, headers=operator)
        page.goto(f"{url}/#/")
        working = [pool.submit(clients.keep_asking, *each) for each in WORK]
        page.wait_for_timeout(SEEN_SEC * 1000)
        shoot(page, folder / "page.png")
        page.goto(f"{url}/#/requests")
        page.wait_for_timeout(2500)
        shoot(page, folder / "page-requests.png")
        page.goto(f"{url}/#/models/chat")
        page.wait_for_timeout(2500)
        shoot(page, folder / "page-models.png")
        clients.leave.set()
        for work in working:
            work.result()
        browser.close()


def shoot(page: Page, picture: Path) -> None:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.screenshot(path=picture)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--llama-server")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config(asked.model.resolve(), asked.llama_server)))
        command = [sys.executable, str(ROOT / "run.py"), "--config", str(path), "--port", "0"]
        environ = {"LLAMA_ROUTER_STATE_DIR": folder, "HOME": folder, "PATH": "/usr/bin:/bin"}
        router = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        try:
            assert router.stderr is not None
            for line in router.stderr:
                if found := re.search(r"listens on (http://\S+)", line):
                    threading.Thread(target=router.stderr.read, daemon=True).start()
                    take(found[1], asked.folder)
                    break
        finally:
            router.terminate()
            router.wait()


if __name__ == "__main__":
    main()
