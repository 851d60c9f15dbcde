#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549, with a tiny random Llama model (gguf 0.19.0), two slots.
# Good guess: a request to a slot that does not exist (`POST /slots/9?action=save` of an engine with slots 0 and 1) is refused.
# Behaviour: the number wraps around: 9 saves, and erases, what slot 1 holds, with 200, and the answer names slot 9.
# Seen: slot 9 has as many tokens as slot 1 and not those of slot 0; erased through 9, slot 1 is empty.
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
    params.model.path, params.n_ctx, params.n_parallel, params.port = path, 1024, 2, 0
    params.slot_save_path = f"{folder}/"
    return xllamacpp.Server(params)


def post(engine, path, **body):
    request = urllib.request.Request(engine.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))


def fill(slot, prompt):
    letters = 'root ::= "a"'  # random weights would answer with bytes that are no text
    post(engine, "/completion", prompt=prompt, n_predict=1, grammar=letters, id_slot=slot)


def act(slot, action):
    return post(engine, f"/slots/{slot}?action={action}", filename="state")


engine = server(model("one", 1))
fill(0, "a market")
fill(1, PROMPT)
of_0, of_1, of_9 = (act(slot, "save") for slot in (0, 1, 9))
erased = act(9, "erase")
print(of_0["n_saved"], of_1["n_saved"], of_9["n_saved"], of_9["id_slot"], erased["id_slot"], act(1, "save")["n_saved"])
PYTHON
told=$("$folder/venv/bin/python" "$folder/run.py" "$folder" 2>"$folder/log") || { tail -5 "$folder/log"; exit 1; }
read -r of_0 of_1 of_9 named erased left <<<"$told"
echo "saved of slot 0: $of_0 tokens, of 1: $of_1, of 9: $of_9, named $named; erased $erased: $left tokens in slot 1"
[ "$of_0" -lt "$of_1" ] && [ "$of_9" = "$of_1" ] && [ "$named" = 9 ] && [ "$erased" = 9 ] && [ "$left" = 0 ]
