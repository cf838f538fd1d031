"""Builds and runs the image without a Docker engine: mmdebstrap, buildah and podman of Debian, a storage of our own.

Docker Hub is not asked: a Debian base with the same Python stands in for `python:3.13-slim-trixie`, under its name.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORE = ROOT / ".tools" / "image"
"""Images and layers, kept between runs."""
BASE = "docker.io/library/python:3.13-slim-trixie"
IMAGE = "localhost/wechat-nats:test"
NATS_IMAGE = "localhost/nats:test"
PACKAGES = (
    "mmdebstrap", "buildah", "podman", "runc", "catatonit", "netavark", "aardvark-dns", "nftables",
)  # fmt: skip
CERTIFICATES = Path("/etc/ssl/certs")


class CannotRun(Exception):
    """What this machine lacks, in a sentence."""


def prepare() -> None:
    """Installs the tools and makes the base, where they are missing. Raises CannotRun."""
    if os.geteuid() != 0:
        raise CannotRun("The image is built and run as root; this is another user.")
    if not all(shutil.which(tool) for tool in ("mmdebstrap", "buildah", "podman", "runc")):
        if not shutil.which("apt-get"):
            raise CannotRun(f"apt-get is missing, and with it {', '.join(PACKAGES)}: this needs Debian 13.")
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
            done = _call(["env", "DEBIAN_FRONTEND=noninteractive", *command])
            if done.returncode:
                raise CannotRun(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
    if podman("image", "exists", BASE, check=False).returncode:
        _make_base()


def _make_base() -> None:
    """A Debian with Python, pip and venv where the image of Docker Hub has them."""
    STORE.mkdir(parents=True, exist_ok=True)
    tar = STORE / "base.tar"
    link = 'ln -s /usr/bin/python3 "$1/usr/local/bin/python3" && ln -s python3 "$1/usr/local/bin/python"'
    packages = "ca-certificates,python3,python3-venv,python3-pip"
    made = _call(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", f"--customize-hook={link}",
         "trixie", str(tar)]
    )  # fmt: skip
    if made.returncode:
        raise CannotRun(f"mmdebstrap cannot make the base: {made.stderr.strip()[-500:]}")
    podman("import", "--quiet", str(tar), BASE)
    tar.unlink()


def build(
    context: Path, tag: str, *arguments: str, dockerfile: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`docker build`. It is lent the host's certificates, for machines behind a proxy; they are not kept in it."""
    STORE.mkdir(parents=True, exist_ok=True)
    trust = STORE / "uv.toml"
    trust.write_text("native-tls = true\n")
    limits = [
        f"--ulimit={name}={hard}:{hard}"  # the default asks for more than a machine may have
        for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
        if (hard := resource.getrlimit(number)[1]) != resource.RLIM_INFINITY
    ]
    lent = [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro", f"--volume={trust}:/etc/uv/uv.toml:ro"]
    options = ["--isolation=chroot", "--network=host", "--pull=never", "--format=docker", *limits, *lent, *arguments]
    command = ["buildah", *_storage(), "build", *options, "-t", tag]
    if dockerfile is not None:
        command += ["-f", str(dockerfile)]
    done = _call([*command, str(context)])
    assert done.returncode == 0, f"the build failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def podman(*arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One podman command."""
    done = _call(["podman", *_storage(), "--runtime=runc", "--cgroup-manager=cgroupfs", *arguments], stdin)
    assert not check or done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr.strip()[-2000:]}"
    return done


def inspect(name: str, *, kind: str = "container") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(podman("inspect", "--type", kind, name).stdout)[0]
    return found


def _storage() -> list[str]:
    """Apart from the machine's own containers. podman bears no long path for what it keeps at run time."""
    short = hashlib.sha256(str(STORE).encode()).hexdigest()[:8]
    return [f"--root={STORE / 'root'}", f"--runroot=/tmp/wechat-nats-{short}"]


def _call(command: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    quiet = {**os.environ, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=600, env=quiet)


HARDENED = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--memory=192m")
"""As the chart's pod runs."""


class Container:
    """One container on the host's network, so that it meets simulator and server where the other tests have them."""

    def __init__(
        self,
        name: str,
        image: str,
        *arguments: str,
        options: Sequence[str] = (),
        environ: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        variables = [f"--env={key}={value}" for key, value in (environ or {}).items()]
        self._start = ["run", "--detach", f"--name={name}", "--network=host", *options, *variables, image, *arguments]

    async def start(self) -> None:
        await asyncio.to_thread(podman, *self._start)

    def signal(self, number: int) -> None:
        podman("kill", f"--signal={signal.Signals(number).name}", self.name)

    async def ended(self) -> int:
        """Waits for the end; the exit code."""
        done = await asyncio.to_thread(podman, "wait", self.name)
        return int(done.stdout.strip())

    async def kill(self) -> None:
        await asyncio.to_thread(podman, "rm", "--force", "--time=0", self.name)

    @property
    def running(self) -> bool:
        return bool(inspect(self.name)["State"]["Running"])

    @property
    def pid(self) -> int:
        """Its first process, as the host numbers it."""
        return int(inspect(self.name)["State"]["Pid"])

    @property
    def log(self) -> str:
        done = podman("logs", self.name)
        return done.stdout + done.stderr

    def status(self, field: str) -> str:
        """A line of /proc/<pid>/status of its first process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:"))
