"""Makes tiny random models: a Llama with a chat template, a GPT-2 without one, and a GPT, which vLLM lacks.

    python make_hf_models.py FOLDER

Run by the Python of an environment with transformers and torch, which the tests' own has not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<s>", "</s>", "<pad>")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *BYTES))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if template is not None:
        fast.chat_template = template
    return fast


def main(folder: Path) -> None:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": len(SPECIAL) + len(BYTES)}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=128, intermediate_size=256, max_position_embeddings=4096, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer(TEMPLATE).save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=64, n_layer=2, n_head=4, **ids)).save_pretrained(
        folder / "gpt2"
    )
    tokenizer(None).save_pretrained(folder / "gpt2")
    gpt = OpenAIGPTConfig(n_positions=512, n_embd=64, n_layer=2, n_head=2, vocab_size=ids["vocab_size"])
    OpenAIGPTLMHeadModel(gpt).save_pretrained(folder / "gpt")
    tokenizer(TEMPLATE).save_pretrained(folder / "gpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
