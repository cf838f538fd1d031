"""The ports in memory, by what they stand for, and a replica's core around them. Tests import them from here."""

from tests.fakes.bench import GAP_S, LIMITS, MEDIA_BYTES, POLICY, WINDOW, Bench, ready
from tests.fakes.bus import Failing, FakeBucket, FakeBus, FakeDelivery
from tests.fakes.clock import EPOCH_MS, FakeClock, Rounds, VirtualLoop, settle
from tests.fakes.ilink import FakeChat, FakeLogins, Sent, Wire, batch, raw_message
from tests.fakes.media import Carried, FakeCdn, FakeObjects
from tests.fakes.replicas import FakeTenure, Life

__all__ = [
    "EPOCH_MS",
    "GAP_S",
    "LIMITS",
    "MEDIA_BYTES",
    "POLICY",
    "WINDOW",
    "Bench",
    "Carried",
    "Failing",
    "FakeBucket",
    "FakeBus",
    "FakeCdn",
    "FakeChat",
    "FakeClock",
    "FakeDelivery",
    "FakeLogins",
    "FakeObjects",
    "FakeTenure",
    "Life",
    "Rounds",
    "Sent",
    "VirtualLoop",
    "Wire",
    "batch",
    "raw_message",
    "ready",
    "settle",
]
