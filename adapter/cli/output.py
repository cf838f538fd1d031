"""What commands print and write: tables on a terminal, aligned text elsewhere, JSON lines on request, private files.

Texts and names come from other people: nothing of theirs may move the cursor, colour the screen or stay unseen.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapter.cli.exits import USAGE, Failed
from adapter.tools.logs import UNSEEN

_UNPRINTABLE = re.compile(f"[\x00-\x1f{UNSEEN}]")
_UNPRINTABLE_IN_JSON = re.compile(f"[{UNSEEN}]")
"""Characters that JSON may contain unescaped although they move the cursor or end a line."""
T = TypeVar("T")
INDENT = " " * 4
SHORT = 19
"""Columns of what is never broken in a table though it has spaces, such as a time."""
_NAMED = {"\n": "⏎", "\t": " ", "\r": ""}


def printable(text: object) -> str:
    """`text` on one line, with controls, direction marks and what has no width made visible."""
    return _UNPRINTABLE.sub(lambda m: _NAMED.get(m[0], f"\\x{ord(m[0]):02x}"), str(text))


def pad(text: str, width: int) -> str:
    return text + " " * max(0, width - cell_len(text))


def clock(ms: int) -> str:
    """Local date and time of Unix milliseconds; "-" for 0."""
    return datetime.fromtimestamp(ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if ms else "-"


def span(ms: float) -> str:
    """A duration in its largest unit: 40 s, 12 min, 21 h, 3 d."""
    seconds = int(abs(ms)) // 1000
    unit, length = next(((u, n) for u, n in (("d", 86400), ("h", 3600), ("min", 60)) if seconds >= n), ("s", 1))
    return f"{seconds // length} {unit}"


def ago(ms: int) -> str:
    """How long ago a time in Unix milliseconds was; "-" for 0."""
    return f"{span(time.time() * 1000 - ms)} ago" if ms else "-"


def some_of(names: Sequence[str], most: int = 4) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def can_style(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def can_colour(stream: TextIO) -> bool:
    """As `can_style`, and nobody has asked for no colours (https://no-color.org)."""
    return can_style(stream) and not os.environ.get("NO_COLOR")


def json_line(value: object) -> None:
    """One JSON object on a line of its own, at once; bytes are JSON already. Controls in its texts are escaped."""
    raw = value if isinstance(value, bytes) else msgspec.json.encode(with_defaults(value))
    text = raw.decode(errors="replace").replace("\n", " ")
    print(_UNPRINTABLE_IN_JSON.sub(lambda m: json.dumps(m[0])[1:-1], text), flush=True)


def tell(value: object, json: bool, text: str) -> None:
    """Prints one object: as a line of JSON, or as `text`, in which controls are escaped."""
    if json:
        json_line(value)
    else:
        say(printable(text))


def say(text: str = "") -> None:
    """A line for people."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Lines for people on standard error; they may repeat what was given, so controls in them are escaped."""
    lines = "\n".join(printable(line) for line in text.split("\n"))
    print(f"wechat-nats: {lines}", file=sys.stderr, flush=True)


def can_confirm() -> bool:
    """Whether a person at a terminal can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str) -> bool:
    """Asks the person at the terminal; False if there is none."""
    if not can_confirm():
        return False
    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, styles: dict[str, str] | None = None, empty: str = ""
) -> None:
    """Rows under `columns`; `styles` colours a cell by its text; `empty` is said where there are none."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        say(empty)
    elif can_style(sys.stdout):
        _rich(columns, cells, styles or {})
    else:
        _aligned(columns, cells)


def listing(
    found: Sequence[T],
    json: bool,
    columns: Sequence[str],
    row: Callable[[T], Sequence[object]],
    *,
    styles: dict[str, str] | None = None,
    empty: str = "",
) -> None:
    """What was found, each as a line of JSON, or as the `row` of a table."""
    if not json:
        table(columns, map(row, found), styles=styles, empty=empty)
    for one in found if json else ():
        json_line(one)


def _rich(columns: Sequence[str], cells: list[list[str]], styles: dict[str, str]) -> None:
    """A table whose sentences wrap; if its ids do not fit beside each other, a paragraph for each row."""
    console = Console(highlight=False)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    least = 0
    for column, values in zip(columns, zip(*cells, strict=True), strict=True):
        wraps = any(" " in value and cell_len(value) > SHORT for value in values)
        least += 2 + (SHORT if wraps else max(map(cell_len, (column, *values))))
        grid.add_column(column, no_wrap=not wraps, overflow="fold")
    if least - 2 <= console.width:
        for row in cells:
            grid.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
        console.print(grid)
        return
    for row in cells:
        told = [f"{column} {cell}" for column, cell in zip(columns, row, strict=True) if cell not in ("", "-")]
        shown = Text("\n".join(wrapped([row[0], *told[1:]], console.width)))
        for cell in styles.keys() & set(row):
            shown.highlight_words([cell], styles[cell])
        console.print(shown, soft_wrap=True)


def wrapped(pieces: Sequence[str], width: int) -> list[str]:
    """Pieces on as few lines as it takes, broken between pieces or words, indented from the second one on. A word
    that is longer than a line goes on at its end, so that it can be copied whole."""
    lines = [""]
    for piece in pieces:
        fits = cell_len(piece) <= width - len(INDENT)
        for number, word in enumerate([piece] if fits else piece.split(" ")):
            gap = " " if number else "  " * bool(lines[-1])
            if lines[-1] and cell_len(lines[-1] + gap + word) > width >= cell_len(INDENT + word):
                lines.append(INDENT + word)
            else:
                lines[-1] += gap + word
    return lines


def _aligned(columns: Sequence[str], cells: list[list[str]]) -> None:
    lines = [[column.upper() for column in columns], *cells]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        say("  ".join(pad(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip())


def with_defaults(value: Any) -> Any:
    """A struct with all fields: defaults are left out on the bus, but scripts ask for them."""
    match value:
        case msgspec.Struct():
            return {name: with_defaults(getattr(value, name)) for name in value.__struct_fields__}
        case list() | tuple():
            return [with_defaults(part) for part in value]
        case _:
            return value


def read_bytes(path: Path) -> bytes:
    """Raises Failed."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise Failed(USAGE, f"Cannot read {path}: {exc.strerror}.") from None


def read_text(path: Path) -> str:
    """Raises Failed."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Failed(USAGE, f"Cannot read {path}: it is not UTF-8.") from None


def write_private(path: str | Path, content: str | bytes, *, advice: str = "") -> None:
    """Writes a file, and the folder that it is in. A file that others may read becomes private; a device or a pipe
    stays as it is. `advice` is said where it cannot be written. Raises Failed."""
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fchmod(file.fileno(), 0o600)
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as exc:
        raise Failed(USAGE, f"Cannot write {path}: {exc.strerror}.{advice}") from None
