"""`permissions`: who may do what on the bus, as a NATS server's configuration or as JWTs, without another tool."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter

from adapter.cli import jwts, output
from adapter.cli.bus import connected_bus, settings_here
from adapter.cli.exit_codes import NO, OK, USAGE, Failed
from adapter.cli.files import read_text, write_private
from adapter.cli.jwts import Key
from adapter.cli.options import Sandbox, flag
from adapter.contract.names import Names
from adapter.errors import Refused
from adapter.security.permissions import (
    ACCOUNT_OF,
    OWN_ACCOUNTS,
    ROLES,
    SANDBOX,
    SYSTEM,
    WECHAT,
    grants,
    server_config,
)

app = App(name="permissions", help="Make the NATS users of adapter, platform, services, operators and sandboxes.")

ACCOUNTS = (SYSTEM, *dict.fromkeys(ACCOUNT_OF.values()))
UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
LONGEST_LINE = 8192
"""Bytes of a line that a server should read from its clients."""

Folder = Annotated[Path, Parameter(help="Where keys, JWTs and credentials are; only you can read it.")]
OwnAccount = Annotated[bool, flag("An account of its own, so that not even noise can come in.")]


@app.command
def config(
    *sandboxes: Annotated[str, Parameter(help="Ids of sandboxes.")],
    own_accounts: Annotated[bool, flag("An account for each sandbox.", name=OWN_ACCOUNTS)] = False,
) -> int:
    """Print a nats-server configuration: accounts, and a user with a password for each role and sandbox.

    For a few sandboxes that seldom change: each new one is a change of the server's configuration.
    """
    try:
        text = server_config(_names(), sandboxes, own_accounts=own_accounts)
    except Refused as exc:
        raise Failed(USAGE, exc.detail) from None
    output.say(text.removesuffix("\n"))
    return OK


@app.command
def init(
    folder: Folder,
    /,
    *,
    resolver_dir: Annotated[str, Parameter(help="Where the server keeps accounts; on its disk.")] = "/data/jwt",
) -> int:
    """Make an operator, the accounts and the users of all roles but sandboxes, as JWTs.

    The server needs `server.conf`, the adapter `creds/adapter.creds`; keep `keys/` from both.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise Failed(NO, f"{folder} is not empty: its keys are not overwritten.")
    _write(folder / "resolver_dir", resolver_dir)
    _write(folder / "keys" / "operator.nk", Key.new(jwts.OPERATOR).seed)
    for file in (Path("keys/signing.nk"), *map(_key_file, ACCOUNTS)):
        _write(folder / file, Key.new(jwts.ACCOUNT).seed)
    kept = CredentialFolder(folder)
    for name in ACCOUNTS:
        kept.store_account(name)
    users = [(SYSTEM, "sys", jwts.WATCHES)]
    users += [(ACCOUNT_OF[role], role, grants(kept.names, role)) for role in ROLES if role != "sandbox"]
    for account, user, may in users:
        _, creds = jwts.new_creds(kept.keys[account], user, jwts.user_claims(may))
        _write(folder / "creds" / f"{user}.creds", creds)
    kept.store_server()
    output.say(f"Start the server with {folder / 'server.conf'}; credentials are in {folder / 'creds'}.")
    return OK


@app.command
def sandbox(
    folder: Folder,
    name: Sandbox,
    /,
    *,
    own_account: OwnAccount = False,
    days: Annotated[float, Parameter(help="Days until the credentials expire; 0: never.")] = 0,
) -> int:
    """Make credentials for a sandbox; prints their file.

    In the account that sandboxes share the server needs to know nothing of it. An own account has to be pushed first.
    """
    kept = CredentialFolder(folder)
    if own_account and name not in kept.keys:
        _write(folder / _key_file(name), Key.new(jwts.ACCOUNT).seed)
        kept = CredentialFolder(folder)
        kept.store_account(name)
        kept.store_server()
    account = kept.keys[name if name in kept.keys else SANDBOX]
    user, creds = jwts.new_creds(kept.signing, name, jwts.sandbox_claims(account.public, name), days=days)
    file = folder / "creds" / "sandboxes" / f"{name}.creds"
    write_private(folder / "issued" / name, user + "\n", append=True)
    _write(file, creds)
    output.say(str(file))
    return OK


@app.command
def admin(
    folder: Folder,
    /,
    *,
    days: Annotated[float, Parameter(help="Days until the credentials expire; 0: never.")] = 1,
) -> int:
    """Make credentials that may do everything in the account of the bus; prints their file.

    For `backup`, `restore` and the `nats` tool, where a role may not do what has to be done.
    """
    signer = CredentialFolder(folder).keys[WECHAT]
    _, creds = jwts.new_creds(signer, "admin", jwts.user_claims(jwts.EVERYTHING), days=days)
    file = folder / "creds" / "admin.creds"
    _write(file, creds)
    output.say(str(file))
    return OK


