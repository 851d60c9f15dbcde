# /// script
# dependencies = [
#   "langchain-llama-cpp>=0.1", "langchain-ollama>=1", "langchain-openai>=1", "litellm>=1.80", "llamastat>=0.3",
#   "mcp>=1",
# ]
# ///
# (litellm imports mcp for tools and responses, and does not require it.)
"""Clients whose packages do not go along with the router's, in an environment of their own, which `uv` makes.

A program: it is given the addresses of two routers, reads lines `CLIENT CELL`, and answers each with a line of
JSON: what the client has made of the router's answer, or the traceback of what it has raised. Whether that is
right is for `test_clients.py` to say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from typing import Any

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather of a city", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": FUNCTION}
MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
TEXTS = ["Hello", "Good bye"]


class LangchainOpenai:
    def __init__(self, router: str, caller: str) -> None:
        self.router = {"base_url": f"{router}/v1", "api_key": "none"}
        self.caller = {"base_url": f"{caller}/v1", "api_key": "none"}

    def model(self, **more: Any) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(**{**self.router, "model": "demo", "temperature": 0, "max_retries": 0, **more})

    def chat(self) -> str:
        return self.model().invoke("Hello").content

    def stream(self) -> list[str]:
        return [chunk.content for chunk in self.model().stream("Hello")]

    def tools(self) -> list[Any]:
        calls = self.model(**self.caller).bind_tools([TOOL]).invoke("Hello").tool_calls
        return [(call["name"], call["args"]) for call in calls]

    def structured_output(self) -> Any:
        form = {"title": "place", **SCHEMA}
        return self.model().with_structured_output(form, method="json_schema").invoke("Hello")

    def embeddings(self) -> list[list[float]]:
        from langchain_openai import OpenAIEmbeddings

        # Texts as they are: what it sends by itself are tokens of OpenAI's own vocabulary.
        embeddings = OpenAIEmbeddings(**self.router, model="demo-embed", check_embedding_ctx_length=False)
        return embeddings.embed_documents(TEXTS)

    def responses(self) -> str:
        return self.model(use_responses_api=True).invoke("Hello").text


class LangchainOllama(LangchainOpenai):
    def __init__(self, router: str, caller: str) -> None:
        self.router, self.caller = {"base_url": router}, {"base_url": caller}

    def model(self, **more: Any) -> Any:
        from langchain_ollama import ChatOllama

        return ChatOllama(
            **{**self.router, "model": "demo", "temperature": 0, "validate_model_on_init": True, **more}
        )

    def embeddings(self) -> list[list[float]]:
        from langchain_ollama import OllamaEmbeddings

        return OllamaEmbeddings(**self.router, model="demo-embed").embed_documents(TEXTS)


class LangchainLlamaCpp(LangchainOpenai):
    def __init__(self, router: str, caller: str) -> None:
        self.router, self.caller = {"base_url": router}, {"base_url": caller}

    def model(self, **more: Any) -> Any:
        from langchain_llama_cpp import ChatLlama

        return ChatLlama(**{**self.router, "model": "demo", "temperature": 0, "max_retries": 0, **more})

    def server_defaults(self) -> Any:
        return self.model().get_server_defaults()


class Llamastat:
    def __init__(self, router: str, caller: str) -> None:
        self.router = router

    def snapshot(self) -> Any:
        command = [sys.executable, "-m", "llamastat", "--url", self.router, "--once", "--json", "--no-host"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Litellm:
    def __init__(self, router: str, caller: str) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks for prices on the internet
        import litellm

        self.litellm = litellm
        self.router, self.caller = router, caller

    def complete(self, **more: Any) -> Any:
        there = {"api_base": f"{self.router}/v1", "api_key": "none", "timeout": 60}
        asked = {"model": "openai/demo", "messages": MESSAGES, "temperature": 0}
        return self.litellm.completion(**{**there, **asked, **more})

    def chat(self) -> str:
        return self.complete().choices[0].message.content

    def stream(self) -> list[str]:
        return [chunk.choices[0].delta.content or "" for chunk in self.complete(stream=True)]

    def tools(self) -> list[Any]:
        answer = self.complete(api_base=f"{self.caller}/v1", tools=[TOOL], tool_choice="required")
        calls = [call.function for call in answer.choices[0].message.tool_calls]
        return [(call.name, json.loads(call.arguments)) for call in calls]

    def structured_output(self) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
        return json.loads(self.complete(response_format=form).choices[0].message.content)

    def embeddings(self) -> list[list[float]]:
        there = {"api_base": f"{self.router}/v1", "api_key": "none"}
        found = self.litellm.embedding(model="openai/demo-embed", input=TEXTS, **there)
        return [each["embedding"] for each in found.data]

    def responses(self) -> str:
        there = {"api_base": f"{self.router}/v1", "api_key": "none"}
        return self.litellm.responses(model="openai/demo", input="Hello", temperature=0, **there).output_text


class LitellmOllama(Litellm):
    def complete(self, **more: Any) -> Any:
        return super().complete(**{"model": "ollama_chat/demo", "api_base": self.router, **more})


CLIENTS = {
    "langchain-openai": LangchainOpenai,
    "langchain-ollama": LangchainOllama,
    "langchain-llama-cpp": LangchainLlamaCpp,
    "llamastat": Llamastat,
    "litellm": Litellm,
    "litellm-ollama": LitellmOllama,
}


def main(router: str, caller: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # some clients print
    for line in sys.stdin:
        client, cell = line.split()
        try:
            answer = {"is": getattr(CLIENTS[client](router, caller), cell)()}
        except Exception:
            answer = {"raised": traceback.format_exc()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
