"""Who is there: what a roll call proves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from adapter.contract.names import Names
from adapter.ownership.replica_status import OtherReplicas, PollerStatus, ReplicaStatus
from tests.fakes import FakeLeases
from tests.fakes.bus import FakeCoreBus

BOT = "b1@im.bot"


class Living(FakeLeases):
    other_incarnations = {"named", "third"}  # noqa: RUF012 -- a fake: nobody changes it


class Present(OtherReplicas):
    """All replicas, of which some answer."""

    def __init__(self, *answers: ReplicaStatus) -> None:
        super().__init__(FakeCoreBus(), Names(), Living("me"))
        self._answers = answers

    async def query(self, bots: Sequence[str]) -> tuple[list[ReplicaStatus], int]:
        return list(self._answers), 3


def present(incarnation: str, *bots: str) -> ReplicaStatus:
    polls = {bot: PollerStatus(state="polling") for bot in bots}
    return ReplicaStatus(instance="some", incarnation=incarnation, version="1", shards=1, bots=1, polls=polls)


@pytest.mark.parametrize(
    ("there", "idle"),
    [
        ([present("me", BOT), present("named"), present("third", "b2@im.bot")], True),
        ([present("me", BOT), present("named", BOT), present("third")], False),
        ([present("me", BOT), present("third")], False),
        ([present("me", BOT), present("named"), present("third", BOT)], False),
        ([present("me", BOT), present("named")], False),
        ([present("me", BOT), present("named"), present("")], False),
    ],
    ids=["idle", "polls", "silent", "another-polls", "another-is-silent", "another-does-not-say-who-it-is"],
)
async def test_a_bot_is_only_taken_where_all_that_live_say_that_they_do_not_poll_it(
    there: list[ReplicaStatus], idle: bool
) -> None:
    """Also those whom its record does not name: the last poll of one that handed it over may still wait."""
    assert await Present(*there).is_idle("named", BOT) is idle
