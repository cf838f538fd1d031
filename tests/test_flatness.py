"""How a long run is judged: what grows is found through noise, and what only comes and goes is not."""

from __future__ import annotations

import random
import re

import pytest

from tests.e2e.flatness import MIB, Bound, Series, judge
from tests.e2e.soak import BOUNDS

MINUTES = 30
TIMES = [5.0 * number for number in range(MINUTES * 12)]
ANY = (Bound(re.compile(".*"), 1.5 * MIB, 0.0, ""),)


def memory(*, leak: float = 0.0, noise: float = 0.0, warm: float = 0.0, wave: float = 0.0) -> Series:
    """Of a process that leaks so many bytes a second."""
    rng = random.Random(1)
    values = [
        60 * MIB + leak * at - warm * max(0.0, 1 - at / 500) + noise * rng.random() + wave * ((at // 120) % 2)
        for at in TIMES
    ]
    return Series("adapter 1 own memory", TIMES, values)


@pytest.mark.parametrize(
    ("series", "flat"),
    [
        (memory(), True),
        (memory(noise=MIB), True),
        (memory(warm=20 * MIB), True),
        (memory(wave=3 * MIB), True),
        (memory(leak=-2000), True),
        (memory(leak=2000), False),
        (memory(leak=2000, noise=3 * MIB, wave=MIB), False),
    ],
    ids=["flat", "noise", "warming-up", "comes-and-goes", "shrinks", "leak", "leak-in-noise"],
)
def test_a_leak_of_two_kilobytes_a_second_is_found_and_nothing_else(series: Series, flat: bool) -> None:
    verdict = judge(series, 600.0, ANY)
    assert verdict is not None
    assert verdict.is_flat is flat


def test_what_has_no_bound_and_what_is_too_short_is_not_judged() -> None:
    assert judge(Series("simulator memory", TIMES, TIMES), 600.0, BOUNDS) is None
    assert judge(Series("adapter 1 tasks", [0.0, 5.0], [1.0, 2.0]), 0.0, BOUNDS) is None


@pytest.mark.parametrize(
    "name",
    ["adapter 2 memory", "adapter 1 own memory", "adapter 1 tasks", "adapter 1 threads", "adapter 2 open files",
     "nats-server memory", "KV_wechat_checkpoints keys", "WECHAT_EVENT bytes"],
)  # fmt: skip
def test_every_figure_that_matters_is_bounded(name: str) -> None:
    assert judge(Series(name, TIMES, TIMES), 0.0, BOUNDS) is not None
