"""A replica as `wechat-nats run` runs it, with other arguments of `Replica`, such as waits that are shorter.

`python -m tests.e2e.replica '{"login_refresh_s": 1}'`: by name, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from adapter import __version__
from adapter.cli.exits import draining_on_signal
from adapter.replica.app import run_replica
from adapter.replica.wiring import Replica
from adapter.settings import Settings, read_settings
from adapter.tools import logs
from adapter.tools.process import run_fast


async def _run(settings: Settings, arguments: dict[str, Any]) -> None:
    with draining_on_signal(settings.drain_s) as stop:
        await run_replica(Replica(settings, **arguments), stop)


if __name__ == "__main__":
    settings = read_settings(os.environ)
    logs.configure(settings.log, version=__version__)
    run_fast(_run(settings, json.loads(sys.argv[1])))
