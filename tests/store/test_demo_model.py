"""The demo model that ships with the package: does a first run get a real, honest chat out of it?

It is asked through llama.cpp's own server, in a process of its own, without the router.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from router.store.demo import MODEL_PATH

GREETING = (
    "Hello! I am a tiny demo model that ships with llama-router. "
    "Ask me what llama-router does, or how to add a real model."
)
ADD_MODEL = (
    'Put it into config.json under "models", with an alias and its model_path, '
    "or start llama-router with --models-dir and a folder of GGUF files."
)
PRIORITY = "Send the header X-Request-Priority with high, normal or low. Without it, a request counts as normal."
PORT = "llama-router listens on port 8000, unless the configuration or the command line says otherwise."
FALLBACK = (
    "I am only a tiny demo model shipped with llama-router, so I cannot answer that. "
    "Ask me about llama-router, or add a real model."
)

SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, mode = sys.argv[1:]
params.port, params.n_parallel, params.cpuparams.n_threads, params.verbosity = 0, 1, 1, 0
if mode == "embedding":
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
sys.stdin.read()
"""


class Engine:
    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, route: str, body: dict[str, Any]) -> Any:
        url, header = self.address + route, {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), header)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def choice(self, *contents: str, system: str = "", **sampling: float) -> Any:
        """The answer to the last of `contents`, which user and assistant have said in turn."""
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(contents)]
        return self.post("/v1/chat/completions", {"messages": messages, **sampling})["choices"][0]

    def answer(self, *contents: str, system: str = "") -> str:
        answer: str = self.choice(*contents, system=system, temperature=0)["message"]["content"]
        return answer

    def closeness(self, left: str, right: str) -> float:
        """The cosine: llama.cpp normalises its embeddings."""
        rows = self.post("/v1/embeddings", {"input": [left, right]})["data"]
        return math.fsum(a * b for a, b in zip(rows[0]["embedding"], rows[1]["embedding"], strict=True))


@contextmanager
def serving(mode: str) -> Iterator[Engine]:
    command = [sys.executable, "-c", SERVER, str(MODEL_PATH), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        addresses = (line.split()[-1] for line in child.stdout if line.startswith("listening on"))
        try:
            yield Engine(next(addresses))
        finally:
            child.kill()


@pytest.fixture(scope="module")
def chat() -> Iterator[Engine]:
    with serving("chat") as engine:
        yield engine


@pytest.fixture(scope="module")
def embedding() -> Iterator[Engine]:
    with serving("embedding") as engine:
        yield engine


def test_it_is_small_enough_to_ship() -> None:
    assert MODEL_PATH.stat().st_size <= 3_000_000


@pytest.mark.parametrize("hello", ["Hello", "hello!", "Hi", "HELLO", "Hey there", "good morning"])
def test_a_greeting_is_answered_and_the_answer_says_that_this_is_a_demo(chat: Engine, hello: str) -> None:
    assert chat.answer(hello) == GREETING


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How do I add a model?", ADD_MODEL),
        ("how can i add my own model", ADD_MODEL),
        ("What is a priority?", PRIORITY),
        ("how do priorities work", PRIORITY),
        ("Which port does llama-router listen on?", PORT),
        ("what port does it use", PORT),
    ],
)
def test_questions_about_the_router_get_right_answers(chat: Engine, question: str, answer: str) -> None:
    assert chat.answer(question) == answer


@pytest.mark.parametrize(
    "question",
    ["What is the capital of France?", "Why is the sky blue?", "xyzzy plugh", "How do I bake a cake?"],
)
def test_it_admits_what_it_does_not_know(chat: Engine, question: str) -> None:
    assert chat.answer(question) == FALLBACK


def test_it_stops_by_itself(chat: Engine) -> None:
    for question in ("Hello", "What is llama-router?", "Tell me about the Roman Empire"):
        assert chat.choice(question, temperature=0)["finish_reason"] == "stop"


def test_it_needs_no_sampling_settings_to_be_deterministic(chat: Engine) -> None:
    assert {chat.choice("Hello")["message"]["content"] for _ in range(5)} == {GREETING}


def test_a_conversation_and_a_system_prompt_do_not_confuse_it(chat: Engine) -> None:
    assert chat.answer("Hello", GREETING, "What port does it use?") == PORT
    assert (
        chat.answer("Hello", GREETING, "Who painted the Mona Lisa?", FALLBACK, "How do I add a model?")
        == ADD_MODEL
    )
    assert chat.answer("Hello", system="You are a helpful assistant.") == GREETING


def test_related_sentences_embed_closer_than_unrelated_ones(embedding: Engine) -> None:
    related = embedding.closeness("How do I add a model?", "Where do I register my own model?")
    unrelated = embedding.closeness("How do I add a model?", "Which licence does it have?")
    assert related > unrelated + 0.2
