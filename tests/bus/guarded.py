"""A nats-server with the permissions that are shipped, as passwords and as JWTs, and connections of each role."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from adapter.cli.embedded import find_server
from adapter.contract.names import Names
from adapter.jetstream.client import BusClient
from adapter.jetstream.credentials import credential_options
from adapter.settings import read_settings
from adapter.tools.accounts import ACCOUNT_OF, FILES, OF_ONE, WECHAT
from adapter.tools.permissions import inbox
from tests.bus.nsc import Nsc
from tests.e2e.waiting import until
from tests.generate import EXAMPLES, ROOT

NAMES = Names()
SANDBOXES = EXAMPLES
UNTRUSTED = "u1"
"""A sandbox that is not trusted."""
TEMPLATES = ("passwords", "passwords-each", "jwt", "jwt-each")
"""`each`: every sandbox in an account of its own."""
NEW_ACKS = "passwords new-acks"
"""The first template, on a server whose acknowledgements and flow control have domain and account in their subjects:
the default of nats-server 2.16."""
WITNESS = "witness"
"""A user without limits beside the adapter, for tests to see what arrives there."""


class User(NamedTuple):
    """How somebody connects: what a program finds in its environment."""

    environ: dict[str, str]

    @property
    def inbox(self) -> str:
        return self.environ["NATS_INBOX_PREFIX"]


class Player:
    """A connection of a role; keeps what the server forbids it."""

    def __init__(self, nc: BusClient, refusals: list[str]) -> None:
        self.nc = nc
        self.refusals = refusals
        """The server's words, in lower case, as nats-py hands them on."""


class Guarded:
    """The server. Made by `guarded`."""

    def __init__(
        self,
        folder: Path,
        template: str,
        edit: Callable[[str], str] = lambda text: text,
        *,
        sandboxes: Sequence[str] = SANDBOXES,
        jetstream: str = "",
    ) -> None:
        self.folder = folder
        self._edit = edit
        self._sandboxes = sandboxes
        self._jetstream = jetstream
        self.jwt, self.each = template.startswith("jwt"), template.endswith("-each")
        self._flags = "feature_flags { js_ack_fc_v2: true }\n" if template == NEW_ACKS else ""
        self.url = ""
        self.users: dict[str, User] = {}
        """By role or sandbox."""
        self._clients: list[BusClient] = []
        self.nsc: Nsc | None = None
        """Who made the JWTs."""
        self.process: asyncio.subprocess.Process | None = None

    def amend(self, edit: Callable[[str], str]) -> None:
        """Changes the configuration with passwords, and has the server read it again."""
        file = self.folder / "accounts.conf"
        file.write_text(edit(file.read_text()))
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    async def connect(self, name: str) -> Player:
        """As a role, as a sandbox, or as WITNESS."""
        environ, refusals = self.users[name].environ, list[str]()

        async def on_error(exc: Exception) -> None:
            refusals.append(str(exc).lower())

        nc = BusClient()
        self._clients.append(nc)
        await nc.connect(
            self.url,
            **credential_options(read_settings(environ)),
            inbox_prefix=self.users[name].inbox.encode(),
            error_cb=on_error,
            allow_reconnect=False,
        )
        return Player(nc, refusals)

    def write(self) -> tuple[Path, dict[str, str]]:
        """The server's configuration and environment."""
        who = [*((role, inbox(role)) for role in ACCOUNT_OF if role not in OF_ONE), (WITNESS, "_INBOX_witness")]
        who += [(sandbox, inbox("sandbox", sandbox)) for sandbox in (*self._sandboxes, UNTRUSTED)]
        environ = self._with_jwts() if self.jwt else self._with_passwords([name for name, _ in who])
        for name, prefix in who:
            self.users[name] = User({**self.users[name].environ, "NATS_INBOX_PREFIX": prefix})
        config = self.folder / "server.conf"
        config.write_text(
            f'listen: "127.0.0.1:-1"\nports_file_dir: "{self.folder}"\n'
            f'jetstream {{ store_dir: "{self.folder}/data"{self._jetstream} }}\n'
            f"include {'jwt/resolver.conf' if self.jwt else 'accounts.conf'}\n{self._flags}"
        )
        return config, environ

    def _with_passwords(self, names: list[str]) -> dict[str, str]:
        """The file as it is shipped, but for the witness."""
        text = (ROOT / "helm/nats" / FILES[self.each]).read_text()
        within = f'"{WECHAT}": {{\n    jetstream: enabled\n    users: [\n'
        assert text.count(within) == 1
        witness = f'      {{ user: "{WITNESS}", password: $PASSWORD_WITNESS }}\n'
        (self.folder / "accounts.conf").write_text(self._edit(text.replace(within, within + witness)))
        self.users = {name: User({"NATS_USER": name, "NATS_PASSWORD": f"{name}-secret"}) for name in names}
        return {f"PASSWORD_{name.upper()}": f"{name}-secret" for name in (*names, "sys")}

    def _with_jwts(self) -> dict[str, str]:
        """Made by the scripts that an operator uses."""
        folder = self.folder / "jwt"
        folder.mkdir()
        nsc = self.nsc = Nsc(folder, self.folder / "resolver")
        nsc.run_script("nsc.sh")
        for sandbox in self._sandboxes:
            nsc.run_script("nsc-sandbox-each.sh" if self.each else "nsc-sandbox.sh", sandbox)
        nsc.run_script("nsc-untrusted-each.sh" if self.each else "nsc-untrusted.sh", UNTRUSTED)
        user = ("--account", WECHAT, "--name", WITNESS)
        nsc.run("add", "user", *user, "--allow-pub", ">", "--allow-sub", ">")
        nsc.run("generate", "creds", *user, "--output-file", f"{WITNESS}.creds")
        nsc.write_config()
        for file in folder.glob("*.creds"):
            self.users[file.stem] = User({"NATS_CREDS": str(file)})
        return {}

    async def close(self) -> None:
        for nc in self._clients:
            await nc.close()


@contextlib.asynccontextmanager
async def guarded(
    folder: Path,
    template: str = "passwords",
    edit: Callable[[str], str] = lambda text: text,
    *,
    sandboxes: Sequence[str] = SANDBOXES,
    jetstream: str = "",
) -> AsyncIterator[Guarded]:
    """A server with one of TEMPLATES, or NEW_ACKS. `edit` changes the configuration with passwords, as operators may.

    `sandboxes`: others than the shipped examples, with JWTs only. `jetstream`: more of the server's options.
    """
    made = Guarded(folder, template, edit, sandboxes=sandboxes, jetstream=jetstream)
    config, environ = await asyncio.to_thread(made.write)
    with (folder / "server.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            find_server(), "-c", config, env={**os.environ, **environ}, stdout=log, stderr=subprocess.STDOUT
        )
    made.process = process
    try:
        await until(lambda: bool(ports_of(folder)) or process.returncode is not None, "the server listens")
        assert process.returncode is None, (folder / "server.log").read_text()
        made.url = ports_of(folder)[0]
        yield made
        await made.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def ports_of(folder: Path) -> list[str]:
    """The URLs at which a server listens whose `ports_file_dir` this is; none yet: none."""
    for file in folder.glob("*.ports"):
        with contextlib.suppress(ValueError):
            return list(json.loads(file.read_text())["nats"])
    return []
