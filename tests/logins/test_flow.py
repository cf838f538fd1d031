"""QR logins in virtual time: every status and failure, who asks when, and what is told of it."""

from __future__ import annotations

import asyncio
import base64
import itertools
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.contract.messages import (
    Bind,
    BindingState,
    Login,
    LoginEvent,
    LoginQuery,
    LoginStart,
    LoginVerify,
    Options,
)
from adapter.contract.records import LoginRecord
from adapter.errors import AdapterError, BusRefused, Refused, SessionExpired, Temporary
from adapter.logins import flow
from adapter.logins.flow import DEAD_CODES, REFRESH_S
from adapter.logins.records import UPGRADE, LoginRecords
from adapter.logins.service import LOGIN_S, OPEN_PER_SANDBOX, LoginService
from adapter.ports import BucketEntry, BusMessage, QrCode, Scan, ScanStatus
from adapter.tools.seal import Sealer
from tests.fakes import Bench, FakeBucket, FakeDelivery, FakeLogins
from tests.newer import made_newer

VIRTUAL_TIME = True

BOT, USER, TOKEN = "b1@im.bot", "u1@im.wechat", "b1@im.bot:SECRET"
CONFIRMED = Scan("confirmed", bot=BOT, user=USER, token=TOKEN, base_url="https://ilinkai.wechat.com")


class Doors:
    """One replica that logs in; a second one on the same `world` answers, too. Its binds are carried out."""

    def __init__(self, world: Doors | None = None, *, instance: str = "me") -> None:
        self.bench: Bench = Bench(world.bench if world else None, instance=instance)
        self.clock = self.bench.clock
        self.bucket: FakeBucket = world.bucket if world else FakeBucket("login", self.bench.bus.writes)
        self.sealer: Sealer = self.bench.sealer
        self.ilink: FakeLogins = world.ilink if world else FakeLogins(self.clock)
        self.records = LoginRecords(self.bucket, self.bench.events, self.clock, self.bench.metrics)
        self.service = LoginService(
            self.records,
            self.ilink,
            self.bench.bindings,
            self.bench.leases,
            self.bench.presence,
            self.bench.bus,
            self.bench.receipts,
            self.bench.names,
            self.sealer,
            self.clock,
            self.bench.metrics,
        )
        self.is_applied = True
        """Whether stored binds are applied."""
        self.stored: dict[int, bytes] = {}
        """Binds by their sequences. One that was applied is deleted from the stream."""
        loop = asyncio.get_running_loop()
        self.tasks = [loop.create_task(work) for work in (self.records.run(), self.service.run(), self._apply())]
        self.tasks.append(loop.create_task(self.bench.presence.run(lambda: (0, True))))

    async def _apply(self) -> None:
        """What the owner of each sandbox does."""
        done = set[int]()
        while True:
            self._look()
            waiting = [each for each in self.bench.bus.found("OUT") if each.seq not in done]
            for message in waiting if self.is_applied else []:
                partition = self.bench.open_partition(message.subject.rpartition(".")[2])
                assert partition is not None
                partition.on_delivery(
                    FakeDelivery(message.subject, message.data, seq=message.seq, time_ms=message.time_ms)
                )
                done.add(message.seq)
            await asyncio.sleep(0.05)

    def _look(self) -> None:
        self.stored |= {message.seq: message.data for message in self.bench.bus.found("OUT")}

    async def start(self, sandbox: str = "s1", **fields: Any) -> Login:
        return await self.ask("start", LoginStart(sandbox=sandbox, **fields))

    async def ask(self, verb: str, query: msgspec.Struct) -> Login:
        return msgspec.json.decode(await getattr(self.service, verb)(msgspec.json.encode(query)), type=Login)

    async def status(self, login: Login) -> Login:
        return await self.ask("status", LoginQuery(login=login.login))

    async def verify(self, login: Login, code: str) -> Login:
        return await self.ask("verify", LoginVerify(login=login.login, code=code))

    async def stop(self) -> None:
        """As SIGTERM ends it."""
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)

    def steps(self, sandbox: str = "s1") -> list[tuple[str, int, str]]:
        return [(event.status, event.code, event.reason) for event in self.events(sandbox)]

    def events(self, sandbox: str = "s1") -> list[LoginEvent]:
        return [
            msgspec.json.decode(stored.data, type=LoginEvent)
            for stored in self.bench.bus.found("EVENT")
            if stored.subject == f"wechat.event.{sandbox}.login"
        ]

    def binds(self) -> list[Bind]:
        self._look()
        return [msgspec.json.decode(data, type=Bind) for data in self.stored.values()]

    def record(self, login: Login) -> LoginRecord:
        value = self.bucket.entries[login.login].value
        assert value is not None
        return msgspec.json.decode(value, type=LoginRecord)

    def counted(self, outcome: str) -> float:
        return self.bench.metrics.value("logins_total", outcome=outcome)


