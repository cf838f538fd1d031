"""Whether each stream has all its copies, on servers that answer and keep up; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SILENT_S = 5.0
"""Silence after which a copy counts as lost. A stream's servers tell each other each second that they live."""
BEHIND = 1000
"""Writes by which a copy is behind that does not keep up."""


class Lacking(NamedTuple):
    """A copy of a stream that does not count."""

    stream: str
    server: str
    """Its server; "": no server has been given this copy."""
    lag: int = 0
    """Writes that it has not got."""
    silent_s: float = 0.0
    """Since when the stream's leader has not heard of that server; 0 also if never, since it was elected."""


def lacking_copies(infos: Mapping[str, dict[str, Any]]) -> list[Lacking]:
    """Copies that do not count. `infos`: by stream, the answer to STREAM.INFO.

    In a stream that is written to, a healthy copy is behind by what is on its way, which does not count. For a second
    after an election the leader has heard of nobody, so that all copies seem to lack.
    """
    found = []
    for name, info in infos.items():
        if "cluster" not in info:  # a server of its own
            continue
        peers = info["cluster"].get("replicas") or []
        if 1 + len(peers) < info["config"]["num_replicas"]:
            found.append(Lacking(name, ""))
        for peer in peers:
            lag, silent_s = int(peer.get("lag", 0)), peer.get("active", 0) / 1e9
            is_silent = silent_s >= SILENT_S or not silent_s  # 0: not heard of since the leader was elected
            if peer.get("offline") or (not peer["current"] and (is_silent or lag >= BEHIND)):
                found.append(Lacking(name, peer["name"], lag, silent_s))
    return found


def sentences(lacking: list[Lacking], streams: int) -> list[str]:
    """One for each server, for people. `streams`: how many there are."""
    by_server: dict[str, list[Lacking]] = {}
    for each in lacking:
        by_server.setdefault(each.server, []).append(each)
    return [_sentence(server, found, streams) for server, found in sorted(by_server.items())]


def _sentence(server: str, found: list[Lacking], streams: int) -> str:
    names = sorted(each.stream for each in found)
    where = f"{len(names)} of {streams} streams and buckets" if len(names) > 3 else ", ".join(names)
    if not server:
        return f"{where}: a copy has no server. Add a server, or bring the lost one back."
    silent_s, worst = max(each.silent_s for each in found), max(found, key=lambda each: each.lag)
    state = f"has been silent for {silent_s:.0f} s" if silent_s >= SILENT_S else "is lost or behind"
    lag = f", lacks up to {worst.lag:,} writes ({worst.stream})" if worst.lag else ""
    return f"server {server} {state} in {where}{lag}. Look at its process and its disk."
