"""`llama-router run`: one answer for scripts, and the chat in a terminal."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE_ENGINE, ROOT, Router, Start, eventually, fake, fork, models
from terminal import Terminal
from tiny_models import write_llama, write_projector

from router.store.demo import MODEL_PATH

GREETING = (
    "Hello! I am a tiny demo model that ships with llama-router. "
    "Ask me what llama-router does, or how to add a real model."
)
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
READY = r">>>\s*\Z"
"""A prompt that waits, at the end of the screen."""
HOSTILE = "\x1b]0;gone\x07\x1b[2Jred\x9b31m"


@pytest.fixture(scope="module")
def router(start_shared: Start) -> Router:
    """A router with the demo model, which gives the same answers always, and one that never ends."""
    endless = {"model_path": str(MODEL_PATH), "flags": ["-c", "4096", "-t", "1", "--ignore-eos"]}
    demo = {"model_path": str(MODEL_PATH), "flags": ["-c", "1024", "-t", "1"]}
    return start_shared({"models": {"demo": demo, "endless": endless}})


def played(folder: Path, **behaviour: str) -> dict[str, Any]:
    """An entry for an engine that does what a real one cannot on demand."""
    env = {f"FAKE_{name.upper()}": value for name, value in behaviour.items()}
    env |= {"FAKE_READY": "open", "FAKE_OUTLIVES": "yes", "LLAMA_API_KEY": "none"}
    cmd = [sys.executable, str(FAKE_ENGINE), "--port", "{port}"]
    return {"engine": "command", "cmd": cmd, "env": env, "cwd": str(folder), "footprint_mb": 10}


def stream(path: Path, *deltas: dict[str, str]) -> str:
    """Write what an engine streams."""
    choices = [{"delta": delta} for delta in deltas] + [{"delta": {}, "finish_reason": "stop"}]
    path.write_text("".join(json.dumps({"choices": [choice]}) + "\n" for choice in choices))
    return str(path)


@pytest.fixture(scope="module")
def stage(start_shared: Start, tiny: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """A router whose engines are played."""
    folder = tmp_path_factory.mktemp("stage")
    thoughts = stream(folder / "thoughts", {"reasoning_content": "Hm. "}, {"content": "Yes."})
    hostile = stream(folder / "hostile", {"content": f"{HOSTILE}\n\tend"})
    entries = models(tiny, "plain", flags=[])
    entries["sees"] = {
        "model_path": str(write_llama(folder / "sees.gguf")),
        "mmproj": str(write_projector(folder / "p")),
    }
    entries["thinks"] = played(folder, events=thoughts)
    entries["hostile"] = played(folder, events=hostile)
    entries["dies"] = played(folder, die="after")
    entries["slow"] = played(folder, load_sec="2.5")
    system = {"llama_server_path": fake(folder, notes=str(notes)), "max_concurrent_models": 9}
    return start_shared({"system": system, "models": entries})


def asked(notes: Path) -> dict[str, Any]:
    """The last request that an engine got."""
    request: dict[str, Any] = json.loads(notes.read_text().splitlines()[-1].partition(" ")[2])
    return request


def clean(cwd: Path, url: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT), "LLAMA_ROUTER_URL": url}


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a pipe to its end."""

    def ask_router(router: Router, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "run.py"), "run", *arguments]
        process = fork(command, tmp_path, clean(tmp_path, router.url))
        process.stdin.write(stdin)
        process.stdin.close()
        printed, said = process.stdout.read(), process.stderr.read()
        return subprocess.CompletedProcess(command, process.wait(30), printed, said)

    return ask_router


Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_chat(router: Router, *arguments: str) -> Terminal:
        command = [sys.executable, str(ROOT / "run.py"), "run", *arguments, "--url", router.url]
        opened.append(Terminal(command, tmp_path, 100, 40))
        return opened[-1]

    yield open_chat
    for terminal in opened:
        terminal.close()


Chat = Callable[..., Terminal]


# --- in scripts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--no-stream"]])
def test_a_prompt_is_answered_by_nothing_but_the_text(router: Router, ask: Ask, how: list[str]) -> None:
    router.chat("demo")
    answer = ask(router, "demo", "Hello", "--temperature", "0", *how)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"{GREETING}\n", "")


def test_what_is_piped_in_follows_the_prompt(stage: Router, ask: Ask, notes: Path) -> None:
    assert ask(stage, "plain", "--seed", "1", "Sum", "up:", stdin="one\ntwo\n").stdout == "012\n"
    assert asked(notes)["messages"] == [{"role": "user", "content": "Sum up:\n\none\ntwo\n"}]
    ask(stage, "plain", stdin="only this")
    assert asked(notes)["messages"] == [{"role": "user", "content": "only this"}]
    nothing = ask(stage, "plain")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no prompt" in nothing.stderr


