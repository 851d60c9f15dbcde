"""A Docker daemon of the tests' own, and an image to run: an empty folder, into which this machine's programs are
mounted. Nothing is pulled."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGE = "llama-router-test:empty"
_PYTHON = Path(sys.executable).resolve()
_PLACES = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", sys.base_prefix, str(Path(__file__).parents[1]))
VOLUMES = [f"{place}:{place}:ro" for place in dict.fromkeys(_PLACES) if os.path.exists(place)]
SERVER = Path(__file__).with_name("speech_server.py")


def missing() -> str | None:
    """Return why no daemon can be started here; None if one can."""
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
        image = io.BytesIO()
        with tarfile.open(fileobj=image, mode="w") as tar:
            for name in ("tmp", "proc", "dev", "sys", "etc"):
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o777
                tar.addfile(entry)
        self.docker("import", "-", IMAGE, stdin=image.getvalue())

    def start(self) -> None:
        folder = self._folder
        (folder / "pid").unlink(missing_ok=True)
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
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
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


def as_container(config: Path, state: Path, socket: str) -> list[str]:
    """Return the words by which Docker's client runs a router inside a container."""
    mounts = [f"{socket}:/var/run/docker.sock", f"{config}:{config}:ro", f"{state}:{state}", *VOLUMES]
    mounts.append(f"{sys.prefix}:{sys.prefix}:ro")
    words = [word for mount in dict.fromkeys(mounts) for word in ("-v", mount)]
    run = Path(__file__).parents[1] / "run.py"
    return [*words, IMAGE, sys.executable, str(run), "serve", "--config", str(config)]


def said(answer: Any) -> str:
    """Return the message of an error."""
    message: str = json.loads(answer.text)["error"]["message"]
    return message
