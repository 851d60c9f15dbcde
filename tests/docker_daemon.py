"""A Docker daemon of the tests' own, and an image to run: an empty folder, into which this machine's programs are
mounted. Nothing is pulled."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGE = "llama-router-test:empty"
_PYTHON = Path(sys.executable).resolve()
_PLACES = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix, str(Path(__file__).parents[1]))
VOLUMES = [f"{place}:{place}:ro" for place in dict.fromkeys(_PLACES) if os.path.exists(place)]
SERVER = Path(__file__).with_name("speech_server.py")
VLLM_IMAGE = "llama-router-test:vllm"
_VLLM = f"""#!{sys.base_prefix}/bin/python3
import argparse, os, sys
sys.path.insert(0, "/srv")
import openai_server
parser = argparse.ArgumentParser()
parser.add_argument("serve")
parser.add_argument("model")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--served-model-name")
parser.add_argument("--max-num-seqs", type=int)
parser.add_argument("--gpu-memory-utilization", type=float)
options = parser.parse_args()
print(options, os.environ.get("HUGGING_FACE_HUB_TOKEN"), os.environ.get("NVIDIA_VISIBLE_DEVICES"), flush=True)
print(os.listdir("/root/.cache/huggingface"), flush=True)
openai_server.run(options.host, options.port, options.served_model_name)
"""
"""What vLLM's image is played by: its command line, and the answers of `openai_server.py`."""
_LEFT_OUT = re.compile(
    r"/(site-packages|test|tests|idlelib|ensurepip|__pycache__|tkinter|lib2to3|config-[^/]*)(/|$)"
)


def missing() -> str | None:
    """Return why no daemon can be started here; None if one can."""
    if importlib.util.find_spec("aiodocker") is None:
        return "aiodocker is not installed"
    if os.geteuid() != 0:
        return "a Docker daemon is started as root"
    lacking = [program for program in ("dockerd", "docker", "iptables") if shutil.which(program) is None]
    return f"there is no {' and no '.join(lacking)}" if lacking else None


