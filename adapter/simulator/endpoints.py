"""The endpoints of iLink that need authentication: each takes a request and returns its answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct

from adapter.simulator import ids
from adapter.simulator.answers import HttpAnswer, gateway_timeout, json_answer
from adapter.simulator.faults import FaultRule, edge_s
from adapter.simulator.inbox import Inbox
from adapter.simulator.media import MediaStore
from adapter.simulator.outbox import Outbox, stale_body, text_of
from adapter.simulator.records import Json, SendRecord
from adapter.simulator.world import TICKETS_KEPT, Bot, LogEntry, Poll, World


class Call(Struct):
    """One authenticated request. `edge` is the rule (fault `F2`) that cuts the poll if it has no news."""

    endpoint: str
    bot: Bot
    body: Json
    start_ms: float
    edge: FaultRule | None = None


Endpoint = Callable[[Call], Awaitable[HttpAnswer]]


def malformed(world: World, endpoint: str, bot: Bot | None, reason: str) -> HttpAnswer:
    """The answer to a request that cannot be read. iLink's text for it is unknown, so the reason goes to the
    violations."""
    world.violate("malformed", endpoint, bot, reason)
    return json_answer({"ret": -2}, status=400 if world.settings_of(bot).malformed == "http400" else 200)


def no_ticket(ret: int, params: Json | None = None) -> HttpAnswer:
    """The answer of a getconfig that fails: the text observed with the code, or `errmsg` of fault `F26`."""
    errmsg = (params or {}).get("errmsg", {-2: "ilink_user_id required", -4: "GetTypingTicket rpc failed"}.get(ret))
    return json_answer({"ret": ret} if errmsg is None else {"ret": ret, "errmsg": errmsg})


class Endpoints:
    """The authenticated endpoints, by name."""

    def __init__(self, world: World, inbox: Inbox, outbox: Outbox, media: MediaStore) -> None:
        self._world = world
        self._inbox = inbox
        self._outbox = outbox
        self._media = media
        self.table: dict[str, Endpoint] = {
            "getupdates": self.getupdates,
            "sendmessage": self.sendmessage,
            "getconfig": self.getconfig,
            "sendtyping": self.sendtyping,
            "getuploadurl": self.getuploadurl,
            "msg/notifystart": self.notifystart,
            "msg/notifystop": self.notifystop,
        }

    async def getupdates(self, call: Call) -> HttpAnswer:
        bot, world = call.bot, self._world
        cursor = call.body.get("get_updates_buf", "")
        if not isinstance(cursor, str):
            return self.malformed(call, "get_updates_buf must be a string")
        if rule := world.faults.strike("F18", call.endpoint, bot.id, bot.user):
            self._inbox.replay(bot, int(rule.params.get("last", 1)))
        start = self._inbox.start(bot, cursor)
        if start is None:
            answer = json_answer({"ret": -2})
            self._inbox.refuse_poll(bot, cursor, "refused")
            return answer
        poll = self._inbox.open_poll(bot, cursor, start)
        try:
            await self._inbox.collect(bot, poll, self._hold_s(call))
        except BaseException:  # the client hung up: its messages go back to the queue
            poll.hung_up = True
            self._inbox.close_poll(bot, poll, "disconnected", written=False)
            raise
        self._inbox.end_poll(bot, poll)
        return self._poll_answer(call, poll)

    async def sendmessage(self, call: Call) -> HttpAnswer:
        bot, world, message = call.bot, self._world, call.body.get("msg")
        if not isinstance(message, dict):
            return self.malformed(call, "msg required")
        record = self.open_send(call)
        verdict = self._outbox.send(bot, message)
        answer = json_answer(verdict.body)
        record.message_id, record.shown, record.why = verdict.message_id, verdict.shown, verdict.why
        if verdict.body is not None:
            record.ret = verdict.body.get("ret", verdict.body.get("errcode"))
            record.errmsg = verdict.body.get("errmsg")
        if latency_ms := world.settings_of(bot).send_latency_ms:
            await self._latency(record, latency_ms)
        answer.settle = lambda written, outcome: self.close_send(record, answer, written=written)
        return answer

    async def getconfig(self, call: Call) -> HttpAnswer:
        user, bot, world = call.body.get("ilink_user_id"), call.bot, self._world
        if not isinstance(user, str) or not user:
            return no_ticket(-2)
        if rule := world.faults.strike("F26", call.endpoint, bot.id, user):
            return no_ticket(int(rule.params.get("ret", -4)), rule.params)
        window = bot.windows.get(user)
        if window is None or window.opened_ms is None:
            return no_ticket(-4)
        now_ms, ttl_ms = world.clock.now_ms(), world.settings_of(bot).ticket_ttl_s * 1000
        window.tickets = {t: at for t, at in window.tickets.items() if now_ms - at <= ttl_ms}
        ticket = ids.new_ticket(world.rng)
        window.tickets[ticket] = now_ms
        while len(window.tickets) > world.share(TICKETS_KEPT):
            del window.tickets[next(iter(window.tickets))]
        return json_answer({"ret": 0, "typing_ticket": ticket})

    async def getuploadurl(self, call: Call) -> HttpAnswer:
        return json_answer(self._media.offer(call.bot, call.body))

    async def sendtyping(self, call: Call) -> HttpAnswer:
        user, bot, world = str(call.body.get("ilink_user_id") or ""), call.bot, self._world
        status, ticket = call.body.get("status"), str(call.body.get("typing_ticket") or "")
        window = bot.windows.get(user)
        issued_ms = window.tickets.get(ticket) if window else None
        if window is None or issued_ms is None:
            world.violate("unknown_ticket", call.endpoint, bot)
            return self._bad_ticket(bot)
        if world.clock.now_ms() - issued_ms > world.settings_of(bot).ticket_ttl_s * 1000:
            world.violate("expired_ticket", call.endpoint, bot)
            return self._bad_ticket(bot)
        if status not in (1, 2):
            return json_answer({"ret": -2})
        window.sent += world.settings_of(bot).typing_counts
        if status == 1:
            window.typing_on_calls += 1
            window.typing_since_ms = world.clock.now_ms()
        else:
            window.typing_off_calls += 1
            window.typing_since_ms = None
        return json_answer({"ret": 0})

    async def notifystart(self, call: Call) -> HttpAnswer:
        for rule in self._world.faults.find("F11", "sendmessage", call.bot.id, call.bot.user):
            if rule.params.get("until_notifystart"):
                rule.count = 0
        return self._notify(call.bot, online=True)

    async def notifystop(self, call: Call) -> HttpAnswer:
        return self._notify(call.bot, online=False)

    def malformed(self, call: Call, reason: str) -> HttpAnswer:
        """`malformed` for the bot of the call, recorded with the bot's calls."""
        answer = malformed(self._world, call.endpoint, call.bot, reason)
        if call.endpoint == "getupdates":
            self._inbox.refuse_poll(call.bot, "", "malformed")
        else:
            self.record_unprocessed(call, answer, "malformed")
        return answer

    def open_send(self, call: Call) -> SendRecord:
        """Opens the record of a send attempt. The server closes it (`close_send`)."""
        message = call.body.get("msg")
        message = message if isinstance(message, dict) else {}
        user = str(message.get("to_user_id") or "")
        items = message.get("item_list")
        record = SendRecord(
            bot=call.bot.id,
            user=user,
            client_id=str(message.get("client_id") or ""),
            text=text_of(items),
            start_ms=call.start_ms,
            context_token=str(message.get("context_token") or ""),
            run_id=str(message.get("run_id") or ""),
            items=items if isinstance(items, list) else [],
        )
        self._world.counts["sends"] += 1
        running = self._world.sending.setdefault(user, [])
        if running and user:
            self._notice_overlap(call, record, list(running))
        running.append(record)
        call.bot.sends.append(record)
        while len(call.bot.sends) > self._world.share(self._world.settings.sends_per_bot, least=200):
            call.bot.sends.popleft()
        return record

    def close_send(self, record: SendRecord, answer: HttpAnswer | None, *, written: bool) -> None:
        """`written` is False if the bot did not get the answer."""
        if record.end_ms:
            return
        running = self._world.sending[record.user]
        running.remove(record)
        if not running:
            del self._world.sending[record.user]
        record.end_ms = self._world.clock.exact_ms()
        record.status = answer.status if answer is not None and written else 0

    def record_unprocessed(self, call: Call, answer: HttpAnswer, why: str) -> None:
        """Records an attempt that gets `answer` without being processed."""
        if call.endpoint == "sendmessage":
            record = self.open_send(call)
            record.why = why
            record.ret = {"stale": -14, "malformed": -2}.get(why)
            answer.settle = lambda written, outcome: self.close_send(record, answer, written=written)
        elif call.endpoint == "getupdates":
            poll = self._inbox.open_poll(call.bot, str(call.body.get("get_updates_buf") or ""))

            def settle(written: bool, outcome: str) -> None:
                poll.hung_up = outcome == "disconnected"
                self._inbox.close_poll(call.bot, poll, why if written else outcome, written=written)

            answer.settle = settle

    def _notice_overlap(self, call: Call, record: SendRecord, older: list[SendRecord]) -> None:
        """Counts overlapping sends. As with polls, an older send does not count if its client hung up just before."""
        world = self._world

        def confirm() -> None:
            if any(not other.end_ms or other.status for other in older):
                record.overlapped = True
                world.counts["send_overlaps"] += 1
                world.violate("concurrent_sends", call.endpoint, call.bot)

        grace_s = world.settings_of(call.bot).overlap_grace_ms / 1000
        asyncio.get_running_loop().call_later(grace_s, confirm)

    async def _latency(self, record: SendRecord, latency_ms: int) -> None:
        try:
            await self._world.clock.sleep(latency_ms / 1000)
        except BaseException:  # the client hung up; the send stays valid
            self.close_send(record, None, written=False)
            raise

    def _hold_s(self, call: Call) -> float:
        settings = self._world.settings_of(call.bot)
        if settings.zero_timeout == "instant" and call.body.get("timeout") == 0:
            return 0.0
        longest = settings.hold_ms / 1000
        return longest if call.edge is None else min(longest, edge_s(call.edge))

    def _poll_answer(self, call: Call, poll: Poll) -> HttpAnswer:
        bot, outcome = call.bot, poll.verdict or "messages"
        if outcome == "empty" and call.edge is not None:
            answer = gateway_timeout(call.edge)
        elif outcome == "stale":
            bot.stale_answers += 1
            answer = json_answer(stale_body(self._world, bot))
            answer.outcome = outcome
        else:
            answer = json_answer(self._updates(bot, poll))
            answer.outcome, answer.cut = outcome, outcome == "cut"
        answer.settle = lambda written, outcome: self._inbox.close_poll(bot, poll, outcome, written=written)
        return answer

    def _updates(self, bot: Bot, poll: Poll) -> Json:
        settings, faults = self._world.settings_of(bot), self._world.faults
        bot.updates_answered += 1
        body: Json = {}
        if settings.idle_style == "ret_-1" and not poll.batch:
            return {"ret": -1}
        if settings.ret_style == "zero" or (settings.ret_style == "alternate" and bot.updates_answered % 2):
            body["ret"] = 0
        if settings.idle_style == "bare" and not poll.batch:
            return body
        body["msgs"] = [msgspec.Raw(entry.raw) for entry in poll.batch]
        if poll.batch and (rule := faults.strike("F20", "getupdates", bot.id, bot.user)):
            body["msgs"] = out_of_order(poll.batch, str(rule.params.get("order", "reversed")))
        poll.record.next_cursor = self._inbox.next_cursor(bot, poll)
        body["sync_buf"] = "CAES"
        body["get_updates_buf"] = poll.record.next_cursor
        if settings.hint_ms is not None:
            body["longpolling_timeout_ms"] = settings.hint_ms
        if poll.batch and (rule := faults.strike("F19", "getupdates", bot.id, bot.user)):
            poll.record.next_cursor = body["get_updates_buf"] = ""
            if rule.params.get("cursor", "empty") == "absent":
                del body["get_updates_buf"]
        if rule := faults.strike("F21", "getupdates", bot.id, bot.user):
            body["longpolling_timeout_ms"] = rule.params.get("hint", 0)
        return body

    def _bad_ticket(self, bot: Bot) -> HttpAnswer:
        return json_answer({"ret": -2 if self._world.settings_of(bot).bad_ticket == "refuse" else 0})

    def _notify(self, bot: Bot, *, online: bool) -> HttpAnswer:
        self._world.turn(bot, online=online)
        return json_answer({"ret": 0})


def out_of_order(batch: list[LogEntry], order: str) -> list[Any]:
    """The same messages in the same places, with `seq` and times reversed or all alike (fault `F20`)."""
    messages: list[Json] = [msgspec.json.decode(entry.raw) for entry in batch]
    keys = ("seq", "create_time_ms", "update_time_ms")
    stamps = [{key: message[key] for key in keys if key in message} for message in messages]
    donors = [stamps[0]] * len(stamps) if order == "same" else stamps[::-1]
    return [message | stamp for message, stamp in zip(messages, donors, strict=True)]
