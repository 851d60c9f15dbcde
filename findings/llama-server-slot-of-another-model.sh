#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with two tiny random Llama models of one shape (gguf 0.19.0).
# Good guess: a state that `POST /slots/0?action=save` has written is refused by an engine that runs another model.
# Behaviour: of a model with the same shape (a fine-tune, say) it is taken: 200 with all tokens restored, the next
#   request counts them as cached, and its answer is neither that of the one model nor that of the other.
# Seen: restored by another model as many tokens as were saved, all but one of them counted as cached, another answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0 2>/dev/null
cat >"$folder/run.py" <<'PYTHON'
import json, pathlib, sys, urllib.request
import gguf, numpy, xllamacpp

folder = pathlib.Path(sys.argv[1])
WIDTH, WORDS = 64, 300
PROMPT = "a river, a bridge, and a market on the bank of the river. In the morning " * 3


def model(name, seed):
    random = numpy.random.default_rng(seed)
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"w{number}" for number in range(WORDS - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([3, 3, 3] + [6] * 256 + [1] * (WORDS - 259))
    shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}"] = (WIDTH, WIDTH)
        shapes |= {f"blk.{layer}.{part}_norm": (WIDTH,) for part in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.ffn_{part}": (2 * WIDTH, WIDTH) for part in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, 2 * WIDTH)
    for tensor, shape in shapes.items():
        values = random.standard_normal(shape) if len(shape) > 1 else numpy.ones(shape)
        writer.add_tensor(f"{tensor}.weight", values.astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder / f"{name}.gguf")


def server(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = path, 1024, 1, 0
    params.slot_save_path = f"{folder}/"
    return xllamacpp.Server(params)


def post(engine, path, **body):
    request = urllib.request.Request(engine.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))


def said(engine):
    letters = 'root ::= [a-z]*'  # random weights would answer with bytes that are no text
    told = post(engine, "/completion", prompt=PROMPT, n_predict=16, temperature=0, grammar=letters)
    return told["content"], told["timings"]["cache_n"]


one, other = server(model("one", 1)), server(model("other", 2))
mine, _ = said(one)
saved = post(one, "/slots/0?action=save", filename="state")["n_saved"]
theirs, _ = said(other)
post(other, "/slots/0?action=erase")
restored = post(other, "/slots/0?action=restore", filename="state")["n_restored"]
answer, cached = said(other)
print(restored == saved, cached, answer not in (mine, theirs))
PYTHON
told=$("$folder/venv/bin/python" "$folder/run.py" "$folder" 2>"$folder/log") || { tail -5 "$folder/log"; exit 1; }
read -r restored cached differs <<<"$told"
echo "another model restored all tokens of the state: $restored; cached in its next answer: $cached; another answer: $differs"
[ "$restored" = True ] && [ "$cached" -gt 100 ] && [ "$differs" = True ]
