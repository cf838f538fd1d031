"""What services and sandboxes send, right and wrong: never a crash, never silence."""

from __future__ import annotations

from pathlib import Path

import msgspec

from adapter.contract.messages import FINAL_OUTCOMES, Receipt
from adapter.jetstream.topology import partition_consumer
from adapter.simulator import FaultRule
from tests.e2e.reading import inbox
from tests.e2e.world import NAMES, World, eventually, stream, until, world


async def final_of(made: World, ident: str) -> Receipt:
    """The final receipt of a command, once there is one."""
    nc = await made.nc()
    found: list[Receipt] = []

    async def is_there() -> bool:
        found[:] = [r for r in await made.receipts(nc) if r.command == ident and r.outcome in FINAL_OUTCOMES]
        return bool(found)

    await eventually(is_there, f"{ident} has a final receipt")
    await nc.close()
    (receipt,) = found
    return receipt


async def test_odd_commands_end_in_a_refusal_or_a_dead_letter_and_the_adapter_goes_on(tmp_path: Path) -> None:
    odd = {
        "bad-json": (NAMES.out("s1"), b'{"text": "hi"', "dead_lettered", "unreadable"),
        "not-utf8": (NAMES.out("s1"), b"\xff\xfe", "dead_lettered", "unreadable"),
        "no-text": (NAMES.out("s1"), b"{}", "refused", "invalid"),
        "wrong-type": (NAMES.out("s1"), b'{"text": 5}', "dead_lettered", "unreadable"),
        "other-sandbox": (NAMES.out("s1"), b'{"sandbox": "s2", "text": "hi"}', "refused", "invalid"),
        "too-large": (NAMES.out("s1"), b'{"text": "' + b"x" * 300_000 + b'"}', "dead_lettered", "too_large"),
        "too-long": (NAMES.out("s1"), b'{"text": "' + b"x" * 50_000 + b'"}', "refused", "too_long"),
        "unknown-sandbox": (NAMES.out("nobody"), b'{"text": "hi"}', "refused", "not_bound"),
        "bad-name": (NAMES.out("Upper"), b'{"text": "hi"}', "refused", "invalid"),
        "plain-no-sandbox": (NAMES.out_plain, b'{"text": "hi"}', "refused", "invalid"),
        "plain-bad-json": (NAMES.out_plain, b"nonsense", "dead_lettered", "unreadable"),
        "plain-unknown": (NAMES.out_plain, b'{"sandbox": "nobody", "text": "hi"}', "refused", "not_bound"),
    }
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        for ident, (subject, payload, _, _) in odd.items():
            await nc.jetstream().publish(subject, payload, headers={"Nats-Msg-Id": ident})
        await made.command(nc, "s1", "good")
        await made.settle(nc)
        for ident, (_, _, outcome, reason) in odd.items():
            receipt = await final_of(made, ident)
            assert (ident, receipt.outcome, receipt.reason) == (ident, outcome, reason)
        dead = [data for _, data in await stream(nc, NAMES.stream_dead, NAMES.dead_letters("WECHAT_OUT"))]
        assert sorted(dead) == sorted(
            payload for _, payload, outcome, _ in odd.values() if outcome == "dead_lettered"
        )
        assert (await final_of(made, "good")).outcome == "accepted"
        assert made.adapters[0].running


