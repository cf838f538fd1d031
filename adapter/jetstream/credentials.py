"""Reads the files of credentials and certificates before each connection, since they may change while the service
runs.

nats-py would read them during its handshake, raise any error of its parsers, and hang on a file without a JWT.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import ssl
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adapter.errors import Temporary
from adapter.settings import Settings

JWT, SEED = "BEGIN NATS USER JWT", "BEGIN USER NKEY SEED"


def credential_options(settings: Settings) -> dict[str, Any]:
    """nats-py's options for the credentials. Raises Temporary with the setting's name, since the file may be
    repaired."""
    options: dict[str, Any] = {
        "user": settings.nats_user,
        "password": settings.nats_password,
        "token": settings.nats_token,
    }
    setting, path = ("NATS_CREDS", settings.nats_creds) if settings.nats_creds else ("NATS_NKEY", settings.nats_nkey)
    if path:
        try:
            text = Path(path).read_text()
            lines = text.splitlines()
            seed, jwt = (_line_below(lines, SEED), _line_below(lines, JWT)) if settings.nats_creds else (text, "")
            options["user_credentials"] = UserCredentials(UserKey(seed.strip()), jwt)
        except OSError as exc:
            raise _unusable_file(setting, path, exc.strerror) from None
        except ValueError:  # what it says may be a secret
            raise _unusable_file(setting, path, "it does not hold the credentials of a user") from None
    return {option: value for option, value in options.items() if value}


def tls_context(settings: Settings) -> ssl.SSLContext:
    """The TLS context with trusted CAs and the client certificate. Raises Temporary, as `credential_options` does."""
    ca, cert, key = settings.nats_ca, settings.nats_cert, settings.nats_key
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except OSError as exc:  # includes SSLError
        raise _unusable_file("NATS_CA", ca, exc) from None
    if cert:
        try:
            context.load_cert_chain(cert, key or None)
        except OSError as exc:
            raise _unusable_file("NATS_CERT and NATS_KEY", f"{cert}, {key}", exc) from None
    return context


def _line_below(lines: list[str], mark: str) -> str:
    """The line below the one that contains `mark`. Raises ValueError."""
    found = next((below for line, below in itertools.pairwise(lines) if mark in line), "")
    if not found:
        raise ValueError(mark)
    return found


def _unusable_file(setting: str, path: str, why: object) -> Temporary:
    """`why` must not contain the file's content."""
    return Temporary("bus_credentials", f"{setting} cannot be used ({path}: {why})")


_USER = 20 << 3
_USER_SEED = bytes((18 << 3 | _USER >> 5, _USER << 3 & 0xFF))


class UserKey:
    """The key of a user. `public` names the user."""

    def __init__(self, seed: str) -> None:
        """Raises ValueError."""
        raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        if len(raw) != 36 or raw[:2] != _USER_SEED or raw[-2:] != _crc(raw[:-2]):
            raise ValueError("no seed of a user")
        self._key = Ed25519PrivateKey.from_private_bytes(raw[2:-2])
        named = bytes((_USER,)) + self._key.public_key().public_bytes_raw()
        self.public = base64.b32encode(named + _crc(named)).decode()

    def sign(self, nonce: str) -> bytes:
        """The signature in base64, as CONNECT has it."""
        return base64.b64encode(self._key.sign(nonce.encode()))


def _crc(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0).to_bytes(2, "little")


class UserCredentials(NamedTuple):
    """A user of the server: by its JWT, or by its key alone. nats-py's option `user_credentials`."""

    key: UserKey
    jwt: str = ""
