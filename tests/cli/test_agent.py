"""What `agent` refuses before it begins, how it signs, and what it leaves of a program. `tests/e2e/test_agent.py` has
it at work."""

from __future__ import annotations

import asyncio
import base64
import gzip
import sys
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from synadia_ai.agents import Attachment, ResponseChunk

from adapter.agent import Message, Sandbox
from adapter.agent.nats_agent import NatsAgent
from adapter.agent.program import Program
from adapter.agent.runner import Answer, Turn
from adapter.agent.webhook import Webhook, sign
from adapter.cli.agent import AgentChoice
from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats, adapter_running
from adapter.cli.exits import Failed
from adapter.contract.messages import Inbound, Media, OutItem, TextItem
from adapter.errors import Refused, Temporary
from adapter.settings import Settings
from adapter.simulator import Simulator
from tests.cli.conftest import START_S, Command
from tests.cli.process import alive, printed, started, until

SECRET = f"whsec_{base64.b64encode(bytes(32)).decode()}"


@pytest.mark.parametrize(
    ("arguments", "secret", "sentence"),
    [
        ([], "", "Give one of --acp, --agent, --exec, --http, --nats-agent and --openai."),
        (["--exec", "printf 'no end"], "", "The program cannot be read: No closing quotation."),
        (["--agent", "cloud"], "", "Known agents: claude, codex, gemini, opencode."),
        (["--acp", "no-such-agent --acp"], "", "There is no program `no-such-agent` on the PATH."),
        (["--exec", "cat | tr a b"], "", "`|` needs a shell: give a script, or sh -c '…'."),
        (["--exec", __file__], "", "test_agent.py` is not executable: chmod +x "),
        (["--exec", "true", "--timeout", "0"], "", "Must be > 0."),
        (["--exec", "true", "--max-output", "50000"], "", "Must be <= 40000"),
        (["--http", "https://a.example"], "", "Set WECHAT_WEBHOOK_SECRET"),
        (["--http", "https://a.example"], "whsec_c2hvcnQ=", "The secret is whsec_"),
        (["--http", "a.example"], SECRET, "Expected a URL"),
        (["--openai", "http://a.example/v1"], "", "Give --openai and --model together."),
        (["--exec", "true", "--model", "m"], "", "Give --openai and --model together."),
        (["--openai", "a.example", "--model", "m"], "", "Expected a URL such as https://api.openai.com/v1."),
        (["--openai", "http://a.example", "--model", "m", "--history", "-1"], "", "Must be >= 0."),
        (["--nats-agent", "a//c"], "", "Expected NAME, NAME/OWNER or NAME/OWNER/SESSION."),
    ],
)
async def test_what_makes_no_sense_is_refused(
    server: EmbeddedNats,
    cli: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    secret: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("WECHAT_WEBHOOK_SECRET", secret)
    result = await cli("agent", "s1", "--state", str(tmp_path / "state"), *arguments)
    assert result.code == 2
    assert sentence in result.err
    assert not secret or secret not in result.err


async def test_a_state_that_cannot_be_used_is_said(server: EmbeddedNats, cli: Command, tmp_path: Path) -> None:
    (tmp_path / "sessions.json").write_text("no JSON")
    result = await cli("agent", "s1", "--exec", "true", "--state", str(tmp_path))
    assert result.code == 1
    assert "Cannot use" in result.err


def test_a_program_of_this_folder_is_told_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answer.sh").touch(0o755)
    with pytest.raises(Failed, match=r"^`answer.sh` is not on the PATH: write ./answer.sh$"):
        AgentChoice(program="answer.sh").check()
    AgentChoice(program="./answer.sh").check()


def test_quoted_words_of_a_shell_are_words() -> None:
    AgentChoice(program="sh -c 'cat | tr a b'").check()
    AgentChoice(program="echo '|' \"&&\"").check()


async def test_an_agent_of_nobody_says_so(server: EmbeddedNats, simulator: Simulator, tmp_path: Path) -> None:
    settings = demo_settings(server.url, simulator.url)
    options = ("--exec", "cat", "--state", str(tmp_path))
    async with (
        adapter_running(settings, start_s=START_S, drain_s=START_S),
        started("agent", "s77", *options, env={"NATS_URL": server.url}) as process,
    ):
        await printed(process, b"agent.nobody")


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """By the example that libraries for it are tested with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def nobody(_question: str, _items: Sequence[OutItem], _ident: str) -> str:
    raise AssertionError("a program asks nothing")


def turn(text: str = "hello") -> Turn:
    """A message of a user, as a program is run for it."""
    inbound = Inbound(
        id="m1",
        sandbox="s1",
        bot="b1",
        user="u1",
        sent_at_ms=0,
        received_at_ms=0,
        text=text,
        items=[TextItem(text=text)],
    )
    return Turn(Message(Sandbox("s1", Settings()), "7.0", inbound), "session", nobody)


def running(program: str, folder: Path) -> Program:
    """A script for sh, in a folder."""
    script = folder / "program.sh"
    script.write_text(f"cd {folder}\n{program}")
    return Program(f"sh {script}", folder / "files", timeout_s=30, max_output=100)


async def test_an_answer_waits_for_no_child_of_the_program_and_none_is_left(tmp_path: Path) -> None:
    answer = await running("sleep 600 & echo $!", tmp_path)(turn())
    await until(lambda: not alive(int(answer.text)))


async def test_a_child_that_ignores_sigterm_ends_with_its_program(tmp_path: Path) -> None:
    child = "trap '' TERM; until [ -s pid ]; do sleep 0.01; done; touch ready; sleep 600"
    program = running(f"({child}) & echo $! >pid; wait", tmp_path)
    run = asyncio.ensure_future(program(turn()))
    await until((tmp_path / "ready").exists)
    run.cancel()
    await asyncio.wait({run})
    await until(lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(("characters", "fits"), [(10_000, True), (25_000, False)])
async def test_a_long_text_is_on_standard_input_if_it_fits_into_no_variable(
    tmp_path: Path, characters: int, fits: bool
) -> None:
    program = running('wc -c; printf %s "$WECHAT_MESSAGE" >message', tmp_path)
    answer = await program(turn("好" * characters))
    assert int(answer.text) == characters * 3
    message = msgspec.json.decode((tmp_path / "message").read_bytes(), type=Inbound)
    assert (message.id, bool(message.text), bool(message.items)) == ("m1", fits, fits)


async def test_why_a_program_failed_is_its_last_line(tmp_path: Path) -> None:
    """That of its standard error, which goes on to a log, else of its output."""
    with (tmp_path / "log").open("wb") as log:
        program = Program("sh", tmp_path / "files", timeout_s=30, max_output=100, stderr=log.fileno())
        for text, said in (
            ("echo partly; echo no >&2; echo 'Not logged in' >&2; echo >&2; exit 1", "Not logged in"),
            ("echo 'Invalid API key'; exit 1", "Invalid API key"),
            (r"printf '1 %%\r100 %%' >&2; exit 1", "100 %"),
            ("exit 1", ""),
        ):
            with pytest.raises(Temporary, match="exit code 1") as failed:
                await program(turn(text))
            assert failed.value.said == said
    assert (tmp_path / "log").read_text() == "no\nNot logged in\n\n1 %\n100 %"


def asking(http: httpx.AsyncClient) -> Webhook:
    return Webhook(http, "http://agent.example", bytes(32), timeout_s=30, max_output=100)


async def test_a_url_is_asked_again_whatever_it_says_of_later() -> None:
    later = httpx.Response(503, headers={b"retry-after": "\u00b2".encode()})
    responses = [later, httpx.Response(200, stream=httpx.ByteStream(b"done"))]
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: responses.pop(0))) as http:
        webhook = asking(http)
        assert await webhook(turn()) == Answer("done")


@pytest.mark.parametrize(
    ("content_type", "body"), [("text/plain", b"x" * 101), ("application/json", b'{"reply":"%s"}' % (b"x" * 101))]
)
async def test_a_longer_reply_than_may_be_is_refused(content_type: str, body: bytes) -> None:
    response = httpx.Response(200, headers={"content-type": content_type}, stream=httpx.ByteStream(body))
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: response)) as http:
        with pytest.raises(Refused, match="more than 100 bytes"):
            await asking(http)(turn())


@pytest.mark.parametrize("encoding", ["gzip, gzip", "gzip"])
async def test_a_response_is_never_unpacked(encoding: str) -> None:
    """Two kilobytes of `gzip, gzip` are two gigabytes; here they are 64 MB."""
    body = gzip.compress(bytes(64 << 20))
    body = gzip.compress(body) if encoding == "gzip, gzip" else body
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, headers={"content-encoding": encoding}, stream=httpx.ByteStream(body))

    tracemalloc.start()
    try:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            webhook = asking(http)
            with pytest.raises(Refused, match="compressed"):
                await webhook(turn())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert [request.headers["accept-encoding"] for request in asked] == ["identity"]


async def test_an_agent_on_nats_that_does_not_end_is_cut() -> None:
    """Its words and its attachments are kept up to what an answer may have."""
    said: list[ResponseChunk] = []
    stored: list[str] = []

    async def prompt(*_: object, **__: object) -> AsyncIterator[ResponseChunk]:
        for number in range(10_000):
            attachments = [Attachment.from_bytes(f"{number}.txt", b"a")] * 3
            said.append(ResponseChunk(text="x", attachments=attachments))
            yield said[-1]
            await asyncio.sleep(0)

    async def put_media(data: bytes, name: str) -> Media:
        stored.append(name)
        return Media(object=name, mime="text/plain", size=len(data))

    endpoint = SimpleNamespace(max_payload_bytes=0, attachments_ok=False)
    found: Any = SimpleNamespace(prompt=prompt, prompt_subject="p", prompt_endpoint=endpoint)

    async def discover(**_: object) -> list[Any]:
        return [found]

    agents: Any = SimpleNamespace(discover=discover)
    asked = turn()
    asked.message.sandbox.put_media = put_media  # type: ignore[method-assign, assignment]
    answer = await NatsAgent(agents, "tester", timeout_s=30, max_output=100)(asked)
    assert (answer.text, len(answer.items), answer.is_cut) == ("x" * 100, 10, True)
    assert (len(said), len(stored)) == (101, 10)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
async def test_a_program_does_not_read_what_its_parent_knows(tmp_path: Path) -> None:
    """A root without capabilities stands for any other user: to one with them no rule of the kernel applies."""
    script = tmp_path / "steal.py"
    script.write_text(
        "import os\n"
        "for file in ('environ', 'mem', 'maps'):\n"
        "    try:\n"
        "        with open(f'/proc/{os.getppid()}/{file}', 'rb') as source: print(file, source.read(1) or b'-')\n"
        "    except OSError as exc: print(file, type(exc).__name__)\n"
    )
    parent = (
        "import asyncio, ctypes, os, pathlib, sys\n"
        "for capability in range(41): ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)\n"  # PR_CAPBSET_DROP
        "if len(sys.argv) == 1: os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], 'again'])\n"
        "from adapter.agent.program import Program\n"
        "from tests.cli.test_agent import turn\n"
        f"files = pathlib.Path('{tmp_path}/files')\n"
        f"program = Program(f'{{sys.executable}} {script}', files, timeout_s=30, max_output=1000)\n"
        "print(asyncio.run(program(turn())).text)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", parent, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    assert said.decode().splitlines() == [*(f"{file} PermissionError" for file in ("environ", "mem", "maps")), ""]
