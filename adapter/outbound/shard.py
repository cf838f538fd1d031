"""Commands from the bus to iLink: per user in order and once, each with exactly one final receipt.

One consumer per shard, pulled by the shard's owner. In it a lane per user: a queue in memory, and before it what is
parked on the bus. A lane never has two requests out at once, and no lane waits for another. What cannot be sent
before the user writes is moved to WECHAT_PARKED at once; what is more than a sandbox's share waits in WECHAT_OUT.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Collection, Iterable

import structlog

from adapter import contract
from adapter.dedup import bot_of
from adapter.errors import AdapterError, Refused, Temporary, Unreadable
from adapter.names import H_COMMAND, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, UNROUTED, peer_of
from adapter.outbound.backlog import PAGE, Backlog
from adapter.outbound.commands import Command, command_id, first_seq, peek, read_command, remains, since_ms, stand_in
from adapter.outbound.endings import Ending, in_doubt
from adapter.outbound.lane import Item, parked_at
from adapter.outbound.lanework import LaneWork
from adapter.outbound.parked import item_of
from adapter.outbound.settling import GONE_S, Outgoing
from adapter.ports import Delivery
from adapter.records import Binding, Hand

log = structlog.get_logger()

MAX_NAME = 64
"""Characters of a sandbox's name (names.SANDBOX_PATTERN)."""
SKEW_MS = 60_000
"""By how much the clock by which a binding was made may be behind that by which a command was stored."""
HIDE_S = 12.0
"""At the end typing is hidden in this time, in which one call may hang, or by the next owner."""
CUT_S = 1.0
"""For what is cut to end."""


