"""A slow disk: the kernel lets a server write so many times a second to the device that its data are on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tests.e2e.cluster import Node

VERSION_1 = Path("/sys/fs/cgroup/blkio")
VERSION_2 = Path("/sys/fs/cgroup")


class SlowDisk:
    """`SlowDisk(name).slow(node, 10)` lets it write ten times a second; `end` lets it go.

    By the block controller of cgroups, version 1 or 2: with `sync_interval: always` every write goes to the device.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError where there is no such controller, or it may not be used."""
        device = os.stat(folder).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        name = f"wechat-nats-{os.getpid()}"
        if VERSION_1.is_dir():
            self._group, self._file, self._limit = VERSION_1 / name, "blkio.throttle.write_iops_device", "{}"
        else:
            self._group, self._file, self._limit = VERSION_2 / name, "io.max", "wiops={}"
        self._group.mkdir()
        try:
            self._set("1000000")
        except OSError:
            self._group.rmdir()
            raise

    def slow(self, nodes: list[Node], writes_per_s: int) -> None:
        for node in nodes:
            assert node.process is not None
            (self._group / "cgroup.procs").write_text(str(node.process.pid))
        self._set(str(writes_per_s))

    def fast(self) -> None:
        self._set("1000000")

    def end(self) -> None:
        """Once nothing runs in it any more."""
        with contextlib.suppress(OSError):
            self._group.rmdir()

    def _set(self, writes_per_s: str) -> None:
        (self._group / self._file).write_text(f"{self._device} {self._limit.format(writes_per_s)}")
