"""The page's chat in a browser: with real engines, and with played ones for what those do not say on demand."""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Visit, eventually, fake, models, starting, violations
from tiny_models import write_embedding, write_projector

SPEECH_SERVER = Path(__file__).parents[1] / "speech_server.py"

MARKDOWN = """# Heading

Some *text* with `code`, $a^2 + b^2$ and a [link](https://example.com/page), which cost $5 or $6.

| name | value |
| --- | --- |
| one | 1 |

- [x] done
- [ ] to do

![a picture](https://example.com/a.png)

```python
def add(one, other):
    return one + other  # <b>not bold</b>
```

$$\\sum_{i=0}^n i$$
"""
HOSTILE = """<script>document.title = "broken"</script><img src=x onerror="document.title='broken'">
<svg onload="document.title='broken'"><a xlink:href="javascript:alert()"><text>vector</text></a></svg>

[press](javascript:document.title='broken') [data](data:text/html,<script>document.title='broken'</script>)
<a href="javascript:document.title='broken'" id="title" style="position:fixed">press</a> <button>press</button>

<form action="/"><input name="key"></form><iframe src="/"></iframe><style>body { display: none }</style>
<div id="main" class="unseen"><base href="https://example.com/"><meta http-equiv="refresh" content="0">the end

![](https://example.com/pixel.png) ![](/v1/models) <img srcset="https://example.com/b">
$\\href{javascript:x}{m}$
"""


def played(folder: Path, name: str, *deltas: dict[str, Any] | str, **behaviour: str) -> dict[str, str]:
    """Return the environment of an engine that streams these pieces of an answer."""
    events = folder / f"{name}.events"
    pieces = [{"content": piece} if isinstance(piece, str) else piece for piece in deltas]
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    documents = [*({"choices": [{"delta": piece}]} for piece in pieces), {"choices": [], "usage": usage}]
    events.write_text("\n".join(json.dumps(document) for document in documents))
    return {"FAKE_EVENTS": str(events), **{f"FAKE_{key.upper()}": value for key, value in behaviour.items()}}


def pieces(text: str, size: int = 7) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """A router with engines that say what the tests want to see."""
    folder = tmp_path_factory.mktemp("stage")
    notes = {"FAKE_NOTES": str(folder / "notes")}
    projector = write_projector(folder / "projector.gguf")
    long_text = "".join(
        f"Line {n} of **many** with `code` and [a link](https://example.com/{n}).\n\n" for n in range(3_000)
    )
    said = {
        "markdown": played(folder, "markdown", *pieces(MARKDOWN)),
        "hostile": played(folder, "hostile", *pieces(HOSTILE)),
        "thinks": played(
            folder, "thinks", {"reasoning_content": "Let me "}, {"reasoning_content": "see."}, "It is 4."
        ),
        "mutters": played(folder, "mutters", "<thi", "nk>Hm, ", "well.</th", "ink>\n\nIt is", " 5."),
        "endless": played(folder, "endless", *(f"{n} " for n in range(300)), chunk_sec="0.1"),
        "long": played(
            folder, "long", *pieces(long_text, 4_000), *pieces("x" * 200_000, 2_000), *pieces("> " * 9_000, 2_000)
        ),
        "fails": {"FAKE_DIE": f"once {folder / 'died'}", **played(folder, "fails", "at last")},
        "sees": played(folder, "sees", "A dot."),
    }
    entries = {
        alias: {**models(tiny, alias)[alias], "env": {**environment, **notes}}
        for alias, environment in said.items()
    }
    entries["sees"]["flags"] = [*entries["sees"]["flags"], "--mmproj", str(projector)]
    with starting(folder) as start:
        yield start(
            {
                "models": entries,
                "aliases": {"gpt-4o": "endless"},
                "system": {"llama_server_path": fake(folder), "max_request_retries": 0},
                "api": {"heartbeat_sec": 1},
            }
        )


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """A router with real engines, which is used by a key for inference."""
    folder = tmp_path_factory.mktemp("real")
    command = [sys.executable, str(SPEECH_SERVER), "--host", "{host}", "--port", "{port}"]
    speech = {
        "engine": "command",
        "cmd": command,
        "routes": ["/v1/audio/transcriptions"],
        "model_name": "whisper-1",
        "ready_path": "/ready",
    }
    entries = {
        **models(tiny, "a", flags=["-c", "1024", "-t", "1", "--ignore-eos", "-n", "12"]),
        **models(write_embedding(folder / "embedding.gguf"), "embedding", flags=["--embedding", "-t", "1"]),
        **models(write_embedding(folder / "ranks.gguf", pooling="rank"), "ranks", flags=["--rerank", "-t", "1"]),
        "speech": speech,
    }
    with starting(folder) as start:
        yield start({"models": entries, "api": {"api_keys": ["operator"], "inference_keys": ["client"]}})


