"""The counts of replicas that share the bots agree with the bus: nothing ends without being counted, or twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import FINAL_OUTCOMES
from adapter.simulator import FaultRule
from tests.e2e.scrape import by_label, scrape
from tests.e2e.world import NAMES, World, eventually, free_port, inbox, stream, until, world

BOTS = 24
OUTCOMES = {*FINAL_OUTCOMES}
"""All of them come up here."""


async def publish(nc: Client, subject: str, body: bytes, ident: str) -> None:
    await nc.jetstream().publish(subject, body, headers={"Nats-Msg-Id": ident})


async def every_outcome(made: World, nc: Client, turn: str) -> int:
    """Makes each outcome come up; how many commands that took."""
    sim, bots = made.sim, made.bots
    sim.set_fault(FaultRule(fault="F13", bot=bots["s1"].bot, count=1))  # success without an id
    silent = bots["s2" if turn == "first" else "s9"].bot
    sim.set_fault(FaultRule(fault="F5", endpoint="sendmessage", bot=silent, count=2))  # no answer, twice
    made.sim.configure(bot=bots["s3"].bot, quota=1)
    commands = 0
    for number in range(BOTS):
        for part in range(2):
            await made.command(nc, f"s{number}", f"{turn}.{number}.{part}", plain=number % 3 == 0)
            commands += 1
    bodies = [
        (NAMES.out("s4"), b'{"typing":"on"}'),
        (NAMES.out("s4"), b'{"typing":"off"}'),
        (NAMES.out("s5"), b'{"items":[{"kind":"file","data":"aGk=","name":"a.txt"}]}'),
        (NAMES.out("s5"), b'{"items":[{"kind":"file","media":{"object":"s5/nothing"}}]}'),
        (NAMES.out("s6"), b"{"),
        (NAMES.out("s6"), b'{"text":""}'),
        (NAMES.out("nobody"), b'{"text":"hi"}'),
        (NAMES.out_plain, b"no JSON"),
        (NAMES.out_plain, b'{"text":"for whom?"}'),
        (NAMES.out_plain, b'{"text":"hi","sandbox":"nobody"}'),
        (NAMES.out("s7"), msgspec.json.encode({"text": "again", "id": f"{turn}.again"})),
        (NAMES.out("s7"), msgspec.json.encode({"text": "again", "id": f"{turn}.again"})),
    ]
    for number, (subject, body) in enumerate(bodies):
        await publish(nc, subject, body, f"{turn}.body.{number}")
    return commands + len(bodies)


@pytest.mark.slow  # a request without an answer is repeated after a minute
async def test_what_was_taken_is_what_ended_waits_or_is_in_hand_over_all_replicas(tmp_path: Path) -> None:
    """accepted + accepted_unconfirmed + refused + uncertain + dead_lettered + duplicate + parked + in flight = sent.

    Each that ended has its receipt, also while partitions move from one replica to another.
    """
    ports = [free_port(), free_port()]
    async with world(tmp_path, environ={"WECHAT_NATS_SEND_TIMEOUT_S": "1"}) as made:
        await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{ports[0]}")
        nc = await made.nc()
        for number in range(BOTS):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        for number in range(BOTS):
            if number != 8:  # somebody who has not written yet
                made.say(f"s{number}", "hello")

        async def all_stored() -> bool:
            return len(await inbox(nc, "*")) == BOTS - 1

        await eventually(all_stored, "all have been heard")
        first = await every_outcome(made, nc, "first")
        second = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{ports[1]}")
        await until(lambda: "partitions.taken" in second.log.read_text(), "the second replica has its share")
        taken = BOTS + first + await every_outcome(made, nc, "second")  # binds count, too

        values: dict[str, float] = {}

        async def at_rest() -> bool:  # gauges are counted every few seconds, and two replicas not at the same moment
            nonlocal values
            values = await scrape(*ports)
            ended = values["outbound_messages_total"] + values["outbound_parked"]
            return ended == taken and not values["outbound_in_flight"]

        # a send without an answer is repeated after five minutes at the latest
        await eventually(at_rest, "all that was taken has ended or is parked", patience_s=400)
        outcomes = by_label(values, "outbound_messages_total", "outcome")
        assert sum(outcomes.values()) + values["outbound_parked"] == taken
        # what was delivered to one replica while it gave the partition away, neither counts as taken
        assert BOTS + first < values["outbound_received_total"] <= taken
        assert set(outcomes) == OUTCOMES | {"duplicate"}
        assert outcomes.pop("duplicate") == 2
        receipts, bound = await made.receipts(nc), Counter(applied=BOTS)
        told = bound + Counter(receipt.outcome for receipt in receipts)
        assert by_label(values, "receipts_total", "outcome") == told
        by_outcome = bound + Counter(receipt.outcome for receipt in receipts if not receipt.repeat_of)
        del by_outcome["parked"]
        assert outcomes == by_outcome
        assert by_label(values, "outbound_messages_total", "kind").keys() == {
            *("text", "media", "typing", "unreadable", "bind"),
        }
        dead = await stream(nc, NAMES.stream_dead, NAMES.dead_letters("*"))
        assert values['dead_letters_total{stream="out"}'] == len(dead) == 4
        assert values["bindings"] == BOTS
        assert values["bindings_unowned"] == 0
