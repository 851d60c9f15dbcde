"""`llama-router estimate`: a table for a file, and for one that is elsewhere, from its first bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tiny_models import Blueprint, write_embedding, write_llama, write_projector

from benchmarks.footprints import MODELS
from router.__main__ import main
from router.engines.llamacpp import forecast
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.sizing import EngineKind
from router.formats import gguf
from router.memory.plan import Ground, Site
from router.store import remote_headers
from router.system.devices import HOST, Device

GRANITE = MODELS["granite-4-tiny"]
FAR = "http://127.0.0.1:9"  # the discard port: nobody listens


class Web:
    """Serve files over HTTP that report a full size but consist of their first bytes only."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int]] = {}
        self.redirects: dict[str, str] = {}
        self.refused: dict[str, int] = {}
        self.honours_ranges = True
        self.asked: list[tuple[str, str, str]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def publish(self, path: str, model: Blueprint) -> None:
        self.files[path] = model.header(), model.file_bytes()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.removesuffix("?download=true")
        self.asked.append((request.path, request.headers["Range"], request.headers.get("Authorization", "")))
        if path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[path])
            request.end_headers()
            return
        if path not in self.files:
            request.send_error(self.refused.get(path, 404))
            return
        head, size = self.files[path]
        first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        if self.honours_ranges:
            body = head[first : last + 1]
            body += bytes(min(last + 1, size) - first - len(body))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{size}")
            request.send_header("Content-Length", str(len(body)))
        else:
            body = head
            request.send_response(200)
            request.send_header("Content-Length", str(size))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command on a machine with 8 GB of free RAM and no GPU, whose engine is not asked."""
    monkeypatch.setattr(forecast, "idle_ground", lambda *_: Ground((), Site(HOST, 8000, 8000)))
    monkeypatch.setattr(forecast, "_engine", lambda: None)
    return lambda *arguments: main(["estimate", *arguments])


def test_a_table_for_a_file(
    tmp_path: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = MODELS["qwen3-8b"].write(tmp_path / "qwen3-8b.gguf")

    command(str(path), "-c", "16384", "-ctk", "q8_0", "-ctv=q8_0", "--jinja")

    printed = capsys.readouterr().out
    assert "qwen3 (Q4_K, 4701 MiB on disk, trained for 40960 tokens)" in printed
    assert [line.split() for line in printed.splitlines()[2:4]] == [
        ["MiB", "weights", "KV", "compute", "besides", "total", "usable"],
        ["host", "4,701", "1,224", "128", "16", "6,069", "8,000"],
    ]
    assert "context: 16384 tokens, all slots together\nsource: llama.cpp's formulas" in printed
    assert "largest context that fits now: -c 40960" in printed
    assert "up to 8192 MiB (--cache-ram)" in printed


def test_flags_that_are_unknown_or_make_no_difference_are_named(
    tmp_path: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(MODELS["qwen3-8b"].write(tmp_path / "qwen3-8b.gguf"))
    command(path, "-c", "40960", "-ctk", "q8_0", "--ctx-sizes", "3", "--temp", "0.2", "--cache-ram", "10")
    unknown, idle = capsys.readouterr().err.splitlines()
    assert unknown.startswith("warning: --ctx-sizes is not a flag of any llama-server known here")
    assert unknown.endswith("did you mean --ctx-size?")
    assert idle == "warning: without effect on this model's memory: --temp 0.2"


@pytest.mark.parametrize("place", ["before", "behind"])
def test_an_estimate_is_printed_as_one_document(
    tmp_path: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str], place: str
) -> None:
    path = str(MODELS["qwen3-8b"].write(tmp_path / "qwen3-8b.gguf"))
    arguments = [path, "-c", "16384", "-ctk", "q8_0", "-ctv", "q8_0", "--jinja"]
    command(*(["--json", *arguments] if place == "before" else [*arguments, "--json"]))
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert printed.err == ""
    assert (document["need_mib"], document["free_mib"], document["fits"]) == (
        {"host": 6069},
        {"host": 8000},
        "now",
    )
    assert (document["context"], document["largest_context"]) == (16384, 40960)
    assert document["parts_mib"]["host"]["kv"] == 1224
    assert document["warnings"] == ["without effect on this model's memory: --jinja"]


def test_what_embeds_is_counted_with_the_batches_that_the_router_gives_it(
    tmp_path: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_embedding(tmp_path / "e.gguf", n_embd=256, n_ff=1024, context_length=8192))
    command(path, "-ub", "512", "-b", "512")
    command(path)
    small, large = (float(line.split()[2]) for line in capsys.readouterr().out.splitlines() if "host  " in line)
    assert large > 15 * small
    command(path)
    assert "the router would add: --embedding --batch-size 8192 --ubatch-size 8192" in capsys.readouterr().out


def test_the_widest_table_fits_a_terminal(
    tmp_path: Path,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = MODELS["granite-4-tiny"].write(tmp_path / "granite.gguf")  # it has recurrent layers, too
    projector = write_projector(tmp_path / "mmproj.gguf")
    gpus = tuple(Site(Device.gpu(number), 4000, 4000) for number in range(2))
    monkeypatch.setattr(forecast, "idle_ground", lambda *_: Ground(gpus, Site(HOST, 800000, 800000)))

    command(str(model), "-c", "16384", "--mmproj", str(projector), "-fa", "off", "-np", "4")

    lines = capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        command(str(model), "--device", "CUDA2")
    assert "--device CUDA2 refers to more GPUs than available (gpu0, gpu1, " in capsys.readouterr().err
    assert lines[2].split()[:6] == ["MiB", "weights", "KV", "state", "compute", "mmproj"]
    assert [line.split()[0] for line in lines[3:7]] == ["gpu0", "gpu1", "host", "together"]
    assert max(map(len, lines)) <= 80, "\n".join(lines)


def test_the_slots_of_who_names_none_are_those_of_the_build(
    tmp_path: Path,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recurrent model keeps as many states as there are slots; builds from before November 2025
    have one."""
    path = MODELS["mamba-2.8b"].write(tmp_path / "mamba.gguf")
    program = tmp_path / "llama-server"
    states = []
    for default in ("1", "-1, -1 = auto"):
        slots = f"-np,   --parallel N          number of slots (default: {default})"
        program.write_text(f"#!/bin/sh\necho '--model FNAME  path\n--port PORT  port\n{slots}'\n# {default}\n")
        program.chmod(0o755)
        engine = EngineKind(Binary((str(program),), "llama-server", ""))
        monkeypatch.setattr(forecast, "_engine", lambda engine=engine: engine)
        command(str(path), "-c", "4096")
        states.append(int(capsys.readouterr().out.splitlines()[3].split()[2]))
    assert states == [24, 95]


