"""`agent`: connects an existing agent to a sandbox: a program, a URL, a model, or an agent on NATS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import structlog
from cyclopts import Parameter, validators
from nats.errors import Error as NatsError

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.connection import Connection, connect
from adapter.agent.presets import PRESETS, PresetAgent
from adapter.agent.program import STDERR, Program
from adapter.agent.runner import GATHER_S, Agent, Answer, Runner, Sessions, Turn
from adapter.agent.sandboxes import Sandboxes
from adapter.cli import output
from adapter.cli.bus import BROKE, settings_here, with_context
from adapter.cli.exits import NO, OK, UNREACHABLE, USAGE, Failed
from adapter.cli.options import Timeout, flag
from adapter.cli.output import read_text
from adapter.contract.names import check_sandbox
from adapter.errors import UNDECODABLE, Refused, Temporary
from adapter.jetstream.client import BusClient
from adapter.settings import Settings, read_settings
from adapter.tools import logs

if TYPE_CHECKING:
    import httpx

    from adapter.agent.nats_agent import NatsAgent
    from adapter.agent.openai import ChatAgent
    from adapter.agent.webhook import Webhook

log = structlog.get_logger()

AGENTS = "AGENTS_"
"""Prefix of the variables for the connection to agents: AGENTS_NATS_URL and so on."""
SECRET = "WECHAT_WEBHOOK_SECRET"
KEY = "OPENAI_API_KEY"
ANY = "*?"
"""Characters that make a pattern of a sandbox's id."""
IN_FOLDERS = str.maketrans(ANY, "+=")
"""What stands for them in the name of a folder: processes with several patterns share none."""
SHELL = frozenset(("|", "||", "&", "&&", ";", "<", ">", ">>"))
"""Words that only a shell understands."""
NOBODY_S = 2.0
"""Longest wait for an adapter's word on whether anybody is bound."""
MAX_OUTPUT = 40_000
"""Most bytes of an answer: they fit into a command even if JSON escapes many of them."""


@dataclass(frozen=True)
class AgentChoice:
    """The options that say which agent answers. `opened` makes it."""

    agent: Annotated[
        str | None,
        Parameter(
            metavar="NAME",
            help=f"One of {', '.join(PRESETS)}, and options for it; it remembers each user's conversation.",
        ),
    ] = None
    program: Annotated[
        str | None,
        Parameter(
            name="--exec",
            metavar="PROGRAM",
            help="A program and its arguments: reads the message's text from standard input, prints the answer.",
        ),
    ] = None
    http: Annotated[
        str | None,
        Parameter(
            metavar="URL",
            help=f"A URL: gets each message as a POST that is signed with {SECRET}, responds with the answer.",
        ),
    ] = None
    nats_agent: Annotated[
        str | None,
        Parameter(
            metavar="NAME",
            help="NAME[/OWNER[/SESSION]] of an agent that speaks the Synadia agent protocol, see AGENTS_NATS_URL.",
        ),
    ] = None
    acp: Annotated[
        str | None,
        Parameter(
            metavar="PROGRAM",
            help="A program that speaks the Agent Client Protocol, such as 'gemini --acp'; runs all the time.",
        ),
    ] = None
    openai: Annotated[
        str | None,
        Parameter(
            metavar="URL",
            help=f"A server with OpenAI's chat interface, such as http://localhost:11434/v1, see --model and {KEY}.",
        ),
    ] = None
    model: Annotated[str | None, Parameter(metavar="NAME", help="The model of --openai.")] = None
    system: Annotated[str, Parameter(metavar="TEXT", help="What the model of --openai is told first.")] = ""
    history: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=0, lte=1000),
            metavar="NUMBER",
            help="Most earlier messages of a person, with their answers, that the model of --openai is shown.",
        ),
    ] = 20
    timeout: Annotated[
        Timeout, Parameter(metavar="SECONDS", help="Seconds that a program or a response may take.")
    ] = 600.0
    max_output: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=1, lte=MAX_OUTPUT), metavar="BYTES", help="Most bytes of an answer."
        ),
    ] = 32_768
    at_once: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=1), metavar="NUMBER", help="Most runs of a program; other messages wait."
        ),
    ] = 32
    welcome: Annotated[
        str | None,
        Parameter(metavar="TEXT", help="Text before the first answer to a person; default: a greeting; '': none."),
    ] = None
    gather: Annotated[
        float,
        Parameter(
            validator=validators.Number(gte=0, lte=60),
            metavar="SECONDS",
            help="Seconds that files without words wait for the person's words about them; 0: none.",
        ),
    ] = GATHER_S

    def check(self) -> None:
        """Raises Failed unless one agent is named, whose program is there if it has one."""
        kinds = (self.program, self.http, self.nats_agent, self.agent, self.acp, self.openai)
        if sum(kind is not None for kind in kinds) != 1:
            raise Failed(USAGE, "Give one of --acp, --agent, --exec, --http, --nats-agent and --openai.")
        if (self.openai is None) != (self.model is None):
            raise Failed(USAGE, "Give --openai and --model together.")
        for command in filter(None, (self.program, self.agent, self.acp)):
            try:
                name = shlex.split(command)[0]
                unquoted = shlex.split(command, posix=False)
            except (ValueError, IndexError) as exc:
                raise Failed(USAGE, f"The program cannot be read: {exc}.") from None
            if shell := SHELL.intersection(unquoted):
                needs = f"`{min(shell)}` needs a shell: give a script, or sh -c '…'."
                raise Failed(USAGE, needs)
            if shutil.which(name) is None and (command is not self.agent or name in PRESETS):
                if Path(name).is_file():
                    there = os.access(name, os.X_OK)
                    helps = f"is not on the PATH: write ./{name}" if there else f"is not executable: chmod +x {name}"
                    raise Failed(USAGE, f"`{name}` {helps}")
                raise Failed(USAGE, f"There is no program `{name}`{'' if '/' in name else ' on the PATH'}.")