def enter(visit: Visit, router: Router, view: str = "chat", *, key: str = "", **options: Any) -> Any:
    """Open the chat in a window of its own."""
    page = visit(router, view, **options)
    if key:
        page.get_by_label("This router asks for an API key").fill(key)
        page.get_by_role("button", name="Open").click()
    page.get_by_label("Message", exact=True).wait_for()
    return page


def say(page: Any, text: str, model: str = "") -> Any:
    """Send a message and return the newest answer."""
    if model:
        page.get_by_label("Model to chat with").select_option(model)
    count = page.locator("article.assistant").count()
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    page.locator("article.assistant").nth(count).wait_for()
    return page.locator("article.assistant").nth(count)


def finished(answer: Any) -> Any:
    answer.get_by_role("button", name=re.compile("Again|Retry")).wait_for()
    return answer


# --- what models say ------------------------------------------------------------------------------------


def test_markdown_is_drawn_while_it_comes(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    answer = finished(say(page, "Show me", "markdown"))
    answer.get_by_role("heading", name="Heading").wait_for()
    assert answer.locator("td").all_inner_texts() == ["one", "1"]
    assert answer.locator("li").all_inner_texts() == ["☑ done", "☐ to do"]
    link = answer.get_by_role("link", name="link", exact=True)
    assert link.get_attribute("href") == "https://example.com/page"
    assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")
    answer.get_by_role("link", name="[image: a picture]").wait_for()
    assert answer.locator("img").count() == 0
    code = answer.get_by_role("figure")
    code.locator(".hljs-keyword").get_by_text("def").wait_for()
    assert code.locator("pre").inner_text() == MARKDOWN.split("```")[1].removeprefix("python\n").rstrip()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code.get_by_role("button", name="Copy python").click()
    code.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == code.locator("pre").inner_text()
    assert answer.locator("math").count() == 2
    answer.get_by_text("which cost $5 or $6.").wait_for()
    note = answer.locator("small")
    note.get_by_text(re.compile(r"first token .* · 20 tokens · .* 60 of 100 prompt tokens cached")).wait_for()


def test_what_a_text_looks_like_does_not_depend_on_how_it_came(stage: Router, visit: Visit) -> None:
    """Drawn block by block as it comes, and all at once after a reload."""
    page = enter(visit, stage)
    said = finished(say(page, "Show me", "markdown")).locator(".said")
    said.locator("math").last.wait_for()
    said.locator(".hljs-keyword").first.wait_for()
    without_frame = "node => node.innerHTML.replace(/<div class=\"tail\">|<\\/div>$/g, '')"
    as_it_came = said.evaluate(without_frame)
    page.reload()
    said.locator("math").last.wait_for()
    said.locator(".hljs-keyword").first.wait_for()
    assert said.evaluate(without_frame) == as_it_came


@pytest.mark.parametrize(
    ("model", "thought", "answered"), [("thinks", "Let me see.", "It is 4."), ("mutters", "Hm, well.", "It is 5.")]
)
def test_thoughts_are_folded(stage: Router, visit: Visit, model: str, thought: str, answered: str) -> None:
    page = enter(visit, stage)
    answer = finished(say(page, "2 + 2?", model))
    assert answer.locator(".said").inner_text() == answered
    assert answer.get_by_text(thought).is_hidden()
    answer.get_by_text(re.compile("Thought for")).click()
    answer.get_by_text(thought).wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "And then?")
    assert asked.value.post_data_json["messages"][1] == {"role": "assistant", "content": answered}


