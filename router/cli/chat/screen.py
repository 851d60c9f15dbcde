"""Prints answers: safely on a terminal, where thoughts of the model are dim; elsewhere only the text, as it is."""

from __future__ import annotations

import os
import sys

from router.cli.chat.reply import Figures, Piece
from router.cli.columns import duration
from router.system.printable import printable

_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"


class Answer:
    """An answer that is being printed. Whatever happens meanwhile, it ends with a line break, in normal type."""

    def __init__(self) -> None:
        self.text = ""
        """Without what the model has thought."""
        self._is_terminal = sys.stdout.isatty()
        self._has_styles = self._is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._thinks = False
        self._last = ""

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thinks and self._has_styles:
            self._write(_NORMAL)
        if self._last and self._last != "\n":
            self._write("\n")

    def show(self, piece: Piece) -> None:
        """Print a piece at once."""
        if not piece.is_thought:
            self.text += piece.text
        elif not self._is_terminal:
            return
        if piece.is_thought != self._thinks:
            self._turn(piece.is_thought)
        self._write(printable(piece.text) if self._is_terminal else piece.text)

    def _turn(self, thinks: bool) -> None:
        """Begin or end thoughts."""
        self._thinks = thinks
        if self._has_styles:
            self._write(_DIM if thinks else f"{_NORMAL}\n\n")
        else:
            self._write("Thinking …\n" if thinks else "\n… thought.\n\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1:] if text not in (_DIM, _NORMAL) else self._last


def summary(figures: Figures) -> str:
    """Return the figures of an answer in a line."""
    parts = []
    if figures.first_sec is not None:
        waits = {"waited": figures.waited_sec or 0.0, "loading": figures.load_sec or 0.0}
        told = [f"{what} {duration(sec)}" for what, sec in waits.items() if sec >= 0.05]
        of_it = f" ({', '.join(told)})" if told else ""
        parts.append(f"first token after {duration(figures.first_sec)}{of_it}")
    if figures.decode_per_sec is not None:
        parts.append(f"{figures.decode_per_sec:.1f} tokens/s")
    if figures.output_tokens is not None:
        parts.append(f"{figures.output_tokens} tokens in {duration(figures.total_sec)}")
    if figures.prompt_tokens is not None:
        cached = "" if figures.cached_tokens is None else f", {figures.cached_tokens} of them cached"
        parts.append(f"prompt {figures.prompt_tokens} tokens{cached}")
    return "; ".join(parts)
