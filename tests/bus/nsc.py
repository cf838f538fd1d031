"""Plays the commands of `nsc` that the scripts in `helm/nats/` have: `nsc` itself is in no index that tests may use.

JWTs have version 2 of https://github.com/nats-io/jwt, signed with ed25519 by the key of whoever is above. It knows
no command and no option but those; what they mean was compared with nsc's own.
"""

from __future__ import annotations

import base64
import json
import secrets
import shlex
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import nkeys

from adapter.tools.accounts import OF_ONE, SYSTEM
from tests.bus.accounts import ARGUMENT
from tests.generate import ROOT

OPERATOR, ACCOUNT, USER = nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER
FLAGS = {"--sys", "--service", "--nats-resolver"}
"""Options without a value."""
NO_LIMITS = {"subs": -1, "data": -1, "payload": -1}
ACCOUNT_LIMITS = NO_LIMITS | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
LONGEST_LINE = 8192
"""Bytes of a line that a server should read from its clients: the adapter's JWT is one."""


class Key:
    """An NKey: `public` names it, `seed` is the secret."""

    def __init__(self, kind: int) -> None:
        self.seed = nkeys.encode_seed(secrets.token_bytes(32), kind).decode()
        self._pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public = str(bytes(self._pair.public_key).decode())

    def sign(self, data: bytes) -> bytes:
        return bytes(self._pair.sign(data))


def encode(signer: Key, subject: str, name: str, claims: dict[str, Any]) -> str:
    """A JWT about the public key `subject`."""
    body = {"jti": secrets.token_hex(16), "iat": int(time.time()), "iss": signer.public, "sub": subject, "name": name}
    body["nats"] = {"version": 2} | claims
    parts = [_base64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)]
    signed = ".".join(parts)
    return f"{signed}.{_base64(signer.sign(signed.encode()))}"


