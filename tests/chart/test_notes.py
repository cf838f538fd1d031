"""The notes that helm prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.chart.helm import (
    CHART,
    LEAST,
    Object,
    helm,
)


def notes(values: Object, tmp_path: Path) -> str:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    said = helm(
        "install",
        "bridge",
        str(CHART),
        "--dry-run=client",
        "--namespace=chat",
        f"--values={LEAST}",
        f"--values={file}",
    )
    return said.partition("NOTES:\n")[2]


def test_the_notes_name_the_next_commands(tmp_path: Path) -> None:
    text = notes({"nats": {"auth": {"creds": {"existingSecret": "s"}}, "inboxPrefix": "_INBOX_adapter"}}, tmp_path)
    assert text == (Path(__file__).with_name("notes.txt")).read_text()


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({}, "WARNING: the adapter logs in to NATS without credentials"),
        ({"evaluationNats": {"enabled": True}}, "WARNING: the NATS server of this release is for evaluation"),
        ({"replicaCount": 1}, "WARNING: with one replica"),
        ({"nats": {"auth": {"nkey": {"existingSecret": "s"}}}}, "WARNING: nats.inboxPrefix is empty."),
        ({"drainSeconds": 10}, "WARNING: drainSeconds is shorter than a long poll of WeChat"),
        ({}, "Bind at most 10000 bots: so many are served if one of the 2 replicas ends."),
        ({"replicaCount": 4, "settings": {"WECHAT_NATS_CAPACITY": 500}}, "Bind at most 1500 bots"),
        (
            {"autoscaling": {"hpa": {"enabled": True}, "minReplicas": 3, "targetPercent": 67}},
            "Set it to 66, or raise",
        ),
    ],
)
def test_the_notes_warn(values: Object, warning: str, tmp_path: Path) -> None:
    assert warning in notes(values, tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"autoscaling": {"hpa": {"enabled": True}}},
        {"autoscaling": {"hpa": {"enabled": True}, "minReplicas": 4, "targetPercent": 75}},
    ],
)
def test_the_notes_do_not_warn_of_what_is_right(values: Object, tmp_path: Path) -> None:
    nats = {"auth": {"nkey": {"existingSecret": "s"}}, "inboxPrefix": "_INBOX_adapter"}
    assert "WARNING" not in notes(values | {"nats": nats}, tmp_path)


def test_the_notes_name_commands_that_there_are(tmp_path: Path) -> None:
    from adapter.cli import build

    text = notes({}, tmp_path)
    named = set(re.findall(r"-- wechat-nats (\w+)", text))
    assert named == {"doctor", "login", "bindings", "send"}
    assert all(name in build() for name in named)
