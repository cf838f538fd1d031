"""NATS's decentralised JWTs for the roles of `adapter.security.permissions`: operator, accounts, users, keys.

Format: version 2 of https://github.com/nats-io/jwt; signed with ed25519 by the key of whoever is above.
"""

from __future__ import annotations

import base64
import secrets
import time
from typing import Any

import msgspec
import nkeys

from adapter.contract.names import Names
from adapter.errors import Refused
from adapter.security.permissions import (
    ACCOUNT_OF,
    SANDBOX_PAYLOAD,
    SYSTEM,
    WECHAT,
    Grants,
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
"""Of a user of the system account, who watches servers and changes accounts."""
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


def operator_jwt(key: Key, system: str) -> str:
    """`system`: public key of the system account."""
    return encode(key, key.public, "wechat-nats", {"type": "operator", "system_account": system})


def account_jwt(
    operator: Key, accounts: dict[str, Key], name: str, names: Names, *, signing: Key, revoked: dict[str, int]
) -> str:
    """The JWT of one of `accounts`. One that is no role's belongs to the sandbox of that name.

    `signing` makes users of sandboxes, in their shared account or in their own. `revoked`: users, and up to when
    (Unix seconds) their JWTs do not count.
    """
    role = next((role for role, account in ACCOUNT_OF.items() if account == name), None)
    claims: dict[str, Any] = {
        "type": "account",
        "limits": ACCOUNT_LIMITS | (STORAGE if name == WECHAT else dict.fromkeys(STORAGE, 0)),
        "default_permissions": NOTHING,
        "revocations": revoked,
    }
    is_own = role is None and name != SYSTEM
    if name == WECHAT:
        claims["exports"] = [_export(share) for share in exports(names)]
    elif role or is_own:
        shares = imports(names, role or "sandbox", name if is_own else "*")
        claims["imports"] = [_named(share) | {"account": accounts[WECHAT].public} for share in shares]
    if is_own or role == "sandbox":
        # a key that makes users of sandboxes only: the tag `sandbox` of the user fills the template
        template = permissions(grants(names, "sandbox")) | NO_LIMITS | {"payload": SANDBOX_PAYLOAD}
        scope = {"kind": "user_scope", "key": signing.public, "role": "sandbox", "template": template}
        claims["signing_keys"] = [scope]
    return encode(operator, accounts[name].public, name, claims)


def user_claims(may: Grants) -> dict[str, Any]:
    return {"type": "user"} | permissions(may) | NO_LIMITS


def sandbox_claims(account: str, sandbox: str) -> dict[str, Any]:
    """Of a user of a sandbox: nothing but its tag. To be signed with the scoped key of `account`."""
    return {"type": "user", "issuer_account": account, "tags": [f"sandbox:{sandbox}"]}


def permissions(may: Grants) -> dict[str, Any]:
    """Grants as a user's JWT and a template have them."""
    return {"pub": {"allow": list(may.publish)}, "sub": {"allow": list(may.subscribe)}}


def new_creds(signer: Key, name: str, claims: dict[str, Any], *, days: float = 0) -> tuple[str, str]:
    """A new user: its public key, and its credentials file as every NATS client reads it."""
    key = Key.new(USER)
    jwt = encode(signer, key.public, name, claims, days=days)
    return key.public, (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{key.seed}\n------END USER NKEY SEED------\n"
    )


def _export(share: Share) -> dict[str, Any]:
    answer = {"response_type": "Stream" if share.many else "Singleton"} if share.kind == "service" else {}
    return _named(share) | answer


def _named(share: Share) -> dict[str, Any]:
    return {"name": share.subject, "subject": share.subject, "type": share.kind}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
