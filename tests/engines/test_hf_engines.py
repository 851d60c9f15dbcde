"""Which kind of engine runs a model in safetensors: the first installed one, and the next if it does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import pytest
from conftest import ROOT, Router, Start, run
from hf_models import LLAMA, played_transformers, write_model

REFUSAL = "ValueError: Model architectures ['LlamaForCausalLM'] are not supported for now."


FELL_BACK = "did not load, and runs on transformers instead of vllm"
MAKE_MODELS = Path(__file__).parent.parent / "make_hf_models.py"
REAL = {name: os.environ.get(name.upper(), "") for name in ("vllm", "transformers")}
RANKS = {**LLAMA, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def embedding_model(folder: Path) -> Path:
    """One of Sentence Transformers, whose architecture is that of a model that writes text."""
    write_model(folder)
    (folder / "modules.json").write_text(
        '[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]'
    )
    return folder


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both programs. That of vLLM refuses what is called `odd`."""
    folder = tmp_path_factory.mktemp("programs")
    vllm = folder / "vllm"
    fake = f'exec "{sys.executable}" "{ROOT}/tests/fake_vllm.py" "$@"'
    vllm.write_text(f'#!/bin/sh\ncase "$2" in *odd*) sleep 1; echo "{REFUSAL}" >&2; exit 1;; esac\n{fake}\n')
    vllm.chmod(0o755)
    return {"vllm_path": str(vllm), "transformers_path": str(played_transformers(folder))}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("usual")))


@pytest.fixture(scope="module")
def router(
    start_shared: Start, system: dict[str, str], usual: str, tmp_path_factory: pytest.TempPathFactory
) -> Router:
    folder = tmp_path_factory.mktemp("models")
    odd = str(write_model(folder / "odd", {**LLAMA, "max_position_embeddings": 100_000}))
    models = {
        "usual": {"model_path": usual},
        "quantized": {"model_path": usual, "quantize": "fp32"},
        "plain": {"model_path": str(write_model(folder / "plain", chat_template=None))},
        "odd": {"model_path": odd},
        "strict": {"engine": "vllm", "model_path": odd},
        "embeds": {"model_path": str(embedding_model(folder / "embeds"))},
        "ranks": {"model_path": str(write_model(folder / "ranks", RANKS, chat_template=None))},
    }
    return start_shared({"system": {**system, "stop_grace_sec": 3}, "models": models})


def engine_of(router: Router, model: str) -> str:
    name: str = router.status(model)["engine"]
    return name


def test_vllm_is_the_first_choice_unless_it_lacks_a_key(router: Router) -> None:
    assert router.chat("usual").status_code == 200
    assert router.chat("quantized").status_code == 200
    assert (engine_of(router, "usual"), engine_of(router, "quantized")) == ("vllm", "transformers")
    assert router.status("usual")["fallback"] is None


def test_models_that_embed_or_rank_run_where_they_can_and_lists_say_so(router: Router) -> None:
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert [cards[name]["capabilities"] for name in ("embeds", "ranks")] == [["embedding"], ["rerank"]]
    assert [engine_of(router, name) for name in ("embeds", "ranks")] == ["vllm", "vllm"]
    refused = router.chat("embeds")
    assert (refused.status_code, "'embeds' does not serve /v1/chat/completions" in refused.text) == (400, True)


