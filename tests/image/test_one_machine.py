"""Docker Compose and systemd without either: what their files name exists, and real programs take it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter.cli.embedded import find_server
from adapter.settings import read_settings
from tests.chart.helm import CHART
from tests.cli.process import started, until
from tests.e2e.waiting import free_port
from tests.monitoring.test_alerts import promtool

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "helm" / "compose"
UNIT = ROOT / "helm" / "systemd" / "wechat-nats.service"
VARIABLES = {"NATS_TOKEN": "t1", "WECHAT_NATS_TOKEN_KEY": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}
"""The file .env of docs/howto/run.md."""


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    return found


@pytest.fixture
def mounted(services: dict[str, Any], tmp_path: Path) -> Path:
    """The configuration of all services, at the paths where their containers have it."""
    for service in services.values():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert mode == ["ro"]
                (tmp_path / target[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(COMPOSE / source, tmp_path / target[1:])
    return tmp_path


def test_every_service_is_closed_and_listens_here_alone(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert services["nats"]["image"].endswith(f":{chart_value('evaluationNats', 'image', 'tag')}")
    assert read_settings({}).drain_s < int(services["adapter"]["stop_grace_period"].removesuffix("s"))
    assert (COMPOSE / services["adapter"]["build"] / "Dockerfile").is_file()


def chart_value(*path: str) -> Any:
    found = yaml.safe_load((CHART / "values.yaml").read_text())
    for key in path:
        found = found[key]
    return found


async def test_the_adapter_starts_on_the_server_as_both_are_configured(
    services: dict[str, Any], mounted: Path
) -> None:
    url, port = services["adapter"]["environment"]["NATS_URL"], free_port()
    assert services["nats"]["command"] == ["--config=/etc/nats/nats.conf"]
    assert url == "nats://nats:4222"
    config = mounted / "etc/nats/nats.conf"
    config.write_text(config.read_text().replace("store_dir: /data", f'store_dir: "{mounted}/data"'))
    server = await asyncio.create_subprocess_exec(find_server(), "-c", config, "-p", str(port), env=VARIABLES)
    environ = {**VARIABLES, "NATS_URL": url.replace("nats:4222", f"127.0.0.1:{port}")}
    environ["WECHAT_NATS_HTTP_ADDR"] = "127.0.0.1:0"
    log = mounted / "log"
    try:
        with log.open("wb") as out:
            async with started("run", env=environ, stdout=out, stderr=out) as adapter:
                await until(lambda: b"adapter.started" in log.read_bytes())
                assert b"unsealed" not in log.read_bytes()
                adapter.terminate()
                assert await adapter.wait() == 0
    finally:
        server.kill()
        await server.wait()


def test_prometheus_takes_its_file_with_the_alerts(mounted: Path) -> None:
    assert "SUCCESS: 1 rule files found" in promtool("check", "config", mounted / "etc/prometheus/prometheus.yml")


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any], mounted: Path) -> None:
    """As its provisioning names them; Grafana itself is not here."""
    provisioning = mounted / "etc/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/wechat-nats.yaml").read_text())["providers"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["url"].startswith("http://prometheus:9090")
    assert "prometheus" in services
    (dashboard,) = (mounted / provider["options"]["path"][1:]).iterdir()
    assert json.loads(dashboard.read_text())["uid"] == "wechat-nats"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, which starts the program of these tests. Skips where systemd is not installed."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing; on Debian: apt-get install systemd")
    text = UNIT.read_text()
    assert "ExecStart=/opt/wechat-nats/bin/wechat-nats run\n" in text
    path = tmp_path / UNIT.name
    path.write_text(text.replace("/opt/wechat-nats/bin/wechat-nats", f"{Path(sys.executable).parent}/wechat-nats"))
    return path


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_knows_all_that_the_unit_says(unit: Path) -> None:
    assert analyze("verify", "--man=no", unit) == ""


def test_the_unit_leaves_little_open(unit: Path) -> None:
    """systemd's own measure, out of 100; what is left is the network."""
    analyze("security", "--offline=true", "--threshold=15", unit)


def test_the_unit_waits_for_the_drain_and_its_variables_are_settings(tmp_path: Path) -> None:
    text = UNIT.read_text()
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert read_settings({}).drain_s < int(stop_s)
    credentials = dict(re.findall(r"^LoadCredential=([^:]+):(.+)$", text, re.MULTILINE))
    (line,) = re.findall(r"^Environment=(.*)$", text, re.MULTILINE)
    for name in credentials:
        (tmp_path / name).write_text(VARIABLES["WECHAT_NATS_TOKEN_KEY"])
    environ = dict(pair.split("=", 1) for pair in line.replace("%d", str(tmp_path)).split())
    settings = read_settings(environ)
    assert len(settings.token_key) == 1
    assert {Path(path).name for path in environ.values()} == set(credentials)


def test_no_memory_of_the_program_has_to_be_written_and_run(unit: Path) -> None:
    """What `MemoryDenyWriteExecute` forbids; the kernel is told the same by prctl(PR_SET_MDWE), from 6.3 on."""
    assert "MemoryDenyWriteExecute=yes" in unit.read_text()
    deny = (
        "import ctypes, os, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): sys.exit(77)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    program = Path(sys.executable).with_name("wechat-nats")
    done = subprocess.run(
        [sys.executable, "-c", deny, program, "demo"],
        input="hello **you**\n", capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this kernel does not know PR_SET_MDWE")
    assert "You said: hello **you**" in done.stdout, done.stderr
