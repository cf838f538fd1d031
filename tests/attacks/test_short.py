"""The short form of `make attacks`: nothing of the victim is lost, nobody's lease, no process, and memory is bounded.

How long the victim waits is judged by `make attacks` alone: on a busy machine it says nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.rig import attacks, run

pytestmark = pytest.mark.slow

SECONDS = 4.0


@pytest.mark.parametrize("name", attacks())
async def test_an_attack_takes_nothing_from_its_victim(tmp_path: Path, name: str) -> None:
    outcome = await run(name, tmp_path, seconds=SECONDS)
    print(outcome.row())
    assert outcome.wrong() == []
    assert outcome.during.inbound
    assert outcome.during.receipts
