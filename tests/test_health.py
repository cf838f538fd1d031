"""What a replica says of its bus: a problem counts once it has lasted, and streams come before keys."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapter.contract.names import Names
from adapter.errors import BusRefused, Temporary
from adapter.jetstream.copies import Lacking
from adapter.jetstream.topology import Difference
from adapter.replica.health import BUS_GRACE_S, CHECK_S, Health
from adapter.tools.metrics import Metrics
from tests.fakes import FakeClock

VIRTUAL_TIME = True
NAMES = Names()
NUMBERS = {"num_pending": 3, "num_ack_pending": 2}


class Replica:
    """A replica in service whose bus is in order, under watch; every trouble is a knob."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.connection = SimpleNamespace(is_connected=True, api_request=self._api, request=self._unpermitted)
        self.publisher = SimpleNamespace(waiting_s=0.0, last_error="WECHAT_IN: full")
        self.leases = SimpleNamespace(is_working=True, last_error="refused", owned={}, ownerless=set())
        self.silence: Exception | None = None
        self.absent: list[str] = []
        self.altered: dict[str, list[Difference]] = {}
        self.incomplete: list[str] = []
        self.lacking: list[Lacking] = []
        self.paused = False
        self.looks = 0
        edges: Any = SimpleNamespace(
            connection=self.connection,
            bus=self.publisher,
            media_bus=self.publisher,
            clock=self.clock,
            metrics=self.metrics,
            leases=self.leases,
        )
        one = SimpleNamespace(queue_depths=lambda parked: (4, None), tasks=0, throttled_bots=set(), evict_idle=list)
        partitions: Any = SimpleNamespace(leases=self.leases, bindings=(), pollers={}, working={1: one})
        inspector: Any = self
        self.health = Health(edges, NAMES, inspector, "_INBOX")
        self.health.on_started()
        self.tasks = [
            asyncio.create_task(self.health.check_jetstream_forever()),
            asyncio.create_task(self.health.heartbeat_forever(partitions)),
        ]

    @property
    def problem(self) -> str:
        """What /readyz says of JetStream; "": all is well."""
        (check,) = (check for check in self.health.check_ready() if check.name == "jetstream")
        return "" if check.ok else check.detail

    async def _unpermitted(self, subject: str, data: bytes, timeout_s: float) -> Any:
        raise Temporary("timeout")

    async def _api(self, verb: str, timeout_s: float = 5.0) -> dict[str, Any]:
        if self.silence is not None:
            raise self.silence
        return NUMBERS | ({"paused": True} if self.paused else {})

    # as the inspector -------------------------------------------------------------------------------

    async def inspect_streams(self, _: object) -> list[str]:
        self.looks += 1
        return self.absent

    def message_count(self, _: str) -> int:
        return 10


def no_answer(replica: Replica) -> None:
    replica.silence = Temporary("timeout")


def refusal(replica: Replica) -> None:
    replica.silence = BusRefused(10039, "JetStream is not enabled")


def nothing_stored(replica: Replica) -> None:
    replica.publisher.waiting_s = BUS_GRACE_S + 1


def no_lease(replica: Replica) -> None:
    replica.leases.is_working = False


def well(replica: Replica) -> None:
    replica.silence, replica.publisher.waiting_s, replica.leases.is_working = None, 0.0, True


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (no_answer, "JetStream does not answer: timeout"),
        (refusal, "JetStream does not answer: 10039 JetStream is not enabled"),
        (nothing_stored, "JetStream takes nothing for WECHAT_IN: full"),
        (no_lease, "no lease can be renewed: refused"),
    ],
)
async def test_a_problem_counts_once_it_has_lasted(trouble: Any, said: str) -> None:
    replica = Replica()
    await asyncio.sleep(60)
    trouble(replica)
    await asyncio.sleep(BUS_GRACE_S - CHECK_S)
    assert replica.problem == ""
    well(replica)
    await asyncio.sleep(2 * CHECK_S)
    trouble(replica)
    await asyncio.sleep(BUS_GRACE_S - CHECK_S)
    assert replica.problem == "", "the grace begins anew"
    await asyncio.sleep(2 * CHECK_S)
    assert replica.problem == said
    well(replica)
    await asyncio.sleep(2 * CHECK_S)
    assert replica.problem == ""


