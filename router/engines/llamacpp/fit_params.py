"""Memory estimates of llama.cpp itself, by the tool `llama-fit-params` beside `llama-server`.

It runs the engine's own loader and graph and allocates nothing, so it is right for every architecture that its
build knows, in a fraction of a second. Three differences from llama-server are corrected by the formulas of
`footprint.py`, as the difference between two estimates:

* it has no slots that share one cache (`--kv-unified`, llama-server's default): it is run for a single slot;
* it reserves the logits of every token of a batch, llama-server only those of output tokens;
* it supports no projector, draft model or adapter, and omits the working memory of the CPU backend.

Its output lacks weights that the CPU backend would repack, so it is run without repacking; copies in addition to
the weights are added by formula.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from router.engines.complaints import complaints
from router.engines.llamacpp import footprint
from router.engines.llamacpp.flags import FORMS, Flags
from router.formats.gguf import GGUF
from router.memory.plan import Footprint, Share
from router.system.devices import HOST, Device
from router.system.privacy import without_secrets

TOOL = "llama-fit-params"
TIMEOUT_SEC = 20.0
RETRY_SEC = 300.0
"""Time after which a failed question is repeated: the tool itself needs time and some GPU memory."""

_LONGEST_REASON = 300

_log = logging.getLogger("router")

# Flags, by canonical name, that affect its output and that it accepts as llama-server does.
_PASSED = frozenset(
    {
        "batch-size", "cache-type-k", "cache-type-v", "cpu-moe", "device", "flash-attn", "kv-offload",
        "main-gpu", "n-cpu-ffn", "n-cpu-moe", "n-gpu-layers", "no-host", "op-offload", "override-kv",
        "override-tensor", "rpc", "split-mode", "swa-full", "tensor-split", "ubatch-size",
    }
)  # fmt: skip

_NOT_REPACKED = "--no-repack"
_ADD_UP = frozenset({"cpu-moe", "n-cpu-ffn", "n-cpu-moe", "override-kv", "override-tensor"})
_SHOW_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")

_Identity = tuple[str, int, int]
_Key = tuple[_Identity, tuple[str, ...], tuple[str | None, ...]]


class FitParams:
    """Runs the tool of one engine build, once per model file and flags. Blocking: call it in a thread."""

    def __init__(self, tool: Path, *, timeout_sec: float = TIMEOUT_SEC, retry_sec: float = RETRY_SEC) -> None:
        self.tool = tool
        self.timeout_sec = timeout_sec
        self.retry_sec = retry_sec
        self._build: _Identity | None = None
        self._answers: dict[_Key, tuple[Share, ...]] = {}
        self._failed_sec: dict[_Key, float] = {}

    def footprint(
        self,
        header: GGUF,
        flags: Flags,
        *,
        projector: GGUF | None = None,
        draft: GGUF | None = None,
        adapters: Sequence[GGUF] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Footprint | None:
        """Return the footprint of the model at `header.path`; None, with the reason in the log, if the tool fails.

        Raises `FlagError` if a flag that matters has an impossible value.
        """
        wanted = footprint.estimate(header, flags, projector=projector, draft=draft, gpus=0)
        question = _question(flags, wanted.context)
        answer = self._ask(header, question, os.environ if environ is None else environ)
        if answer is None:
            return None

        device = flags.last("device")
        numbers = footprint.gpu_numbers(device.text) if device is not None else []
        if len(numbers) != len(answer) - 1 or min(numbers, default=0) < 0:
            numbers = list(range(len(answer) - 1))
        gpus = max(numbers, default=-1) + 1
        # As the tool interprets the flags; with --embedding, every token of a batch has an output.
        asked = footprint.estimate(header, Flags([*question, _NOT_REPACKED, "--embedding"]), gpus=gpus)
        wanted = footprint.estimate(header, flags, projector=projector, draft=draft, adapters=adapters, gpus=gpus)
        devices = [*(Device.shown(number) for number in numbers), HOST]
        return Footprint(
            devices={
                device: _corrected(share, wanted.devices.get(device, Share()), asked.devices.get(device, Share()))
                for device, share in zip(devices, answer, strict=True)
            },
            provenance=f"{TOOL} of the installed engine",
            context=wanted.context,
            host_cache_mib=wanted.host_cache_mib,
        )

    def _ask(self, header: GGUF, question: list[str], environ: Mapping[str, str]) -> tuple[Share, ...] | None:
        """Return the shares of the GPUs in order, the host's last."""
        if header.path is None:
            return None
        try:
            build, model = _identity(self.tool), _identity(header.path)
        except OSError as error:
            _log.warning("%s could not be run for %s: %s", TOOL, header.path, error)
            return None
        if build != self._build:  # the engine was replaced
            self._build, self._answers, self._failed_sec = build, {}, {}
        key = model, tuple(question), tuple(environ.get(name) for name in _SHOW_GPUS)
        anything: _Key = model, (), ()
        now = time.monotonic()
        failed_sec = max(self._failed_sec.get(each, -math.inf) for each in (key, anything))
        if key not in self._answers and now - failed_sec > self.retry_sec:
            answer = self._run(header.path, question, environ)
            if answer is not None:
                self._answers[key] = answer
            else:  # an inspection asks many questions, and must not wait for each timeout
                is_late = time.monotonic() - now >= self.timeout_sec
                self._failed_sec[anything if is_late else key] = time.monotonic()
        return self._answers.get(key)

    def _run(self, model: Path, question: list[str], environ: Mapping[str, str]) -> tuple[Share, ...] | None:
        command = [str(self.tool), "--model", str(model), "--fit-print", "on", _NOT_REPACKED, *question]
        known = without_secrets(environ)
        inherited = {name: value for name, value in known.items() if not name.startswith("LLAMA_ARG_")}
        try:
            done = subprocess.run(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_sec,
                env=inherited,
                check=False,
            )
        except subprocess.TimeoutExpired:
            reason = f"no answer within {self.timeout_sec:g} s"
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            answer = parse(done.stdout) if done.returncode == 0 else None
            if answer is not None:
                return answer
            said = complaints((done.stderr or done.stdout).splitlines())
            reason = f"exit code {done.returncode}, output: {said[:_LONGEST_REASON] or 'none'}"
        _log.warning("%s cannot estimate the memory of %s; using formulas instead: %s", TOOL, model.name, reason)
        return None


