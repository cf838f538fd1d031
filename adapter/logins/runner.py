"""Runs the QR logins that this replica started, and ends those whose replica is gone.

A login lives in one replica. After a crash its codes are in nobody's memory: any replica that finds the owner gone
stores the status `lost`, and a new code has to be asked for.
"""

from __future__ import annotations

from functools import partial

import structlog

from adapter.contract.messages import Options
from adapter.contract.records import LoginRecord
from adapter.errors import Refused, Temporary
from adapter.kit.tasks import TaskSet
from adapter.logins.flow import LoginDeps, LoginFlow
from adapter.logins.steps import next_step
from adapter.ports import QrCode

log = structlog.get_logger()

LOOK_S = 1.0


class LoginRunner:
    """The open logins of this replica, each in a task."""

    def __init__(self, deps: LoginDeps) -> None:
        self._deps = deps
        self._tasks = TaskSet(_report)

    async def start(self, login: str, record: LoginRecord, code: QrCode, options: Options) -> LoginRecord:
        """Stores a new login with its first code, and runs it here. Raises BusRefused, Temporary."""
        stored = await self._deps.registry.create(login, record)
        self._tasks.spawn(self._run_flow(login, LoginFlow(login, stored, options, self._deps), code))
        return stored[0]

    async def run(self) -> None:
        """Runs until cancelled; then answers that have arrived are applied."""
        registry, leases = self._deps.registry, self._deps.leases
        try:
            while True:
                registry.forget_ended()
                for login, record in registry:
                    if not record.is_over:
                        await self._end_if_lost(login, record.owner)
                epoch = leases.membership_epoch
                await leases.changed.wait_until(partial(self._has_left, epoch), LOOK_S)
        finally:
            self._tasks.cancel_all()
            await self._tasks.wait_ended()

    def _has_left(self, epoch: int) -> bool:
        """Whether a replica has left since."""
        return self._deps.leases.membership_epoch != epoch

    async def _end_if_lost(self, login: str, owner: str) -> None:
        leases = self._deps.leases

        def lost(now: LoginRecord) -> LoginRecord | None:
            # with the finder's name: two who write the same at once would both take the write for their own
            return None if now.is_over else next_step(now, status="lost", owner=leases.incarnation)

        try:
            if await leases.revoke_if_expired(owner):
                await self._deps.registry.update(login, lost)
        except (Temporary, Refused) as exc:  # Refused: the record was deleted
            log.info("login.unread", reason=exc.reason)

    async def _run_flow(self, login: str, flow: LoginFlow, code: QrCode) -> None:
        try:
            await flow.run(code)
        except* Refused as exc:  # the record was deleted
            log.info("login.abandoned", login=login[:6], reason=exc.exceptions[0].args[0])
        except* Exception:  # a bug ends this login, and the others continue
            log.exception("login.crashed", login=login[:6])
            await flow.fail("crashed", "The adapter failed, see its log; start another login.")


def _report(exc: BaseException) -> None:
    log.error("task.crashed", task="login", exc_info=exc)
