"""Room for a nats-server's files that no disk is waited for.

Each write is synchronised, which shows in no test but as time, half of it the kernel's. What a kill leaves is the
same.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
ROOM = 8 << 30
"""A server takes three quarters of what is free for its own, of which `SMALL` reserves a third."""
SMALL = {"WECHAT_NATS_IN_MAX_BYTES": str(1 << 30), "WECHAT_NATS_MEDIA_STORE_BYTES": str(1 << 30)}
"""What the streams reserve by themselves is more than many machines have as memory."""


@contextlib.contextmanager
def in_memory(place: Path) -> Iterator[None]:
    """Lets `place` be in memory until the end, where there is room; on the disk otherwise."""
    try:
        free = shutil.disk_usage(MEMORY).free
    except OSError:
        free = 0
    if free < ROOM:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="wechat-nats-", dir=MEMORY, ignore_cleanup_errors=True) as made:
        place.symlink_to(made, target_is_directory=True)
        try:
            yield
        finally:
            place.unlink()
