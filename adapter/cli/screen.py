"""How `demo` prints a conversation: a label and a text per entry, with a prompt on a terminal."""

from __future__ import annotations

import shutil
from typing import TextIO

from rich.cells import cell_len

from adapter.cli.output import can_colour, can_style, pad, printable
from adapter.cli.stdin import LineEditor

WIDTH, LABEL = 80, 18
"""Columns of a line, and of its label."""
COLOURS = {"you": "36", "wechat.out.demo": "35", "receipt": "32", "phone": "1;36", "problem": "1;31"}
OTHER = "2"


class Screen:
    """Writes lines of at most WIDTH columns. On a terminal it has colours and keeps a prompt below."""

    def __init__(self, out: TextIO, *, prompting: bool, editor: LineEditor | None = None) -> None:
        """`editor`: what shows the prompt, and reads behind it."""
        self._out = out
        self._editor = editor
        self._colours = can_colour(out)
        self._may_prompt = prompting and can_style(out)
        self._width = min(WIDTH, shutil.get_terminal_size().columns) if out.isatty() else WIDTH
        self._prompted = False

    @property
    def is_prompting(self) -> bool:
        """Whether the terminal itself shows what is typed, after the prompt."""
        return self._may_prompt

    def prompt(self) -> None:
        """Says that it is the user's turn, where somebody types."""
        if self._may_prompt and not self._prompted:
            label = self._label("you")
            self._write(label if self._editor is None else self._editor.prompt(label))
            self._prompted = True

    def on_line_typed(self) -> None:
        """The user has ended the line with the prompt."""
        self._prompted = False

    def show(self, label: str, text: str) -> None:
        """One entry, over several lines if it is long."""
        self._clear_prompt()
        first, *more = _wrap(printable(text), max(self._width - LABEL, LABEL)) or [""]
        self._write(f"{self._label(label)}{first}\n" + "".join(f"{' ' * LABEL}{line}\n" for line in more))

    def note(self, text: str) -> None:
        """A line without a label, as it is."""
        self._clear_prompt()
        self._write(text + "\n")

    def _label(self, label: str) -> str:
        padded = pad(label, LABEL)
        return f"\x1b[{COLOURS.get(label, OTHER)}m{padded}\x1b[0m" if self._colours else padded

    def _clear_prompt(self) -> None:
        if self._prompted:
            self._write("\r\x1b[K")
            self._prompted = False

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _wrap(text: str, room: int) -> list[str]:
    """`text` in pieces of at most `room` columns, broken at a space where there is one near the end."""
    pieces = []
    while cell_len(text) > room:
        cut = len(text)
        width = 0
        for i, char in enumerate(text):
            width += cell_len(char)
            if width > room:
                cut = i
                break
        space = text.rfind(" ", cut // 2, cut + 1)
        cut = space if space > 0 else cut
        pieces.append(text[:cut])
        text = text[cut:].lstrip(" ")
    return [*pieces, text] if text else pieces
