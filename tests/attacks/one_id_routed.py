"""A service sends commands without a sandbox and with one id over plain `wechat.out`, whose router ends them.

Each command has its receipt, and those of others are routed meanwhile.
"""

from __future__ import annotations

from adapter.contract.names import UNROUTED
from tests.attacks import one_id
from tests.attacks.rig import NAMES, Rig


async def attack(rig: Rig) -> None:
    await one_id.flood(rig, NAMES.out_plain, b'{"id":"x","text":"t"}', sender="service", told_as=UNROUTED)
