"""`agent`: connects an agent that exists, a program or a URL, to a sandbox."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from adapter import __version__
from adapter.agent import Sandbox
from adapter.agent.program import Program
from adapter.agent.runner import Agent, Runner, Sessions
from adapter.cli.bus import connected_bus, settings_here
from adapter.cli.exit_codes import NO, OK, USAGE, Failed
from adapter.cli.lifetime import run_until_stopped, until_signalled
from adapter.cli.options import Sandbox as SandboxName
from adapter.cli.options import Timeout
from adapter.observability import logs

SECRET = "WECHAT_WEBHOOK_SECRET"
MAX_OUTPUT = 40_000
"""Bytes of an answer that fit into a command, whatever JSON makes of them."""

Exec = Annotated[
    str | None,
    Parameter(
        name="--exec",
        help="A program and its arguments: reads the message's text from standard input, prints the answer.",
    ),
]


async def agent(
    sandbox: SandboxName,
    /,
    *,
    program: Exec = None,
    http: Annotated[
        str | None,
        Parameter(help=f"A URL: gets each message as a POST that is signed with {SECRET}, responds with the answer."),
    ] = None,
    timeout: Annotated[Timeout, Parameter(help="Seconds that a program or a response may take.")] = 600.0,
    max_output: Annotated[
        int, Parameter(validator=validators.Number(gte=1, lte=MAX_OUTPUT), help="Most bytes of an answer.")
    ] = 32_768,
    state: Annotated[
        Path | None,
        Parameter(help="Folder for what survives a restart; default: agent-SANDBOX in WECHAT_NATS_DATA_DIR."),
    ] = None,
) -> int:
    """Answer the users of a sandbox with a program or a URL: give --exec or --http.

    The sandbox has to be bound with --durable. Messages of one user are answered one after the other, those of
    several at once; a message is acknowledged when its answer is stored. Users steer by /new, which begins a new
    session, and /stop, which ends the run under way. A program has WECHAT_MESSAGE, the message as JSON, and
    WECHAT_SESSION in its environment, and no variable whose name begins with NATS_ or WECHAT_NATS_.
    Runs until SIGTERM or ctrl-C (exit code 0); what is in work then is delivered to the next start.
    """
    settings = settings_here()
    if (program is None) == (http is None):
        raise Failed(USAGE, "Give --exec or --http.")
    folder = state or Path(settings.data_dir) / f"agent-{sandbox}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sessions = Sessions(sandbox, folder / "sessions.json")
    except (OSError, ValueError) as exc:
        raise Failed(NO, f"Cannot use {folder}: {exc}.") from None
    async with contextlib.AsyncExitStack() as stack:
        if program is not None:
            answering: Agent = Program(program, timeout_s=timeout, max_output=max_output)
        else:
            answering = await stack.enter_async_context(_webhook(http or "", timeout, max_output))
        async with connected_bus(settings):
            pass  # says in a sentence why there is no connection
        logs.configure(settings.log, version=__version__)
        stop = stack.enter_context(until_signalled())
        connected = await stack.enter_async_context(Sandbox(sandbox, settings, running_file=folder / "running"))
        await run_until_stopped(stop, Runner(connected, answering, sessions).run())
    return OK


@contextlib.asynccontextmanager
async def _webhook(url: str, timeout_s: float, max_output: int) -> AsyncIterator[Agent]:
    """Raises SettingsError, Failed."""
    import httpx  # noqa: PLC0415 -- other commands start faster without it

    from adapter.agent.webhook import Webhook, read_secret  # noqa: PLC0415

    key = read_secret(_secret())
    if not url.startswith(("http://", "https://")):
        raise Failed(USAGE, "Expected a URL that begins with https:// or http://.")
    async with httpx.AsyncClient(timeout=timeout_s) as client:
        yield Webhook(client, url, key, timeout_s=timeout_s, max_output=max_output)


def _secret() -> str:
    """Of the environment, or of the file that it names. Raises Failed."""
    if file := os.environ.get(f"{SECRET}_FILE"):
        try:
            return Path(file).read_text("utf-8").strip()
        except (OSError, ValueError):
            raise Failed(USAGE, f"Cannot read the file that {SECRET}_FILE names.") from None
    if secret := os.environ.get(SECRET, "").strip():
        return secret
    raise Failed(USAGE, f"Set {SECRET}, or {SECRET}_FILE, to the secret that signs the requests.")
