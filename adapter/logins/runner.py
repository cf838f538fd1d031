"""Runs the open QR logins of this replica's shards, each in a task.

Only the shard's owner asks iLink (`flow`), so that exactly one replica processes a confirmation.
"""

from __future__ import annotations

import asyncio
from functools import partial

import structlog

from adapter.contract.names import shard_of
from adapter.errors import LeaseLost, Refused
from adapter.kit.timing import wait_any
from adapter.logins.flow import LoginDeps, LoginFlow, end_all

log = structlog.get_logger()


class LoginRunner:
    """Maintains a task for each open login of an owned shard."""

    def __init__(self, deps: LoginDeps) -> None:
        self._deps = deps
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._published_steps: dict[str, int] = {}
        """The last published step of each login. The flows write to this dict, so it is never replaced."""

    async def run(self) -> None:
        """Runs until cancelled; then answers that have arrived are stored."""
        bindings = self._deps.bindings
        try:
            await bindings.changed.wait_until(lambda: bindings.is_loaded)
            while True:
                self._sync_flows()
                await self._wait_for_change()
        finally:
            await end_all(list(self._tasks.values()))

    def _sync_flows(self) -> None:
        registry, leases = self._deps.registry, self._deps.leases
        registry.forget_ended()
        owned = leases.owned if leases.is_valid else set()
        known = dict(registry)
        for login in self._published_steps.keys() - known.keys():
            del self._published_steps[login]
        for login, record in known.items():
            due = not record.is_over or self._published_steps.get(login) != record.step
            if due and shard_of(record.sandbox) in owned and login not in self._tasks:
                task = asyncio.get_running_loop().create_task(self._run_flow(login), name=f"login.{login[:6]}")
                self._tasks[login] = task
                task.add_done_callback(partial(self._forget_task, login))
        for login, task in self._tasks.items():
            here = login in known and shard_of(known[login].sandbox) in owned
            if not here and not task.cancelling():
                task.cancel()

    def _forget_task(self, login: str, _: object) -> None:
        del self._tasks[login]

    async def _run_flow(self, login: str) -> None:
        while True:
            try:
                await LoginFlow(login, self._deps, self._published_steps).run()
                return
            except (LeaseLost, Refused) as exc:  # Refused: the record was deleted
                log.info("login.abandoned", login=login[:6], reason=exc.reason)
                return
            except Exception:  # a bug: this login pauses, and the others continue
                log.exception("login.crashed", login=login[:6])
            await self._deps.clock.sleep(5.0)

    async def _wait_for_change(self) -> None:
        """Waits until a login may have to start or end."""
        registry, leases = self._deps.registry, self._deps.leases
        version, owned, valid = registry.version, set(leases.owned), leases.is_valid
        await wait_any(
            registry.changed.wait_until(lambda: registry.version != version),
            leases.changed.wait_until(lambda: (leases.owned, leases.is_valid) != (owned, valid)),
            timeout_s=1.0,
        )
