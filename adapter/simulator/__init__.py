"""A server that behaves as Tencent's iLink does, for tests and for trying things out.

Knows nothing of the adapter, so that the two cannot share a misunderstanding. What both follow is in
docs/reference/ilink-protocol.md; a fault such as `F16` is a rule that README.md describes beside this code.
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
