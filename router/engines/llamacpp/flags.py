"""llama-server's command-line flags: what each is called, how many values it takes, what a list of them says.

This is the one place that knows how flags are spelled: `-c 4096`, `--ctx-size 4096`, `--ctx_size 4096` and
`LLAMA_ARG_CTX_SIZE=4096` are all `ctx-size`. As in llama-server the environment comes first, the command
line second, and the last one wins. `--ctx-size=4096`, which llama-server itself refuses, is read, too;
`argv` writes it the way every build understands.

Flags that are not in the table are let through: newer builds have newer flags. Whether an engine accepts a
flag, and whether a value makes sense to it, is the engine's business.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Purpose = Literal["embedding", "rerank", "mmproj"]

# One flag a line: its spellings, the canonical one first; `!` marks those that negate it; an N for each value
# that follows; the environment variable. The order is that of `llama-server --help`.
_TABLE = """
--help -h --usage
--version
--cache-list -cl
--completion-bash
--threads -t N LLAMA_ARG_THREADS
--threads-batch -tb N
--cpu-mask -C N
--cpu-range -Cr N
--cpu-strict N
--prio N
--poll N
--cpu-mask-batch -Cb N
--cpu-range-batch -Crb N
--cpu-strict-batch N
--prio-batch N
--poll-batch N
--lookup-cache-static -lcs N
--lookup-cache-dynamic -lcd N
--ctx-size -c N LLAMA_ARG_CTX_SIZE
--kv-unified-per-slot N LLAMA_ARG_KV_UNIFIED_PER_SLOT
--n-predict -n --predict N LLAMA_ARG_N_PREDICT
--batch-size -b N LLAMA_ARG_BATCH
--ubatch-size -ub N LLAMA_ARG_UBATCH
--keep N
--swa-full LLAMA_ARG_SWA_FULL
--ctx-checkpoints -ctxcp --swa-checkpoints N LLAMA_ARG_CTX_CHECKPOINTS
--checkpoint-min-step -cms N LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT
--cache-ram -cram N LLAMA_ARG_CACHE_RAM
--kv-unified -kvu !--no-kv-unified !-no-kvu LLAMA_ARG_KV_UNIFIED
--cache-idle-slots !--no-cache-idle-slots LLAMA_ARG_CACHE_IDLE_SLOTS
--context-shift !--no-context-shift LLAMA_ARG_CONTEXT_SHIFT
--flash-attn -fa N LLAMA_ARG_FLASH_ATTN
--perf !--no-perf LLAMA_ARG_PERF
--escape -e !--no-escape
--reverse-prompt -r N
--special -sp
--warmup !--no-warmup
--spm-infill
--samplers N
--seed -s N
--sampler-seq --sampling-seq N
--ignore-eos
--temp --temperature N LLAMA_ARG_TEMPERATURE
--top-k N LLAMA_ARG_TOP_K
--top-p N LLAMA_ARG_TOP_P
--min-p N LLAMA_ARG_MIN_P
--top-nsigma --top-n-sigma N
--xtc-probability N
--xtc-threshold N
--typical --typical-p N
--repeat-last-n N
--repeat-penalty N LLAMA_ARG_REPEAT_PENALTY
--presence-penalty N LLAMA_ARG_PRESENCE_PENALTY
--frequency-penalty N LLAMA_ARG_FREQUENCY_PENALTY
--dry-multiplier N
--dry-base N
--dry-allowed-length N
--dry-penalty-last-n N
--dry-sequence-breaker N
--adaptive-target N
--adaptive-decay N
--dynatemp-range N
--dynatemp-exp N
--mirostat N
--mirostat-lr N
--mirostat-ent N
--logit-bias -l N
--grammar N
--grammar-file N
--json-schema -j N
--json-schema-file -jf N
--backend-sampling -bs LLAMA_ARG_BACKEND_SAMPLING
--pooling N LLAMA_ARG_POOLING
--rope-scaling N LLAMA_ARG_ROPE_SCALING_TYPE
--rope-scale N LLAMA_ARG_ROPE_SCALE
--rope-freq-base N LLAMA_ARG_ROPE_FREQ_BASE
--rope-freq-scale N LLAMA_ARG_ROPE_FREQ_SCALE
--yarn-orig-ctx N LLAMA_ARG_YARN_ORIG_CTX
--yarn-ext-factor N LLAMA_ARG_YARN_EXT_FACTOR
--yarn-attn-factor N LLAMA_ARG_YARN_ATTN_FACTOR
--yarn-beta-slow N LLAMA_ARG_YARN_BETA_SLOW
--yarn-beta-fast N LLAMA_ARG_YARN_BETA_FAST
--kv-offload -kvo !--no-kv-offload !-nkvo LLAMA_ARG_KV_OFFLOAD
--repack !--no-repack !-nr LLAMA_ARG_REPACK
--no-host LLAMA_ARG_NO_HOST
--cache-type-k -ctk N LLAMA_ARG_CACHE_TYPE_K
--cache-type-v -ctv N LLAMA_ARG_CACHE_TYPE_V
--defrag-thold -dt N LLAMA_ARG_DEFRAG_THOLD
--parallel -np N LLAMA_ARG_N_PARALLEL
--cont-batching -cb !--no-cont-batching !-nocb LLAMA_ARG_CONT_BATCHING
--mmproj -mm N LLAMA_ARG_MMPROJ
--mmproj-url -mmu N LLAMA_ARG_MMPROJ_URL
--mmproj-auto !--no-mmproj !--no-mmproj-auto LLAMA_ARG_MMPROJ_AUTO
--mmproj-offload !--no-mmproj-offload LLAMA_ARG_MMPROJ_OFFLOAD
--mmproj-device -mmdev N MTMD_BACKEND_DEVICE
--image-min-tokens N LLAMA_ARG_IMAGE_MIN_TOKENS
--image-max-tokens N LLAMA_ARG_IMAGE_MAX_TOKENS
--mtmd-batch-max-tokens N LLAMA_ARG_MTMD_BATCH_MAX_TOKENS
--video-fps N LLAMA_ARG_VIDEO_FPS
--video-timestamp-interval N LLAMA_ARG_VIDEO_TIMESTAMP_INTERVAL
--video-ffmpeg-dir N LLAMA_ARG_VIDEO_FFMPEG_DIR
--rpc N LLAMA_ARG_RPC
--load-mode -lm N LLAMA_ARG_LOAD_MODE
--lazy-mode -lzm N LLAMA_ARG_LAZY_MODE
--numa N LLAMA_ARG_NUMA
--device -dev N LLAMA_ARG_DEVICE
--list-devices
--override-tensor -ot N LLAMA_ARG_OVERRIDE_TENSOR
--cpu-moe -cmoe LLAMA_ARG_CPU_MOE
--n-cpu-moe -ncmoe N LLAMA_ARG_N_CPU_MOE
--moe-cache-mib N LLAMA_ARG_MOE_CACHE_MIB
--n-cpu-ffn -ncffn N LLAMA_ARG_N_CPU_FFN
--n-gpu-layers -ngl --gpu-layers N LLAMA_ARG_N_GPU_LAYERS
--split-mode -sm N LLAMA_ARG_SPLIT_MODE
--tensor-split -ts N LLAMA_ARG_TENSOR_SPLIT
--main-gpu -mg N LLAMA_ARG_MAIN_GPU
--fit -fit N LLAMA_ARG_FIT
--fit-target -fitt N LLAMA_ARG_FIT_TARGET
--fit-ctx -fitc N LLAMA_ARG_FIT_CTX
--check-tensors
--override-kv N
--op-offload !--no-op-offload
--lora N
--lora-scaled N
--control-vector N
--control-vector-scaled N
--control-vector-layer-range N N
--alias -a N LLAMA_ARG_ALIAS
--tags N LLAMA_ARG_TAGS
--model -m N LLAMA_ARG_MODEL
--model-url -mu N LLAMA_ARG_MODEL_URL
--docker-repo -dr N LLAMA_ARG_DOCKER_REPO
--hf-repo -hf -hfr N LLAMA_ARG_HF_REPO
--hf-file -hff N LLAMA_ARG_HF_FILE
--hf-token -hft N HF_TOKEN
--embd-normalize N
--host N LLAMA_ARG_HOST
--port N LLAMA_ARG_PORT
--reuse-port LLAMA_ARG_REUSE_PORT
--path N LLAMA_ARG_STATIC_PATH
--cors-origins N LLAMA_ARG_CORS_ORIGINS
--cors-methods N LLAMA_ARG_CORS_METHODS
--cors-headers N LLAMA_ARG_CORS_HEADERS
--cors-credentials !--no-cors-credentials LLAMA_ARG_CORS_CREDENTIALS
--api-prefix N LLAMA_ARG_API_PREFIX
--ui-config --webui-config N LLAMA_ARG_UI_CONFIG
--ui-config-file --webui-config-file N LLAMA_ARG_UI_CONFIG_FILE
--ui-mcp-proxy --webui-mcp-proxy !--no-ui-mcp-proxy !--no-webui-mcp-proxy LLAMA_ARG_UI_MCP_PROXY
--tools N LLAMA_ARG_TOOLS
--tools-runtime N LLAMA_ARG_TOOLS_RUNTIME
--mcp-servers-config N LLAMA_ARG_MCP_SERVERS_CONFIG
--mcp-servers-json N LLAMA_ARG_MCP_SERVERS_JSON
--agent -ag !--no-agent !-no-ag LLAMA_ARG_AGENT
--ui --webui !--no-ui !--no-webui LLAMA_ARG_UI
--embedding --embeddings LLAMA_ARG_EMBEDDINGS
--rerank --reranking LLAMA_ARG_RERANKING
--api-key N LLAMA_API_KEY
--api-key-file N LLAMA_ARG_API_KEY_FILE
--ssl-key-file N LLAMA_ARG_SSL_KEY_FILE
--ssl-cert-file N LLAMA_ARG_SSL_CERT_FILE
--chat-template-kwargs N LLAMA_ARG_CHAT_TEMPLATE_KWARGS
--timeout -to N LLAMA_ARG_TIMEOUT
--sse-ping-interval N LLAMA_ARG_SSE_PING_INTERVAL
--threads-http N LLAMA_ARG_THREADS_HTTP
--cache-prompt !--no-cache-prompt LLAMA_ARG_CACHE_PROMPT
--cache-reuse N LLAMA_ARG_CACHE_REUSE
--metrics LLAMA_ARG_ENDPOINT_METRICS
--props LLAMA_ARG_ENDPOINT_PROPS
--slots !--no-slots LLAMA_ARG_ENDPOINT_SLOTS
--slot-save-path N LLAMA_ARG_SLOT_SAVE_PATH
--media-path N
--models-dir N LLAMA_ARG_MODELS_DIR
--models-preset N LLAMA_ARG_MODELS_PRESET
--models-max N LLAMA_ARG_MODELS_MAX
--models-autoload !--no-models-autoload LLAMA_ARG_MODELS_AUTOLOAD
--jinja !--no-jinja LLAMA_ARG_JINJA
--reasoning-format N LLAMA_ARG_THINK
--reasoning -rea N LLAMA_ARG_REASONING
--reasoning-effort N LLAMA_ARG_REASONING_EFFORT
--reasoning-budget N LLAMA_ARG_THINK_BUDGET
--reasoning-budget-message N LLAMA_ARG_THINK_BUDGET_MESSAGE
--reasoning-preserve !--no-reasoning-preserve LLAMA_ARG_REASONING_PRESERVE
--chat-template N LLAMA_ARG_CHAT_TEMPLATE
--chat-template-file N LLAMA_ARG_CHAT_TEMPLATE_FILE
--skip-chat-parsing !--no-skip-chat-parsing LLAMA_ARG_SKIP_CHAT_PARSING
--prefill-assistant !--no-prefill-assistant LLAMA_ARG_PREFILL_ASSISTANT
--slot-prompt-similarity -sps N
--lora-init-without-apply
--sleep-idle-seconds N
--log-disable
--log-file N LLAMA_ARG_LOG_FILE
--log-jsonl !--no-log-jsonl LLAMA_ARG_LOG_JSONL
--log-prompts-dir N
--log-colors N LLAMA_ARG_LOG_COLORS
--verbose -v --log-verbose
--offline LLAMA_ARG_OFFLINE
--verbosity -lv --log-verbosity N LLAMA_ARG_LOG_VERBOSITY
--log-prefix !--no-log-prefix LLAMA_ARG_LOG_PREFIX
--log-timestamps !--no-log-timestamps LLAMA_ARG_LOG_TIMESTAMPS
--spec-draft-hf -hfd -hfrd --hf-repo-draft N LLAMA_ARG_SPEC_DRAFT_HF_REPO
--spec-draft-threads -td --threads-draft N
--spec-draft-threads-batch -tbd --threads-batch-draft N
--spec-draft-cpu-mask -Cd --cpu-mask-draft N
--spec-draft-cpu-range -Crd --cpu-range-draft N
--spec-draft-cpu-strict --cpu-strict-draft N
--spec-draft-prio --prio-draft N
--spec-draft-poll --poll-draft N
--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft N
--spec-draft-cpu-strict-batch --cpu-strict-batch-draft N
--spec-draft-prio-batch --prio-batch-draft N
--spec-draft-poll-batch --poll-batch-draft N
--spec-draft-type-k -ctkd --cache-type-k-draft N LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K
--spec-draft-type-v -ctvd --cache-type-v-draft N LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V
--spec-draft-override-tensor -otd --override-tensor-draft N
--spec-draft-cpu-moe -cmoed --cpu-moe-draft LLAMA_ARG_SPEC_DRAFT_CPU_MOE
--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft N LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE
--spec-draft-n-max N LLAMA_ARG_SPEC_DRAFT_N_MAX
--spec-draft-n-min N LLAMA_ARG_SPEC_DRAFT_N_MIN
--spec-synth-len N LLAMA_ARG_SPEC_SYNTH_LEN
--spec-synth-rates N LLAMA_ARG_SPEC_SYNTH_RATES
--spec-draft-p-split --draft-p-split N LLAMA_ARG_SPEC_DRAFT_P_SPLIT
--spec-draft-p-min --draft-p-min N LLAMA_ARG_SPEC_DRAFT_P_MIN
--spec-draft-backend-sampling !--no-spec-draft-backend-sampling LLAMA_ARG_SPEC_DRAFT_BACKEND_SAMPLING
--spec-draft-sampling N LLAMA_ARG_SPEC_DRAFT_SAMPLING
--spec-draft-device -devd --device-draft N
--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft N LLAMA_ARG_N_GPU_LAYERS_DRAFT
--spec-draft-model -md --model-draft N LLAMA_ARG_SPEC_DRAFT_MODEL
--spec-type N LLAMA_ARG_SPEC_TYPE
--spec-ngram-mod-n-min N
--spec-ngram-mod-n-max N
--spec-ngram-mod-n-match N
--spec-ngram-simple-size-n N
--spec-ngram-simple-size-m N
--spec-ngram-simple-min-hits N
--spec-ngram-map-k-size-n N
--spec-ngram-map-k-size-m N
--spec-ngram-map-k-min-hits N
--spec-ngram-map-k4v-size-n N
--spec-ngram-map-k4v-size-m N
--spec-ngram-map-k4v-min-hits N
--draft --draft-n --draft-max N LLAMA_ARG_DRAFT_MAX
--draft-min --draft-n-min N LLAMA_ARG_DRAFT_MIN
--spec-ngram-size-n N
--spec-ngram-size-m N
--spec-ngram-min-hits N
--embd-gemma-default
--fim-qwen-1.5b-default
--fim-qwen-3b-default
--fim-qwen-7b-default
--fim-qwen-7b-spec
--fim-qwen-14b-spec
--fim-qwen-30b-default
--gpt-oss-20b-default
--gpt-oss-120b-default
--vision-gemma-4b-default
--vision-gemma-12b-default
--spec-default
"""

# Older builds have these, and so do many people's configurations.
_OLDER = """
--mmap !--no-mmap LLAMA_ARG_MMAP
--mlock LLAMA_ARG_MLOCK
--direct-io -dio !--no-direct-io !-ndio LLAMA_ARG_DIO
--ctx-size-draft -cd N LLAMA_ARG_CTX_SIZE_DRAFT
"""

ENGINE_BUILD = 11549
"""The llama.cpp build that the table was taken from."""

AUTO_SLOTS = 4
"""What llama-server makes of a `--parallel` that is unset or negative; these slots share one KV cache."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a flag can be written."""

    name: str
    spellings: tuple[str, ...]
    negations: tuple[str, ...]
    arity: int
    variable: str
    """The environment variable; empty if there is none."""
    negative_variable: str
    """`LLAMA_ARG_NO_MMAP`, set to anything, means `--no-mmap`; empty if there is none."""


