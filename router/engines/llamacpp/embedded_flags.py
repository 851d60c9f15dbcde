"""Translates llama-server's flags to `xllamacpp.CommonParams`, and rejects those that are not supported.

Part of the embedded engine, which imports it at every start. The module is long because it is a table with one row
per flag, preceded by the functions that the rows are built from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from router.engines.llamacpp.flags import Flag, FlagError, Flags


class UsageError(Exception):
    """Raised for flags that the embedded engine does not support; the message is for people."""


def parameters(flags: Flags) -> Any:
    """Return the parameters set by the flags, with llama-server's defaults for the rest. Raises UsageError."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.port = 8080
    params.n_parallel = -1
    params.default_template_kwargs = {"preserve_reasoning": "true"}

    refused: list[str] = []
    problems: list[str] = []
    for flag in flags.given:
        if flag.name in PASSED_OVER:
            continue
        try:
            SUPPORTED.get(flag.name, _refuse)(params, flag)
        except AttributeError:  # this xllamacpp does not have the parameter
            refused.append(flag.spelling)
        except FlagError as error:
            problems.append(error.message)
        except (ValueError, OverflowError, OSError) as error:
            problems.append(f"{' '.join((flag.spelling, *flag.values))}: {error}")
    if refused:
        names = ", ".join(dict.fromkeys(refused))
        problems.append(
            f"the embedded engine (xllamacpp) can't honor {names}; remove them, or install llama-server"
        )
    if not params.model.path:
        problems.append("-m FILE is missing")
    if problems:
        raise UsageError("; ".join(problems))
    if flags.switch("escape", True):
        params.antiprompt = [_unescape(text) for text in params.antiprompt]
    return params


Apply = Callable[[Any, Flag], None]
"""Function that applies a flag to the parameters."""


def _refuse(params: Any, flag: Flag) -> None:
    raise AttributeError(flag.name)


def _holder(params: Any, path: str) -> tuple[Any, str]:
    """Resolve a dotted path: for `sampling.temp`, return the object at `sampling` and the name `temp`."""
    *parents, attribute = path.split(".")
    for parent in parents:
        params = getattr(params, parent)
    return params, attribute


def _put(params: Any, path: str, value: object) -> None:
    holder, attribute = _holder(params, path)
    setattr(holder, attribute, value)


def _extend(params: Any, path: str, values: Iterable[object]) -> None:
    """Extend a list by assigning a new one: xllamacpp returns copies, so appending would have no effect."""
    holder, attribute = _holder(params, path)
    setattr(holder, attribute, [*getattr(holder, attribute), *values])


def _enumerator(enum: str, member: str) -> Any:
    import xllamacpp

    return getattr(getattr(xllamacpp, enum), f"{enum}_{member}".upper())


def _one_of(flag: Flag, words: Iterable[str]) -> str:
    if flag.text not in (allowed := list(words)):
        raise flag.error(f"takes one of {', '.join(allowed)}, not {flag.text!r}")
    return flag.text