async def test_a_receipt_that_the_stream_refuses_is_kept_as_a_dead_letter(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        config = (await nc.jetstream().stream_info(NAMES.stream_event)).config
        await nc.jetstream().update_stream(config.evolve(max_msg_size=200))
        ack = await nc.jetstream().publish(NAMES.out("s1"), b'{"id":"c1","text":"hi"}')

        async def is_acknowledged() -> bool:
            return not await stream(nc, NAMES.stream_out, NAMES.out_of_sandbox("s1"))

        await eventually(is_acknowledged, "the command has ended")
        assert made.phone_texts("s1") == ["hi"]
        assert await made.receipts(nc) == []
        dead = await stream(nc, NAMES.stream_dead, NAMES.dead_letters(NAMES.stream_event))
        kept = [msgspec.json.decode(data, type=Receipt) for _, data in dead]
        finals = [(one.command, one.sequence, one.outcome) for one in kept if one.outcome in FINAL_OUTCOMES]
        assert finals == [("c1", ack.seq, "accepted")]
        await nc.close()


async def test_the_log_shows_by_its_id_what_became_of_each_message_and_command(tmp_path: Path) -> None:
    """At the default level, and without a word of them."""
    async with world(tmp_path) as made:
        nc, bot = await made.begun()
        message = (await inbox(nc, "s1"))[0].id
        publish = nc.jetstream().publish
        made.sim.set_fault(FaultRule(fault="F11", bot=bot.bot, count=1))
        for body in (
            {"id": "parked", "reply_to": message, "text": "canary"},
            {"id": "refused", "reply_to": message, "text": "canary", "sandbox": "s2"},
            {"id": "unreadable", "text": 7},
        ):
            await publish(NAMES.out("s1"), msgspec.json.encode(body))
        adapter = made.adapters[0]
        await until(lambda: len(adapter.lines("receipt.stored")) == 4, "each has a receipt, the bind, too")
        made.say("s1", "go on")
        await until(lambda: len(adapter.lines("receipt.stored")) == 5, "the parked one is sent")
        await publish(NAMES.out("s1"), msgspec.json.encode({"id": "parked", "text": "canary"}))
        await until(lambda: len(adapter.lines("receipt.stored")) == 6, "one is repeated")
        log = adapter.log.read_text()
    (published,) = [line for line in adapter.lines("inbound.published") if message in line["messages"]]
    assert published["sandbox"] == "s1"
    logged = [(line["command"], line["outcome"], line["reply_to"]) for line in adapter.lines("receipt.stored")]
    assert logged.pop(0)[1] == "applied"
    assert sorted(logged) == [
        ("parked", "accepted", ""),
        ("parked", "accepted", message),
        ("parked", "parked", message),
        ("refused", "refused", message),
        ("unreadable", "dead_lettered", ""),
    ]
    assert [line["id"] for line in adapter.lines("message.dead_lettered")] == ["unreadable"]
    assert [line["commands"] for line in adapter.lines("send.failed")] == [["parked"]]
    assert "canary" not in log


async def test_a_command_that_an_operator_drops_delays_nobody(tmp_path: Path) -> None:
    """One that an adapter has in hand is sent all the same; after a crash it is gone. Those behind it go on."""
    async with world(tmp_path, environ={"WECHAT_NATS_SEND_GAP_MS": "2000"}, quota=0) as made:
        nc, _ = await made.begun()
        js = nc.jetstream()

        async def settled() -> bool:
            info = await js.consumer_info(NAMES.stream_out, partition_consumer(NAMES.partition_of("s1")))
            return not info.num_pending and not info.num_ack_pending

        async def queue(*idents: str) -> int:
            """The sequence of the second one, once all are in the adapter's hand."""
            seqs = []
            for ident in idents:
                await made.command(nc, "s1", ident)
                seqs.append((await js.stream_info(NAMES.stream_out)).state.last_seq)
            await until(lambda: f"answer {idents[0]}" in made.phone_texts("s1"), "the first one is sent")
            return seqs[1]

        await js.delete_msg(NAMES.stream_out, await queue("k1", "k2", "k3"))
        await until(lambda: "answer k3" in made.phone_texts("s1"), "the last one is sent")
        await eventually(settled, "nothing is left")
        assert "answer k2" in made.phone_texts("s1")

        seq = await queue("k4", "k5", "k6")
        await made.adapters[0].kill()
        await js.delete_msg(NAMES.stream_out, seq)
        await made.adapters[0].start()
        await until(lambda: "answer k6" in made.phone_texts("s1"), "the last one is sent")
        await eventually(settled, "nothing is left")
        assert "answer k5" not in made.phone_texts("s1")
        finals = [receipt.command for receipt in await made.receipts(nc) if receipt.outcome in FINAL_OUTCOMES]
        assert sorted(finals) == ["k1", "k2", "k3", "k4", "k6"]