Choice = Annotated[AgentChoice, Parameter(name="*")]


@contextlib.asynccontextmanager
async def opened(
    choice: AgentChoice, settings: Settings, folder: Path, *, may_be_away: bool = False, stderr: int = STDERR
) -> AsyncIterator[Agent]:
    """The agent, if it is there. `folder`: for what survives a restart. `may_be_away`: that a remote one gives no
    answer now is only said, on standard error. `stderr`: as for `Program`. Raises SettingsError, Failed, Temporary.
    """
    choice.check()
    timeout_s, most = choice.timeout, choice.max_output
    async with contextlib.AsyncExitStack() as stack:
        if choice.program is not None:
            program = Program(choice.program, folder / "files", timeout_s=timeout_s, max_output=most, stderr=stderr)
            yield _limited(program, choice.at_once)
            return
        if choice.agent is not None:
            preset = PresetAgent(choice.agent, folder, timeout_s=timeout_s, max_output=most, stderr=stderr)
            yield _limited(preset, choice.at_once)
            return
        if choice.acp is not None:
            yield await stack.enter_async_context(_acp_agent(choice, choice.acp, folder, stderr))
            return
        remote: Webhook | NatsAgent | ChatAgent
        if choice.http is not None:
            remote = await stack.enter_async_context(_webhook(choice, choice.http))
        elif choice.openai is not None:
            remote = await stack.enter_async_context(_chat_agent(choice, choice.openai, folder))
        else:
            remote = await stack.enter_async_context(_nats_agent(choice.nats_agent or "", settings, timeout_s, most))
        try:
            await remote.check()
        except Refused as exc:
            raise Failed(NO, exc.detail) from None
        except Temporary as exc:
            if not may_be_away:
                raise
            output.complain(f"{exc.detail} Messages wait for it.")
        yield remote


def _limited(agent: Agent, at_once: int) -> Agent:
    """`agent`, with at most `at_once` runs at the same time: other messages wait for one to end."""
    slots = asyncio.Semaphore(at_once)

    async def answer(turn: Turn) -> Answer:
        async with slots:
            return await agent(turn)

    return answer