def _forms(table: str) -> Iterator[Form]:
    for line in filter(None, table.splitlines()):
        words = line.split()
        negations = tuple(word[1:] for word in words if word.startswith("!"))
        variable = words[-1] if "_" in words[-1] else ""
        yield Form(
            name=words[0].removeprefix("--"),
            spellings=tuple(word for word in words if word.startswith("-")),
            negations=negations,
            arity=words.count("N"),
            variable=variable,
            negative_variable=variable.replace("LLAMA_ARG_", "LLAMA_ARG_NO_") if negations else "",
        )


FORMS: Mapping[str, Form] = {form.name: form for form in _forms(_TABLE + _OLDER)}
"""Every known flag by its canonical name: the first long spelling without its dashes."""

_BY_SPELLING: Mapping[str, tuple[Form, bool]] = {
    spelling: (form, negated)
    for form in FORMS.values()
    for negated, spellings in ((False, form.spellings), (True, form.negations))
    for spelling in spellings
}

_VARIABLES = frozenset(
    variable for form in FORMS.values() for variable in (form.variable, form.negative_variable) if variable
)

SPELLINGS = tuple(_BY_SPELLING)
"""All that a known flag may be written as."""

_ADDRESS = "where engines listen is the router's business"
_KEY = "the router gives every engine a key of its own"
_DOWNLOAD = "it downloads a model; get it by `llama-router pull`, or name its file in the entry"
_ROUTER_MODE = "it belongs to llama-server's own router mode"
_PRINTS = "with it, llama-server prints something and exits"