def test_options_reach_the_engine(stage: Router, ask: Ask, notes: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array"}')
    (tmp_path / "code.py").write_text("a = '```'\n")
    options = "--temperature 0.5 --top-p 0.9 --max-tokens 7 --seed 3 --think off --priority high --file code.py"
    told = ask(stage, "plain", "Hi", *options.split(), "--system", "Be brief.", "--format", str(schema))
    assert told.returncode == 0, told.stderr
    request = asked(notes)
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "code.py:\n````\na = '```'\n````\n\nHi"},
    ]
    assert {name: request[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 3,
    }
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert request["response_format"]["json_schema"]["schema"] == {"type": "array"}
    eventually(lambda: '"priority":"high"' in stage.log)
    ask(stage, "plain", "Hi", "--json")
    assert asked(notes)["response_format"] == {"type": "json_object", "schema": {"type": "object"}}


def test_the_path_of_an_image_is_an_image_for_a_model_that_sees(
    stage: Router, ask: Ask, notes: Path, tmp_path: Path
) -> None:
    (tmp_path / "a cat.png").write_bytes(PIXEL)
    url = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
    image, what = {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}
    prompt = f"What is this? {tmp_path}/a\\ cat.png"
    assert ask(stage, "sees", prompt).stderr.startswith(f"Added the image {tmp_path}/a cat.png\n")
    assert asked(notes)["messages"][0]["content"] == [image, what]
    ask(stage, "sees", "--image", "a cat.png", "What is this?")
    assert asked(notes)["messages"][0]["content"] == [image, what]
    ask(stage, "plain", prompt)
    assert asked(notes)["messages"][0]["content"] == prompt
    no_image = ask(stage, "sees", "--image", "/etc/hostname", "What is this?")
    assert (no_image.returncode, "not an image" in no_image.stderr) == (1, True)


def test_elsewhere_than_on_a_terminal_the_text_is_left_as_it_is(stage: Router, ask: Ask) -> None:
    assert ask(stage, "thinks", "Well?").stdout == "Yes.\n"
    assert ask(stage, "hostile", "Hi").stdout == f"{HOSTILE}\n\tend\n"


def test_an_answer_that_is_cut_off_says_so(router: Router, ask: Ask) -> None:
    cut = ask(router, "demo", "Hello", "--temperature", "0", "--max-tokens", "3")
    assert (cut.returncode, cut.stdout) == (0, f"{GREETING[: len(cut.stdout) - 1]}\n")
    assert cut.stderr.endswith("The answer was cut off after 3 tokens (max_tokens).\n")


def test_an_unknown_model_is_told_with_those_like_it(router: Router, ask: Ask) -> None:
    unknown = ask(router, "demmo", "Hello")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "llama-router: model 'demmo' not found. Did you mean 'demo'?\n"


def test_an_answer_that_breaks_off_is_no_answer(stage: Router, ask: Ask) -> None:
    broken = ask(stage, "dies", "Hello")
    assert (broken.returncode, broken.stdout) == (1, "01\n")
    why = "llama-router: The engine's response was interrupted: the engine closed the connection.\n"
    assert broken.stderr.endswith(why)


def test_a_wait_is_told_with_its_reason(stage: Router, ask: Ask) -> None:
    waited = ask(stage, "slow", "Hello", "--verbose")
    assert waited.stdout == "012\n"
    first, *figures = waited.stderr.splitlines()
    assert re.match(r"\d\.\ds: position 1.*: slow is loading", first)
    assert re.match(r"first token after \d\.\ds \(waited \d\.\ds, loading \d\.\ds\).*3 tokens in", figures[0])


@pytest.mark.parametrize("option", [["--format", "nowhere.json"], ["--think", "perhaps"], ["--seed", "x"]])
def test_a_wrong_option_is_a_wrong_command_line(router: Router, ask: Ask, option: list[str]) -> None:
    assert ask(router, "demo", "Hello", *option).returncode == 2


def test_ctrl_c_ends_it_and_frees_the_slot(router: Router, tmp_path: Path) -> None:
    command = [str(ROOT / "run.py"), "run", "endless", "Hello", "--max-tokens", "4000"]
    process = fork(command, tmp_path, clean(tmp_path, router.url))
    process.stdin.close()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert "Traceback" not in process.stderr.read()
    eventually(lambda: router.status("endless")["in_flight"] == 0)


def test_it_starts_without_what_only_the_server_needs() -> None:
    loads = "import sys, router.__main__, router.cli.main, router.cli.chat.command; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", loads], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"asyncio", "argcomplete", "fastapi", "pydantic", "rich", "yaml", "router.catalog.load"}
    assert not heavy & set(imported.stdout.split())


# --- in a terminal ------------------------------------------------------------------------------------------