def _read(flag: Flag) -> str:
    try:
        with open(flag.text, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise flag.error(f"names a file that can't be read: {error}") from None


def _fields(text: str) -> list[str]:
    """Split a comma-separated list with quotes: `a,"b,c"` has two fields."""
    import csv

    return next(csv.reader([text]), [])


def _unescape(text: str) -> str:
    import re

    plain = {"n": "\n", "r": "\r", "t": "\t"}
    return re.sub(
        r"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))",
        lambda match: chr(int(match[1], 16)) if match[1] else plain.get(match[2], match[2]),
        text,
    )


# Functions that make the rows of the table, by the kind of flag; `path` is the parameter that it sets.


def _whole(path: str, low: int = -(2**31), high: int = 2**31 - 1) -> Apply:
    return lambda params, flag: _put(params, path, flag.integer(low, high))


def _number(path: str, low: float = -math.inf) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        if flag.number() < low:
            raise flag.error(f"must be at least {low:g}, not {flag.text}")
        _put(params, path, flag.number())

    return apply


def _text(path: str) -> Apply:
    return lambda params, flag: _put(params, path, flag.text)


def _content(path: str) -> Apply:
    return lambda params, flag: _put(params, path, _read(flag))


def _switch(path: str, value: bool = True) -> Apply:
    return lambda params, flag: _put(params, path, value is not flag.negated)


def _choice(path: str, choices: Mapping[str, object]) -> Apply:
    return lambda params, flag: _put(params, path, choices[_one_of(flag, choices)])


def _member(path: str, enum: str, members: Mapping[str, str]) -> Apply:
    return lambda params, flag: _put(params, path, _enumerator(enum, members[_one_of(flag, members)]))


def _names(*names: str) -> dict[str, str]:
    """Map words to enum members of the same names."""
    return {name: name.replace("-", "_") for name in names}


def _folder(path: str) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        if not os.path.isdir(flag.text):
            raise flag.error(f"takes a folder, which {flag.text!r} is not")
        _put(params, path, os.path.join(flag.text, ""))

    return apply


def _labels(path: str) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        labels = {label for part in flag.text.split(",") if (label := part.strip())}
        _put(params, path, getattr(params, path) | labels)

    return apply


def _sampling(bit: str, apply: Apply) -> Apply:
    """Record that a sampling parameter was set, so that the model file's recommendation does not replace it."""

    def apply_and_note(params: Any, flag: Flag) -> None:
        apply(params, flag)
        params.sampling.user_sampling_config |= int(_enumerator("common_params_sampling_config", bit))

    return apply_and_note


def _threads(path: str) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        _put(params, path, count if (count := flag.integer()) > 0 else os.cpu_count() or 1)

    return apply


def _cpus(path: str, mask_of: Callable[[Flag], int]) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        cpus, _ = _holder(params, f"{path}.cpumask")
        mask = mask_of(flag)
        cpus.cpumask = [used or bool(mask >> cpu & 1) for cpu, used in enumerate(cpus.cpumask)]
        cpus.mask_valid = True

    return apply


def _mask(flag: Flag) -> int:
    try:
        return int(flag.text, 16)
    except ValueError:
        raise flag.error(f"takes a mask in hexadecimal digits, not {flag.text!r}") from None


def _range(flag: Flag) -> int:
    low, dash, high = flag.text.partition("-")
    try:
        first, last = int(low or 0), int(high or 511)
    except ValueError:
        first = last = -1
    if not dash or not 0 <= first <= last < 512:
        raise flag.error(f"takes a range of CPUs like 0-7, not {flag.text!r}")
    return sum(1 << cpu for cpu in range(first, last + 1))


def _gpu_layers(path: str) -> Apply:
    words = {"auto": -1, "all": -2}
    return lambda params, flag: _put(params, path, words[flag.text] if flag.text in words else flag.integer())


_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE = r"\.ffn_(up|down|gate)\."


def _placed(path: str, placements: Callable[[Flag], Iterable[str]]) -> Apply:
    """Place tensors by `PATTERN=BUFFER`; xllamacpp takes all of them in one string."""

    def apply(params: Any, flag: Flag) -> None:
        holder, attribute = _holder(params, path)
        before = getattr(holder, attribute)
        setattr(holder, attribute, ",".join([*([before] if before else []), *placements(flag)]))

    return apply


def _first_layers(tensors: str) -> Callable[[Flag], Iterable[str]]:
    return lambda flag: (rf"blk\.{layer}{tensors}=CPU" for layer in range(flag.integer(0, 4096)))


def _lora(scaled: bool) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        import xllamacpp

        for item in _fields(flag.text):
            path, colon, scale = item.rpartition(":") if scaled else (item, ":", "1")
            if not colon:
                raise flag.error(f"takes FILE:SCALE, not {item!r}")
            adapter = xllamacpp.CommonAdapterLoraInfo(path, Flag(flag.name, flag.spelling, (scale,)).number())
            _extend(params, "lora_adapters", [adapter])

    return apply


def _grammar(kind: str, grammar: Callable[[Flag], str]) -> Apply:
    def apply(params: Any, flag: Flag) -> None:
        import xllamacpp

        text = grammar(flag)
        if kind == "output_format":
            text = xllamacpp.json_schema_to_grammar(text)
        params.sampling.grammar = xllamacpp.CommonGrammar(_enumerator("common_grammar_type", kind), text)

    return apply


_ON = ("on", "enabled", "true", "1")
_OFF = ("off", "disabled", "false", "0")
_AUTO = ("auto", "-1")
_ATTENTION = {**dict.fromkeys(_ON, "enabled"), **dict.fromkeys(_OFF, "disabled"), **dict.fromkeys(_AUTO, "auto")}
_CACHE_TYPES = _names("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_LOAD_MODES = _names("auto", "none", "mmap", "mlock") | {"mmap+mlock": "mmap_mlock", "dio": "direct_io"}
_REASONING_FORMATS = _names("none", "auto", "deepseek", "deepseek-legacy")

SUPPORTED: dict[str, Apply] = {
    # threads
    "threads": _threads("cpuparams.n_threads"),
    "cpu-mask": _cpus("cpuparams", _mask),
    "cpu-range": _cpus("cpuparams", _range),
    "cpu-strict": _whole("cpuparams.strict_cpu", 0, 1),
    "prio": _whole("cpuparams.priority", -1, 3),
    "poll": _whole("cpuparams.poll", 0, 100),
    "threads-batch": _threads("cpuparams_batch.n_threads"),
    "cpu-mask-batch": _cpus("cpuparams_batch", _mask),
    "cpu-range-batch": _cpus("cpuparams_batch", _range),
    "cpu-strict-batch": _whole("cpuparams_batch.strict_cpu", 0, 1),
    "prio-batch": _whole("cpuparams_batch.priority", 0, 3),
    "poll-batch": _whole("cpuparams_batch.poll", 0, 100),
    "numa": _member("numa", "ggml_numa_strategy", _names("distribute", "isolate", "numactl")),
    # context, KV cache, batches
    "kv-unified-per-slot": _whole("kv_unified_per_slot", 0),
    "kv-unified": _switch("kv_unified"),
    "n-predict": _whole("n_predict", -1),
    "keep": _whole("n_keep", -1),
    "batch-size": _whole("n_batch", 1),
    "ubatch-size": _whole("n_ubatch", 1),
    "cont-batching": _switch("cont_batching"),
    "context-shift": _switch("ctx_shift"),
    "swa-full": _switch("swa_full"),
    "flash-attn": _member("flash_attn_type", "llama_flash_attn_type", _ATTENTION),
    "cache-type-k": _member("cache_type_k", "ggml_type", _CACHE_TYPES),
    "cache-type-v": _member("cache_type_v", "ggml_type", _CACHE_TYPES),
    "kv-offload": _switch("no_kv_offload", False),
    "cache-prompt": _switch("cache_prompt"),
    "cache-reuse": _whole("n_cache_reuse", 0),
    "cache-ram": _whole("cache_ram_mib", -1),
    "cache-idle-slots": _switch("cache_idle_slots"),
    "ctx-checkpoints": _whole("n_ctx_checkpoints", 0),
    "checkpoint-min-step": _whole("checkpoint_min_step", 0),
    "slot-prompt-similarity": _number("slot_prompt_similarity"),
    "rope-scaling": _member("rope_scaling_type", "llama_rope_scaling_type", _names("none", "linear", "yarn")),
    "rope-freq-base": _number("rope_freq_base"),
    "rope-freq-scale": _number("rope_freq_scale"),
    "yarn-orig-ctx": _whole("yarn_orig_ctx", 0),
    "yarn-ext-factor": _number("yarn_ext_factor"),
    "yarn-attn-factor": _number("yarn_attn_factor"),
    "yarn-beta-slow": _number("yarn_beta_slow"),
    "yarn-beta-fast": _number("yarn_beta_fast"),
    # the model and where it goes
    "model": _text("model.path"),
    "alias": _labels("model_alias"),
    "tags": _labels("model_tags"),
    "load-mode": _member("load_mode", "llama_load_mode", _LOAD_MODES),
    "lazy-mode": _member("lazy_mode", "llama_lazy_mode", _names("on", "auto", "off")),
    "warmup": _switch("warmup"),
    "check-tensors": _switch("check_tensors"),
    "repack": _switch("no_extra_bufts", False),
    "no-host": _switch("no_host"),
    "op-offload": _switch("no_op_offload", False),
    "override-tensor": _placed("tensor_buft_overrides", lambda flag: [flag.text]),
    "cpu-moe": _placed("tensor_buft_overrides", lambda flag: [f"{_EXPERTS}=CPU"]),
    "n-cpu-moe": _placed("tensor_buft_overrides", _first_layers(_EXPERTS)),
    "n-cpu-ffn": _placed("tensor_buft_overrides", _first_layers(_DENSE)),
    "n-gpu-layers": _gpu_layers("n_gpu_layers"),
    "split-mode": _member("split_mode", "llama_split_mode", _names("none", "layer", "row", "tensor")),
    "main-gpu": _whole("main_gpu", 0),
    "fit": _choice("fit_params", {**dict.fromkeys(_ON, True), **dict.fromkeys(_OFF, False)}),
    "fit-ctx": _whole("fit_params_min_ctx", 0),
    "lora": _lora(scaled=False),
    "lora-scaled": _lora(scaled=True),
    "lora-init-without-apply": _switch("lora_init_without_apply"),
    "hf-token": _text("hf_token"),
    "offline": _switch("offline"),
    # images, audio, video
    "mmproj": _text("mmproj.path"),
    "mmproj-url": _text("mmproj.url"),
    "mmproj-auto": _switch("no_mmproj", False),
    "mmproj-offload": _switch("mmproj_use_gpu"),
    "mmproj-device": _text("mmproj_device"),
    "image-min-tokens": _whole("image_min_tokens"),
    "image-max-tokens": _whole("image_max_tokens"),
    "mtmd-batch-max-tokens": _whole("mtmd_batch_max_tokens", 1),
    "video-fps": _number("video_fps"),
    "video-timestamp-interval": _whole("video_timestamp_interval_ms"),
    "video-ffmpeg-dir": _text("video_ffmpeg_bin_dir"),
    "media-path": _folder("media_path"),
    # sampling
    "samplers": _sampling("samplers", _text("sampling.samplers")),
    "ignore-eos": _switch("sampling.ignore_eos"),
    "temp": _sampling("temp", lambda params, flag: _put(params, "sampling.temp", max(flag.number(), 0.0))),
    "top-k": _sampling("top_k", _whole("sampling.top_k")),
    "top-p": _sampling("top_p", _number("sampling.top_p")),
    "min-p": _sampling("min_p", _number("sampling.min_p")),
    "xtc-probability": _sampling("xtc_probability", _number("sampling.xtc_probability")),
    "xtc-threshold": _sampling("xtc_threshold", _number("sampling.xtc_threshold")),
    "typical": _number("sampling.typ_p"),
    "presence-penalty": _number("sampling.penalty_present"),
    "frequency-penalty": _number("sampling.penalty_freq"),
    "dry-multiplier": _number("sampling.dry_multiplier"),
    "dry-base": _number("sampling.dry_base", low=1),
    "dry-allowed-length": _whole("sampling.dry_allowed_length"),
    "dry-penalty-last-n": _whole("sampling.dry_penalty_last_n", 0),
    "adaptive-target": _number("sampling.adaptive_target"),
    "adaptive-decay": _number("sampling.adaptive_decay"),
    "dynatemp-range": _number("sampling.dynatemp_range"),
    "dynatemp-exp": _number("sampling.dynatemp_exponent"),
    "mirostat": _sampling("mirostat", _whole("sampling.mirostat", 0, 2)),
    "mirostat-lr": _sampling("mirostat_eta", _number("sampling.mirostat_eta")),
    "mirostat-ent": _sampling("mirostat_tau", _number("sampling.mirostat_tau")),
    "grammar": _grammar("user", lambda flag: flag.text),
    "grammar-file": _grammar("user", _read),
    "json-schema": _grammar("output_format", lambda flag: flag.text),
    "json-schema-file": _grammar("output_format", _read),
    "backend-sampling": _switch("sampling.backend_sampling"),
    "escape": _switch("escape"),
    "reverse-prompt": lambda params, flag: _extend(params, "antiprompt", [flag.text]),
    "special": _switch("special"),
    # chat
    "jinja": _switch("use_jinja"),
    "chat-template": _text("chat_template"),
    "chat-template-file": _content("chat_template"),
    "skip-chat-parsing": _switch("force_pure_content_parser"),
    "prefill-assistant": _switch("prefill_assistant"),
    "reasoning-format": _member("reasoning_format", "common_reasoning_format", _REASONING_FORMATS),
    "reasoning-budget": _whole("sampling.reasoning_budget_tokens", -1),
    "reasoning-budget-message": _text("sampling.reasoning_budget_message"),
    # embeddings
    "embedding": _switch("embedding"),
    "pooling": _member("pooling_type", "llama_pooling_type", _names("none", "mean", "cls", "last", "rank")),
    "embd-normalize": _whole("embd_normalize", -1),
    # the server
    "port": _whole("port", 0, 65535),
    "reuse-port": _switch("reuse_port"),
    "path": _text("public_path"),
    "api-prefix": _text("api_prefix"),
    "api-key": lambda params, flag: _extend(params, "api_keys", filter(None, _fields(flag.text))),
    "ssl-key-file": _text("ssl_file_key"),
    "ssl-cert-file": _text("ssl_file_cert"),
    "cors-methods": _text("cors_methods"),
    "cors-headers": _text("cors_headers"),
    "cors-credentials": _switch("cors_credentials"),
    "ui": _switch("ui"),
    "ui-config": _text("ui_config_json"),
    "ui-config-file": _content("ui_config_json"),
    "sse-ping-interval": _whole("sse_ping_interval", -1),
    "threads-http": _whole("n_threads_http"),
    "metrics": _switch("endpoint_metrics"),
    "props": _switch("endpoint_props"),
    "slots": _switch("endpoint_slots"),
    "slot-save-path": _folder("slot_save_path"),
    "verbosity": _whole("verbosity"),
    # speculative decoding
    "lookup-cache-static": _text("speculative.ngram_cache.lookup_cache_static"),
    "lookup-cache-dynamic": _text("speculative.ngram_cache.lookup_cache_dynamic"),
    "spec-draft-hf": _text("speculative.draft.mparams.hf_repo"),
    "spec-draft-threads": _threads("speculative.draft.cpuparams.n_threads"),
    "spec-draft-cpu-mask": _cpus("speculative.draft.cpuparams", _mask),
    "spec-draft-cpu-range": _cpus("speculative.draft.cpuparams", _range),
    "spec-draft-cpu-strict": _whole("speculative.draft.cpuparams.strict_cpu", 0, 1),
    "spec-draft-prio": _whole("speculative.draft.cpuparams.priority", 0, 3),
    "spec-draft-poll": _whole("speculative.draft.cpuparams.poll", 0, 100),
    "spec-draft-threads-batch": _threads("speculative.draft.cpuparams_batch.n_threads"),
    "spec-draft-cpu-mask-batch": _cpus("speculative.draft.cpuparams_batch", _mask),
    "spec-draft-cpu-strict-batch": _whole("speculative.draft.cpuparams_batch.strict_cpu", 0, 1),
    "spec-draft-prio-batch": _whole("speculative.draft.cpuparams_batch.priority", 0, 3),
    "spec-draft-poll-batch": _whole("speculative.draft.cpuparams_batch.poll", 0, 100),
    "spec-draft-type-k": _member("speculative.draft.cache_type_k", "ggml_type", _CACHE_TYPES),
    "spec-draft-type-v": _member("speculative.draft.cache_type_v", "ggml_type", _CACHE_TYPES),
    "spec-draft-override-tensor": _placed("speculative.draft.tensor_buft_overrides", lambda flag: [flag.text]),
    "spec-draft-cpu-moe": _placed("speculative.draft.tensor_buft_overrides", lambda flag: [f"{_EXPERTS}=CPU"]),
    "spec-draft-n-cpu-moe": _placed("speculative.draft.tensor_buft_overrides", _first_layers(_EXPERTS)),
    "spec-draft-n-max": _whole("speculative.draft.n_max", 0),
    "spec-draft-n-min": _whole("speculative.draft.n_min", 0),
    "spec-draft-p-split": _number("speculative.draft.p_split"),
    "spec-draft-p-min": _number("speculative.draft.p_min"),
    "spec-draft-backend-sampling": _switch("speculative.draft.backend_sampling"),
    "spec-draft-sampling": _choice("speculative.draft.probabilistic", {"greedy": False, "probabilistic": True}),
    "spec-draft-device": _text("speculative.draft.devices"),
    "spec-draft-ngl": _gpu_layers("speculative.draft.n_gpu_layers"),
    "spec-synth-len": _number("speculative.synth_len"),
    "spec-ngram-mod-n-min": _whole("speculative.ngram_mod.n_min", 0, 1024),
    "spec-ngram-mod-n-max": _whole("speculative.ngram_mod.n_max", 0, 1024),
    "spec-ngram-mod-n-match": _whole("speculative.ngram_mod.n_match", 1, 1024),
    **{
        f"spec-ngram-{kind}-{flag}": _whole(f"speculative.ngram_{kind.replace('-', '_')}.{attribute}", 1, high)
        for kind in ("simple", "map-k", "map-k4v")
        for flag, attribute, high in (
            ("size-n", "size_n", 1024),
            ("size-m", "size_m", 1024),
            ("min-hits", "min_hits", 65535),
        )
    },
}
"""Flags by canonical name; those that need more than one line follow below."""

PASSED_OVER = frozenset(("log-disable", "log-jsonl", "log-colors", "log-prefix", "log-timestamps", "defrag-thold"))
"""Ignored flags: the log's format cannot be set and affects no response; the last one is obsolete."""


def _supports(name: str) -> Callable[[Apply], Apply]:
    def enter(apply: Apply) -> Apply:
        SUPPORTED[name] = apply
        return apply

    return enter


@_supports("ctx-size")
def _(params: Any, flag: Flag) -> None:
    params.n_ctx = flag.integer(0)
    if params.n_ctx == 0:
        params.fit_params_min_ctx = -1  # the model's full context, not as much as fits


@_supports("parallel")
def _(params: Any, flag: Flag) -> None:
    if flag.integer() == 0:
        raise flag.error("must not be 0")
    params.n_parallel = flag.integer()


@_supports("rope-scale")
def _(params: Any, flag: Flag) -> None:
    if flag.number() == 0:
        raise flag.error("must not be 0")
    params.rope_freq_scale = 1 / flag.number()


@_supports("mmap")
def _(params: Any, flag: Flag) -> None:
    """Translate `mmap`, `mlock` and `direct-io`, which `load-mode` replaces in newer builds."""
    locked = params.load_mode.name.endswith("MLOCK")
    mode = {(True, True): "mmap_mlock", (True, False): "mmap", (False, True): "mlock", (False, False): "none"}
    params.load_mode = _enumerator("llama_load_mode", mode[not flag.negated, locked])


@_supports("mlock")
def _(params: Any, flag: Flag) -> None:
    copied = params.load_mode.name in ("LLAMA_LOAD_MODE_NONE", "LLAMA_LOAD_MODE_MLOCK")
    params.load_mode = _enumerator("llama_load_mode", "mlock" if copied else "mmap_mlock")


@_supports("direct-io")
def _(params: Any, flag: Flag) -> None:
    if not flag.negated:
        params.load_mode = _enumerator("llama_load_mode", "direct_io")


@_supports("moe-cache-mib")
def _(params: Any, flag: Flag) -> None:
    params.moe_cache_size = flag.integer(0) * 2**20


@_supports("tensor-split")
def _(params: Any, flag: Flag) -> None:
    shares, devices = flag.numbers(), len(params.fit_params_target)
    if len(shares) >= devices:
        raise flag.error(f"takes fewer than {devices} numbers")
    params.tensor_split = [*shares, *[0.0] * (len(params.tensor_split) - len(shares))]


@_supports("fit-target")
def _(params: Any, flag: Flag) -> None:
    margins, before = [int(mib) * 2**20 for mib in flag.numbers()], params.fit_params_target
    if len(margins) >= len(before) or min(margins) < 0:
        raise flag.error(f"takes fewer than {len(before)} sizes in MiB, not {flag.text!r}")
    params.fit_params_target = margins * len(before) if len(margins) == 1 else margins + before[len(margins) :]


@_supports("seed")
def _(params: Any, flag: Flag) -> None:
    params.sampling.seed = flag.integer(-1, 2**32 - 1) % 2**32


@_supports("sampler-seq")
def _(params: Any, flag: Flag) -> None:
    names = {
        "d": "dry", "k": "top_k", "y": "typ_p", "p": "top_p", "s": "top_n_sigma", "m": "min_p",
        "t": "temperature", "x": "xtc", "i": "infill", "e": "penalties", "a": "adaptive_p",
    }  # fmt: skip
    if strange := set(flag.text) - set(names):
        raise flag.error(f"takes the letters {''.join(names)}, not {''.join(sorted(strange))}")
    params.sampling.samplers = ";".join(names[letter] for letter in flag.text)


@_supports("repeat-last-n")
def _(params: Any, flag: Flag) -> None:
    _sampling("penalty_last_n", _whole("sampling.penalty_last_n", 0))(params, flag)
    params.sampling.n_prev = max(params.sampling.n_prev, params.sampling.penalty_last_n)


@_supports("repeat-penalty")
def _(params: Any, flag: Flag) -> None:
    if flag.number() <= 0:
        raise flag.error(f"must be greater than 0, not {flag.text}")
    _sampling("penalty_repeat", _number("sampling.penalty_repeat"))(params, flag)


@_supports("perf")
def _(params: Any, flag: Flag) -> None:
    params.no_perf = params.sampling.no_perf = flag.negated


def _render_with(params: Any, **arguments: object) -> None:
    """Add arguments for the chat template."""
    import json

    params.default_template_kwargs |= {name: json.dumps(value) for name, value in arguments.items()}


@_supports("chat-template-kwargs")
def _(params: Any, flag: Flag) -> None:
    import json

    try:
        arguments = json.loads(flag.text)
    except ValueError as error:
        raise flag.error(f"takes a JSON object: {error}") from None
    if not isinstance(arguments, dict):
        raise flag.error(f"takes a JSON object, not {flag.text!r}")
    _render_with(params, **arguments)


@_supports("reasoning")
def _(params: Any, flag: Flag) -> None:
    word = _one_of(flag, (*_ON, *_OFF, *_AUTO))
    params.enable_reasoning = -1 if word in _AUTO else int(word in _ON)
    if word not in _AUTO:
        _render_with(params, enable_thinking=word in _ON)


@_supports("reasoning-effort")
def _(params: Any, flag: Flag) -> None:
    _render_with(params, reasoning_effort=flag.text)
    if flag.text == "default":
        arguments = params.default_template_kwargs
        del arguments["reasoning_effort"]
        params.default_template_kwargs = arguments


@_supports("reasoning-preserve")
def _(params: Any, flag: Flag) -> None:
    _render_with(params, preserve_reasoning=not flag.negated)
    params.preserve_reasoning_specified = True


@_supports("rerank")
def _(params: Any, flag: Flag) -> None:
    params.embedding = True
    params.pooling_type = _enumerator("llama_pooling_type", "rank")


@_supports("host")
def _(params: Any, flag: Flag) -> None:
    params.hostnames = [host for field in _fields(flag.text) if (host := field.strip())]
    if not params.hostnames:
        raise flag.error("takes at least one address")


@_supports("api-key-file")
def _(params: Any, flag: Flag) -> None:
    lines = _read(flag).splitlines()
    _extend(params, "api_keys", (line for line in lines if line and not line.startswith("#")))


@_supports("cors-origins")
def _(params: Any, flag: Flag) -> None:
    params.cors_origins = flag.text
    params.cors_origins_explicit = True


@_supports("timeout")
def _(params: Any, flag: Flag) -> None:
    params.timeout_read = params.timeout_write = flag.integer(0)


@_supports("sleep-idle-seconds")
def _(params: Any, flag: Flag) -> None:
    if flag.integer(-1) == 0:
        raise flag.error("must not be 0")
    params.sleep_idle_seconds = flag.integer()


@_supports("log-prompts-dir")
def _(params: Any, flag: Flag) -> None:
    params.path_prompts_log_dir = flag.text


@_supports("verbose")
def _(params: Any, flag: Flag) -> None:
    params.verbosity = 2**31 - 1


@_supports("spec-draft-model")
def _(params: Any, flag: Flag) -> None:
    params.speculative.draft.mparams.path = params.speculative.draft.mparams.hf_file = flag.text


@_supports("spec-type")
def _(params: Any, flag: Flag) -> None:
    kinds = _names(
        "none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark",
        "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache",
    )  # fmt: skip
    for word in flag.text.split(","):
        kind = kinds[_one_of(Flag(flag.name, flag.spelling, (word,), flag.index), kinds)]
        _extend(params, "speculative.types", [_enumerator("common_speculative_type", kind)])


@_supports("spec-default")
def _(params: Any, flag: Flag) -> None:
    _extend(params, "speculative.types", [_enumerator("common_speculative_type", "ngram_mod")])
    params.speculative.ngram_mod.n_match = 24
    params.speculative.ngram_mod.n_min = 48
    params.speculative.ngram_mod.n_max = 64


@_supports("spec-synth-rates")
def _(params: Any, flag: Flag) -> None:
    _extend(params, "speculative.synth_rates", flag.numbers())
