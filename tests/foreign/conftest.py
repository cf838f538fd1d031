import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
UNREACHABLE = re.compile("connect|timed out|dns|name resolution|failed to fetch", re.IGNORECASE)
"""What uv and pip say when there is no network."""


@pytest.fixture(scope="session")
def packages() -> Path:
    """A directory with the foreign packages, installed once per version of the list."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    place = ROOT / ".pytest_cache" / f"foreign-{digest}"
    if not (place / ".whole").exists():
        install(place)
        (place / ".whole").touch()
    return place


def install(place: Path) -> None:
    """Exactly the listed files, by their hashes. Skips where no package index can be reached, but not in CI."""
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(place), "-r", str(REQUIREMENTS)]
    done = subprocess.run([*installer(), *options], capture_output=True, text=True, check=False, timeout=300)
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