class Shard(LaneWork):
    """What arrives for one shard, as long as this replica owns it, and the lanes that it goes into."""

    def __init__(self, number: int, needs: Outgoing) -> None:
        super().__init__(number, needs)
        self._waiting: dict[str, deque[Item]] = {}
        """Per sandbox: commands for which no binding was found, in order, while a bind may be on its way."""
        self._loaded = False
        self._backlog = Backlog()
        self._reading: set[str] = set()
        """Subjects of which commands are being read back."""

    async def load(self) -> None:
        """Finds what is parked; again after each reset of the consumer. Raises Temporary.

        A replica that lost the shard may have parked a command late, and settled it, so that it is not delivered
        again: what was settled before a reset is found here after it.
        """
        if not self._loaded:
            for binding in self._needs.bindings.of_shard(self.number):
                self._sending.contexts.forget(binding.bot)  # it is of an earlier time, when the shard was ours, too
            self.typing.open()
            self._loaded = True
        found: set[int] = set()
        try:
            async with self._needs.loading:
                await self._find_parked(found)
        finally:  # the next look takes for known what this one has found
            for lane in self._lanes:
                if not lane.unsure.isdisjoint(found):
                    lane.sort()
        for lane in self._lanes:
            self._start(lane)

    async def _find_parked(self, found: set[int]) -> None:
        """Adds to `found` the sequences of what was not known to be parked. Raises Temporary."""
        names = self._needs.names
        in_hand = {item.command.client for item in self._in_hand.values()}
        async for stored in self._needs.history.read(names.stream_parked, names.parked(self.number, "*")):
            if stored.seq in self._removed:
                continue
            try:
                item = item_of(stored, self._needs)
            except AdapterError as exc:
                log.error("parked.unreadable", sequence=stored.seq, reason=exc.reason)
                continue
            bot, user = peer_of(stored.subject.rpartition(".")[2])
            binding = self._needs.bindings.get(bot)
            if not user and binding is not None and binding.sandbox == item.command.sandbox:
                user = binding.user  # learned since it was parked
            lane = self._lanes.at(item.command.sandbox, bot, user)
            command = item.command
            if command.client in in_hand or any(known.seq == stored.seq for known in lane.parked):
                continue
            found.add(stored.seq)
            lane.unsure.add(stored.seq)
            lane.inherits = True
            lane.park(parked_at(stored.seq, stored.subject, command))

    def on_delivery(self, delivery: Delivery) -> None:
        """A command of this shard arrived, or arrived again."""
        if self._settled.get(delivery.seq) == delivery.time_ms:
            self._tasks.spawn(delivery.ack())
            return
        if item := self._in_hand.get(delivery.seq):
            item.delivery = delivery
            return
        if self._backlog.came_again(delivery):
            return
        if not delivery.suspect:
            self._sending.metrics.outbound_taken.inc()
        if self._backlog.takes(delivery):
            self._accept(delivery)
        elif self._backlog.next(delivery.subject) is not None:
            # also for a single one: what its sandbox has in hand may belong to a user who is slow, and this one not
            self._read_back(delivery.subject)

    def _read_back(self, subject: str) -> None:
        if subject not in self._reading and not self._drain.is_set():
            self._reading.add(subject)
            self._tasks.spawn(self._catch_up(subject))

    async def _catch_up(self, subject: str) -> None:
        """Takes in hand what had to wait on the bus, in order, as far as there is room."""
        stream, backlog, clock = self._needs.names.stream_out, self._backlog, self._sending.clock
        missed: float | None = None
        try:
            while (first := backlog.next(subject)) and not self._drain.is_set():
                last = backlog.last(subject)
                try:
                    read = self._needs.history.read(stream, subject, after=first - 1, most=PAGE)
                    page = [stored async for stored in read]
                except Temporary as exc:
                    log.warning("command.waits", shard=self.number, reason=exc.reason)
                    await self._pause(0.5)
                    continue
                up_to = page[-1].seq if len(page) == PAGE else last
                if gone := backlog.missing(subject, {stored.seq for stored in page}, up_to):
                    missed = clock.monotonic() if missed is None else missed
                    if clock.monotonic() - missed < GONE_S:
                        await self._pause(0.5)
                        continue
                    backlog.forget(subject, gone)
                    log.warning("commands.gone", shard=self.number, commands=len(gone), first=gone[0])
                missed = None
                for stored in page:
                    if self._drain.is_set() or not backlog.next(subject):
                        break
                    if delivery := backlog.take_back(subject, stored.seq, stored.data, stored.headers):
                        await self._accept_gently(delivery)
        finally:
            self._reading.discard(subject)

    async def _accept_gently(self, delivery: Delivery) -> None:
        """Reading takes its time (Markdown above all), and all others live in the same loop: it rests after each."""
        clock = self._sending.clock
        started = clock.monotonic()
        try:
            self._accept(delivery)
        except Exception:  # a bug: the message stays, unsettled, and the others go on
            self._backlog.settle(delivery.seq)
            log.exception("delivery.crashed", shard=self.number, sequence=delivery.seq)
        await asyncio.sleep(3 * (clock.monotonic() - started))

    def _accept(self, delivery: Delivery) -> None:
        body = contract.Outbound()
        try:
            body = peek(delivery.data, self._needs.limits)
            command = read_command(
                body,
                sandbox=delivery.subject.rpartition(".")[2],
                ident=_ident(delivery, body.id),
                time_ms=delivery.time_ms,
                limits=self._needs.limits,
                since=delivery.headers.get(H_SINCE_MS, ""),
            )
        except (Unreadable, Refused) as exc:
            dead = isinstance(exc, Unreadable)
            body = remains(delivery.data, self._needs.limits) if dead else body
            item = self._take(_nameless(delivery, body.id), delivery)
            self._sending.metrics.schema_violations.labels(kind="out").inc()
            ending = Ending("dead_lettered" if dead else "refused", exc.reason, exc.detail)
            self._tasks.spawn(self._end_surely(item, ending))
            return
        self._place(self._take(command, delivery))

    def _settle(self, item: Item) -> None:
        super()._settle(item)
        if item.delivery is not None and (subject := self._backlog.settle(item.delivery.seq)):
            self._read_back(subject)

    def _take(self, command: Command, delivery: Delivery) -> Item:
        item = Item(command, delivery.data, delivery.headers, suspect=delivery.suspect)
        item.delivery = delivery
        self._in_hand[delivery.seq] = item
        return item

    def _place(self, item: Item) -> None:
        """Puts a command into its lane; the first one without a binding holds up the others of its sandbox."""
        sandbox = item.command.sandbox
        if sandbox not in self._waiting:
            with contextlib.suppress(Refused):
                binding = self._find(item.command)
                if _is_surely_for(item, binding):
                    self._enqueue(item, binding)
                    return
            self._waiting[sandbox] = deque()
            self._tasks.spawn(self._place_late(sandbox))
        self._waiting[sandbox].append(item)

    async def _place_late(self, sandbox: str) -> None:
        waiting = self._waiting[sandbox]
        while waiting:
            first = list(waiting)
            try:
                if not all(self._is_bound(item.command) for item in first):
                    await self._needs.bound_yet()  # which may take as long as a thousand binds before it
                hands = await self._hands(sandbox, first) if any(item.suspect for item in first) else {}
                authors = [await self._authors(item.command) for item in first]
            except Temporary as exc:
                log.warning("command.waits", sandbox=sandbox, reason=exc.reason)
                await self._pause(0.5)
                continue
            for item, wrote in zip(first, authors, strict=True):
                waiting.popleft()
                user, hand = hands.get(item.command.client, ("", None))
                try:
                    self._enqueue(item, self._find_again(item, user, hand, wrote))
                except Refused as exc:
                    ending = Ending("refused", exc.reason, exc.detail)
                    await self._end_surely(item, in_doubt(ending, hand, item.command))
        del self._waiting[sandbox]

    def _find_again(self, item: Item, user: str, hand: Hand | None, authors: Collection[str]) -> Binding:
        """As `_find`; `hand` was for `user`, and one of `authors` wrote what it answers. Raises Refused, also where
        another user than now was meant, or may have got a part of it: each would see what was meant for the other."""
        binding = self._find(item.command)
        now = item.command.user or binding.user
        if _is_older(item, binding):
            raise Refused("not_bound", "The person who was bound as it was stored is not bound now: name the `user`.")
        if authors and now not in authors and not _is_answer_to(item.command, binding):
            raise Refused("other_user", "It answers another person than it goes to: name the `user` of the message.")
        if hand is not None and hand.is_begun and user and now and user != now:
            raise Refused("not_bound", "The user to whom it was being sent is served by no bot of this sandbox now.")
        return binding

    async def _hands(self, sandbox: str, waiting: Iterable[Item]) -> dict[str, tuple[str, Hand]]:
        """What the bots of a sandbox, also those of before, had in hand, by client, and for which user: the owner
        before us may have sent it, and its bot is gone by now. Raises Temporary."""
        named = {item.command.user for item in waiting} - {""}
        hands: dict[str, tuple[str, Hand]] = {}
        for bot, user in await self._served(sandbox):
            for name in {user} if user else named:
                if hand := (await self._sending.contexts.stored(bot, name)).hand_of(sandbox):
                    hands |= {one.client: (name, hand) for one in hand.all}
        return hands

    async def _authors(self, command: Command) -> set[str]:
        """Who may have written the message that a command answers; none: that is not known. Raises Temporary."""
        bot = bot_of(command.reply_to)
        if not bot:
            return set()
        authors = {user for served, user in await self._served(command.sandbox) if served == bot}
        if (binding := self._needs.bindings.get(bot)) is not None:  # it may serve another sandbox
            authors.add(binding.user)
        authors.discard("")
        if authors and command.user and (await self._sending.contexts.stored(bot, command.user)).inbound_ms:
            authors.add(command.user)  # in a group several write to one bot
        return authors

    def _is_bound(self, command: Command) -> bool:
        try:
            self._find(command)
        except Refused:
            return False
        return True

    def _find(self, command: Command) -> Binding:
        """The binding that a command is meant for. Raises Refused("not_bound"), Refused("ambiguous_bot")."""
        bound = self._needs.bindings.of_sandbox(command.sandbox)
        if command.bot:
            bound = [binding for binding in bound if binding.bot == command.bot]
        elif command.user and len(bound) > 1:
            bound = [binding for binding in bound if binding.user == command.user]
        if not bound:
            raise Refused("not_bound", "No bot is bound to this sandbox (or not the one named): bind it first.")
        if len(bound) == 1:
            return bound[0]
        alive = [binding for binding in bound if binding.state == "active"]
        if len(alive) == 1 and {binding.user for binding in bound} == {alive[0].user or None}:
            return alive[0]  # the others wait for a login of their user, which has taken place with this one
        raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")

    def _enqueue(self, item: Item, binding: Binding) -> None:
        lane = self._lanes.at(item.command.sandbox, binding.bot, item.command.user or binding.user)
        if any(parked.command == item.command.id for parked in lane.parked):
            if not item.suspect:  # else it was parked, and only its ack got lost
                self._repeated(item)
            self._settle(item)
            return
        lane.add(item)
        self._start(lane)

    def heard(self, sandbox: str, bot: str, user: str, *, wrote: bool = True) -> None:
        """A user wrote, or a bot lives again: what is parked may go. Commands for the bot's user find that user."""
        if wrote:
            self._wrote(sandbox, bot, user)
        unknown = self._lanes.unknown(sandbox, bot)
        lane = self._lanes.at(sandbox, bot, user) if user else None
        if unknown is not None and lane is not None:
            lane.take_over(unknown)
            self._lanes.drop(unknown)
        for one in self._lanes.of(sandbox):
            if one is lane or one.bot == bot:
                self._start(one)

    def _wrote(self, sandbox: str, bot: str, user: str) -> None:
        """A user wrote: shows that the bot types, where the binding says so."""
        self.typing.heard(bot, user)
        self._lanes.at(sandbox, bot, user).spoke = False
        binding = self._needs.bindings.get(bot)
        if binding is not None and binding.sandbox == sandbox and binding.options.auto_typing:
            self.typing.begin(binding, user)

    def rebound(self, sandbox: str, *, anew: bool = True) -> None:
        """A binding of the sandbox changed. Not `anew`: iLink may think of its token as before."""
        self.typing.rebound(sandbox)
        for lane in self._lanes.of(sandbox):
            if anew:
                lane.stale = None
            binding = self._needs.bindings.get(lane.bot)
            lane.is_left = binding is not None and binding.sandbox != sandbox
            self._start(lane)
            if lane.is_left and (lane.task is None or lane.task.done()):
                self._tasks.spawn(self._store_hand(lane))

    async def drain(self, grace_s: float) -> None:
        """Starts nothing new; requests that are out get `grace_s` seconds to end."""
        self._drain.set()
        self._tasks.spawn(self.typing.drain(min(grace_s, HIDE_S)))
        if not await self._tasks.ended(grace_s):  # a lane that ends spawns its last ack
            log.warning("lanes.cut", shard=self.number, tasks=len(self._tasks))
            self.stop()
            await self._tasks.ended(CUT_S)

    def stop(self) -> None:
        """The shard is lost: everything ends now."""
        self._lost = True
        self._drain.set()
        self.typing.stop()
        self._tasks.cancel()

    @property
    def tasks(self) -> int:
        """How many tasks work here."""
        return len(self._tasks)

    def tidy(self) -> None:
        """Forgets the lanes of users whom nothing waits for; the next command, or their next word, makes another."""
        now = self._sending.clock.monotonic()
        bound = self._needs.bindings.get
        for lane in self._lanes:
            if bound(lane.bot) is None:
                lane.stale = None  # of a token that is gone
            if not lane.is_needed(now):
                self._lanes.drop(lane)
        self.typing.tidy()

    def census(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Counts what is parked by reason into `parked`; commands not settled, and when the oldest was stored."""
        for lane in self._lanes:
            if lane.parked:
                parked[lane.reason or "backlog"] += len(lane.parked)
        stored_ms = [item.command.stored_ms for item in self._in_hand.values()]
        if (left_ms := self._backlog.oldest_ms()) is not None:
            stored_ms.append(left_ms)
        return len(self._in_hand) + self._backlog.waiting, min(stored_ms, default=None)


def _is_surely_for(item: Item, binding: Binding) -> bool:
    """Whether a command is meant for the person of this binding, without a look at whom the sandbox served before."""
    command = item.command
    if command.reply_to and not _is_answer_to(command, binding):
        return False
    if command.user or command.bot:
        return True
    if item.suspect and binding.since_ms > command.stored_ms - SKEW_MS:  # it may have been sent to another
        return False
    return not (binding.out_after and _is_older(item, binding))


def _is_older(item: Item, binding: Binding) -> bool:
    """Whether a command that names nobody was stored when another person was bound."""
    command, delivery = item.command, item.delivery
    if delivery is None or command.user or command.bot:
        return False
    return first_seq(delivery.headers.get(H_SEQUENCE, ""), delivery.seq) <= binding.out_after


def _is_answer_to(command: Command, binding: Binding) -> bool:
    """Whether a command answers nothing, or what the person of this binding wrote to its bot."""
    bot = bot_of(command.reply_to)
    return not bot or (bot == binding.bot and command.user in ("", binding.user))


def _ident(delivery: Delivery, body_id: str | None) -> str:
    routed, msg_id = delivery.headers.get(H_COMMAND, ""), delivery.headers.get(H_MSG_ID, "")
    return command_id(body_id, routed, msg_id, delivery.seq)


def _nameless(delivery: Delivery, body_id: str | None) -> Command:
    """A command that was not read."""
    ident = _ident(delivery, body_id)
    sandbox = delivery.subject.rpartition(".")[2]
    if len(sandbox) > MAX_NAME:
        sandbox = UNROUTED  # the subject of its receipts would break the connection
    stored_ms = since_ms(delivery.headers.get(H_SINCE_MS, ""), delivery.time_ms)
    return stand_in(ident, f"out-{delivery.seq}-{delivery.time_ms}", sandbox, stored_ms)
