"""The probes of the chart, asked of the real process."""

from __future__ import annotations

from pathlib import Path

from adapter.cli.embedded import EmbeddedNats
from tests.chart.helm import adapter_of, rendered
from tests.e2e.test_health import Probes
from tests.e2e.waiting import free_port
from tests.e2e.world import TOKEN_KEY, AdapterProcess


async def test_an_outage_of_nats_restarts_no_pod_that_starts_during_it(tmp_path: Path) -> None:
    container = adapter_of(rendered())
    start, live, ready = (
        container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")
    )
    nats_port, port = free_port(), free_port()
    probes = Probes(port)
    environ = {
        "NATS_URL": f"nats://127.0.0.1:{nats_port}",
        "WECHAT_NATS_HTTP_ADDR": f"127.0.0.1:{port}",
        "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY,
    }
    adapter = AdapterProcess(environ, tmp_path / "adapter.log")
    await adapter.start()
    try:
        await probes.gives(ready, 503, "started", "jetstream")  # a roll-out waits
        for path in (start, live):  # what a pod is restarted for
            assert probes.ask(path)[0] == 200
        async with EmbeddedNats(tmp_path / "nats", nats_port):
            await probes.gives(ready, 200)
            assert adapter.running
    finally:
        await adapter.kill()
