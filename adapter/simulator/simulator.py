"""The simulator in the process of a test: starts it, drives the phones, and shows what the bots did."""

import asyncio
import ssl
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from adapter.simulator import admin, inbox, kinds
from adapter.simulator.cdn import CdnServer
from adapter.simulator.endpoints import Endpoints
from adapter.simulator.faults import FaultRule
from adapter.simulator.inbox import Inbox
from adapter.simulator.login import QrLogins
from adapter.simulator.media import MediaStore, SealedMedia
from adapter.simulator.outbox import Outbox
from adapter.simulator.records import (
    BotRecord,
    CallView,
    InboundRecord,
    Json,
    OnlineView,
    PollsView,
    QrRecord,
    RequestRecord,
    SendRecord,
    Shown,
    SimulatorError,
    Stats,
    TypingView,
    Violation,
)
from adapter.simulator.server import Server
from adapter.simulator.settings import SimulatorSettings
from adapter.simulator.site import Site, raise_file_limit, tls_context
from adapter.simulator.watch import ClientWatch
from adapter.simulator.world import Bot, World


class Simulator:
    """`async with Simulator(SimulatorSettings(hold_ms=200)) as sim:` serves on `sim.url`.

    A bot is given by its id or by its user's id. The admin API offers all of it over HTTP (`admin`). Methods raise
    SimulatorError for invalid calls, and must be called in the event loop's thread.
    """

    def __init__(self, settings: SimulatorSettings | None = None) -> None:
        self.world = World(settings or SimulatorSettings())
        self.inbox = Inbox(self.world)
        self.logins = QrLogins(self.world)
        self.watch = ClientWatch(self.world)
        self.media = MediaStore(self.world, lambda: self.cdn_url)
        outbox = Outbox(self.world, self.media)
        endpoints = Endpoints(self.world, self.inbox, outbox, self.media)
        self._server = Server(self.world, endpoints, self.logins, self.watch)
        shared = {
            "/_sim/{call:.*}": admin.Admin(self).handle,
            "/c2c/{action:.*}": CdnServer(self.world, self.media).handle,
        }
        self._first = Site(shared | {"/{path:.*}": self._server.handle})
        self._second = Site(shared | {"/{path:.*}": self._server.handle_second})
        self._tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Running

    @property
    def url(self) -> str:
        """Base URL of the API, without a slash at the end."""
        return self._first.url

    @property
    def port(self) -> int:
        """Port that the simulator listens on, once started."""
        return self._first.port

    @property
    def second_url(self) -> str:
        """Base URL of the listener for redirected logins, or "" before it opens."""
        return self._second.url

    @property
    def cdn_url(self) -> str:
        """Base URL of the CDN, without a slash at the end."""
        return self.world.settings.cdn_public_url.rstrip("/") or f"{self.url}/c2c"

    @property
    def admin_url(self) -> str:
        return f"{self.url}/_sim"

    async def start(self) -> None:
        """Starts to listen. Raises OSError if it cannot, and SimulatorError for an unusable certificate."""
        raise_file_limit()
        settings = self.world.settings
        self._tls = tls_context(settings.tls_cert, settings.tls_key)
        try:
            await self._first.open(settings.host, settings.port, settings.public_url, self._tls)
            self._server.urls = (self.url, "")
            if settings.second_port:
                await self._open_second()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Answers the parked polls, then closes."""
        self.inbox.closing = True
        self.logins.close()
        for bot in self.world.bots.values():
            bot.wake()
        await asyncio.sleep(0)
        self.world.clock.close()
        await asyncio.gather(self._first.close(), self._second.close())

    async def open_second_host(self) -> str:
        """Opens the second listener unless it is open, and returns its base URL."""
        if not self.url:
            raise SimulatorError("not started")
        try:
            await self._open_second()
        except OSError as exc:
            raise SimulatorError(f"cannot listen: {exc}") from exc
        return self.second_url

    async def until(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
        """Waits in real time until `condition()` holds. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)

    async def _open_second(self) -> None:
        settings = self.world.settings
        await self._second.open(settings.second_host, settings.second_port, settings.second_public_url, self._tls)
        self._server.urls = (self.url, self.second_url)

    # Bots and time

    def add_bot(self, user: str | None = None, bot: str | None = None, token: str | None = None) -> BotRecord:
        """Adds a bot as a QR login does. Arguments that are not given are made up."""
        return self.world.add_bot(user, bot, token).record()

    def add_bots(self, count: int) -> list[BotRecord]:
        return [self.world.add_bot().record() for _ in range(count)]

    def bots(self) -> list[BotRecord]:
        """All living bots, oldest first."""
        return [bot.record() for bot in self.world.bots.values() if not bot.dead]

    def kill_token(self, bot: str) -> None:
        """Kills the token: every request gets -14, and so do the parked polls."""
        self.world.kill(self.world.find(bot))

    def revive_token(self, bot: str) -> None:
        found = self.world.find(bot)
        found.dead, found.stale_answers, found.heard_ms = False, 0, self.world.clock.now_ms()

    def configure(self, bot: str | None = None, **changes: Any) -> SimulatorSettings:
        """Changes settings while running, for all bots or for one."""
        return self.world.configure(bot, changes)

    def advance(self, seconds: float) -> int:
        """Moves the clock. Holds, delays and lifetimes that become due end now. Returns the new time in ms."""
        self.world.clock.advance(seconds)
        return self.world.clock.now_ms()

    @property
    def now_ms(self) -> int:
        return self.world.clock.now_ms()

    # The user writes

    def say(self, to: str, text: str, **overrides: Any) -> InboundRecord:
        """The user writes `text`. `overrides` replace fields of the message; None leaves a field out."""
        return self.inject(to, kinds.text(text) | overrides)

    def say_kind(
        self,
        to: str,
        kind: str,
        text: str = "hello",
        *,
        of: str | None = None,
        part: str | None = None,
        nth: int = 0,
        on: str = "text",
        key_form: str = "usual",
        url: str = "both",
        **overrides: Any,
    ) -> InboundRecord:
        """The user sends a message of one of `kinds.KINDS`. Media have the content of a sample.

        For quotes, `of` is the id of a message of the user or on the phone, and `on` is the kind of the item with the
        quote. The quote means `part` of a text, at its `nth` occurrence.
        """
        bot = self.world.find(to)

        def media(wanted: str) -> Json:
            return self.media.item(bot, wanted, self.media.seal(wanted, key_form=key_form), url)

        quoted = kinds.NEVER_SAID if of is None else self._quoted(bot, of)
        makings = kinds.Makings(bot.id, bot.user, text, media, quoted, on, part, nth)
        return self.inject(to, kinds.of_kind(kind, makings) | overrides)

    def say_media(
        self,
        to: str,
        kind: str,
        content: bytes | SealedMedia | None = None,
        *,
        sample: str | None = None,
        size: int | None = None,
        key_form: str = "usual",
        url: str = "both",
        **fields: Any,
    ) -> InboundRecord:
        """The user sends an `image`, `voice`, `file` or `video`; `fields` are added to its payload.

        Without `content` it is a sample: the usual one of its kind, or one of `samples.SAMPLES`. `size` cuts or fills
        the content to that many bytes. 100 MB take a second, unless a thread has called `media.seal` before.
        """
        bot = self.world.find(to)
        if not isinstance(content, SealedMedia):
            content = self.media.seal(kind, content, sample=sample, size=size, key_form=key_form)
        return self.inject(to, {"item_list": [self.media.item(bot, kind, content, url, fields)]})

    def media_content(self, reference: str) -> bytes:
        """The decrypted content behind the reference of an upload or of inbound media."""
        return self.media.plain(reference)

    def inject(self, to: str, message: Json, *, fill: bool = True) -> InboundRecord:
        """Queues any message. `fill` adds the fields that it lacks; without `fill` it is sent as given."""
        if not isinstance(message, dict):
            raise SimulatorError("a message is an object")
        bot = self.world.find(to)
        return inbox.record(bot, self.inbox.inject(bot, message, fill=fill))

    def inject_many(self, to: str, messages: Iterable[Json], *, fill: bool = True) -> list[InboundRecord]:
        """Queues several messages, which go into one batch if a poll is parked and `batch_max` allows."""
        return [self.inject(to, message, fill=fill) for message in messages]

    def flood(self, to: str, messages: int = 1000, size: int = 10_000) -> int:
        """Queues many long texts at once. Returns the sum of their sizes in bytes."""
        self.inject_many(to, (kinds.text(f"{n:08d}".ljust(size, "x")) for n in range(messages)))
        return messages * size

    def repeat(self, to: str, message_id: str, change: str = "same", delay_s: float = 0.0) -> None:
        """Queues the message with this message id or client id again. `parameters.CHANGES` lists the changes."""
        self.inbox.repeat(self.world.find(to), message_id, change, delay_s)

    def replay(self, bot: str, last: int = 1) -> int:
        """Queues the last delivered messages again, unchanged. Returns their number."""
        return self.inbox.replay(self.world.find(bot), last)

    def _quoted(self, bot: Bot, message_id: str) -> kinds.Quoted:
        """A message of the bot or of the user that the phone shows."""
        for shown in reversed(self.world.phones.get(bot.user, ())):
            if message_id in (shown.message_id, shown.client_id) and shown.message_id:
                own_ids = self.world.quoted_ids(shown.message_id, bot)
                return kinds.Quoted(*own_ids, shown.items[0], int(shown.at_ms))
        message = self.inbox.find(bot, message_id)
        if not message.get("message_id") or not message.get("item_list"):
            raise SimulatorError("a message without an id or without items cannot be quoted")
        own_ids = self.world.quoted_ids(message["message_id"], bot)
        return kinds.Quoted(*own_ids, message["item_list"][0], int(message.get("create_time_ms") or 0))

    # What the bots did

    def phone(self, user: str) -> list[Shown]:
        """The messages of all bots that the user's phone shows, in order of receipt."""
        return sorted(self.world.phones.get(user, ()), key=lambda shown: shown.at_ms)

    def listen(self, hear: Callable[[str, Shown], None]) -> None:
        """Calls `hear(user, shown)` for every later message on a phone."""
        self.world.listeners.append(hear)

    def inbound(self, bot: str) -> list[InboundRecord]:
        """The remembered messages to the bot, each with the number of answers that carried it."""
        found = self.world.find(bot)
        return [inbox.record(found, entry) for entry in found.log]

    def sends(self, bot: str) -> list[SendRecord]:
        """Every attempt at `sendmessage`, in order of arrival."""
        return list(self.world.find(bot).sends)

    def polls(self, bot: str) -> PollsView:
        found = self.world.find(bot)
        return PollsView(
            records=list(found.poll_records),
            total=found.polls_total,
            now=len(found.polls),
            most=found.polls_at_once,
            overlaps=found.overlaps,
        )

    def calls(self, bot: str | None = None, endpoint: str | None = None) -> list[CallView]:
        """Counts of calls by endpoint, of one bot or of all."""
        bots = [self.world.find(bot)] if bot else list(self.world.bots.values())
        return [view for found in bots for view in call_views(found, endpoint)]

    def requests(self, endpoint: str | None = None) -> list[RequestRecord]:
        """Headers of the latest requests, without `Authorization`."""
        return [r for r in self.watch.requests if endpoint in (None, r.endpoint)]

    def violations(self, kind: str | None = None, bot: str | None = None) -> list[Violation]:
        """Recorded violations, oldest first. `stats` also counts those that are no longer listed."""
        bot_id = self.world.find(bot).id if bot else None
        return [v for v in self.world.violations if kind in (None, v.kind) and bot_id in (None, v.bot)]

    def typing(self, user: str) -> TypingView:
        bot = self.world.find(user)
        window = bot.window(user if user.endswith("@im.wechat") else bot.user)
        since_ms, limit_ms = window.typing_since_ms, self.world.settings_of(bot).typing_timeout_s * 1000
        on = since_ms is not None and (not limit_ms or self.now_ms - since_ms < limit_ms)
        return TypingView(on=on, on_calls=window.typing_on_calls, off_calls=window.typing_off_calls)

    def online(self, bot: str) -> OnlineView:
        found = self.world.find(bot)
        return OnlineView(online=found.online, timeline=list(found.online_timeline))

    def stats(self) -> Stats:
        world, counts = self.world, self.world.counts
        bots = world.bots.values()
        return Stats(
            bots=len(bots),
            dead=sum(bot.dead for bot in bots),
            injected=counts["injected"],
            pending=counts["queued"] - counts["delivered"],
            in_flight=counts["in_flight"],
            delivered=counts["delivered"],
            redelivered=counts["redelivered"],
            polls=sum(bot.polls_total for bot in bots),
            parked=sum(len(bot.polls) for bot in bots),
            poll_overlaps=counts["poll_overlaps"],
            sends=counts["sends"],
            shown=counts["shown"],
            duplicates_suppressed=counts["duplicates_suppressed"],
            dropped=counts["dropped"],
            refused=counts["refused"],
            send_overlaps=counts["send_overlaps"],
            violations=dict(world.violation_counts),
        )

    # Faults

    def set_fault(self, rule: FaultRule) -> FaultRule:
        """Puts a rule in force from the next request on."""
        try:
            self.world.faults.check(rule)
        except ValueError as exc:
            raise SimulatorError(str(exc)) from exc
        if rule.bot is not None:
            rule.bot = self.world.find(rule.bot).id
        return self.world.faults.add(rule)

    def faults(self) -> list[FaultRule]:
        return list(self.world.faults.rules)

    def clear_faults(self, fault: str | None = None, rule_id: int | None = None) -> int:
        """Removes all rules, the rules of one fault, or one rule. Returns the number of removed rules."""
        return self.world.faults.remove(rule_id, fault)

    def cut_polls(self, bot: str | None = None) -> int:
        """Resets the connections of parked polls, of one bot or of all, as a failing network does."""
        bots = [self.world.find(bot)] if bot else list(self.world.bots.values())
        cut = 0
        for found in bots:
            for poll in found.polls:
                poll.verdict, cut = poll.verdict or "cut", cut + 1
            found.wake()
        return cut

    # Logins

    def scan(self, qrcode: str, user: str | None = None) -> QrRecord:
        return self.logins.scan(qrcode, user)

    def confirm(self, qrcode: str, user: str | None = None) -> QrRecord:
        return self.logins.confirm(qrcode, user)

    def require_verify(self, qrcode: str, code: str) -> QrRecord:
        return self.logins.require_verify(qrcode, code)

    def expire(self, qrcode: str) -> QrRecord:
        return self.logins.expire(qrcode)

    async def redirect(self, qrcode: str) -> QrRecord:
        await self.open_second_host()
        return self.logins.redirect(qrcode)

    def qrcodes(self) -> list[QrRecord]:
        """All remembered logins, oldest first."""
        return [qr.record() for qr in self.logins.codes.values()]


def call_views(bot: Bot, endpoint: str | None) -> list[CallView]:
    return [
        CallView(bot=bot.id, endpoint=name, count=count, times_ms=list(bot.calls[name]))
        for name, count in bot.call_counts.items()
        if endpoint in (None, name)
    ]