class Nsc:
    """An operator with its accounts and users, whose credentials files come into `folder`."""

    def __init__(self, folder: Path, resolver: Path) -> None:
        """`resolver`: folder in which the server keeps accounts."""
        self._folder = folder
        self._resolver = resolver
        self._operator = Key(OPERATOR)
        self._keys: dict[str, Key] = {}
        self._accounts: dict[str, dict[str, Any]] = {}
        self.scopes: dict[str, Key] = {}
        """By account: the signing key of the role `sandbox`."""
        self._users: dict[tuple[str, str], str] = {}

    def run_script(self, file: str, sandbox: str = "") -> None:
        """One of the scripts in `helm/nats/`."""
        for line in (ROOT / "helm/nats" / file).read_text().splitlines():
            if line.startswith("nsc "):
                self.run(*(word.replace(ARGUMENT, sandbox) for word in shlex.split(line)[1:]))

    def run(self, verb: str, noun: str, *words: str) -> None:
        given = defaultdict[str, str](str)
        rest = iter(words)
        for word in rest:
            option, equals, value = word.partition("=")
            given[option] = "yes" if option in FLAGS else value if equals else next(rest)
        getattr(self, f"_{verb}_{noun.replace('-', '_')}")(given)
        assert not given, f"nsc {verb} {noun}: {dict(given)}"

    def public(self, account: str) -> str:
        return self._keys[account].public

    def new_creds(self, account: str, name: str, claims: dict[str, Any], *, scoped: bool = False) -> str:
        """A credentials file of a new user, signed by the account's key or by that of the role."""
        key = Key(USER)
        jwt = encode(self.scopes[account] if scoped else self._keys[account], key.public, name, claims)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{key.seed}\n------END USER NKEY SEED------\n"
        )

    def _add_operator(self, given: dict[str, str]) -> None:
        assert given.pop("--name")
        assert given.pop("--sys")
        self._new_account(SYSTEM, {})

    def _add_account(self, given: dict[str, str]) -> None:
        denied = {"deny": given.pop("--deny-pubsub").split(",")}
        self._new_account(given.pop("--name"), {"default_permissions": {"pub": denied, "sub": denied}})

    def _new_account(self, name: str, claims: dict[str, Any]) -> None:
        assert name not in self._keys
        self._keys[name] = Key(ACCOUNT)
        limits = {"limits": dict(ACCOUNT_LIMITS), "exports": [], "imports": []}
        self._accounts[name] = {"type": "account"} | limits | claims

    def _edit_account(self, given: dict[str, str]) -> None:
        account = self._accounts[given.pop("--name")]
        names = {"mem-storage": "mem_storage", "disk-storage": "disk_storage"}
        names |= {"streams": "streams", "consumer": "consumer"}
        account["limits"] |= {field: int(given.pop(f"--js-{option}")) for option, field in names.items()}

    def _add_export(self, given: dict[str, str]) -> None:
        kind = "service" if given.pop("--service", "") else "stream"
        share = {"name": given.pop("--name"), "subject": given.pop("--subject"), "type": kind}
        answer = {"response_type": given.pop("--response-type")} if kind == "service" else {}
        self._accounts[given.pop("--account")]["exports"].append(share | answer)

    def _add_import(self, given: dict[str, str]) -> None:
        remote, local = given.pop("--remote-subject"), given.pop("--local-subject")
        kind = "service" if given.pop("--service", "") else "stream"
        share = {"name": given.pop("--name"), "subject": remote, "local_subject": local, "type": kind}
        source = self._keys[given.pop("--src-account")].public
        self._accounts[given.pop("--account")]["imports"].append(share | {"account": source})

    def _edit_signing_key(self, given: dict[str, str]) -> None:
        account, role = given.pop("--account"), given.pop("--role")
        assert given.pop("--sk") == "generate"
        self.scopes[account] = Key(ACCOUNT)
        template = _permissions(given) | NO_LIMITS | {"payload": int(given.pop("--payload"))}
        scope = {"kind": "user_scope", "key": self.scopes[account].public, "role": role, "template": template}
        self._accounts[account]["signing_keys"] = [scope]

    def _add_user(self, given: dict[str, str]) -> None:
        account, name = given.pop("--account"), given.pop("--name")
        if role := given.pop("--private-key", ""):
            assert role in OF_ONE
            claims = {"type": "user", "issuer_account": self.public(account), "tags": [given.pop("--tag").lower()]}
        else:
            claims = {"type": "user"} | _permissions(given) | NO_LIMITS
        self._users[account, name] = self.new_creds(account, name, claims, scoped=bool(role))

    def _generate_creds(self, given: dict[str, str]) -> None:
        creds = self._users[given.pop("--account"), given.pop("--name")]
        (self._folder / given.pop("--output-file")).write_text(creds)

    def _generate_config(self, given: dict[str, str]) -> None:
        assert given.pop("--nats-resolver")
        assert given.pop("--sys-account") == SYSTEM
        self._config = self._folder / given.pop("--config-file")

    def write_config(self) -> None:
        """The server's configuration, with all accounts as `nsc push --all` gives them to a running server."""
        claims = {"type": "operator", "system_account": self.public(SYSTEM)}
        accounts = [
            f'  {key.public}: "{encode(self._operator, key.public, name, self._accounts[name])}"'
            for name, key in self._keys.items()
        ]
        lines = [
            f"max_control_line: {LONGEST_LINE}",
            f'operator: "{encode(self._operator, self._operator.public, "wechat-nats", claims)}"',
            f"system_account: {self.public(SYSTEM)}",
            f'resolver: {{ type: full, dir: "{self._resolver}", allow_delete: false }}',
            "resolver_preload: {",
            *accounts,
            "}",
        ]
        self._config.write_text("\n".join(lines) + "\n")


def _permissions(given: dict[str, str]) -> dict[str, Any]:
    may = {"pub": given.pop("--allow-pub").split(","), "sub": given.pop("--allow-sub").split(",")}
    return {does: {"allow": subjects} for does, subjects in may.items()}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
