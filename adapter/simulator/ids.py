"""Identifiers in the forms of iLink, and the checks of encodings that a server can make."""

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
"""Number of bytes that prove which server issued a cursor."""
FIRST_MESSAGE_ID = 7497484083968569737
"""The first id is odd, and so are all later ones: a client that reads ids as doubles gets each of them wrong."""


def new_user(rng: random.Random) -> str:
    """Always contains an upper-case letter, so that a client that lowercases ids fails (T #243)."""
    return f"o9cq80{chars(rng, URL_SAFE, 21)}U@im.wechat"


def new_bot(rng: random.Random) -> str:
    return f"{rng.getrandbits(48):012x}@im.bot"


def new_token(rng: random.Random, bot: str) -> str:
    return f"{bot}:06{rng.getrandbits(160):040x}"


def new_context_token(rng: random.Random) -> str:
    return f"AARzJW{chars(rng, BASE64, 130)}"


def new_client_id(rng: random.Random, user: str, position: int, at_ms: int) -> str:
    """The client id that WeChat gives a user's message: some 110 characters."""
    name = user.partition("@")[0]
    return f"mmassistant_bypmsg_inbox_{rng.getrandbits(128):032x}mm{name}@weclaw_{position}_{at_ms // 1000}"


def new_item_id(rng: random.Random) -> str:
    """The id of an item; no other kind of id has its form."""
    return f"v1:{rng.getrandbits(64)}"


def new_ticket(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(33)).decode()


def new_qrcode(rng: random.Random) -> str:
    return f"{rng.getrandbits(128):032x}"


def chars(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def message_ids(rng: random.Random) -> "itertools.count[int]":
    """Message ids from a random start, so that two runs rarely share an id."""
    return itertools.count(FIRST_MESSAGE_ID + 2 * rng.getrandbits(48), 2)


def written(message_id: int | str, style: str, turn: int) -> int | str:
    """The id as JSON number or string. `alternate` is a string at every odd `turn`. An id that is no number stays."""
    as_number = style == "number" or (style == "alternate" and turn % 2 == 0)
    return int(message_id) if as_number and str(message_id).isdecimal() else str(message_id)


class Cursors:
    """Opaque text of some 120 characters that only the issuing server can read. It contains the bot's token, as
    captured cursors of iLink do: a client that stores or logs a cursor stores or logs a secret."""

    def __init__(self, rng: random.Random) -> None:
        self._key = rng.randbytes(32)

    def write(self, bot: str, token: str, position: int, salt: int = 0) -> str:
        """`position` is the number of the bot's messages so far. Another `salt` gives other text of the same
        meaning."""
        body = struct.pack(">QQ", position, salt) + token.encode()
        return base64.b64encode(body + self._seal(bot, body)).decode()

    def read(self, bot: str, cursor: str) -> int | None:
        """The position, or None for garbage and for the cursor of another bot or another server."""
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
    """The uint32 in `X-WECHAT-UIN`, or None unless the header is base64 of its decimal text."""
    try:
        text = base64.b64decode(header, validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return None
    if not text.isdigit() or len(text) > 10 or (len(text) > 1 and text[0] == "0"):
        return None
    return number if (number := int(text)) < 2**32 else None


def read_version(header: str) -> tuple[int, int, int] | None:
    """Major, minor and patch in `iLink-App-ClientVersion`, or None. Broken clients sent 0."""
    if not header.isascii() or not header.isdigit() or len(header) > 8:
        return None
    number = int(header)
    if not 0 < number < 2**24:
        return None
    return number >> 16, number >> 8 & 0xFF, number & 0xFF


def is_bot_agent(value: object) -> bool:
    """Whether `value` has the User-Agent style of `bot_agent`, or is the fallback of the official client."""
    if not isinstance(value, str):
        return False
    return value == DEFAULT_BOT_AGENT or (len(value.encode()) <= 256 and BOT_AGENT.fullmatch(value) is not None)
