"""The official client against the running router."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from conftest import Router, Start, eventually, models
from tiny_models import write_embedding


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    embedding = write_embedding(tmp_path_factory.mktemp("models") / "embedding.gguf")
    config = {
        "models": {
            **models(
                tiny, "chat/tiny:latest", flags=["-c", "4096", "-np", "2", "-t", "1", "--ignore-eos", "--slots"]
            ),
            **models(embedding, "embed", flags=["--embedding", "-t", "1"]),
        }
    }
    return start_shared(config)


@pytest.fixture
def client(router: Router) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


MESSAGES = [{"role": "user", "content": "hi"}]
ALIAS = "chat/tiny:latest"


def test_chat_and_its_headers(client: openai.OpenAI, router: Router) -> None:
    router.unload()
    raw = client.chat.completions.with_raw_response.create(
        model=ALIAS, messages=MESSAGES, max_tokens=4, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.parse().usage.completion_tokens == 4
    assert raw.headers["x-request-id"] == "mine"
    assert raw.headers["x-model-alias"] == ALIAS
    assert int(raw.headers["x-queue-ms"]) >= int(raw.headers["x-load-ms"]) > 0
    again = client.chat.completions.with_raw_response.create(model=ALIAS, messages=MESSAGES, max_tokens=1)
    assert again.headers["x-load-ms"] == "0"


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=ALIAS, messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_tools_pass_through(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    answer = client.chat.completions.create(
        model=ALIAS, messages=MESSAGES, tools=[tool], tool_choice="required", max_tokens=200, temperature=0
    )
    calls = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason in ("tool_calls", "length")
    assert not calls or calls[0].function.name == "weather"


def test_completions_embeddings_and_responses(client: openai.OpenAI) -> None:
    assert client.completions.create(model=ALIAS, prompt="a", max_tokens=3).usage.completion_tokens == 3
    assert len(client.embeddings.create(model="embed", input=["a", "b"]).data) == 2
    assert client.responses.create(model=ALIAS, input="hi", max_output_tokens=2).status == "incomplete"


def test_models(client: openai.OpenAI, router: Router) -> None:
    router.unload()
    assert {model.id for model in client.models.list()} == {ALIAS, "embed"}
    card = client.models.retrieve("embed")
    assert card.capabilities == ["embedding"]
    assert card.state == "off"


def test_errors_are_its_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="chat/tiny:latest") as missing:
        client.chat.completions.create(model="chat/tinny", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="high, normal or low") as wrong:
        client.chat.completions.create(model=ALIAS, messages=MESSAGES, extra_headers={"X-Request-Priority": "9"})
    assert wrong.value.code == "invalid_priority"


def test_what_a_model_was_not_started_for_is_refused_with_those_that_were(
    client: openai.OpenAI, router: Router
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"--embedding.*Ask 'embed' instead") as refused:
        client.embeddings.create(model=ALIAS, input="a")
    assert refused.value.code == "not_supported"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"images \(--mmproj in its flags\). No model here is"):
            client.chat.completions.create(
                model=ALIAS, messages=[{"role": "user", "content": [image]}], stream=stream
            )
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=f"writes no text. Ask '{ALIAS}' instead"):
            client.chat.completions.create(model="embed", messages=MESSAGES, stream=stream)
    answer = router.http.post("/v1/rerank", json={"model": "embed", "query": "a", "documents": ["b"]})
    assert (answer.status_code, "--rerank" in answer.json()["error"]["message"]) == (400, True)
    answer = router.http.post("/api/embed", json={"model": ALIAS, "input": "a"})
    assert (answer.status_code, "Ask 'embed'" in answer.json()["error"]) == (400, True)


def test_a_stream_that_is_broken_off_frees_its_slot(client: openai.OpenAI, router: Router) -> None:
    stream = client.chat.completions.create(model=ALIAS, messages=MESSAGES, max_tokens=3000, stream=True)
    next(iter(stream))
    stats = router.http.get("/v1/queue/stats").json()
    assert stats["per_model"][ALIAS]["current_processing"] == 1
    stream.close()
    eventually(lambda: router.http.get("/v1/queue/stats").json()["summary"]["total_processing"] == 0)
    # The engine itself has stopped as well: its two slots are free for two more at once.
    assert router.chat(ALIAS).status_code == 200
    timings = router.chat(ALIAS, max_tokens=2).json()["timings"]
    assert timings["predicted_n"] == 2
