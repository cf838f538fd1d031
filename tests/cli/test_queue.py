"""`queue drop`: what waits to be sent is deleted."""

from __future__ import annotations

from adapter.cli.bus import BusConnection
from adapter.cli.embedded import EmbeddedNats
from tests.cli.conftest import Command


async def test_drop_deletes_several(cli: Command, bus: BusConnection) -> None:
    seqs = [(await bus.nc.jetstream().publish("wechat.out.s1", b'{"text":"hi"}')).seq for _ in range(3)]
    result = await cli("queue", "drop", str(seqs[0]), str(seqs[2]), "9")
    assert (result.code, result.out) == (1, f"{seqs[0]}  dropped\n{seqs[2]}  dropped\n")
    assert result.err == "wechat-nats: There is no waiting command 9.\n"
    assert await bus.read_stored(bus.names.stream_out, ">", keep=lambda one: one.seq) == [seqs[1]]
    assert (await cli("queue", "drop")).code == 2


async def test_without_the_stream_it_is_3(cli: Command, server: EmbeddedNats) -> None:
    result = await cli("queue", "drop", "1")
    assert (result.code, "WECHAT_OUT" in result.err) == (3, True)
