"""Conversion of a command line of `docker run`, or Podman's, to the keys of an entry for a container."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from router.config.schema import CONTAINER_NAME, VOLUME

PROGRAMS = ("docker", "podman")
_ENDS = ("stop", "kill", "rm")
"""Commands of these programs that end a container."""
_LONG = {
    "a": "attach",
    "c": "cpu-shares",
    "d": "detach",
    "e": "env",
    "h": "hostname",
    "i": "interactive",
    "l": "label",
    "m": "memory",
    "p": "publish",
    "P": "publish-all",
    "q": "quiet",
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}
_NEEDLESS = frozenset(
    {
        "attach",
        "detach",
        "disable-content-trust",
        "init",
        "interactive",
        "quiet",
        "replace",
        "rm",
        "sig-proxy",
        "tls-verify",
        "tty",
    }
)
"""Options that say how the program itself behaves, or what the router does anyway."""
_WITHOUT_VALUE = (_NEEDLESS - {"attach"}) | {
    "help",
    "no-healthcheck",
    "no-hosts",
    "oom-kill-disable",
    "privileged",
    "publish-all",
    "read-only",
    "rmi",
}
_LOCAL = ("127.0.0.1", "localhost", "::1")
_ITS_PORT, _ITS_HOST = "{port}", "{host}"


class NotConverted(Exception):
    """Raised if a container could not be reached, or its command line is not understood; the message says why."""


class DockerRun:
    """A converted command line.

    `words` are those after the program, `port` is how they name the port of this machine, and `host` the host that
    is asked there. `environ` are variables of the command. `resolved` makes a relative path absolute.
    """

    def __init__(
        self,
        words: Sequence[str],
        port: str,
        host: str,
        environ: Mapping[str, str],
        resolved: Callable[[str], str],
    ) -> None:
        """Convert it. Raises NotConverted."""
        self._port, self._environ, self._resolved = port, environ, resolved
        options, image, arguments = _parsed(words)
        self.dropped: list[str] = []
        """What has no counterpart, each with the reason."""
        self.env: dict[str, str] = {}
        self._container: dict[str, Any] = {"image": image}
        self._volumes: list[str] = []
        self._inside: str | None = None
        """The port in the container that is published as `port`."""
        self._shares_network = False
        for name, value in options:
            if name not in _NEEDLESS:
                self._read(name, value)
        if self._inside is None and host == self._container.get("name"):
            self._inside = port
        if self._inside is None and not self._shares_network:
            raise NotConverted(f"docker publishes no port as {port}, at which the server is asked (-p)")
        self.arguments = [self._told(word) for word in arguments]
        self.env = {name: self._told(value) for name, value in self.env.items()}
        if self._shares_network:
            self._listen_anywhere()
        elif self._inside is not None and self._inside.isdecimal():
            self._container["port"] = int(self._inside)
        elif not self._names_port:
            raise NotConverted(f"its server is not told which port to listen on ({self._inside})")

    @property
    def container(self) -> dict[str, Any]:
        """Value of the key `container`."""
        return {**self._container, **({"volumes": self._volumes} if self._volumes else {})}

    @property
    def _names_port(self) -> bool:
        return any(_ITS_PORT in word for word in (*self.arguments, *self.env.values()))

    def _told(self, word: str) -> str:
        """Return an argument in which the port of this machine has become that of the container."""
        return (
            re.sub(rf"(?<![0-9]){re.escape(self._port)}(?![0-9])", _ITS_PORT, word) if self._port in word else word
        )

    def _listen_anywhere(self) -> None:
        """Replace the network of this machine by a published port: what listens there is told another address."""
        if not self._names_port:
            raise NotConverted(f"its server is not told which port to listen on ({self._port})")
        for index, word in enumerate(self.arguments):
            flag, equals, value = word.partition("=")
            if flag == "--host" and value in _LOCAL:
                self.arguments[index] = f"{flag}{equals}{_ITS_HOST}"
            elif word in _LOCAL and index and self.arguments[index - 1] == "--host":
                self.arguments[index] = _ITS_HOST
        self.dropped.append("--network host: the server gets a network of its own, and a port of 127.0.0.1")

    def _read(self, name: str, value: str) -> None:
        if name == "publish":
            self._read_port(value)
        elif name == "env":
            self._read_variable(value)
        elif name in ("volume", "mount"):
            self._read_volume(name, value)
        elif name in ("gpus", "runtime", "device"):
            self._read_device(name, value)
        elif name in ("network", "net"):
            self._read_network(value)
        elif (name, value) == ("ipc", "host") or name in ("user", "shm-size"):
            self._container[name.replace("-", "_")] = value
        elif name == "name" and re.fullmatch(CONTAINER_NAME, value):
            self._container["name"] = value
        elif name == "entrypoint" and value:
            self._container["entrypoint"] = [value]
        elif name == "restart":
            if value != "no":
                self._drop(name, value, "the router starts servers again itself")
        elif name == "pull":
            if value != "never":
                self._drop(name, value, "the router pulls no images")
        else:
            self._drop(name, value, "`container` has no such key")

    def _drop(self, name: str, value: str, reason: str) -> None:
        self.dropped.append(f"--{name}{' ' * bool(value)}{value}: {reason}")

    def _read_port(self, value: str) -> None:
        outside, _, inside = value.rpartition(":")
        inside, _, protocol = inside.partition("/")
        if outside.rpartition(":")[2] == self._port and protocol in ("", "tcp"):
            self._inside = inside
        else:
            self._drop("publish", value, "only the port at which the router asks is published")

    def _read_variable(self, value: str) -> None:
        name, equals, value = value.partition("=")
        if equals and name.isidentifier():
            self.env[name] = value
        elif name in self._environ:
            self.env[name] = self._environ[name]
        else:
            self._drop("env", name, "containers inherit nothing of the router's; set it in `env`")

    def _read_volume(self, name: str, value: str) -> None:
        volume = value if name == "volume" else _as_volume(value)
        if volume is None or not re.fullmatch(VOLUME, volume):
            self._drop(name, value, "only SOURCE:TARGET[:ro] is mounted")
            return
        source, _, rest = volume.partition(":")
        if "/" in source or source in (".", ".."):  # else it is the name of a volume
            source = self._resolved(source)
        self._volumes.append(f"{source}:{rest}")

    def _read_device(self, name: str, value: str) -> None:
        if name == "device" and value.startswith("/"):
            self._container.setdefault("devices", []).append(value)
            return
        if value.rpartition("=")[2] != "all" and (name, value) != ("runtime", "nvidia"):
            reason = "the router chooses GPUs by memory (system.gpu_devices says which it may use)"
            self._drop(name, value, reason if name != "runtime" else "`container` has no such key")
        if name != "runtime" or value == "nvidia":
            self._container["gpus"] = "all"

    def _read_network(self, value: str) -> None:
        if value == "host":
            self._shares_network = True
        elif value == "none" or not re.fullmatch(CONTAINER_NAME, value):
            self._drop("network", value, "the router reaches servers by a network, or by a port of 127.0.0.1")
        elif value not in ("bridge", "default"):
            self._container["network"] = value


def is_run(words: Sequence[str]) -> bool:
    """Whether a command line starts a container."""
    program, *rest = [*words, ""]
    return program.rpartition("/")[2] in PROGRAMS and (rest[:1] == ["run"] or rest[:2] == ["container", "run"])


def is_stop(words: Iterable[str]) -> bool:
    """Whether a command line ends a container, which the router does itself."""
    program, *rest = [*words, ""]
    return program.rpartition("/")[2] in PROGRAMS and any(word in _ENDS for word in rest)


def _parsed(words: Sequence[str]) -> tuple[list[tuple[str, str]], str, list[str]]:
    """Return options with their values, the image, and the arguments behind it. Raises NotConverted."""
    rest = list(words[words.index("run") + 1 :])
    options: list[tuple[str, str]] = []

    def value_of(option: str) -> str:
        if not rest:
            raise NotConverted(f"{option} has no value")
        return rest.pop(0)

    while rest and rest[0].startswith("-") and rest[0] != "--":
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals and name not in _WITHOUT_VALUE:
                value = value_of(word)
            options.append((name, value))
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            name = _LONG.get(letter, letter)
            if name in _WITHOUT_VALUE:
                options.append((name, ""))
            else:
                options.append((name, letters.removeprefix("=") or value_of(f"-{letter}")))
                letters = ""
    if rest[:1] == ["--"]:
        del rest[0]
    if not rest:
        raise NotConverted("its command names no image")
    return options, rest[0], rest[1:]


def _as_volume(mount: str) -> str | None:
    """Return the value of --mount as that of --volume; None if it is of another kind."""
    parts = dict(part.partition("=")[::2] for part in mount.split(","))
    source = parts.get("source") or parts.get("src")
    target = parts.get("target") or parts.get("destination") or parts.get("dst")
    if parts.get("type", "volume") not in ("bind", "volume") or not source or not target:
        return None
    is_readonly = any(parts.get(name) in ("", "true", "1") for name in ("readonly", "ro"))
    return f"{source}:{target}{':ro' if is_readonly else ''}"
