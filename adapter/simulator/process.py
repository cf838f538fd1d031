"""The simulator as a process of its own: `python -m adapter.simulator --port 8080 --hold-ms 500`."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from adapter.simulator.records import SimulatorError
from adapter.simulator.settings import SimulatorSettings
from adapter.simulator.simulator import Simulator


async def serve(
    settings: SimulatorSettings,
    ready: Callable[[Simulator], None],
    *,
    bots: int = 0,
) -> None:
    """Serves until cancelled, or until SIGTERM or SIGINT; calls `ready` once it listens."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Simulator(settings) as simulator:
        simulator.add_bots(bots)
        ready(simulator)
        await stop.wait()


def run(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 for arguments that cannot be, 1 if it cannot listen."""
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    port_file, bots = given.pop("port_file"), given.pop("bots")
    try:
        settings = msgspec.convert(
            {name: value for name, value in given.items() if value is not None},
            SimulatorSettings,
            strict=False,
        )
    except msgspec.ValidationError as exc:
        parser.error(str(exc))
    try:
        asyncio.run(serve(settings, lambda simulator: tell(simulator, port_file), bots=bots))
    except OSError as exc:
        sys.stderr.write(f"cannot listen: {exc}\n")
        return 1
    except SimulatorError as exc:
        parser.error(str(exc))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """One option per setting, of the same name."""
    parser = argparse.ArgumentParser(prog="simulator", description="A server that behaves as iLink does.")
    for name in SimulatorSettings.__struct_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE")
    parser.add_argument("--port-file", type=Path, help="write the port here once it listens")
    parser.add_argument("--bots", type=int, default=0, help="have this many bots from the start")
    return parser


def tell(simulator: Simulator, port_file: Path | None) -> None:
    """One JSON line for whoever has started this process, and the port file in one piece."""
    if port_file is not None:
        partial = port_file.with_name(port_file.name + ".part")
        partial.write_text(str(simulator.port))
        partial.replace(port_file)
    sys.stdout.write(json.dumps({"url": simulator.url, "admin_url": simulator.admin_url}) + "\n")
    sys.stdout.flush()
