"""iLink is away: what waits, what is repeated, and that nobody else notices.

What never reached iLink is tried again until it does. What may have reached it is repeated once, as soon as iLink has
answered a request of somebody since. Nothing ends `uncertain`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.contract.messages import FINAL_OUTCOMES, BindingEvent, Receipt
from adapter.simulator import FaultRule
from adapter.simulator.records import SendRecord
from tests.e2e.gate import Gate
from tests.e2e.world import NAMES, World, audit, eventually, inbox, stream, until, world

REPEAT_MS = 3_000
"""When a send without an answer is repeated, after its first try, at the earliest."""
LAG_MS = 2000
"""The adapter counts a try before it stores its record and makes the request, which iLink times."""
SOON_S = 10.0
"""An answer in time, on a busy machine."""
PAUSE_S = 90.0
"""Longer than the longest pause between two tries of what was never taken."""


class Scene(NamedTuple):
    """People, each with a bot and a sandbox, behind one gate, and an adapter that uses it."""

    made: World
    nc: Client
    gate: Gate
    final: dict[str, tuple[float, Receipt]]
    """By command: its final receipt, and when it came by the loop's clock."""
    sent_at: dict[str, float]

    async def bind(self, sandboxes: Iterable[str], **fields: Any) -> None:
        """Binds a bot to each sandbox, whose user says hello; the windows are open."""
        before = len(await inbox(self.nc, "*"))
        wanted = list(sandboxes)
        for start in range(0, len(wanted), 20):
            bots = {sandbox: self.made.sim.add_bot() for sandbox in wanted[start : start + 20]}
            await asyncio.gather(*(self.made.bind(self.nc, *pair, **fields) for pair in bots.items()))
        for sandbox in wanted:
            self.made.say(sandbox, "hello")

        async def are_stored() -> bool:
            return len(await inbox(self.nc, "*")) == before + len(wanted)

        await eventually(are_stored, "everybody's hello is on the bus")

    async def send(self, sandboxes: Iterable[str], *numbers: int) -> list[str]:
        """Each sandbox sends these commands; their ids."""
        idents = []
        for number in numbers:
            for sandbox in sandboxes:
                ident = f"{sandbox}.{number}"
                self.sent_at[ident] = asyncio.get_running_loop().time()
                await self.made.command(self.nc, sandbox, ident)
                idents.append(ident)
        return idents

    async def ended(self, idents: Iterable[str], within_s: float) -> None:
        wanted = set(idents)
        with contextlib.suppress(AssertionError):
            await until(lambda: wanted <= self.final.keys(), "all have ended", patience_s=within_s)
        assert wanted - self.final.keys() == set(), f"not ended after {within_s:.0f} s"

    def delay_s(self, idents: Iterable[str]) -> float:
        """The longest time between a command and its final receipt."""
        return max(self.final[ident][0] - self.sent_at[ident] for ident in idents)

    def requests(self) -> dict[str, list[SendRecord]]:
        """All sends that reached iLink, by the text; each text is of one command."""
        found: dict[str, list[SendRecord]] = defaultdict(list)
        for bot in self.made.bots.values():
            for send in self.made.sim.sends(bot.bot):
                found[send.text].append(send)
        return found

    async def assert_nothing_was_lost(self) -> None:
        """All commands are accepted and on the phones, once and in order, and no bot needs a login."""
        result = await audit(self.made, self.nc)
        wanted = sum(len(idents) for idents in self.made.sent.values())
        assert result.outcomes == {"accepted": wanted}
        for sandbox, idents in self.made.sent.items():
            assert self.made.phone_texts(sandbox) == [f"answer {ident}" for ident in idents]
        ids = {text: {send.client_id for send in sends} for text, sends in self.requests().items()}
        assert {text: found for text, found in ids.items() if len(found) > 1} == {}
        # a server that was stopped works on requests whose clients have left
        assert [fault for fault in result.faults() if "sends overlapped" not in fault] == []
        events = await stream(self.nc, NAMES.stream_event, NAMES.event("*", "binding"))
        assert {msgspec.json.decode(data, type=BindingEvent).change for _, data in events} == {"bound"}

    def assert_repeated_once(self, latest_ms: float) -> int:
        """No command was posted more than twice, nor again before its time; how many were posted twice."""
        twice = [sends for sends in self.requests().values() if len(sends) > 1]
        assert max(map(len, twice), default=0) <= 2
        gaps_ms = [again.start_ms - first.start_ms for first, again in twice]
        assert min(gaps_ms, default=REPEAT_MS) >= REPEAT_MS - LAG_MS
        assert max(gaps_ms, default=REPEAT_MS) <= latest_ms
        return len(twice)


