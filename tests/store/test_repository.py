"""Stories about choosing the files of a repository: from names and sizes to files and an alias."""

from __future__ import annotations

import pytest

from router.store.repository import (
    BadReference,
    Choice,
    NoChoice,
    NotAllowed,
    Reference,
    choose,
    parse,
    permitted,
    quantized,
)

MIRROR = {"HF_ENDPOINT": "http://hub.example:8080"}


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hf.co/org/m-GGUF", Reference("org/m-GGUF")),
        ("org/m-GGUF:Q8_0", Reference("org/m-GGUF", "Q8_0")),
        ("https://huggingface.co/org/m-GGUF:q4_0", Reference("org/m-GGUF", "q4_0")),
        ("https://huggingface.co/org/m-GGUF/", Reference("org/m-GGUF")),
        ("hf.co/org/m/sub/m.gguf", Reference("org/m", file="sub/m.gguf")),
        ("https://huggingface.co/org/m/blob/v2/m.gguf?x=1", Reference("org/m", file="m.gguf", revision="v2")),
        ("https://huggingface.co/org/m/tree/v2", Reference("org/m", revision="v2")),
        ("http://hub.example:8080/org/m", Reference("org/m")),
        ("hf.co/org/m-GGUF:latest", Reference("org/m-GGUF")),
        ("gpt2", Reference("openai-community/gpt2")),
        ("https://huggingface.co/gpt2-medium", Reference("openai-community/gpt2-medium")),
        ("gpt2-large:latest", Reference("openai-community/gpt2-large")),
        ("distilgpt2", Reference("distilbert/distilgpt2")),
        ("EleutherAI/gpt-neo-125m", Reference("EleutherAI/gpt-neo-125m")),
        ("EleutherAI/gpt-neo-1.3B", Reference("EleutherAI/gpt-neo-1.3B")),
    ],
)
def test_a_model_is_named_as_people_copy_it(text: str, reference: Reference) -> None:
    assert parse(text, MIRROR) == reference
    assert parse(str(reference), {}) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "llama3",
        "https://example.com/org/m.gguf",
        "org/../etc",
        "org/m/../../x.gguf",
        "org/m/readme.md",
        "org/m/x.gguf:Q4_0",
        "-rf/m",
        "org/m--x",
        "org/m:a b",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadReference, match=r"hf\.co|QUANT|quantization"):
        parse(text, {})


def chosen(*files: str, quant: str | None = None, file: str | None = None) -> Choice:
    return choose(Reference("org/m", quant, file), dict.fromkeys(files, 1000))


def test_without_a_quantization_it_is_q4_k_m_and_nothing_that_is_no_model_comes_along() -> None:
    choice = chosen(
        "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-imatrix.gguf", "mtp-m-Q4_K_M.gguf", "README.md"
    )
    assert choice == Choice("org/m:Q4_K_M", "m-Q4_K_M.gguf", ("m-Q4_K_M.gguf",), None)


def test_else_it_is_the_closest_in_a_fixed_order() -> None:
    order = "Q4_K_M UD-Q4_K_M Q4_K_XL UD-Q4_K_XL Q4_K_L Q4_K_S IQ4_NL IQ4_XS Q4_1 Q4_0 MXFP4_MOE Q5_K_M Q5_0 Q6_K "
    order += "Q8_0 Q3_K_M IQ3_XS Q2_K BF16 F16 F32 TQ1_0"
    left = [f"m-{label}.gguf" for label in order.split()]
    while left:
        assert chosen(*sorted(left)).model == left[0]
        left.pop(0)


def test_a_quantization_is_taken_as_asked_for_or_not_at_all() -> None:
    there = ("m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-UD-Q2_K_XL.gguf", "m-Q2_K_XL.gguf")
    assert chosen(*there, quant="q4_k_m").model == "m-Q4_K_M.gguf"
    assert chosen(*there, quant="Q4_K_XL").model == "m-UD-Q4_K_XL.gguf"
    assert chosen(*there, quant="Q2_K_XL").model == "m-Q2_K_XL.gguf"
    with pytest.raises(NoChoice, match="no Q8_0; it has Q2_K_XL, Q4_K_M, UD-Q2_K_XL, UD-Q4_K_XL"):
        chosen(*there, quant="Q8_0")


def test_a_word_for_so_many_bits_takes_the_closest_of_them() -> None:
    there = ["m-IQ4_XS.gguf", "m-Q4_0.gguf", "m-Q4_K_S.gguf", "m-Q5_K_M.gguf", "m-Q8_0.gguf"]
    for quant, label in (("q4", "Q4_K_S"), ("Q5", "Q5_K_M"), ("q8", "Q8_0")):
        assert chosen(*there, quant=quant).model == f"m-{label}.gguf"
    for quant in ("q6", "fp16", "no", "q40"):
        with pytest.raises(NoChoice, match=f"no {quant}; it has IQ4_XS, "):
            chosen(*there, quant=quant)
    full = [*there, "m-F32.gguf"]
    assert chosen(*full, quant="no").model == chosen(*full, quant="fp32").model == "m-F32.gguf"
    full.append("m-BF16.gguf")
    assert chosen(*full, quant="no").model == chosen(*full, quant="fp16").model == "m-BF16.gguf"


def test_auto_is_unquantized_up_to_a_size() -> None:
    parts = ("m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf")
    sizes = {**dict.fromkeys(parts, 7), "m-Q4_K_M.gguf": 4, "m-Q8_0.gguf": 8}
    auto = Reference("org/m", "auto")
    assert choose(auto, sizes, 14).model == parts[0]
    assert choose(auto, sizes, 13).model == "m-Q4_K_M.gguf"
    assert choose(auto, {"m-Q8_0.gguf": 8}, 14).model == "m-Q8_0.gguf"
    assert choose(auto, {"m.gguf": 8}, 14).model == "m.gguf"


