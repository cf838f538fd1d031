"""An HTTP server that behaves like Tencent's iLink, for tests and for trying things out.

The simulator imports nothing of the adapter, so that the two cannot share a misunderstanding. Both follow
docs/reference/ilink-protocol.md. A fault such as `F16` is a rule; README.md beside this code lists the faults.
"""

from adapter.simulator.faults import FAULTS, FaultRule
from adapter.simulator.kinds import KINDS
from adapter.simulator.process import run
from adapter.simulator.records import BotRecord, MediaView, Shown, SimulatorError
from adapter.simulator.settings import SimulatorSettings
from adapter.simulator.simulator import Simulator

__all__ = [
    "FAULTS",
    "KINDS",
    "BotRecord",
    "FaultRule",
    "MediaView",
    "Shown",
    "Simulator",
    "SimulatorError",
    "SimulatorSettings",
    "run",
]
