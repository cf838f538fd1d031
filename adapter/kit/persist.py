"""Work that has to succeed, however long that takes, as long as this replica may do it.

An exception that is no AdapterError is a bug. The message or command that triggers it ends after a few attempts, with
tracebacks in the log, and the next one goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import structlog

from adapter.errors import AdapterError, Crashed, LeaseLost, PersonGone, RecordTooNew, StaleRead
from adapter.kit.timing import Clock, backoff

log = structlog.get_logger()

T = TypeVar("T")

ATTEMPTS = 3


class Owner(Protocol):
    """A right to act that may pause, and that ends for good."""

    def check(self) -> None:
        """Raises LeaseLost unless the right holds now."""

    async def valid(self) -> None:
        """Waits out a pause. Raises LeaseLost once the right is over."""


async def persist(work: Callable[[], Awaitable[T]], owner: Owner, clock: Clock, name: str, **fields: Any) -> T:
    """The result of `work`, which is tried again after a failure of the bus and after a pause of the lease.

    `name` and `fields` are logged. `owner` is asked only after a LeaseLost: `work` checks the right itself, right
    before it acts. Raises LeaseLost once the right is over; Crashed for a bug, which raises in every attempt;
    PersonGone; RecordTooNew; StaleRead.
    """
    failures = crashes = pauses = 0
    while True:
        try:
            return await work()
        except LeaseLost:
            await owner.valid()
            pauses += 1  # the work may see a pause that is over for its owner
            await clock.sleep(backoff(pauses, first_s=0.02, longest_s=1.0))
        except (Crashed, PersonGone, RecordTooNew, StaleRead):
            raise
        except AdapterError as exc:
            failures += 1
            log.warning("work.retrying", work=name, reason=exc.reason, detail=exc.detail, failures=failures, **fields)
            await clock.sleep(backoff(failures, first_s=0.2, longest_s=5.0))
        except Exception as exc:
            crashes += 1
            log.exception("work.crashed", work=name, crashes=crashes, **fields)
            if crashes == ATTEMPTS:
                raise Crashed from exc
            await clock.sleep(backoff(crashes, first_s=0.5))
