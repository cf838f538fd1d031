"""What the bridge of a replica is built on: one struct for both directions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from adapter.bridge.bindings import Bindings
from adapter.bridge.commands import Limits
from adapter.bridge.erasure import Erasure
from adapter.bridge.media import MediaFetcher, Uploads
from adapter.bridge.pace import Successes
from adapter.bridge.persons import Persons
from adapter.bridge.presence import Presence
from adapter.bridge.receipts import Receipts
from adapter.bridge.sending import SendPolicy
from adapter.bridge.sessions import BotSessions
from adapter.contract.names import Names
from adapter.ports import Bus, Chat, CoreBus, History, InboundMessage
from adapter.tools.concurrency import FairSlots
from adapter.tools.events import Events
from adapter.tools.metrics import Metrics
from adapter.tools.seal import Sealer
from adapter.tools.timing import Clock, PerTickLimiter, RateLimiter, WakeupBatcher


class Bodies:
    """The bytes of commands that a replica holds in memory; beyond them a body is read again when its turn comes."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self.most = most

    def take(self, size: int) -> bool:
        """Whether there is room, which is taken then."""
        if self.held + size > self.most:
            return False
        self.held += size
        return True


class Parts(msgspec.Struct, frozen=True):
    """The parts of one replica that its partitions and persons share."""

    # iLink
    chat: Chat
    read_message: Callable[[bytes], InboundMessage]
    sessions: BotSessions
    successes: Successes
    media: MediaFetcher
    uploads: Uploads
    # what is stored
    bus: Bus
    core: CoreBus
    history: History
    events: Events
    receipts: Receipts
    persons: Persons
    bindings: Bindings
    erasure: Erasure
    names: Names
    sealer: Sealer
    presence: Presence
    # rules
    policy: SendPolicy
    limits: Limits
    stale_retry_s: Sequence[float]
    """Pauses between retries of a token that iLink has refused (-14)."""
    login_polls_s: Sequence[float]
    """When a binding that needs a login is polled all the same (refused_token.LOGIN_POLLS_S)."""
    max_payload: Callable[[], int]
    is_writable: Callable[[], bool]
    """Whether `wait_writable` would return at once."""
    wait_writable: Callable[[], Coroutine[Any, Any, object]]
    """Returns when the bus accepts what a poll may bring; no poll starts before."""
    wait_bindings: Callable[[], Awaitable[None]]
    """Returns when the bucket of bindings is complete: what is written before would be overwritten by its restore."""
    # what spreads the work of thousands of bots, which would otherwise delay the event loop and the lease
    bodies: Bodies
    slots: Mapping[str, FairSlots]
    """Requests to sendmessage that may be out at the same time, by base URL: one that hangs delays no other."""
    takeovers: asyncio.Semaphore
    """Bounds how many persons are read at once."""
    starts: RateLimiter
    """Spreads the first polls, and those after an outage. Polls that begin together end together, and would begin
    together for ever."""
    wakeups: WakeupBatcher
    """Groups the next polls of bots that got no message."""
    ticks: PerTickLimiter
    clock: Clock
    metrics: Metrics