@app.command
def revoke(folder: Folder, name: Sandbox, /) -> int:
    """Let no credentials of a sandbox count that were made until now. Takes effect with `permissions push`."""
    kept = CredentialFolder(folder)
    file = folder / "issued" / name
    if not file.is_file():
        raise Failed(NO, f"No credentials were made for {name} here.")
    account = name if name in kept.keys else SANDBOX
    kept.revoke(account, read_text(file).split())
    kept.store_account(account)
    kept.store_server()
    file.unlink()
    (folder / "creds" / "sandboxes" / f"{name}.creds").unlink(missing_ok=True)
    output.say(f"Revoked; tell the servers with `wechat-nats permissions push {folder}`.")
    return OK


@app.command
async def push(folder: Folder, /) -> int:
    """Send all accounts to the servers at NATS_URL: after an own account was made, or after a revocation."""
    kept = CredentialFolder(folder)
    creds = str(folder / "creds" / "sys.creds")
    settings = msgspec.structs.replace(
        settings_here(), nats_creds=creds, nats_user="", nats_password="", nats_nkey="", nats_inbox_prefix="_INBOX"
    )
    async with connected_bus(settings) as bus:
        for name in kept.keys:
            reply = await bus.request(UPDATE, _read(folder / _account_file(name)).encode())
            answer: dict[str, Any] = msgspec.json.decode(reply.data)
            if error := answer.get("error"):
                raise Failed(NO, f"The server refused account {name}: {error.get('description', error)}.")
    output.say(f"{len(kept.keys)} accounts pushed.")
    return OK


class CredentialFolder:
    """The folder that `init` made, and what was added since. Raises Failed if a file is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = _names()
        self._operator, self.signing = (Key(_read(folder / "keys" / file)) for file in ("operator.nk", "signing.nk"))
        own = sorted(file.stem for file in (folder / "keys" / "sandboxes").glob("*.nk"))
        self.keys = {name: Key(_read(folder / _key_file(name))) for name in (*ACCOUNTS, *own)}
        """Of the accounts, by name."""

    def revoke(self, account: str, users: list[str]) -> None:
        revoked = self._read_revocations()
        revoked.setdefault(account, {}).update(dict.fromkeys(users, int(time.time())))
        _write(self.folder / "revoked.json", msgspec.json.format(msgspec.json.encode(revoked)).decode())

    def store_account(self, name: str) -> None:
        revoked = self._read_revocations().get(name, {})
        jwt = jwts.account_jwt(self._operator, self.keys, name, self.names, signing=self.signing, revoked=revoked)
        _write(self.folder / _account_file(name), jwt)

    def store_server(self) -> None:
        """The server's configuration, with all accounts as they are now."""
        system = self.keys[SYSTEM].public
        lines = [
            "# Written by `wechat-nats permissions`. Holds no secret. Include it into the server's configuration:",
            "#",
            '#   jetstream { store_dir: "/data", sync_interval: always }',
            "#   include server.conf",
            "",
            # A client sends its JWT in one line, of which a server reads 4 KB; the adapter's names all that it may.
            f"max_control_line: {LONGEST_LINE}",
            f'operator: "{jwts.operator_jwt(self._operator, system)}"',
            f"system_account: {system}",
            f'resolver: {{ type: full, dir: "{_read(self.folder / "resolver_dir")}", allow_delete: false }}',
            "resolver_preload: {",
            *(
                f'  {key.public}: "{_read(self.folder / _account_file(name))}" # {name}'
                for name, key in self.keys.items()
            ),
            "}",
        ]
        _write(self.folder / "server.conf", "\n".join(lines))

    def _read_revocations(self) -> dict[str, dict[str, int]]:
        file = self.folder / "revoked.json"
        return msgspec.json.decode(_read(file), type=dict[str, dict[str, int]]) if file.exists() else {}


def _key_file(account: str) -> Path:
    """Below the folder. Keys of sandboxes' accounts are apart: a sandbox may have the name of another key."""
    return Path("keys", "" if account in ACCOUNTS else "sandboxes", f"{account}.nk")


def _account_file(account: str) -> Path:
    return Path("accounts", "" if account in ACCOUNTS else "sandboxes", f"{account}.jwt")


def _names() -> Names:
    return Names(settings_here().prefix)


def _read(file: Path) -> str:
    return read_text(file).strip()


def _write(file: Path, text: str) -> None:
    """Whole or not at all: a key that is cut off halfway would lock everybody out."""
    fresh = file.with_name(file.name + ".new")
    write_private(fresh, text.removesuffix("\n") + "\n")
    fresh.replace(file)
