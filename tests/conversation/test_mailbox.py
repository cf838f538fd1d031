"""The inputs of one conversation: handled in order, and none after the end."""

from __future__ import annotations

import gc
import weakref

from adapter.conversation import rules
from adapter.conversation.mailbox import Mailbox
from adapter.kit.timing import PerTickLimiter
from tests.fakes import Bench, ready, settle

VIRTUAL_TIME = True


async def test_a_mailbox_that_stops_before_its_task_begins_is_not_busy() -> None:
    box = Mailbox("s1", lambda: None, PerTickLimiter(10))
    box.put(rules.Deadline())
    box.stop()
    await settle()
    assert not box.is_busy


async def test_a_conversation_that_ends_leaves_no_reference_cycle() -> None:
    """Thousands are let go while the garbage collector is off."""
    bench: Bench = await ready()
    shard = bench.processor()
    (binding,) = bench.bindings.of_sandbox("s1")
    seen = weakref.ref(await shard.conversation(binding, binding.user))
    await settle()
    gc.disable()
    try:
        shard.stop()
        await settle()
        assert seen() is None
    finally:
        gc.enable()