def test_what_is_lacking_is_said(
    tmp_path: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = MODELS["qwen3-32b"].write(tmp_path / "qwen3-32b.gguf")

    command(str(path), "-c", "4096", "-cram", "0")

    printed = capsys.readouterr().out
    assert "does not fit now: host lacks 11" in printed
    assert "no context is small enough to fit now" in printed
    assert "--cache-ram" not in printed


def test_a_projector_among_the_flags_is_counted(
    tmp_path: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS["gemma-3-1b"].write(tmp_path / "gemma.gguf")
    projector = write_projector(tmp_path / "mmproj.gguf")

    command(str(model), "-c", "4096", "--mmproj", str(projector))

    assert "mmproj" in capsys.readouterr().out


def test_one_request_is_enough_for_a_model_that_is_elsewhere(web: Web) -> None:
    web.publish("/models/granite.gguf", GRANITE)

    header = remote_headers.read(f"{web.url}/models/granite.gguf", {})

    assert header == gguf.parse(GRANITE.header(), file_bytes=GRANITE.file_bytes())
    assert web.asked == [("/models/granite.gguf", "bytes=0-8388607", "")]


def test_a_header_that_goes_on_is_fetched_on(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_BYTES", 10_000)
    web.publish("/granite.gguf", GRANITE)

    assert remote_headers.read(f"{web.url}/granite.gguf", {}).block_count == 40
    assert [asked[1] for asked in web.asked] == [
        "bytes=0-9999",
        "bytes=10000-19999",
        "bytes=20000-39999",
        "bytes=40000-79999",
    ]


def test_a_server_may_send_the_whole_file(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_BYTES", 10_000)
    web.honours_ranges = False
    path = write_llama(tmp_path / "tiny.gguf")
    web.files["/tiny.gguf"] = path.read_bytes(), path.stat().st_size

    assert remote_headers.read(f"{web.url}/tiny.gguf", {}).tensors == gguf.read(path).tensors


def test_all_parts_of_a_split_model_count(web: Web, tmp_path: Path) -> None:
    first = write_llama(tmp_path / "split.gguf", parts=3)
    for path in sorted(tmp_path.iterdir()):
        web.files[f"/{path.name}"] = path.read_bytes(), path.stat().st_size

    header = remote_headers.read(f"{web.url}/{first.name}?download=true", {})
    there = gguf.read(first)

    assert [asked[0] for asked in web.asked] == [f"/{path.name}?download=true" for path in there.files]
    ranges = [asked[1] for asked in web.asked]
    assert ranges == ["bytes=0-8388607", *["bytes=0-262143"] * 2], "of 200 parts, not 1.6 GB"
    assert sum(tensor.nbytes for tensor in header.tensors) == sum(tensor.nbytes for tensor in there.tensors)
    assert header.file_bytes == there.file_bytes


def test_the_hub_gets_the_token_and_its_storage_does_not(web: Web) -> None:
    storage = Web()
    storage.publish("/blob", GRANITE)
    web.redirects["/ibm/granite-GGUF/resolve/main/q4/granite.gguf"] = f"{storage.url}/blob"

    remote_headers.read("hf.co/ibm/granite-GGUF/q4/granite.gguf", {"HF_ENDPOINT": web.url, "HF_TOKEN": "secret"})

    assert [asked[2] for asked in web.asked] == ["Bearer secret"]
    assert [asked[1:] for asked in storage.asked] == [("bytes=0-8388607", "")]
    storage.server.shutdown()
    storage.server.server_close()


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("hf.co/ibm/granite/a.gguf", "https://huggingface.co/ibm/granite/resolve/main/a.gguf"),
        ("https://hf.co/ibm/granite/q4/a.gguf", "https://huggingface.co/ibm/granite/resolve/main/q4/a.gguf"),
        (
            "https://huggingface.co/ibm/granite/blob/v2/a.gguf",
            "https://huggingface.co/ibm/granite/resolve/v2/a.gguf",
        ),
        ("https://example.com/a.gguf", "https://example.com/a.gguf"),
        ("models/a.gguf", None),
    ],
)
def test_what_a_model_is_called_says_where_it_is(model: str, url: str | None) -> None:
    assert remote_headers.resolve(model, {}) == url


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["/nowhere/a.gguf"], 1, "there is no file /nowhere/a.gguf"),
        (["hf.co/ibm"], 1, "use hf.co/USER/REPO[:QUANT] or"),
        (["ftp://example.com/a.gguf"], 1, "ftp is not a supported protocol"),
        ([f"{FAR}/a.gguf"], 1, "cannot be reached"),
        (["TINY", "-c", "lots"], 2, "-c takes a whole number"),
        (["TINY", "4096"], 2, "neither a flag nor the value of one"),
        (["PROJECTOR"], 1, "give the model, and this file with --mmproj"),
        (["FOLDER"], 1, "has no config.json"),
        (["PART"], 1, "is part 2 of 3: use the first part"),
        ([], 2, "llama-router estimate: error: the following arguments are required: MODEL\n"),
    ],
)
def test_a_mistake_is_explained(
    tmp_path: Path,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    reason: str,
) -> None:
    places = {
        "TINY": str(write_llama(tmp_path / "tiny.gguf")),
        "PROJECTOR": str(write_projector(tmp_path / "mmproj.gguf")),
        "FOLDER": str(tmp_path),
        "PART": str(write_llama(tmp_path / "split.gguf", parts=3)).replace("-00001-", "-00002-"),
    }

    with pytest.raises(SystemExit) as exit_:
        command(*(places.get(word, word) for word in arguments))

    assert exit_.value.code == code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "set HF_TOKEN"), (403, "check HF_TOKEN"), (404, "no such file"), (503, "HTTP 503")],
)
def test_a_refusal_is_explained(web: Web, status: int, reason: str) -> None:
    web.refused["/a.gguf"] = status

    with pytest.raises(remote_headers.CannotRead, match=reason):
        remote_headers.read(f"{web.url}/a.gguf", {})
