"""`demo` and `run` with the real adapter: as somebody starts them, and as they end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import termios
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from adapter.cli.demo import LABEL
from tests.cli.process import alive, children, on_terminal, printed, seen, started

STARTED = b"You are a WeChat user"
HELLO = b"hello\n"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs of a test put what is temporary."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def entries(out: bytes) -> list[tuple[str, str]]:
    """The conversation: label and text; the text before it is left out."""
    conversation = out.decode().partition("\n\n")[2]
    return [(line[:LABEL].strip(), line[LABEL:]) for line in conversation.splitlines() if line[:LABEL].strip()]


def said(out: bytes, label: str) -> list[str]:
    return [text for who, text in entries(out) if who == label]


async def test_a_line_in_a_pipe_comes_back_to_the_phone(temporary: Path) -> None:
    """Also on a machine with a proxy, which knows nothing of what is here."""
    async with started("demo", env={"http_proxy": "http://127.0.0.1:9"}) as process:
        out, err = await process.communicate(HELLO)
        assert (process.returncode, err) == (0, b"")
    assert [label for label, _ in entries(out)] == [
        "you",
        "wechat.in.demo",
        "wechat.out.demo",
        "receipt",
        "phone",
    ]
    assert said(out, "you") == ["hello"]
    assert re.fullmatch(r'"hello"  \(id \S+, 10 sends left\)', said(out, "wechat.in.demo")[0])
    assert said(out, "wechat.out.demo") == ['"You said: hello"']
    assert re.fullmatch(r"accepted  \(message id \d+\)", said(out, "receipt")[0])
    assert said(out, "phone") == ["You said: hello"]
    assert b"\x1b" not in out
    assert os.listdir(temporary) == []


async def test_a_bus_that_stands_still_is_said(temporary: Path) -> None:
    """And the answer comes once it goes on."""
    async with started("demo") as process:
        await printed(process, STARTED)
        (server,) = children(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"first\n")
        await printed(process, b"phone             You said: first\n")
        os.kill(server, signal.SIGSTOP)
        process.stdin.write(HELLO)
        out = await printed(process, b"Nothing has happened for 10 s. The last warning:")
        os.kill(server, signal.SIGCONT)
        process.stdin.close()
        out += await printed(process, b"phone             You said: hello")
        assert await process.wait() == 0
    assert b"\nproblem " in out


async def test_more_lines_at_once_than_a_window_has_sends(temporary: Path) -> None:
    sentences = [f"line {n}" for n in range(45)]
    async with started("demo") as process:
        out, err = await process.communicate("\n".join(sentences).encode())
        assert (process.returncode, err) == (0, b"")
    assert said(out, "you") == sentences
    assert said(out, "phone") == [f"You said: {text}" for text in sentences]


@pytest.mark.parametrize(
    ("environ", "answer"),
    [({"LC_ALL": "C.UTF-8"}, "A new conversation begins."), ({"LC_ALL": "zh_CN.UTF-8"}, "已开始新对话。")],
    ids=["en", "zh"],
)
async def test_a_program_answers_instead(temporary: Path, environ: dict[str, str], answer: str) -> None:
    """Also where it has nothing to say, and where what it was given is one of the words that steer it."""
    program = "sed -e /quiet/d -e s/hello/bye/"
    async with started("demo", "--exec", program, env=environ) as process:
        out, err = await process.communicate(b"hello\nquiet\n/new\n")
        assert (process.returncode, err) == (0, b"")
    assert said(out, "phone") == ["bye", answer]
    assert os.listdir(temporary) == []


async def test_a_welcome_is_not_the_answer(temporary: Path) -> None:
    """The end of the input waits for the answer behind it."""
    async with started("start", "--simulated", "--welcome", "Welcome.", "--exec", "sed s/hello/bye/") as process:
        out, err = await process.communicate(HELLO)
        assert (process.returncode, err) == (0, b"")
    assert said(out, "phone") == ["Welcome.", "bye"]


async def test_files_of_a_program_are_shown(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "answer.sh").write_text('cat >"$WECHAT_OUT/said.txt"')
    async with started("demo", "--exec", f"sh {tmp_path / 'answer.sh'}") as process:
        out, err = await process.communicate(b"hello\n")
        assert (process.returncode, err) == (0, b"")
    assert said(out, "phone") == ["[file: said.txt]"]
    assert os.listdir(temporary) == []


async def test_an_agent_of_ones_own_is_attached_by_the_line_that_is_printed(temporary: Path, tmp_path: Path) -> None:
    async with started("start", "--simulated") as process:
        out = await printed(process, b"PROGRAM'\n\n")
        (line,) = [line for line in out.decode().splitlines() if line.startswith("NATS_URL=")]
        variable, command, *arguments = line.replace("PROGRAM", "cat").split(" ")
        assert command == "wechat-nats"
        name, _, url = variable.partition("=")
        environ = {name: url, "WECHAT_NATS_DATA_DIR": str(tmp_path)}
        async with started(*(argument.strip("'") for argument in arguments), env=environ) as agent:
            assert process.stdin is not None
            process.stdin.write(HELLO)
            await printed(process, b"phone             hello")
            agent.send_signal(15)
            assert await agent.wait() == 0
        process.stdin.close()
        assert await process.wait() == 0


async def test_a_file_will_do_as_input_and_verbose_puts_the_log_on_standard_error(
    temporary: Path, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_text("你好，" + "长" * 100 + "\n")
    with (tmp_path / "lines").open() as file:
        async with started("demo", "--verbose", stdin=file) as process:
            out, err = await process.communicate()
            assert process.returncode == 0
    assert b'"body"' in err
    assert b"Log: " not in out
    assert said(out, "phone")[0].startswith("You said:")
    assert "".join(out.decode().partition("phone ")[2].split()).endswith(
        "You said: 你好，".replace(" ", "") + "长" * 100
    )


@pytest.mark.parametrize("number", [2, 15, 1], ids=["ctrl-C", "SIGTERM", "closed terminal"])
async def test_a_signal_ends_it_cleanly(temporary: Path, number: int) -> None:
    async with started("demo") as process:
        await printed(process, STARTED)
        (server,) = children(process.pid)
        assert process.stdin is not None
        process.stdin.write(HELLO)
        await printed(process, b"\nphone")
        process.send_signal(number)
        assert await process.wait() == 0
        assert process.stderr is not None
        assert await process.stderr.read() == b""
    assert not alive(server)
    assert os.listdir(temporary) == []


async def test_ctrl_c_while_it_starts_is_clean_too(temporary: Path) -> None:
    async with started("demo") as process:
        await printed(process, b"Log: ")
        process.send_signal(2)
        assert await process.wait() == 0
    assert os.listdir(temporary) == []


async def test_a_bus_that_dies_is_a_failure_that_keeps_the_log(temporary: Path) -> None:
    async with started("demo") as process:
        out = await printed(process, STARTED)
        (server,) = children(process.pid)
        os.kill(server, 9)
        assert await process.wait() == 3  # not `communicate`, which ends its input: that ends it, too, and well
        _, err = await process.communicate()
        assert err == b"wechat-nats: The embedded NATS server ended by itself.\n"
    (log,) = os.listdir(temporary)
    assert log.encode() in out


async def test_at_a_terminal_one_is_prompted_and_leaves_by_ctrl_c(temporary: Path) -> None:
    async with on_terminal("demo") as (process, main):
        plain = termios.tcgetattr(main)
        await seen(main, b"You are a WeChat user", b"you")
        os.write(main, HELLO)
        echoed = await seen(main, b"phone", b"You said: hello", b"you")
        assert echoed.count(b"hello") == 4  # typed once, and shown by the bus, the agent and the phone
        os.write(main, b"edted\x1b[D\x1b[D\x1b[Di\n")  # the left arrow
        await seen(main, b"phone", b"You said: edited", b"you")
        os.write(main, b"\x1b[A\x1b[A\n")  # the upper one
        await seen(main, b"phone", b"You said: hello", b"you")
        os.write(main, b"\x03")
        assert await process.wait() == 0
        assert termios.tcgetattr(main) == plain
    assert os.listdir(temporary) == []


async def test_what_is_typed_stays_while_an_answer_comes_that_is_whole_on_the_phone(
    temporary: Path, tmp_path: Path
) -> None:
    (tmp_path / "answer.sh").write_text(
        f"cat; echo {300 * 'x'}; while ! test -e {tmp_path}/typed; do sleep 0.1; done"
    )
    async with on_terminal("demo", "--exec", f"sh {tmp_path / 'answer.sh'}", "--welcome", "") as (_, main):
        await seen(main, b"you")
        os.write(main, HELLO)
        await seen(main, b"wechat.in.demo", b"you")
        os.write(main, b"half a li")
        await seen(main, b"half a li")
        (tmp_path / "typed").touch()
        shown = await seen(main, b"wechat.out.demo", b"you", b"phone", b"hello" + 10 * b"x", b"you", b"half a li")
        assert b"half a li\x1b[35m" not in shown  # each entry wipes the line, and shows it again below
        on_the_bus, _, on_the_phone = shown.partition(b"receipt")
        assert '…"  (305 characters)'.encode() in on_the_bus
        assert on_the_bus.count(b"x") < 100
        assert on_the_phone.count(b"x") >= 300
        os.write(main, b"ne\n")
        await seen(main, b"wechat.in.demo", b'"half a line"')


async def test_a_picture_is_sent_as_the_person_and_comes_back(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(PICTURE)
    program = tmp_path / "answer.sh"
    program.write_text('cp "$WECHAT_FILES"/* "$WECHAT_OUT"')
    async with started("demo", "--exec", f"sh {program}") as process:
        out, _ = await process.communicate(f"/image {tmp_path / 'p.png'}\n/image {program}\n".encode())
    assert said(out, "wechat.in.demo")[0].startswith("[image]  (id ")
    assert said(out, "phone") == [f"[image: {len(PICTURE)} bytes]"]
    assert "no picture." in out.decode()


async def test_run_embedded_keeps_its_data_and_drains(tmp_path: Path) -> None:
    environment = {"WECHAT_NATS_DATA_DIR": str(tmp_path / "data"), "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0"}
    for turn in range(2):
        async with started("run", "--embedded", "--port", "0", env=environment) as process:
            await printed(process, b"adapter.started")
            kept = tmp_path / "data" / "nats.url"
            url = kept.read_text().strip()
            assert kept.stat().st_mode & 0o777 == 0o600
            (server,) = children(process.pid)
            async with await nats.connect(url) as nc:
                await stream_exists(nc, "WECHAT_EVENT")
                await nc.jetstream().publish("wechat.event.s1.test", b"x")
                assert (await nc.jetstream().stream_info("WECHAT_EVENT")).state.messages == turn + 1
            await refused_without_its_token(url)
            async with started("bindings", env=environment) as command:
                _, err = await command.communicate()
                assert command.returncode == 0, err
            process.send_signal(15)
            assert await process.wait() == 0
        assert not alive(server)


async def refused_without_its_token(url: str) -> None:
    bare = f"nats://{url.rpartition('@')[2]}"
    with pytest.raises(NatsError, match="Authorization"):
        await nats.connect(bare, allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0.01)


async def stream_exists(nc: Client, name: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await nc.jetstream().stream_info(name)
            except NotFoundError:
                await asyncio.sleep(0.02)
            else:
                return
