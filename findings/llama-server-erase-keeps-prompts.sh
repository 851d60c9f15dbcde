#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with a tiny random Llama model (gguf 0.19.0).
# Good guess: after `POST /slots/0?action=erase` of its only slot the server computes whatever prompt it is asked.
# Behaviour: erase forgets what the slot holds, not what was moved from it to RAM when another prompt took its place
#   (--cache-ram, 8 GiB by default): such a prompt is cached as a whole, and its text is still in the process.
# Seen: all tokens of the prompt before the last are cached after the erase, none of the last one.
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


def cached(engine, prompt):
    letters = 'root ::= "a"'  # random weights would answer with bytes that are no text
    return post(engine, "/completion", prompt=prompt, n_predict=1, grammar=letters)["timings"]["cache_n"]


engine = server(model("one", 1))
first, last = PROMPT, PROMPT[::-1]
cached(engine, first), cached(engine, last)
post(engine, "/slots/0?action=erase")
of_last = cached(engine, last)
print(of_last, cached(engine, first), len(PROMPT))
PYTHON
told=$("$folder/venv/bin/python" "$folder/run.py" "$folder" 2>"$folder/log") || { tail -5 "$folder/log"; exit 1; }
read -r last first length <<<"$told"
echo "tokens cached after the erase: $last of the last prompt, $first of the one before it, of $length characters"
[ "$last" -lt 10 ] && [ "$first" -gt $((length * 9 / 10)) ]
