"""A sandbox that means ill, beside one that does not and shares its partition: the other one must not notice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import nats
import pytest
from nats.aio.client import Client

from adapter.contract.messages import FINAL_OUTCOMES
from adapter.contract.names import H_LAST, H_UPLOAD
from adapter.simulator import Simulator
from tests.bus.guarded import guarded
from tests.e2e.world import NAMES, World, audit, environ_of, eventually, fast, free_port, until, world

BAD = "bad"
NEIGHBOURS = (f"good{number}" for number in range(10_000))
GOOD = next(name for name in NEIGHBOURS if NAMES.partition_of(name) == NAMES.partition_of(BAD))
"""In the partition of the other one."""

HEADERS: dict[str, bytes] = {
    "a-status": b"Status: 409\r\nDescription: Consumer Deleted",
    "a-heartbeat": b"Status: 100\r\nNats-Last-Consumer: 99999",
    "an-end": b"Status: 404",
    "no-room": b"Status: 408\r\nNats-Pending-Messages: many",
    "another-place": b"Nats-Sequence: 1\r\nNats-Subject: wechat.part.5.out.other\r\nNats-Stream: WECHAT_EVENT",
    "a-deletion": b"KV-Operation: DEL\r\nNats-Marker-Reason: MaxAge",
    "no-token": b"(name): x\r\nna me: y\r\n: z\r\nk\xc3\xa9y: \xc3\xa9",
    "no-utf8": b"traceparent: \xff\xfe\xed\xa0\x80",
    "our-own": b"Wechat-Time-Ms: soon\r\nWechat-Sandbox: other\r\nWechat-Sequence: -1",
    "an-original": b"Wechat-Original: 9999999999999999999.1\r\nWechat-Command: another",
    "very-many": b"\r\n".join(b"h%d: x" % number for number in range(5000)),
    "very-long": b"traceparent: " + b"x" * 60_000,  # the server stores no more than 64 KiB
}


async def publish_raw(made: World, subject: str, headers: bytes, payload: bytes) -> None:
    """As no client library would: any bytes as headers. Returns once the server has them."""
    host, _, port = made.url.removeprefix("nats://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    block = b"NATS/1.0\r\n" + headers + b"\r\n\r\n"
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    writer.write(f"HPUB {subject} {len(block)} {len(block) + len(payload)}\r\n".encode() + block + payload + b"\r\n")
    writer.write(b"PING\r\n")
    async with asyncio.timeout(30):
        while not (line := await reader.readline()).startswith(b"PONG"):
            assert line.startswith(b"INFO"), line
    writer.close()


async def both(made: World) -> Client:
    """Both sandboxes bound, and the good one's user waits for an answer."""
    nc = await made.nc()
    for sandbox in (BAD, GOOD):
        await made.bind(nc, sandbox, made.sim.add_bot())
    made.say(GOOD, "hello")
    return nc


async def is_served(made: World, nc: Client, ident: str) -> None:
    """The good sandbox's next command reaches its user."""
    await made.command(nc, GOOD, ident)
    await until(lambda: f"answer {ident}" in made.phone_texts(GOOD), f"{ident} is shown")


async def wait_receipts(made: World, nc: Client, idents: set[str], outcomes: tuple[str, ...]) -> None:
    missing: set[str] = set()

    async def have_receipts() -> bool:
        missing.clear()
        missing.update(idents - {r.command for r in await made.receipts(nc) if r.outcome in outcomes})
        return not missing

    try:
        await eventually(have_receipts, "each command has its receipt")
    except AssertionError:
        raise AssertionError(f"no receipt of {outcomes}: {sorted(missing)}") from None


async def test_headers_are_a_strangers_words(tmp_path: Path) -> None:
    """Whatever stands in the headers of commands, also of parked and routed ones: they go their way, and the others
    of the partition theirs; also after a crash, when all of it is read back."""
    async with world(tmp_path) as made:
        adapter = await made.add_adapter()
        nc = await both(made)
        for ident, headers in HEADERS.items():
            for subject, name, body in (
                (NAMES.out(BAD), ident, ""),
                (NAMES.out_plain, f"plain-{ident}", f',"sandbox":"{BAD}"'),
            ):
                await publish_raw(made, subject, headers, f'{{"text":"x","id":"{name}"{body}}}'.encode())
        idents = {*HEADERS, *(f"plain-{ident}" for ident in HEADERS)}
        await wait_receipts(made, nc, idents, ("parked",))
        await is_served(made, nc, "after the tricks")

        await adapter.kill()
        await adapter.start()
        await is_served(made, nc, "after a crash")
        made.say(BAD, "now")
        await wait_receipts(made, nc, idents, ("accepted",))

        # and sent at once, not parked
        await publish_raw(made, NAMES.out(BAD), HEADERS["a-status"], b'{"text":"x","id":"again"}')
        await publish_raw(made, NAMES.out(BAD), HEADERS["no-token"], b'{"text":5,"id":"dead"}')
        await is_served(made, nc, "after all")
        finals = [r.command for r in await made.receipts(nc) if r.outcome in FINAL_OUTCOMES]
        assert len(finals) == len(set(finals))


async def flood(made: World, nc: Client, idents: list[str], *, sandbox: str = BAD) -> None:
    """Commands as fast as the server takes them, in this order."""
    made.sent[sandbox].extend(idents)
    stream = nc.jetstream(timeout=60, publish_async_max_pending=2000)
    acks = [
        await stream.publish_async(
            NAMES.out(sandbox), f'{{"text":"answer {ident}"}}'.encode(), headers={"Nats-Msg-Id": ident}
        )
        for ident in idents
    ]
    await asyncio.gather(*acks)