def beside(server: Path) -> FitParams | None:
    """Return the tool installed beside this `llama-server`; None if there is none."""
    for folder in (server.parent, server.resolve().parent):
        tool = folder / TOOL
        if tool.is_file() and os.access(tool, os.X_OK):
            return FitParams(tool)
    return None


def parse(printed: str) -> tuple[Share, ...] | None:
    """Parse lines of device, weights, context and compute buffer, the last of them `Host`; None if malformed."""
    shares: list[Share] = []
    for line in printed.splitlines():
        name, *figures = line.split() or [""]
        if len(figures) != 3 or not all(figure.isdecimal() for figure in figures):
            continue
        weights, context, compute = map(float, figures)
        shares.append(Share(weights=weights, kv=context, compute=compute))
        if name == "Host":
            return tuple(shares)
    return None


def _question(flags: Flags, context: int) -> list[str]:
    """Return the flags that the tool accepts, in their usual spelling; some come from the environment."""
    words: list[str] = []
    for flag in flags.given:
        if flag.name in _PASSED and (flag.name in _ADD_UP or flag is flags.last(flag.name)):
            form = FORMS[flag.name]
            words += [(form.negations if flag.negated else form.spellings)[0], *flag.values]
    slots = 1 if flags.kv_unified else flags.slots
    return [*words, "--ctx-size", str(context), "--parallel", str(slots)]


def _corrected(said: Share, wanted: Share, asked: Share) -> Share:
    """Correct the tool's result for other flags by the difference of the two estimates by formula.

    The tool reports cache and recurrent state together as context.
    """
    return Share(
        weights=max(0.0, said.weights + wanted.weights - asked.weights),
        kv=max(0.0, said.kv - asked.recurrent + wanted.kv - asked.kv),
        recurrent=wanted.recurrent,
        compute=max(0.0, said.compute + wanted.compute - asked.compute),
        work=wanted.work,
        projector=wanted.projector,
    )


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