@pytest.fixture
async def doors() -> Doors:
    return Doors()


async def test_a_login_goes_from_the_code_to_the_bot(doors: Doors) -> None:
    login = await doors.start()
    assert (login.status, login.code, login.qrcode_url) == ("wait", 1, "https://q/q1")
    assert login.qrcode_text
    assert login.qrcode_png == ""
    await asyncio.sleep(3)
    doors.ilink.happens("q1", "scaned")
    await asyncio.sleep(1)
    assert (await doors.status(login)).status == "scanned"
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(5)
    done = await doors.status(login)
    assert (done.status, done.bot, done.user, done.qrcode_url) == ("confirmed", BOT, USER, "")
    assert doors.steps() == [("wait", 1, ""), ("scanned", 1, ""), ("confirmed", 1, "")]
    (bind,) = doors.binds()
    assert (bind.bot, bind.user, bind.base_url) == (BOT, USER, "https://ilinkai.wechat.com")
    binding = doors.bench.bindings.get(BOT)
    assert binding is not None
    assert (doors.sealer.open(BOT, binding.token), (bind.id or "")[:6]) == (TOKEN, "login-")
    assert "first message" in doors.events()[-1].detail
    asked = len(doors.ilink.asked)
    await asyncio.sleep(100)
    assert len(doors.ilink.asked) == asked  # no call after the end
    assert doors.record(login).url == ""
    assert doors.counted("confirmed") == 1


async def test_between_two_requests_about_a_code_is_a_second(doors: Doors) -> None:
    await doors.start()
    doors.ilink.happens("q1", *[None] * 5)  # network errors: each is a `wait`
    await asyncio.sleep(10)
    times = [asked.at_s for asked in doors.ilink.asked]
    assert [round(b - a) for a, b in itertools.pairwise(times)] == [1] * 5
    assert doors.steps() == [("wait", 1, "")]


async def test_the_digits_of_the_phone_are_sent_at_once(doors: Doors) -> None:
    login = await doors.start()
    with pytest.raises(Refused):
        await doors.verify(login, "4711")
    doors.ilink.happens("q1", "need_verifycode")
    await asyncio.sleep(1)
    asked = len(doors.ilink.asked)
    await asyncio.sleep(100)
    assert len(doors.ilink.asked) == asked  # while the digits are awaited, nothing is asked
    now = doors.clock.monotonic()
    answer = await doors.verify(login, "4711")
    assert (answer.status, answer.reason) == ("need_verify_code", "checking")
    doors.ilink.happens("q1", None, "scaned")  # the first answer gets lost: they are sent again
    await asyncio.sleep(3)
    first, second = doors.ilink.asked[asked : asked + 2]
    assert (first.digits, second.digits) == ("4711", "4711")
    assert first.at_s - now < 0.1
    assert second.at_s - first.at_s >= 1
    assert doors.record(login).digits == ""
    assert doors.ilink.asked[-1].digits == ""
    assert doors.steps() == [("wait", 1, ""), ("need_verify_code", 1, ""), ("scanned", 1, "")]


async def test_too_many_wrong_digits_cost_the_code(doors: Doors) -> None:
    """Three times, and the login has failed."""
    login = await doors.start()
    for number in range(1, DEAD_CODES + 1):
        doors.ilink.happens(f"q{number}", "need_verifycode")
        await asyncio.sleep(2)
        await doors.verify(login, "1")
        doors.ilink.happens(f"q{number}", "verify_code_blocked")
        await asyncio.sleep(2)
    now = await doors.status(login)
    assert (now.status, now.reason, now.code) == ("failed", "blocked", DEAD_CODES)
    assert doors.bench.metrics.value("qr_refreshes_total") == DEAD_CODES - 1
    assert doors.counted("failed") == 1