def test_a_quantization_is_said_once() -> None:
    assert quantized(Reference("org/m"), "q4") == Reference("org/m", "q4")
    for said in (Reference("org/m", "Q8_0"), Reference("org/m", file="m.gguf")):
        assert quantized(said, "auto") == said
        with pytest.raises(BadReference, match="omit `quantize`"):
            quantized(said, "q4")
    with pytest.raises(BadReference, match="not a quantization"):
        quantized(Reference("org/m"), "a b")


def test_only_what_is_on_the_list_may_be_pulled() -> None:
    allowed = {"any": "org/m", "one": "hf.co/org/n:Q8_0"}
    assert permitted("any", allowed, {}) == (Reference("org/m"), "any")
    assert permitted("one", allowed, {}) == (Reference("org/n", "Q8_0"), "one")
    assert permitted("one:latest", allowed, {}) == (Reference("org/n", "Q8_0"), "one"), "as Ollama's clients say"
    for text in ("org/m", "hf.co/org/m:Q4_0", "org/m/sub/m.gguf", "org/n:Q8_0"):
        assert permitted(text, allowed, {}) == (parse(text, {}), None)
        assert permitted(text, None, {}) == (parse(text, {}), None)
    for text in ("org/n", "org/n:Q4_0", "https://huggingface.co/org/m/tree/v2", "org/other", "two", "", "a b"):
        with pytest.raises(NotAllowed, match="allowed: any, one"):
            permitted(text, allowed, {})
    with pytest.raises(NotAllowed, match="allowed: none"):
        permitted("org/m", {}, {})


def test_a_split_model_comes_whole_also_when_a_folder_names_its_quantization() -> None:
    parts = tuple(f"BF16/m-{part:05}-of-00003.gguf" for part in (1, 2, 3))
    choice = chosen(*parts, "m-Q8_0.gguf", quant="BF16")
    assert (choice.alias, choice.model, choice.parts) == ("org/m:BF16", parts[0], parts)
    with pytest.raises(NoChoice, match=r"00002-of-00003\.gguf is missing"):
        chosen(parts[0], parts[2])


def test_the_projector_comes_along_from_the_folder_or_above() -> None:
    sizes = {"q8/m-Q8_0.gguf": 9, "mmproj-F32.gguf": 4, "mmproj-F16.gguf": 2, "other/mmproj-Q8_0.gguf": 1}
    choice = choose(Reference("org/m"), sizes)
    assert choice.mmproj == "mmproj-F16.gguf"
    assert choice.files == ("q8/m-Q8_0.gguf", "mmproj-F16.gguf")


def test_of_several_models_one_has_to_be_named() -> None:
    with pytest.raises(NoChoice, match=r"several such models: use one, as in hf.co/org/m/one-Q8_0.gguf"):
        chosen("one-Q8_0.gguf", "two-Q8_0.gguf")
    assert chosen("one-Q8_0.gguf", "two-Q8_0.gguf", file="two-Q8_0.gguf").alias == "org/m/two-Q8_0"
    with pytest.raises(NoChoice, match=r"it has one-Q8_0\.gguf"):
        chosen("one-Q8_0.gguf", file="three.gguf")


def test_a_repository_without_a_model_says_where_to_look() -> None:
    with pytest.raises(NoChoice, match="-GGUF"):
        chosen("model.safetensors", "mmproj.gguf")


# --- safetensors -----------------------------------------------------------------------------------------


def test_a_repository_in_safetensors_is_taken_with_all_that_its_engine_reads() -> None:
    weights = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    beside = ("1_Pooling/config.json", "config.json", "generation_config.json", "merges.txt")
    index = "model.safetensors.index.json"
    others = (
        "README.md",
        "consolidated.safetensors",
        "flax_model.msgpack",
        "images/a.json",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
    )
    choice = chosen(*weights, *beside, index, "tokenizer.json", "chat_template.jinja", *others)

    assert (choice.alias, choice.model, choice.mmproj, choice.weights) == ("org/m", ".", None, weights)
    assert set(choice.files) == {*weights, *beside, index, "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize(("quant", "quantize"), [("auto", None), ("NO", "no"), ("q4", "q4"), ("fp16", "fp16")])
def test_a_quantization_of_safetensors_is_how_they_are_loaded(quant: str, quantize: str | None) -> None:
    choice = chosen("config.json", "model.safetensors", quant=quant)
    assert (choice.alias, choice.model, choice.quantize) == ("org/m", ".", quantize)


def test_gguf_is_preferred_where_there_is_both() -> None:
    assert chosen("config.json", "model.safetensors", "m-Q4_K_M.gguf").model == "m-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("files", "asked", "reason"),
    [
        (("config.json", "pytorch_model.bin"), {}, "has no weights in safetensors format, and no GGUF model"),
        (("config.json", "adapter_model.safetensors"), {}, "has no weights in safetensors format"),
        (("config.json", "model-00001-of-00002.safetensors"), {}, "is incomplete: it has 1 of 2 files"),
        (
            ("config.json", "model.safetensors"),
            {"quant": "Q4_K_M"},
            "can be loaded as auto, q4",
        ),
        (("config.json", "model.safetensors"), {"file": "m.gguf"}, "has no GGUF model, but one in safetensors"),
        (("model_index.json", "unet/model.safetensors"), {}, "has no GGUF model"),
    ],
)
def test_what_is_no_model_in_safetensors_is_refused(
    files: tuple[str, ...], asked: dict[str, str], reason: str
) -> None:
    with pytest.raises(NoChoice, match=reason):
        chosen(*files, **asked)
