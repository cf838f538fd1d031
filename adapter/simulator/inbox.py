"""Messages from users to bots: the queues, the cursors and the long polls."""

import asyncio
import itertools
from typing import Any

import msgspec

from adapter.simulator import ids
from adapter.simulator.kinds import IDLE
from adapter.simulator.parameters import CHANGES
from adapter.simulator.records import InboundRecord, Json, PollRecord, SimulatorError
from adapter.simulator.world import Bot, LogEntry, Poll, World


class Inbox:
    """The queue of messages of every bot, and the polls that wait for them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.closing = False

    def inject(self, bot: Bot, message: Json, *, fill: bool = True) -> LogEntry:
        """Queues a message. `fill` adds the fields that the message and its items lack, in iLink's form, and drops
        keys whose value is None. Without `fill` the message is sent exactly as given."""
        if fill:
            message = self._complete_message(self._template(bot) | message)
        if message.get("message_type", 1) == 1:
            self._open_window(bot, message)
        entry = self._append(bot, message)
        self._world.counts["injected"] += 1
        rule = self._world.faults.strike("F16", "inject", bot.id, entry.user)
        if rule is not None:
            change = str(rule.params.get("change", "same"))
            self.repeat(bot, entry.message_id, change, float(rule.params.get("delay_s", 0)))
        return entry

    def repeat(self, bot: Bot, message_id: str, change: str = "same", delay_s: float = 0.0) -> None:
        """Queues an earlier message again after `delay_s`, with the ids of `change` changed (fault `F16`)."""
        if change not in CHANGES:
            raise SimulatorError(f"unknown change {change}, there are {', '.join(sorted(CHANGES))}")
        original = self._entry(bot, message_id)

        def again() -> None:
            self._append(bot, self._with_changes(bot, msgspec.json.decode(original.raw), change))
            self._world.counts["repeated"] += 1

        if delay_s > 0:
            self._world.clock.schedule(delay_s, again)
        else:
            again()

    def find(self, bot: Bot, message_id: str) -> Json:
        """An earlier message of the user. Raises SimulatorError if there is none."""
        message: Json = msgspec.json.decode(self._entry(bot, message_id).raw)
        return message

    def replay(self, bot: Bot, last: int) -> int:
        """Queues the last delivered messages again, in front (fault `F18`). Returns their number."""
        waiting = set(bot.pending)
        delivered = [e for e in bot.log if e.deliveries and not e.in_flight and e not in waiting]
        again = delivered[-last:] if last > 0 else []
        if again and self._world.settings_of(bot).cursor_mode == "cursor_replay":
            bot.rewound_to = again[0].position - 1
        else:
            bot.pending.extendleft(reversed(again))
        self._wake(bot)
        return len(again)

    def open_poll(self, bot: Bot, cursor: str, start: int = 0) -> Poll:
        """Registers a new poll. A setting decides about older polls on the same token."""
        world = self._world
        poll = Poll(PollRecord(start_ms=world.clock.exact_ms(), cursor=cursor), start)
        older = list(bot.polls)
        bot.polls.append(poll)
        bot.polls_total += 1
        bot.polls_at_once = max(bot.polls_at_once, 1)
        if older:
            self._notice_overlap(bot, older)
        mode = world.settings_of(bot).concurrent_polls
        if mode != "split":
            for loser in older:
                loser.verdict = loser.verdict or ("empty" if mode == "newest_wins" else "stale")
            bot.wake()
        return poll

    async def collect(self, bot: Bot, poll: Poll, hold_s: float) -> None:
        """Waits until `poll` has a batch or a verdict. The verdict is `empty` when the time is over."""
        clock = self._world.clock
        deadline_s = clock.elapsed_s() + hold_s
        while not poll.verdict:
            if bot.dead:
                poll.verdict = "stale"
            elif batch := self._next_entries(bot, poll.start):
                poll.batch = batch
                return
            elif self.closing or (left_s := deadline_s - clock.elapsed_s()) <= 0:
                poll.verdict = "empty"
            else:
                poll.woken = asyncio.get_running_loop().create_future()
                await clock.wait(poll.woken, left_s)
                poll.woken = None

    def end_poll(self, bot: Bot, poll: Poll) -> None:
        """Ends a poll that is about to be answered, or whose client is gone: it no longer counts as open."""
        if poll in bot.polls:
            bot.polls.remove(poll)
        poll.woken = None

    def close_poll(self, bot: Bot, poll: Poll, outcome: str, *, written: bool) -> None:
        """Settles the batch: consumes it if the answer was `written`, and queues it again if not."""
        self.end_poll(bot, poll)
        if written:
            self._deliver(bot, poll.batch)
        else:
            self._put_back(bot, poll)
        poll.record.ids = [entry.message_id for entry in poll.batch] if written else []
        poll.record.end_ms = self._world.clock.exact_ms()
        poll.record.outcome = outcome
        self._remember(bot, poll.record)
        if bot.pending:
            self._wake(bot)

    def refuse_poll(self, bot: Bot, cursor: str, outcome: str) -> None:
        """Records a poll that ends at once and does not compete with others on the same token."""
        now_ms = self._world.clock.exact_ms()
        bot.polls_total += 1
        self._remember(bot, PollRecord(start_ms=now_ms, end_ms=now_ms, cursor=cursor, outcome=outcome))

    def _remember(self, bot: Bot, record: PollRecord) -> None:
        bot.poll_records.append(record)
        while len(bot.poll_records) > self._world.records_limit():
            bot.poll_records.popleft()

    def start(self, bot: Bot, cursor: str) -> int | None:
        """The position that a poll with this cursor reads from, or None if the cursor is refused."""
        position = self._world.cursors.read(bot.id, cursor) if cursor else 0
        if position is not None:
            return min(position, bot.last_position)
        match self._world.settings_of(bot).unknown_cursor:
            case "current":
                return bot.delivered_position
            case "replay":
                self.replay(bot, bot.last_position)
                return 0
            case "refuse":
                return None

    def next_cursor(self, bot: Bot, poll: Poll) -> str:
        """The next cursor differs after every delivered message, and after an empty poll if the settings say so."""
        settings = self._world.settings_of(bot)
        if poll.batch:
            position = poll.batch[-1].position
        elif settings.cursor_mode == "cursor_replay":
            position = poll.start
        else:
            position = bot.delivered_position
        if settings.idle_cursor_changes:
            bot.cursor_salt += 1
        return self._world.cursors.write(bot.id, bot.token, position, bot.cursor_salt)

    def _template(self, bot: Bot) -> Json:
        now_ms = self._world.clock.now_ms()
        return {
            "seq": bot.last_position + 1,
            "message_id": self._world.inbound_id(next(self._world.message_ids), bot),
            "from_user_id": bot.user,
            "to_user_id": bot.id,
            "client_id": ids.new_client_id(self._world.rng, bot.user, bot.last_position + 1, now_ms),
            "create_time_ms": now_ms,
            "update_time_ms": now_ms,
            "delete_time_ms": 0,
            "session_id": f"{bot.user}#{bot.id}",
            "group_id": "",
            "message_type": 1,
            "message_state": 2,
            "context_token": ids.new_context_token(self._world.rng),
            "item_list": [],
            "root_id": 0,
            "parent_id": 0,
        }

    def _complete_message(self, message: Json) -> Json:
        """The message without keys that are None. Each item gets the times of the message, an id and two empty
        lists."""
        message = {key: value for key, value in message.items() if value is not None}
        times = {key: message[key] for key in ("create_time_ms", "update_time_ms") if key in message}
        if isinstance(items := message.get("item_list"), list):
            message["item_list"] = [
                times | {"msg_id": ids.new_item_id(self._world.rng)} | IDLE | item if isinstance(item, dict) else item
                for item in items
            ]
        return message

    def _open_window(self, bot: Bot, message: Json) -> None:
        """Opens the window for 24 hours and ten sends, with or without a context token in the message."""
        user = str(message.get("from_user_id") or bot.user)
        bot.heard_ms = self._world.clock.now_ms()
        if not bot.superseded:
            window = bot.window(user)
            window.opened_ms = self._world.clock.now_ms()
            window.sent = 0
        if token := message.get("context_token"):
            self._world.issue(bot, user, str(token))

    def _append(self, bot: Bot, message: Json) -> LogEntry:
        bot.last_position += 1
        entry = LogEntry(
            position=bot.last_position,
            message_id=str(message.get("message_id") or ""),
            client_id=str(message.get("client_id") or ""),
            seq=number(message.get("seq")),
            create_time_ms=number(message.get("create_time_ms")),
            context_token=str(message.get("context_token") or ""),
            user=str(message.get("from_user_id") or bot.user),
            raw=msgspec.json.encode(message),
        )
        self._world.counts["queued"] += 1
        bot.log.append(entry)
        bot.pending.append(entry)
        self._trim(bot)
        self._wake(bot)
        return entry

    def _trim(self, bot: Bot) -> None:
        settings = self._world.settings_of(bot)
        least = 200 if settings.cursor_mode == "cursor_replay" else 20
        limit = self._world.share(settings.history, least=max(least, 2 * settings.batch_max))
        while len(bot.log) > limit and bot.log[0].deliveries and not bot.log[0].in_flight:
            bot.log.popleft()

    def _entry(self, bot: Bot, message_id: str) -> LogEntry:
        for entry in reversed(bot.log):
            if message_id in (entry.message_id, entry.client_id):
                return entry
        raise SimulatorError("no such message, or no longer remembered")

    def _with_changes(self, bot: Bot, message: Json, change: str) -> Json:
        fresh = self._template(bot)
        if change in ("ids", "all"):
            message["seq"] = fresh["seq"]
        if change in ("message_id", "ids", "all"):
            message["message_id"] = fresh["message_id"]
        if change in ("client_id", "ids", "all"):
            message["client_id"] = fresh["client_id"]
        if change in ("context_token", "ids", "all"):
            message["context_token"] = fresh["context_token"]
            self._world.issue(bot, str(message.get("from_user_id") or bot.user), fresh["context_token"])
        if change == "all":
            for written in (message, *items_of(message)):
                written["create_time_ms"] = written["update_time_ms"] = self._world.clock.now_ms()
        if change in ("ids", "all"):
            for item in items_of(message):
                item["msg_id"] = ids.new_item_id(self._world.rng)
        if change == "no_message_id":
            message.pop("message_id", None)
        if change in ("zero_message_id", "empty_message_id"):
            message["message_id"] = 0 if change == "zero_message_id" else ""
        return message

    def _next_entries(self, bot: Bot, start: int) -> list[LogEntry]:
        settings = self._world.settings_of(bot)
        limit = settings.batch_max or len(bot.log)
        if settings.cursor_mode == "cursor_replay":
            return self._entries_after(bot, start, limit)
        batch = [bot.pending.popleft() for _ in range(min(limit, len(bot.pending)))]
        for entry in batch:
            entry.in_flight = True
        self._world.counts["in_flight"] += len(batch)
        return batch

    def _entries_after(self, bot: Bot, start: int, limit: int) -> list[LogEntry]:
        if bot.rewound_to is not None:
            start, bot.rewound_to = min(start, bot.rewound_to), None
        if start >= bot.last_position:
            return []
        newest_first = itertools.takewhile(lambda entry: entry.position > start, reversed(bot.log))
        return list(newest_first)[::-1][:limit]

    def _deliver(self, bot: Bot, batch: list[LogEntry]) -> None:
        world = self._world
        for entry in batch:
            world.counts["redelivered" if entry.deliveries else "delivered"] += 1
            world.counts["in_flight"] -= entry.in_flight
            entry.deliveries += 1
            entry.in_flight = False
        if not batch:
            return
        bot.delivered_position = max(bot.delivered_position, batch[-1].position)
        if world.settings_of(bot).cursor_mode == "cursor_replay":
            while bot.pending and bot.pending[0].deliveries:
                bot.pending.popleft()

    def _put_back(self, bot: Bot, poll: Poll) -> None:
        back = [entry for entry in poll.batch if entry.in_flight]
        self._world.counts["in_flight"] -= len(back)
        for entry in back:
            entry.in_flight = False
        bot.pending.extendleft(reversed(back))
        if poll.batch and not back and poll.batch[0].position <= poll.start:
            bot.rewound_to = poll.batch[0].position - 1

    def _wake(self, bot: Bot) -> None:
        """Wakes parked polls for new messages: one at random in ack mode, all of them with cursors."""
        if self._world.settings_of(bot).cursor_mode == "cursor_replay":
            bot.wake()
            return
        parked = [poll for poll in bot.polls if poll.woken is not None and not poll.woken.done()]
        if parked:
            lucky = parked[0] if len(parked) == 1 else self._world.rng.choice(parked)
            if lucky.woken is not None:
                lucky.woken.set_result(None)

    def _notice_overlap(self, bot: Bot, older: list[Poll]) -> None:
        """Counts an overlap once the older client cannot have hung up just before: the end of a poll on one
        connection may be read later than the beginning of the next poll on another."""
        world = self._world

        def confirm() -> None:
            real = [poll for poll in older if not poll.hung_up]
            if real:
                bot.overlaps += 1
                bot.polls_at_once = max(bot.polls_at_once, len(real) + 1)
                world.counts["poll_overlaps"] += 1
                world.violate("concurrent_polls", "getupdates", bot, f"{len(real) + 1} at once")

        grace_s = world.settings_of(bot).overlap_grace_ms / 1000
        asyncio.get_running_loop().call_later(grace_s, confirm)


def items_of(message: Json) -> list[Json]:
    return [item for item in message.get("item_list") or [] if isinstance(item, dict)]


def number(value: Any) -> int:
    """The integer in `value`, or 0 for any other value: a field of a message may hold anything."""
    try:
        return int(value or 0)
    except (ValueError, TypeError, OverflowError):
        return 0


def record(bot: Bot, entry: LogEntry) -> InboundRecord:
    """The public record of `entry`."""
    return InboundRecord(
        bot=bot.id,
        message_id=entry.message_id,
        client_id=entry.client_id,
        seq=entry.seq,
        create_time_ms=entry.create_time_ms,
        context_token=entry.context_token,
        position=entry.position,
        deliveries=entry.deliveries,
    )
