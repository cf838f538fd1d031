"""AES-128-ECB with PKCS#7, for what users send and for judging what clients send.

By a library, since media of 100 MB must not take ten seconds; it lets other threads run meanwhile.
"""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 16


def encrypt(plain: bytes, key: bytes) -> bytes:
    """Always pads, by a whole block where `plain` fills its last one."""
    padding = BLOCK - len(plain) % BLOCK
    encryptor = cipher(key).encryptor()
    return encryptor.update(plain) + encryptor.update(bytes([padding]) * padding) + encryptor.finalize()


def decrypt(data: bytes, key: bytes) -> bytes:
    """Raises ValueError for a wrong length or padding."""
    if not data or len(data) % BLOCK:
        raise ValueError("not a multiple of 16 bytes")
    decryptor = cipher(key).decryptor()
    padded = decryptor.update(data) + decryptor.finalize()
    padding = padded[-1]
    if not 1 <= padding <= BLOCK or padded[-padding:] != bytes([padding]) * padding:
        raise ValueError("wrong padding")
    return padded[:-padding]


def cipher(key: bytes) -> Cipher[modes.ECB]:
    """Raises ValueError for a key of another length."""
    if len(key) != BLOCK:
        raise ValueError("the key must have 16 bytes")
    return Cipher(algorithms.AES(key), modes.ECB())
