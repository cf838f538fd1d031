"""Commands that wait for a user who is not known yet, for a login, or for nobody at all: they keep their order and
end when they should, nobody else waits for them, and nothing is kept in memory of who is silent."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.contract.messages import FINAL_OUTCOMES, Bind, BindingEvent, Receipt
from adapter.jetstream.topology import partition_consumer
from adapter.simulator import BotRecord
from tests.e2e.world import NAMES, SOON, TOKEN_KEY, World, eventually, inbox, stream, until, world

FEW_S = 3.0
"""How long what waits for nobody may take on a machine that does other things, too."""
NOBODY = "nobody@im.wechat"


class ReceiptLog:
    """The receipts as their author hears them, and when."""

    def __init__(self) -> None:
        self.received: dict[str, list[Receipt]] = {}
        """By command."""
        self.ended_at: dict[str, float] = {}
        """Monotonic time of its first final receipt, by command."""

    async def listen(self, nc: Client) -> None:
        await nc.subscribe(NAMES.receipts("*"), cb=self._on_receipt, pending_msgs_limit=0, pending_bytes_limit=0)
        await nc.flush()

    async def _on_receipt(self, msg: Msg) -> None:
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        self.received.setdefault(receipt.command, []).append(receipt)
        if receipt.outcome in FINAL_OUTCOMES:
            self.ended_at.setdefault(receipt.command, time.monotonic())

    def finals(self, ident: str) -> list[Receipt]:
        return [one for one in self.received.get(ident, ()) if one.outcome in FINAL_OUTCOMES]

    async def end(self, *idents: str, within_s: float = 30.0) -> list[Receipt]:
        """Their final receipts, once all have one; each has no other."""
        what = f"{len(idents)} commands from {idents[0]} on have ended"
        await until(lambda: self.ended_at.keys() >= set(idents), what, patience_s=within_s)
        finals = [self.finals(ident) for ident in idents]
        assert all(len(found) == 1 for found in finals)
        return [found[0] for found in finals]


async def put(nc: Client, ident: str, sandbox: str = "s1", **body: Any) -> int:
    """A command that has its id in its body; its sequence."""
    payload = msgspec.json.encode({"id": ident, "text": f"answer {ident}", **body})
    return (await nc.jetstream().publish(NAMES.out(sandbox), payload)).seq


def ends(receipts: Sequence[Receipt]) -> set[tuple[str, str]]:
    return {(receipt.outcome, receipt.reason) for receipt in receipts}


def waited_s(receipt: Receipt) -> float:
    return (receipt.at_ms - receipt.received_at_ms) / 1000


@contextlib.asynccontextmanager
async def started(folder: Path, **settings: Any) -> AsyncIterator[tuple[World, Client, ReceiptLog]]:
    """One adapter that serves nobody yet."""
    async with world(folder, **settings) as made:
        await made.add_adapter()
        nc, log = await made.nc(), ReceiptLog()
        await until(lambda: made.adapters[0].said("adapter.started") > 0, "the adapter has started")
        await log.listen(nc)
        yield made, nc, log


async def bind_unknown(made: World, nc: Client, sandbox: str = "s1") -> BotRecord:
    """Binds a bot whose user is not named."""
    bot = made.bots[sandbox] = made.sim.add_bot()
    receipt = await made.control(nc, sandbox, Bind(bot=bot.bot, bot_token=bot.token))
    assert receipt.outcome == "applied"
    return bot


async def is_empty(nc: Client) -> bool:
    return await stream(nc, NAMES.stream_out, ">") == []


async def delivered(nc: Client, *sandboxes: str) -> None:
    """Returns when an adapter has every command of these sandboxes in hand."""

    async def is_nothing_pending() -> bool:
        names = {partition_consumer(NAMES.partition_of(sandbox)) for sandbox in sandboxes}
        infos = [await nc.jetstream().consumer_info(NAMES.stream_out, name) for name in names]
        return not any(info.num_pending for info in infos)

    await eventually(is_nothing_pending, "every command is delivered")


async def changed(nc: Client, sandbox: str, bot: str, change: str) -> None:
    """Returns when the sandbox was told so of a bot."""

    async def is_published() -> bool:
        found = [
            msgspec.json.decode(data, type=BindingEvent) for _, data in await stream(nc, NAMES.stream_event, event)
        ]
        return any((one.bot, one.change) == (bot, change) for one in found)

    event = NAMES.event(sandbox, "binding")
    await eventually(is_published, f"{bot} is told to be {change}")


# a bot that cannot be used -----------------------------------------------------------------------------------


OTHER_KEY = base64.b64encode(bytes(range(1, 33))).decode()


async def unusable(made: World, nc: Client, why: str) -> BotRecord:
    """A bot of s1 that an adapter, started here, cannot use. Its user has written to it, unless nobody knows them."""
    bot = made.sim.add_bot()
    named = None if why == "nobody has written" else bot.user
    if why == "its token is sealed":  # one of two: a key that opens less than half is not the one of this bus
        other = made.sim.add_bot()
        first = await made.add_adapter()
        await made.control(nc, "s2", Bind(bot=other.bot, bot_token=other.token, user=other.user))
        await first.kill()
        key = f"{OTHER_KEY},{TOKEN_KEY}"
    else:
        key = TOKEN_KEY
    adapter = await made.add_adapter(WECHAT_NATS_TOKEN_KEY=key)
    receipt = await made.control(nc, "s1", Bind(bot=bot.bot, bot_token=bot.token, user=named))
    assert receipt.outcome == "applied"
    if named is not None:
        made.sim.say(bot.bot, "hello")

        async def is_stored() -> bool:
            return len(await inbox(nc, "s1")) == 1

        await eventually(is_stored, "it is heard")
    if why != "its token is sealed":
        made.sim.kill_token(bot.bot)
        await changed(nc, "s1", bot.bot, "needs_login")
    else:
        await adapter.kill()
        await made.add_adapter()
    return bot


@pytest.mark.parametrize("why", ["its token is dead", "its token is sealed", "nobody has written"])
async def test_commands_for_a_bot_that_cannot_be_used_delay_nobody_and_expire(tmp_path: Path, why: str) -> None:
    expires_s = 6.0
    async with world(tmp_path, parts=SOON) as made:
        nc, log = await made.nc(), ReceiptLog()
        dead = await unusable(made, nc, why)
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        await log.listen(nc)
        idle = [f"idle-{number}" for number in range(20)]
        address = {"bot": dead.bot} if why == "nobody has written" else {"user": dead.user}
        for ident in idle:
            await put(nc, ident, expires_in_s=expires_s, **address)
        await put(nc, "other", user=made.bots["s1"].user)
        (other,) = await log.end("other", within_s=FEW_S)
        assert other.outcome == "accepted"
        assert not log.ended_at.keys() & set(idle)
        finals = await log.end(*idle, within_s=expires_s + 2 * FEW_S)
        assert ends(finals) == {("refused", "expired")}
        assert all(expires_s <= waited_s(receipt) < expires_s + FEW_S for receipt in finals)
        await eventually(lambda: is_empty(nc), "every command is acknowledged")


async def test_a_command_with_a_wrong_bot_ends_while_binds_arrive_without_a_pause(tmp_path: Path) -> None:
    async with started(tmp_path) as (made, nc, log):
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        bots = [made.sim.add_bot() for _ in range(5)]
        over = asyncio.Event()

        async def waiting_binds() -> int:
            return len(await stream(nc, NAMES.stream_out, f"{NAMES.prefix}.part.*.bind.*"))

        async def bind_on() -> None:
            """Never fewer than some, and not so many that the test has to wait for them."""
            for number in itertools.count():
                bot = bots[number % 5]
                bind = Bind(bot=bot.bot, bot_token=bot.token, check=False)
                await nc.publish(NAMES.said("bind", f"b{number % 5}"), msgspec.json.encode(bind))
                if number % 100 == 0:
                    while await waiting_binds() > 200:
                        await asyncio.sleep(0.01)
                    if over.is_set():
                        return

        async def are_behind() -> bool:
            return await waiting_binds() > 0

        async with asyncio.TaskGroup() as group:
            group.create_task(bind_on())
            for number in range(5):
                await eventually(are_behind, "binds wait to be applied")
                await put(nc, f"wrong-{number}", bot="stranger@im.bot")
                await put(nc, f"behind-{number}")
                (wrong,) = await log.end(f"wrong-{number}", within_s=FEW_S)
                assert (wrong.outcome, wrong.reason) == ("refused", "not_bound")
                assert (await log.end(f"behind-{number}", within_s=FEW_S))[0].outcome == "accepted"
            over.set()

        async def are_applied() -> bool:
            return not await waiting_binds()

        await eventually(are_applied, "they are applied, and the stream holds no token any more")


# a user who is not known -------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [False, True], ids=["stays", "taken over"])
async def test_what_is_stored_for_an_unknown_user_is_sent_in_order_once_they_write(
    tmp_path: Path, crash: bool
) -> None:
    """Its owner may die meanwhile. Commands go on while the user becomes known."""
    sandboxes = [f"s{number}" for number in range(12)]
    async with started(tmp_path, environ={"WECHAT_NATS_MERGE_CHARS": "0"}, quota=0) as (made, nc, log):
        bots = {sandbox: await bind_unknown(made, nc, sandbox) for sandbox in sandboxes}
        idents = {sandbox: [f"{sandbox}.{number}" for number in range(8)] for sandbox in sandboxes}
        for sandbox, bot in bots.items():
            await put(nc, idents[sandbox][0], sandbox)
            await put(nc, idents[sandbox][1], sandbox, bot=bot.bot)
            await put(nc, idents[sandbox][2], sandbox)
        await delivered(nc, *sandboxes)
        if crash:
            await made.adapters[0].kill()
            await made.add_adapter()
            await until(lambda: made.adapters[1].said("partitions.taken") > 0, "another one has taken over")
            await delivered(nc, *sandboxes)
        assert not log.ended_at
        assert made.sim.stats().sends == 0

        async def talk(sandbox: str) -> None:
            """The user writes while their agent goes on."""
            await put(nc, idents[sandbox][3], sandbox)
            made.say(sandbox, "hello")
            for ident in idents[sandbox][4:]:
                await put(nc, ident, sandbox)

        await asyncio.gather(*(talk(sandbox) for sandbox in sandboxes))
        finals = await log.end(*(ident for each in idents.values() for ident in each))
        assert ends(finals) == {("accepted", "")}
        shown = {sandbox: made.phone_texts(sandbox) for sandbox in sandboxes}
        assert shown == {sandbox: [f"answer {ident}" for ident in each] for sandbox, each in idents.items()}
        await eventually(lambda: is_empty(nc), "every command is acknowledged")


async def test_a_welcome_that_races_with_bind_and_first_message_always_ends(tmp_path: Path) -> None:
    """The user wrote before the bind, which does not name them. A welcome stored before it is nobody's."""
    async with started(tmp_path) as (made, nc, log):
        idents = [f"welcome-{number}" for number in range(60)]
        for number, ident in enumerate(idents):
            sandbox, bot = f"s{number}", made.sim.add_bot()
            made.bots[sandbox] = bot
            made.say(sandbox, f"hello of {sandbox}")
            bind = Bind(bot=bot.bot, bot_token=bot.token)
            await nc.jetstream().publish(NAMES.said("bind", sandbox), msgspec.json.encode(bind))
            await asyncio.sleep((number % 15) * 0.002)  # where it meets the bind, not a wait for something
            await put(nc, ident, sandbox)
            await asyncio.sleep(0.1)
        finals = await log.end(*idents, within_s=20)
        assert ends(finals) <= {("accepted", ""), ("refused", "not_bound")}
        assert ("accepted", "") in ends(finals)
        await eventually(lambda: is_empty(nc), "every command is acknowledged")


