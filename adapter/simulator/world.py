"""The state of the simulated iLink: users, bots, tokens and windows. This module knows no network."""

import asyncio
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import structs

from adapter.simulator import ids, reading
from adapter.simulator.clock import VirtualClock
from adapter.simulator.faults import Faults
from adapter.simulator.records import (
    BotRecord,
    Json,
    PollRecord,
    SendRecord,
    Shown,
    SimulatorError,
    Violation,
)
from adapter.simulator.settings import AT_THE_START, FOR_ALL, SimulatorSettings

IN_ALL = 200_000
"""Maximum number of records of one kind over all bots, so that 10,000 bots fit in memory."""
CONTEXT_TOKENS_KEPT = 1_000
VOID_TOKENS_KEPT = 20_000
"""Context tokens of superseded bots, over all bots."""
CLIENT_IDS_KEPT = 20_000
TICKETS_KEPT = 1_000


@dataclass(slots=True, eq=False)
class LogEntry:
    """A message in a bot's log. `raw` is its JSON, and `position` counts from 1."""

    position: int
    message_id: str
    client_id: str
    seq: int
    create_time_ms: int
    context_token: str
    user: str
    raw: bytes
    deliveries: int = 0
    in_flight: bool = False


@dataclass(slots=True, eq=False)
class Poll:
    """A `getupdates` in progress that reads from `start`. A `verdict`, once set, ends it without messages."""

    record: PollRecord
    start: int
    woken: "asyncio.Future[None] | None" = None
    verdict: str = ""
    hung_up: bool = False
    batch: list[LogEntry] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class WindowState:
    """What one bot may send to one user, and what it has shown there."""

    opened_ms: int | None = None
    sent: int = 0
    context_tokens: "OrderedDict[str, int]" = field(default_factory=OrderedDict)
    silenced: set[str] = field(default_factory=set)
    client_ids: "OrderedDict[str, str]" = field(default_factory=OrderedDict)
    tickets: dict[str, int] = field(default_factory=dict)
    typing_since_ms: int | None = None
    typing_on_calls: int = 0
    typing_off_calls: int = 0


@dataclass(slots=True, eq=False)
class Bot:
    """One bot. Most bots are idle, so containers are made when first needed."""

    id: str
    user: str
    token: str
    dead: bool = False
    superseded: bool = False
    stale_answers: int = 0
    heard_ms: int = 0
    """Time of the user's last message or login."""
    settings: SimulatorSettings | None = None
    last_position: int = 0
    delivered_position: int = 0
    rewound_to: int | None = None
    log: "deque[LogEntry]" = field(default_factory=deque)
    pending: "deque[LogEntry]" = field(default_factory=deque)
    polls: list[Poll] = field(default_factory=list)
    poll_records: "deque[PollRecord]" = field(default_factory=deque)
    polls_total: int = 0
    polls_at_once: int = 0
    overlaps: int = 0
    cursor_salt: int = 0
    calls: "dict[str, deque[float]]" = field(default_factory=dict)
    call_counts: dict[str, int] = field(default_factory=dict)
    windows: dict[str, WindowState] = field(default_factory=dict)
    sends: "deque[SendRecord]" = field(default_factory=deque)
    ids_answered: int = 0
    updates_answered: int = 0
    online: bool = False
    online_timeline: list[tuple[float, bool]] = field(default_factory=list)
    last_uin: str = ""

    def record(self) -> BotRecord:
        return BotRecord(bot=self.id, user=self.user, token=self.token)

    def window(self, user: str) -> WindowState:
        return self.windows.setdefault(user, WindowState())

    def wake(self) -> None:
        """Makes every parked poll look for messages again."""
        for poll in self.polls:
            if poll.woken is not None and not poll.woken.done():
                poll.woken.set_result(None)