async def test_three_expired_codes_are_an_expired_login(doors: Doors) -> None:
    login = await doors.start()
    for number in range(1, DEAD_CODES + 1):
        doors.ilink.happens(f"q{number}", "expired")
        await asyncio.sleep(3)
    assert doors.steps() == [("wait", 1, ""), ("wait", 2, ""), ("wait", 3, ""), ("expired", 3, "codes")]
    assert (await doors.status(login)).status == "expired"
    assert [UPGRADE in event.detail for event in doors.events()] == [False, True, True, True]
    assert len(doors.ilink.tokens) == DEAD_CODES
    assert doors.counted("expired") == 1


async def test_a_code_that_nobody_scans_is_replaced_and_that_does_not_count(doors: Doors) -> None:
    """The one before it is asked about until it has expired, and no code is asked about for ever."""
    login = await doors.start()
    started = doors.clock.monotonic()
    await asyncio.sleep(3.5 * REFRESH_S)
    assert [round((at - started) / REFRESH_S) for at in doors.ilink.fetched_at] == [0, 1, 2, 3]
    assert doors.ilink.out == {"q3", "q4"}
    doors.ilink.happens("q3", "expired")
    await asyncio.sleep(1)
    assert doors.ilink.out == {"q4"}
    await asyncio.sleep(LOGIN_S)
    now = await doors.status(login)
    assert (now.status, now.reason) == ("expired", "time")
    assert now.detail.endswith(UPGRADE)
    assert doors.ilink.out == set()
    assert now.code == 10


async def test_whose_code_was_scanned_is_not_told_that_the_phone_refused_it(doors: Doors) -> None:
    login = await doors.start()
    doors.ilink.happens("q1", "scaned", "expired")
    for handle in ("q2", "q3"):
        doors.ilink.happens(handle, "expired")
    await asyncio.sleep(10)
    assert (await doors.status(login)).status == "expired"
    assert not any(UPGRADE in event.detail for event in doors.events())


REFUSED = Temporary("ret_other", "iLink answered -1")


@pytest.mark.parametrize(
    ("answers", "state", "asked"),
    [
        ([REFUSED], "active", [["t"], []]),
        ([Temporary("unreadable")], "active", [["t"], []]),
        ([Temporary("http_4xx")], "active", [["t"], []]),
        ([Temporary("http_4xx", retry_after_s=5.0)], "active", [["t"]]),
        ([REFUSED, REFUSED], "active", [["t"], []]),
        ([Temporary("network")], "active", [["t"]]),
        ([Temporary("timeout")], "active", [["t"]]),
        ([Temporary("http_5xx")], "active", [["t"]]),
        ([REFUSED], "needs_login", [[]]),
    ],
    ids=[
        "refused",
        "unreadable",
        "HTTP 400",
        "HTTP 429",
        "without tokens, too",
        "network",
        "timeout",
        "gateway",
        "no tokens",
    ],
)
async def test_a_request_for_a_code_that_is_refused_is_made_once_without_tokens(
    answers: list[Exception | QrCode], state: BindingState, asked: list[list[str]], doors: Doors
) -> None:
    await doors.bench.bind(bot=BOT, user=USER, token=doors.sealer.seal(BOT, "t"), state=state)
    doors.ilink.codes.extend(answers)
    if len(asked) > len(answers):
        assert (await doors.start()).qrcode_url
    else:
        with pytest.raises(Temporary):
            await doors.start()
    assert doors.ilink.tokens == asked


async def test_whoever_scans_the_code_before_counts(doors: Doors) -> None:
    login = await doors.start()
    await asyncio.sleep(REFRESH_S + 5)
    doors.ilink.happens("q1", "scaned")
    await asyncio.sleep(1)
    now = await doors.status(login)
    assert (now.status, now.qrcode_url) == ("scanned", "https://q/q1")
    await asyncio.sleep(2 * REFRESH_S)
    assert doors.ilink.out == {"q1"}  # and no code is fetched while somebody confirms
    assert len(doors.ilink.tokens) == 2
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(2)
    assert (await doors.status(login)).status == "confirmed"


async def test_the_code_before_may_expire_after_its_scan_too(doors: Doors) -> None:
    login = await doors.start()
    await asyncio.sleep(REFRESH_S + 5)
    doors.ilink.happens("q1", "scaned", "expired")
    await asyncio.sleep(5)
    now = await doors.status(login)
    assert (now.status, now.code, now.qrcode_url) == ("wait", 3, "https://q/q3")


