from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.chart.helm import ROOT, NotInstalled, Object, tools

UNREACHABLE = re.compile("connect|timed out|dns|name resolution|failed to fetch", re.IGNORECASE)
"""What uv says when there is no network."""


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    """Skips where no package index can be reached, but not in CI."""
    try:
        tools()
    except NotInstalled as exc:
        reason = f"the chart's tools cannot be installed: {exc}"
        if UNREACHABLE.search(str(exc)) and not os.environ.get("CI"):
            pytest.skip(reason)
        pytest.fail(reason)


@pytest.fixture(scope="session")
def operators() -> dict[str, Object]:
    """Closed JSON Schemas of the kinds of operators. Made once: it takes seconds."""
    script = Path(__file__).with_name("operators.py")
    digest = hashlib.sha256(script.read_bytes() + (ROOT / "uv.lock").read_bytes()).hexdigest()[:12]
    kept = tools() / f"operators-{digest}.json"
    if not kept.exists():
        done = subprocess.run([tools() / "bin" / "python", script], capture_output=True, text=True, check=True)
        part = kept.with_name(f"{kept.name}.{os.getpid()}")
        part.write_text(done.stdout)
        part.replace(kept)
    found: dict[str, Object] = json.loads(kept.read_text())
    return found
