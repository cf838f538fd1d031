"""What is kept, counted: all that a process holds."""

from __future__ import annotations

import asyncio
import functools
import gc
import heapq
import os
from collections import Counter, deque
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeAlias
from urllib.parse import urlsplit

TABLES = (dict, set, list, deque)

Census: TypeAlias = Counter[str]
"""How many there are of each class, how much is in each table, open files and tasks."""


def census() -> Census:
    """Takes stock of this process: all that the garbage collector knows. Strings and numbers, which it does not know,
    show in the tables that hold them. Caches with a bound are emptied first."""
    # what is frozen, as all that was imported before the adapter began, the collector does not name
    for thing in (urlsplit, *gc.get_objects()):
        if isinstance(thing, functools._lru_cache_wrapper) and thing.cache_parameters()["maxsize"] is not None:
            thing.cache_clear()
    _drop_cancelled_timers()
    gc.collect()
    found: Census = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        found[f"of class {kind.__module__}.{kind.__qualname__}"] += 1
        if isinstance(thing, TABLES):
            found[_table(thing)] = len(thing)
        for held in _referents(thing):
            if type(held) is dict and not gc.is_tracked(held):  # only strings and numbers are in it
                found[_table(held)] = len(held)
    found["open files"] = len(os.listdir("/proc/self/fd"))
    found["tasks"] = len(asyncio.all_tasks())
    return found


def _drop_cancelled_timers() -> None:
    """asyncio keeps them until their time comes or they are most of all: how many that are is chance."""
    loop: Any = asyncio.get_running_loop()
    for timer in loop._scheduled:
        timer._scheduled = not timer.cancelled()
    loop._scheduled[:] = [timer for timer in loop._scheduled if timer._scheduled]
    heapq.heapify(loop._scheduled)
    loop._timer_cancelled_count = 0


def _referents(thing: object) -> list[Any]:
    """What it refers to; of a module nothing, whose dict is asked by itself. Before Python 3.12.6 the module of
    asyncio's C code names iterators that are freed: they are freed once more, and the next collection never ends
    (python/cpython, issue 122695)."""
    return [] if isinstance(thing, ModuleType) else gc.get_referents(thing)


def _table(thing: object) -> str:
    return f"in a table, {type(thing).__name__} {id(thing):x}"


def growing(*counts: Census, by: int) -> list[str]:
    """What there were at least `by` more of each time, as sentences. A table that is gone by now is none that grew:
    its address belonged to others before."""
    steps = list(pairwise(counts))
    always = [name for name in counts[-1] if all(after[name] - before[name] >= by for before, after in steps)]
    named = {name: _plain(name) for name in sorted(always)}
    return [f"{' → '.join(str(count[name]) for count in counts)} {plain}" for name, plain in named.items() if plain]


def _plain(name: str) -> str:
    """A table by those who refer to it; "" where it is gone."""
    if not name.startswith("in a table"):
        return name
    held = [
        (thing, holder)
        for holder in gc.get_objects()
        for thing in _referents(holder)
        if isinstance(thing, TABLES) and _table(thing) == name
    ]
    if not held:
        return ""
    sample = [str(key)[:40] for thing, _ in held[:1] for key in list(thing)[-3:]]
    holders = sorted({f"{type(holder).__qualname__} {str(holder)[:100]}" for _, holder in held})[:5]
    return f"{name}, with {sample}, held by {holders}"
