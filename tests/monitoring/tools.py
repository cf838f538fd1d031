"""Where Prometheus' programs and the files for them are."""

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
}
"""By program: the Debian package that brings it."""


def need(program: str) -> str:
    """The program's path; without it the test is skipped, and says what would bring it."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is missing; on Debian: .ci/need {PACKAGES[program]}")
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