@contextlib.asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with world(folder, hold_ms=5000) as made, Gate(made.sim.url) as gate:
        await made.add_adapter(WECHAT_NATS_ILINK_BASE_URL=gate.url)
        nc = await made.nc()
        final: dict[str, tuple[float, Receipt]] = {}

        async def on_receipt(message: Msg) -> None:
            receipt = msgspec.json.decode(message.data, type=Receipt)
            if receipt.outcome in FINAL_OUTCOMES:
                final[receipt.command] = asyncio.get_running_loop().time(), receipt

        await nc.subscribe(NAMES.receipts("*"), cb=on_receipt)
        yield Scene(made, nc, gate, final, {})


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:03d}" for number in range(count)]


def silence(scene: Scene, user: str | None = None, *, processed: bool | None = None) -> None:
    """Sends get no answer; iLink takes them, or about every second one."""
    for taken, probability in ((True, 0.5 if processed is None else float(processed)), (False, 1.0)):
        rule = FaultRule(fault="F5", endpoint="sendmessage", user=user, probability=probability)
        rule.params["processed"] = taken
        scene.made.sim.set_fault(rule)


@contextlib.asynccontextmanager
async def outage(scene: Scene, kind: str) -> AsyncIterator[None]:
    """iLink is away in one of the ways of `OUTAGES`."""
    match kind:
        case "stopped":
            scene.gate.freeze()
        case "refused":
            await scene.gate.close()
        case "resets":
            scene.made.sim.set_fault(FaultRule(fault="F6"))
        case status:
            scene.made.sim.set_fault(FaultRule(fault="F1", params={"status": int(status)}))
    yield
    match kind:
        case "stopped":
            scene.gate.thaw()
        case "refused":
            await scene.gate.open()
        case _:
            scene.made.sim.clear_faults()


async def last(seconds: float, since: float) -> None:
    """An outage has a length, whatever happens in it."""
    await asyncio.sleep(since + seconds - asyncio.get_running_loop().time())


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("502", 60), ("stopped", 100), ("resets", 30)],
    ids=str,
)
async def test_minutes_without_answers_make_nothing_uncertain(tmp_path: Path, kind: str, seconds: float) -> None:
    """Half of the users are written to when it begins, half in its middle; the first send that iLink accepts
    afterwards is somebody else's."""
    early, late = names("early", 15), names("late", 15)
    async with scene(tmp_path) as s:
        await s.bind([*early, *late, "newcomer"])
        began = asyncio.get_running_loop().time()
        async with outage(s, kind):
            await s.send(early, 0, 1)
            await last(seconds / 2, began)
            await s.send(late, 0, 1)
            await s.send(early, 2)
            await last(seconds, began)
        (first,) = await s.send(["newcomer"], 0)
        await s.ended([first], SOON_S if kind != "stopped" else PAUSE_S)
        await s.ended(s.sent_at, 30)
        await s.assert_nothing_was_lost()
        if kind != "stopped":  # there the requests arrive when it goes on
            s.assert_repeated_once(120_000)


@pytest.mark.long
async def test_a_tenth_of_sends_lost_under_load_holds_nobody_for_minutes(tmp_path: Path) -> None:
    """For 40 s. All have ended 30 s later, but what stands behind an `uncertain`, which holds its person back."""
    users = names("user", 60)
    async with scene(tmp_path) as s:
        await s.bind(users)
        began = asyncio.get_running_loop().time()
        for processed in (True, False):
            rule = FaultRule(fault="F5", endpoint="sendmessage", probability=0.05, params={"processed": processed})
            s.made.sim.set_fault(rule)
        for number in range(8):
            await s.send(users, number)
            await last(5.0 * (number + 1), began)
        s.made.sim.clear_faults()
        await last(70, began)
        held = {ident.partition(".")[0] for ident, (_, one) in s.final.items() if one.outcome == "uncertain"}
        assert {ident for ident in s.sent_at.keys() - s.final.keys() if ident.partition(".")[0] not in held} == set()
        await s.ended(s.sent_at, 120)
        assert {one.outcome for _, one in s.final.values()} <= {"accepted", "uncertain"}
        s.assert_repeated_once(60_000)


