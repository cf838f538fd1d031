"""A slow disk: a file system of its own, to which the kernel lets servers write so many times a second.

Of its own, since whoever is kept waiting within a file system's journal keeps all others waiting who use it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from tests.e2e.cluster import Node
from tests.e2e.waiting import call

VERSION_1 = Path("/sys/fs/cgroup/blkio")
VERSION_2 = Path("/sys/fs/cgroup")
UNLIMITED = 1_000_000
SIZE = 1 << 30


class SlowDisk:
    """`async with SlowDisk(folder) as disk`: then `disk.path` is a folder on it, and `slow` slows it for servers.

    By the block controller of cgroups, version 1 or 2: with `sync_interval: always` every write goes to the device.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk"
        self._image = folder / "disk.img"
        self._name = f"wechat-nats-{os.getpid()}"
        if VERSION_1.is_dir():
            self._group, self._file, self._limit = VERSION_1 / self._name, "blkio.throttle.write_iops_device", "{}"
        else:
            self._group, self._file, self._limit = VERSION_2 / self._name, "io.max", "wiops={}"

    async def why_not(self) -> str:
        """Why there can be none here, "" if there can."""
        if os.geteuid() or shutil.which("mkfs.ext4") is None:
            return "A slow disk is a mounted image of ext4, which takes root and the Debian package e2fsprogs."
        try:
            self._group.mkdir()
        except OSError as exc:
            return f"A slow disk takes the block controller of cgroups: {exc}."
        found = (self._group / self._file).exists()
        self._group.rmdir()
        return "" if found else "A slow disk takes the block controller of cgroups, which is not there."

    async def __aenter__(self) -> SlowDisk:
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(SIZE)
        assert not await call("mkfs.ext4", "-q", "-F", str(self._image))
        assert not await call("mount", "-o", "loop", str(self._image), str(self.path))
        self._group.mkdir()
        device = os.stat(self.path).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing runs on it any more."""
        self._set(UNLIMITED)
        assert not await call("umount", "--lazy", str(self.path))
        self._image.unlink()
        self._group.rmdir()

    def slow(self, nodes: list[Node], writes_per_s: int) -> None:
        for node in nodes:
            assert node.process is not None
            (self._group / "cgroup.procs").write_text(str(node.process.pid))
        self._set(writes_per_s)

    def fast(self) -> None:
        self._set(UNLIMITED)

    def _set(self, writes_per_s: int) -> None:
        (self._group / self._file).write_text(f"{self._device} {self._limit.format(writes_per_s)}")
