"""Fuzz the GGUF reader: every input must give a header or a `GGUFError`, in bounded time and memory.

    python tools/fuzz_gguf.py --runs 100000

Guided by coverage where atheris is installed, else by blind mutation of valid files (`--blind` to insist).
The property is the one in `tests/formats/test_gguf.py`; an input that breaks it is written to `--crashes`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MEMORY_MB = 512
SLOW_SEC = 1
NUMBERS = (0, 1, 8, 9, 12, 255, 1 << 16, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutate(blob: bytes, chance: random.Random) -> bytes:
    """A few bytes replaced, removed or added, often by a number that a reader trips over."""
    for _ in range(chance.randint(1, 4)):
        position = chance.randrange(len(blob) + 1)
        number = chance.choice(NUMBERS)
        added = chance.choice(
            (
                chance.randbytes(chance.randint(0, 9)),
                struct.pack("<Q", number),
                struct.pack(">Q", number),
                struct.pack("<I", number & 0xFFFFFFFF),
                blob[position : position + chance.randint(0, 40)],
            )
        )
        removed = chance.choice((0, len(added), chance.randint(0, 16)))
        blob = blob[:position] + added + blob[position + removed :]
    return blob[: chance.randrange(len(blob) + 1)] if chance.random() < 0.05 else blob


def fuzz_blindly(runs: int, seed: int, crashes: Path) -> None:
    from test_gguf import parses_or_explains, valid_files

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    chance = random.Random(seed)
    seeds = valid_files()
    started_sec = time.monotonic()
    slowest_sec = 0.0
    for _ in range(runs):
        blob = mutate(chance.choice(seeds), chance)
        begun_sec = time.monotonic()
        try:
            parses_or_explains(blob)
        except BaseException:
            crashes.mkdir(parents=True, exist_ok=True)
            (crashes / "crash.gguf").write_bytes(blob)
            raise
        slowest_sec = max(slowest_sec, time.monotonic() - begun_sec)
    total_sec = time.monotonic() - started_sec
    print(f"{runs:,} inputs in {total_sec:.0f} s, the slowest {slowest_sec * 1e3:.0f} ms, within {MEMORY_MB} MB")
    if slowest_sec > SLOW_SEC:
        sys.exit(f"an input took longer than {SLOW_SEC} s")


def fuzz_with_atheris(runs: int, seed: int, crashes: Path) -> None:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["router"]):
        from test_gguf import parses_or_explains, valid_files

    crashes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, blob in enumerate(valid_files()):
            Path(corpus, str(number)).write_bytes(blob)
        limits = [f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SLOW_SEC}", "-max_len=8192"]
        where = [f"-artifact_prefix={crashes}/", corpus]
        atheris.Setup([sys.argv[0], f"-runs={runs}", f"-seed={seed}", *limits, *where], parses_or_explains)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--blind", action="store_true", help="mutate blindly even if atheris is installed")
    parser.add_argument("--crashes", type=Path, default=Path("build/fuzz"), help="folder for inputs that fail")
    arguments = parser.parse_args()
    guided = importlib.util.find_spec("atheris") and not arguments.blind
    (fuzz_with_atheris if guided else fuzz_blindly)(arguments.runs, arguments.seed, arguments.crashes)


if __name__ == "__main__":
    main()