async def test_commands_for_a_user_who_never_writes_expire(tmp_path: Path) -> None:
    async with started(tmp_path) as (made, nc, log):
        bot = await bind_unknown(made, nc)
        await put(nc, "bare", expires_in_s=3)
        await put(nc, "named", expires_in_s=3, bot=bot.bot)
        await put(nc, "person", expires_in_s=3, user=NOBODY)
        await put(nc, "stays")
        finals = await log.end("bare", "named", "person", within_s=3 + FEW_S)
        assert ends(finals) == {("refused", "expired")}
        assert all(3 <= waited_s(receipt) < 3 + FEW_S for receipt in finals)
        made.say("s1", "hello")
        (stays,) = await log.end("stays")
        assert stays.outcome == "accepted"
        assert made.phone_texts("s1") == ["answer stays"]


async def test_a_command_for_a_person_who_turns_out_to_be_another_is_refused(tmp_path: Path) -> None:
    async with started(tmp_path) as (made, nc, log):
        await bind_unknown(made, nc)
        await put(nc, "stranger", user=NOBODY)
        await put(nc, "bare")
        await delivered(nc, "s1")
        made.say("s1", "hello")
        stranger, bare = await log.end("stranger", "bare")
        assert (stranger.outcome, stranger.reason) == ("refused", "not_bound")
        assert bare.outcome == "accepted"
        assert made.phone_texts("s1") == ["answer bare"]