class Daemon:
    """A daemon with its files in a folder of its own. It starts at once."""

    def __init__(self) -> None:
        # Not below pytest's folder, which is removed while the daemon's mounts may still be there.
        self._folder = folder = Path(tempfile.mkdtemp(prefix="llama-router-docker-"))
        self.host = f"unix://{folder}/docker.sock"
        self.start()
        with _Image(self, IMAGE) as image:
            for name in ("tmp", "proc", "dev", "sys", "etc"):
                image.folder(name)

    def import_vllm(self) -> None:
        """Make an image with a Python, in which vLLM is played, and let the daemon believe in GPUs after its next
        start: it looks for a program of NVIDIA's, and runs it before each container that asks for them."""
        hook = self._folder / "bin" / "nvidia-container-runtime-hook"
        hook.parent.mkdir()
        hook.write_text("#!/bin/sh\n")
        hook.chmod(0o755)
        library = Path(sysconfig.get_path("stdlib"))
        python = Path(sys.base_prefix, "bin", "python3").resolve()
        with _Image(self, VLLM_IMAGE) as image:
            image.folder("tmp")
            image.text("usr/bin/vllm", _VLLM)
            image.text("usr/bin/true", f"#!{sys.base_prefix}/bin/python3\n")
            image.file(Path(__file__).with_name("openai_server.py"), "srv/openai_server.py")
            image.file(python, f"{sys.base_prefix}/bin/python3")
            for file in library.rglob("*"):
                if file.is_file() and not _LEFT_OUT.search(str(file)):
                    image.file(file)
            for file in _libraries(python, *library.glob("lib-dynload/*.so")):
                image.file(file)

    def start(self) -> None:
        folder = self._folder
        for name in ("pid", "exec/containerd/containerd.pid"):  # whose processes may be zombies, taken for alive
            (folder / name).unlink(missing_ok=True)
        places = {"--data-root": "data", "--exec-root": "exec", "--pidfile": "pid"}
        options = [word for option, name in places.items() for word in (option, str(folder / name))]
        command = [
            "setpriv",
            "--pdeathsig",
            "TERM",
            "--",
            "dockerd",
            "-H",
            self.host,
            *options,
        ]
        log = (folder / "log").open("ab")
        environ = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environ)
        deadline = time.monotonic() + 30
        while subprocess.run(["docker", "-H", self.host, "version"], capture_output=True).returncode:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)

    def end(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)
        self._process.wait(30)

    def remove(self) -> None:
        """End it, with all that it has left."""
        if self._process.poll() is not None:  # its containers are still there
            self.start()
        for name in self.names():
            self.docker("rm", "-f", name)
        self.docker("network", "prune", "-f")  # bridges outlive their daemon
        self.end()
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if (place := line.split()[1]).startswith(str(self._folder)):
                subprocess.run(["umount", "-l", place], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def docker(self, *words: str, stdin: bytes | None = None) -> str:
        """Run a command of Docker's own client, and return what it prints."""
        command = ["docker", "-H", self.host, *words]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def names(self, **labels: str) -> list[str]:
        """Return the names of all containers with these labels, running or not."""
        wanted = [word for name, value in labels.items() for word in ("--filter", f"label={name}={value}")]
        return self.docker("ps", "-a", "--format", "{{.Names}}", *wanted).split()


@contextlib.contextmanager
def running() -> Iterator[Daemon]:
    """A daemon, while no other of the tests runs: two of them would share a bridge and give the same addresses."""
    with open("/tmp/llama-router-dockerd.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        daemon = Daemon()
        try:
            yield daemon
        finally:
            daemon.remove()


class _Image:
    """An image that is imported at the end of the block."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon, self._name = daemon, name
        self._bytes = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._bytes, mode="w")  # noqa: SIM115 - closed by the block
        self._names: set[str] = set()

    def __enter__(self) -> _Image:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._daemon.docker("import", "-", self._name, stdin=self._bytes.getvalue())

    def folder(self, name: str) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o777
        self._tar.addfile(entry)

    def text(self, name: str, text: str) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(text.encode()), 0o755
        self._tar.addfile(entry, io.BytesIO(text.encode()))

    def file(self, file: Path, name: str = "") -> None:
        name = name or str(file)
        if name not in self._names:
            self._names.add(name)
            entry = self._tar.gettarinfo(str(file.resolve()), name)
            with file.open("rb") as content:
                self._tar.addfile(entry, content)


def _libraries(*programs: Path) -> list[Path]:
    """Return the shared libraries that programs load, and their loader."""
    listed = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    return [Path(path) for path in dict.fromkeys(re.findall(r"(/\S+\.so\S*) \(0x", listed))]


def speech(*arguments: str, **more: Any) -> dict[str, Any]:
    """Return an entry for a speech server in a container."""
    container = {"image": IMAGE, "entrypoint": [str(_PYTHON)], "volumes": VOLUMES, **more.pop("container", {})}
    return {
        "engine": "command",
        "cmd": [str(SERVER), "--host", "{host}", "--port", "{port}", *arguments],
        "container": container,
        "routes": ["/v1/audio/speech"],
        "model_name": "whisper-1",
        "ready_path": "/ready",
        **more,
    }


def vllm(**more: Any) -> dict[str, Any]:
    """Return an entry for vLLM in a container, played by `fake_vllm.py`."""
    played = Path(__file__).with_name("fake_vllm.py")
    container = {
        "image": IMAGE,
        "entrypoint": [str(_PYTHON), str(played), "serve"],
        "volumes": VOLUMES,
        "gpus": None,
    }
    return {"engine": "vllm", "slots": 3, **more, "container": {**container, **more.pop("container", {})}}


ROUTER = [sys.executable, str(Path(__file__).parents[1] / "run.py")]
"""The router as the program of a container."""


def mounts_of_router(daemon: Daemon) -> list[str]:
    """Return the volumes that a router in a container needs."""
    socket = daemon.host.removeprefix("unix://")
    return list(dict.fromkeys((f"{socket}:/var/run/docker.sock", *VOLUMES, f"{sys.prefix}:{sys.prefix}:ro")))


def as_container(daemon: Daemon, *volumes: str, **environ: str) -> list[str]:
    """Return the words by which Docker's client runs a router inside a container, up to the router's arguments."""
    words = [word for mount in (*mounts_of_router(daemon), *volumes) for word in ("-v", mount)]
    words += [word for name, value in environ.items() for word in ("-e", f"{name}={value}")]
    return [*words, IMAGE, *ROUTER]


def said(answer: Any) -> str:
    """Return the message of an error."""
    message: str = json.loads(answer.text)["error"]["message"]
    return message