OWNED: Mapping[str, str] = {
    **dict.fromkeys(("host", "port", "reuse-port", "api-prefix", "ssl-key-file", "ssl-cert-file"), _ADDRESS),
    **dict.fromkeys(("api-key", "api-key-file"), _KEY),
    "model": "the model's file is named in the entry",
    **dict.fromkeys(("model-url", "docker-repo", "hf-repo", "hf-file"), _DOWNLOAD),
    **dict.fromkeys(
        (name for name in FORMS if name.startswith(("embd-gemma-", "fim-", "gpt-oss-", "vision-"))), _DOWNLOAD
    ),
    **dict.fromkeys(("models-dir", "models-preset", "models-max", "models-autoload"), _ROUTER_MODE),
    **dict.fromkeys(("help", "version", "cache-list", "completion-bash", "list-devices"), _PRINTS),
    "sleep-idle-seconds": "the router unloads idle models itself",
}
"""What the flags of a model may not say, by canonical name, and why: the router says it."""

OWNED_VARIABLES = frozenset(
    variable for name in OWNED for variable in (FORMS[name].variable, FORMS[name].negative_variable) if variable
)
"""The environment variables that would say it behind the router's back."""


class FlagError(ValueError):
    """What is wrong with a flag; `index` is its place in the list, -1 if the environment set it."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.message = message
        self.index = index


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag as somebody wrote it. One that is not in the table has its spelling for a name."""

    name: str
    spelling: str
    values: tuple[str, ...] = ()
    index: int = -1
    """Its place in the list; -1 if the environment set it."""
    negated: bool = False

    @property
    def text(self) -> str:
        return self.values[-1]

    @property
    def words(self) -> tuple[str, ...]:
        """As every llama-server reads it: no `=`."""
        return (self.spelling, *self.values)

    def integer(self, low: int = -(2**31), high: int = 2**31 - 1) -> int:
        try:
            number = int(_plain(self.text))
        except ValueError:
            raise self.error(f"takes a whole number, not {self.text!r}") from None
        if not low <= number <= high:
            raise self.error(f"must be between {low} and {high}, not {number}")
        return number

    def number(self) -> float:
        return self._floats([self.text], "a number")[0]

    def numbers(self) -> tuple[float, ...]:
        """The parts of `3,1` or `3/1`."""
        return self._floats(self.text.replace("/", ",").split(","), "numbers with commas between them")

    def error(self, problem: str) -> FlagError:
        return FlagError(f"{self.spelling} {problem}", self.index)

    def _floats(self, parts: Sequence[str], wanted: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(_plain(part)) for part in parts)
        except ValueError:
            raise self.error(f"takes {wanted}, not {self.text!r}") from None
        if not all(map(math.isfinite, numbers)):
            raise self.error(f"must be finite, not {self.text!r}")
        return numbers


