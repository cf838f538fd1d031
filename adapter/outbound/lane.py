"""The queue of one user of a sandbox and what is known of it. `lanework` works it off."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from adapter import contract
from adapter.outbound.commands import Command
from adapter.ports import Account, Delivery
from adapter.records import Binding, Hand


class Item:
    """A command in a lane."""

    __slots__ = ("command", "data", "delivery", "headers", "parked_ms", "parked_seq", "said", "suspect")

    def __init__(self, command: Command, data: bytes, headers: dict[str, str], *, suspect: bool) -> None:
        self.command = command
        self.data = data
        self.headers = headers
        self.delivery: Delivery | None = None
        self.said: contract.Outbound | None = None
        """Its body as it is parked, where that is not as it came: what Markdown said needs no second reading."""
        self.parked_seq = 0
        """Its sequence in WECHAT_PARKED, if it comes from there."""
        self.parked_ms = 0
        """How long it was parked until it was read back."""
        self.suspect = suspect
        """It was in somebody's hand before: its receipt may be on the bus already."""

    @property
    def seq(self) -> int:
        """Its place among the commands as they were stored; 0: it comes from where it was parked."""
        return self.delivery.seq if self.delivery else 0


class Parked(NamedTuple):
    """A command that waits on the bus."""

    seq: int
    subject: str
    command: str
    client: str
    expires_ms: int
    stored_ms: int
    """As the command's."""
    final: bool = False


def parked_at(seq: int, subject: str, command: Command) -> Parked:
    """A command and where it is parked."""
    return Parked(seq, subject, command.id, command.client, command.expires_ms, command.stored_ms, command.final)


class Stale(NamedTuple):
    """Sends in a row that iLink refused with -14. Times are monotonic."""

    tries: int
    since: float
    until: float
    """None is tried again before this."""
    last_tries: bool
    """The binding needs a login by this lane's word, and tries are left that may prove it wrong."""


