"""NATS's decentralised JWTs for the roles of `adapter.security.permissions`: operator, accounts, users, keys.

Format: version 2 of https://github.com/nats-io/jwt; signed with ed25519 by the key of whoever is above.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import nkeys

from adapter.contract.names import Names
from adapter.errors import Refused
from adapter.security.permissions import (
    ACCOUNT_OF,
    SANDBOX_PAYLOAD,
    WECHAT,
    Grants,
    Role,
    Share,
    exports,
    grants,
    imports,
)

OPERATOR, ACCOUNT, USER = nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER
DAY_S = 86_400
NO_LIMITS = {"subs": -1, "data": -1, "payload": -1}
ACCOUNT_LIMITS = NO_LIMITS | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
STORAGE = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
WATCHES = Grants(("$SYS.REQ.>",), ("$SYS.>", "_INBOX.>"))
EVERYTHING = Grants((">",), (">",))
NOTHING = {"pub": {"deny": [">"]}, "sub": {"deny": [">"]}}


class Key:
    """An NKey: `public` names it, `seed` is the secret."""

    def __init__(self, seed: str) -> None:
        try:
            self._pair = nkeys.from_seed(bytearray(seed.encode()))
        except (nkeys.NkeysError, ValueError) as exc:
            raise Refused("invalid", "That is no seed of an NKey.") from exc
        self.seed = seed
        self.public = str(bytes(self._pair.public_key).decode())

    @classmethod
    def new(cls, kind: int) -> Key:
        return cls(nkeys.encode_seed(secrets.token_bytes(32), kind).decode())

    def sign(self, data: bytes) -> bytes:
        return bytes(self._pair.sign(data))


def encode(signer: Key, subject: str, name: str, claims: dict[str, Any], *, days: float = 0) -> str:
    """A JWT about the public key `subject`. `days` until it expires; 0: never."""
    now = int(time.time())
    body: dict[str, Any] = {"jti": secrets.token_hex(16), "iat": now, "iss": signer.public, "sub": subject}
    body |= {"name": name, "nats": {"version": 2} | claims}
    if days:
        body["exp"] = now + int(days * DAY_S)
    parts = [_base64(msgspec.json.encode(part)) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)]
    signed = ".".join(parts)
    return f"{signed}.{_base64(signer.sign(signed.encode()))}"


def decode(jwt: str) -> dict[str, Any]:
    """What a JWT of ours says; its signature is not checked. Raises Refused."""
    try:
        part = jwt.split(".")[1]
        found: dict[str, Any] = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError) as exc:
        raise Refused("invalid", "That is no JWT.") from exc
    return found


def operator_jwt(key: Key, system: str) -> str:
    """`system`: public key of the system account."""
    return encode(key, key.public, "wechat-nats", {"type": "operator", "system_account": system})


def account_jwt(
    operator: Key,
    account: str,
    name: str,
    *,
    exported: Iterable[Share] = (),
    imported: Iterable[Share] = (),
    exporter: str = "",
    storage: bool = False,
    signing: Iterable[dict[str, Any]] = (),
    revoked: dict[str, int] | None = None,
) -> str:
    """Keys are public ones. `revoked`: users, and up to when (Unix seconds) their JWTs do not count."""
    claims: dict[str, Any] = {
        "type": "account",
        "limits": ACCOUNT_LIMITS | (STORAGE if storage else dict.fromkeys(STORAGE, 0)),
        "default_permissions": NOTHING,
        "exports": [_export(share) for share in exported],
        "imports": [{**_named(share), "account": exporter} for share in imported],
        "signing_keys": list(signing),
        "revocations": revoked or {},
    }
    return encode(operator, account, name, {key: value for key, value in claims.items() if value != []})


def scope(signing: str, names: Names) -> dict[str, Any]:
    """A signing key that makes users of sandboxes only: the tag `sandbox` of the user fills the template."""
    template = permissions(grants(names, "sandbox")) | NO_LIMITS | {"payload": SANDBOX_PAYLOAD}
    return {"kind": "user_scope", "key": signing, "role": "sandbox", "template": template}


def user_jwt(signer: Key, user: str, names: Names, role: Role | None) -> str:
    """A user of a role; None: one of the system account, who watches servers and changes accounts."""
    may = permissions(grants(names, role) if role else WATCHES)
    return encode(signer, user, role or "sys", {"type": "user"} | may | NO_LIMITS)


def admin_jwt(signer: Key, user: str, *, days: float) -> str:
    """A user who may do everything in the account whose key `signer` is. `days` until it expires; 0: never."""
    return encode(signer, user, "admin", {"type": "user"} | permissions(EVERYTHING) | NO_LIMITS, days=days)


def sandbox_jwt(signing: Key, account: str, user: str, sandbox: str, *, days: float = 0) -> str:
    """A user of a sandbox: nothing but its tag, made with the scoped key of `account`."""
    claims = {"type": "user", "issuer_account": account, "tags": [f"sandbox:{sandbox}"]}
    return encode(signing, user, sandbox, claims, days=days)


def creds(jwt: str, key: Key) -> str:
    """A credentials file as every NATS client reads it."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{key.seed}\n------END USER NKEY SEED------\n"
    )


class Accounts(NamedTuple):
    """The accounts of `adapter.security.permissions`, by name, and the key above them."""

    operator: Key
    keys: dict[str, Key]
    signing: Key
    """Makes users of sandboxes, in their shared account or in their own."""

    def jwt(self, name: str, names: Names, *, sandbox: str = "", revoked: dict[str, int] | None = None) -> str:
        """The JWT of an account. `sandbox`: it is the account of that one alone."""
        public = self.keys[name].public
        if name == WECHAT:
            return account_jwt(self.operator, public, name, exported=exports(names), storage=True)
        role: Role | None = "sandbox" if sandbox else next((r for r, a in ACCOUNT_OF.items() if a == name), None)
        return account_jwt(
            self.operator,
            public,
            name,
            imported=imports(names, role, sandbox or "*") if role else (),
            exporter=self.keys[WECHAT].public,
            signing=[scope(self.signing.public, names)] if role == "sandbox" else (),
            revoked=revoked,
        )


def permissions(may: Grants) -> dict[str, Any]:
    """Grants as a user's JWT and a template have them."""
    return {"pub": {"allow": list(may.publish)}, "sub": {"allow": list(may.subscribe)}}


def _export(share: Share) -> dict[str, Any]:
    answer = {"response_type": "Stream" if share.many else "Singleton"} if share.kind == "service" else {}
    return _named(share) | answer


def _named(share: Share) -> dict[str, Any]:
    return {"name": share.subject, "subject": share.subject, "type": share.kind}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