def test_a_chat_is_line_after_line(router: Router, chat: Chat, tmp_path: Path) -> None:
    screen = chat(router, "demo", "--temperature", "0")
    screen.until("Chat with demo", READY)
    screen.type(b"Hello\r")
    screen.until(">>> Hello", "Hello! I am a tiny demo model", "real model", READY)
    screen.type(b"/set seed 7\r/set top-p 1\r/set temprature 1\r/nonsense\r/set\r")
    screen.until("no setting 'top-p'. Did you mean top_p", "Did you mean temperature", "no command /nonsense")
    screen.until("model +demo", "temperature +0.0", "seed +7", "Not set: top_p", READY)
    screen.type(b"/sy\tYou are kind.\r/save talk\r")  # the command is completed
    screen.until("Saved as .*/talk", READY)
    saved = json.loads((tmp_path / "talk").read_text())
    hello, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": GREETING}
    assert saved["messages"] == [{"role": "system", "content": "You are kind."}, hello, answer]
    assert router.http.post("/v1/chat/completions", json=saved | {"max_tokens": 1}).status_code == 200
    screen.type(b"/image talk\r/file talk\r")
    screen.until("demo takes no images", "talk will go with the next prompt", READY)
    screen.type(b"/bye\r")
    assert screen.process.wait(10) == 0

    again = chat(router, "demo")
    again.until(READY)
    again.type(b"/load talk\r")
    again.until("3 messages|2 messages with demo", READY)
    again.type(b"\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A")  # up: what was typed earlier, also in the last chat
    again.until(">>> /save talk")
    again.type(b"\x03")
    again.until("leaves")
    again.type(b"\x04")
    assert again.process.wait(10) == 0
    history = next(tmp_path.rglob("history"))
    assert history.stat().st_mode & 0o777 == 0o600
    assert "Hello" in [json.loads(line) for line in history.read_text().splitlines()]


def test_prompts_may_have_several_lines(stage: Router, chat: Chat, notes: Path) -> None:
    screen = chat(stage, "plain", "--no-history")
    screen.until(READY)
    screen.type(b'"""first\r  second"""\r')
    screen.until("second", "012", READY)
    assert asked(notes)["messages"][-1]["content"] == "first\n  second"
    screen.type(b"\x1b[200~def f():\r\treturn 1\x1b[201~\r")  # as terminals send what is pasted
    screen.until("return 1", "012", READY)
    assert asked(notes)["messages"][-1]["content"] == "def f():\n\treturn 1"
    assert len(asked(notes)["messages"]) == 3
    screen.type(b"/clear\r /not a command\r")
    screen.until("/not a command", "012", READY)
    assert [message["content"] for message in asked(notes)["messages"]] == [" /not a command"]


def test_ctrl_c_stops_an_answer_and_not_the_chat(router: Router, chat: Chat) -> None:
    screen = chat(router, "endless")
    screen.until(READY)
    screen.type(b"Hello\r")
    eventually(lambda: router.status("endless")["in_flight"] == 1)
    screen.until(">>> Hello", r"\w")
    eventually(lambda: len("".join(screen.lines)) > 400)
    screen.type(b"\x03")
    screen.until("Stopped", READY)
    eventually(lambda: router.status("endless")["in_flight"] == 0)
    screen.type(b"/model nobody\r/model demo\r/set temperature 0\r/clear\rHello\r")
    screen.until("model 'nobody' not found", "tiny demo model", READY)


def test_a_failed_answer_loses_nothing(stage: Router, chat: Chat, notes: Path) -> None:
    screen = chat(stage, "plain")
    screen.until(READY)
    screen.type(b"one\r")
    screen.until("012", READY)
    screen.type(b"/model dies\rtwo\r")
    screen.until("two", "/retry asks again", READY)
    screen.type(b"/model plain\r/retry\r")
    screen.until("/retry", "012", READY)
    assert [message["content"] for message in asked(notes)["messages"]] == ["one", "012", "two"]
    screen.type(b"/model dies\r/retry\r")
    screen.until("/model dies", "/retry asks again", READY)
    screen.type(b"/model plain\rthree\r")
    screen.until("three", "012", READY)
    assert [message["content"] for message in asked(notes)["messages"]] == ["one", "012", "two", "012", "three"]


def test_a_model_gives_no_commands_to_the_terminal(stage: Router, chat: Chat) -> None:
    screen = chat(stage, "hostile", "Hello")
    screen.until(r"·\]0;gone··\[2Jred·31m", " +end")
    assert screen.process.wait(10) == 0
    assert b"\x1b[2J" not in screen.raw
    thinking = chat(stage, "thinks", "Hello")
    thinking.until("Hm.", "Yes.")
    assert thinking.process.wait(10) == 0
    assert b"\x1b[2mHm. \x1b[22m" in thinking.raw


def test_a_chat_with_an_unknown_model_does_not_begin(router: Router, chat: Chat) -> None:
    screen = chat(router, "demmo")
    screen.until("model 'demmo' not found. Did you mean 'demo'")
    assert screen.process.wait(10) == 1
