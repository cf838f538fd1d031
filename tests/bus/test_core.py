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


async def test_all_replicas_are_asked_at_once_and_waited_for_no_longer_than_needed(rig: Rig) -> None:
    """One that says nothing costs the time, not the answers of the others."""
    subject, core = NAMES.polls_of("r1"), CoreNats(rig.connection)
    assert await core.query_replicas(subject, b"?", count=1, within_s=PATIENCE_S) == []  # nobody listens
    async with asyncio.TaskGroup() as group:
        links = [ManagedConnection(rig.bus.settings, f"replica {number}") for number in range(3)]
        for number, connection in enumerate(links):
            answer = f"{number}".encode() if number < 2 else None
            CoreNats(connection).respond(subject, lambda data, answer=answer: answer and data + answer)  # type: ignore[misc]
        tasks = [group.create_task(connection.run()) for connection in links]
        for connection in links:
            await connection.wait_connected(PATIENCE_S)
        assert sorted(await core.query_replicas(subject, b"?", count=2, within_s=PATIENCE_S)) == [b"?0", b"?1"]
        assert sorted(await core.query_replicas(subject, b"?", count=3, within_s=0.3)) == [b"?0", b"?1"]
        nc = await rig.bus.client()
        await nc.subscribe("elsewhere", cb=_forbidden)
        await nc.publish(subject, b"?", reply="elsewhere")  # only an inbox is answered
        assert sorted(await core.query_replicas(subject, b"?", count=2, within_s=PATIENCE_S)) == [b"?0", b"?1"]
        await nc.flush()
        await nc.close()
        for task in tasks:
            task.cancel()


async def _forbidden(msg: Any) -> None:
    raise AssertionError(msg)
