"""Commands that are stored a second time: the router's copies, and what `doctor --fix` brings to its shard.

A copy keeps the identity of its original in the header Wechat-Sealed, which only the adapter can write. The header
counts for that body in that sandbox.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import msgspec

from adapter.contract.headers import forwardable_headers
from adapter.contract.names import H_COMMAND, H_SEALED, digest
from adapter.errors import UNDECODABLE, Refused
from adapter.outbound.record import CommandRef
from adapter.security.seal import Sealer, copy_context

_decoder = msgspec.json.Decoder(CommandRef)
_encoder = msgspec.json.Encoder()


def copy_headers(
    original: CommandRef, headers: Mapping[str, str], data: bytes, sandbox: str, sealer: Sealer
) -> dict[str, str]:
    """The headers of a copy that goes to `sandbox`, without its Nats-Msg-Id. `headers`, `data`: of the original."""
    identity = sealer.seal(copy_context(sandbox, digest(data)), _encoder.encode(original).decode())
    return forwardable_headers(headers) | {H_COMMAND: original.id, H_SEALED: identity}


def identity_of(
    headers: Mapping[str, str], data: bytes, sandbox: str, sequence: int, time_ms: int, sealer: Sealer
) -> CommandRef:
    """The identity of the original for a copy, else that of the message itself, whose `id` is "".

    `sequence`, `time_ms`: at which the message is stored; a copy is a message whose identity has another sequence.
    """
    if sealed := headers.get(H_SEALED):
        # a sandbox may write any header: what does not open says nothing
        with contextlib.suppress(Refused, *UNDECODABLE):
            return _decoder.decode(sealer.open(copy_context(sandbox, digest(data)), sealed))
    return CommandRef(sequence=sequence, stored_ms=time_ms, id="")
