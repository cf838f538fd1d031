"""Garbage is looked for when memory has grown, and only then."""

from __future__ import annotations

import json
import subprocess
import sys

GARBAGE = """
import asyncio, gc, json, weakref
from adapter.replica import eventloop

eventloop.CHECK_S = 0.02

class Node:
    def __init__(self):
        self.itself = self

async def main():
    waiting = [[number] for number in range(600_000)]  # like polls that wait: they live on
    while not collections:
        await asyncio.sleep(0.01)
    node = Node()
    seen = weakref.ref(node)
    del node
    before = len(collections)
    for _ in range(20):  # as much made as freed
        waiting[:100_000] = [[number] for number in range(100_000)]
        await asyncio.sleep(0.02)
    assert len(collections) == before
    assert seen() is not None
    waiting += [[number] for number in range(600_000)]  # or garbage, as after thousands of errors
    async with asyncio.timeout(30):
        while seen() is not None:
            await asyncio.sleep(0.01)
    return len(collections) - before

collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "stop" else None)
print(json.dumps(eventloop.run_fast(main())))
"""


def test_garbage_is_collected_once_memory_has_grown_and_not_before() -> None:
    run = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=True, timeout=90)
    assert json.loads(run.stdout) >= 1