def _legal_pattern(_: object, value: str | None) -> None:
    try:
        check_sandbox((value or "x").translate(dict.fromkeys(map(ord, ANY), "x")))
    except Refused as exc:
        raise ValueError(exc.detail) from None


async def agent(
    sandbox: Annotated[
        str | None,
        Parameter(
            validator=_legal_pattern, help="Id of the sandbox, or a pattern such as 'team-*' for all that match."
        ),
    ] = None,
    /,
    *,
    every: Annotated[bool, flag("All sandboxes; needs, as a pattern does, the role agents.", name="--all")] = False,
    choice: Choice = AgentChoice(),
    state: Annotated[
        Path | None,
        Parameter(
            metavar="FOLDER",
            help="Folder for what survives a restart; default: agent-SANDBOX in WECHAT_NATS_DATA_DIR.",
        ),
    ] = None,
) -> int:
    """Answer the users of a sandbox, or of all, with a program, a URL, a model or an agent on NATS.

    Messages of one user are answered one after the other, those of several at once; a message is finished when its
    answer is stored. Users steer by /new, which begins a new session, /stop, which ends the run under way, and
    /help. A program has WECHAT_MESSAGE, the message as JSON, WECHAT_POSITION and WECHAT_SESSION in its
    environment, and two folders: WECHAT_FILES has the user's files, and files in WECHAT_OUT are sent. It has no
    variable whose name begins with NATS_ or WECHAT_NATS_.
    Runs until SIGTERM or ctrl-C (exit code 0); what is in work then comes again after the next start. Ends with exit
    code 1 if another agent opens the sandbox, which has its messages from then on. Of all sandboxes those that others
    take are left to them.
    """
    if every == (sandbox is not None):
        raise Failed(USAGE, "Give a sandbox, a pattern or --all.")
    pattern = sandbox or "*"
    several = not set(ANY).isdisjoint(pattern)
    settings = settings_here()
    choice.check()
    folder, _ = state_of(pattern.translate(IN_FOLDERS), settings, state)

    async def serve(one: Sandbox) -> None:
        _, sessions = state_of(one.name, settings, state / one.name if state and several else state)
        log.info("agent.started", sandbox=one.name)
        await Runner(one, answering, sessions, welcome=choice.welcome, gather_s=choice.gather).run()

    async with opened(choice, settings, folder, may_be_away=True) as answering:
        try:
            if several:
                logs.configure(settings.log, version=__version__)
                await Sandboxes(pattern, settings).run(serve)
            else:
                async with Connection(settings, pattern) as nc, Sandbox(pattern, connection=nc) as connected:
                    logs.configure(settings.log, version=__version__)
                    await _warn_of_nobody(nc, pattern)
                    await serve(connected)
        except asyncio.CancelledError:
            return OK
        except NatsError:
            raise Failed(UNREACHABLE, BROKE) from None
    return OK


async def _warn_of_nobody(connection: Connection, sandbox: str) -> None:
    try:
        await connection.ask(f"window.{sandbox}", b"{}", timeout_s=NOBODY_S)
    except (Refused, Temporary) as exc:
        if exc.reason == "not_found":
            detail = f"Nobody is bound to {sandbox} yet: `wechat-nats login {sandbox}` shows a QR code."
            log.warning("agent.nobody", sandbox=sandbox, detail=detail)


def state_of(sandbox: str, settings: Settings, folder: Path | None = None) -> tuple[Path, Sessions]:
    """The folder for what survives a restart, and the sessions in it. Raises Failed."""
    folder = folder or Path(settings.data_dir) / f"agent-{sandbox}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder, Sessions(sandbox, folder / "sessions.json")
    except (OSError, *UNDECODABLE) as exc:
        raise Failed(NO, f"Cannot use {folder}: {getattr(exc, 'strerror', None) or exc}.") from None


