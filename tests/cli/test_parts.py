"""The small parts under the commands: input that never blocks, and output that nobody else controls."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from adapter.cli import demo
from adapter.cli.bus import BusConnection
from adapter.cli.demo import LABEL, LogEnd, Screen
from adapter.cli.output import (
    can_colour,
    can_style,
    complain,
    json_line,
    printable,
    table,
    wrapped,
    write_private,
)
from adapter.cli.stdin import LineEditor, lines
from adapter.contract.messages import LoginQuery
from adapter.jetstream.client import BusClient
from adapter.settings import Settings
from tests.hostile import UNSEEN_CHARS


def write(fd: int, given: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(given)


async def read(fd: int) -> list[str]:
    return [line async for line in lines(fd)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\n\nlast", ["one", "", "last"]),
        ("你好\n".encode(), ["你好"]),
        (b"\xff\n", ["�"]),
        (b"x" * 200_000 + b"\ny", ["x" * 200_000, "y"]),
        (b"n\n" * 5000, ["n"] * 5000),
    ],
    ids=["empty", "lines", "ends", "chinese", "no utf-8", "long", "many"],
)
async def test_lines_of_a_file_and_of_a_pipe(tmp_path: Path, given: bytes, expected: list[str]) -> None:
    path = tmp_path / "input"
    path.write_bytes(given)
    with path.open("rb") as file:
        assert await read(file.fileno()) == expected
    reading, writing = os.pipe()
    found, _ = await asyncio.gather(read(reading), asyncio.to_thread(write, writing, given))
    os.close(reading)
    assert found == expected


def test_nothing_of_others_moves_the_cursor() -> None:
    assert printable("a\x1b[2J\nb\tc\x9b\u202e\u061c") == "a\\x1b[2J⏎b c\\x9b\\x202e\\x61c"


@pytest.mark.parametrize("unseen", UNSEEN_CHARS)
def test_what_nobody_sees_is_shown(unseen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(f"a{unseen}b") == f"a\\x{ord(unseen):02x}b"
    json_line({"text": unseen})
    shown = capsys.readouterr().out
    assert unseen not in shown
    assert json.loads(shown) == {"text": unseen}
    complain(f"no option a{unseen}b\nnext line")
    assert capsys.readouterr().err == f"wechat-nats: no option a\\x{ord(unseen):02x}b\nnext line\n"


def test_every_control_format_and_line_end_of_unicode_is_shown() -> None:
    unseen = ("Cc", "Cf", "Cs", "Zl", "Zp")
    left = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char) in unseen]
    assert [hex(ord(char)) for char in left if char in printable(char) and char not in "\n\t\r"] == []


def test_faces_and_flags_are_shown_as_they_are() -> None:
    assert printable("❤️ 🇨🇭 你好") == "❤️ 🇨🇭 你好"


class Editor(LineEditor):
    """Shows the prompt as it is."""

    def prompt(self, label: str) -> str:
        return label

    def clear(self, columns: int, width: int) -> str:
        assert (columns, width) == (LABEL, 80)
        return "\x1b[J"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("text", ["word " * 60, "长" * 200, "x" * 300, "https://" + "y" * 90 + " end"])
def test_entries_stay_within_80_columns(text: str) -> None:
    out = io.StringIO()
    Screen(out).show("phone", text)
    written = out.getvalue().splitlines()
    assert all(cell_len(line) <= 80 for line in written)
    assert written[0].startswith("phone".ljust(LABEL))
    assert "".join("".join(line[LABEL:] for line in written).split()) == "".join(text.split())


async def test_a_silence_is_explained_by_the_last_warning_since_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SILENT_S", 0.0)
    line = '{{"severity_text":"{}","body":"{}","reason":"{}","detail":"{}"}}\n'
    (tmp_path / "log").write_text(line.format("WARNING", "poll.failed", "network", "Of yesterday."))
    log, said = LogEnd(tmp_path / "log"), list[str]()
    with log.opened() as file:
        for _ in range(2):
            log.tell_later(said.append, "The agent is slow.")
            await asyncio.sleep(0.01)
            for level, event in (("ERROR", "bus.unreachable"), ("INFO", "adapter.started")):
                file.write(line.format(level, event, "away", "It is gone.").encode())
    begin = "Nothing has happened for 0 s."
    assert said == [f"{begin} The agent is slow.", f"{begin} The last warning: bus.unreachable (away). It is gone."]


class Forgetful(BusClient):
    """Answers when it is cancelled, and forgets that it was: as Python 3.11's wait_for does in the wrong moment."""

    async def request(self, *_: Any, **__: Any) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise TimeoutError


@pytest.mark.parametrize(
    "ask",
    [
        lambda bus: bus.request_service("login.status", LoginQuery(login="l"), LoginQuery),
        lambda bus: bus.store("x", b"", {}),
    ],
    ids=["an adapter", "a stream"],
)
async def test_ctrl_c_is_not_forgotten_while_an_answer_comes(ask: Callable[[BusConnection], Awaitable[Any]]) -> None:
    asking = asyncio.ensure_future(ask(BusConnection(Forgetful(), Settings())))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.parametrize(
    ("environ", "styles", "colours"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_a_terminal_gets_what_it_can_show_and_no_colours_where_nobody_wants_them(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], styles: bool, colours: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert (can_style(Terminal()), can_colour(Terminal())) == (styles, colours)
    assert not can_style(io.StringIO())
    out = Terminal()
    screen = Screen(out, Editor() if styles else None)
    screen.prompt()
    screen.show("you", "hello")
    assert ("\x1b[36m" in out.getvalue(), "\x1b[J" in out.getvalue()) == (colours, styles)
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    table(("a", "b"), [("x", "bad")], styles={"bad": "red"})
    assert ("\x1b[31m" in shown.getvalue()) is colours
    assert styles or "\x1b" not in shown.getvalue()


BOT, USER = "b0f5860fdecb@im.bot", "o9cq80SVqvWcKnj5ZTDpZSu3_6_U@im.wechat"


@pytest.mark.parametrize(
    "row", [("s1", BOT, "a reason of several words, " * 4), ("s1", BOT, USER, "x y " * 9, 64 * "x")]
)
def test_no_id_is_broken_at_a_terminal_of_80_columns(row: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a table, whose sentences wrap, nor where the ids do not fit beside each other."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    table([f"column{number}" for number in range(len(row))], [row], styles={"s1": "red"})
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(cell in line for line in lines) for cell in row if " " not in cell)
    assert (lines[0].split() == ["column0", "column1", "column2"]) is (len(row) == 3)


def test_a_word_that_is_longer_than_a_line_is_not_broken() -> None:
    assert wrapped(["2026 s1 ", "x" * 100, "y z"], 20) == ["2026 s1   " + "x" * 100, "    y z"]


def test_a_file_becomes_private_and_a_pipe_stays_as_it_is(tmp_path: Path) -> None:
    """The latter may be /dev/null, which is everybody's."""
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.touch(0o644)
    os.mkfifo(pipe, 0o644)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (file, pipe):
        write_private(path, "x")
    os.close(reader)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, pipe)] == [0o600, 0o644]
