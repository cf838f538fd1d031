"""What a message in an inbox carries for the adapter alone, sealed in the header Wechat-Sealed.

With it a message is whole by itself: whoever reads the inbox knows the context token, and where the media are.
"""

from __future__ import annotations

import msgspec

from adapter.contract.names import H_BOT, H_MSG_ID, H_SEALED
from adapter.errors import UNDECODABLE, Refused
from adapter.ports import MediaRef, StoredMessage
from adapter.security.seal import Sealer, inbox_context


class Sealed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The sealed part of a message."""

    token: str = ""
    """The context token; "" if iLink gave none."""
    media: tuple[MediaRef, ...] = ()
    """Media of the items on iLink's CDN."""

    def __repr__(self) -> str:
        return "Sealed()"  # keeps tokens and keys out of logs and tracebacks


_NOTHING = Sealed()
_decoder = msgspec.json.Decoder(Sealed)
_encoder = msgspec.json.Encoder()


def seal(sealer: Sealer, message: str, bot: str, sandbox: str, part: Sealed) -> str:
    """The value of the header. `message`: the id on the bus."""
    return sealer.seal(inbox_context(message, bot, sandbox), _encoder.encode(part).decode())


def unseal(sealer: Sealer, stored: StoredMessage, sandbox: str) -> Sealed:
    """The sealed part of a stored message of the sandbox's inbox; empty where there is none. Raises
    Refused("token_key") if no known key opens it, or it was changed."""
    headers = stored.headers
    if not (sealed := headers.get(H_SEALED, "")):
        return _NOTHING
    context = inbox_context(headers.get(H_MSG_ID, ""), headers.get(H_BOT, ""), sandbox)
    try:
        return _decoder.decode(sealer.open(context, sealed))
    except UNDECODABLE as exc:
        raise Refused("token_key", "The sealed part of the message cannot be read.") from exc