async def test_a_code_that_comes_after_somebody_has_scanned_is_not_shown(doors: Doors) -> None:
    login = await doors.start()
    await asyncio.sleep(REFRESH_S - 5)
    doors.ilink.fetch_s = 8
    await asyncio.sleep(7)
    doors.ilink.happens("q1", "scaned")
    await asyncio.sleep(20)
    now = await doors.status(login)
    assert len(doors.ilink.tokens) == 2
    assert (now.status, now.code, now.qrcode_url) == ("scanned", 1, "https://q/q1")


async def test_two_codes_that_are_confirmed_at_once_bind_one_bot(doors: Doors) -> None:
    login = await doors.start()
    await asyncio.sleep(REFRESH_S + 5)
    other = CONFIRMED._replace(bot="b2@im.bot", token="b2@im.bot:SECRET", user="u2@im.wechat")
    doors.ilink.happens("q1", CONFIRMED)
    doors.ilink.happens("q2", other)
    await asyncio.sleep(5)
    (bind,) = doors.binds()
    assert (await doors.status(login)).bot == bind.bot == BOT  # the first one
    assert [binding.bot for binding in doors.bench.bindings] == [BOT]


@pytest.mark.parametrize("late", ["need_verifycode", "scaned"])
async def test_the_verdict_on_digits_is_not_that_on_those_sent_after_them(late: ScanStatus, doors: Doors) -> None:
    login = await doors.start()
    doors.ilink.happens("q1", "need_verifycode")
    await asyncio.sleep(1)
    await doors.verify(login, "1")
    await asyncio.sleep(1)
    at_once = doors.verify(login, "2")  # as the verdict on the first comes
    doors.ilink.happens("q1", late)
    assert (await at_once).reason == "checking"
    await asyncio.sleep(1)
    assert doors.ilink.asked[-1].digits == "2"
    now = await doors.status(login)
    assert (now.status, now.reason) == ("need_verify_code", "checking")
    doors.ilink.happens("q1", "need_verifycode")
    await asyncio.sleep(1)
    assert (await doors.status(login)).reason == "wrong_code"


async def test_a_redirected_code_is_asked_about_there(doors: Doors) -> None:
    """Without a host where it is; another code afterwards, too."""
    login = await doors.start()
    doors.ilink.happens("q1", "scaned_but_redirect")
    await asyncio.sleep(2)
    assert doors.ilink.asked[-1].base_url == ""
    doors.ilink.happens("q1", Scan("scaned_but_redirect", redirect_host="sh.weixin.qq.com"))
    await asyncio.sleep(2)
    there = "https://sh.weixin.qq.com"
    assert doors.ilink.asked[-1].base_url == there
    doors.ilink.happens("q1", "expired")
    await asyncio.sleep(2)
    assert (doors.ilink.asked[-1].handle, doors.ilink.asked[-1].base_url) == ("q2", there)
    assert doors.steps() == [("wait", 1, ""), ("scanned", 1, ""), ("wait", 2, "")]
    assert (await doors.status(login)).code == 2


BAD = [
    ("redirect-host", Scan("scaned_but_redirect", redirect_host="evil.example"), "url"),
    ("baseurl", CONFIRMED._replace(base_url="https://evil.example"), "url"),
    ("baseurl-without-tls", CONFIRMED._replace(base_url="http://ilinkai.weixin.qq.com"), "url"),
    ("no-bot-id", CONFIRMED._replace(bot=""), "no_bot_id"),
    ("no-token", CONFIRMED._replace(token=""), "no_token"),
    ("bot-id-with-space", CONFIRMED._replace(bot="b 1"), "credentials"),
    ("token-too-long", CONFIRMED._replace(token="t" * 1025), "credentials"),
]


