"""What an input costs its reader: processor time and memory, both in proportion to what came."""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from tests.fuzz.targets import TARGETS
from tests.hostile import TEXTS

FLOOR_S = 0.05
"""What any input may cost: a pause of the collector, or of the machine, is as long."""
MOST_BYTES = 50_000_000
TRIES = 3
"""The best counts."""


class Cost(NamedTuple):
    """Of one input."""

    seconds: float
    """Of the processor."""
    bytes: int
    """The most that Python had allocated for it at once."""


def limit_s(name: str, size: int) -> float:
    """What an input of so many bytes may cost."""
    return max(FLOOR_S, TARGETS[name].ms_per_100kb / 1000 * size / 100_000)


def check_time(name: str, data: bytes, *, slower: float = 1.0) -> float:
    """Reads; the seconds it took. Raises AssertionError where even the best of some tries takes too long.

    `slower`: how much so because the fuzzer looks on.
    """
    limit = slower * limit_s(name, len(data))
    best = float("inf")
    for _ in range(TRIES):
        began = time.process_time()
        TARGETS[name].read(data)
        best = min(best, time.process_time() - began)
        if best <= limit:
            return best
    raise AssertionError(f"{name}: {best * 1000:.0f} ms for {len(data)} bytes, at most {limit * 1000:.0f}")


def check_memory(name: str, data: bytes) -> int:
    """Reads; the bytes it took. Raises AssertionError where they are too many."""
    tracemalloc.start()
    try:
        TARGETS[name].read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= MOST_BYTES, f"{name}: {peak / 1e6:.0f} MB for {len(data)} bytes"
    return peak


def check(name: str, data: bytes, *, slower: float = 1.0) -> None:
    """Both, of memory only where the process has grown: looking at it takes several times as long."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_time(name, data, slower=slower)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MOST_BYTES:
        check_memory(name, data)


def hostile(name: str, size: int) -> Iterator[bytes]:
    """Every text of `tests/hostile.py`, of so many bytes: as it is, and where the target reads a text."""
    before, behind = TARGETS[name].around
    for make in TEXTS.values():
        text = make(size).encode("utf-8", "replace")[:size]
        yield text
        if before:
            yield before + msgspec.json.encode(text.decode("utf-8", "replace")) + behind


def worst(name: str, size: int) -> Cost:
    """The largest of each over all hostile texts. Raises AssertionError where one is too large."""
    found = [Cost(check_time(name, data), check_memory(name, data)) for data in hostile(name, size)]
    return Cost(max(cost.seconds for cost in found), max(cost.bytes for cost in found))
