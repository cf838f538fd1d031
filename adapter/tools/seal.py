"""Encryption of secrets at rest, above all bot tokens: AES-256-GCM with a key from the settings.

Form: `s1.<key id>.<base64url of nonce and ciphertext>`. The bot's id is authenticated, so that a sealed token cannot
be moved to another bot. The first of several keys seals, and all open, for key rotation.
"""

from __future__ import annotations

import base64
import hashlib
import os
from typing import Literal, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from adapter.errors import Refused

MARK = "s1."
_KEY_ID_CHARS = 8
Sealing: TypeAlias = Literal["sealed", "older", "foreign"]
"""Sealed with the first key; with another known key; with an unknown key, or not at all."""


class Sealer:
    """Seals and opens tokens with the keys of WECHAT_NATS_TOKEN_KEY. `bot` identifies the owner of a secret. Without
    a key it tells `sealing_of`, and nothing else."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = {_key_id(key): AESGCM(key) for key in keys}
        self._first = _key_id(keys[0]) if keys else ""

    def sealing_of(self, stored: str) -> Sealing:
        """How a token is stored."""
        key_id = stored.removeprefix(MARK).partition(".")[0]
        if not stored.startswith(MARK) or key_id not in self._keys:
            return "foreign"
        return "sealed" if key_id == self._first else "older"

    def is_same_secret(self, bot: str, one: str, other: str) -> bool:
        """Whether two tokens of a bot are the same, in clear or sealed, even at another time or with another key."""
        if one == other:
            return True
        try:
            return self.open_given(bot, one) == self.open_given(bot, other)
        except Refused:
            return False

    def seal(self, bot: str, token: str) -> str:
        return f"{MARK}{self._first}.{base64.urlsafe_b64encode(self._encrypt(bot, token.encode())).decode()}"

    def open(self, bot: str, stored: str) -> str:
        """Raises Refused("token_key") if it is not sealed, or no known key opens it."""
        if not stored.startswith(MARK):
            raise _not_opened()
        key_id, _, body = stored.removeprefix(MARK).partition(".")
        try:
            return self._decrypt(bot, key_id, base64.urlsafe_b64decode(body)).decode()
        except ValueError as exc:
            raise _not_opened() from exc

    def open_given(self, bot: str, given: str) -> str:
        """As `open`, of what somebody gives who need not have the key: what is not sealed is as it is."""
        return self.open(bot, given) if given.startswith(MARK) else given

    def seal_bytes(self, context: str, data: bytes) -> bytes:
        """As `seal`, without base64, for bytes that may be large."""
        return f"{MARK}{self._first}.".encode() + self._encrypt(context, data)

    def open_bytes(self, context: str, stored: bytes) -> bytes:
        """Raises Refused("token_key") if it is not sealed, or no known key opens it."""
        if not stored.startswith(MARK.encode()):
            raise _not_opened()
        head = len(MARK) + _KEY_ID_CHARS
        return self._decrypt(context, stored[len(MARK) : head].decode("ascii", "replace"), stored[head + 1 :])

    def _encrypt(self, context: str, data: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._keys[self._first].encrypt(nonce, data, context.encode())

    def _decrypt(self, context: str, key_id: str, sealed: bytes) -> bytes:
        if key_id not in self._keys:
            raise Refused("token_key", f"It was sealed with a key ({key_id}) that is not in WECHAT_NATS_TOKEN_KEY.")
        try:
            return self._keys[key_id].decrypt(sealed[:12], sealed[12:], context.encode())
        except (InvalidTag, ValueError) as exc:
            raise _not_opened() from exc


def _not_opened() -> Refused:
    return Refused("token_key", "It is not sealed, was changed, or belongs to another bot or user.")


def bind_context(sandbox: str, bot: str) -> str:
    """Context of the token in a stored bind command, so that it is useless in a bind to another sandbox."""
    return f"bind {sandbox} {bot}"


def cursor_context(bot: str) -> str:
    """Context of a binding's start cursor, which is sealed since it contains the bot's token in base64."""
    return f"cursor {bot}"


def entry_context(subject: str, since: int) -> str:
    """Context of the sealed part of an entry: the person's subject, and the time of the person that it is of."""
    return f"entry {subject} {since}"


def person_context(key: str, since: int) -> str:
    """Context of a person's record. `key`: its key, which names sandbox and person."""
    return f"person {key} {since}"


def dead_context(letter: str) -> str:
    """Context of an inbound dead letter. `letter`: its Nats-Msg-Id, which names the bot and the message's digest."""
    return f"dead {letter}"


def login_context(login: str, field: str) -> str:
    """Context of a secret in a login's record."""
    return f"login {login} {field}"


def _key_id(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=4).hexdigest()
