"""What two looks at streams tell of their copies; a cluster says the rest in e2e/test_copies_lost.py."""

from __future__ import annotations

from typing import Any

import pytest

from adapter.jetstream.copies import Copies, Lacking, sentences

CURRENT = {"name": "n1", "current": True, "active": 900_000_000}


def info(last_seq: int, *peers: dict[str, Any], replicas: int = 3) -> dict[str, Any]:
    """An answer to STREAM.INFO from a stream whose leader is n0."""
    cluster = {"leader": "n0", "replicas": list(peers)}
    return {"config": {"num_replicas": replicas}, "state": {"last_seq": last_seq}, "cluster": cluster}


def peer(lag: int, active: int = 5_000_000, **more: Any) -> dict[str, Any]:
    return {"name": "n2", "current": False, "active": active, "lag": lag, **more}


@pytest.mark.parametrize(
    ("looks", "found"),
    [
        ((info(7, CURRENT, peer(3)), info(9, CURRENT, peer(2))), []),  # what is on its way
        ((info(7, CURRENT, peer(3, 0)), info(7, CURRENT, CURRENT | {"name": "n2"})), []),  # an election
        ((info(7, CURRENT, peer(3)), info(9, CURRENT, peer(5))), [Lacking("S", "n2", 5, 0.005)]),  # it stands still
        ((info(7, CURRENT, peer(0, 11 * 10**9)),) * 2, [Lacking("S", "n2", 0, 11.0)]),  # silent
        ((info(7, CURRENT, CURRENT | {"name": "n2", "offline": True}),) * 2, [Lacking("S", "n2", 0, 0.9)]),
        ((info(7, CURRENT),) * 2, [Lacking("S", "")]),
        ((info(7, CURRENT, replicas=2),) * 2, []),
    ],
)
def test_a_copy_lacks_if_two_looks_say_so(looks: tuple[dict[str, Any], ...], found: list[Lacking]) -> None:
    copies = Copies()
    assert copies.compare({"S": looks[0]}) == []
    assert copies.compare({"S": looks[1]}) == found


def test_a_server_is_one_sentence_with_its_streams_or_their_number() -> None:
    lost = [Lacking(name, "n2", lag, 34.2) for name, lag in (("A", 1), ("B", 1200), ("C", 0), ("D", 0))]
    assert sentences([*lost, Lacking("A", "")], 13) == [
        "A: a copy has no server. Add a server, or bring the lost one back.",
        "server n2 has been silent for 34 s in 4 of 13 streams and buckets, lacks up to 1,200 writes (B). Look at its"
        " process and its disk.",
    ]
