"""Garbage is found soon, and without a look at all that lives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from adapter.replica.eventloop import MIDDLE

GARBAGE = """
import asyncio, gc, json, sys, weakref
from adapter.replica import eventloop
from adapter.replica.eventloop import run_fast

eventloop.MIDDLE = sys.argv[1:] == ["middle"]

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
    assert set(generations) <= ({0} if eventloop.MIDDLE else {0, 1})  # 1: the interpreter's own increment
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


@pytest.mark.parametrize("middle", [True, False] if MIDDLE else [False])
def test_garbage_is_found_without_a_look_at_all_that_lives(middle: bool) -> None:
    """Where there is no look at those that outlived one, it takes one at all: for them, and not for the young."""
    argv = [sys.executable, "-c", GARBAGE, *(["middle"] if middle else [])]
    run = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=90)
    assert json.loads(run.stdout)[-1] == (1 if middle else 2)
