"""Clients in environments of their own: programs that take a line, `CLIENT CELL`, and answer with one of JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

Apart = Callable[[str, str], Any]
UNREACHABLE = "dns error|tcp connect error|operation timed out|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT"
"""How uv and npm say that no index is within reach."""


@contextmanager
def asking(command: list[str], environ: Mapping[str, str]) -> Iterator[Apart]:
    """What a client makes of a cell; what it has thrown fails the test."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def ask(client: str, cell: str) -> Any:
            print(client, cell, file=program.stdin, flush=True)
            answer = json.loads(program.stdout.readline())
            if "raised" in answer:
                pytest.fail(answer["raised"], pytrace=False)
            return answer["is"]

        yield ask
        program.stdin.close()
