"""The variables of an earlier gateway to vLLM become entries of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_models import write_model

from router.catalog.load import load
from router.config.resolved import Config
from router.engines.vllm.model import VllmModel

ALLOWED = {"gemma3-4B": "google/gemma-3-4b-it", "qwen2.5": "Qwen/Qwen2.5-Coder-7B-Instruct"}
VARIABLES = {
    "ALLOWED_MODELS_JSON": json.dumps(ALLOWED),
    "DOCKER_NETWORK_NAME": "vllm_network",
    "VLLM_HOST": "vllm_server",
    "VLLM_GPU_MEMORY_UTILIZATION": "0.85",
    "HUGGING_FACE_HUB_TOKEN": "hf_secret",
}


def read(folder: Path, environ: dict[str, str], **written: Any) -> Config:
    (folder / "llama-router.json").write_text(json.dumps(written))
    return load(environ=environ, cwd=folder).config


def model(config: Config, alias: str = "gemma3-4B") -> VllmModel:
    found = config.models[alias]
    assert isinstance(found, VllmModel)
    assert found.container is not None
    return found


def test_each_allowed_model_is_vllm_in_a_container(tmp_path: Path) -> None:
    config = read(tmp_path, VARIABLES)
    assert list(config.models) == list(ALLOWED)
    assert (config.api.port, config.system.max_concurrent_models) == (9000, 1)
    gemma = model(config)
    container = gemma.container
    assert container is not None
    assert (container.image, container.entrypoint) == ("vllm/vllm-openai:latest", ("vllm", "serve"))
    assert (container.network, container.name, container.gpus) == ("vllm_network", "vllm_server", "all")
    assert (gemma.repo, container.downloads) == ("google/gemma-3-4b-it", True), "nobody else's is downloaded"
    assert gemma.flags == ("--gpu-memory-utilization", "0.85")
    assert gemma.env == {"HUGGING_FACE_HUB_TOKEN": "hf_secret", "HF_HOME": "/root/.cache/huggingface"}


def test_what_is_configured_takes_precedence(tmp_path: Path) -> None:
    own = {"engine": "vllm", "model_path": str(write_model(tmp_path / "tiny")), "container": {"image": "mine"}}
    config = read(
        tmp_path,
        {**VARIABLES, "VLLM_IMAGE": "vllm:mine"},
        api={"port": 8000},
        system={"max_concurrent_models": 2},
        models={"gemma3-4B": own},
    )
    assert (config.api.port, config.system.max_concurrent_models) == (8000, 2)
    mine, qwen = (model(config, alias).container for alias in ("gemma3-4B", "qwen2.5"))
    assert mine is not None
    assert qwen is not None
    assert (mine.image, qwen.image) == ("mine", "vllm:mine")
    assert qwen.name is None, "as there may be two of them"


@pytest.mark.parametrize("name", ["DOCKER_NETWORK_NAME", "VLLM_HOST", "VLLM_GPU_MEMORY_UTILIZATION"])
def test_one_of_the_variables_is_enough_beside_the_list(tmp_path: Path, name: str) -> None:
    some = {key: VARIABLES[key] for key in ("ALLOWED_MODELS_JSON", name)}
    assert list(read(tmp_path, some).models) == list(ALLOWED)


def test_the_list_alone_says_what_may_be_pulled(tmp_path: Path) -> None:
    alone = read(tmp_path, {"ALLOWED_MODELS_JSON": VARIABLES["ALLOWED_MODELS_JSON"]})
    assert (alone.models, alone.api.port) == ({}, 8000)
    without = read(tmp_path, {key: value for key, value in VARIABLES.items() if key != "ALLOWED_MODELS_JSON"})
    assert (without.models, without.api.port) == ({}, 8000)
