"""iLink's media encryption: AES-128-ECB with PKCS#7 in pieces, and the encodings of keys.

docs/reference/ilink-protocol.md, "Encryption", has the table of keys. The phones require ECB; the adapter's own data
are not protected by it.
"""

from __future__ import annotations

import base64
import binascii
import re

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from adapter.errors import Refused

BLOCK = 16
KEY_BYTES = 16
_URL_SAFE = str.maketrans("-_", "+/")
_HEX_KEY = re.compile(r"[0-9a-fA-F]{32}")


def cipher_size(size: int) -> int:
    """Size of `size` plain bytes after encryption: the padding always adds 1 to 16 bytes."""
    return (size // BLOCK + 1) * BLOCK


class Encryption:
    """Encrypts pieces; call `finish` once for the rest and the padding."""

    def __init__(self, key: bytes) -> None:
        self._padder = PKCS7(BLOCK * 8).padder()
        self._cipher = _cipher(key).encryptor()

    def update(self, piece: bytes) -> bytes:
        return self._cipher.update(self._padder.update(piece))

    def finish(self) -> bytes:
        return self._cipher.update(self._padder.finalize()) + self._cipher.finalize()


class Decryption:
    """Decrypts pieces; call `finish` once. If it fails, the earlier output is invalid."""

    def __init__(self, key: bytes) -> None:
        self._cipher = _cipher(key).decryptor()
        self._unpadder = PKCS7(BLOCK * 8).unpadder()

    def update(self, piece: bytes) -> bytes:
        return self._unpadder.update(self._cipher.update(piece))

    def finish(self) -> bytes:
        """Raises Refused("corrupt") for a truncated or foreign file, or a wrong key."""
        try:
            rest = self._unpadder.update(self._cipher.finalize())
            return rest + self._unpadder.finalize()
        except ValueError:
            raise Refused("corrupt", "The media cannot be decrypted: wrong length or padding.") from None


def read_key(aes_key: str | None, hex_key: str | None = None) -> bytes | None:
    """The key of inbound media; None: the media are not encrypted.

    `hex_key` is `image_item.aeskey` and preferred. `aes_key` is `media.aes_key`: base64 of the 16 bytes or of their
    hex text, in either alphabet, with or without padding, as Node accepts it, on which the official client runs.
    Raises Refused("corrupt") if no form fits.
    """
    if hex_key and _HEX_KEY.fullmatch(hex_key):
        return bytes.fromhex(hex_key)
    if not aes_key:
        if not hex_key:
            return None
        raise _corrupt_media()
    try:
        text = aes_key.strip().translate(_URL_SAFE).rstrip("=")
        raw = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        key = raw if len(raw) == KEY_BYTES else bytes.fromhex(_hex_text(raw))
    except (binascii.Error, ValueError):
        raise _corrupt_media() from None
    return key


def write_key(key: bytes) -> str:
    """`media.aes_key` of an outbound item: base64 of the hex text (44 characters), as phones require it."""
    return base64.b64encode(key.hex().encode()).decode()


def _hex_text(raw: bytes) -> str:
    text = raw.decode("ascii")
    if not _HEX_KEY.fullmatch(text):
        raise ValueError
    return text


def _corrupt_media() -> Refused:
    return Refused("corrupt", "The key of the media cannot be read.")


def _cipher(key: bytes) -> Cipher[modes.ECB]:
    return Cipher(algorithms.AES(key), modes.ECB())
