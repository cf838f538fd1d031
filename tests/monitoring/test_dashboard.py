"""The dashboard is one that Grafana takes, asks for what there is, and has something to show in every panel."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

from adapter.tools.metrics import Metrics
from tests.monitoring.dashboard import expressions, load_dashboard, panels, shown, values
from tests.monitoring.test_alerts import rules
from tests.monitoring.tools import missing_in, need

QUIET = {"Polled by nobody", "Burn of the error budgets"}
"""They may show zeros: nothing is late here, and everything is polled."""


@cache
def schema(npm: Path, types: str, name: str) -> Draft7Validator:
    """JSON Schema of one of Grafana's own TypeScript types. Once: it takes seconds."""
    place = npm / "node_modules/@grafana/schema/dist/types/raw" / types / "x/types.gen.d.ts"
    command = npm / "node_modules/.bin/ts-json-schema-generator"
    done = subprocess.run(
        [command, "--path", place, "--type", name, "--no-type-check"], capture_output=True, check=True, cwd=npm
    )
    return Draft7Validator(json.loads(done.stdout))


def faults(validator: Draft7Validator, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def test_grafana_knows_every_field(npm: Path) -> None:
    assert faults(schema(npm, "dashboard", "Dashboard"), load_dashboard()) == []
    for kind in {panel["type"] for panel in panels()}:
        options = schema(npm, f"composable/{kind}/panelcfg", "Options")
        for panel in panels():
            if panel["type"] == kind:
                assert faults(options, panel["options"]) == [], panel["title"]
    custom = schema(npm, "composable/timeseries/panelcfg", "FieldConfig")
    for panel in panels():
        if panel["type"] == "timeseries":
            assert faults(custom, panel["fieldConfig"]["defaults"]["custom"]) == [], panel["title"]


def test_panels_are_apart_and_explain_themselves() -> None:
    taken: set[tuple[int, int]] = set()
    made = load_dashboard()["panels"]
    assert len({panel["id"] for panel in made}) == len(made)
    for panel in made:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert all(len(panel["description"]) > 10 for panel in panels())


def test_every_query_takes_the_variables_and_asks_for_metrics_that_there_are() -> None:
    exposed = Metrics().expose()[0].decode()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
            assert 'namespace=~"$namespace"' in target["expr"], panel["title"]
            assert missing_in(exposed, target["expr"]) == [], panel["title"]
            assert set(re.findall(r"wechat_adapter:[\w:]+", target["expr"])) <= recorded, panel["title"]


@pytest.mark.slow
async def test_every_panel_shows_something_under_load(tmp_path: Path) -> None:
    need("prometheus")
    empty, zero = [], []
    async with shown(tmp_path, seconds=40) as found:
        for panel, answers in found:
            for expression, answer in zip(expressions(panel), answers, strict=True):
                if not any(values(series) for series in answer):
                    empty.append((panel["title"], expression))
            if not any(any(values(series)) for answer in answers for series in answer):
                zero.append(panel["title"])
    assert empty == []
    assert set(zero) <= QUIET
