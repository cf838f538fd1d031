"""The simulator as a process of its own: `python -m adapter.simulator --port 8080 --hold-ms 500`."""

import argparse
import ast
import asyncio
import inspect
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from adapter.simulator import reading
from adapter.simulator.records import SimulatorError
from adapter.simulator.settings import SimulatorSettings
from adapter.simulator.simulator import Simulator


async def serve(
    settings: SimulatorSettings,
    ready: Callable[[Simulator], None],
    *,
    bots: int = 0,
) -> None:
    """Serves until it is cancelled or gets SIGTERM or SIGINT. Calls `ready` once it listens."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_first() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, lambda again, _: os._exit(128 + again))  # a second one ends the process at once
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_first)
    async with Simulator(settings) as simulator:
        simulator.add_bots(bots)
        ready(simulator)
        await stop.wait()


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, 1 if it cannot listen, 2 for invalid arguments."""
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    port_file, bots = given.pop("port_file"), given.pop("bots")
    try:
        settings = reading.read(
            {name: value for name, value in given.items() if value is not None}, SimulatorSettings
        )
        asyncio.run(serve(settings, lambda simulator: announce_ready(simulator, port_file), bots=bots))
    except OSError as exc:
        sys.stderr.write(f"cannot start: {exc}\n")
        return 1
    except SimulatorError as exc:
        parser.error(str(exc))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser, with one option per setting of the same name."""
    parser = argparse.ArgumentParser(
        prog="wechat-nats simulator",
        usage="%(prog)s [--option VALUE ...]",
        description="A server that behaves as iLink does. Prints where it listens as a line of JSON.",
        epilog="Bots, phones and faults are driven by POST <url>/_sim/<call>: see README.md beside this code, "
        f"{Path(__file__).with_name('README.md')}.",
    )
    explained = explanations()
    for name, hint in get_type_hints(SimulatorSettings).items():
        default = getattr(SimulatorSettings(), name)
        shown = default if isinstance(default, str) else json.dumps(default)
        choices = ("true", "false") if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="{" + ",".join(choices) + "}" if choices else "VALUE",
            help=explained[name].replace("%", "%%") + (f" [{shown}]" if shown else ""),
        )
    parser.add_argument("--port-file", type=Path, help="Write the port here once it listens.")
    parser.add_argument("--bots", type=count, default=0, help="Have this many bots from the start. [0]")
    return parser


def count(text: str) -> int:
    """Reads a number that is not negative. Raises ValueError."""
    if (number := int(text)) < 0:
        raise ValueError
    return number


def explanations() -> dict[str, str]:
    """The docstrings of the settings, by name."""
    (struct,) = ast.parse(inspect.getsource(SimulatorSettings)).body
    assert isinstance(struct, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(struct.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def announce_ready(simulator: Simulator, port_file: Path | None) -> None:
    """Prints one JSON line for the parent process, and writes the port file at once."""
    if port_file is not None:
        partial = port_file.with_name(port_file.name + ".part")
        partial.write_text(str(simulator.port))
        partial.replace(port_file)
    sys.stdout.write(json.dumps({"url": simulator.url, "admin_url": simulator.admin_url}) + "\n")
    sys.stdout.flush()
