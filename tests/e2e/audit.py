"""Compares what people said and saw with what the bus carries."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from nats.aio.client import Client

from adapter.bridge.entries import messages_of
from adapter.contract.messages import FINAL_OUTCOMES, Inbound, Receipt
from tests.e2e.reading import NAMES, Listener, Live, stream

if TYPE_CHECKING:
    from tests.e2e.world import World


class Said(NamedTuple):
    """What a user wrote; no user writes the same text twice."""

    sandbox: str
    text: str


class Audit(msgspec.Struct):
    """What went wrong, each as a sentence; all empty: every promise held."""

    lost: list[str] = []
    """Written by a user, and not on the bus."""
    doubled: list[str] = []
    """More than once on the bus, or told more than once to a live subscriber."""
    disordered: list[str] = []
    """Not in the order in which they were written."""
    astray: list[str] = []
    """Somebody else's."""
    receipts: list[str] = []
    """Commands without exactly one final receipt."""
    unseen: list[str] = []
    """Accepted, and not on the phone."""
    shown_twice: list[str] = []
    shown_disordered: list[str] = []
    manners: list[str] = []
    """Polls or sends at the same time."""
    may_be_lost: int = 0
    excused_lost: int = 0
    excused_late: int = 0
    """How many messages could be lost, as iLink forces it; how many were, or were not in their place."""
    stored: int = 0
    """Messages on the bus."""
    live: int = 0
    """Messages that live subscribers got."""
    repeated_live: int = 0
    """How many of these they had: the server publishes what it has stored once more where it stood still."""
    shown: int = 0
    """Texts on the phones."""
    outcomes: dict[str, int] = {}
    """Final receipts."""

    def faults(self) -> list[str]:
        return [
            *self.lost,
            *self.doubled,
            *self.disordered,
            *self.astray,
            *self.receipts,
            *self.unseen,
            *self.shown_twice,
            *self.shown_disordered,
            *self.manners,
        ]


async def audit(
    made: World,
    nc: Client,
    *,
    listener: Listener | None = None,
    may_be_lost: Collection[Said] = frozenset(),
    may_be_late: Collection[Said] = frozenset(),
) -> Audit:
    """What `may_be_lost` iLink counted as delivered to one that was killed, and gives to nobody else."""
    found = Audit(may_be_lost=len(may_be_lost))
    await _inbound(made, nc, may_be_lost, may_be_late, found)
    if listener is not None:
        _live(made, listener, found)
    final: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in await made.receipts(nc):
        if receipt.outcome in FINAL_OUTCOMES:
            final[receipt.command].append(receipt)
    found.outcomes = dict(Counter(receipt.outcome for receipts in final.values() for receipt in receipts))
    for sandbox, idents in made.sent.items():
        for ident in idents:
            if len(final[ident]) != 1:
                found.receipts.append(f"{ident} has {len(final[ident])} final receipts")
            found.astray += [f"{ident}: its receipt says {r.sandbox}" for r in final[ident] if r.sandbox != sandbox]
        _phone(sandbox, idents, final, made.phone_texts(sandbox), found)
    stats = made.sim.stats()
    if stats.poll_overlaps:
        found.manners.append(f"{stats.poll_overlaps} polls overlapped")
    if stats.send_overlaps:
        found.manners.append(f"{stats.send_overlaps} sends overlapped")
    return found


async def _inbound(
    made: World, nc: Client, may_be_lost: Collection[Said], may_be_late: Collection[Said], found: Audit
) -> None:
    on_bus: dict[str, list[str]] = defaultdict(list)
    for subject, data in await stream(nc, NAMES.stream_in, NAMES.inbox("*")):
        sandbox = subject.split(".")[2]
        for message in messages_of(data):
            inbound = msgspec.json.decode(message, type=Inbound)
            found.stored += 1
            on_bus[sandbox].append(inbound.text)
            _whose(made, sandbox, inbound, f"the inbox of {sandbox}", found)
    for sandbox, said in made.said.items():
        received = Counter(on_bus[sandbox])
        missing = [text for text in said if not received[text]]
        lost = [text for text in missing if (sandbox, text) not in may_be_lost]
        found.lost += [f"{sandbox}: {text!r} is not on the bus" for text in lost]
        found.excused_lost += len(missing) - len(lost)
        found.doubled += [
            f"{sandbox}: {text!r} is on the bus {n} times" for text, n in received.items() if n > said.count(text)
        ]
        there, wanted = list(dict.fromkeys(on_bus[sandbox])), [text for text in said if received[text]]
        late = {text for text in wanted if (sandbox, text) in may_be_late}
        if [text for text in there if text not in late] != [text for text in wanted if text not in late]:
            found.disordered.append(f"{sandbox}: said {said}, on the bus {there}")
        else:
            found.excused_late += misplaced(there, wanted)


def misplaced(there: Sequence[str], wanted: Sequence[str]) -> int:
    """How many texts would have to be taken out so that the others are in order."""
    places = {text: place for place, text in enumerate(wanted)}
    ends: list[int] = []  # of the longest rising sequences: the least end for each length
    for text in there:
        where = bisect_left(ends, places[text])
        ends[where : where + 1] = [places[text]]
    return len(there) - len(ends)


def _live(made: World, listener: Listener, found: Audit) -> None:
    for sandbox, received in listener.received.items():
        found.live += len(received)
        first: dict[tuple[int, int], Live] = {}
        for live in received:
            first.setdefault(live.place, live)  # what has a position was stored once
        found.repeated_live += len(received) - len(first)
        times = Counter(live.inbound.id for live in first.values())
        found.doubled += [f"{sandbox} was told {ident} {n} times" for ident, n in times.items() if n > 1]
        if any(later.place < earlier.place for earlier, later in pairwise(first.values())):
            found.disordered.append(f"{sandbox} was told messages out of order")
        for live in received:
            _whose(made, sandbox, live.inbound, f"what {sandbox} was told", found)


def _whose(made: World, sandbox: str, inbound: Inbound, where: str, found: Audit) -> None:
    bot = made.bots.get(sandbox)
    if bot is None or (inbound.sandbox, inbound.bot, inbound.user) != (sandbox, bot.bot, bot.user):
        found.astray.append(f"{inbound.id} of {inbound.bot} is in {where}")
    elif inbound.text not in made.said[sandbox]:
        found.astray.append(f"{inbound.id} in {where} was never said there")


def _phone(
    sandbox: str, idents: Sequence[str], final: dict[str, list[Receipt]], texts: Sequence[str], found: Audit
) -> None:
    """The phone shows each accepted text once, in the order of the commands; several may be in one message."""
    found.shown += len(texts)
    shown = Counter(texts)
    accepted = [f"answer {ident}" for ident in idents if any(r.outcome == "accepted" for r in final[ident])]
    found.unseen += [f"{sandbox}: {text!r} was accepted and is not shown" for text in accepted if not shown[text]]
    found.shown_twice += [f"{sandbox}: {text!r} is shown {n} times" for text, n in shown.items() if n > 1]
    sent = {f"answer {ident}" for ident in idents}
    found.astray += [f"the phone of {sandbox} shows {text!r}" for text in texts if text not in sent]
    if _of(texts, accepted) != _of(accepted, texts):
        found.shown_disordered.append(f"{sandbox}: sent {list(idents)}, shown {list(texts)}")


def _of(texts: Iterable[str], others: Collection[str]) -> list[str]:
    """Those that are among the others, once each."""
    return [text for text in dict.fromkeys(texts) if text in others]
