"""What the service is made of: every package pinned to bytes, from one index, and an audit that never guesses."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.audit import FOUND, NONE, UNKNOWN, verdict

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


def test_every_file_that_may_be_installed_is_known_by_its_hash(lock: dict[str, Any]) -> None:
    packages = [package for package in lock["package"] if package["name"] != "wechat-nats"]
    assert len(packages) > 50
    for package in packages:
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files, package["name"]
        assert all(file["hash"].startswith("sha256:") for file in files), package["name"]


def test_every_package_comes_from_an_index_and_none_from_a_place_of_its_own(lock: dict[str, Any]) -> None:
    for package in lock["package"]:
        assert set(package["source"]) == ({"editable"} if package["name"] == "wechat-nats" else {"registry"})


def test_nothing_is_built_but_by_a_pinned_tool_and_nothing_of_the_service(lock: dict[str, Any]) -> None:
    """A build downloads its tools, which no hash of the lock file covers, and runs them."""
    packages = {package["name"]: package for package in lock["package"]}
    needed = {"wechat-nats"}
    while more := {
        each["name"]
        for name in needed
        for each in packages[name].get("dependencies", [])
        if each["name"] not in needed
    }:
        needed |= more
    built = {name for name, package in packages.items() if "wheels" not in package} - {"wechat-nats"}
    assert built == {"nkeys"}
    assert not built & needed
    assert lock["manifest"]["build-constraints"] == [{"name": "setuptools", "specifier": "==80.9.0"}]
    assert "--no-build" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["Makefile", "Dockerfile"])
def test_what_is_installed_is_what_is_locked(file: str) -> None:
    """`uv sync` without `--frozen` or `--locked` might resolve anew."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    syncs = [line for line in text.splitlines() if "sync " in line and not line.lstrip().startswith("#")]
    assert all("--frozen" in line or "--locked" in line for line in syncs), syncs


FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "GHSA-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("report", "code"),
    [([FINE], NONE), ([FINE, BAD], FOUND), ([BAD, SKIPPED], FOUND), ([FINE, SKIPPED], UNKNOWN), ([], UNKNOWN)],
    ids=["fine", "found", "found-and-skipped", "skipped", "nothing"],
)
def test_what_was_not_audited_is_not_called_fine(report: list[dict[str, Any]], code: int) -> None:
    assert verdict(report)[0] == code