@pytest.mark.parametrize("kind", ["resets", "502", pytest.param("silent sends", marks=pytest.mark.slow)])
async def test_one_person_alone_waits_for_seconds(tmp_path: Path, kind: str) -> None:
    """Nobody else sends, so iLink is asked by notifystart."""
    fault = {"resets": "F6", "502": "F1", "silent sends": "F5"}[kind]
    async with scene(tmp_path) as s:
        await s.bind(["alone"])
        rule = FaultRule(
            fault=fault, endpoint="sendmessage", count=1, params={"status": 502} if fault == "F1" else {}
        )
        s.made.sim.set_fault(rule)
        await s.send(["alone"], 0)
        await s.ended(s.sent_at, 10 if kind != "silent sends" else 15 + 10)
        await s.assert_nothing_was_lost()


async def test_a_repeat_that_ilink_throttles_is_uncertain(tmp_path: Path) -> None:
    """The request that had no answer may have used the last send."""
    async with scene(tmp_path) as s:
        await s.bind(["alone"])
        for fault in ("F6", "F11"):
            s.made.sim.set_fault(FaultRule(fault=fault, endpoint="sendmessage", count=1))
        (ident,) = await s.send(["alone"], 0)
        await s.ended([ident], SOON_S)
        receipt = s.final[ident][1]
        assert (receipt.outcome, receipt.attempts, receipt.ret) == ("uncertain", 2, -2)


@pytest.mark.parametrize("kind", ["503", pytest.param("403", marks=pytest.mark.slow), "refused"])
@pytest.mark.parametrize(
    ("seconds", "tries"), [(15, 8), pytest.param(600, 30, marks=pytest.mark.long)], ids=["seconds", "ten-minutes"]
)
async def test_what_never_reached_ilink_is_tried_until_it_does(
    tmp_path: Path, kind: str, seconds: float, tries: int
) -> None:
    early, late = names("early", 10), names("late", 10)
    async with scene(tmp_path) as s:
        await s.bind([*early, *late])
        began = asyncio.get_running_loop().time()
        async with outage(s, kind):
            await s.send(early, 0, 1)
            await last(seconds / 2, began)
            await s.send(late, 0, 1)
            await s.send(early, 2)
            await last(seconds, began)
        await s.ended(s.sent_at, PAUSE_S)
        await s.assert_nothing_was_lost()
        assert max(map(len, s.requests().values())) <= tries, "the pauses grow"


@pytest.mark.long
async def test_users_whose_sends_hang_delay_nobody_and_are_repeated_once(tmp_path: Path) -> None:
    """While iLink answers the others, each of theirs is posted twice, and ends `uncertain`."""
    hung, served = names("hung", 15), names("served", 15)
    async with scene(tmp_path) as s:
        await s.bind([*hung, *served])
        for number, sandbox in enumerate(hung):
            silence(s, s.made.bots[sandbox].user, processed=number % 2 == 0)
        began = asyncio.get_running_loop().time()
        await s.send(hung, 0, 1)
        for number in range(9):
            idents = await s.send(served, number)
            await s.ended(idents, SOON_S)
            assert s.delay_s(idents) < SOON_S
            await last(5 * (number + 1), began)
        s.made.sim.clear_faults()
        await s.ended(s.sent_at, 180)
        s.assert_repeated_once(60_000)


@pytest.mark.parametrize(
    ("kind", "tenants"),
    [
        ("stopped", 20),
        pytest.param("refused", 20, marks=pytest.mark.slow),
        pytest.param("stopped", 300, marks=pytest.mark.slow),
    ],
    ids=["silent", "refused", "silent-and-many"],
)
async def test_a_tenant_whose_ilink_is_away_delays_nobody(tmp_path: Path, kind: str, tenants: int) -> None:
    """A platform may serve tenants at base URLs of their own. The many have more sends than are made at a time."""
    theirs, ours = names("theirs", tenants), names("ours", 10)
    async with scene(tmp_path) as s, Gate(s.made.sim.url) as gate:
        await s.bind(theirs, base_url=gate.url)
        await s.bind(ours)
        async with outage(s._replace(gate=gate), kind):
            await s.send(theirs, 0, 1)
            for number in range(5):
                idents = await s.send(ours, number)
                await s.ended(idents, SOON_S)
                assert s.delay_s(idents) < SOON_S
            await s.bind(["newcomer"])
            await s.ended(await s.send(["newcomer"], 0), SOON_S)
        assert {receipt.outcome for _, receipt in s.final.values()} == {"accepted"}
