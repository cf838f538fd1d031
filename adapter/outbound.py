"""Commands from the bus to iLink: per user in order and once, each with exactly one final receipt.

One consumer per shard, pulled by the shard's owner. In it a lane per user: a queue in memory, and before it what is
parked on the bus. A lane never has two requests out at once, and no lane waits for another. What cannot be sent
before the user writes is moved to WECHAT_PARKED at once, so that it does not fill the consumer's window.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import structlog

from adapter import contract, sending, window
from adapter.bindings import Bindings
from adapter.commands import Command, Limits, command_id, peek, read_command
from adapter.contract import Names
from adapter.errors import AdapterError, BusRefused, LeaseLost, Refused, Temporary, Unreadable
from adapter.leases import Leases
from adapter.ports import Account, Bus, Delivery, History, Message, Stored
from adapter.receipts import Receipts
from adapter.records import Binding
from adapter.sending import Ending, Repeat, Sender, Wait
from adapter.timing import finish

log = structlog.get_logger()

SETTLED_KEPT = 10_000
"""Sequences per shard remembered as settled, for acks that got lost."""
FOREVER_S = 3600.0


class Outgoing(NamedTuple):
    """What the lanes need."""

    sender: Sender
    """Without `pause` and `check`, which each shard brings, and `pace`, which each lane brings."""
    bus: Bus
    history: History
    bindings: Bindings
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
    bound_yet: Callable[[], Awaitable[None]]
    """Returns once every bind command stored before the call has taken effect."""
    gap_s: float
    parked_per_user: int
    stale_retry_s: tuple[float, ...]
    grace_s: float


class Draining(Exception):
    """The service stops: what is in hand stays unsettled, and comes again to the next owner."""


class Item:
    """One command on its way through a lane."""

    __slots__ = ("command", "data", "delivery", "headers", "parked_seq", "suspect")

    def __init__(self, command: Command, data: bytes, headers: dict[str, str], *, suspect: bool) -> None:
        self.command = command
        self.data = data
        self.headers = headers
        self.delivery: Delivery | None = None
        self.parked_seq = 0
        """Its sequence in WECHAT_PARKED, if it comes from there."""
        self.suspect = suspect
        """It was in somebody's hand before: its receipt may be on the bus already."""


class Parked(NamedTuple):
    """A command that waits on the bus."""

    seq: int
    subject: str
    command: str
    expires_ms: int


class Lane:
    """Everything for one user of one sandbox, in order: first what is parked, then the queue."""

    def __init__(self, sandbox: str, bot: str, user: str) -> None:
        self.sandbox = sandbox
        self.bot = bot
        """The bot that it was last meant for; another bot of the same user may take its place."""
        self.user = user
        """"" as long as nobody knows the bot's user."""
        self.queue: deque[Item] = deque()
        self.parked: deque[Parked] = deque()
        self.reason = ""
        """Why the parked commands wait."""
        self.wake = asyncio.Event()
        self.next_send = 0.0
        self.stale_tries = 0
        self.stale_until = 0.0
        self.fresh = True
        """Nothing parked was looked at since this replica took the shard."""
        self.moved: Lane | None = None
        """The lane that took everything over when the bot's user became known."""
        self.task: asyncio.Task[None] | None = None

    def current(self) -> Lane:
        return self.moved.current() if self.moved else self


