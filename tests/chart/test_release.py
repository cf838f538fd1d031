"""What `make dist` makes: each part is whole, and all are of one version."""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import yaml

from tests.chart.helm import ROOT


def test_a_release_has_all_parts_of_one_version(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(["make", "dist", f"RELEASE={tmp_path}"], cwd=ROOT, env=environ, capture_output=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    wheel, archive = f"wechat_nats-{version}-py3-none-any.whl", f"wechat_nats-{version}.tar.gz"
    chart = f"wechat-nats-{version}.tgz"
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in map(str.split, lines)}
    assert sums == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in (wheel, archive, chart, "sbom.cdx.json")
    }

    with zipfile.ZipFile(tmp_path / wheel) as packed:
        inside = {name for name in packed.namelist() if name.startswith("adapter/") and not name.endswith("/")}
        (metadata,) = (packed.read(name) for name in packed.namelist() if name.endswith("/METADATA"))
    tracked = subprocess.run(["git", "ls-files", "adapter"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= inside
    told = email.message_from_bytes(metadata)
    assert set(told.get_all("Provides-Extra", [])) == {"acp", "agents", "mcp", "voice"}
    with tarfile.open(tmp_path / archive) as packed_source:
        assert {f"wechat_nats-{version}/{name}" for name in inside} <= set(packed_source.getnames())

    listed = {part["name"] for part in json.loads((tmp_path / "sbom.cdx.json").read_bytes())["components"]}
    needed = {re.split(r"[^A-Za-z0-9._-]", each)[0] for each in told.get_all("Requires-Dist", [])}
    assert needed <= listed
    assert not {"pytest", "mypy"} & listed

    with tarfile.open(tmp_path / chart) as packed_chart:
        described = packed_chart.extractfile("wechat-nats/Chart.yaml")
        assert described is not None
        found = yaml.safe_load(described)
    assert (found["version"], found["appVersion"]) == (version, version)