async def test_what_is_gone_or_lacks_keys_is_reported_and_waited_for() -> None:
    replica = Replica()
    replica.absent, replica.incomplete = ["WECHAT_IN"], ["KV_wechat_bindings"]
    await asyncio.sleep(4 * CHECK_S)
    (check,) = (check for check in replica.health.check_ready() if check.name == "streams")
    assert (check.ok, check.detail) == (
        False,
        "deleted: WECHAT_IN; restore from the backup, or create empty by `wechat-nats doctor --fix`;"
        " incomplete: KV_wechat_bindings; restore from the backup",
    )
    waits = [
        asyncio.create_task(replica.health.wait_complete(["WECHAT_OUT", name]))
        for name in ("WECHAT_IN", "KV_wechat_bindings")
    ]
    await replica.health.wait_complete(["WECHAT_OUT"])
    assert not any(wait.done() for wait in waits)
    assert replica.metrics.value("nats_streams_missing") == 2
    assert replica.metrics.value("nats_consumer_pending", consumer="out") == 6  # 10 stored, 4 in hand
    replica.absent, replica.incomplete = [], []
    await asyncio.sleep(2 * CHECK_S)
    assert all(check.ok for check in replica.health.check_ready())
    assert all(wait.done() for wait in waits)


async def test_what_was_changed_is_reported_as_long_as_it_is_so() -> None:
    """Nothing waits for it: what can be done is done."""
    replica = Replica()
    replica.altered = {"WECHAT_IN": [Difference("WECHAT_IN", "republish", {}, None, critical=True)]}
    await asyncio.sleep(2 * CHECK_S)
    (check,) = (check for check in replica.health.check_ready() if check.name == "streams")
    assert (check.ok, check.detail) == (False, "altered: WECHAT_IN (republish); `wechat-nats doctor --fix`")
    assert replica.metrics.value("nats_streams_altered") == 1
    await replica.health.wait_complete(["WECHAT_IN"])
    replica.altered = {}
    await asyncio.sleep(2 * CHECK_S)
    assert all(check.ok for check in replica.health.check_ready())
    assert replica.metrics.value("nats_streams_altered") == 0


async def test_streams_that_lack_copies_are_counted_and_the_replica_stays_ready() -> None:
    replica = Replica()
    replica.lacking = [Lacking("WECHAT_IN", "n1"), Lacking("WECHAT_IN", "n2"), Lacking("WECHAT_OUT", "n1")]
    await asyncio.sleep(2 * CHECK_S)
    assert replica.metrics.value("nats_streams_degraded") == 2
    assert all(check.ok for check in replica.health.check_ready())


async def test_what_is_back_is_looked_at_at_once() -> None:
    """It may have come back empty; else every other time is enough."""
    replica = Replica()
    replica.silence = Temporary("timeout")
    await asyncio.sleep(60 + CHECK_S / 2)
    assert replica.looks == 0
    replica.silence = None
    await asyncio.sleep(CHECK_S)
    assert replica.looks == 1
    await asyncio.sleep(10 * CHECK_S)
    assert replica.looks == 6


async def test_a_paused_consumer_is_reported_once_until_it_is_not() -> None:
    """It holds back what services have sent, and everything else looks well."""
    replica = Replica()
    replica.paused = True
    with capture_logs() as logs:
        await asyncio.sleep(10 * CHECK_S)
        (check,) = [check for check in replica.health.check_ready() if check.name == "streams"]
        assert (check.ok, check.detail) == (False, "paused: `nats consumer resume WECHAT_OUT router`")
        assert replica.metrics.value("nats_streams_altered") == 1
        replica.paused = False
        await asyncio.sleep(4 * CHECK_S)
    assert all(check.ok for check in replica.health.check_ready())
    assert replica.metrics.value("nats_streams_altered") == 0
    assert [line["event"] for line in logs if line.get("consumer") == "router"] == [
        "consumer.paused",
        "consumer.resumed",
    ]