def test_models_that_no_installed_engine_serves_are_told_with_the_reason(
    system: dict[str, str], tmp_path: Path
) -> None:
    embedding_model(tmp_path / "models/embeds")
    write_model(tmp_path / "models/sees", {**LLAMA, "architectures": ["ViTModel"], "vision_config": {}})
    write_model(tmp_path / "models/sorts", {**RANKS, "id2label": {"0": "good", "1": "bad"}})
    own = {"model_path": str(write_model(tmp_path / "ranks", RANKS))}
    config = {"system": {"transformers_path": system["transformers_path"]}, "models": {"ranks": own}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = run("check", "--models-dir", "models", cwd=tmp_path).stderr
    assert (
        f"{tmp_path}/models/embeds: not served, as no engine for it is installed: pip install 'llama-router[vllm]'"
        in told
    )
    assert "models/sees is not served: ViTModel neither writes text nor embeds nor ranks" in told
    assert "models/sorts is not served: BertForSequenceClassification neither" in told
    assert (
        "models.ranks: will not load, as no engine for it is installed: pip install 'llama-router[vllm]'" in told
    )


def test_the_estimate_is_what_the_router_plans(
    router: Router, system: dict[str, str], usual: str, tmp_path: Path
) -> None:
    assert router.chat("usual").status_code == 200
    planned = router.status("usual")["memory"]["estimated_mb"]
    told = run("estimate", usual, cwd=tmp_path, VLLM_PATH=system["vllm_path"])
    assert told.returncode == 0, told.stderr
    for device, mib in planned.items():
        assert f"{device}: {mib:,} MiB in all on vLLM" in told.stdout


def test_why_a_kind_was_chosen_and_what_is_installed_is_told(
    router: Router, system: dict[str, str], tmp_path: Path
) -> None:
    reasons = {name: router.status(name)["engine_reason"] for name in ("usual", "quantized", "plain", "strict")}
    assert reasons == {
        "usual": "the first that can run here",
        "quantized": "vllm: it lacks keys of the entry",
        "plain": "the model has no chat template, without which vllm answers no chats",
        "strict": None,
    }
    engines = router.http.get("/status").json()["engines"]
    assert engines["vllm"] == {
        "can_run": True,
        "program": system["vllm_path"],
        "version": "",
        "origin": "configured",
        "problem": "",
    }
    usual = {"model_path": str(write_model(tmp_path / "usual"))}
    config = {"system": {"transformers_path": system["transformers_path"]}, "models": {"usual": usual}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checked = run("check", cwd=tmp_path).stdout
    assert "models.usual.engine = transformers   (chosen: vllm: the program `vllm` was not found" in checked
    assert "engines.vllm = none   (the program `vllm` was not found: pip install" in checked
    assert "without bitsandbytes" in checked


def test_a_model_without_a_chat_template_runs_where_it_can_chat(router: Router) -> None:
    assert router.chat("plain").status_code == 200
    assert engine_of(router, "plain") == "transformers"


def test_a_model_that_does_not_load_there_runs_on_the_next(router: Router) -> None:
    """What waits meanwhile was meant for the first: it is put into the words of the other, large bodies, too."""

    def ask(content: str) -> Any:
        return router.chat("odd", content=content, max_tokens=2, temperature=1, top_k=5)

    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(ask, ["one", "one " * 400_000, "two two"]))
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [
        "one",
        "one one",
        "two two",
    ]
    for seen in router.http.get("/upstream/odd/seen").json()["requests"]:
        assert json.loads(seen["body"]["generation_config"]) == {"top_k": 5, "do_sample": True}
    status = router.status("odd")
    assert (status["engine"], status["slots"]) == ("transformers", 1)
    assert status["fallback"] == router.http.get("/status").json()["models"]["odd"]["fallback"] == FELL_BACK
    assert status["engine_reason"] is None, "it is not the one that was chosen"
    assert REFUSAL in router.log


def test_that_is_remembered(router: Router) -> None:
    router.chat("odd")
    router.http.post("/v1/models/eject", json={"model": "odd"})
    assert router.http.post("/v1/config/reload").status_code == 200
    before = router.log.count(REFUSAL)
    assert router.chat("odd").status_code == 200
    assert (engine_of(router, "odd"), router.log.count(REFUSAL)) == ("transformers", before)


def test_a_model_that_names_its_engine_runs_on_no_other(router: Router) -> None:
    answer = router.chat("strict")
    assert answer.status_code == 503
    assert REFUSAL in answer.json()["error"]["message"]
    assert engine_of(router, "strict") == "vllm"


def test_a_client_of_an_api_that_the_other_lacks_comes_again(tmp_path: Path, start: Start, system: Any) -> None:
    """vLLM has Anthropic's API itself, and Transformers is asked for chats."""
    router = start({"system": system, "models": {"odd": {"model_path": str(write_model(tmp_path / "odd"))}}})
    client = anthropic.Anthropic(base_url=router.url, api_key="-", max_retries=2)
    said = client.messages.create(model="odd", max_tokens=9, messages=[{"role": "user", "content": "one two"}])
    assert [block.text for block in said.content if block.type == "text"] == ["one two"]


def test_a_program_that_is_gone_is_none(tmp_path: Path, start: Start, system: dict[str, str]) -> None:
    gone = tmp_path / "vllm"
    gone.write_bytes(Path(system["vllm_path"]).read_bytes())
    gone.chmod(0o755)
    models = {"m": {"model_path": str(write_model(tmp_path / "m"))}}
    router = start({"system": {**system, "vllm_path": str(gone)}, "models": models})
    gone.unlink()
    assert router.chat("m").status_code == 200
    assert engine_of(router, "m") == "transformers"  # for want of a plan, or as the models were looked at again


def test_keys_that_no_kind_has_together_are_named(tmp_path: Path, system: dict[str, str]) -> None:
    models = {"m": {"model_path": str(write_model(tmp_path / "m")), "quantize": "q4", "slots": 4}}
    (tmp_path / "config.json").write_text(json.dumps({"system": system, "models": models}))
    checked = run("check", "--config", "config.json", cwd=tmp_path)
    problem = "models.m: has keys that no kind of engine has together: 'model_path', 'quantize', 'slots'"
    assert problem in checked.stderr


@pytest.mark.skipif(not all(REAL.values()), reason="VLLM and TRANSFORMERS name no programs")
@pytest.mark.timeout(900)
def test_what_the_real_vllm_does_not_load_runs_on_the_real_transformers(tmp_path: Path, start: Start) -> None:
    """vLLM has no GPT, the first one, and says so once."""
    python = Path(REAL["transformers"]).resolve().with_name("python")
    subprocess.run([python, MAKE_MODELS, tmp_path], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    system = {f"{name}_path": path for name, path in REAL.items()}
    models = {"gpt": {"model_path": str(tmp_path / "gpt")}}
    router = start({"system": {**system, "load_stall_sec": 300}, "models": models})
    router.http.timeout = 600
    for _ in range(2):
        answer = router.chat("gpt", max_tokens=3)
        assert answer.json()["usage"]["completion_tokens"] == 3, answer.text
        status = router.http.get("/status").json()["models"]["gpt"]
        assert (status["engine"], status["fallback"]) == ("transformers", FELL_BACK)
        router.unload()
    (told,) = [line for line in router.output if "instead of vllm" in line]
    print(told)
    assert "OpenAIGPTLMHeadModel" in told
