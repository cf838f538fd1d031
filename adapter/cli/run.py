"""`run`, `simulator`: commands that only start something."""

from __future__ import annotations

import base64
import contextlib
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from cyclopts import App, Parameter

from adapter import __version__
from adapter.cli.bus import URL_FILE, settings_here
from adapter.cli.embedded import EmbeddedNats, while_alive
from adapter.cli.exits import CLOSING_S, NO, OK, UNSTORED, Failed, draining_on_signal
from adapter.cli.options import flag
from adapter.cli.output import write_private
from adapter.settings import CREDENTIALS, Settings, read_settings
from adapter.tools import logs
from adapter.tools.process import run_fast

log = structlog.get_logger()

KEY_FILE = "token.key"
"""In the data folder of `run --embedded`: the key that seals tokens, where the settings name none."""

ADVICE = " Set WECHAT_NATS_DATA_DIR."

Rest = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
simulator = App(
    name="simulator",
    help="Serve a simulated iLink: bots, phones, faults; its own --help lists the options.",
    help_flags=[],
    version_flags=[],
)


def run(
    *,
    embedded: Annotated[bool, flag("Start a NATS server beside the adapter; data in WECHAT_NATS_DATA_DIR.")] = False,
    port: Annotated[
        int, Parameter(metavar="PORT", help="With --embedded: the port of that server on 127.0.0.1; 0: a free one.")
    ] = 4222,
) -> int:
    """Run the adapter until SIGTERM or ctrl-C, then drain and end.

    Exit code 0 after a clean drain, also when it was ended by ctrl-C; 5 where answers of iLink could not be stored.
    A second signal does not wait for the drain.
    With --embedded NATS_URL does not count: the adapter uses the server that it starts.
    """
    settings = settings_here(adapter=not embedded)
    logs.configure(settings.log, version=__version__)
    return run_fast(_run(settings, embedded=embedded, port=port))


async def _run(settings: Settings, *, embedded: bool, port: int) -> int:
    from adapter.replica import app  # noqa: PLC0415 -- other commands start faster without it

    with draining_on_signal(settings.drain_s + (CLOSING_S if embedded else 0.0)) as stop:
        if not embedded:
            return OK if await app.run(settings, stop=stop) else UNSTORED
        async with durable_nats(settings, port) as (server, its_settings):
            return OK if await while_alive(app.run(its_settings, stop=stop), server) else UNSTORED


@contextlib.asynccontextmanager
async def durable_nats(settings: Settings, port: int) -> AsyncIterator[tuple[EmbeddedNats, Settings]]:
    """The NATS server of the data folder, and the settings of an adapter on it. Commands find it by its URL file."""
    folder = Path(settings.data_dir)
    settings = _with_token_key(settings, folder)
    async with EmbeddedNats(folder / "nats", port, _embedded_token(folder)) as server:
        write_private(folder / URL_FILE, server.url + "\n", advice=ADVICE)
        log.info("nats.started", url_file=str(folder / URL_FILE), folder=str(server.folder))
        yield server, embedded_settings(settings, server.url)


def embedded_settings(settings: Settings, url: str) -> Settings:
    """The settings for the embedded server at `url`, which asks for nothing but the token in it. One adapter uses it,
    with one lease to renew."""
    others = dict.fromkeys(CREDENTIALS, "")
    return msgspec.structs.replace(settings, nats_url=(url,), nats_tls_first=False, partitions=1, **others)


def _embedded_token(folder: Path) -> str:
    """The token of the embedded server: that of earlier starts, so that other programs can keep using it."""
    with contextlib.suppress(OSError):
        if found := re.fullmatch(r"nats://(\w+)@\S+\n", (folder / URL_FILE).read_text(encoding="utf-8")):
            return found[1]
    return secrets.token_hex(16)


def _with_token_key(settings: Settings, folder: Path) -> Settings:
    """The settings with a key that seals tokens: their own, else that of the folder, which is made at the first
    start. Raises Failed."""
    path = folder / KEY_FILE
    if settings.token_key:
        return settings
    if not path.exists():
        if (folder / "nats" / "jetstream").exists():
            said = f"The key that opens the data in {folder} is gone: put {path} back, or set WECHAT_NATS_TOKEN_KEY."
            raise Failed(NO, f"{said} To begin anew, remove {folder}.")
        write_private(path, base64.b64encode(secrets.token_bytes(32)) + b"\n", advice=ADVICE)
        log.info("token_key.created", path=str(path), detail="Keep it elsewhere than backups of this folder.")
    made = read_settings({"WECHAT_NATS_TOKEN_KEY_FILE": str(path)})
    return msgspec.structs.replace(settings, token_key=made.token_key)


@simulator.default
def simulate(*tokens: Rest) -> int:
    """Serve a simulated iLink until SIGTERM or ctrl-C."""
    from adapter import simulator as simulated  # noqa: PLC0415 -- other commands start faster without it

    return simulated.run(list(tokens))