class Shard:
    """The lanes of one shard, as long as this replica owns it."""

    def __init__(self, number: int, needs: Outgoing) -> None:
        self.number = number
        self._needs = needs
        self._sender = needs.sender._replace(pause=self._pause, check=lambda: needs.leases.check(number))
        self._lanes: dict[tuple[str, str, str], Lane] = {}
        self._in_hand: dict[int, Item] = {}
        self._settled: OrderedDict[int, None] = OrderedDict()
        self._waiting: dict[str, deque[Item]] = {}
        """Per sandbox: commands that nobody could be found for, in order, while a bind may be on its way."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._drain = asyncio.Event()

    # arrivals ---------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Finds what is parked. Raises Temporary."""
        names = self._needs.names
        async for stored in self._needs.history.read(names.stream_parked, names.parked(self.number, "*")):
            try:
                item = self._item_of(stored)
            except AdapterError as exc:
                log.error("parked.unreadable", sequence=stored.seq, reason=exc.reason)
                continue
            bot, user = contract.peer_of(stored.subject.rpartition(".")[2])
            binding = self._needs.bindings.get(bot)
            if not user and binding is not None and binding.sandbox == item.command.sandbox:
                user = binding.user  # learned since it was parked
            lane = self._lane(item.command.sandbox, bot, user)
            lane.parked.append(Parked(stored.seq, stored.subject, item.command.id, item.command.expires_ms))
        for lane in list(self._lanes.values()):
            self._start(lane)

    def on_delivery(self, delivery: Delivery) -> None:
        """A command of this shard arrived, or arrived again."""
        metrics = self._needs.sender.metrics
        if delivery.seq in self._settled:
            self._spawn(delivery.ack())
            return
        if item := self._in_hand.get(delivery.seq):
            item.delivery = delivery
            return
        if not delivery.suspect:
            metrics.outbound_taken.inc()
        body = contract.Outbound()
        try:
            body = peek(delivery.data, self._needs.limits)
            command = self._read(body, delivery)
        except (Unreadable, Refused) as exc:
            item = self._take(_nameless(delivery, body.id), delivery)
            metrics.schema_violations.labels(kind="out").inc()
            dead = isinstance(exc, Unreadable)
            ending = Ending("dead_lettered" if dead else "refused", exc.reason, exc.detail)
            self._spawn(self._end_surely(item, ending))
            return
        self._place(self._take(command, delivery))

    def _take(self, command: Command, delivery: Delivery) -> Item:
        item = Item(command, delivery.data, delivery.headers, suspect=delivery.suspect)
        item.delivery = delivery
        self._in_hand[delivery.seq] = item
        return item

    def _read(self, body: contract.Outbound, delivery: Delivery) -> Command:
        return read_command(
            body,
            sandbox=delivery.subject.rpartition(".")[2],
            ident=_ident(delivery, body.id),
            stored_ms=delivery.time_ms,
            limits=self._needs.limits,
        )

    def _item_of(self, stored: Stored) -> Item:
        """A parked command. Raises Unreadable, Refused."""
        headers = stored.headers
        command = read_command(
            peek(stored.data, self._needs.limits),
            sandbox=headers.get(contract.H_SANDBOX, ""),
            ident=headers.get(contract.H_COMMAND, ""),
            stored_ms=int(headers.get(contract.H_TIME_MS, "0")),
            limits=self._needs.limits,
        )
        item = Item(command, stored.data, headers, suspect=True)
        item.parked_seq = stored.seq
        return item

    def _place(self, item: Item) -> None:
        """Puts a command into its lane; the first one that nobody can be found for holds up its sandbox's others."""
        sandbox = item.command.sandbox
        if sandbox not in self._waiting:
            try:
                self._enqueue(item, self._find(item.command))
                return
            except Refused:
                self._waiting[sandbox] = deque()
                self._spawn(self._place_late(sandbox))
        self._waiting[sandbox].append(item)

    async def _place_late(self, sandbox: str) -> None:
        waiting = self._waiting[sandbox]
        while waiting:
            try:
                await self._needs.bound_yet()
            except Temporary as exc:
                log.warning("command.waits", sandbox=sandbox, reason=exc.reason)
                await self._pause(0.5)
                continue
            for _ in range(len(waiting)):
                item = waiting.popleft()
                try:
                    self._enqueue(item, self._find(item.command))
                except Refused as exc:
                    await self._end_surely(item, Ending("refused", exc.reason, exc.detail))
        del self._waiting[sandbox]

    def _find(self, command: Command) -> Binding:
        """The binding that a command is meant for. Raises Refused("not_bound"), Refused("ambiguous_bot")."""
        bound = self._needs.bindings.of_sandbox(command.sandbox)
        if command.bot:
            bound = [binding for binding in bound if binding.bot == command.bot]
        elif command.user and len(bound) > 1:
            bound = [binding for binding in bound if binding.user == command.user]
        alive = [binding for binding in bound if binding.state == "active"]
        if len(bound) > 1 and len(alive) == 1:
            return alive[0]  # the others wait for a login that has taken place with this one
        if not bound:
            raise Refused("not_bound", "No bot is bound to this sandbox (or not the one named): bind it first.")
        if len(bound) > 1:
            raise Refused("ambiguous_bot", "The sandbox has several bots: name `bot` or `user`.")
        return bound[0]

    def _enqueue(self, item: Item, binding: Binding) -> None:
        lane = self._lane(item.command.sandbox, binding.bot, item.command.user or binding.user)
        if any(parked.command == item.command.id for parked in lane.parked):
            if not item.suspect:  # else it was parked, and only its ack got lost
                self._repeated(item)
            self._settle(item)
            return
        lane.queue.append(item)
        self._start(lane)

    def _repeated(self, item: Item) -> None:
        """A second publish of a command that has its receipt, or will have it."""
        log.info("command.repeated", sandbox=item.command.sandbox, command=item.command.id)
        self._sender.metrics.outbound_messages.labels(outcome="duplicate", reason="none").inc()

    def _lane(self, sandbox: str, bot: str, user: str) -> Lane:
        key = (sandbox, "" if user else bot, user)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(sandbox, bot, user)
        return lane

    # waking -----------------------------------------------------------------------------------------

    def heard(self, sandbox: str, bot: str, user: str) -> None:
        """A user wrote, or a bot lives again: what is parked may go. Commands for the bot's user find that user."""
        unknown = self._lanes.pop((sandbox, bot, ""), None)
        lane = self._lane(sandbox, bot, user) if user else None
        if unknown is not None and lane is not None:
            unknown.moved = lane
            lane.parked = deque(sorted({*lane.parked, *unknown.parked}))
            lane.queue.extend(unknown.queue)
            unknown.parked.clear()
            unknown.queue.clear()
            unknown.wake.set()
        elif unknown is not None:
            self._lanes[(sandbox, bot, "")] = unknown
        for one in self._lanes.values():
            if one.sandbox == sandbox and (one is lane or one.bot == bot):
                one.stale_until = 0.0
                self._start(one)

    def rebound(self, sandbox: str) -> None:
        """A binding of the sandbox changed."""
        for lane in self._lanes.values():
            if lane.sandbox == sandbox:
                lane.stale_tries, lane.stale_until = 0, 0.0
                self._start(lane)

    def _start(self, lane: Lane) -> None:
        lane.wake.set()
        if (lane.task is None or lane.task.done()) and (lane.queue or lane.parked) and not self._drain.is_set():
            lane.task = self._spawn(self._run(lane))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) and not isinstance(exc, Draining):
            log.error("task.crashed", shard=self.number, exc_info=exc)

    # the lane's loop --------------------------------------------------------------------------------

    async def _run(self, lane: Lane) -> None:
        """Works until the lane is empty. One unit of work per turn; what fails unexpectedly is tried again."""
        failures = 0
        while (lane.queue or lane.parked) and not self._drain.is_set():
            lane.wake.clear()
            try:
                wait_s = await finish(self._turn(lane), self._needs.grace_s)
                failures = 0
            except (LeaseLost, Draining):
                return
            except Temporary as exc:
                log.warning("lane.waits", sandbox=lane.sandbox, reason=exc.reason)
                wait_s = 0.5
            except Exception:
                failures += 1
                log.exception("lane.crashed", sandbox=lane.sandbox, failures=failures)
                wait_s = min(60.0, 2.0**failures)
            if wait_s:
                await self._sleep(lane, wait_s)

    async def _sleep(self, lane: Lane, seconds: float) -> None:
        waits = [asyncio.ensure_future(lane.wake.wait()), asyncio.ensure_future(self._drain.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _turn(self, lane: Lane) -> float:
        """One step for the lane; seconds to wait before the next (0: at once), unless it is woken."""
        await self._expire(lane)
        if not (lane.queue or lane.parked):
            return 0.0
        binding = self._binding(lane)
        if binding is None:
            await self._needs.bound_yet()
            binding = self._binding(lane)
        if binding is None:
            await self._give_up(lane)
            return 0.0
        lane.reason = self._hindrance(lane, binding)
        if lane.parked and not lane.reason:
            return await self._flush(lane, binding)
        if not lane.queue:
            return self._patience(lane)
        item = lane.queue[0]
        if lane.parked or lane.reason:
            await self._hold_back(lane, item, Wait(lane.reason or "backlog"))
            _shift(lane, item)
            return 0.0
        result = await self._send(lane, item, binding)
        if isinstance(result, Wait):
            await self._hold_back(lane, item, result)
            lane.reason = result.reason
        _shift(lane, item)
        return 0.0

    def _binding(self, lane: Lane) -> Binding | None:
        """The bot that serves the lane's user now: its own, or the one that replaced it."""
        found = self._needs.bindings.get(lane.bot)
        if found is not None and found.sandbox == lane.sandbox:
            return found
        if not lane.user:
            return None
        for other in self._needs.bindings.of_sandbox(lane.sandbox):
            if other.user == lane.user:
                lane.bot = other.bot
                return other
        return None

    def _hindrance(self, lane: Lane, binding: Binding) -> str:
        if binding.state == "needs_login" or self._needs.stale(binding.bot):
            return "needs_login"
        if self._sender.clock.monotonic() < lane.stale_until:
            return "needs_login"
        return "" if lane.user else "window_closed"

    def _patience(self, lane: Lane) -> float:
        """How long the lane may sleep when nobody wakes it."""
        now_ms = self._sender.clock.now_ms()
        waits = [FOREVER_S, *((parked.expires_ms - now_ms) / 1000 for parked in lane.parked)]
        if lane.stale_until > self._sender.clock.monotonic():
            waits.append(lane.stale_until - self._sender.clock.monotonic())
        return max(0.05, min(waits))

    async def _flush(self, lane: Lane, binding: Binding) -> float:
        """Sends the oldest parked command, if it may go now."""
        parked = lane.parked[0]
        item = await self._load_parked(parked)
        if item is None:
            lane.parked.popleft()
            return 0.0
        item.suspect = lane.fresh
        result = await self._send(lane, item, binding)
        if isinstance(result, Wait):
            lane.reason = result.reason
            if lane.queue:
                behind = lane.queue[0]
                await self._hold_back(lane, behind, Wait(result.reason))
                _shift(lane, behind)
                return 0.0
            peer = await self._sender.contexts.peer(binding.bot, lane.user)
            opens_ms = window.opens_at_ms(peer.context, self._sender.rules)
            left_s = (opens_ms - self._sender.clock.now_ms()) / 1000 if opens_ms else FOREVER_S
            return max(0.05, min(self._patience(lane), left_s))
        lane.fresh = False
        lane.parked.popleft()
        return 0.0

    async def _load_parked(self, parked: Parked) -> Item | None:
        names = self._needs.names
        async for stored in self._needs.history.read(names.stream_parked, parked.subject, after=parked.seq - 1):
            return self._item_of(stored) if stored.seq == parked.seq else None
        return None

    async def _send(self, lane: Lane, item: Item, binding: Binding) -> Wait | None:
        """Sends and settles; a Wait leaves the command where it is."""
        if item.suspect and await self._needs.receipts.has_final(item.command):
            self._settle(item)
            await self._unpark(item)
            return None
        peer = await self._sender.contexts.peer(binding.bot, lane.user)
        try:
            account = self._needs.account(binding)
        except Refused as exc:
            return Wait("needs_login", exc.detail)

        sender = self._sender._replace(pace=lambda: self._pace(lane))
        async with peer.sending:
            result = await sending.send(item.command, peer, account, sender)
            match result:
                case Repeat():
                    self._repeated(item)
                    self._settle(item)
                    await self._unpark(item)
                    return None
                case Wait():
                    if result.reason == "needs_login":
                        await self._refused_token(lane, binding, result)
                    if item.command.when_closed == "park":
                        return result
                    hand = peer.context.hand
                    sent = tuple(hand.message_ids) if hand and hand.client == item.command.client else ()
                    ending = Ending("refused", result.reason, result.detail, sent, *result[2:])
                    await self._end(item, ending, window.shown(peer.context, self._sender.rules), binding, lane.user)
                    peer.context = window.settled(peer.context, item.command.id)
                    return None
                case Ending():
                    lane.stale_tries = 0
                    await self._end(item, result, window.shown(peer.context, self._sender.rules), binding, lane.user)
                    peer.context = window.settled(peer.context, item.command.id)
                    return None

    async def _pace(self, lane: Lane) -> None:
        wait_s = lane.next_send - self._sender.clock.monotonic()
        if wait_s > 0:
            await self._pause(wait_s)
        lane.next_send = self._sender.clock.monotonic() + self._needs.gap_s

    async def _refused_token(self, lane: Lane, binding: Binding, result: Wait) -> None:
        """-14 on a send while polling may be fine (F10): a few spaced tries, then a login is needed."""
        if result.errcode is None and result.ret is None:
            return
        schedule = self._needs.stale_retry_s
        lane.stale_tries += 1
        log.warning("send.stale", bot=binding.bot, tries=lane.stale_tries)
        if lane.stale_tries > len(schedule):
            await self._needs.stale_on_send(binding, result.detail)
            return
        lane.stale_until = self._sender.clock.monotonic() + schedule[lane.stale_tries - 1]

    # parking and ending -----------------------------------------------------------------------------

    async def _hold_back(self, lane: Lane, item: Item, wait: Wait) -> None:
        """Parks a command of the queue, or refuses it where it does not want to wait or too many do."""
        command = item.command
        if command.when_closed == "refuse":
            await self._end(
                item, Ending("refused", wait.reason, wait.detail, (), *wait[2:]), await self._window(lane)
            )
            return
        if len(lane.parked) >= self._needs.parked_per_user:
            await self._end(
                item, Ending("refused", "backlog", "Too many commands wait for this user."), await self._window(lane)
            )
            return
        headers = {k: v for k, v in item.headers.items() if not k.startswith("Nats-")} | {
            contract.H_MSG_ID: f"parked:{command.client}",
            contract.H_SANDBOX: command.sandbox,
            contract.H_COMMAND: command.id,
            contract.H_TIME_MS: str(command.stored_ms),
        }
        subject = self._needs.names.parked(self.number, contract.peer_key(lane.bot, lane.user))
        try:
            ack = await self._needs.bus.publish(Message("parked", subject, item.data, headers))
        except BusRefused as exc:
            await self._end(item, Ending("refused", "backlog", f"It could not be parked: {exc.detail}"), None)
            return
        await self._needs.receipts.parked(command, wait, lane.bot, lane.user, await self._window(lane))
        home = lane.current()
        parked = Parked(ack.seq, subject, command.id, command.expires_ms)
        if parked not in home.parked:
            home.parked.append(parked)
        self._start(home)
        self._settle(item)

    async def _window(self, lane: Lane) -> contract.Window:
        if not lane.user:
            return contract.Window(remaining=0)
        peer = await self._sender.contexts.peer(lane.bot, lane.user)
        return window.shown(peer.context, self._sender.rules)

    async def _end(
        self,
        item: Item,
        ending: Ending,
        shown: contract.Window | None,
        binding: Binding | None = None,
        user: str = "",
    ) -> None:
        """The final receipt, and what belongs to it; then the command is settled."""
        command = item.command
        if not (item.suspect and await self._needs.receipts.has_final(command)):
            bot = binding.bot if binding else command.bot
            await self._needs.receipts.final(
                command,
                ending,
                bot=bot,
                user=user or command.user,
                shown=shown or contract.Window(),
                original=(item.data, item.headers, self._needs.names.out(command.sandbox)),
            )
        self._settle(item)
        await self._unpark(item)

    async def _end_surely(self, item: Item, ending: Ending) -> None:
        """Ends a command that never came into a lane. Raises Draining."""
        while True:
            try:
                await self._end(item, ending, None)
            except Temporary as exc:
                log.warning("command.waits", sandbox=item.command.sandbox, reason=exc.reason)
                await self._pause(0.5)
            else:
                return

    def _settle(self, item: Item) -> None:
        delivery = item.delivery
        if delivery is None:
            return
        self._in_hand.pop(delivery.seq, None)
        self._settled[delivery.seq] = None
        if len(self._settled) > SETTLED_KEPT:
            self._settled.popitem(last=False)
        self._spawn(delivery.ack())

    async def _unpark(self, item: Item) -> None:
        if item.parked_seq:
            await self._needs.history.delete(self._needs.names.stream_parked, item.parked_seq)

    async def _expire(self, lane: Lane) -> None:
        """Refuses what waited too long."""
        now_ms = self._sender.clock.now_ms()
        for item in [item for item in lane.queue if item.command.expires_ms <= now_ms]:
            await self._end(item, Ending("refused", "expired", "It was not sent in time."), await self._window(lane))
            if item in lane.queue:
                lane.queue.remove(item)
        for parked in [parked for parked in lane.parked if parked.expires_ms <= now_ms]:
            if item_now := await self._load_parked(parked):
                ending = Ending("refused", "expired", "The user did not write in time.")
                await self._end(item_now, ending, await self._window(lane))
            if parked in lane.parked:
                lane.parked.remove(parked)

    async def _give_up(self, lane: Lane) -> None:
        """The user's bot was unbound: nothing of theirs will be sent."""
        ending = Ending("refused", "not_bound", "The bot was unbound.")
        while lane.queue:
            await self._end(lane.queue[0], ending, None)
            lane.queue.popleft()
        while lane.parked:
            if item := await self._load_parked(lane.parked[0]):
                await self._end(item, ending, None)
            lane.parked.popleft()

    # leaving ----------------------------------------------------------------------------------------

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._drain.wait()
        except TimeoutError:
            return
        raise Draining

    async def drain(self, grace_s: float) -> None:
        """Starts nothing new; requests that are out get `grace_s` seconds to end."""
        self._drain.set()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while self._tasks and loop.time() < deadline:  # a lane that ends spawns its last ack
            await asyncio.wait(set(self._tasks), timeout=deadline - loop.time())
        if late := set(self._tasks):
            log.warning("lanes.cut", shard=self.number, tasks=len(late))
            self.stop()
            await asyncio.wait(late, timeout=1.0)

    def stop(self) -> None:
        """The shard is lost: everything ends now."""
        self._drain.set()
        for task in list(self._tasks):
            task.cancel()

    def census(self, parked: Counter[str]) -> tuple[int, int | None]:
        """Counts what is parked by reason into `parked`; commands in hand, and when the oldest was stored."""
        for lane in self._lanes.values():
            if lane.parked:
                parked[lane.reason or "backlog"] += len(lane.parked)
        oldest = min((item.command.stored_ms for item in self._in_hand.values()), default=None)
        return len(self._in_hand), oldest


def _shift(lane: Lane, item: Item) -> None:
    """Takes the first command out of the queue, unless the queue went to another lane meanwhile."""
    if lane.queue and lane.queue[0] is item:
        lane.queue.popleft()


def _ident(delivery: Delivery, body_id: str | None) -> str:
    routed, msg_id = delivery.headers.get(contract.H_COMMAND, ""), delivery.headers.get(contract.H_MSG_ID, "")
    return command_id(body_id, routed, msg_id, delivery.seq)


def _nameless(delivery: Delivery, body_id: str | None) -> Command:
    """Stands for a command that cannot be carried out, so that it can have its receipt."""
    ident = _ident(delivery, body_id)
    sandbox = delivery.subject.rpartition(".")[2]
    return Command(
        ident,
        f"{sandbox}-{delivery.seq}-{delivery.time_ms}",
        sandbox,
        "",
        "",
        [],
        "refuse",
        delivery.time_ms,
        0,
        patient=True,
    )
