"""Works off the lanes of a shard, one step per turn: what is parked before what is queued.

What cannot be sent before the user writes is moved to WECHAT_PARKED at once, so that it does not fill the consumer's
window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import msgspec
import structlog

from adapter import contract, window
from adapter.bindings.stale_token import needs_login_now
from adapter.contexts import Peer
from adapter.errors import BusRefused, LeaseLost, Refused, Temporary
from adapter.headers import passed_on
from adapter.names import H_COMMAND, H_MSG_ID, H_SANDBOX, H_TIME_MS, peer_key
from adapter.outbound.commands import MERGED_AT_ONCE, MediaPart, joins, merge
from adapter.outbound.endings import Apart, Ending, Repeat, Wait, in_doubt
from adapter.outbound.lane import Item, Lane, Lanes, Parked, Stale, parked_at
from adapter.outbound.parked import read_behind, read_parked
from adapter.outbound.receipts import Name, ending_of
from adapter.outbound.sending import Send
from adapter.outbound.settling import GONE_S, Draining, Outgoing, Settling
from adapter.outbound.typing_indicator import TypingIndicators
from adapter.ports import Account, Message, Uploaded
from adapter.records import Binding, Context, Hand
from adapter.timing import any_of, finish

log = structlog.get_logger()

FOREVER_S = 3600.0
"""How long a lane sleeps that nothing but a wake-up can help; it looks again then all the same."""
PAUSED_S = 5.0
"""How long a lane waits for the lease; it looks again then all the same."""
NOTE_S = 2.0
"""Longest time for which a bus that does not answer holds up the end of a lane."""


class LaneWork(Settling):
    """The lanes of one shard at work; `Shard` adds what arrives."""

    def __init__(self, number: int, needs: Outgoing) -> None:
        super().__init__(number, needs)
        self.typing = TypingIndicators(number, needs.showing)
        self._lanes = Lanes()

    async def _run(self, lane: Lane) -> None:
        """Works until the lane is empty, one step per turn; retries what fails unexpectedly."""
        failures = 0
        while (lane.queue or lane.parked) and not self._drain.is_set():
            await self._needs.turns.next()
            lane.wake.clear()
            try:
                self._check()
                wait_s = await finish(self._turn(lane), self._needs.grace_s)
                failures = 0
                self._hide_typing(lane)
            except Draining:
                break
            except LeaseLost:  # paused: it may come back; lost: somebody stops us
                await any_of(self._needs.leases.held(self.number), self._drain.wait(), timeout_s=PAUSED_S)
                wait_s = 0.2
            except Temporary as exc:
                log.warning("lane.waits", sandbox=lane.sandbox, reason=exc.reason)
                wait_s = 0.5
            except Exception:
                failures += 1
                log.exception("lane.crashed", sandbox=lane.sandbox, failures=failures)
                wait_s = min(60.0, 2.0**failures)
            if wait_s:
                await any_of(lane.wake.wait(), self._drain.wait(), timeout_s=wait_s)
        if not self._lost and (self._drain.is_set() or lane.is_left):
            await self._store_hand(lane)
            lane.task = None
            self._start(lane)  # what came meanwhile found a task at work

    async def _store_hand(self, lane: Lane) -> None:
        """Stores how far the command in hand got: the next owner would know only that a request was to leave."""
        peer = self._sending.contexts.loaded(lane.bot, lane.user)
        if peer is None or peer.context is peer.stored:
            return
        if peer.context.hand is None and not lane.is_left:
            return
        try:
            async with asyncio.timeout(NOTE_S):
                fence = self._check if lane.is_left else None  # the command was ours, whosever the bot is
                await self._sending.contexts.save(peer, lambda context: context, fence=fence)
        except (Temporary, LeaseLost, TimeoutError) as exc:
            log.warning("lane.unstored", sandbox=lane.sandbox, reason=type(exc).__name__)

    async def _turn(self, lane: Lane) -> float:
        """One step for the lane; seconds to wait before the next (0: at once), unless it is woken."""
        if lane.behind is not None:
            await asyncio.wait([lane.behind])
            lane.behind = None
        await self._expire(lane)
        if not (lane.queue or lane.parked):
            return 0.0
        binding = self._binding(lane)
        if binding is None:
            await self._needs.bound_yet()
            binding = self._binding(lane)
        if binding is None:
            await self._end_unbound(lane)
            return 0.0
        if lane.user and not lane.looked_back:
            await self._peer(lane)  # before it is decided what is next: another lane's commands may come meanwhile
        now = self._sending.clock.monotonic()
        lane.reason = self._blocked_by(lane, binding, now)
        if lane.queue and lane.queue[0].command.typing and not lane.parked and not lane.reason:
            await self._type(lane, lane.queue[0], binding)
            return 0.0
        lane.spoke = True
        begun = lane.parked and lane.queue and not lane.reason and await self._is_begun(lane, lane.queue[0])
        if lane.parked and not lane.reason and not begun:
            return await self._send_parked(lane, binding)
        if not lane.queue:
            return self._sleep_s(lane, now)
        item = lane.queue[0]
        result = Wait(lane.reason) if lane.reason else await self._send(lane, [item], binding)
        if isinstance(result, Wait):
            await self._park(lane, item, result)
            lane.reason = result.reason
        lane.shift(item)
        return 0.0

    async def _is_begun(self, lane: Lane, item: Item) -> bool:
        """Whether a command is half sent: what is parked was found, or its user became known, only after that."""
        context = (await self._peer(lane)).context
        known = [hand for hand in (context.hand, context.left) if hand and hand.client == item.command.client]
        return any(hand.is_begun for hand in known)

    async def _type(self, lane: Lane, item: Item, binding: Binding) -> None:
        """Starts a typing command; what is behind it does not wait for iLink's answer. Raises Temporary."""
        if item.suspect and await self._needs.receipts.has_final(item.command):
            self._settle(item)
        elif item.command.typing == "on":
            lane.spoke = False
            self._tasks.spawn(self._typed(lane, item, self.typing.show(binding, lane.user)))
        else:
            self._tasks.spawn(self._typed(lane, item, self.typing.hide(binding, lane.user)))
        lane.shift(item)

    async def _typed(self, lane: Lane, item: Item, taken: asyncio.Future[None]) -> None:
        """Ends a typing command once iLink took it, or did not."""
        ending = Ending("accepted")
        try:
            await taken
        except Refused as exc:
            ending = Ending("refused", exc.reason, exc.detail).with_answer(exc)
        await self._end_surely(item, ending, lane)

    def _hide_typing(self, lane: Lane) -> None:
        """Hides that the bot types once nothing more can be sent now."""
        if lane.spoke and lane.user and not lane.queue and (lane.reason or not lane.parked):
            self.typing.hush(lane.bot, lane.user)

    def _binding(self, lane: Lane) -> Binding | None:
        """The bot that serves the lane's user now: its own, or the one that replaced it."""
        found = self._needs.bindings.get(lane.bot)
        if found is not None and found.sandbox != lane.sandbox:
            found = None
        if not lane.user or (found is not None and found.user == lane.user):
            return found
        for other in self._needs.bindings.of_sandbox(lane.sandbox):
            if other.user == lane.user:
                lane.former[lane.bot] = None
                lane.bot, lane.is_left, lane.looked_back = other.bot, False, False
                return other
        return found

    def _blocked_by(self, lane: Lane, binding: Binding, now: float) -> str:
        """What forbids sending, whatever the window says, as a receipt's reason; "" if nothing does."""
        stale = lane.stale
        if binding.state == "needs_login" and not (stale and stale.last_tries):
            return "needs_login"
        if self._needs.stale(binding.bot) or (stale and now < stale.until):
            return "needs_login"
        return "" if lane.user else "window_closed"

    def _sleep_s(self, lane: Lane, now: float) -> float:
        """Seconds that the lane may sleep when nobody wakes it. `now`: when obstacles were looked for, since a try
        that became due just after that has yet to be made."""
        now_ms = self._sending.clock.now_ms()
        waits = [FOREVER_S, *((parked.expires_ms - now_ms) / 1000 for parked in lane.parked)]
        if lane.stale and (left_s := lane.stale.until - now) > 0:
            waits.append(left_s)
        return max(0.05, min(waits))

    async def _send_parked(self, lane: Lane, binding: Binding) -> float:
        """Sends the oldest parked command, and what goes with it in one message, if it may go now."""
        await self._look_up_receipts(lane)
        peer = await self._peer(lane)
        if (hand := peer.context.hand) and hand.is_begun:  # its rest comes before anything else
            lane.put_first(next((one for one in lane.parked if one.client == hand.client), lane.parked[0]))
        parked = lane.parked[0]
        if parked.seq in lane.unsure:
            return 0.0  # found by a reset meanwhile
        item = await self._read_parked(lane, parked)
        if item is None:
            lane.drop([parked.seq])
            return 0.0
        if told := lane.told.get(parked.seq):
            await self._end_as_told(lane, item, peer, told, binding)
            return 0.0
        group = await self._group(lane, item, peer)
        for one in group:
            one.suspect = False  # looked up above
        result = await self._send(lane, group, binding)
        if isinstance(result, Wait):
            return await self._stay_parked(lane, peer, result, binding)
        if isinstance(result, Apart):
            lane.apart_until = group[-1].parked_seq
            return 0.0
        lane.drop([one.parked_seq for one in group])
        return 0.0

    async def _end_as_told(
        self, lane: Lane, item: Item, peer: Peer, told: contract.Receipt, binding: Binding
    ) -> None:
        """Ends what the owner before us told, who perhaps had not yet told all that were in the same message."""
        # what expired by itself had not been sent: it left the others
        hand = peer.context.hand if told.reason != "expired" else None
        group = [item, *await self._merged_with(lane, hand, item)]
        ending = ending_of(told)
        await self._end(group, ending, self._shown(peer), binding.bot, lane.user)
        peer.context = window.settled(peer.context, item.command.client, sent=ending.may_be_sent)
        lane.drop([one.parked_seq for one in group])

    async def _read_parked(self, lane: Lane, parked: Parked) -> Item | None:
        """A parked command; None: it is gone. Raises Temporary, also as long as it may only not be shown."""
        item, missed, now = await read_parked(parked, self._needs), lane.missed, self._sending.clock.monotonic()
        if item is not None and missed and parked.seq >= missed[0]:
            lane.missed = None
        if item is not None or parked.seq in lane.told:
            return item
        # of many that are gone only the first one takes long
        since = missed[1] if missed and now - missed[2] < GONE_S else now
        lane.missed = parked.seq, since, now
        if now - since < GONE_S:
            raise Temporary("parked_missing")
        log.warning("parked.gone", shard=self.number, sequence=parked.seq)
        return None

    async def _look_up_receipts(self, lane: Lane) -> None:
        """Finds which parked commands of the owners before have their final receipts. Raises Temporary."""
        names = {one.seq: Name(one.command, one.stored_ms) for one in lane.parked if one.seq in lane.unsure}
        if names:
            found = await self._needs.receipts.find_finals(lane.sandbox, set(names.values()))
            lane.told |= {seq: found[name] for seq, name in names.items() if name in found}
        lane.unsure -= names.keys()

    async def _stay_parked(self, lane: Lane, peer: Peer, wait: Wait, binding: Binding) -> float:
        """Nothing parked can go: parks what came behind it, or lets a final command pass; seconds to sleep."""
        lane.reason = wait.reason
        may_pass = wait.reason == "quota" and self._may_pass(lane, peer)
        final = min((one for one in lane.parked if one.final), default=None)
        if may_pass and final is not None and final != lane.parked[0]:
            lane.put_first(final)
            return 0.0
        lane.sort()
        if lane.queue:
            behind = lane.queue[0]
            result: Wait | Apart | None = Wait(wait.reason)
            if may_pass and behind.command.final and behind.command.when_closed == "refuse" and behind.command.parts:
                result = await self._send(lane, [behind], binding)
            if isinstance(result, Wait):
                await self._park(lane, behind, result)
            lane.shift(behind)
            return 0.0
        opens_ms = window.opens_at_ms(peer.context, self._sending.rules)
        left_s = (opens_ms - self._sending.clock.now_ms()) / 1000 if opens_ms else FOREVER_S
        return max(0.05, min(self._sleep_s(lane, self._sending.clock.monotonic()), left_s))

    def _may_pass(self, lane: Lane, peer: Peer) -> bool:
        """Whether a final command may go ahead of those that wait for sends: only sends are left that are kept back
        for it, and no other command is half sent. (What nobody waits for was told by the owner before us.)"""
        context, rules = peer.context, self._sending.rules
        hand = context.hand
        if not rules.reserve or (hand and hand.is_begun and any(one.client == hand.client for one in lane.parked)):
            return False
        return not window.verdict(context, self._sending.clock.now_ms(), rules, final=True)

    async def _group(self, lane: Lane, first: Item, peer: Peer) -> list[Item]:
        """The first parked command and those whose texts go in the same message.

        A message that may have been sent holds the same ones again; what was tried in any other way goes alone.
        """
        hand, context = peer.context.hand, peer.context
        if hand is not None and hand.client == first.command.client:
            return [first, *await self._merged_with(lane, hand, first)]
        longest = self._needs.merge_chars
        alone = first.parked_seq <= lane.apart_until or _is_repeat(context, first)
        alone = alone or first.parked_seq != min(lane.parked).seq  # it went ahead of those behind it
        closed = window.verdict(context, self._sending.clock.now_ms(), self._sending.rules, final=True)
        if alone or closed or not longest or not joins([], first.command, longest):
            return [first]
        group = [first]
        for item in await read_behind(lane, MERGED_AT_ONCE - 1, self._needs):
            known = _is_repeat(context, item) or item.parked_seq in lane.unsure or item.parked_seq in lane.told
            if known or not joins([one.command for one in group], item.command, longest):
                break
            group.append(item)
        return group

    async def _merged_with(self, lane: Lane, hand: Hand | None, first: Item) -> list[Item]:
        """The commands that the record names as merged with `first`, as far as they are parked. Raises Temporary."""
        if hand is None or hand.client != first.command.client or not hand.merged:
            return []
        names = {other.client for other in hand.merged}
        found = [item for item in await read_behind(lane, len(names), self._needs) if item.command.client in names]
        names -= {item.command.client for item in found}
        for parked in [one for one in lane.parked if one.client in names]:
            if item := await self._read_parked(lane, parked):
                found.append(item)
            else:
                lane.drop([parked.seq])
        return found

    async def _send(self, lane: Lane, group: Sequence[Item], binding: Binding) -> Wait | Apart | None:
        """Sends and settles; a Wait or Apart leaves the commands where they are. Several: as one message."""
        item = group[0]
        if item.suspect and await self._needs.receipts.has_final(item.command):
            self._done_with(item)
            return None
        peer = await self._peer(lane)
        try:
            account = lane.account(binding, self._needs.account)
        except Refused as exc:
            return Wait("needs_login", exc.detail)

        def check() -> None:
            self._check()
            now = self._needs.bindings.get(binding.bot)
            if now is None or now.sandbox != lane.sandbox:
                raise LeaseLost("not_bound", binding.bot)

        send = Send(
            self._sending,
            merge([one.command for one in group]),
            peer,
            account,
            pause=self._pause,
            pace=partial(self._pace, lane),
            check=check,
            upload=self._upload,
        )
        async with peer.sending:
            try:
                result = await send.run()
            finally:
                hand = peer.context.hand
                if hand is not None and hand.sandbox != lane.sandbox:  # it has taken the place of ours
                    hand = peer.context.hand_of(lane.sandbox)
                lane.hand = hand
            match result:
                case Repeat():
                    self._repeated(item)
                    self._done_with(item)
                    return None
                case Apart():
                    return result
                case Wait():
                    if result.reason == "needs_login":
                        await self._refused_token(lane, binding, result)
                    if item.command.when_closed == "park":
                        return result
                    result = in_doubt(result.as_ending("refused"), lane.hand, item.command)
                case Ending():
                    await self._settle_token(lane, binding, result)
            await self._end(group, result, self._shown(peer), binding.bot, lane.user)
            peer.context = window.settled(peer.context, item.command.client, sent=result.may_be_sent)
            lane.hand = None
            return None

    async def _upload(self, ident: str, part: MediaPart, account: Account, user: str) -> Uploaded:
        """Uploads.bring, cut when the service stops: the next owner does it anew. Raises Draining."""
        work = asyncio.ensure_future(self._needs.uploads.bring(ident, part, account, user))
        stop = asyncio.ensure_future(self._drain.wait())
        try:
            await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Draining
            return work.result()
        finally:
            work.cancel()
            stop.cancel()

    async def _pace(self, lane: Lane) -> None:
        wait_s = lane.next_send - self._sending.clock.monotonic()
        if wait_s > 0:
            await self._pause(wait_s)
        lane.next_send = self._sending.clock.monotonic() + self._needs.gap_s

    async def _refused_token(self, lane: Lane, binding: Binding, result: Wait) -> None:
        """-14 on a send while polling may be fine (F10): a few spaced tries, and in time a login is needed."""
        if result.errcode is None and result.ret is None:
            return
        now = self._sending.clock.monotonic()
        before = lane.stale or Stale(0, now, now, last_tries=False)
        pauses = self._needs.stale_retry_s[before.tries :]
        pause_s = pauses[0] if pauses else None
        lost = before.last_tries or needs_login_now(pause_s, now - before.since)
        lane.stale = Stale(before.tries + 1, before.since, now + (pause_s or 0.0), last_tries=lost and bool(pauses))
        log.warning("send.stale", bot=binding.bot, tries=lane.stale.tries)
        if lost and binding.state == "active":
            await self._needs.stale_on_send(binding, result.detail)

    async def _settle_token(self, lane: Lane, binding: Binding, ending: Ending) -> None:
        """A send has ended: unless nobody answered, iLink takes the token."""
        lane.stale = None
        if binding.state == "needs_login" and ending.is_sent:
            await self._needs.alive_on_send(binding)

    async def _park(self, lane: Lane, item: Item, wait: Wait) -> None:
        """Parks a command of the queue, or refuses it where it does not want to wait or too many do."""
        command = item.command
        if item.suspect and await self._needs.receipts.has_final(command):
            self._done_with(item)
            return
        if await self._drop_repeat(lane, item):
            return
        if command.when_closed == "refuse":
            await self._end_in(lane, item, wait.as_ending("refused"))
            return
        if len(lane.parked) >= self._needs.parked_per_user:
            await self._end_in(lane, item, Ending("refused", "backlog", "Too many commands wait for this user."))
            return
        if sum(len(one.parked) for one in self._lanes.of(command.sandbox)) >= self._needs.parked_per_sandbox:
            detail = "Too many commands of this sandbox wait for their users."
            await self._end_in(lane, item, Ending("refused", "backlog", detail))
            return
        headers = passed_on(item.headers) | {
            H_MSG_ID: f"parked:{command.client}",
            H_SANDBOX: command.sandbox,
            H_COMMAND: command.id,
            H_TIME_MS: str(command.time_ms),
        }
        subject = self._needs.names.parked(self.number, peer_key(lane.bot, lane.user))
        try:
            ack = await self._needs.bus.publish(
                Message("parked", subject, self._parked_data(item), headers, self._check)
            )
        except BusRefused as exc:
            await self._end_in(lane, item, Ending("refused", "backlog", f"It could not be parked: {exc.detail}"))
            return
        await self._needs.receipts.parked(command, wait, lane.bot, lane.user, await self._window(lane), item.headers)
        home = lane.current()
        parked = parked_at(ack.seq, subject, command)
        if all(parked.seq != known.seq for known in home.parked):
            home.park(parked)
        self._start(home)
        self._settle(item)

    def _parked_data(self, item: Item) -> bytes:
        data = item.data if item.said is None else msgspec.json.encode(item.said)
        return data if len(data) <= self._needs.limits.command_bytes else item.data

    async def _drop_repeat(self, lane: Lane, item: Item) -> bool:
        """Whether a command was sent before, by another message: that one's receipt is all that is told then,
        whatever keeps this one from being sent. Raises Temporary."""
        if not lane.user or not _is_repeat((await self._peer(lane)).context, item):
            return False
        if await self._is_begun(lane, item):
            return False  # another command took its place in the record, which noted its id then
        self._repeated(item)
        self._done_with(item)
        return True

    async def _expire(self, lane: Lane) -> None:
        """Ends what waited too long: as refused, or as uncertain where it may have been sent."""
        now_ms = self._sending.clock.now_ms()
        late, late_parked = lane.late(now_ms)
        if not late and not late_parked:
            return
        hand = await self._hand(lane)
        told: dict[str, Ending] = {}
        for item in late:
            if not await self._drop_repeat(lane, item):
                ending = Ending("refused", "expired", "It was not sent in time.")
                told[item.command.client] = await self._end_unsent(lane, item, ending, hand)
            lane.shift(item)
        held = {one.client for one in hand.all} if hand and hand.tried else set()
        together = lane.late_together(held, now_ms)
        for parked in together:
            if item_now := await self._read_parked(lane, parked):
                ending = Ending("refused", "expired", "The user did not write in time.")
                told[parked.client] = await self._end_unsent(lane, item_now, ending, hand)
            lane.drop([parked.seq])
            if hand and not any(hand.holds(one.client) for one in lane.parked):
                await self._clear_hand(lane, hand, told)  # at once: the next one may not be there to be read
        await self._clear_hand(lane, hand, told)

    async def _end_unbound(self, lane: Lane) -> None:
        """Ends all commands of the lane, since the user's bot was unbound."""
        hand = await self._hand(lane)
        ending = Ending("refused", "not_bound", "The bot was unbound.")
        told: dict[str, Ending] = {}

        async def end(item: Item) -> None:
            told[item.command.client] = in_doubt(ending, hand, item.command)
            await self._end([item], told[item.command.client], None, lane.bot, lane.user)

        while lane.queue:
            item_now = lane.queue[0]
            await end(item_now)
            lane.shift(item_now)
        while lane.parked:
            if item := await self._read_parked(lane, lane.parked[0]):
                await end(item)
            lane.parked.popleft()
        await self._clear_hand(lane, hand, told)

    def _start(self, lane: Lane) -> None:
        lane.wake.set()
        if (lane.task is None or lane.task.done()) and (lane.queue or lane.parked) and not self._drain.is_set():
            lane.task = self._tasks.spawn(self._run(lane))


def _is_repeat(context: Context, item: Item) -> bool:
    return window.is_repeat(context, item.command.sandbox, item.command.id, item.command.client)
