"""`tail`: beside the sandbox, from now on or from the past."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from pathlib import Path

import msgspec

from adapter.cli.bus import Bus, connected_bus
from adapter.cli.embedded import EmbeddedNats
from adapter.cli.options import moment, seconds
from adapter.contract.messages import BindingEvent, Inbound, Receipt, TextItem, UnsupportedItem
from adapter.settings import Settings
from tests.cli.conftest import Command, Result
from tests.cli.process import started


def inbound(n: int, text: str = "hello", sandbox: str = "s1") -> Inbound:
    items: list[TextItem | UnsupportedItem] = [TextItem(text=text)] if text else [UnsupportedItem(type=9)]
    return Inbound(
        id=f"m{n}",
        sandbox=sandbox,
        bot="bot1@im.bot",
        user="o9cq800kum_long_user@im.wechat",
        sent_at_ms=0,
        received_at_ms=1_760_000_000_000 + n,
        text=text,
        items=list(items),
    )


async def arrive(bus: Bus, message: Inbound) -> None:
    await bus.js.publish(bus.names.inbox(message.sandbox), msgspec.json.encode(message))


async def shown(process: Process, bus: Bus, word: str) -> None:
    """Publishes a word to the sandbox until the command prints it: then it listens."""
    line = msgspec.json.encode({"word": word})

    async def read() -> None:
        assert process.stdout is not None
        while (await process.stdout.readline()).strip() != line:
            pass

    reading = asyncio.create_task(read())
    while not reading.done():
        await bus.nc.publish(bus.names.live("s1"), line)
        await bus.nc.flush()
        await asyncio.wait([reading], timeout=0.1)
    await reading


def texts(result: Result) -> list[str]:
    return [row["text"] for row in result.rows]


async def test_all_that_is_stored(cli: Command, bus: Bus) -> None:
    for n in range(3):
        await arrive(bus, inbound(n, f"text {n}"))
    await arrive(bus, inbound(9, "elsewhere", "s2"))
    result = await cli("tail", "s1", "--all", "--count", "3", "--json")
    assert (result.code, texts(result)) == (0, ["text 0", "text 1", "text 2"])
    result = await cli("tail", "--all", "--count", "4", "--json")
    assert texts(result)[3] == "elsewhere"


async def test_since_a_while_ago(cli: Command, bus: Bus) -> None:
    await arrive(bus, inbound(1))
    assert (await cli("tail", "s1", "--since", "10m", "--count", "1")).code == 0


async def test_lines_for_people(cli: Command, bus: Bus) -> None:
    await arrive(bus, inbound(1, "two\nlines \x1b[31mred\x1b[0m 你好"))
    await arrive(bus, inbound(2, ""))
    first, second = (await cli("tail", "--all", "--count", "2")).out.splitlines()
    assert first.endswith(r"  s1  o9cq80…user  two⏎lines \x1b[31mred\x1b[0m 你好")
    assert second.endswith("  s1  o9cq80…user  [unsupported]")


async def test_lines_of_json_move_no_cursor_and_stay_lines(cli: Command, bus: Bus) -> None:
    said = "\x9b2J\x1b[2J\x7f\x85\u2028\u2029\u202e\u200f\u4f60\n"
    await arrive(bus, inbound(1, said))
    result = await cli("tail", "--all", "--count", "1", "--json")
    assert result.out.removesuffix("\n").isprintable()
    assert texts(result) == [said]


async def test_events_too(cli: Command, bus: Bus) -> None:
    receipt = Receipt(command="c1", sandbox="s1", outcome="refused", reason="expired", user="u@im.wechat", at_ms=1)
    change = BindingEvent(sandbox="s1", bot="b", change="bound", at_ms=2)
    await bus.js.publish(bus.names.event("s1", "receipt"), msgspec.json.encode(receipt))
    await bus.js.publish(bus.names.event("s1", "binding"), msgspec.json.encode(change))
    for odd in (b"[]", b'{"at_ms":"\xff"}'):
        await bus.js.publish(bus.names.event("s1", "later"), odd)
    one, two, *odd_ones = (await cli("tail", "s1", "--events", "--all", "--count", "4")).out.splitlines()
    assert one.endswith("  s1  u  receipt: c1: refused  (expired)")
    assert two.endswith("binding: bot=b change=bound")
    assert odd_ones == [f"unreadable: {size} bytes on wechat.event.s1.later" for size in (2, 13)]


async def test_too_few_in_time_is_4(cli: Command, bus: Bus) -> None:
    assert (await cli("tail", "--all", "--count", "1", "--timeout", "0.2")).code == 4


async def test_live_until_ctrl_c(bus: Bus) -> None:
    async with started("tail", "s1", "--json") as process:
        await shown(process, bus, "first")
        await arrive(bus, inbound(1, "live"))
        assert process.stdout is not None
        while b"word" in (line := await process.stdout.readline()):
            pass
        assert msgspec.json.decode(line, type=Inbound).text == "live"
        process.send_signal(2)
        _, err = await process.communicate()
        assert (process.returncode, err) == (130, b"")


async def test_a_reader_that_has_enough_is_no_error(bus: Bus, tmp_path: Path) -> None:
    for n in range(3):
        await arrive(bus, inbound(n))
    async with started("tail", "--all", "--count", "3") as process:
        assert process.stdout is not None
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined] # the reader leaves
        assert process.stderr is not None
        assert await process.stderr.read() == b""
        assert await process.wait() == 0


async def test_it_goes_on_after_the_server_was_gone(tmp_path: Path) -> None:
    first = EmbeddedNats(tmp_path)
    await first.start()
    port = int(first.url.rpartition(":")[2])
    async with started("tail", "s1", "--json", env={"NATS_URL": first.url}) as process:
        async with connected_bus(Settings(nats_url=(first.url,))) as bus:
            await shown(process, bus, "before")
        await first.stop()
        async with EmbeddedNats(tmp_path, port) as second, connected_bus(Settings(nats_url=(second.url,))) as bus:
            await shown(process, bus, "after")


def test_durations() -> None:
    assert [seconds(text) for text in ("30s", "10m", "2h", "3d", "1.5h")] == [30, 600, 7200, 259200, 5400]
    assert moment("1s") < moment("0s")
