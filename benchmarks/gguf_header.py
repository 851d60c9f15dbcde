"""How long it takes to read the header of a model with a large vocabulary, beside the `gguf` package's reader.

    python benchmarks/gguf_header.py [--tokens 150000] [--repeat 9]

Best of `--repeat` for ours, one run for theirs, which takes seconds. Both read the same files, just written and
so in the page cache. It measures reading only: neither looks at the weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf as gguf_package

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import RawTensor, gguf_bytes, write_llama  # noqa: E402

from router.formats import gguf  # noqa: E402


def write_bpe(path: Path, tokens: int) -> Path:
    """As most models of today: as many merges as tokens, and a few hundred tensors."""
    metadata = [
        ("general.architecture", "str", "qwen3"),
        ("tokenizer.ggml.tokens", "[str]", [f"word{number:06d}" for number in range(tokens)]),
        ("tokenizer.ggml.token_type", "[i32]", [1] * tokens),
        ("tokenizer.ggml.merges", "[str]", [f"wo rd{number:06d}" for number in range(tokens)]),
    ]
    tensors = [RawTensor(f"blk.{number}.ffn_up.weight", (256, 4), 12, 4 * 144) for number in range(400)]
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


def best_ms(read: Callable[[Path], object], path: Path, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        read(path)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{'header':<44}{'router.formats.gguf':>14}{'gguf package':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for title, path in (
            ("tiny model", write_llama(Path(folder, "tiny.gguf"))),
            (
                f"{arguments.tokens:,} tokens",
                write_llama(Path(folder, "spm.gguf"), n_vocab=arguments.tokens, n_embd=4, n_layer=1),
            ),
            (
                f"{arguments.tokens:,} tokens and merges",
                write_bpe(Path(folder, "bpe.gguf"), arguments.tokens),
            ),
        ):
            ours_ms = best_ms(gguf.read, path, arguments.repeat)
            theirs_ms = best_ms(gguf_package.GGUFReader, path, 1)
            print(f"{title:<44}{ours_ms:>11.1f} ms{theirs_ms:>11.1f} ms{theirs_ms / ours_ms:>7.0f}x")


if __name__ == "__main__":
    main()
