"""What is shown of models in safetensors, from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_models import LLAMA, write_model

from router.engines.hf_card import file_info
from router.engines.vllm.describe import described
from router.engines.vllm.model import VllmModel

NAMES = {"max_position_embeddings": "n_positions", "hidden_size": "n_embd", "num_hidden_layers": "n_layer"}
GPT2 = {NAMES.get(key, key): value for key, value in {**LLAMA, "model_type": "gpt2"}.items()}
NESTED = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": LLAMA}


@pytest.mark.parametrize("config", [LLAMA, GPT2, NESTED], ids=["llama", "gpt2", "nested"])
def test_figures_have_the_names_of_gguf_whatever_they_are_called(tmp_path: Path, config: dict[str, Any]) -> None:
    model = VllmModel(alias="a", model_path=write_model(tmp_path / "a", config))
    kind = config["model_type"]
    shown = file_info(model).metadata
    assert shown["general.architecture"] == kind
    figures = [shown[f"{kind}.{name}"] for name in ("context_length", "embedding_length", "block_count")]
    assert figures == [2048, 64, 2]
    assert (described(model)["meta"]["n_ctx_train"], described(model)["meta"]["n_embd"]) == (2048, 64)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ hi }}"),
        ("chat_template.json", json.dumps({"chat_template": "{{ hi }}"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ hi }}"})),
        (
            "tokenizer_config.json",
            json.dumps(
                {
                    "chat_template": [
                        {"name": "tool_use", "template": "{{ tools }}"},
                        {"name": "default", "template": "{{ hi }}"},
                    ]
                }
            ),
        ),
    ],
    ids=["jinja", "json", "tokenizer", "several"],
)
def test_a_chat_template_is_shown_wherever_it_is(tmp_path: Path, file: str, content: str) -> None:
    folder = write_model(tmp_path / "a", chat_template=None)
    (folder / file).write_text(content)
    assert file_info(VllmModel(alias="a", model_path=folder)).template == "{{ hi }}"
