"""Memory that vLLM and Transformers take on this machine's CPU, compared with the estimate of a first load.

    python benchmarks/hf_footprints.py [--vllm PROGRAM] [--transformers PROGRAM] [--only WORD]

Models of the shapes of real ones are made for the purpose: a tiny one, a Llama of 430 MB and Qwens of 880 and
900, with 16 and 32 bits. Each is loaded with the arguments that the router would add, and reads prompts: for vLLM
some of a few thousand tokens, for Transformers one that nearly fills the planned context. Held is what the ledger
counts, but with all pages of libraries, of which engines beside it may share some: anonymous memory of all its
processes, and once each page of a file that one of them has mapped.

`--threshold` is how far the median may be off.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

# ruff: noqa: E402
from hf_models import LLAMA, MIDDLE_LLAMA, MIDDLE_QWEN, SMALLER_QWEN, write_model_of_bytes
from peers import Goals, free_port

from router.config.schema import System
from router.engines.transformers import plan as of_transformers
from router.engines.transformers import program as transformers_program
from router.engines.transformers.model import TransformersModel
from router.engines.vllm import program as vllm_program
from router.engines.vllm.model import VllmModel
from router.engines.vllm.plan import VllmPlan
from router.formats import hf_model
from router.hardware.ram import process_memory
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Ground, Site, Unusable
from router.system.devices import HOST

GROUND = Ground((), Site(HOST, 1 << 20, 1 << 20, total_mib=1 << 20))
TINY: Mapping[str, Any] = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "tiny": TINY,
    "llama": MIDDLE_LLAMA,
    "qwen": MIDDLE_QWEN,
    "qwen of 32 bits": SMALLER_QWEN,
}
FLAGS_OF_VLLM: Sequence[tuple[str, ...]] = (("--enforce-eager",), ())
SLOTS = 2
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
LOAD_SEC = 1200


def planned_by_vllm(program: vllm_program.Program, folder: Path, flags: tuple[str, ...]) -> Alternative:
    model = VllmModel(alias="m", model_path=folder, flags=flags, slots=SLOTS)
    return VllmPlan(model, hf_model.read(folder), program, GROUND, Learned()).inspection().alternatives[0]


def planned_by_transformers(program: transformers_program.Program, folder: Path) -> Alternative:
    model = TransformersModel(alias="m", model_path=folder)
    return of_transformers.inspect(model, program, System(), GROUND, Learned()).alternatives[0]


class Engine:
    """A server that runs while `with` does."""

    def __init__(self, argv: Sequence[str], name: str) -> None:
        self._port = free_port()
        self._argv = [*argv, "--host", "127.0.0.1", "--port", str(self._port)]
        self._name = name

    def __enter__(self) -> Engine:
        self._folder = tempfile.TemporaryDirectory(dir="/tmp")
        self._log = Path(self._folder.name, "log").open("w+")
        environ = {**os.environ, **QUIET, "TMPDIR": self._folder.name}
        self._process = psutil.Popen(
            self._argv, env=environ, stdout=self._log, stderr=self._log, start_new_session=True
        )
        deadline = time.monotonic() + LOAD_SEC
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise SystemExit(f"{self._argv[0]} does not serve:\n{self._log.read()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        family = [self._process, *self._process.children(recursive=True)]
        self._process.terminate()
        psutil.wait_procs(family, 20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()
        self._folder.cleanup()

    def _is_ready(self) -> bool:
        try:
            return self._call("GET", "/health") == 200
        except OSError:
            return False

    def _call(self, method: str, path: str, body: object = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1800)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    def read(self, *prompts: int) -> None:
        """Have it read prompts of so many tokens at once, and answer each with a few."""

        def ask(place: int, tokens: int) -> None:
            content = f"{place} " + "word " * (tokens // 5)
            body = {"model": self._name, "max_tokens": 8, "messages": [{"role": "user", "content": content}]}
            status = self._call("POST", "/v1/chat/completions", body)
            if status != 200:
                raise SystemExit(f"{self._argv[0]} answered {status}")

        asking = [threading.Thread(target=ask, args=each) for each in enumerate(prompts)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()

    def held_mib(self) -> int:
        family = [self._process.pid, *(child.pid for child in self._process.children(recursive=True))]
        anonymous = process_memory([self._process.pid])[self._process.pid].anonymous_mib
        return anonymous + mapped_mib(family)


def mapped_mib(pids: Sequence[int]) -> int:
    """Return the size of the pages of files that the processes have mapped, as if nobody else had them."""
    most: dict[str, int] = {}
    for pid in pids:
        own: dict[str, int] = {}
        path, resident = "", 0
        for line in _read(Path(f"/proc/{pid}/smaps")).splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                path = words[5] if len(words) > 5 and words[5].startswith("/") else ""
                if path.startswith(("/dev/shm", "/memfd")):
                    path = ""
            elif path and words[0] == "Rss:":
                resident = int(words[1])
            elif path and words[0] == "Anonymous:":
                own[path] = own.get(path, 0) + resident - int(words[1])
        for path, kib in own.items():
            most[path] = max(kib, most.get(path, 0))
    return sum(most.values()) >> 10


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PROGRAM", default=os.environ.get("VLLM_PATH"))
    parser.add_argument("--transformers", metavar="PROGRAM", default=os.environ.get("TRANSFORMERS_PATH"))
    parser.add_argument("--only", default="", metavar="WORD", help="lines that have this in them")
    parser.add_argument("--threshold", type=float, default=0.05)
    options = parser.parse_args()
    goals = Goals()
    with tempfile.TemporaryDirectory() as made:
        folders = {name: write_model_of_bytes(Path(made, str(at)), MODELS[name]) for at, name in enumerate(MODELS)}
        for kind, measure in (("vLLM", of_vllm), ("Transformers", of_hugging_face)):
            errors = list(measure(options, folders))
            if errors:
                median = statistics.median(map(abs, errors))
                goals.at_most(f"{kind}: median error of the estimate", median, options.threshold)
    return goals.judge()


def of_vllm(options: argparse.Namespace, folders: Mapping[str, Path]) -> Sequence[float]:
    try:
        program = vllm_program.find_program(options.vllm)
    except Unusable as error:
        print(error)
        return []
    errors = []
    for name, folder in folders.items():
        for flags in FLAGS_OF_VLLM:
            if MODELS[name]["torch_dtype"] == "float32":
                flags = (*flags, "--dtype", "float32")
            line = f"vLLM {name} {' '.join(flags)}"
            if options.only not in line:
                continue
            plan = planned_by_vllm(program, folder, flags)
            argv = [str(program.path), "serve", str(folder), *flags, *plan.flags, "--served-model-name", "m"]
            with Engine(argv, "m") as engine:
                engine.read(min(2600, MODELS[name]["max_position_embeddings"] - 100))
                engine.read(1900, 1900)
                errors.append(told(line, plan, engine.held_mib()))
    return errors


def of_hugging_face(options: argparse.Namespace, folders: Mapping[str, Path]) -> Sequence[float]:
    try:
        program = transformers_program.find_program(options.transformers)
    except Unusable as error:
        print(error)
        return []
    errors = []
    for name, folder in folders.items():
        line = f"Transformers {name}"
        if options.only not in line:
            continue
        plan = planned_by_transformers(program, folder)
        with Engine([str(program.path), "serve", str(folder), *plan.flags], str(folder)) as engine:
            engine.read(300)
            engine.read(MODELS[name]["max_position_embeddings"] - 200)
            errors.append(told(line, plan, engine.held_mib()))
    return errors


def told(line: str, plan: Alternative, held: int) -> float:
    estimated = plan.placement[HOST]
    error = estimated / held - 1
    print(f"{line:<48}{estimated:>7} MiB estimated{held:>7} held{error:>+8.1%}", flush=True)
    return error


if __name__ == "__main__":
    sys.exit(main())
