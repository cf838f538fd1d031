"""How `demo` prints a conversation: a label and a text per entry, with a prompt on a terminal."""

from __future__ import annotations

import shutil
from typing import TextIO

from rich.console import Console
from rich.text import Text

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
        wrapped = Text(printable(text)).wrap(Console(), max(self._width - LABEL, LABEL))
        self._write(self._label(label) + f"\n{' ' * LABEL}".join(line.plain.rstrip() for line in wrapped) + "\n")

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