# a user whom nobody serves -----------------------------------------------------------------------------------


async def test_a_command_for_a_user_whom_nobody_serves_is_refused_at_once(tmp_path: Path) -> None:
    async with started(tmp_path) as (made, nc, log):
        bot = made.sim.add_bot()
        await made.bind(nc, "s1", bot)
        await put(nc, "of-nobody", user=NOBODY)
        await put(nc, "by-the-bot", user=NOBODY, bot=bot.bot)
        await put(nc, "refuse", user=NOBODY, when_closed="refuse")
        await put(nc, "typing", user=NOBODY, text=None, typing="on")
        plain = msgspec.json.encode({"id": "plain", "sandbox": "s1", "user": NOBODY, "text": "hi"})
        await nc.jetstream().publish(NAMES.out_plain, plain)
        idents = ("of-nobody", "by-the-bot", "refuse", "typing", "plain")
        assert ends(await log.end(*idents, within_s=FEW_S)) == {("refused", "not_bound")}
        assert all(len(log.received[ident]) == 1 for ident in idents), "none was said to be parked"
        await eventually(lambda: is_empty(nc), "every command is acknowledged")


# an id that comes again --------------------------------------------------------------------------------------


async def test_an_id_that_comes_again_gets_the_first_ones_outcome_and_is_not_sent(tmp_path: Path) -> None:
    """An agent that answers a message again after a crash uses the same id; the adapter may have crashed, too."""
    async with started(tmp_path, quota=0, environ={"WECHAT_NATS_SENDS_PER_WINDOW": "0"}) as (made, nc, _):
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "hello")
        await made.settle(nc)
        seqs: dict[str, list[int]] = {}

        async def last_of(seq: int) -> Receipt:
            """The final receipt of the command with a sequence."""
            found: list[Receipt] = []

            async def is_there() -> bool:
                finals = [one for one in await made.receipts(nc) if one.outcome in FINAL_OUTCOMES]
                found[:] = [one for one in finals if one.sequence == seq]
                return bool(found)

            await eventually(is_there, f"command {seq} has ended", patience_s=20)
            (receipt,) = found
            return receipt

        async def send(ident: str, **body: Any) -> Receipt:
            seqs.setdefault(ident, []).append(await put(nc, ident, **body))
            return await last_of(seqs[ident][-1])

        first = await send("k1")
        again = await send("k1", text="the same answer in other words")
        assert (first.outcome, first.repeat_of) == ("accepted", 0)
        assert (again.outcome, again.message_ids, again.repeat_of) == ("accepted", first.message_ids, first.sequence)
        await made.adapters[0].kill()
        await made.adapters[0].start()
        assert (await send("k1")).repeat_of == first.sequence
        assert made.phone_texts("s1") == ["answer k1"]

        # what was refused may be tried again
        refused = await send("k2", text="x" * 50_000)
        assert (refused.outcome, refused.reason) == ("refused", "too_long")
        mended = await send("k2")
        assert (mended.outcome, mended.repeat_of) == ("accepted", 0)

        # only the body's id counts: what the stream made of another command is no id of its author's
        js, subject = nc.jetstream(), NAMES.out("s1")
        by_header = await js.publish(subject, b'{"text":"by header"}', headers={"Nats-Msg-Id": "k3"})
        assert (await last_of(by_header.seq)).command == "k3"
        assert (await send("k3")).repeat_of == 0
        by_default = await js.publish(subject, b'{"text":"by default"}')
        assert (await last_of(by_default.seq)).command == str(by_default.seq)
        assert (await send(str(by_default.seq))).repeat_of == 0
        later = await js.publish(subject, b'{"text":"later"}', headers={"Nats-Msg-Id": "k1"})
        assert (await last_of(later.seq)).repeat_of == 0
        default = str(by_default.seq)
        assert made.phone_texts("s1")[1:] == [
            *("answer k2", "by header", "answer k3", "by default", f"answer {default}", "later")
        ]

        # the last 32 are remembered
        for number in range(32):
            await put(nc, f"more-{number}")
        forgotten = await send("k1")
        assert (forgotten.outcome, forgotten.repeat_of) == ("accepted", 0)
        remembered = await send("more-31")
        assert remembered.repeat_of == (await last_of(remembered.repeat_of)).sequence != 0