@pytest.mark.slow
async def test_a_sandbox_with_thousands_of_commands_delays_nobody(tmp_path: Path) -> None:
    """Its user is sent one message in a minute, so its commands wait for days. The other sandbox of the partition is
    served at once, also after a crash, when all of them are delivered again."""
    slowly = {"WECHAT_NATS_SENDS_PER_WINDOW": "0", "WECHAT_NATS_SEND_GAP_MS": "60000"}
    async with world(tmp_path, environ=slowly, quota=0) as made:
        adapter = await made.add_adapter()
        nc = await both(made)
        made.say(BAD, "hello")
        await flood(made, nc, [f"flood-{number}" for number in range(3000)])
        await is_served(made, nc, "during the flood")

        await adapter.kill()
        await adapter.start()
        await is_served(made, nc, "after a crash")
        assert len(made.sim.phone(made.bots[BAD].user)) < 10


@pytest.mark.slow
async def test_a_flood_keeps_its_order_and_its_receipts_whatever_breaks(tmp_path: Path) -> None:
    """More commands than are taken in hand at once: adapter and server are killed, and each is still sent once and
    in order."""
    async with world(tmp_path, environ={"WECHAT_NATS_SENDS_PER_WINDOW": "0"}, quota=0) as made:
        adapter = await made.add_adapter()
        nc = await both(made)
        made.say(BAD, "hello")
        await flood(made, nc, [f"flood-{number:04}" for number in range(600)])
        await until(lambda: len(made.phone_texts(BAD)) > 50, "some are sent")
        await adapter.kill()
        await adapter.start()
        await until(lambda: len(made.phone_texts(BAD)) > 250, "more are sent")
        made.server.kill()
        await made.server.start()
        await is_served(made, nc, "during the flood")
        await made.settle(nc)
        result = await audit(made, nc)
        await nc.close()
    assert result.faults() == []
    assert result.outcomes == {"accepted": 601}


async def test_who_has_the_connections_of_the_services_cut_cuts_nothing_else(tmp_path: Path) -> None:
    """As a server does where somebody sends more than is read: polls go on, and the services answer again."""
    async with guarded(tmp_path) as server, Simulator(fast()) as sim:
        environ = environ_of(server.url, sim) | server.users["adapter"].environ
        made = World(tmp_path, sim, server.url, environ | {"WECHAT_NATS_HTTP_ADDR": f"127.0.0.1:{free_port()}"})
        adapter = await made.add_adapter()
        try:
            platform, s1 = [await server.connect(who) for who in ("platform", "s1")]
            await made.bind(platform.nc, "s1", sim.add_bot())
            received = await s1.nc.subscribe(NAMES.live("s1"))
            await s1.nc.flush()
            await kick(server.url, ("services", "uploads"))
            await until(lambda: len(adapter.lines("bus.lost")) == 2, "both are lost")
            assert await adapter.unready() == {}
            made.say("s1", "hello")
            assert b"hello" in (await received.next_msg(timeout=30)).data

            async def both_answer() -> bool:
                put = {H_UPLOAD: "x", H_LAST: "true"}
                answers = await asyncio.gather(
                    s1.nc.request(NAMES.svc("window.s1"), timeout=2),
                    s1.nc.request(NAMES.svc("media.put.s1"), b"x", timeout=2, headers=put),
                    return_exceptions=True,
                )
                return not any(isinstance(one, BaseException) for one in answers)

            await eventually(both_answer, "both services answer")
            lost = {line["connection"].rpartition(" ")[2] for line in adapter.lines("bus.lost")}
            assert lost == {"services", "uploads"}
        finally:
            await made.close()


async def kick(url: str, links: tuple[str, ...]) -> None:
    """Ends connections of adapters, by the last word of their names."""
    sys = await nats.connect(url, user="sys", password="sys-secret")
    found = json.loads((await sys.request("$SYS.REQ.SERVER.PING.CONNZ", b"{}", timeout=10)).data)
    cids = [one["cid"] for one in found["data"]["connections"] if one.get("name", "").endswith(links)]
    assert len(cids) == len(links)
    for cid in cids:
        subject = f"$SYS.REQ.SERVER.{found['server']['id']}.KICK"
        await sys.request(subject, json.dumps({"cid": cid}).encode(), timeout=10)
    await sys.close()


MEAN = {
    "tabs": "a" + "\t" * 39_990 + "a",
    "quotes": ">" * 19 + "a\n" + "b\n" * 19_900,
    "brackets": "[" * 99 + "-+" * 19_900,
    "table": "|a" * 100 + "\n" + "|-" * 100 + "\n" + "a\n" * 19_000,
}
LOST = ("lease.paused", "lease.lost", "lease.expired")


async def test_a_text_that_takes_long_to_read_delays_nobody(tmp_path: Path) -> None:
    async with world(tmp_path, quota=0) as made:
        adapter = await made.add_adapter(WECHAT_NATS_SENDS_PER_WINDOW="0", WECHAT_NATS_PART_CHARS="4000")
        nc = await both(made)
        made.say(BAD, "hello")
        for name, text in MEAN.items():
            body = msgspec.json.encode({"text": text, "id": name})
            await nc.jetstream().publish(NAMES.out(BAD), body)
        await is_served(made, nc, "meanwhile")
        await wait_receipts(made, nc, set(MEAN), FINAL_OUTCOMES)
        assert [adapter.said(event) for event in LOST] == [0, 0, 0]
        await made.command(nc, BAD, "after all")
        await until(lambda: "answer after all" in made.phone_texts(BAD), "the bad one goes on")
