"""How commands end when they are used wrongly, or the bus is not there: one sentence, a stable code, no secret."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from adapter.cli import COMMANDS
from adapter.cli.bus import connected_bus
from adapter.cli.embedded import EmbeddedNats
from adapter.cli.exits import UNREACHABLE, Failed
from adapter.contract.messages import MESSAGES
from adapter.settings import Settings
from tests.cli.conftest import Command
from tests.cli.process import started

ASKING = (
    ("bindings",),
    ("send", "s1", "hi"),
    ("dead", "ls"),
    ("doctor",),
)


def sentence(text: str) -> str:
    """The one line on standard error."""
    (line,) = text.splitlines()
    assert line.startswith("wechat-nats: ")
    return line


async def test_help_names_every_command_and_exit_code(cli: Command) -> None:
    result = await cli("--help")
    assert result.code == 0
    assert all(f"\n│ {name} " in result.out for name in COMMANDS)
    assert all(f"\n • {code} " in result.out for code in (0, 1, 2, 3, 4, 130))
    assert max(map(len, result.out.splitlines())) <= 80
    assert (await cli()).out == (await cli("-h")).out == result.out


INNER = {"queue": ["drop"], "dead": ["ls", "show"], "media": ["get", "put"]}


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"simulator"}))  # it has a parser of its own
async def test_the_help_of_a_command_names_what_each_option_takes(cli: Command, command: str) -> None:
    for inner in INNER.get(command, [None]):
        shown = (await cli(command, *filter(None, [inner]), "--help")).out
        assert f"Usage: wechat-nats {command}" in shown
        assert not re.search(r" --\S+ ((STR|FLOAT|INT|PATH)\b|CHOICE\|)", shown)
        assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("send", "s1"),
        ("send", "s1", "hi", "--nonsense"),
        ("send", "S1", "hi"),
        ("send", "s1", "hi", "--timeout", "0"),
        ("send", "s1", "hi", "--id", 129 * "x"),
        ("send", "s1", "hi", "--format", "html"),
        ("bind", "s1"),
        ("dead", "show"),
        ("schema", "nonsense"),
    ],
    ids=" ".join,
)
async def test_wrong_usage_is_2(cli: Command, arguments: tuple[str, ...]) -> None:
    result = await cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    sentence(result.err)


async def test_a_wrong_setting_is_2_and_named(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WECHAT_NATS_SEND_GAP_MS", "fast")
    result = await cli("bindings")
    assert result.code == 2
    assert "WECHAT_NATS_SEND_GAP_MS" in sentence(result.err)


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
async def test_without_a_bus_it_is_3(
    cli: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        monkeypatch.setenv("NATS_URL", f"nats://me:hunter2@127.0.0.1:{unused.getsockname()[1]}")
    result = await cli(*arguments)
    assert result.code == UNREACHABLE
    assert "NATS is not reachable at 127.0.0.1:" in result.out + result.err
    assert "hunter2" not in result.out + result.err


async def test_something_else_on_the_port_is_3(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        monkeypatch.setenv("NATS_URL", f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        result = await cli("bindings")
    assert result.code == UNREACHABLE
    sentence(result.err)


class GuardedNats(EmbeddedNats):
    """A server that wants a password."""

    def _write_config(self) -> Path:
        config = super()._write_config()
        config.write_text(config.read_text() + 'authorization { user: "me", password: "right" }\n')
        return config


async def test_a_wrong_password_is_3_at_once_and_not_shown(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    async with GuardedNats() as server:
        monkeypatch.setenv("NATS_URL", server.url)
        monkeypatch.setenv("NATS_USER", "me")
        monkeypatch.setenv("NATS_PASSWORD", "hunter2")
        result = await cli("bindings")
        assert result.code == UNREACHABLE
        assert "NATS_PASSWORD" in sentence(result.err)
        assert "hunter2" not in result.err
        with pytest.raises(Failed, match="refused the credentials"):
            async with connected_bus(Settings(nats_url=(server.url,)), lasting=True):
                pass


async def test_the_second_server_is_tried(
    cli: Command, server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", f"nats://127.0.0.1:9,{server.url}")
    assert "No adapter runs on this bus" in sentence((await cli("bindings")).err)


async def test_the_simulators_own_parser_answers_for_it(cli: Command) -> None:
    assert (await cli("simulator", "--help")).code == 0
    assert (await cli("simulator", "--nonsense")).code == 2


async def test_schema_prints_one_document(cli: Command) -> None:
    result = await cli("schema", next(iter(MESSAGES)))
    assert result.code == 0
    assert result.out.startswith("{\n")


@pytest.mark.parametrize("arguments", [("--help",), ("schema", "inbound")], ids=" ".join)
async def test_a_reader_who_has_read_enough_is_no_failure(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        async with started(*arguments, stdout=writer) as process:
            _, err = await process.communicate()
    finally:
        os.close(writer)
    assert (process.returncode, err) == (0, b"")


async def test_input_that_is_not_utf_8_is_reported_in_a_line() -> None:
    async with started("send", "s1", "-", stdin=asyncio.subprocess.PIPE) as process:
        _, err = await process.communicate(b"caf\xe9")
    async with started("send", "s1", os.fsdecode(b"caf\xe9")) as other:
        _, said = await other.communicate()
    assert (process.returncode, other.returncode) == (2, 2)
    assert err == said == b"wechat-nats: What it was given is not UTF-8.\n"


IMPATIENT = """
import sys
from adapter.__main__ import main

class Impatient:
    def find_spec(self, name, path=None, target=None):
        if name == "adapter.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Impatient())
main()
"""
"""Ctrl-C while the command is imported."""


async def test_a_ctrl_c_at_once_is_130_too() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", IMPATIENT, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")


BUG = """
import gc, sys, threading
import adapter.cli
from adapter.__main__ import main

def fail() -> int:
    try:
        raise ValueError("in an inner one: " + sys.argv[1])
    except ValueError as exc:
        raise ExceptionGroup("a bug", [RuntimeError("in a group: " + sys.argv[1])]) from exc

class Finalized:
    def __del__(self) -> None:
        fail()

def fail_everywhere() -> int:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Finalized()
    gc.collect()
    return fail()

adapter.cli.main = fail_everywhere
main()
"""


async def test_the_message_of_an_uncaught_bug_has_no_secret() -> None:
    """Of the main thread, of another one, and of what Python only mentions."""
    secret = "b0f5860fdecb@im.bot:06canary06canary"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", BUG, secret, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 1
    assert out == b""
    assert err.count(b"in a group: b0f5860fdecb@im.bot:***") == 3
    assert err.count(b"in an inner one: b0f5860fdecb@im.bot:***") == 3
    assert b"canary" not in err