def _plain(text: str) -> str:
    """Python reads `1_000` as a thousand, llama-server as one."""
    if "_" in text:
        raise ValueError(text)
    return text


def parse(flags: Sequence[str], *, by_hand: bool = True) -> tuple[Flag, ...]:
    """The flags of a command line, in their order. Raises `FlagError` at the first that can't be one.

    In one that was written `by_hand`, a flag where a value is due shows that this was forgotten. llama-server
    itself takes whatever is there, such as a model's name.
    """
    parsed = []
    position = 0
    while position < len(flags):
        index = position
        spelling, equals, inline = flags[index].partition("=")
        if not _is_flag(spelling):
            raise FlagError(f"{flags[index]!r} is neither a flag nor the value of one", index)
        if any(map(str.isspace, spelling)):
            raise FlagError(f"{flags[index]!r} is one item; write the flag and its value as two", index)
        form, negated = _BY_SPELLING.get(canonical(spelling), (None, False))
        following = flags[index + 1 :]
        if form is None:
            name, arity = spelling, 1 if equals or (following and not _is_flag(following[0])) else 0
        else:
            name, arity = form.name, form.arity
        if equals:
            values: tuple[str, ...] = (inline,)
            if arity != 1:
                raise FlagError(f"{spelling} takes {'no value' if arity == 0 else 'two values'}", index)
        else:
            values = tuple(following[:arity])
            if len(values) < arity or (by_hand and any(value in _BY_SPELLING for value in values)):
                raise FlagError(f"{spelling} needs {'a value' if arity == 1 else f'{arity} values'}", index)
            position += arity
        parsed.append(Flag(name, spelling, values, index, negated))
        position += 1
    return tuple(parsed)


