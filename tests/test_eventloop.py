"""Garbage is found soon, and without a look at all that lives."""

from __future__ import annotations

import subprocess
import sys

GARBAGE = """
import asyncio, gc, json, weakref
from adapter.eventloop import run_fast

class Node:
    def __init__(self):
        self.itself = self

async def gone(seen):
    async with asyncio.timeout(30):
        while seen() is not None:
            await asyncio.sleep(0.01)

async def main():
    parked = [[number] for number in range(200_000)]  # as polls that wait: they live on
    gc.callbacks.append(lambda phase, info: generations.append(info["generation"]))
    node = Node()
    seen = weakref.ref(node)
    del node
    await gone(seen)
    assert set(generations) == {0}
    node = Node()
    seen = weakref.ref(node)
    looks = generations.count(0)
    async with asyncio.timeout(30):
        while generations.count(0) < looks + 4:  # two of its phases each
            await asyncio.sleep(0.01)
    del node
    parked += [[number] for number in range(200_000)]  # or garbage that outlived a look, as after thousands of errors
    await gone(seen)
    return len(parked)

generations = []
assert run_fast(main())
print(sorted(set(generations)))
"""


def test_garbage_is_found_without_a_look_at_all_that_lives() -> None:
    run = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=True, timeout=90)
    assert run.stdout == "[0, 1]\n"
