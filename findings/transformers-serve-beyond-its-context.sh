#!/usr/bin/env bash
# `transformers serve` of transformers 5.24.0 (torch 2.13.0 on the CPU), with a tiny random Llama whose context is 512 tokens.
# Good guess: a prompt that does not fit into the model's context (`max_position_embeddings`) is refused, as by llama-server and vLLM.
# Behaviour: it is computed beyond the positions that the model was trained for, and answered with 200; nothing in the
#   answer says so but the number of prompt tokens.
# Seen: 200, 2,000 prompt tokens, 8 answer tokens, "length".
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 'transformers[serving]==5.24.0' accelerate==1.15.0 2>/dev/null
export HF_HUB_OFFLINE=1 HF_HOME=$folder/home
cat >"$folder/model.py" <<'PYTHON'
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
chats = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
chats.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
chats.save_pretrained(sys.argv[1])
torch.manual_seed(0)
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = LlamaConfig(vocab_size=len(words), max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)
model = LlamaForCausalLM(config)
model.save_pretrained(sys.argv[1])
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder/model" 2>/dev/null
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/transformers" serve "$folder/model" --host 127.0.0.1 --port "$port" --device cpu >"$folder/log" 2>&1 &
server=$!
for _ in $(seq 240); do
    curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
    kill -0 "$server" || { tail -5 "$folder/log"; exit 1; }
    sleep 0.5
done
told=$("$folder/venv/bin/python" - "http://127.0.0.1:$port/v1/chat/completions" "$folder/model" <<'PYTHON'
import json, sys, urllib.request

body = {"model": sys.argv[2], "messages": [{"role": "user", "content": "river " * 333 + "ab"}], "max_tokens": 8}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"content-type": "application/json"})
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print(response.status, *(answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")), answer["choices"][0]["finish_reason"])
PYTHON
)
echo "status, prompt tokens, answer tokens, end: $told"
[ "$told" = "200 2000 8 length" ]
