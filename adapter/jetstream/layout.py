"""The layout key: which layout the streams have, and the settings that they were made for.

It is written last, when all streams are there, into the bucket whose loss costs least. While it exists no stream is
made anew but by `doctor --fix`: what is missing was deleted, and an empty stream would hide that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from adapter.contract.names import Names
from adapter.errors import UNDECODABLE
from adapter.jetstream.buckets import LeaderKvBucket
from adapter.jetstream.history import direct_get_one
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.settings import Settings

LAYOUT = 1
"""Version of `topology.wanted_streams`: one more with each change of names, subjects or meanings."""
KEY = "layout"
SHAPING = (
    "replicas",
    "in_max_per_sandbox",
    "in_max_age_h",
    "in_max_bytes",
    "out_max_per_sandbox",
    "park_hours",
    "media_hours",
    "media_store_bytes",
)
"""Settings that shape streams."""

EXPECTS = "streams"
"""Field of the service's metadata, which each replica answers to a ping: its Shape, as JSON."""
Shape = dict[str, int | float]


class Layout(msgspec.Struct, frozen=True):
    """Value of the layout key. `version` 0: it cannot be read."""

    version: int
    settings: Shape = {}


def shape_of(settings: Settings) -> Shape:
    """Those of the settings that shape streams."""
    return {name: getattr(settings, name) for name in SHAPING}


def expects(settings: Settings) -> dict[str, str]:
    """What a replica tells of its settings."""
    return {EXPECTS: msgspec.json.encode(shape_of(settings)).decode()}


def with_shape(settings: Settings, shape: Shape) -> Settings:
    """The settings, with streams shaped as in `shape`."""
    return msgspec.structs.replace(settings, **{name: shape[name] for name in SHAPING if name in shape})


def largest(shapes: Sequence[Shape]) -> Shape:
    """The largest of each setting, -1 being without a limit: during a roll-out nothing is lowered."""
    names = [name for name in SHAPING if all(name in shape for shape in shapes)]
    return {name: max((shape[name] for shape in shapes), key=lambda size: size % math.inf) for name in names}


async def read_layout(connection: ManagedConnection, names: Names) -> Layout | None:
    """None: there is no key. Raises Temporary, also without its bucket."""
    stored = await direct_get_one(connection, f"KV_{names.claims}", {"last_by_subj": f"$KV.{names.claims}.{KEY}"})
    try:
        return msgspec.json.decode(stored.data, type=Layout) if stored and stored.data else None
    except UNDECODABLE:
        return Layout(0)


async def write_layout(connection: ManagedConnection, names: Names, settings: Settings) -> None:
    """Raises Temporary, Conflict."""
    bucket, value = LeaderKvBucket(connection, names.claims), msgspec.json.encode(Layout(LAYOUT, shape_of(settings)))
    entry = await bucket.get(KEY)
    if entry is None or entry.value != value:
        await bucket.write(KEY, value, entry.revision if entry else 0)
