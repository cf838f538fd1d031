"""What a look at streams tells of their copies; a cluster says the rest in e2e/test_copies_lost.py."""

from __future__ import annotations

from typing import Any

import pytest

from adapter.jetstream.copies import Lacking, lacking_copies, sentences

CURRENT = {"name": "n1", "current": True, "active": 900_000_000}


def info(last_seq: int, *peers: dict[str, Any], replicas: int = 3) -> dict[str, Any]:
    """An answer to STREAM.INFO from a stream whose leader is n0."""
    cluster = {"leader": "n0", "replicas": list(peers)}
    return {"config": {"num_replicas": replicas}, "state": {"last_seq": last_seq}, "cluster": cluster}


def peer(lag: int, active: int = 5_000_000, **more: Any) -> dict[str, Any]:
    return {"name": "n2", "current": False, "active": active, "lag": lag, **more}


@pytest.mark.parametrize(
    ("found", "lacking"),
    [
        (info(9, CURRENT, peer(2)), []),  # what is on its way
        (info(7, CURRENT, peer(3, 0)), [Lacking("S", "n2", 3, 0.0)]),  # not heard of since the election
        (info(9000, CURRENT, peer(1000)), [Lacking("S", "n2", 1000, 0.005)]),  # it does not keep up
        (info(7, CURRENT, peer(0, 11 * 10**9)), [Lacking("S", "n2", 0, 11.0)]),  # silent
        (info(7, CURRENT, CURRENT | {"name": "n2", "offline": True}), [Lacking("S", "n2", 0, 0.9)]),
        (info(7, CURRENT), [Lacking("S", "")]),
        (info(7, CURRENT, replicas=2), []),
    ],
)
def test_a_copy_lacks_that_is_lost_silent_or_far_behind(found: dict[str, Any], lacking: list[Lacking]) -> None:
    assert lacking_copies({"S": found}) == lacking


def test_a_server_is_one_sentence_with_its_streams_or_their_number() -> None:
    lost = [Lacking(name, "n2", lag, 34.2) for name, lag in (("A", 1), ("B", 1200), ("C", 0), ("D", 0))]
    assert sentences([*lost, Lacking("A", "")], 13) == [
        "A: a copy has no server. Add a server, or bring the lost one back.",
        "server n2 has been silent for 34 s in 4 of 13 streams and buckets, lacks up to 1,200 writes (B). Look at its"
        " process and its disk.",
    ]
