import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NPM = Path(__file__).with_name("npm")
NODE = frozenset({"openclaw_weixin"})
"""Clients that come from npm; all others are Python."""
UNREACHABLE = re.compile("connect|timed out|dns|name resolution|failed to fetch|ENOTFOUND|EAI_AGAIN", re.IGNORECASE)
"""What uv, pip and npm say when there is no network."""


@pytest.fixture
def packages(client: str) -> Path:
    """A directory with the packages of foreign clients in the language of this one, installed once per version of
    the list."""
    return installed(NPM / "package-lock.json", install_node) if client in NODE else installed(REQUIREMENTS, install)


def installed(listed: Path, install_into: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(listed.read_bytes()).hexdigest()[:12]
    place = ROOT / ".pytest_cache" / f"foreign-{digest}"
    place.parent.mkdir(exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers of pytest must not install at once
        if not (place / ".whole").exists():
            install_into(place)
            (place / ".whole").touch()
    return place


def install(place: Path) -> None:
    """Exactly the listed files, by their hashes."""
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(place), "-r", str(REQUIREMENTS)]
    run([*installer(), *options], place)


def install_node(place: Path) -> None:
    """Exactly what the lock file names. Skips where there is no npm."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is missing; on Debian: apt-get install nodejs npm")
    shutil.copytree(NPM, place, ignore=shutil.ignore_patterns("node_modules"), dirs_exist_ok=True)
    run(["npm", "ci", "--loglevel=error"], place)


def run(command: Sequence[str], place: Path) -> None:
    """Skips where no package index can be reached, but not in CI."""
    cwd = place if place.exists() else None
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == 0:
        return
    shutil.rmtree(place, ignore_errors=True)
    reason = f"cannot install the foreign clients: {done.stderr.strip()[-300:]}"
    if UNREACHABLE.search(done.stderr) and not os.environ.get("CI"):
        pytest.skip(reason)
    pytest.fail(reason)


def installer() -> Sequence[str]:
    """uv as `make` has found or installed it, else the pip of the Python behind this environment."""
    uv = shutil.which("uv") or ROOT / ".tools" / "bin" / "uv"
    if Path(uv).exists():
        return [str(uv), "pip", "install", "--python", sys.executable]
    return [getattr(sys, "_base_executable", sys.executable), "-m", "pip", "install", "--disable-pip-version-check"]
