"""AES-128-ECB with PKCS#7, written out: a second opinion on what the simulator takes from a library.

All blocks are worked on at once, byte place by byte place, with `bytes.translate`: ten megabytes take a second.
"""

from functools import reduce
from itertools import accumulate

BLOCK = 16
ROUNDS = 10


def times(a: int, b: int) -> int:
    """The product in GF(2^8) with AES's polynomial."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


POWERS_OF_3 = list(accumulate([3] * 254, times, initial=1))
"""Every byte but 0 in an order in which the inverse stands as far from the end as the byte from the start."""


def substitute(value: int) -> int:
    """The S-box of one byte: its inverse, then the affine map."""
    inverse = POWERS_OF_3[-POWERS_OF_3.index(value)] if value else 0
    turns = (inverse << shift | inverse >> 8 - shift for shift in range(5))
    return reduce(lambda a, b: a ^ b, turns) & 0xFF ^ 0x63


SBOX = bytes(substitute(value) for value in range(256))
INVERSE_SBOX = bytes(SBOX.index(value) for value in range(256))
XOR = [bytes(value ^ key for value in range(256)) for key in range(256)]
TIMES = {factor: bytes(times(value, factor) for value in range(256)) for factor in (1, 2, 3, 9, 11, 13, 14)}
MIX = (2, 3, 1, 1)
UNMIX = (14, 11, 13, 9)
SHIFT = [(place + 4 * (place % 4)) % BLOCK for place in range(BLOCK)]
UNSHIFT = [SHIFT.index(place) for place in range(BLOCK)]

Planes = list[bytes]
"""For each of the 16 places in a block, the bytes of all blocks at that place."""


def encrypt(plain: bytes, key: bytes) -> bytes:
    """Always pads, by a whole block where `plain` fills its last one."""
    padding = BLOCK - len(plain) % BLOCK
    planes = split(plain + bytes([padding]) * padding)
    first, *middle, last = round_keys(key)
    planes = add(planes, first)
    for round_key in middle:
        planes = [planes[place].translate(SBOX) for place in SHIFT]
        planes = add(mix(planes, MIX), round_key)
    return join(add([planes[place].translate(SBOX) for place in SHIFT], last))


def decrypt(data: bytes, key: bytes) -> bytes:
    """Raises ValueError for a wrong length or padding."""
    if not data or len(data) % BLOCK:
        raise ValueError("not a multiple of 16 bytes")
    first, *middle, last = round_keys(key)
    planes = add(split(data), last)
    for round_key in reversed(middle):
        planes = add([planes[place].translate(INVERSE_SBOX) for place in UNSHIFT], round_key)
        planes = mix(planes, UNMIX)
    padded = join(add([planes[place].translate(INVERSE_SBOX) for place in UNSHIFT], first))
    padding = padded[-1]
    if not 1 <= padding <= BLOCK or padded[-padding:] != bytes([padding]) * padding:
        raise ValueError("wrong padding")
    return padded[:-padding]


def round_keys(key: bytes) -> list[bytes]:
    """Eleven keys of 16 bytes. Raises ValueError for a key of another length."""
    if len(key) != BLOCK:
        raise ValueError("the key must have 16 bytes")
    words = [key[start : start + 4] for start in range(0, BLOCK, 4)]
    constant = 1
    while len(words) < 4 * (ROUNDS + 1):
        word = words[-1]
        if len(words) % 4 == 0:
            word = (word[1:] + word[:1]).translate(SBOX)
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = times(constant, 2)
        words.append(bytes(a ^ b for a, b in zip(words[-4], word, strict=True)))
    return [b"".join(words[start : start + 4]) for start in range(0, len(words), 4)]


def split(data: bytes) -> Planes:
    return [data[place::BLOCK] for place in range(BLOCK)]


def join(planes: Planes) -> bytes:
    data = bytearray(BLOCK * len(planes[0]))
    for place, plane in enumerate(planes):
        data[place::BLOCK] = plane
    return bytes(data)


def add(planes: Planes, round_key: bytes) -> Planes:
    return [plane.translate(XOR[byte]) for plane, byte in zip(planes, round_key, strict=True)]


def mix(planes: Planes, factors: tuple[int, ...]) -> Planes:
    """MixColumns, or its inverse, of every column of every block."""
    size = len(planes[0])
    mixed = []
    for place in range(BLOCK):
        column, row = place - place % 4, place % 4
        terms = (planes[column + (row + n) % 4].translate(TIMES[factors[n]]) for n in range(4))
        total = reduce(lambda a, b: a ^ b, (int.from_bytes(term) for term in terms))
        mixed.append(total.to_bytes(size))
    return mixed