def from_environment(environ: Mapping[str, str]) -> tuple[Flag, ...]:
    """The flags that `LLAMA_ARG_*` and their kin set."""
    if _VARIABLES.isdisjoint(environ):
        return ()
    parsed = []
    for form in FORMS.values():
        if form.negative_variable in environ:
            parsed.append(Flag(form.name, form.negative_variable, negated=True))
        elif form.variable in environ:
            value = environ[form.variable]
            if form.arity:
                parsed.append(Flag(form.name, form.variable, (value,)))
            elif value in ("on", "enabled", "true", "1"):
                parsed.append(Flag(form.name, form.variable))
            elif form.negations:
                if value not in ("off", "disabled", "false", "0"):
                    raise FlagError(f"{form.variable} is either on or off, not {value!r}", -1)
                parsed.append(Flag(form.name, form.variable, negated=True))
    return tuple(parsed)


def argv(flags: Iterable[Flag]) -> list[str]:
    """The flags as every llama-server reads them: no `=`."""
    return [word for flag in flags for word in flag.words]


def replaced(own: Sequence[str], added: Sequence[str]) -> list[str]:
    """A command line with `added`, and without what of `own` says the same: a device that is not shown to the
    engine is an error to it, also where a later flag names another."""
    settled = {flag.name for flag in parse(added)}
    return [*argv(flag for flag in parse(own) if flag.name not in settled), *added]


