"""`llama-router create` and `cp`: make models of a running router from Modelfiles, as Ollama's commands do."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from router.cli.client import CannotAsk, RouterClient
from router.cli.columns import Ticker, print_json, size_text
from router.cli.remote import connect
from router.formats.modelfile import BadModelfile, Modelfile, parsed
from router.system.printable import line, printable

_PART = 1 << 20


def create(options: argparse.Namespace) -> None:
    """Create a model. Exits with 2 if the Modelfile is wrong. Raises CannotAsk, ConfigError."""
    path: Path = options.file
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text("utf-8-sig")
        made = parsed(text)
        files = _files(made, Path() if str(path) == "-" else path.parent)
    except (OSError, UnicodeDecodeError, BadModelfile) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, FileNotFoundError):
            problem = f"{problem} (-f names another file)"
        print(printable(f"llama-router: {path}: {problem}"), file=sys.stderr)
        sys.exit(2)
    client = connect(options)
    body = _body(options.name, made)
    if made.adapters or not files:  # the router refuses adapters, for which nothing need be sent
        body["from"] = made.sources[0][1]
    else:
        body["files"] = {file.name: _uploaded(client, file) for file in files}
    answer = client.post("/api/create", body, timeout_sec=60)
    if options.json:
        print_json({**answer, "model": options.name})
    else:
        print(line(f"{options.name} was created"))


def copy(options: argparse.Namespace) -> None:
    """Give a model a further name. Raises CannotAsk, ConfigError."""
    client = connect(options)
    client.post("/api/copy", {"source": options.source, "destination": options.name})
    if options.json:
        print_json({"status": "success", "model": options.name})
    else:
        print(line(f"{options.name} was made from {options.source}"))


def _files(made: Modelfile, folder: Path) -> list[Path]:
    """Return the files that FROM names; none if it names a model. Raises BadModelfile."""
    files = []
    for number, source in made.sources:
        path = folder / Path(source).expanduser()
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            raise BadModelfile(number, f"{path} is a folder: name the GGUF file in it")
        elif source.startswith((".", "/", "~")) or source.endswith(".gguf"):
            raise BadModelfile(number, f"there is no file {path}")
    if len(made.sources) > 1 and len(files) < len(made.sources):
        problem = "of several FROM, each must name a file: that of the model, and that of its projector"
        raise BadModelfile(made.sources[1][0], problem)
    return files


def _body(name: str, made: Modelfile) -> dict[str, Any]:
    body: dict[str, Any] = {"model": name, "stream": False, **made.others}
    given = {"parameters": made.parameters, "messages": made.messages, "license": made.licenses}
    body |= {key: value for key, value in given.items() if value}
    if made.adapters:
        body["adapters"] = dict.fromkeys(made.adapters, "")
    return body


def _uploaded(client: RouterClient, file: Path) -> str:
    """Send a file unless the router has it, and return its digest. Raises CannotAsk."""
    nbytes = file.stat().st_size
    with Ticker() as tell:
        try:
            with file.open("rb") as content:
                digest = hashlib.sha256()
                read = _Told(content, nbytes, lambda share: tell(f"reading {file.name}: {share}"))
                while part := read.read(_PART):
                    digest.update(part)
                name = f"sha256:{digest.hexdigest()}"
                if not client.has(f"/api/blobs/{name}"):
                    content.seek(0)
                    sent = _Told(content, nbytes, lambda share: tell(f"sending {file.name}: {share}"))
                    client.send(f"/api/blobs/{name}", sent, nbytes)
        except OSError as error:
            raise CannotAsk(f"{file} cannot be read: {error.strerror}.") from None
    return name


class _Told:
    """A file that reports how much of it has been read."""

    def __init__(self, file: IO[bytes], nbytes: int, report: Callable[[str], None]) -> None:
        self._file = file
        self._nbytes = nbytes
        self._report = report
        self._read = 0

    def read(self, count: int) -> bytes:
        part = self._file.read(count)
        self._read += len(part)
        share = self._read / self._nbytes if self._nbytes else 1.0
        self._report(f"{share:.0%} of {size_text(self._nbytes)}")
        return part
