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
    text = notes(
        {"nats": {"auth": {"creds": {"existingSecret": "s"}}}, "tokenKey": {"existingSecret": "k"}}, tmp_path
    )
    assert text == (Path(__file__).with_name("notes.txt")).read_text()


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({}, "WARNING: the adapter logs in to NATS without credentials"),
        ({"evaluationNats": {"enabled": True}}, "WARNING: the NATS server of this release is for evaluation"),
        ({"replicaCount": 1}, "WARNING: with one replica"),
    ],
)
def test_the_notes_warn(values: Object, warning: str, tmp_path: Path) -> None:
    assert warning in notes(values, tmp_path)


def test_the_notes_name_commands_that_there_are(tmp_path: Path) -> None:
    from adapter.cli import build

    text = notes({}, tmp_path)
    named = set(re.findall(r"-- wechat-nats (\w+)", text))
    assert named == {"doctor", "login", "tail", "send"}
    assert all(name in build() for name in named)
