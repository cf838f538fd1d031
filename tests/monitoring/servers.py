"""A real Prometheus and a real Alertmanager for a test, and a webhook that hears what the latter tells."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import yaml
from aiohttp import web

from tests.e2e.waiting import eventually, free_port
from tests.monitoring.tools import RULES, need

SHORTER = {"5m": "8s", "15m": "10s", "30m": "12s", "1h": "12s", "6h": "14s", "1d": "60s"}
"""Windows of the rules, and what they are in a run of minutes."""
AGES_S = {
    "> 180": "> 5",
    "> 300": "> 5",
    "> 120": "> 5",
    "oldest_seconds) > 30": "oldest_seconds) > 5",
    "< 900": "< 10",
}
"""Ages that would have to be waited for."""


def shortened(rules: str) -> str:
    """The same rules for a run of minutes: windows such as `[5m]` as in SHORTER, ages as in AGES_S, `for` 3 s.

    Thresholds stay as they are. Raises KeyError for a window that is not in the list.
    """
    rules = re.sub(r"\[(\w+)\]", lambda found: f"[{SHORTER[found[1]]}]", rules)
    rules = re.sub(r"(?m)^(\s+for:) \w+$", r"\1 3s", rules)
    for age, short in AGES_S.items():
        assert age in rules
        rules = rules.replace(age, short)
    return rules


class Series(NamedTuple):
    """One series of an answer; a sample is seconds and value."""

    labels: dict[str, str]
    samples: list[tuple[float, float]]


class _Process:
    """A server with an HTTP port."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30)
        self.process: subprocess.Popen[bytes] | None = None

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def _spawn(self) -> None:
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [need(self.name), *self.arguments()],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def __aenter__(self) -> Self:
        self._spawn()
        await eventually(self._is_ready, f"{self.name} answers")
        return self

    async def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return (await self.http.get("/-/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Prometheus(_Process):
    """Scrapes targets once a second, and evaluates the shortened rules as often."""

    def __init__(
        self, folder: Path, targets: list[int], *, alertmanager: str = "", rules: Path = RULES, nats: int = 0
    ) -> None:
        """`nats`: where something tells of nats-server; 0: nowhere."""
        super().__init__(folder, "prometheus")
        self._nats = nats
        (folder / "rules.yaml").write_text(shortened(rules.read_text()))
        self.watch(targets)
        config: dict[str, Any] = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {
                    "job_name": "wechat/wechat-nats",
                    "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}],
                }
            ],
        }
        if alertmanager:
            config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))

    def watch(self, ports: list[int]) -> None:
        """From now on these are scraped, and no others."""
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports], "labels": {"namespace": "wechat"}}]
        if self._nats:
            targets.append({"targets": [f"127.0.0.1:{self._nats}"], "labels": {"namespace": "nats", "job": "nats"}})
        (self.folder / "targets.new").write_text(json.dumps(targets))
        (self.folder / "targets.new").rename(self.folder / "targets.json")

    def arguments(self) -> list[str]:
        return [
            "--config.file=prometheus.yaml",
            "--storage.tsdb.path=data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    async def query(self, expression: str) -> list[Series]:
        """What an expression gives now. AssertionError with Prometheus' words for one that it does not take."""
        found = await self._ask("query", query=expression)
        if found["resultType"] == "scalar":
            return [Series({}, [_sample(found["result"])])]
        return [Series(one["metric"], [_sample(one["value"])]) for one in found["result"]]

    async def query_range(self, expression: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """What it gave from `start_s` to `end_s` (Unix time)."""
        found = await self._ask("query_range", query=expression, start=start_s, end=end_s, step=step_s)
        return [Series(one["metric"], [_sample(value) for value in one["values"]]) for one in found["result"]]

    async def _ask(self, call: str, **parameters: Any) -> Any:
        answer = (await self.http.post(f"/api/v1/{call}", data=parameters)).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    async def fired(self, alert: str, within_s: float) -> bool:
        """Whether an alert fired in the last seconds."""
        firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
        return bool(await self.query(f"count_over_time({firing}[{max(1, round(within_s))}s])"))

    async def firing(self) -> set[str]:
        """The alerts that fire now."""
        return {one.labels["alertname"] for one in await self.query('ALERTS{alertstate="firing"}')}


def _sample(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


class Alertmanager(_Process):
    """Tells a webhook of every alert at once."""

    def __init__(self, folder: Path, webhook: str) -> None:
        super().__init__(folder, "prometheus-alertmanager")
        config = {
            "route": {
                "receiver": "webhook",
                "group_by": ["alertname"],
                "group_wait": "1s",
                "group_interval": "1s",
                "repeat_interval": "1h",
            },
            "receivers": [{"name": "webhook", "webhook_configs": [{"url": webhook, "send_resolved": True}]}],
        }
        (folder / "alertmanager.yaml").write_text(yaml.safe_dump(config))

    def arguments(self) -> list[str]:
        return [
            "--config.file=alertmanager.yaml",
            "--storage.path=data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


class Webhook:
    """Hears alerts, as a pager or a chat would."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        """As they came, over all notifications."""
        self.url = ""

    async def __aenter__(self) -> Webhook:
        application = web.Application()
        application.router.add_post("/", self._on_alert)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        port = free_port()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}/"
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _on_alert(self, request: web.Request) -> web.Response:
        self.alerts += (await request.json())["alerts"]
        return web.Response()

    def received(self, status: str) -> dict[str, dict[str, Any]]:
        """By name, the alerts that came as `firing` or as `resolved`."""
        return {one["labels"]["alertname"]: one for one in self.alerts if one["status"] == status}
