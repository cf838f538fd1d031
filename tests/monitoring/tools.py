"""Where Prometheus' programs are: on the PATH, or unpacked from Debian's packages by `.ci/unpack`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm/wechat-nats/files/alerts.yaml"
DASHBOARD = ROOT / "helm/wechat-nats/files/dashboard.json"
RUNBOOK = ROOT / "helm/runbook.md"

PACKAGES = {
    "promtool": "promtool",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
}
"""By program: the Debian package that brings it."""


def find(program: str) -> Path | None:
    """The program, if it is here."""
    unpacked = ROOT / ".tools/debian/usr/bin" / program
    found = shutil.which(program) or (unpacked if unpacked.exists() else None)
    return Path(found) if found else None


def need(program: str) -> Path:
    """The program; without it the test is skipped, and says what would bring it."""
    found = find(program)
    if found is None:
        pytest.skip(f"{program} is missing: .ci/unpack {PACKAGES[program]}")
    return found


def missing_in(exposed: str, expression: str) -> list[str]:
    """Metrics and values of labels of ours that an expression of PromQL asks for and that no scrape ever shows."""
    missing: list[str] = []
    for name, braces in re.findall(r"\b(wechat_adapter_\w+)(?:\{([^}]*)\})?", expression):
        lines = [line for line in exposed.splitlines() if re.match(rf"{name}[ {{]", line)]
        if not lines:
            missing.append(name)
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"', braces):
            wanted = [] if value.startswith("$") else value.split("|") if "~" in operator else [value]
            missing += [
                f"{name}{{{label}={one}}}" for one in wanted if not any(f'{label}="{one}"' in line for line in lines)
            ]
    return missing
