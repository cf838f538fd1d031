"""Identifiers in the forms that iLink uses, and the encodings that a server can check."""

import base64
import binascii
import hashlib
import itertools
import random
import re
import string
import struct

URL_SAFE = string.ascii_letters + string.digits + "-_"
BASE64 = string.ascii_letters + string.digits + "+/"
PRODUCT = r"[A-Za-z0-9_.-]{1,32}/[A-Za-z0-9_.+-]{1,32}( \([ -'*-~]{1,64}\))?"
BOT_AGENT = re.compile(f"{PRODUCT}( {PRODUCT})*")
DEFAULT_BOT_AGENT = "OpenClaw"
SEAL = 16
"""Bytes that show who has issued a cursor."""
FIRST_MESSAGE_ID = 7497484083968569737
"""Odd, and so is every later one: a client that reads ids as doubles gets every one of them wrong."""


def new_user(rng: random.Random) -> str:
    """Has an upper-case letter for sure: whoever lowercases ids is found out (T #243)."""
    return f"o9cq80{chars(rng, URL_SAFE, 21)}U@im.wechat"


def new_bot(rng: random.Random) -> str:
    return f"{rng.getrandbits(48):012x}@im.bot"


def new_token(rng: random.Random, bot: str) -> str:
    return f"{bot}:06{rng.getrandbits(160):040x}"


def new_context_token(rng: random.Random) -> str:
    return f"AARzJW{chars(rng, BASE64, 130)}"


def new_client_id(rng: random.Random, user: str, position: int, at_ms: int) -> str:
    """As WeChat names what a user sends: some 110 characters."""
    name = user.partition("@")[0]
    return f"mmassistant_bypmsg_inbox_{rng.getrandbits(128):032x}mm{name}@weclaw_{position}_{at_ms // 1000}"


def new_item_id(rng: random.Random) -> str:
    """Of an item, and of nothing else: no other id is like it."""
    return f"v1:{rng.getrandbits(64)}"


def new_ticket(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(33)).decode()


def new_qrcode(rng: random.Random) -> str:
    return f"{rng.getrandbits(128):032x}"


def chars(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def message_ids(rng: random.Random) -> "itertools.count[int]":
    """Starts at a random place, so that two runs hardly ever meet."""
    return itertools.count(FIRST_MESSAGE_ID + 2 * rng.getrandbits(48), 2)


def written(message_id: int | str, style: str, turn: int) -> int | str:
    """As JSON number or string; `alternate`: a string at every odd `turn`. What is no number stays as it is."""
    as_number = style == "number" or (style == "alternate" and turn % 2 == 0)
    return int(message_id) if as_number and str(message_id).isdecimal() else str(message_id)


class Cursors:
    """Opaque text of some 120 characters that only the server that issued it can read. The bot's token
    stands in it, as in those of iLink that others have captured: whoever keeps or logs one keeps a secret."""

    def __init__(self, rng: random.Random) -> None:
        self._key = rng.randbytes(32)

    def write(self, bot: str, token: str, position: int, salt: int = 0) -> str:
        """`position` counts the bot's messages so far; another `salt` gives other text of the same meaning."""
        body = struct.pack(">QQ", position, salt) + token.encode()
        return base64.b64encode(body + self._seal(bot, body)).decode()

    def read(self, bot: str, cursor: str) -> int | None:
        """The position, or None for garbage, another bot's cursor or another server's."""
        try:
            raw = base64.b64decode(cursor, validate=True)
        except (binascii.Error, ValueError):
            return None
        if len(raw) < 16 + SEAL or raw[-SEAL:] != self._seal(bot, raw[:-SEAL]):
            return None
        return int(struct.unpack(">QQ", raw[:16])[0])

    def _seal(self, bot: str, body: bytes) -> bytes:
        return hashlib.blake2b(bot.encode() + b"\0" + body, digest_size=SEAL, key=self._key).digest()


def read_uin(header: str) -> int | None:
    """The uint32 behind `X-WECHAT-UIN`, or None where it is not base64 of its plain decimal text."""
    try:
        text = base64.b64decode(header, validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return None
    if not text.isdigit() or len(text) > 10 or (len(text) > 1 and text[0] == "0"):
        return None
    return number if (number := int(text)) < 2**32 else None


def read_version(header: str) -> tuple[int, int, int] | None:
    """Major, minor and patch behind `iLink-App-ClientVersion`, or None; 0 is what broken builds sent."""
    if not header.isascii() or not header.isdigit() or len(header) > 8:
        return None
    number = int(header)
    if not 0 < number < 2**24:
        return None
    return number >> 16, number >> 8 & 0xFF, number & 0xFF


def is_bot_agent(value: object) -> bool:
    """Whether it is in the User-Agent style that `bot_agent` has, or what the official client falls back to."""
    if not isinstance(value, str):
        return False
    return value == DEFAULT_BOT_AGENT or (len(value.encode()) <= 256 and BOT_AGENT.fullmatch(value) is not None)