@contextlib.asynccontextmanager
async def _webhook(choice: AgentChoice, url: str) -> AsyncIterator[Webhook]:
    """Raises SettingsError, Failed."""
    from adapter.agent.webhook import Webhook, read_secret  # noqa: PLC0415 -- other commands start faster without it

    if not (secret := _secret(SECRET)):
        make = f'export {SECRET}="whsec_$(openssl rand -base64 32)"'
        raise Failed(USAGE, f"Set {SECRET} (or …_FILE), which signs requests:\n{make}")
    key = read_secret(secret)
    async with _http_client(choice, url, "https://agent.example/wechat") as client:
        yield Webhook(client, url, key, timeout_s=choice.timeout, max_output=choice.max_output)


@contextlib.asynccontextmanager
async def _chat_agent(choice: AgentChoice, url: str, folder: Path) -> AsyncIterator[ChatAgent]:
    """Raises Failed."""
    from adapter.agent.openai import ChatAgent  # noqa: PLC0415 -- other commands start faster without it

    async with _http_client(choice, url, "https://api.openai.com/v1") as client:
        yield ChatAgent(
            client,
            url,
            choice.model or "",
            folder / "chats",
            key=_secret(KEY),
            system=choice.system,
            turns=choice.history,
            timeout_s=choice.timeout,
            max_output=choice.max_output,
        )


@contextlib.asynccontextmanager
async def _http_client(choice: AgentChoice, url: str, example: str) -> AsyncIterator[httpx.AsyncClient]:
    """Raises Failed unless `url` is one."""
    import httpx  # noqa: PLC0415 -- other commands start faster without it

    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise Failed(USAGE, f"Expected a URL such as {example}.")
    here = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))  # no proxy has what is there
    async with httpx.AsyncClient(timeout=choice.timeout, mounts=here) as client:
        yield client


@contextlib.asynccontextmanager
async def _acp_agent(choice: AgentChoice, command: str, folder: Path, stderr: int) -> AsyncIterator[Agent]:
    """Raises SettingsError, Failed."""
    try:
        from adapter.agent.acp import AcpAgent  # noqa: PLC0415 -- needs an extra
    except ImportError:
        raise Failed(USAGE, "This needs an extra: pip install '.[acp]' in the checkout.") from None
    most = choice.max_output
    answering = AcpAgent(command, folder, timeout_s=choice.timeout, max_output=most, stderr=stderr)
    try:
        yield answering
    finally:
        await answering.close()


@contextlib.asynccontextmanager
async def _nats_agent(
    address: str, settings: Settings, timeout_s: float, max_output: int
) -> AsyncIterator[NatsAgent]:
    """Over a connection of its own, since a sandbox may not ask agents. Raises SettingsError, Failed, Temporary."""
    try:
        from synadia_ai.agents import Agents  # noqa: PLC0415 -- an extra
    except ImportError:
        raise Failed(USAGE, "This needs an extra: pip install '.[agents]' in the checkout.") from None
    from adapter.agent.nats_agent import NatsAgent  # noqa: PLC0415 -- needs the extra, too

    if not 1 <= len(parts := address.split("/")) <= 3 or not all(parts):
        raise Failed(USAGE, "Expected NAME, NAME/OWNER or NAME/OWNER/SESSION.")
    environ = {
        name.removeprefix(AGENTS): os.environ[name] for name in os.environ if name.startswith(f"{AGENTS}NATS_")
    }
    if environ:
        folder = {name: os.environ[name] for name in ("XDG_CONFIG_HOME",) if name in os.environ}  # of contexts
        settings = read_settings(with_context(environ | folder))
    nc = BusClient()
    await connect(nc, settings, "wechat-nats agent", deque(maxlen=100))
    try:
        agents = Agents(nc=nc)
        yield NatsAgent(agents, address, timeout_s=timeout_s, max_output=max_output)
        await agents.close()
    finally:
        await nc.close()


def _secret(variable: str) -> str:
    """A secret of the environment, or of the file that it names; "": there is none. Raises Failed."""
    if file := os.environ.get(f"{variable}_FILE"):
        return read_text(Path(file)).strip()
    return os.environ.get(variable, "").strip()
