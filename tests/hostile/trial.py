"""A router under attack, and its attackers: shared by the benchmark and the test.

Three models are served by real engines: `large`, `small`, and `killed`, whose engine is killed now and then. The
engine of `crowded` takes half a second for an answer, so that a queue grows before it; that of `garbage` says
whatever it is asked to. Nobody loads `spare`, whose entry changes while the configuration is read again and again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attack
import mob

from router.engines.llamacpp import embedded

FLOODS = "floods"
ATTACKS = (*mob.ATTACKS, FLOODS)
LOADED = ("large", "small", "killed", "crowded", "garbage")

_HERE = Path(__file__).parent


def configuration(folder: Path, *, large: Path, small: Path, processors: str = "") -> dict[str, Any]:
    """Return the router's configuration, and write the files that it names into the folder."""
    models: dict[str, Any] = {}
    for name, model, slots in (
        ("large", large, 8),
        ("small", small, 8),
        ("killed", small, 8),
        ("crowded", small, 2),
        ("garbage", small, 16),
        ("spare", small, 1),
    ):
        path = folder / f"{name}.gguf"
        shutil.copy(model, path)
        flags = ["-c", "4096", "-np", str(slots), "-t", "1", "--ignore-eos"]
        models[name] = {"model_path": str(path), "flags": flags}
    return {
        "api": {
            "api_keys": ["full"],
            "inference_keys": ["mallory"],
            "clients": {"anna": {"key": "anna"}, "neighbour": {"key": "neighbour", "highest_priority": "low"}},
        },
        "system": {
            "llama_server_path": str(_engines(folder / "engines", processors)),
            "max_concurrent_models": len(LOADED),
            "model_crash_window_sec": 0.01,  # crashes are our doing, and no reason to give a model up
            "request_timeout_sec": 10,
            "answer_timeout_sec": 10,
        },
        "models": models,
        "aliases": {"model-0": "garbage", "prompted": {"uses": "garbage", "system_prompt": "You are brief."}},
    }


def _engines(script: Path, processors: str) -> Path:
    """Write the program that runs all models: a router has one binary."""
    crowded = shlex.join([sys.executable, str(_HERE.parent / "fake_engine.py")])
    garbage = shlex.join([sys.executable, str(_HERE / "garbage_engine.py")])
    on = f"taskset -c {processors}" if processors else ""
    script.write_text(
        '#!/bin/sh\ncase " $* " in\n'
        f'*/crowded.gguf*) FAKE_ANSWER_SEC=0.5 exec {on} {crowded} "$@" ;;\n'
        f'*/garbage.gguf*) exec {on} nice -n 19 {garbage} "$@" ;;\n'
        f'*) exec {on} {shlex.join(embedded.command())} "$@" ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return script


@contextmanager
def attacked(
    port: int, pid: int, configuration_file: Path, seconds: float, kinds: Sequence[str] = ATTACKS
) -> Iterator[dict[str, Any]]:
    """Attack in all of these ways for so many seconds. The attackers' reports are in the mapping afterwards."""
    told: dict[str, Any] = {}
    others = [kind for kind in kinds if kind != FLOODS]
    options = {"port": port, "seconds": seconds, "pid": pid, "configuration": configuration_file}
    commands = {"mob": ["mob.py", *(f"--{name}={value}" for name, value in options.items()), *others]}
    for reads in ("reads", "ignores"):
        commands[f"who {reads}"] = ["attack.py", str(port), str(seconds), reads, *attack.KINDS]
    if FLOODS not in kinds:
        commands = {"mob": commands["mob"]}
    elif not others:
        del commands["mob"]
    with ExitStack() as stack:
        started: dict[str, subprocess.Popen[str]] = {}
        for name, (script, *arguments) in commands.items():
            command = ["nice", "-n", "19", sys.executable, str(_HERE / script), *arguments]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            _yield_processors(process.pid)
            started[name] = stack.enter_context(process)
            stack.callback(process.terminate)
        if "mob" in started:
            assert started["mob"].stdout is not None
            started["mob"].stdout.readline()  # they have begun
        yield told
        for name, process in started.items():
            said, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{name} ended with {process.returncode}")
            told[name] = json.loads(said)


def _yield_processors(session: int) -> None:
    """Give a session what others leave of the processors, where Linux shares them among sessions first."""
    with suppress(OSError):
        Path(f"/proc/{session}/autogroup").write_text("19")
