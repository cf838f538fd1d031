"""The command `wechat-nats`. Everything is in `adapter.cli`; only `run` also works where its extra is missing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from adapter import __version__, logs
from adapter.errors import SettingsError
from adapter.settings import Settings, read_settings


def main() -> None:
    """Ends the process with the exit code of the command (`wechat-nats --help` lists them)."""
    try:
        from adapter.cli import main as cli  # noqa: PLC0415 -- an extra
    except ModuleNotFoundError as exc:
        if sys.argv[1:] == ["run"]:
            sys.exit(_run_alone())
        sys.stderr.write(f"{exc.name} is not installed: install wechat-nats[cli]. (`run` works without it.)\n")
        sys.exit(2)
    sys.exit(cli())


def _run_alone() -> int:
    try:
        settings = read_settings(os.environ)
        logs.configure(settings.log, version=__version__, instance=settings.instance)
        asyncio.run(_serve(settings))
    except SettingsError as exc:
        sys.stderr.write(f"{exc.detail}\n")
        return 2
    return 0


async def _serve(settings: Settings) -> None:
    from adapter import app  # noqa: PLC0415 -- settings are told first, even where this fails

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await app.run(settings, stop=stop)


if __name__ == "__main__":
    main()
