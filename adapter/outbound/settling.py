"""Ends the commands of a shard: final receipt first, then the ack, and what was parked is deleted.

Until all of that has happened a command is delivered again, to this owner or the next one, who looks its receipt up.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from adapter import contract, window
from adapter.bindings.registry import Bindings
from adapter.contexts import Peer
from adapter.errors import LeaseLost, Temporary
from adapter.names import Names
from adapter.outbound.commands import Limits
from adapter.outbound.endings import Ending, in_doubt
from adapter.outbound.former_bots import FormerBots
from adapter.outbound.lane import Item, Lane
from adapter.outbound.receipts import Receipts
from adapter.outbound.sending import MAX_RESENDS, Sending
from adapter.outbound.typing_indicator import Showing
from adapter.outbound.uploads import Uploads
from adapter.ports import Account, Bucket, Bus, History, TextReader
from adapter.records import Binding, Context, Hand
from adapter.replicas.leases import Leases
from adapter.tasks import Tasks
from adapter.timing import Turns, first_of

log = structlog.get_logger()

SETTLED_KEPT = 256
"""Commands per shard remembered as settled, or as not parked any more: what comes again of the last moment needs no
look at the receipts, as all that is older does."""
GONE_S = 10.0
"""What waits on the bus and is missing there for so long is gone. A cluster that is losing its leaders may not show
all that it has, and what is taken for gone is overtaken."""


class Outgoing(NamedTuple):
    """What the lanes need."""

    sending: Sending
    uploads: Uploads
    texts: TextReader
    claims: Bucket
    """Where it is noted what an owner is reading, see Trials."""
    bus: Bus
    history: History
    bindings: Bindings
    former: FormerBots
    leases: Leases
    receipts: Receipts
    names: Names
    limits: Limits
    account: Callable[[Binding], Account]
    """Raises Refused("token_key")."""
    stale: Callable[[str], bool]
    """Whether a bot's token is being tried again: nothing may be sent for it."""
    stale_on_send: Callable[[Binding, str], Awaitable[None]]
    """iLink refused the token on every send for too long: the binding needs a login."""
    alive_on_send: Callable[[Binding], Awaitable[None]]
    """iLink took a send of a binding that needs a login: it is active again."""
    bound_yet: Callable[[], Awaitable[None]]
    """Returns once every bind command stored before the call has taken effect."""
    gap_s: float
    parked_per_user: int
    parked_per_sandbox: int
    merge_chars: int
    """Parked texts are sent as one message up to so many characters; 0: each on its own."""
    stale_retry_s: tuple[float, ...]
    grace_s: float
    turns: Turns
    """Spreads what many lanes do once they may go on."""
    loading: asyncio.Semaphore
    """Bounds how many shards read at once what is parked: after a reconnect all do."""
    showing: Showing


class Draining(Exception):
    """The service stops: what is in hand stays unsettled, and comes again to the next owner."""


