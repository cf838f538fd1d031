"""`media get`: of what is stored at once, of a message's media when they are there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg

from adapter.cli.bus import BusConnection
from adapter.cli.send import WAIT_S
from adapter.contract.messages import MediaQuery
from adapter.contract.names import H_NEXT, H_SHA256
from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("options", "position", "wait_s"), [((), "", 0), (("--position", "4711.0"), "4711.0", WAIT_S)]
)
async def test_who_names_the_message_waits_for_its_media(
    cli: Command, bus: BusConnection, tmp_path: Path, options: tuple[str, ...], position: str, wait_s: float
) -> None:
    asked: list[MediaQuery] = []
    pieces = [b"one ", b"two"]

    async def answer(msg: Msg) -> None:
        asked.append(msgspec.json.decode(msg.data, type=MediaQuery))
        headers = {H_SHA256: hashlib.sha256(b"one two").hexdigest()} | ({} if asked[-1].after else {H_NEXT: "7"})
        await bus.nc.publish(msg.reply, pieces[len(asked) - 1], headers=headers)

    await bus.nc.subscribe("wechat.svc.media.get.s1", cb=answer)
    await bus.nc.flush()
    assert (await cli("media", "get", "s1/in/x", str(tmp_path / "x"), *options)).code == 0
    assert (tmp_path / "x").read_bytes() == b"one two"
    one = MediaQuery(object="s1/in/x", position=position, wait_s=wait_s)
    assert asked == [one, msgspec.structs.replace(one, after=7)]
