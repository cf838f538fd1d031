"""Signatures with an NKey of a user, by which NATS knows who connects.

A seed is base32 of two bytes that tell its kind, an ed25519 seed and a CRC (https://github.com/nats-io/nkeys). The
package `nkeys` is had as source only: to build it runs a setuptools that nothing pins.
"""

from __future__ import annotations

import base64
import binascii

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
