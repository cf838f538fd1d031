"""A person is erased from a bus that several replicas share, while one of them dies, and from the server's disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from nats.aio.client import Client

from adapter.contract.messages import Erase, Receipt
from adapter.contract.names import to_subject_token
from adapter.simulator import BotRecord
from tests.e2e.world import NAMES, World, eventually, stream, until, world

STREAMS = (
    *(NAMES.stream_in, NAMES.stream_out, NAMES.stream_event, NAMES.stream_dead),
    *(f"KV_{NAMES.persons}", f"KV_{NAMES.logins}", f"OBJ_{NAMES.media}"),
)


async def naming(nc: Client, *words: str) -> list[str]:
    """Subjects of what has one of the words in its body."""
    found: list[str] = []
    for name in STREAMS:
        stored = await stream(nc, name, ">")
        found += [subject for subject, data in stored if any(word.encode() in data for word in words)]
    return found


async def talked(made: World, nc: Client, sandboxes: int) -> dict[str, BotRecord]:
    """Each sandbox's person has written and was answered, and waits for another answer."""
    bots = {}
    for number in range(sandboxes):
        sandbox = f"s{number}"
        bots[sandbox] = made.sim.add_bot()
        assert (await made.bind(nc, sandbox, bots[sandbox])).outcome == "applied"
        for text in ("one", "two", "three"):
            made.say(sandbox, f"secret {text} of {sandbox}.")
    await made.settle(nc)
    for sandbox in bots:
        await made.command(nc, sandbox, f"a-{sandbox}")
    await made.settle(nc)
    return bots


async def erase(made: World, nc: Client, bot: BotRecord, sandbox: str = "_") -> Receipt:
    receipt = await made.control(nc, sandbox, Erase(user=bot.user))
    assert receipt.outcome == "applied", receipt
    return receipt


async def test_a_person_is_erased_whichever_replica_has_them(tmp_path: Path) -> None:
    """Conversations and bots are spread over three replicas; one alone carries the requests out."""
    async with world(tmp_path) as made:
        for _ in range(3):
            await made.add_adapter()
        nc = await made.nc()
        bots = await talked(made, nc, 6)
        for sandbox, bot in [*bots.items()][:3]:
            assert (await erase(made, nc, bot, sandbox if sandbox == "s0" else "_")).left == {}
        gone = [word for s in ("s0", "s1", "s2") for word in (bots[s].user, bots[s].bot, f"of {s}.", f"answer a-{s}")]
        assert await naming(nc, *gone) == []
        for adapter in made.adapters:  # what they have in memory, they write as they stop
            adapter.signal(15)
            assert await adapter.ended() == 0
        assert await naming(nc, *gone) == []
        for sandbox in ("s3", "s4", "s5"):
            assert len(await naming(nc, f"of {sandbox}.")) >= 1
        await nc.close()


async def test_a_person_is_erased_while_everybody_writes(tmp_path: Path) -> None:
    """The person, too, until their bot is unbound. Nobody else loses a word."""
    async with world(tmp_path, quota=0) as made:
        for _ in range(2):
            await made.add_adapter()
        nc = await made.nc()
        bots = await talked(made, nc, 4)
        is_erased = asyncio.Event()

        async def talk(sandbox: str) -> int:
            number = 0
            while not is_erased.is_set():
                number += 1
                made.say(sandbox, f"more {number} of {sandbox}.")
                await made.command(nc, sandbox, f"m-{sandbox}-{number}")
                await asyncio.sleep(0.005)
            return number

        async with asyncio.TaskGroup() as group:
            talking = {sandbox: group.create_task(talk(sandbox)) for sandbox in bots}
            await until(lambda: len(made.said["s0"]) > 100, "they talk")
            receipt = await erase(made, nc, bots["s0"])
            is_erased.set()
        assert receipt.left == {}
        del made.said["s0"], made.sent["s0"]
        await made.settle(nc)
        assert await naming(nc, bots["s0"].user, bots["s0"].bot, "of s0.") == []
        for sandbox in ("s1", "s2", "s3"):
            assert len(made.phone_texts(sandbox)) == talking[sandbox].result() + 1
        await nc.close()


async def test_an_erasure_waits_for_a_send_under_way(tmp_path: Path) -> None:
    """Its receipt and the person's record would come back with the person's id, token and text."""
    async with world(tmp_path, send_latency_ms=4000) as made:
        await made.add_adapter()
        nc, bot = await made.nc(), made.sim.add_bot()
        assert (await made.bind(nc, "s0", bot)).outcome == "applied"
        made.say("s0", "secret one of s0.")
        await made.settle(nc)
        await made.command(nc, "s0", "a-s0")
        await until(lambda: bool(made.sim.calls(bot.bot, "sendmessage")), "the request is out")
        assert (await erase(made, nc, bot)).left == {}
        made.adapters[0].signal(15)  # what it has in memory, it writes as it stops
        assert await made.adapters[0].ended() == 0
        assert await naming(nc, bot.user, bot.bot, "of s0.", "answer a-s0") == []
        await nc.close()


async def test_an_erasure_that_its_replica_did_not_survive_is_finished_by_the_next_one(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        bots = await talked(made, nc, 2)
        payload = msgspec.json.encode(Erase(user=bots["s0"].user, id="first"))
        await nc.jetstream().publish(NAMES.said("erase", "_"), payload)

        async def is_ending() -> bool:
            stored = await stream(
                nc, f"KV_{NAMES.bindings}", f"$KV.{NAMES.bindings}.{to_subject_token(bots['s0'].bot)}"
            )
            return not stored[-1][1]

        await eventually(is_ending, "the person's binding ends")
        await made.adapters[0].kill()
        await made.adapters[0].start()

        async def is_over() -> bool:
            return not await stream(nc, NAMES.stream_out, ">")

        await eventually(is_over, "it is carried on")
        assert await naming(nc, bots["s0"].user, bots["s0"].bot, "of s0.", "answer a-s0") == []
        assert len(await naming(nc, "of s1.")) >= 1
        await nc.close()


async def test_what_an_erased_person_wrote_is_not_on_the_servers_disk(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.add_adapter()
        nc = await made.nc()
        bots = await talked(made, nc, 2)
        assert on_disk(made, b"of s0.")
        await erase(made, nc, bots["s0"])
        assert on_disk(made, b"of s0.") == []
        assert on_disk(made, b"of s1.")
        await nc.close()


def on_disk(made: World, word: bytes) -> list[str]:
    """The files of the server that have a word."""
    files = [path for path in made.server.folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if word in path.read_bytes()]