# silence -----------------------------------------------------------------------------------------------------


# all servers at once -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["the adapter stays", "the adapter dies, too"])
async def test_all_servers_restarted_with_acks_pending_leave_each_command_one_end(tmp_path: Path, dies: str) -> None:
    """Consumers are in memory: every command that has no ack is delivered again, and may have been worked on."""
    talking, waiting = [f"s{number}" for number in range(8)], [f"p{number}" for number in range(8)]
    async with world(tmp_path, clustered=True, quota=0, environ={"WECHAT_NATS_SENDS_PER_WINDOW": "0"}) as made:
        adapter = await made.add_adapter()
        nc = await made.nc()
        for sandbox in (*talking, *waiting):
            await made.bind(nc, sandbox, made.sim.add_bot())
        for sandbox in talking:
            made.say(sandbox, "hello")
        await made.settle(nc)
        for sandbox in waiting:
            for number in range(3):
                await made.command(nc, sandbox, f"{sandbox}.{number}")
        for round_of in range(2):
            for number in range(3):
                await asyncio.gather(*(made.command(nc, one, f"{one}.{round_of}.{number}") for one in talking))
            sends = made.sim.stats().sends
            await asyncio.gather(*(made.command(nc, one, f"{one}.{round_of}.3") for one in talking))
            await until(lambda sends=sends: made.sim.stats().sends > sends, "sends are out")  # type: ignore[misc]
            for node in made.cluster.nodes:
                node.kill()
            if dies == "the adapter dies, too":
                await adapter.kill()
            for node in made.cluster.nodes:
                node.start()
            await made.cluster.healthy()
            await adapter.start()
        await made.settle(nc)
        finals = Counter(one.command for one in await made.receipts(nc) if one.outcome in FINAL_OUTCOMES)
        assert finals == Counter(ident for idents in made.sent.values() for ident in idents)
        for sandbox, idents in made.sent.items():
            assert made.phone_texts(sandbox) == [f"answer {ident}" for ident in idents]
            sent: dict[str, set[str]] = {}
            for attempt in made.sim.sends(made.bots[sandbox].bot):
                for text in attempt.text.split("\n\n"):
                    sent.setdefault(text, set()).add(attempt.client_id)
            assert {text: ids for text, ids in sent.items() if len(ids) > 1} == {}
        await eventually(lambda: is_empty(nc), "every command is acknowledged")
