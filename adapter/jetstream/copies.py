"""Whether each stream has all its copies, on servers that answer and keep up; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SILENT_S = 5.0
"""Silence that is told. A stream's servers tell each other each second that they live."""


class Lacking(NamedTuple):
    """A copy of a stream that does not count."""

    stream: str
    server: str
    """Its server; "": no server has been given this copy."""
    lag: int = 0
    """Writes that it has not got."""
    silent_s: float = 0.0
    """Since when the stream's leader has not heard of that server; 0 also if never, since it was elected."""


class Copies:
    """What two looks at all streams, seconds apart, tell of their copies.

    One look does not tell: in a stream that is written to, a healthy copy is behind by what is on its way, and for a
    second after an election the leader has heard of nobody.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        """By stream: its last sequence at the last look."""
        self._suspects: set[tuple[str, str]] = set()
        """Stream and server of the copies that did not count at the last look."""

    def compare(self, infos: Mapping[str, dict[str, Any]]) -> list[Lacking]:
        """Copies that count neither now nor at the last look. `infos`: by stream, the answer to STREAM.INFO."""
        found = [lacking for name, info in infos.items() for lacking in _lacking(name, info, self._last.get(name))]
        lasting = [lacking for lacking in found if (lacking.stream, lacking.server) in self._suspects]
        self._suspects = {(lacking.stream, lacking.server) for lacking in found}
        self._last = {name: info["state"]["last_seq"] for name, info in infos.items()}
        return lasting

    @property
    def is_suspicious(self) -> bool:
        """Whether a second look can tell more."""
        return bool(self._suspects)


def _lacking(name: str, info: dict[str, Any], last: int | None) -> list[Lacking]:
    """`last`: the stream's last sequence at the look before."""
    if "cluster" not in info:  # a server of its own
        return []
    peers = info["cluster"].get("replicas") or []
    found = [Lacking(name, "")] if 1 + len(peers) < info["config"]["num_replicas"] else []
    gained = 0 if last is None else info["state"]["last_seq"] - last
    for peer in peers:
        lag = int(peer.get("lag", 0))
        # behind by more than came since: not what is on its way. Not current and not behind: silent
        if peer.get("offline") or (not peer["current"] and not 0 < lag <= gained):
            found.append(Lacking(name, peer["name"], lag, peer.get("active", 0) / 1e9))
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
