"""Private records as a newer version of the adapter would write them."""

from __future__ import annotations

from typing import Any

import msgspec


def made_newer(value: bytes, **fields: Any) -> bytes:
    """The record with the next version and a field that nobody knows yet. `fields`: of another form by then."""
    record = msgspec.json.decode(value, type=dict[str, Any])
    return msgspec.json.encode(record | fields | {"v": record.get("v", 1) + 1, "of_the_future": [1]})