class World:
    """The whole state, and the actions that concern several bots at once."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.settings = settings
        self.rng = random.Random(settings.seed)
        self.clock = VirtualClock(settings.frozen_at_ms)
        self.faults = Faults(self.rng)
        self.cursors = ids.Cursors(self.rng)
        self.message_ids = ids.message_ids(self.rng)
        self.bots: dict[str, Bot] = {}
        self.by_token: dict[str, Bot] = {}
        self.by_user: dict[str, Bot] = {}
        self.phones: dict[str, deque[Shown]] = {}
        self.listeners: list[Callable[[str, Shown], None]] = []
        self._void_tokens: OrderedDict[str, None] = OrderedDict()
        self.sending: dict[str, list[SendRecord]] = {}
        self.violations: deque[Violation] = deque(maxlen=10_000)
        self.violation_counts: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def settings_of(self, bot: Bot | None) -> SimulatorSettings:
        return bot.settings if bot is not None and bot.settings is not None else self.settings

    def configure(self, bot: str | None, changes: Json) -> SimulatorSettings:
        """Changes settings for all bots or for one. That bot then ignores later changes for all."""
        target = self.find(bot) if bot is not None else None
        present = structs.asdict(self.settings_of(target))
        settings = reading.read(present | changes, SimulatorSettings)
        changed = {name for name, value in structs.asdict(settings).items() if value != present[name]}
        if fixed := changed & AT_THE_START:
            raise SimulatorError(f"can only be set at the start: {', '.join(sorted(fixed))}")
        if target is not None and (common := changed & FOR_ALL):
            raise SimulatorError(f"can only be set for all bots: {', '.join(sorted(common))}")
        if target is None:
            self.settings = settings
        else:
            target.settings = settings
        return settings

    def add_bot(self, user: str | None = None, bot: str | None = None, token: str | None = None) -> Bot:
        """Adds a bot as if `user` had scanned a QR code. An older bot of the user is superseded."""
        bot_id = bot or ids.new_bot(self.rng)
        if bot_id in self.bots:
            raise SimulatorError(f"there is a bot {bot_id} already")
        new = Bot(bot_id, user or ids.new_user(self.rng), token or ids.new_token(self.rng, bot_id))
        if new.token in self.by_token:
            raise SimulatorError("this token is in use")
        if old := self.by_user.get(new.user):
            self.supersede(old)
        new.heard_ms = self.clock.now_ms()
        self.bots[new.id] = self.by_token[new.token] = self.by_user[new.user] = new
        return new

    def supersede(self, bot: Bot) -> None:
        """Voids the bot's context tokens at once, and kills its token after the death delay."""
        bot.superseded = True
        for window in bot.windows.values():
            for token in window.context_tokens:
                self.void(token)
        bot.windows.clear()
        delay_s = self.settings_of(bot).token_death_delay_s
        if delay_s <= 0:
            self.kill(bot)
        else:
            self.clock.schedule(delay_s, lambda: self.kill(bot))

    def issue(self, bot: Bot, user: str, token: str) -> None:
        """Registers the context token of a message to `bot`. A token of a superseded bot is void at once."""
        if bot.superseded:
            self.void(token)
            return
        self._void_tokens.pop(token, None)
        tokens = bot.window(user).context_tokens
        tokens.pop(token, None)
        tokens[token] = self.clock.now_ms()
        while len(tokens) > self.share(CONTEXT_TOKENS_KEPT, least=50):
            tokens.popitem(last=False)

    def void(self, token: str) -> None:
        """Voids a context token: no bot can send with it."""
        self._void_tokens[token] = None
        while len(self._void_tokens) > VOID_TOKENS_KEPT:
            self._void_tokens.popitem(last=False)

    def is_void(self, token: str) -> bool:
        return token in self._void_tokens

    def bury_idle(self, bot: Bot) -> None:
        """Kills the token of a bot whose user has been silent for too long, if the settings say so."""
        longest_ms = self.settings_of(bot).idle_death_hours * 3_600_000
        if longest_ms and not bot.dead and self.clock.now_ms() - bot.heard_ms > longest_ms:
            self.kill(bot)

    def kill(self, bot: Bot) -> None:
        """Kills the bot's token: every request gets -14, and so do the parked polls."""
        bot.dead, bot.stale_answers = True, 0
        if bot.online:
            self.turn(bot, online=False)
        bot.wake()

    def turn(self, bot: Bot, *, online: bool) -> None:
        """Records that the bot runs, or that it stopped."""
        bot.online = online
        bot.online_timeline.append((self.clock.exact_ms(), online))
        del bot.online_timeline[: -self.records_limit()]

    def find(self, user_or_bot: str) -> Bot:
        """The bot with this id, or the present bot of this user. Raises SimulatorError."""
        found = self.bots.get(user_or_bot) or self.by_user.get(user_or_bot)
        if found is None:
            raise SimulatorError("no such bot or user")
        return found

    def answered_id(self, message_id: str, bot: Bot) -> int | str:
        """A message id in an answer of `sendmessage`, in the form of `id_style`."""
        bot.ids_answered += 1
        return ids.written(message_id, self.settings_of(bot).id_style, bot.ids_answered)

    def inbound_id(self, message_id: int | str, bot: Bot) -> int | str:
        """A message id in the bot's next inbound message, in the form of `inbound_id_style`."""
        return ids.written(message_id, self.settings_of(bot).inbound_id_style, bot.last_position + 1)

    def quoted_ids(self, message_id: int | str, bot: Bot) -> tuple[int | str, int | str]:
        """The id of a quoted message as `svr_id`, and as `msg_id` of the quoted item."""
        style = self.settings_of(bot).quoted_id_style
        return self.inbound_id(message_id, bot), ids.written(message_id, style, bot.last_position)

    def violate(self, kind: str, endpoint: str, bot: Bot | None, detail: str = "") -> None:
        """Records a violation. `detail` must not contain a token or message text."""
        self.violation_counts[kind] += 1
        self.violations.append(
            Violation(
                kind=kind,
                endpoint=endpoint,
                bot=bot.id if bot else "",
                at_ms=self.clock.exact_ms(),
                detail=detail,
            )
        )

    def share(self, wanted: int, *, least: int = 20) -> int:
        """Number of records of one kind that a bot may keep: less than `wanted` if there are many bots."""
        return max(least, min(wanted, IN_ALL // max(len(self.bots), 1)))

    def records_limit(self) -> int:
        return self.share(self.settings.records_per_bot)