class Flags:
    """What a command line and an environment say together; of several that say the same thing, the last."""

    def __init__(
        self, flags: Sequence[str], environ: Mapping[str, str] | None = None, *, by_hand: bool = True
    ) -> None:
        self.given = (*from_environment(environ or {}), *parse(flags, by_hand=by_hand))
        self._last = {flag.name: flag for flag in self.given}

    def last(self, name: str) -> Flag | None:
        assert name in FORMS, name
        return self._last.get(name)

    def text(self, name: str, default: str) -> str:
        flag = self.last(name)
        return default if flag is None else flag.text

    def integer(self, name: str, default: int) -> int:
        flag = self.last(name)
        return default if flag is None else flag.integer()

    def switch(self, name: str, default: bool) -> bool:
        flag = self.last(name)
        return default if flag is None else not flag.negated

    @property
    def slots(self) -> int:
        """How many requests the engine serves at once."""
        flag = self.last("parallel")
        slots = -1 if flag is None else flag.integer()
        if flag and slots == 0:
            raise flag.error("must not be 0")
        return AUTO_SLOTS if slots < 0 else slots

    @property
    def purposes(self) -> frozenset[Purpose]:
        """What an engine is started for besides text, or instead of it."""
        if self.switch("rerank", False):
            purposes: set[Purpose] = {"rerank"}
        else:
            purposes = {"embedding"} if self.switch("embedding", False) else set()
        return frozenset(purposes | ({"mmproj"} if self.last("mmproj") is not None else set()))

    @property
    def most_tokens(self) -> int | None:
        """Of an answer to who asks for no other number."""
        most = self.integer("n-predict", -1)
        return most if most > 0 else None

    @property
    def kv_unified(self) -> bool:
        """Whether the slots share one KV cache of the whole context size."""
        return self.integer("parallel", -1) < 0 or self.switch("kv-unified", False)


def as_started(flags: Sequence[str], own_env: Mapping[str, str]) -> Flags:
    """What an engine is told, with the variables that it has from us and those of its entry."""
    return Flags(flags, {**os.environ, **own_env})


def _is_flag(word: str) -> bool:
    """`-1` and `-.5` are values."""
    return len(word) > 1 and word[0] == "-" and word[1] not in "0123456789."


def canonical(spelling: str) -> str:
    """As llama-server's help has it."""
    return spelling.replace("_", "-") if spelling.startswith("--") else spelling
