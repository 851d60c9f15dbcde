#!/usr/bin/env bash
# `transformers serve` of transformers 5.24.0 (torch 2.13.0 on the CPU), with a tiny random Llama that it loads from a folder.
# Good guess: `--continuous-batching` changes how requests are computed together, not what a request may ask for.
# Behaviour: with it, `stop` is accepted and ignored: the same greedy request that ends at its stop text without the flag
#   runs to `max_tokens` with it, and says `finish_reason: length`.
#   Without it, the stop text itself is part of the answer, which OpenAI's API leaves out.
# Seen: stop text UsG; without the flag: stop "bGDbGUsG"; with it: length "bGDbGUsGUsGUsGUsGUsG…", 48 tokens.
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
letters = torch.tensor([len(word) == 1 and word.isascii() and word.isalpha() for word in words])
model.lm_head.weight.data[~letters] = 0  # so that the random model says letters
model.lm_head.weight.data[letters] += 0.01
model.save_pretrained(sys.argv[1])
PYTHON
cat >"$folder/ask.py" <<'PYTHON'
import json, sys, urllib.request

url, name, stop = sys.argv[1], sys.argv[2], sys.argv[3:]
body = {"model": name, "messages": [{"role": "user", "content": "a river and a bridge"}], "max_tokens": 48, "temperature": 0}
body |= {"stop": stop[0]} if stop else {}
request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
choice = json.load(urllib.request.urlopen(request))["choices"][0]
print(choice["finish_reason"], json.dumps(choice["message"]["content"]))
PYTHON
"$folder/venv/bin/python" "$folder/model.py" "$folder/model" 2>/dev/null
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port/v1/chat/completions

serve() {
    "$folder/venv/bin/transformers" serve "$folder/model" --host 127.0.0.1 --port "$port" --device cpu "$@" >"$folder/log" 2>&1 &
    server=$!
    for _ in $(seq 240); do
        curl -sf "http://127.0.0.1:$port/health" >/dev/null && return
        kill -0 "$server" || { tail -5 "$folder/log"; exit 1; }
        sleep 0.5
    done
}
end() { kill "$server"; wait "$server" || true; server=; }
ask() { "$folder/venv/bin/python" "$folder/ask.py" "$url" "$folder/model" "$@"; }

serve
free=$(ask)
stop=$("$folder/venv/bin/python" -c 'import json, sys; print(json.loads(sys.argv[1].split(" ", 1)[1])[8:11])' "$free")
alone=$(ask "$stop")
end
serve --continuous-batching --cb-num-blocks 64 --cb-block-size 32 --cb-max-batch-tokens 256
batched=$(ask "$stop")
end
echo "stop text $stop; without --continuous-batching: $alone; with it: $batched"
[[ $alone == "stop "*"$stop\"" && $batched == "length "* && ${#batched} -gt ${#alone} ]]
