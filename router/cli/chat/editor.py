"""Reads what is typed at the prompt: with line editing, completion, a history, and pasted lines kept together.

Based on Python's `readline`, which is GNU's library or, in Python for macOS and in builds that are distributed on
their own, libedit. Only GNU's knows bracketed paste: it keeps pasted lines in one line of input until Enter is
pressed. With libedit, lines that have arrived together are taken together.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

try:
    import readline
except ImportError:  # Python may be built without it
    readline = None  # type: ignore[assignment]

_QUOTES = '"""'
_BLOCK = re.compile(r'(\s*(?:/\w+\s+(?:\w+\s+)?)?)"""(.*)')
"""The first line of a block, perhaps after a command such as `/system`."""
_MOST_KEPT = 1000
_TOGETHER_SEC = 0.02
"""Time within which the lines of a paste follow one another."""

Completions = Callable[[str, str], Iterable[str]]
"""Returns the candidates for the word that is being typed after a command."""


class Editor:
    """Reads lines and blocks of lines from the terminal."""

    def __init__(self, history: Path | None, completions: Mapping[str, Completions]) -> None:
        """Keep what is typed in the file `history`, if there is one. `completions` are by command, as `/load`."""
        self._history = history
        self._completions = completions
        self._candidates: list[str] = []
        self._reads_lines_together = readline is not None and "libedit" in (readline.__doc__ or "")
        if readline is None:
            return
        readline.set_auto_history(False)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        if self._reads_lines_together:
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")
        for entry in self._read_history():
            readline.add_history(entry)

    def read(self, prompt: str) -> str:
        """Return a line, or a block between triple quotes. Raises EOFError, KeyboardInterrupt."""
        text = self._line(prompt)
        if (block := _BLOCK.fullmatch(text)) is not None:  # never what was pasted, which has several lines
            lines = [block[2]]
            while _QUOTES not in lines[-1]:
                lines.append(self._line("... "))
            inside, _, rest = "\n".join(lines).partition(_QUOTES)
            text = block[1] + inside.strip("\n") + rest
        self._remember(text)
        return text

    def _line(self, prompt: str) -> str:
        line = input(prompt)
        while self._reads_lines_together and select.select([sys.stdin], [], [], _TOGETHER_SEC)[0]:
            try:
                line = f"{line}\n{input()}"
            except EOFError:
                break
        # What is not UTF-8 was kept as surrogates, which no JSON may have.
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    # --- history ----------------------------------------------------------------------------------------

    def _remember(self, text: str) -> None:
        if readline is None or not text.strip():
            return
        last = readline.get_history_item(readline.get_current_history_length())
        if text == last:
            return
        readline.add_history(text)
        if self._history is not None:
            with contextlib.suppress(OSError), open(self._history, "a", encoding="utf-8", opener=_private) as file:
                file.write(json.dumps(text) + "\n")

    def _read_history(self) -> list[str]:
        """Return what was typed earlier, the oldest first; a file that has become long is cut."""
        if self._history is None:
            return []
        entries = []
        with contextlib.suppress(OSError, ValueError):
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lines = self._history.read_text("utf-8").splitlines()
            for line in lines[-_MOST_KEPT:]:
                with contextlib.suppress(ValueError):
                    entries.append(str(json.loads(line)))
            if len(lines) > 2 * _MOST_KEPT:
                self._history.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
        return entries

    # --- completion -------------------------------------------------------------------------------------

    def _complete(self, word: str, number: int) -> str | None:
        if number == 0:
            assert readline is not None
            line = readline.get_line_buffer()[: readline.get_begidx()]
            self._candidates = list(self._candidates_for(line, word))
        return self._candidates[number] if number < len(self._candidates) else None

    def _candidates_for(self, line: str, word: str) -> Iterable[str]:
        if not line.strip():
            return [f"{name} " for name in sorted(self._completions) if word and name.startswith(word)]
        completions = self._completions.get(line.split()[0])
        if completions is None:
            return []
        with contextlib.suppress(Exception):  # a line that is being edited has no place for errors
            return sorted(each for each in completions(line, word) if each.startswith(word))
        return []


def paths(_: str, word: str) -> Iterable[str]:
    """Return the paths that begin with a word; folders end with a slash."""
    folder, _, begin = word.rpartition("/")
    where = Path(f"{folder}/" if folder or word.startswith("/") else ".").expanduser()
    prefix = word[: len(word) - len(begin)]
    for entry in os.scandir(where):
        if entry.name.startswith(begin) and (begin or not entry.name.startswith(".")):
            yield f"{prefix}{entry.name}{'/' if entry.is_dir() else ' '}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
