"""Memory that engines take on this machine's CPU, compared with the estimate, for models made for the purpose.

Each engine loads its model, reads a prompt longer than a batch; then the memory of its processes is
taken as the ledger takes it (PSS: pages that are shared count in parts; those that copied weights come from count
as free). Estimated is what the router would book: llama.cpp's own tool where there is one, formulas, and what the
process takes besides. Of buffers an engine has only what was touched,
and some are touched by long prompts alone: where it holds a tenth less than was estimated, a prompt fills the
whole context, and what is held then counts, too.

    python benchmarks/live_footprints.py [--only WORD] [--flags WORDS]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

# ruff: noqa: E402
from tiny_models import write_llama

from router.engines.base import NoEngine
from router.engines.llamacpp.binary import Binary, find_binary
from router.engines.llamacpp.flags import Flags
from router.engines.llamacpp.sizing import EngineKind, Sizer, read_files
from router.hardware.ram import process_memory
from router.memory.ledger import Account
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Size
from router.system.devices import HOST

FLAGS = (
    ("-c", "4096", "-np", "1"),
    ("-c", "16384", "-np", "1"),
    ("-c", "16384", "-np", "4"),
    ("-c", "16384", "-np", "4", "-kvu"),
    ("-c", "8192", "-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"),
    ("-c", "8192", "-np", "1", "-ub", "1024"),
    ("-c", "8192", "-np", "1", "-fa", "off"),
)
MODELS: tuple[tuple[int, Literal["F16", "Q4_0"]], ...] = ((300, "F16"), (600, "F16"), (300, "Q4_0"))
"""Megabytes and quantization; quantized weights are copied."""


def engines() -> Iterator[Binary]:
    from router.engines.llamacpp import embedded

    if version := embedded.available():
        yield Binary(tuple(embedded.command()), "embedded", version)
    try:
        found = find_binary(os.environ.get("LLAMA_SERVER_PATH"))
    except NoEngine:
        return
    if found.kind == "llama-server":
        yield found


def estimated(binary: Binary, model: Path, words: tuple[str, ...]) -> Size:
    flags = Flags(words)
    sizer = Sizer(read_files(model, flags), flags, {}, EngineKind(binary), Learned())
    size = sizer.parts((), 0, {})
    assert size is not None
    return size


def held_mib(binary: Binary, model: Path, words: tuple[str, ...], size: Size) -> tuple[int, int | None]:
    """Return the memory after a short prompt, and with a full context if the short prompt left much untouched."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [*binary.argv, "-m", str(model), "--port", str(port), "-t", "2", "--cache-ram", "0", *words]
    engine = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    account = Account(0, "", Alternative((), size, size.mib), is_settled=True)

    def held_now() -> int:
        return account.in_ram(process_memory([engine.pid])[engine.pid])

    try:
        ask(f"http://127.0.0.1:{port}", "")
        held_now()
        ask(f"http://127.0.0.1:{port}", "word " * 300)
        held = held_now()
        if held > 0.9 * size.mib[HOST]:
            return held, None
        flags = Flags(words)
        tokens = flags.integer("ctx-size", 0) // (1 if flags.kv_unified else flags.slots) - 16
        ask(f"http://127.0.0.1:{port}", [place % 20 + 5 for place in range(tokens)])
        return held, held_now()
    finally:
        engine.terminate()
        engine.wait()


def ask(url: str, prompt: str | list[int]) -> None:
    body = json.dumps({"prompt": prompt, "n_predict": 0}).encode()
    deadline = time.monotonic() + 60
    while True:
        try:
            request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=900).read()
            return
        except urllib.error.HTTPError as error:
            if error.code == 500 and b"model produced output" in error.read():
                return  # it has read the prompt; what random weights answer to it is not text
            if error.code != 503:
                raise
        except urllib.error.URLError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(url)
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="engines whose kind has this in it")
    parser.add_argument("--flags", default="", metavar="WORDS", help="only flags that begin with these")
    options = parser.parse_args()
    errors = []
    print(f"{'engine':<14}{'model':<12}{'flags':<40}{'estimated':>10}{'held':>7}{'':>8}{'full':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes, quantization in MODELS:
            model = write_llama(
                Path(folder, f"{megabytes}-{quantization}.gguf"),
                target_bytes=megabytes << 20,
                context_length=32768,
                quantization=quantization,
            )
            for binary in engines():
                if options.only not in binary.kind:
                    continue
                for flags in FLAGS:
                    if not " ".join(flags).startswith(options.flags):
                        continue
                    size = estimated(binary, model, flags)
                    ours = size.mib[HOST]
                    held, full = held_mib(binary, model, flags, size)
                    errors.append(abs(ours / (full or held) - 1))
                    shown = f"{binary.kind:<14}{f'{megabytes} MB {quantization}':<12}{' '.join(flags):<40}"
                    shown += f"{ours:>10}{held:>7}{ours / held - 1:>+8.1%}"
                    print(shown + (f"{full:>7}{ours / full - 1:>+8.1%}" if full else ""), flush=True)
            model.unlink()
    print(f"\n{len(errors)} engines: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()
