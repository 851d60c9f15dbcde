"""A terminal in which a command runs, read back by a terminal emulator; commands that run until stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pyte
from conftest import ROOT, eventually


class Terminal:
    """A terminal in which a command runs."""

    def __init__(self, command: list[str], cwd: Path, columns: int = 80, lines: int = 24) -> None:
        self.raw = b""
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.ours, self._theirs = pty.openpty()
        self.resize(columns, lines)
        environ = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environ,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while chunk := os.read(self.ours, 65536):
                with self._lock:
                    self.raw += chunk
                    self._stream.feed(chunk)

    @property
    def lines(self) -> list[str]:
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    def until(self, *patterns: str, timeout_sec: float = 15) -> list[str]:
        """Wait until the screen shows lines like these, in this order; returns the lines."""
        wanted = re.compile(".*".join(patterns), re.DOTALL)
        seen: list[str] = []

        def shown() -> bool:
            seen[:] = self.lines
            return wanted.search("\n".join(seen)) is not None

        try:
            eventually(shown, timeout_sec)
        except AssertionError:
            raise AssertionError(f"{patterns} not on the screen:\n" + "\n".join(seen)) from None
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def resize(self, columns: int, lines: int) -> None:
        with self._lock:
            self._screen.resize(lines, columns)
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def modes(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._theirs)


@contextlib.contextmanager
def following(cwd: Path, *arguments: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a command that prints until it is stopped; gives the process, and the lines so far."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT), **environ}
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    process = subprocess.Popen(command, cwd=cwd, env=clean, stdout=-1, stderr=-1, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True).start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