class Settling:
    """The base of a shard's worker: what is in hand, and how it ends. `LaneWork` adds sending, `Shard` adds arrival.

    One object in three files, since they call each other: what ends makes room for what waits. Three objects would be
    a reference cycle, which outlives its shard until the garbage collector runs.
    """

    def __init__(self, number: int, needs: Outgoing) -> None:
        self.number = number
        self._needs = needs
        self._sending = needs.sending
        self._in_hand: dict[int, Item] = {}
        """By sequence: delivered, and neither parked nor settled."""
        self._settled: OrderedDict[int, int] = OrderedDict()
        """Sequences, and when each was stored: one without the other is a command of a stream that was made anew."""
        self._removed: OrderedDict[int, int] = OrderedDict()
        """Sequences of what is not parked any more, although the bus may still show it."""
        self._tasks = Tasks(partial(_crashed, number))
        self._drain = asyncio.Event()
        self._lost = False
        """The shard was taken away: also where this replica gets it back, another Shard works for it then."""

    def _check(self) -> None:
        """Raises LeaseLost unless this very object may work for the shard at this moment."""
        if self._lost:
            raise LeaseLost("lease_lost", f"shard {self.number}")
        self._needs.leases.check(self.number)

    async def _pause(self, seconds: float) -> None:
        """Raises Draining when the service stops meanwhile."""
        if await first_of(self._drain, seconds):
            raise Draining

    async def _peer(self, lane: Lane) -> Peer:
        """The lane's user, with what was sent to them over the bot before. Raises Temporary, LeaseLost."""
        peer = await self._sending.contexts.peer(lane.bot, lane.user)
        binding = None if lane.looked_back else self._needs.bindings.get(lane.bot)
        if binding is not None and binding.sandbox != lane.sandbox:
            binding = None  # what is noted in the record is for that sandbox's lane, which has yet to look
        if binding is not None and binding.since_ms != peer.context.followed_ms:
            lane.inherits = True  # a command of any time may be published again
        if lane.inherits:
            served = await self._served(lane.sandbox)
            known = {bot for bot, user in served if user}  # the others may have been anybody's
            lane.former |= {bot: None for bot, user in served if user == lane.user or bot not in known}
            lane.inherits = False
        if lane.former:
            await self._follow_user(lane, peer)
        if binding is not None:
            peer.context = msgspec.structs.replace(peer.context, followed_ms=binding.since_ms)
            lane.looked_back = True
        return peer

    async def _follow_user(self, lane: Lane, peer: Peer) -> None:
        """Stores with the user's bot of now what was sent to them over those before. Raises Temporary, LeaseLost."""
        contexts, former = self._sending.contexts, [bot for bot in lane.former if bot != lane.bot]
        before = [(await contexts.peer(bot, lane.user)).context for bot in former]
        hands = [hand for context in before if (hand := _own(lane, context)) and not _is_over(hand, peer.context)]
        waiting = {*(item.command.client for item in lane.queue), *(parked.client for parked in lane.parked)}
        hands.sort(key=lambda hand: hand.is_any(waiting))
        hand = hands.pop() if hands else None
        if hand and hand.tried:  # another bot's message is another one on the phone: it is not repeated there
            hand = msgspec.structs.replace(hand, tried=hand.tried + MAX_RESENDS)
        done = [name for context in before for name in context.done]
        done += [window.named(one.sandbox, other.command) for one in hands if one.is_begun for other in one.all]
        if hand or done:
            await contexts.save(peer, lambda context: window.moved(context, hand, done, waiting))
        lane.former.clear()

    async def _served(self, sandbox: str) -> list[tuple[str, str]]:
        """Bots and users of a sandbox, also of those bots that served it before. Raises Temporary."""
        now = ((binding.bot, binding.user) for binding in self._needs.bindings.of_sandbox(sandbox))
        return list(dict.fromkeys([*await self._needs.former.of(sandbox), *now]))

    async def _window(self, lane: Lane) -> contract.Window:
        return self._shown(await self._peer(lane)) if lane.user else contract.Window(remaining=0)

    def _shown(self, peer: Peer) -> contract.Window:
        return window.shown(peer.context, self._sending.clock.now_ms(), self._sending.rules)

    def _repeated(self, item: Item) -> None:
        """A second publish of a command that has its receipt, or will have it."""
        log.info("command.repeated", sandbox=item.command.sandbox, command=item.command.id)
        self._sending.metrics.outbound_messages.labels(
            kind=item.command.kind, outcome="duplicate", reason="none"
        ).inc()

    async def _end_in(self, lane: Lane, item: Item, ending: Ending) -> None:
        """Ends a command of which nothing was sent now. Raises Temporary, LeaseLost."""
        hand = await self._hand(lane)
        told = await self._end_unsent(lane, item, ending, hand)
        await self._clear_hand(lane, hand, {item.command.client: told})

    async def _hand(self, lane: Lane) -> Hand | None:
        """What is in hand of the lane. Raises Temporary, LeaseLost."""
        if not lane.user:
            return None
        return _own(lane, (await self._peer(lane)).context)

    async def _end_unsent(self, lane: Lane, item: Item, ending: Ending, hand: Hand | None) -> Ending:
        """Ends one of several commands that may be in hand together, of which nothing was sent now; what was told."""
        told = in_doubt(ending, hand, item.command)
        await self._end([item], told, await self._window(lane), lane.bot, lane.user)
        return told

    async def _clear_hand(self, lane: Lane, hand: Hand | None, told: Mapping[str, Ending]) -> None:
        """Clears the hand in the record, if its outcome is among those that were `told`, by client."""
        if hand and (ending := told.get(hand.client)):
            peer = await self._peer(lane)
            peer.context, lane.hand = window.settled(peer.context, hand.client, sent=ending.may_be_sent), None

    async def _end(
        self, group: Sequence[Item], ending: Ending, shown: contract.Window | None, bot: str = "", user: str = ""
    ) -> None:
        """Gives each its final receipt, the same, and what belongs to it; then they are settled.

        All are told before the first is settled or removed, so that the next owner finds the first one with all that
        share its fate. Of what was not accepted only the owner may say so: the next one may have more luck. Raises
        LeaseLost.
        """
        if not ending.is_sent:
            self._check()
        for item in group:
            command = item.command
            if item.suspect and await self._needs.receipts.has_final(command):
                continue
            await self._needs.receipts.final(
                command,
                ending,
                bot=bot or command.bot,
                user=user or command.user,
                shown=shown or contract.Window(),
                original=(item.data, item.headers, self._needs.names.out(command.sandbox)),
                parked_ms=item.parked_ms,
                late=self._check,
            )
        for item in group:
            self._done_with(item)

    async def _end_surely(self, item: Item, ending: Ending, lane: Lane | None = None) -> None:
        """Ends a command that is in no lane, or not any more. Raises Draining."""
        while True:
            try:
                await (self._end_in(lane, item, ending) if lane else self._end([item], ending, None))
            except (Temporary, LeaseLost) as exc:
                log.warning("command.waits", sandbox=item.command.sandbox, reason=exc.reason)
                await self._pause(0.5)
            else:
                return

    def _done_with(self, item: Item) -> None:
        """Settles a command that was told, or need not be, wherever it came from."""
        self._settle(item)
        if item.parked_seq:
            _remember(self._removed, item.parked_seq, item.command.stored_ms)
            self._tasks.spawn(self._unpark(item.parked_seq))

    def _settle(self, item: Item) -> None:
        delivery = item.delivery
        if delivery is None:
            return
        self._in_hand.pop(delivery.seq, None)
        _remember(self._settled, delivery.seq, delivery.time_ms)
        self._tasks.spawn(delivery.ack())

    async def _unpark(self, seq: int) -> None:
        """Removes a parked command; what a crash leaves there has its final receipt. Raises Draining."""
        while True:
            try:
                await self._needs.history.delete(self._needs.names.stream_parked, seq)
            except Temporary as exc:
                log.warning("unparking.waits", shard=self.number, reason=exc.reason)
                await self._pause(0.5)
            else:
                return


def _own(lane: Lane, context: Context) -> Hand | None:
    """What is in hand of the lane; in the record one of the bot's next sandbox may have taken its place."""
    hand, known = context.hand, lane.hand
    if hand is None or hand.sandbox != lane.sandbox:
        return known or context.hand_of(lane.sandbox)
    # of the same command the lane knows what was answered since the record was written
    return known if known and known.client == hand.client else hand


def _is_over(hand: Hand, context: Context) -> bool:
    """Whether a record knows that what was in hand over another bot has ended."""
    return window.named(hand.sandbox, hand.command) in context.done


def _crashed(shard: int, exc: BaseException) -> None:
    if not isinstance(exc, Draining):
        log.error("task.crashed", shard=shard, exc_info=exc)


def _remember(known: OrderedDict[int, int], seq: int, stored_ms: int) -> None:
    known[seq] = stored_ms
    if len(known) > SETTLED_KEPT:
        known.popitem(last=False)
