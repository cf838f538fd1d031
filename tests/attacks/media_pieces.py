"""A sandbox uploads media as fast as the server reads: pieces of a megabyte, then pieces that the contract allows.

What is stored may fill the share of the media; messages, sends and leases of others must not wait for the bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from adapter.contract.names import H_OFFSET, H_UPLOAD
from adapter.services.media import PIECE_MAX
from tests.attacks.rig import ATTACKER, NAMES, Rig, publish

LARGE = 1_000_000


async def attack(rig: Rig) -> None:
    for size in (LARGE, PIECE_MAX):
        done = await rig.flood(_pieces(size), seconds=rig.seconds / 2)
        rig.note(f"{done.written / rig.seconds * 2 / 1e6:,.0f} MB/s of {size // 1000} kB")


def _pieces(size: int) -> Iterator[bytes]:
    payload = bytes(size)
    for number in itertools.count():
        headers = {H_UPLOAD: f"{size}-{number}", H_OFFSET: "0"}
        yield publish(NAMES.svc(f"media.put.{ATTACKER}"), payload, reply=f"_INBOX_{ATTACKER}.x", headers=headers)