def test_hostile_text_is_harmless(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer = finished(say(page, HOSTILE, "hostile"))
    answer.get_by_text("the end").wait_for()
    said = answer.locator(".said")
    assert (
        said.locator(
            "script, svg, img, iframe, form, style, base, meta, input, button, math, [style], [id]"
        ).count()
        == 0
    )
    assert said.locator("a").evaluate_all("links => links.map((link) => link.protocol)") == ["https:"]
    assert page.locator("article.user .said").inner_text() == HOSTILE
    page.reload()
    answer.get_by_text("the end").wait_for()
    assert page.title() == "Chat · llama-router"
    assert all(url.startswith(stage.url) for url in asked)


def test_a_long_answer_stays_fluent(stage: Router, visit: Visit) -> None:
    """50,000 tokens of Markdown, a line of 200,000 characters, and a quotation within 9,000 others."""
    page = enter(visit, stage)
    page.evaluate(
        "window.longest = 0; new PerformanceObserver((list) => { for (const { duration } of list.getEntries())"
        " window.longest = Math.max(window.longest, duration) }).observe({ entryTypes: ['longtask'] })"
    )
    answer = finished(say(page, "Tell me everything", "long"))
    answer.get_by_role("link", name="a link").nth(2_999).wait_for()
    print(f"longest task: {page.evaluate('window.longest')} ms")
    assert len(answer.locator(".said").inner_text()) > 300_000
    page.get_by_label("Message", exact=True).fill("still here")


# --- what one can do ------------------------------------------------------------------------------------


def test_messages_are_changed_answers_repeated_and_branches_kept(real: Router, visit: Visit) -> None:
    page = enter(visit, real, key="client")
    finished(say(page, "One", "a"))
    finished(say(page, "Two"))
    ours = page.locator("article.user")
    page.get_by_label("Message", exact=True).press("ArrowUp")
    page.get_by_label("Your message, changed").fill("Three")
    page.get_by_label("Your message, changed").press("Enter")
    finished(page.locator("article.assistant").nth(1))
    assert ours.locator(".said").all_inner_texts() == ["One", "Three"]
    ours.last.get_by_text("2/2").wait_for()
    page.locator("article.assistant").first.get_by_role("button", name="Again").click()
    page.locator("article.assistant").first.get_by_text("2/2").wait_for()
    assert ours.count() == 1  # a branch of its own
    finished(page.locator("article.assistant").first)
    page.reload()
    page.locator("article.assistant").first.get_by_role("button", name="Previous version").click()
    ours.last.get_by_role("button", name="Previous version").click()
    assert ours.locator(".said").all_inner_texts() == ["One", "Two"]
    ours.last.get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted 2 messages.").wait_for()
    assert ours.locator(".said").all_inner_texts() == ["One", "Three"]
    page.get_by_role("button", name="Undo").press("Enter")
    ours.last.get_by_text("1/2").wait_for()
    page.reload()
    ours.last.get_by_text("1/2").wait_for()
    assert ours.locator(".said").all_inner_texts() == ["One", "Two"]


def test_the_next_message_goes_with_what_was_said(real: Router, visit: Visit) -> None:
    page = enter(visit, real, key="client")
    first = finished(say(page, "One", "a")).locator(".said").inner_text()
    with page.expect_request("**/v1/chat/completions") as asked:
        answer = say(page, "Two")
    roles = [message["role"] for message in asked.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert first
    request = asked.value.headers["x-request-id"]
    assert request.startswith("page-")
    link = finished(answer).get_by_role("link", name="Request")
    assert str(link.get_attribute("href")).endswith(f"#/requests/{request}")


def test_settings_are_a_conversations_own(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    page.locator("summary").get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for label, value in {"Temperature": "0.5", "Top P": "0.9", "Most tokens": "64", "Seed": "7"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Priority").select_option("low")
    page.get_by_label("Answer in JSON").check()
    page.keyboard.press("Escape")
    with page.expect_request("**/v1/chat/completions") as asked:
        finished(say(page, "2 + 2?", "thinks"))
    body = asked.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [0.5, 0.9, 64, 7]
    assert body["response_format"] == {"type": "json_object", "schema": {"type": "object"}}
    assert asked.value.headers["x-request-priority"] == "low"
    page.reload()
    page.get_by_text("Settings (7)").wait_for()
    page.get_by_role("link", name="New chat").click()
    page.get_by_text("Nothing is said yet.").wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "2 + 2?", "thinks")
    assert asked.value.post_data_json.keys() == {"model", "messages", "stream", "stream_options"}
    assert "x-request-priority" not in asked.value.headers


def png() -> bytes:
    """A picture of one black dot."""
    header, dot = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(b"\0\0")
    chunks = [(b"IHDR", header), (b"IDAT", dot), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_files_go_as_text_and_images_to_models_that_see(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    chooser = page.locator(".composer input[type=file]")
    page.get_by_label("Model to chat with").select_option("markdown")
    chooser.set_input_files([{"name": "dot.png", "mimeType": "image/png", "buffer": png()}])
    page.get_by_text("markdown does not see images. These do: sees.").wait_for()
    page.get_by_label("Model to chat with").select_option("sees")
    chooser.set_input_files(
        [
            {"name": "dot.png", "mimeType": "image/png", "buffer": png()},
            {"name": "notes.md", "mimeType": "text/markdown", "buffer": b"see:\n```\nthere\n```\n"},
            {"name": "large.txt", "mimeType": "text/plain", "buffer": b"x" * (2 << 20)},
            {"name": "program", "mimeType": "", "buffer": b"\x7fELF\0\xff"},
        ]
    )
    page.get_by_text("program is neither text nor an image").wait_for()
    assert page.locator(".chips li").count() == 2
    page.reload()  # a draft has its files, too
    page.locator(".chips img").wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        finished(say(page, "What is this?"))
    image, text = asked.value.post_data_json["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "notes.md:\n````\nsee:\n```\nthere\n```\n````\n\nWhat is this?"
    page.locator("article.user img").wait_for()
    dropped = "new File(['dropped'], 'dropped.txt', { type: 'text/plain' })"
    page.evaluate(
        f"const data = new DataTransfer(); data.items.add({dropped});"
        "const drop = new DragEvent('drop', { dataTransfer: data, bubbles: true });"
        "document.querySelector('.log').dispatchEvent(drop);"
        "document.querySelector('.composer textarea').dispatchEvent("
        "new ClipboardEvent('paste', { clipboardData: data, bubbles: true }))"
    )
    page.locator(".chips li").nth(1).wait_for()


def test_a_chat_says_why_it_waits_and_stops_when_told_to(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    body = {"model": "endless", "messages": [], "stream": True}
    with stage.http.stream("POST", "/v1/chat/completions", json=body):  # the only slot
        answer = say(page, "hello", "gpt-4o")
        answer.get_by_text(re.compile(r"position 1, waited .* the only slot of endless is in use")).wait_for()
        page.get_by_role("link", name="Overview").click()
        page.locator("#waiting-rows").get_by_text("page-").wait_for()
        page.go_back()
        answer.get_by_role("button", name="Cancel").click()
        finished(answer).get_by_text("stopped").wait_for()
        again = say(page, "hello")
        again.get_by_text(re.compile("position 1")).wait_for()
    again.get_by_text("0 1 2").wait_for()
    page.get_by_label("Message", exact=True).press("Escape")
    finished(again).get_by_text(re.compile("stopped · first token .*waited")).wait_for()
    eventually(lambda: stage.status("endless")["in_flight"] == 0)


def test_a_failed_answer_says_why_and_is_retried(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    answer = finished(say(page, "Are you there?", "fails"))
    answer.locator(".error").get_by_text(re.compile("fails")).wait_for()
    stage.http.post("/v1/models/fails/reset")
    answer.get_by_role("button", name="Retry").click()
    answer.get_by_text("at last").wait_for()
    assert page.locator("article").count() == 2
    page.route("**/v1/chat/completions", lambda route: route.abort())
    lost = finished(say(page, "And now?"))
    lost.get_by_text("The router did not answer").wait_for()
    page.unroute("**/v1/chat/completions")
    lost.get_by_role("button", name="Retry").click()
    lost.get_by_text("at last").wait_for()


def test_a_reload_loses_nothing(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    answer = say(page, "Count", "endless")
    answer.get_by_text("0 1 2").wait_for()
    page.get_by_label("Message", exact=True).fill("a draft")
    page.reload()
    answer.get_by_text("0 1 2").wait_for()
    answer.get_by_text("cut off").wait_for()
    assert page.get_by_label("Message", exact=True).input_value() == "a draft"
    assert page.get_by_label("Model to chat with").input_value() == "endless"
    page.get_by_role("link", name="New chat").click()
    page.get_by_text("Nothing is said yet.").wait_for()
    page.get_by_label("Message", exact=True).fill("another")
    page.reload()
    eventually(lambda: page.get_by_label("Message", exact=True).input_value() == "another")


def test_conversations_are_kept_found_exported_and_taken_back(stage: Router, visit: Visit, tmp_path: Path) -> None:
    page = enter(visit, stage)
    finished(say(page, "Do sums\nfor me", "thinks"))
    page.get_by_role("link", name="New chat").click()
    page.get_by_text("Nothing is said yet.").wait_for()
    finished(say(page, "Draw a table", "markdown"))
    listed = page.locator(".conversations a")
    assert listed.all_inner_texts() == ["Draw a table", "Do sums"]
    page.get_by_label("Search titles and messages").fill("it is 4")
    page.get_by_text("1 of 2").wait_for()
    listed.get_by_text("Do sums").click()
    page.locator("article.assistant").get_by_text("It is 4.").wait_for()
    page.get_by_label("Search titles and messages").fill("")
    page.locator("summary").get_by_text("Conversation", exact=True).click()
    page.get_by_label("Title", exact=True).fill("Arithmetic")
    listed.get_by_text("Arithmetic").wait_for()
    with page.expect_download() as markdown:
        page.get_by_role("button", name="Export as Markdown").click()
    assert Path(markdown.value.path()).read_text() == (
        "# Arithmetic\n\n## You\n\nDo sums\nfor me\n\n## thinks\n\nIt is 4.\n"
    )
    with page.expect_download() as exported:
        page.get_by_role("button", name="Export as JSON").click()
    file = tmp_path / "conversation.json"
    exported.value.save_as(file)
    page.locator(".bar-of-chat").get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted “Arithmetic”.").wait_for()
    assert listed.all_inner_texts() == ["Draw a table"]
    page.get_by_role("button", name="Undo").click()
    page.locator("article.assistant").get_by_text("It is 4.").wait_for()
    page.get_by_role("button", name="Delete all").click()
    page.get_by_text("Deleted 2 conversations.").wait_for()
    assert listed.count() == 0
    page.locator(".all input[type=file]").set_input_files(file)
    page.locator("article.assistant").get_by_text("It is 4.").wait_for()
    page.get_by_text("Thought for").wait_for()
    for broken in ("[]", "{", '{"format": "llama-router chat", "conversations": [{"turns": [{"role": "root"}]}]}'):
        file.write_text(broken)
        page.locator(".all input[type=file]").set_input_files(file)
        page.get_by_text(re.compile("conversation.json cannot be imported: ")).wait_for()


TURNS = """new Promise((resolve) => {
    indexedDB.open("llama-router chat").onsuccess = ({ target: { result } }) => {
        result.transaction("turns").objectStore("turns").getAll().onsuccess = ({ target }) => {
            result.close();
            resolve(target.result.map(({ text }) => text));
        };
    };
})"""


def test_an_answer_that_is_deleted_while_it_comes_is_gone(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    for title in ("One message", "All of it"):
        answer = say(page, title, "endless")
        answer.get_by_text(re.compile(r"\b20 21\b")).wait_for()  # and has been kept meanwhile
        if title == "One message":
            page.locator("article.user").get_by_role("button", name="Delete").click()
        else:
            page.locator("summary").get_by_text("Conversation", exact=True).click()
            page.locator(".bar-of-chat").get_by_role("button", name="Delete").click()
        page.get_by_text("Deleted").wait_for()
        page.get_by_role("button", name="Send").wait_for()
        page.reload()
        page.get_by_label("Message", exact=True).wait_for()
        assert page.evaluate(TURNS) == []


def test_two_models_answer_side_by_side(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    page.get_by_label("Model to chat with").select_option("thinks")
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Second model").select_option("mutters")
    page.get_by_label("Message", exact=True).fill("2 + 2?")
    page.get_by_label("Message", exact=True).press("Enter")
    one, other = page.get_by_role("group", name="thinks"), page.get_by_role("group", name="mutters")
    one.get_by_text("It is 4.").wait_for()
    other.get_by_text("It is 5.").wait_for()
    assert page.locator("article.user").count() == 1
    page.get_by_label("Message", exact=True).fill("Sure?")
    page.get_by_label("Message", exact=True).press("Enter")
    finished(one.locator("article.assistant").nth(1))
    finished(other.locator("article.assistant").nth(1))
    page.reload()
    other.locator("article").nth(2).wait_for()
    assert one.locator("article").count() == other.locator("article").count() == 3
    other.get_by_role("button", name="Keep only this").click()
    page.locator("article.assistant").nth(1).wait_for()
    assert page.locator("article.assistant .said").all_inner_texts() == ["It is 5.", "It is 5."]
    assert page.get_by_label("Model to chat with").input_value() == "mutters"
    page.locator("article.assistant").first.get_by_text("2/2").wait_for()


def test_keys_of_a_message(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage)
    box = page.get_by_label("Message", exact=True)
    page.get_by_label("Model to chat with").select_option("thinks")
    box.fill("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    box.press("Enter")
    finished(page.locator("article.assistant"))
    assert page.locator("article.user .said").inner_text() == "one\ntwo"
    page.locator("#announcer").get_by_text("thinks has answered").wait_for(state="attached")
    box.press("ArrowUp")
    page.get_by_label("Your message, changed").press("Escape")
    assert page.get_by_label("Your message, changed").count() == 0
    assert page.evaluate("document.activeElement.ariaLabel") == "Message"


# --- other models, other people -------------------------------------------------------------------------


LINES = "cell => { const all = new Range(); all.selectNodeContents(cell); return all.getClientRects().length }"


def test_models_for_embeddings_ranking_and_speech_are_tried(real: Router, visit: Visit) -> None:
    page = enter(visit, real, key="client")
    page.get_by_role("link", name="Embeddings").click()
    page.get_by_label("Lines").fill("a cat\na dog\na cat")
    page.get_by_role("button", name="Compare").last.click()
    page.get_by_text("64 dimensions").wait_for()
    nearest = page.get_by_role("table", name="Nearest to “a cat”").locator("tbody tr")
    assert nearest.first.locator("td").all_inner_texts() == ["1.000", "a cat"]
    each = page.get_by_role("table", name="Each with each").locator("tbody tr")
    assert each.count() == 3
    page.set_viewport_size({"width": 200, "height": 740})
    assert each.first.locator("td").first.evaluate(LINES) == 1
    page.set_viewport_size({"width": 1280, "height": 720})
    page.get_by_role("link", name="Rerank").click()
    page.get_by_label("Query").fill("a cat")
    page.get_by_label("Documents").fill("a dog\na cat")
    page.get_by_role("button", name="Rank").click()
    ranks = page.get_by_role("table").locator("tbody tr td:first-child")
    ranks.nth(1).wait_for()
    assert ranks.all_inner_texts() == ["1", "2"]
    page.get_by_role("link", name="Transcription").click()
    page.get_by_label("File", exact=True).set_input_files(
        {"name": "a.wav", "mimeType": "audio/wav", "buffer": b"RIFF"}
    )
    page.get_by_role("button", name="Transcribe").click()
    page.locator(".result .plain").get_by_text(re.compile(r"\w")).wait_for()
    page.get_by_role("link", name="Chat", exact=True).last.click()
    page.get_by_label("Message", exact=True).wait_for()


def test_models_that_are_not_there_are_not_offered(stage: Router, visit: Visit) -> None:
    page = enter(visit, stage, "chat?model=sees")
    page.locator(".bar-of-chat").get_by_text(re.compile("ready|not loaded")).wait_for()
    assert page.get_by_label("Model to chat with").input_value() == "sees"
    assert page.get_by_role("link", name="Embeddings").count() == 0


LOOKS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark on a phone": {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}},
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_it_is_accessible_and_fits(stage: Router, visit: Visit, look: dict[str, Any]) -> None:
    page = enter(visit, stage, **look)
    page.get_by_label("Model to chat with").select_option("markdown")
    page.get_by_role("button", name="Compare").click()
    page.get_by_label("Second model").select_option("endless")
    answer = say(page, "Show me")
    page.get_by_role("group", name="endless").get_by_text("0 1 2").wait_for()
    answer.locator("math").last.wait_for()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("Escape")
    page.get_by_role("group", name="endless").get_by_text("stopped").wait_for()
    page.locator("article.user").get_by_role("button", name="Edit").click()
    page.locator("summary").get_by_text("Settings").click()
    assert violations(page) == []
