"""Garbage collection after an unbind: removes the bot's cursor and records, and at last the binding's deletion mark.

All is kept for a time, since a bot may be bound again, and iLink repeats messages for an hour. What is in streams
goes by their ages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import structlog

from adapter.bindings.registry import Bindings
from adapter.errors import AdapterError
from adapter.names import text_of, user_of_key
from adapter.ports import PurgeableBucket
from adapter.timing import Clock

log = structlog.get_logger()

ROUND_S = 3600.0
"""Between two rounds, or a quarter of the time for which things are kept, whichever is shorter."""
RETRY_S = 60.0
"""Pause after a round that failed."""


class Tidying(NamedTuple):
    """The dependencies of a round."""

    bindings: Bindings
    bound: PurgeableBucket
    """The bucket of the bindings."""
    cursors: PurgeableBucket
    """Its keys are, or begin with, a bot: `<bot>` or `<bot>/…`."""
    conversations: PurgeableBucket
    """Its keys are `<sandbox>.<user>`."""
    check: Callable[[], None]
    """Raises LeaseLost where this replica may not do it."""
    clock: Clock
    keep_s: float
    """How long a bot is remembered after its last message, or its unbinding if that came later."""


async def tidy_forever(needs: Tidying) -> None:
    """Until cancelled."""
    pause_s = min(ROUND_S, needs.keep_s / 4)
    await needs.bindings.changed.until(lambda: needs.bindings.loaded)
    while True:
        try:
            removed = await tidy_once(needs)
        except AdapterError as exc:  # nobody waits for it
            log.info("tidying.waits", reason=exc.reason, detail=exc.detail)
            await needs.clock.sleep(min(RETRY_S, pause_s))
            continue
        if removed:
            log.info("tidying.done", keys=removed)
        await needs.clock.sleep(pause_s)


async def tidy_once(needs: Tidying) -> int:
    """How many keys were removed. Raises Temporary, BusRefused (there is no such bucket any more), LeaseLost.

    What is written meanwhile stays, since only what was looked at is removed. The mark of the unbinding goes last:
    as long as it is there, the rest is found again after a crash.
    """
    horizon_ms = needs.clock.now_ms() - int(needs.keep_s * 1000)
    marks: list[tuple[str, int]] = []
    resting: set[str] = set()
    for key in await needs.bound.keys():
        if _stays(key, needs):
            continue
        mark = await needs.bound.written(key)
        if mark is None:
            continue
        if mark.deleted and mark.time_ms < horizon_ms:
            marks.append((key, mark.revision))
        else:  # unbound not long ago, or bound a moment ago
            resting.add(key)
    cursors = [key for key in await needs.cursors.keys() if key.partition("/")[0] not in resting]
    cursors = [key for key in cursors if not _stays(key.partition("/")[0], needs)]
    removed = await _purge_old(needs.cursors, cursors, horizon_ms, needs)
    conversations = [key for key in await needs.conversations.keys() if not _is_served(key, needs)]
    removed += await _purge_old(needs.conversations, conversations, horizon_ms, needs)
    for key, revision in marks:
        needs.check()
        await needs.bound.purge(key, revision)
        removed += 1
    return removed


async def _purge_old(bucket: PurgeableBucket, keys: list[str], horizon_ms: int, needs: Tidying) -> int:
    """How many of `keys` were removed: those last written before the horizon. Raises Temporary, LeaseLost."""
    removed = 0
    for key in keys:
        last = await bucket.written(key)
        if last is not None and last.time_ms < horizon_ms:
            needs.check()
            await bucket.purge(key, last.revision)
            removed += 1
    return removed


def _is_served(key: str, needs: Tidying) -> bool:
    """Whether the user of a conversation is the one of a bot of its sandbox."""
    sandbox = key.partition(".")[0]
    try:
        user = user_of_key(key)
    except ValueError:
        user = ""
    if not user:
        return True  # a key that the adapter never made is not its to remove
    return any(binding.user == user for binding in needs.bindings.of_sandbox(sandbox))


def _stays(token: str, needs: Tidying) -> bool:
    """Whether a bot is bound, or this is none: a key that the adapter never made is not its to remove."""
    try:
        return needs.bindings.get(text_of(token)) is not None
    except ValueError:
        return True