class Lane:
    """The commands for one user of one sandbox, in order: first what is parked, then the queue."""

    def __init__(self, sandbox: str, bot: str, user: str) -> None:
        self.sandbox = sandbox
        self.bot = bot
        """The bot that it was last meant for; another bot of the same user may take its place."""
        self.user = user
        """"" as long as nobody knows the bot's user."""
        self.former: dict[str, None] = {}
        """The bots that served the user before, in order, while what was sent over them has not been looked at."""
        self.inherits = False
        """Whether an owner before us may have sent some of its commands, over whichever bot served the user by then,
        and nobody has looked at that yet."""
        self.looked_back = False
        """Whether the record of the bot has what was sent to the user over those before, also before this replica's
        time."""
        self.hand: Hand | None = None
        """How far its last command got: one of the bot's next sandbox may take its place in the record."""
        self.is_left = False
        """Its bot serves another sandbox now, whose owner waits until nothing is out here: how it ends is stored."""
        self.queue: deque[Item] = deque()
        self.parked: deque[Parked] = deque()
        self.earliest_ms = math.inf
        """Nothing in the queue, and nothing parked, expires before this: no turn before it need look at them all."""
        self.reason = ""
        """Why the parked commands wait."""
        self.wake = asyncio.Event()
        self.next_send = 0.0
        """Monotonic time before which nothing is sent to the user."""
        self.stale: Stale | None = None
        """iLink has refused the token of the last sends."""
        self.unsure: set[int] = set()
        """Sequences of what was found parked: whether it was told already is not known yet."""
        self.told: dict[int, contract.Receipt] = {}
        """Sequences of what is parked although it has its final receipt."""
        self.missed: tuple[int, float, float] | None = None
        """What is parked and was not found on the bus: the last sequence, and when that was first and last so."""
        self.spoke = False
        """A command was sent, or parked, since the user wrote or typing was switched on."""
        self.apart_until = 0
        """What is parked up to this sequence is not merged: iLink refused it so."""
        self.moved: Lane | None = None
        """The lane that took everything over when the bot's user became known."""
        self.behind: asyncio.Task[None] | None = None
        """What works on the lane that was taken over: a command of it may be about to be parked."""
        self.task: asyncio.Task[None] | None = None
        self._account: tuple[Binding, Account] | None = None

    def add(self, item: Item) -> None:
        """Puts a command at the end of the queue."""
        self.queue.append(item)
        if item.suspect:
            self.inherits = True
        self.earliest_ms = min(self.earliest_ms, item.command.expires_ms)

    def park(self, parked: Parked) -> None:
        """Puts a command behind what is parked."""
        self.parked.append(parked)
        self.earliest_ms = min(self.earliest_ms, parked.expires_ms)

    def take_over(self, other: Lane) -> None:
        """Moves everything that waits in another lane here."""
        other.moved, self.behind = self, other.task
        self.parked = deque(sorted({*self.parked, *other.parked}))
        self.queue = deque(sorted([*self.queue, *other.queue], key=lambda item: item.seq))
        self.unsure |= other.unsure
        self.told |= other.told
        self.inherits |= other.inherits
        self.earliest_ms = min(self.earliest_ms, other.earliest_ms)
        other.parked.clear()
        other.queue.clear()
        other.wake.set()

    def shift(self, item: Item) -> None:
        """Takes the first command out of the queue, which another lane may have taken over meanwhile."""
        queue = self.moved.current().queue if self.moved else self.queue
        if queue and queue[0] is item:
            queue.popleft()
        elif item in queue:
            queue.remove(item)

    def put_first(self, parked: Parked) -> None:
        """Moves a parked command ahead of the others."""
        self.parked.remove(parked)
        self.parked.appendleft(parked)

    def sort(self) -> None:
        """Restores the order in which commands were parked."""
        self.parked = deque(sorted(self.parked))

    def drop(self, seqs: Sequence[int]) -> None:
        """Forgets parked commands, wherever they stand by now."""
        for parked in [parked for parked in self.parked if parked.seq in seqs]:
            self.parked.remove(parked)
            self.unsure.discard(parked.seq)
            self.told.pop(parked.seq, None)

    def late_together(self, held: set[str], now_ms: int) -> list[Parked]:
        """What is parked and expired. Those whose clients are `held` may have gone out in one message, and expire
        together with their last."""
        latest_ms = max((parked.expires_ms for parked in self.parked if parked.client in held), default=0)
        for index, parked in enumerate(self.parked):
            if parked.client in held:
                self.parked[index] = parked._replace(expires_ms=latest_ms)
        return [parked for parked in self.parked if parked.expires_ms <= now_ms]

    def late(self, now_ms: int) -> tuple[list[Item], bool]:
        """What expired in the queue, and whether anything that is parked did."""
        if now_ms < self.earliest_ms:
            return [], False
        late = [item for item in self.queue if item.command.expires_ms <= now_ms]
        late_parked = any(parked.expires_ms <= now_ms for parked in self.parked)
        if not late and not late_parked:
            waiting = [*(item.command.expires_ms for item in self.queue), *(one.expires_ms for one in self.parked)]
            self.earliest_ms = min(waiting, default=math.inf)
        return late, late_parked

    def account(self, binding: Binding, open_account: Callable[[Binding], Account]) -> Account:
        """How its bot is called: a token is opened once, not for each send. Raises what `open_account` raises."""
        if self._account is None or self._account[0] is not binding:
            self._account = binding, open_account(binding)
        return self._account[1]

    def current(self) -> Lane:
        return self.moved.current() if self.moved else self

    def is_needed(self, now: float) -> bool:
        """Whether something waits, or is known that the next command has to heed. `now`: monotonic."""
        works = self.task is not None and not self.task.done()
        return bool(works or self.queue or self.parked or self.stale or now < self.next_send)


class Lanes:
    """The lanes of a shard, indexed by sandbox: what happens to one user costs nothing for all others."""

    def __init__(self) -> None:
        self._of: dict[str, dict[tuple[str, str], Lane]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Lane]:
        """All, whatever comes or goes meanwhile."""
        return iter([lane for lanes in self._of.values() for lane in lanes.values()])

    def of(self, sandbox: str) -> list[Lane]:
        return list(self._of.get(sandbox, {}).values())

    def at(self, sandbox: str, bot: str, user: str) -> Lane:
        """The lane of a user, or of a bot whose user is not known; a new one if there is none."""
        lanes, key = self._of.setdefault(sandbox, {}), _key(bot, user)
        if key not in lanes:
            lanes[key] = Lane(sandbox, bot, user)
        return lanes[key]

    def unknown(self, sandbox: str, bot: str) -> Lane | None:
        """The lane of a bot whose user was not known."""
        return self._of.get(sandbox, {}).get(_key(bot, ""))

    def drop(self, lane: Lane) -> None:
        lanes = self._of[lane.sandbox]
        del lanes[_key(lane.bot, lane.user)]
        if not lanes:
            del self._of[lane.sandbox]


def _key(bot: str, user: str) -> tuple[str, str]:
    """A user has one lane, whichever bot serves them."""
    return "" if user else bot, user
