"""A server that behaves as Tencent's iLink does, for tests and for trying things out.

Knows nothing of the adapter, so that the two cannot share a misunderstanding.
"""

from adapter.simulator.faults import FAULTS, FaultRule
from adapter.simulator.kinds import KINDS
from adapter.simulator.parameters import CHANGES
from adapter.simulator.process import run, serve
from adapter.simulator.records import (
    BotRecord,
    CallView,
    InboundRecord,
    MediaView,
    OnlineView,
    PollRecord,
    PollsView,
    QrRecord,
    RequestRecord,
    SendRecord,
    Shown,
    SimulatorError,
    Stats,
    TypingView,
    Violation,
)
from adapter.simulator.settings import SimulatorSettings
from adapter.simulator.simulator import Simulator

__all__ = [
    "CHANGES",
    "FAULTS",
    "KINDS",
    "BotRecord",
    "CallView",
    "FaultRule",
    "InboundRecord",
    "MediaView",
    "OnlineView",
    "PollRecord",
    "PollsView",
    "QrRecord",
    "RequestRecord",
    "SendRecord",
    "Shown",
    "Simulator",
    "SimulatorError",
    "SimulatorSettings",
    "Stats",
    "TypingView",
    "Violation",
    "run",
    "serve",
]