@pytest.mark.parametrize(("scan", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_what_cannot_be_used_fails_the_login(scan: Scan, reason: str, doors: Doors) -> None:
    """And nobody is called or bound."""
    login = await doors.start()
    doors.ilink.happens("q1", scan)
    await asyncio.sleep(3)
    now = await doors.status(login)
    assert (now.status, now.reason) == ("failed", reason)
    assert now.detail
    assert doors.binds() == []
    assert {asked.base_url for asked in doors.ilink.asked} == {""}
    assert doors.steps()[-1] == ("failed", 1, reason)


@pytest.mark.parametrize("answer", [SessionExpired("stale_token", "-14"), Temporary("timeout"), Refused("typing")])
async def test_a_token_that_ilink_refuses_at_once_fails_the_login_before_its_bind(
    answer: AdapterError, doors: Doors
) -> None:
    """Of any other answer, and of none, the bind is stored."""
    login = await doors.start()
    doors.ilink.notify_fails = answer
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(5)
    now, is_dead = await doors.status(login), isinstance(answer, SessionExpired)
    assert (now.status, now.reason) == (("failed", "stale_token") if is_dead else ("confirmed", ""))
    assert ("refuses the bot's token (-14)" in now.detail, doors.binds() == []) == (is_dead, is_dead)


async def test_a_long_token_fits_into_its_bind_when_it_is_sealed() -> None:
    doors = Doors()
    login = await doors.start()
    doors.ilink.happens("q1", CONFIRMED._replace(token="t" * 1024, base_url=""))
    await asyncio.sleep(3)
    assert (await doors.status(login)).status == "confirmed"
    binding = doors.bench.bindings.get(BOT)
    assert binding is not None
    assert doors.sealer.open(BOT, binding.token) == "t" * 1024
    assert binding.base_url == ""


async def test_a_user_who_is_served_already_stays_so(doors: Doors) -> None:
    """Only live tokens of the sandbox are listed, newest first."""
    await doors.bench.bind(bot="old@im.bot", user="u0@im.wechat", since_ms=1)
    await doors.bench.bind(bot="new@im.bot", user="u2@im.wechat", since_ms=3)
    await doors.bench.bind(bot="dead@im.bot", user="u3@im.wechat", since_ms=4, state="needs_login")
    await doors.bench.bind(sandbox="s2", bot="other@im.bot", since_ms=5)
    login = await doors.start()
    assert doors.ilink.tokens == [["new@im.bot:t", "old@im.bot:t"]]
    doors.ilink.happens("q1", "binded_redirect")
    await asyncio.sleep(1)
    now = await doors.status(login)
    assert (now.status, now.bot) == ("already_bound", "")  # which of the two is not known
    second = await doors.start("s2")
    doors.ilink.happens("q2", "binded_redirect")
    await asyncio.sleep(1)
    assert (await doors.status(second)).bot == "other@im.bot"
    third = await doors.start()
    doors.ilink.happens("q3", Scan("binded_redirect", bot="old@im.bot"))
    await asyncio.sleep(1)
    assert (await doors.status(third)).bot == "old@im.bot"  # an unreleased official client reads it
    assert doors.binds() == []
    assert doors.counted("already_bound") == 3


@pytest.mark.parametrize("options", [{}, {"auto_typing": True}, {"media": False}])
async def test_a_bot_that_is_bound_already_gets_the_options_given(options: dict[str, bool], doors: Doors) -> None:
    token = doors.sealer.seal(BOT, "token-1")
    await doors.bench.bind(bot=BOT, user=USER, token=token, options=Options(media=False))
    login = await doors.start(options=options)
    doors.ilink.happens("q1", "binded_redirect")
    await asyncio.sleep(5)
    assert (await doors.status(login)).status == "already_bound"
    (binding,) = doors.bench.bindings.of_sandbox("s1")
    assert binding.options == (Options(**options) if options else Options(media=False))
    assert doors.sealer.open(BOT, binding.token) == "token-1"
    assert len(doors.binds()) == (options == {"auto_typing": True})


async def test_a_code_that_cannot_be_fetched_is_tried_again_while_the_old_one_counts(doors: Doors) -> None:
    login = await doors.start()
    doors.ilink.codes += [Temporary("http_5xx"), Temporary("http_4xx", retry_after_s=20)]
    await asyncio.sleep(REFRESH_S + 15)
    assert doors.ilink.out == {"q1"}
    gaps = [b - a for a, b in itertools.pairwise(doors.ilink.fetched_at)]
    assert [round(gap) for gap in gaps] == [50, 1]
    await asyncio.sleep(10)
    assert round(doors.ilink.fetched_at[-1] - doors.ilink.fetched_at[-2]) == 20
    assert (await doors.status(login)).code == 2


async def test_any_replica_takes_digits_and_a_cancellation(doors: Doors) -> None:
    """They reach the replica that runs the login through its record."""
    other = Doors(doors, instance="other-1")
    login = await doors.start()
    doors.ilink.happens("q1", "need_verifycode")
    await asyncio.sleep(1)
    assert (await other.verify(login, "4711")).reason == "checking"
    await asyncio.sleep(1)
    assert doors.ilink.asked[-1].digits == "4711"
    assert doors.ilink.out == {"q1"}
    assert (await other.ask("cancel", LoginQuery(login=login.login))).status == "cancelled"
    await asyncio.sleep(0.1)
    assert doors.ilink.out == set()
    assert doors.steps() == [("wait", 1, ""), ("need_verify_code", 1, ""), ("cancelled", 1, "")]


@pytest.mark.parametrize("status", ["wait", "scanned"])
async def test_a_login_whose_replica_is_gone_is_lost_and_published_once(status: str, doors: Doors) -> None:
    others = [Doors(doors, instance=f"other-{n}") for n in range(2)]
    login = await doors.start()
    if status == "scanned":
        doors.ilink.happens("q1", "scaned")
    await asyncio.sleep(2)
    await doors.stop()
    assert doors.ilink.out == set()
    await asyncio.sleep(5)
    assert (await others[0].status(login)).status == status  # it may come back, for all that is known
    await asyncio.sleep(5)
    now = await others[1].status(login)
    assert (now.status, now.qrcode_url, "start another" in now.detail) == ("lost", "", True)
    assert others[0].steps()[-1] == ("lost", 1, "")
    assert [step for step, _, _ in others[0].steps()].count("lost") == 1
    assert sum(other.counted("lost") for other in others) == 1
    assert doors.record(login).url == ""
    asked = len(doors.ilink.asked)
    await asyncio.sleep(100)
    assert len(doors.ilink.asked) == asked


async def test_a_login_that_is_called_lost_while_its_replica_lives_ends_there(doors: Doors) -> None:
    """Others have not heard the replica for long."""
    Doors(doors, instance="other")
    login = await doors.start()
    doors.bench.core.is_cut = True
    await asyncio.sleep(10)
    assert (await doors.status(login)).status == "lost"
    assert doors.ilink.out == set()
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(5)
    assert doors.binds() == []


async def test_one_who_hears_nobody_calls_no_login_lost(doors: Doors) -> None:
    deaf = Doors(doors, instance="other")
    login = await doors.start()
    deaf.bench.core.is_cut = True
    await asyncio.sleep(60)
    deaf.bench.core.is_cut = False
    await asyncio.sleep(10)
    assert (await doors.status(login)).status == "wait"


async def test_a_flow_that_is_stopped_stores_the_bind_of_an_answer_in_hand() -> None:
    """iLink need not give the credentials again, and they are never stored open."""
    doors = Doors()
    login = await doors.start()
    stuck = asyncio.Event()

    async def slow(message: BusMessage) -> None:
        if message.stream == "out":
            stuck.set()
            await asyncio.sleep(2)

    doors.bench.bus.on_publish = slow
    doors.ilink.happens("q1", CONFIRMED)
    await stuck.wait()
    assert TOKEN not in str(msgspec.json.encode(doors.record(login)))
    await doors.stop()
    (bind,) = doors.binds()
    assert (bind.bot, TOKEN in str(bind.bot_token)) == (BOT, False)


async def test_one_who_drains_starts_no_login(doors: Doors) -> None:
    doors.bench.leases.draining = True
    with pytest.raises(Temporary, match="ask again"):
        await doors.start()
    assert doors.ilink.tokens == []


async def test_a_deleted_login_never_comes_back_in_memory(doors: Doors) -> None:
    """An erasure deletes the record while the answer to an update is on its way."""
    login = await doors.start()
    update = doors.bucket.update

    async def late(key: str, *written_with: Any, **options: Any) -> int:
        written = await update(key, *written_with, **options)
        await doors.bucket.delete(key)
        await asyncio.sleep(0.2)
        return written

    doors.bucket.update = late  # type: ignore[method-assign]
    await doors.ask("cancel", LoginQuery(login=login.login))
    assert [*doors.records] == []
    with pytest.raises(Refused, match="no such login"):
        await doors.status(login)


async def test_a_login_of_a_newer_version_is_left_alone_and_ends_no_other(doors: Doors) -> None:
    newer = made_newer(msgspec.json.encode(doors.record(await doors.start())), status=["of another form"])
    doors.bucket.put("x" * 24, newer)
    with pytest.raises(Temporary, match="record_too_new"):
        await doors.ask("cancel", LoginQuery(login="x" * 24))
    assert (await doors.status(await doors.start())).status == "wait"
    await asyncio.sleep(5)
    assert doors.bucket.entries["x" * 24].value == newer


async def test_a_scan_beside_another_person_is_reported_as_such(doors: Doors) -> None:
    await doors.bench.bind(bot="b0@im.bot", user="u0@im.wechat")
    login = await doors.start()
    assert login.former_user == ""
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(5)
    now = await doors.status(login)
    assert (now.status, now.user, now.former_user) == ("confirmed", USER, "u0@im.wechat")
    event = doors.events()[-1]
    assert (event.status, event.former_user) == ("confirmed", "u0@im.wechat")
    assert "u0@im.wechat" in now.detail
    assert "first message" in now.detail


@pytest.mark.parametrize("case", ["again", "new", "unknown-before", "unknown-now"])
async def test_nobody_is_warned_of_who_is_no_other_person(case: str, doors: Doors) -> None:
    if case != "new":
        user = "" if case == "unknown-before" else "u0@im.wechat" if case == "unknown-now" else USER
        await doors.bench.bind(bot="b0@im.bot", user=user)
    login = await doors.start()
    doors.ilink.happens("q1", CONFIRMED._replace(user="") if case == "unknown-now" else CONFIRMED)
    await asyncio.sleep(5)
    now = await doors.status(login)
    assert (now.status, now.former_user) == ("confirmed", "")
    assert "Another" not in now.detail


async def test_who_has_confirmed_cannot_be_cancelled_half_way(doors: Doors) -> None:
    login = await doors.start()
    doors.is_applied = False
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(3)
    with pytest.raises(Refused, match="unbind"):
        await doors.ask("cancel", LoginQuery(login=login.login))
    assert (await doors.status(login)).qrcode_url == ""


async def test_a_bind_that_nobody_carries_out_is_reported_as_such(doors: Doors) -> None:
    login = await doors.start()
    doors.is_applied = False
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(60)
    now = await doors.status(login)
    assert (now.status, now.reason) == ("confirmed", "bind_pending")


async def test_a_bind_that_is_refused_fails_the_login_also_of_a_bot_that_is_bound(doors: Doors) -> None:
    """With its token of before, which iLink may take no more."""
    await doors.bench.bind(bot=BOT, user=USER, token="of-before")

    def refuse(url: str) -> str:
        raise Refused("url", "Not allowed here.")

    doors.bench.chat.check_base_url = refuse  # type: ignore[method-assign]
    login = await doors.start()
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(10)
    now = await doors.status(login)
    assert (now.status, now.reason) == ("failed", "url")


async def test_a_bus_that_does_not_take_the_bind_fails_the_login(doors: Doors) -> None:
    login = await doors.start()
    doors.bench.bus.refuse = lambda message: BusRefused(10054, "no") if message.stream == "out" else None
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(3)
    assert (await doors.status(login)).reason == "bus"


async def test_a_bind_is_repeated_while_the_queue_of_its_sandbox_is_full(doors: Doors) -> None:
    """The token is in memory alone, and cannot be had again."""
    login = await doors.start()
    doors.bench.bus.refuse = lambda message: BusRefused(10077, "full") if message.stream == "out" else None
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(900)
    assert (await doors.status(login)).status == "wait"
    doors.bench.bus.refuse = lambda _: None
    await asyncio.sleep(60)
    assert (await doors.status(login)).status == "confirmed"


async def test_a_bind_is_not_repeated_longer_than_the_key_of_its_login_lives(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "KEY_MS", 600_000)
    login = await doors.start()
    doors.bench.bus.refuse = lambda message: BusRefused(10077, "full") if message.stream == "out" else None
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(700)
    assert (await doors.status(login)).reason == "bus"


async def test_a_cancelled_login_is_left_at_once(doors: Doors) -> None:
    login = await doors.start()
    await asyncio.sleep(5)
    assert (await doors.ask("cancel", LoginQuery(login=login.login))).status == "cancelled"
    await asyncio.sleep(0.1)
    assert doors.ilink.out == set()
    assert doors.steps() == [("wait", 1, ""), ("cancelled", 1, "")]
    assert (await doors.ask("cancel", LoginQuery(login=login.login))).status == "cancelled"
    assert doors.counted("cancelled") == 1
    with pytest.raises(Refused, match="over"):
        await doors.verify(login, "1")


async def test_an_answer_that_cannot_be_stored_waits_for_the_bus(doors: Doors) -> None:
    login = await doors.start()
    await asyncio.sleep(1)
    failures = 3
    get = doors.bucket.get

    async def away(key: str) -> BucketEntry | None:
        nonlocal failures
        if failures:
            failures -= 1
            raise Temporary("bus_down")
        return await get(key)

    doors.bucket.get = away  # type: ignore[method-assign]
    doors.ilink.happens("q1", "scaned")
    await asyncio.sleep(5)
    assert (await doors.status(login)).status == "scanned"


async def test_a_bug_ends_one_login_and_leaves_the_others_alone(doors: Doors) -> None:
    first, second = await doors.start("s1"), await doors.start("s2")
    with capture_logs() as logs:
        doors.ilink.happens("q1", ValueError("bug"))
        doors.ilink.happens("q2", "scaned")
        await asyncio.sleep(1)
        assert (await doors.status(second)).status == "scanned"
    now = await doors.status(first)
    assert (now.status, now.reason) == ("failed", "crashed")
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["login.crashed"]


QUESTIONS = [
    ("start", b"{}", "invalid"),
    ("start", b'{"sandbox":"s1\\n"}', "invalid"),
    ("status", b'{"login":"nobody"}', "not_found"),
    ("status", b'{"login":"a.b"}', "not_found"),
    ("verify", b'{"login":"nobody","code":"1"}', "not_found"),
    ("verify", b'{"login":"nobody","code":"x"}', "invalid"),
]


@pytest.mark.parametrize(("verb", "body", "reason"), QUESTIONS)
async def test_a_question_that_has_no_answer_is_refused(verb: str, body: bytes, reason: str, doors: Doors) -> None:
    with pytest.raises(Refused) as caught:
        await getattr(doors.service, verb)(body)
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize("login", ["*", "a.b", "x" * 64 + "\n"])
async def test_what_is_no_id_is_no_key_of_the_bucket(login: str, doors: Doors) -> None:
    """`*` would be answered with somebody's login."""
    await doors.start()

    async def never(key: str) -> BucketEntry | None:
        raise AssertionError(key)

    doors.bucket.get = never  # type: ignore[method-assign]
    with pytest.raises(Refused):
        await doors.records.read(login)


async def test_logins_of_one_sandbox_are_bounded(doors: Doors) -> None:
    logins = [await doors.start() for _ in range(OPEN_PER_SANDBOX)]
    with pytest.raises(Refused, match="open"):
        await doors.start()
    await doors.start("s2")
    await doors.ask("cancel", LoginQuery(login=logins[0].login))
    await doors.start()


async def test_a_login_cannot_be_guessed(doors: Doors) -> None:
    idents = {(await doors.start(f"s{n}")).login for n in range(10)}
    assert len(idents) == 10
    assert all(len(base64.urlsafe_b64decode(ident)) == 18 for ident in idents)


async def test_no_secret_of_a_login_is_stored_in_clear_published_or_logged() -> None:
    doors = Doors()
    doors.ilink.codes.append(QrCode("HANDLE-1", "https://q/HANDLE-1"))
    with capture_logs() as logs:
        login = await doors.start()
        assert login.qrcode_url == "https://q/HANDLE-1"
        doors.ilink.happens("HANDLE-1", "need_verifycode")
        await asyncio.sleep(1)
        await doors.verify(login, "987654321")
        stored = [entry.value or b"" for entry in doors.bucket.entries.values()]
        doors.ilink.happens("HANDLE-1", "scaned", CONFIRMED)
        await asyncio.sleep(5)
    assert (await doors.status(login)).status == "confirmed"
    stored += [entry.value or b"" for entry in doors.bucket.entries.values()]
    stored += [kept.stored.data for kept in doors.bench.bus.kept]
    for secret in (b"HANDLE-1", b"SECRET", b"987654321"):
        assert not any(secret in data for data in stored), secret
        assert secret.decode() not in str(logs)
    assert login.login not in str(logs)


async def test_a_bind_that_was_sealed_for_a_login_is_good_for_nothing_else() -> None:
    doors = Doors()
    await doors.start()
    doors.ilink.happens("q1", CONFIRMED)
    await asyncio.sleep(3)
    (bind,) = doors.binds()
    for sandbox, bot in (("s2", BOT), ("s1", "b2@im.bot")):
        body = msgspec.json.encode(msgspec.structs.replace(bind, id="again", bot=bot))
        doors.bench.bus.put(doors.bench.names.said("bind", sandbox), body, {})
        await asyncio.sleep(1)
        receipt = doors.bench.bus.receipts("bind")[-1]
        assert (receipt.command, receipt.outcome, receipt.reason) == ("again", "refused", "token_key")
