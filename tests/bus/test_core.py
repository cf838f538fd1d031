"""Publishing without storage, and asking all replicas at once."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from adapter.contract.names import H_SCHEMA
from adapter.jetstream.managed_connection import CoreNats, ManagedConnection
from tests.bus.rig import NAMES, PATIENCE_S, Rig


async def test_what_is_published_needs_no_stream(rig: Rig) -> None:
    nc = await rig.bus.client()
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox)
    await nc.flush()
    await CoreNats(rig.connection).publish(inbox, msgspec.json.encode({"ok": True}), {H_SCHEMA: "1"})
    assert (await answers.next_msg(5)).data == b'{"ok":true}'
    await nc.close()


async def test_a_replica_is_asked_and_waited_for_no_longer_than_needed(rig: Rig) -> None:
    core, (subject, silent) = CoreNats(rig.connection), (NAMES.polls_of("r1"), NAMES.polls_of("r2"))
    assert await core.ask(subject, b"?", within_s=PATIENCE_S) is None  # nobody listens
    async with asyncio.TaskGroup() as group:
        connection = ManagedConnection(rig.bus.settings, "replica")
        replica = CoreNats(connection)
        replica.respond(subject, lambda data: data + b"1")
        replica.respond(silent, lambda data: None)
        task = group.create_task(connection.run())
        await connection.wait_connected(PATIENCE_S)
        assert await core.ask(subject, b"?", within_s=PATIENCE_S) == b"?1"
        assert await core.ask(silent, b"?", within_s=0.3) is None
        nc = await rig.bus.client()
        await nc.subscribe("elsewhere", cb=_forbidden)
        await nc.publish(subject, b"?", reply="elsewhere")  # only an inbox is answered
        assert await core.ask(subject, b"?", within_s=PATIENCE_S) == b"?1"
        await nc.flush()
        await nc.close()
        task.cancel()


async def _forbidden(msg: Any) -> None:
    raise AssertionError(msg)
