"""`tail`: beside the sandbox, from now on or from the past."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import pytest

from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.embedded import EmbeddedNats
from adapter.cli.options import moment, seconds
from adapter.cli.output import clock
from adapter.contract.messages import (
    BindingEvent,
    ImageItem,
    Inbound,
    Media,
    Outbound,
    OutImage,
    OutText,
    Receipt,
    TextItem,
    UnsupportedItem,
)
from adapter.settings import Settings
from tests.cli.conftest import Command, Result
from tests.cli.process import Running, started


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


async def arrive(bus: BusConnection, message: Inbound) -> None:
    await bus.js.publish(bus.names.inbox(message.sandbox), msgspec.json.encode(message))


async def shown(process: Running, bus: BusConnection, word: str) -> None:
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


async def test_all_that_is_stored(cli: Command, bus: BusConnection) -> None:
    for n in range(3):
        await arrive(bus, inbound(n, f"text {n}"))
    await arrive(bus, inbound(9, "elsewhere", "s2"))
    result = await cli("tail", "s1", "--all", "--count", "3", "--json")
    assert (result.code, texts(result)) == (0, ["text 0", "text 1", "text 2"])
    result = await cli("tail", "--all", "--count", "4", "--json")
    assert texts(result)[3] == "elsewhere"


async def test_since_a_while_ago(cli: Command, bus: BusConnection) -> None:
    await arrive(bus, inbound(1))
    assert (await cli("tail", "s1", "--since", "10m", "--count", "1")).code == 0


async def test_lines_for_people(cli: Command, bus: BusConnection) -> None:
    await arrive(bus, inbound(1, "two\nlines \x1b[31mred\x1b[0m 你好"))
    await arrive(bus, inbound(2, ""))
    first, second = (await cli("tail", "--all", "--count", "2")).out.splitlines()
    assert first.endswith(r"  s1  o9cq80…user  two⏎lines \x1b[31mred\x1b[0m 你好")
    assert second.endswith("  s1  o9cq80…user  [unsupported]")
    picture = ImageItem(media=Media(object="s1/in/abc-0", mime="image/png", size=7))
    await arrive(bus, msgspec.structs.replace(inbound(3, "look"), items=[TextItem(text="look"), picture]))
    *_, third = (await cli("tail", "--all")).out.splitlines()
    last = (await bus.js.stream_info("WECHAT_IN")).state.last_seq
    assert third.endswith(f"  look [image s1/in/abc-0, sequence {last}]")
    assert third.startswith(clock(1_760_000_000_003))


@pytest.mark.parametrize("sandbox", ["s1\n", "s1\x1b[2J"])
async def test_a_sandbox_that_is_no_sandbox_moves_no_cursor(cli: Command, bus: BusConnection, sandbox: str) -> None:
    odd = {"id": "i", "sandbox": sandbox, "bot": "b", "user": "u", "sent_at_ms": 1, "received_at_ms": 1, "text": "hi"}
    command = {"sandbox": sandbox, "text": "hi"}

    def publish() -> Awaitable[object]:
        return asyncio.gather(
            bus.nc.publish(bus.names.live("s1"), msgspec.json.encode(odd)),
            bus.nc.publish(bus.names.out_plain, msgspec.json.encode(command)),
        )

    reading = asyncio.create_task(cli("tail", "--commands", "--count", "2"))
    while not reading.done():
        await publish()
        await asyncio.wait([reading], timeout=0.1)
    result = await reading
    assert len(result.out.splitlines()) == 2
    assert result.out.replace("\n", "").isprintable()
    assert "unreadable" in result.out


async def test_events_too(cli: Command, bus: BusConnection) -> None:
    receipt = Receipt(command="c1", sandbox="s1", outcome="refused", reason="expired", user="u@im.wechat", at_ms=1)
    change = BindingEvent(sandbox="s1", bot="b", change="bound", at_ms=2)
    await bus.js.publish(bus.names.event("s1", "receipt"), msgspec.json.encode(receipt))
    await bus.js.publish(bus.names.event("s1", "binding"), msgspec.json.encode(change))
    for odd in (b"[]", b'{"at_ms":"\xff"}'):
        await bus.js.publish(bus.names.event("s1", "later"), odd)
    one, two, *odd_ones = (await cli("tail", "s1", "--events", "--all", "--count", "4")).out.splitlines()
    assert one.endswith("  s1  u  receipt: c1: refused  (expired)")
    assert two.endswith("binding: bot b, change bound")
    assert odd_ones == [f"unreadable: {size} bytes on wechat.event.s1.later" for size in (2, 13)]


async def test_what_is_stored_is_printed_in_order_and_that_is_all_unless_it_is_followed(
    cli: Command, bus: BusConnection
) -> None:
    assert (await cli("tail", "s1", "--all")).out == ""
    for n in range(3):
        await arrive(bus, inbound(n, f"text {n}"))
        receipt = Receipt(command=f"c{n}", sandbox="s1", outcome="refused", user="u", at_ms=n + 1)
        await bus.js.publish(bus.names.receipt("s1", f"c{n}"), msgspec.json.encode(receipt))
    result = await cli("tail", "s1", "--all", "--events")
    said = [line.partition("  s1  ")[2].split("  ", 1)[1] for line in result.out.splitlines()]
    assert result.code == 0
    assert said == [
        "text 0",
        "receipt: c0: refused  (no reason given)",
        "text 1",
        "receipt: c1: refused  (no reason given)",
        "text 2",
        "receipt: c2: refused  (no reason given)",
    ]
    async with started("tail", "s1", "--all", "-f") as process:
        assert process.stdout is not None
        for n in range(3):
            assert f"text {n}".encode() in await process.stdout.readline()
        await arrive(bus, inbound(9, "later"))
        assert b"later" in await process.stdout.readline()


async def test_commands_with_their_texts_where_that_is_asked_for(cli: Command, bus: BusConnection) -> None:
    result = await cli("tail", "--all", "--commands")
    assert (result.code, "--follow" in result.err) == (2, True)
    commands = [
        Outbound(text="an answer\x1b", user="u1@im.wechat"),
        Outbound(items=[OutText(text="look"), OutImage(name="cat.png", caption="a cat", data=b"x")]),
        Outbound(typing="on"),
    ]
    async with started("tail", "s1", "--commands") as process:
        assert process.stdout is not None
        reading = asyncio.create_task(process.stdout.readline())
        while not reading.done():
            await bus.nc.publish(bus.names.out("s1"), b'{"text":"listening?"}')
            await bus.nc.flush()
            await asyncio.wait([reading], timeout=0.1)
        for command in commands:
            await bus.nc.publish(bus.names.out("s1"), msgspec.json.encode(command))
        lines: list[str] = []
        while len(lines) < 3:
            line = (await process.stdout.readline()).decode()
            lines += [line.strip()] if "listening?" not in line else []
    assert [line.partition("→ ")[2] for line in lines] == [
        r"an answer\x1b",
        "look a cat [image cat.png]",
        "typing on",
    ]


async def test_too_few_in_time_is_4(cli: Command, bus: BusConnection) -> None:
    assert (await cli("tail", "--all", "--count", "1", "--timeout", "0.2")).code == 4


async def test_live_until_ctrl_c(bus: BusConnection) -> None:
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
