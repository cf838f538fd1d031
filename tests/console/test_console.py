"""The console over HTTP: who gets in, what is shown and escaped, what is done, and what happens without a bus."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import socket
import time
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.presence import PollerStatus, Replicas, ReplicaStatus
from adapter.console import languages, server, service
from adapter.console import pages as pages_module
from adapter.console.auth import SESSION_S, WRONG_A_MINUTE, ConsoleAuth
from adapter.console.server import MAX_BODY, Console, is_loopback
from adapter.console.service import ConsoleService
from adapter.contract.messages import LoginStart, Options
from adapter.contract.names import H_DETAIL, H_MSG_ID, H_REASON, H_SUBJECT, H_TIME_MS, H_USER
from adapter.errors import BusRefused, SettingsError, Temporary
from adapter.logins import records
from adapter.logins.records import LoginRecords, next_step
from adapter.logins.service import LoginService
from adapter.services.health import BotHealth
from adapter.tools.seal import login_context
from tests.fakes import WINDOW, Bench, FakeBucket, FakeClock, FakeLogins
from tests.hostile import UNSEEN_CHARS

TOKEN = "the token of the console"
NASTY = "<script>alert(1)</script>\"'&"


class AnyThreadsClock(FakeClock):
    """The same time as the loop's, for threads beside it."""

    def monotonic(self) -> float:
        return time.monotonic()


class FakeReplicas(Replicas):
    """Replicas that answer with what the test says."""

    def __init__(self) -> None:
        self.living = 1
        self.polls: dict[str, PollerStatus] = {}
        self.away = False

    async def query(self, bots: Sequence[str]) -> tuple[list[ReplicaStatus], int]:
        if self.away:
            raise Temporary("bus_down")
        polls = {bot: polling for bot, polling in self.polls.items() if bot in bots}
        status = ReplicaStatus(instance="r1", version="1", partitions={0: 1000}, bots=len(polls), polls=polls)
        return [status], self.living


class Office:
    """A console on fakes, and a browser without cookies of its own accord."""

    def __init__(self, browser: httpx.AsyncClient) -> None:
        self.browser = browser
        self.bench = Bench()
        self.clock = AnyThreadsClock()
        self.replicas = FakeReplicas()
        self.ilink = FakeLogins(self.bench.clock)
        self.records = LoginRecords(FakeBucket("login"), self.bench.events, self.bench.clock, self.bench.metrics)
        service = LoginService(
            self.records,
            self.ilink,
            self.bench.bindings,
            self.bench.leases,
            self.bench.presence,
            self.bench.bus,
            self.bench.receipts,
            self.bench.names,
            self.bench.sealer,
            self.bench.clock,
            self.bench.metrics,
        )
        self.started: list[LoginStart] = []

        async def start(data: bytes) -> bytes:
            answer = await service.start(data)
            self.started.append(msgspec.json.decode(data, type=LoginStart))
            return answer

        self.following = asyncio.create_task(self.records.run())
        self.handlers = {
            "login.start": start,
            "login.status": service.status,
            "login.verify": service.verify,
            "login.cancel": service.cancel,
        }

    def console(self, addr: str = "127.0.0.1:0") -> Console:
        bench, auth = self.bench, ConsoleAuth(TOKEN)
        health = BotHealth(self.replicas, bench.persons, WINDOW, self.clock)
        bus: Any = bench.bus
        service = ConsoleService(
            auth, bench.bindings, self.replicas, health, bus, bus, bench.names, self.records, self.handlers
        )
        return Console(addr, auth, service, self.clock)

    async def sign_in(self) -> None:
        answer = await self.browser.post("/signin", data={"token": TOKEN})
        assert (answer.status_code, answer.headers["Location"]) == (303, "/")

    async def proof(self, page: str = "/logins") -> str:
        found = re.search(r'name="proof" value="([0-9a-f]+)"', (await self.browser.get(page)).text)
        assert found is not None
        return found[1]

    async def post(self, path: str, **fields: str) -> httpx.Response:
        """A form of this session."""
        return await self.browser.post(path, data={"proof": await self.proof(), **fields})

    def letter(self, subject: str, data: bytes = b"{", headers: dict[str, str] | None = None) -> int:
        named = {H_SUBJECT: subject, H_REASON: "unreadable", H_TIME_MS: "1700000000000", **(headers or {})}
        return self.bench.bus.put(self.bench.names.dead_letters("WECHAT_OUT"), data, named)


@pytest.fixture
async def guest() -> AsyncIterator[Office]:
    """Nobody has signed in."""
    async with httpx.AsyncClient(trust_env=False, verify=False) as browser:
        made = Office(browser)
        made.bench.bindings.is_loaded = True
        with made.console() as console:
            browser.base_url = httpx.URL(console.url)
            yield made


@pytest.fixture
async def office(guest: Office) -> Office:
    """An operator has signed in."""
    await guest.sign_in()
    return guest


# who gets in ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/logins/" + "0" * 24, "/nowhere"])
async def test_without_the_token_there_is_only_the_way_in(guest: Office, path: str) -> None:
    await guest.bench.bind("sandbox-of-somebody")
    answer = await guest.browser.get(path)
    assert answer.status_code == 401
    assert "Sign in" in answer.text
    assert "sandbox-of-somebody" not in answer.text


@pytest.mark.parametrize("path", ["/logins", "/dead/1"])
async def test_without_the_token_nothing_can_be_done(guest: Office, path: str) -> None:
    guest.letter("wechat.out")
    answer = await guest.browser.post(
        path, data={"sandbox": "s1", "do": "drop", "proof": ConsoleAuth(TOKEN).form_proof("")}
    )
    assert answer.status_code == 403
    assert len(guest.bench.bus.found("DEAD")) == 1
    assert list(guest.records) == []


async def test_a_wrong_token_is_refused_and_logged_without_it(guest: Office) -> None:
    with capture_logs() as logs:
        answer = await guest.browser.post("/signin", data={"token": "a wrong token, 长的"})
    assert answer.status_code == 401
    assert "This is not the token." in answer.text
    assert "Set-Cookie" not in answer.headers
    (line,) = [line for line in logs if line["event"] == "console.refused"]
    assert line == {"event": "console.refused", "log_level": "warning", "peer": "127.0.0.1"}


async def test_the_cookie_is_kept_from_scripts_and_other_sites(guest: Office) -> None:
    answer = await guest.browser.post("/signin", data={"token": TOKEN})
    cookie = answer.headers["Set-Cookie"]
    assert TOKEN not in cookie
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    answer = await guest.browser.post("/signin", data={"token": TOKEN}, headers={"X-Forwarded-Proto": "https"})
    assert answer.headers["Set-Cookie"].endswith("; Secure")


async def test_signing_out_ends_it_for_who_kept_the_cookie(office: Office) -> None:
    kept = office.browser.cookies["wechat_nats_console"]
    await office.sign_in()
    assert (await office.post("/signout")).status_code == 303
    headers = {"Cookie": f"wechat_nats_console={kept}"}
    assert (await office.browser.get("/", headers=headers)).status_code == 200  # another session of the same second
    office.browser.cookies.set("wechat_nats_console", kept)
    await office.post("/signout")
    assert (await office.browser.get("/", headers=headers)).status_code == 401


async def test_who_tries_many_tokens_has_to_wait(guest: Office) -> None:
    for _ in range(WRONG_A_MINUTE):
        assert (await guest.browser.post("/signin", data={"token": "wrong"})).status_code == 401
    answer = await guest.browser.post("/signin", data={"token": TOKEN})
    assert (answer.status_code, answer.headers.get("Set-Cookie")) == (429, None)
    assert "wait a minute" in answer.text
    guest.clock.set_back_ms = -60_000
    assert (await guest.browser.post("/signin", data={"token": TOKEN})).status_code == 303


def test_a_session_ends_and_cannot_be_made_up() -> None:
    auth, now_s = ConsoleAuth(TOKEN), 1_700_000_000
    session = auth.new_session(now_s, "a")
    assert auth.is_valid_session(session, now_s + SESSION_S - 1)
    assert not auth.is_valid_session(session, now_s + SESSION_S)
    assert not ConsoleAuth("another token of some length").is_valid_session(session, now_s)
    later = f"{now_s + 10 * SESSION_S:x}.{session.partition('.')[2]}"
    for forged in ("", ".", "x", later, session[:-1], session + "0", f"{session}é"):
        assert not auth.is_valid_session(forged, now_s)
    assert auth.is_form_proof(session, auth.form_proof(session))
    assert not auth.is_form_proof(session, auth.form_proof(auth.new_session(now_s, "b")))
    assert not auth.is_form_proof(session, "")


async def test_a_form_of_another_site_or_session_does_nothing(office: Office) -> None:
    seq = office.letter("wechat.out")
    proof = await office.proof()
    for proof_sent, headers in (
        (proof, {"Origin": "https://evil.example"}),
        (proof, {"Origin": "null"}),
        ("", {}),
        (ConsoleAuth(TOKEN).form_proof("another session"), {}),
    ):
        fields = {"proof": proof_sent, "do": "drop"}
        answer = await office.browser.post(f"/dead/{seq}", data=fields, headers=headers)
        assert answer.status_code == 403
    assert len(office.bench.bus.found("DEAD")) == 1
    proxied = {"Origin": "https://console.example", "X-Forwarded-Host": "console.example"}
    assert (
        await office.browser.post(f"/dead/{seq + 1}", data={"proof": proof, "do": "drop"}, headers=proxied)
    ).status_code == 404
    own = {"Origin": str(office.browser.base_url).rstrip("/")}
    assert (await office.browser.post(f"/dead/{seq}", data={"proof": proof, "do": "drop"}, headers=own)).is_success
    assert office.bench.bus.found("DEAD") == []


@pytest.mark.parametrize("path", ["/", "/signin", "/nowhere"])
async def test_every_answer_forbids_what_a_page_does_not_need(guest: Office, path: str) -> None:
    answer = await guest.browser.get(path)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
    assert set(re.findall(r'nonce="([^"]+)"', answer.text)) == {nonce}
    assert nonce not in (await guest.browser.get(path)).text
    assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert "http://" not in answer.text.replace(str(guest.browser.base_url), "")
    assert "https://" not in answer.text


async def test_what_the_script_fetches_has_no_script_and_no_style(office: Office) -> None:
    """Its nonce would be another than that of the page which reads it."""
    page = (await office.browser.get("/", headers={"X-Part": "1"})).text
    assert 'id="live"' in page
    assert "<style" not in page
    assert "<script" not in page
    assert "<style" in (await office.browser.get("/")).text


async def test_strangers_who_send_slowly_take_no_room_of_others(guest: Office) -> None:
    async with contextlib.AsyncExitStack() as opened:
        for _ in range(40):
            _, writer = await asyncio.open_connection("127.0.0.1", guest.browser.base_url.port)
            opened.callback(writer.close)
            writer.write(b"POST /signin HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\ntoken=")
            await writer.drain()
        await guest.sign_in()


async def test_a_form_that_was_cut_does_nothing(office: Office) -> None:
    """Half a name is the name of another sandbox."""
    form = f"proof={await office.proof()}&sandbox=s1"
    session = office.browser.cookies["wechat_nats_console"]
    reader, writer = await asyncio.open_connection("127.0.0.1", office.browser.base_url.port)
    head = f"POST /logins HTTP/1.1\r\nHost: x\r\nCookie: wechat_nats_console={session}\r\n"
    writer.write(f"{head}Content-Length: {len(form) + 1}\r\n\r\n{form}".encode())
    writer.write_eof()
    assert b" 400 Bad Request" in await reader.readline()
    writer.close()
    assert list(office.records) == []


async def test_nonsense_is_refused(office: Office) -> None:
    assert (await office.browser.put("/")).status_code == 405
    assert (await office.browser.post("/logins", content=b"x" * (MAX_BODY + 1))).status_code == 413
    assert (await office.browser.post("/logins", content=b"&".join([b"a=1"] * 100))).status_code == 400
    assert (await office.browser.get("/", headers={"Cookie": "wechat_nats_console=\x01;;=,"})).status_code == 401
    assert (await office.browser.get("/nowhere")).status_code == 404
    head = await office.browser.head("/")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("host", "answer"),
    [("::1", True), ("localhost", True), ("", False), ("0.0.0.0", False)],
)
def test_what_is_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) == answer


async def test_an_address_beyond_this_machine_is_warned_of(guest: Office) -> None:
    with capture_logs() as logs, guest.console(":0"):
        pass
    assert "console.exposed" in [line["event"] for line in logs]


async def test_an_address_that_cannot_be_had_stops_the_start(guest: Office) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        console = guest.console(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SettingsError, match="WECHAT_NATS_CONSOLE_ADDR: expected an address"):
            console.__enter__()


# bindings -------------------------------------------------------------------------------------------


async def test_a_binding_with_all_that_is_known_of_it(office: Office) -> None:
    await office.bench.bind("s1", "b1@im.bot", "u1@im.wechat", token="b1@im.bot:SECRET")
    heard_ms = office.bench.clock.now_ms() - 60_000
    office.bench.hears(sends_used=2, opened_ms=heard_ms, sent_at_ms=[heard_ms])
    office.replicas.polls["b1@im.bot"] = PollerStatus(state="polling", ago_ms=4000)
    page = (await office.browser.get("/")).text
    for words in ("s1", "b1@im.bot", "u1@im.wechat", ">active<", "8 sends left", "closes in 22 h", "4 s ago", "r1"):
        assert words in page
    assert "SECRET" not in page
    assert "AARz" not in page


@pytest.mark.parametrize(
    ("fields", "polling", "words"),
    [
        ({"state": "needs_login", "reason": "stale_token"}, None, ("needs a login", "stale_token")),
        ({}, None, ("not polled", "no replica polls it", "1</b><span>not polled")),
        ({}, PollerStatus(state="retrying"), ("failing", "1</b><span>failing")),
        (
            {},
            PollerStatus(state="paused", since_ms=65_000, why="NATS accepts no writes."),
            ("paused", "writes. · for 1 min"),
        ),
    ],
)
async def test_what_is_wrong_with_a_binding_is_said(
    office: Office, fields: dict[str, Any], polling: PollerStatus | None, words: tuple[str, ...]
) -> None:
    await office.bench.bind("s1", **fields)
    if polling is not None:
        office.replicas.polls["b1@im.bot"] = polling
    page = (await office.browser.get("/")).text
    assert all(word in page for word in words)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({"opened_ms": 0}, "never open"),
        ({"sends_used": 10}, "used up"),
        ({"sends_used": 9}, "1 send left"),
    ],
)
async def test_the_window_in_words(office: Office, context: dict[str, Any], words: str) -> None:
    await office.bench.bind("s1")
    office.bench.hears(**context)
    assert words in (await office.browser.get("/")).text


async def test_a_record_of_a_newer_version_hides_no_other(office: Office) -> None:
    """In the middle of an upgrade."""
    for number in (1, 2):
        await office.bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
        office.bench.hears(f"s{number}", f"u{number}@im.wechat", newer=number == 2)
    page = (await office.browser.get("/")).text
    assert ("10 sends left" in page, page.count("of a newer version")) == (True, 1)


async def test_a_hundred_bindings_come_in_pages_the_lost_ones_first(office: Office) -> None:
    for number in range(120):
        state = "needs_login" if number == 110 else "active"
        await office.bench.bind(f"s{number:03d}", f"b{number}@im.bot", f"u{number}@im.wechat", state=state)
        office.replicas.polls[f"b{number}@im.bot"] = PollerStatus(state="polling")
    page = (await office.browser.get("/")).text
    assert re.findall(r"<b>(s\d+)</b>", page) == ["s110", *(f"s{number:03d}" for number in range(49))]
    assert "Page 1 of 3" in page
    page = (await office.browser.get("/?page=99")).text
    assert re.findall(r"<b>(s\d+)</b>", page)[-1] == "s119"
    assert "Page 3 of 3" in page
    found = (await office.browser.get("/", params={"q": "U11", "state": "polling"})).text
    assert len(re.findall(r"<b>(s\d+)</b>", found)) == 10  # u11, u111 … u119, and not the lost one
    assert "10 bindings of 120" in found
    for query in ("page=x", "page=-1", "state=wrong"):
        assert "Page 1 of 3" in (await office.browser.get(f"/?{query}")).text


async def test_everything_that_is_foreign_is_escaped(office: Office) -> None:
    """iLink names bots and users, and anybody may have made a dead letter."""
    await office.bench.bind("s1", f"b{NASTY}", f"u{NASTY}", state="needs_login", reason=NASTY)
    office.letter(f"wechat.out.{NASTY}", headers={H_REASON: NASTY, H_DETAIL: "a text of somebody"})
    for path in ("/", "/dead", f"/?q={NASTY}"):
        page = (await office.browser.get(path)).text
        assert "alert(1)" in page
        assert "<script>alert" not in page
        assert "\"'&" not in page
        assert "a text of somebody" not in page
    page = (await office.post("/logins", sandbox=NASTY)).text
    assert "alert(1)" in page
    assert "<script>alert" not in page


@pytest.mark.parametrize("unseen", UNSEEN_CHARS)
async def test_what_nobody_sees_is_shown(office: Office, unseen: str) -> None:
    await office.bench.bind("s1", f"b{unseen}", f"u{unseen}", state="needs_login", reason=unseen)
    office.letter("wechat.out.s1", headers={H_REASON: f"<{unseen}>"})
    for path in ("/", "/dead", f"/?q={unseen}"):
        page = (await office.browser.get(path)).text
        assert unseen not in page
        assert f"\\x{ord(unseen):02x}" in page


async def test_each_page_shows_the_replicas_with_what_they_own(office: Office) -> None:
    page = (await office.browser.get("/logins")).text
    assert '<b>r1</b> 1 · 0 bots, <span title="0 for 1 s">1 partition</span>' in page


async def test_a_replica_that_does_not_answer_is_missed(office: Office) -> None:
    assert "did not answer" not in (await office.browser.get("/")).text
    office.replicas.living = 2
    assert "1 of 2 replicas did not answer" in (await office.browser.get("/")).text


# dead letters ---------------------------------------------------------------------------------------


async def test_a_dead_command_is_stored_again_as_it_was(office: Office) -> None:
    about = {"traceparent": "00-1", H_MSG_ID: "dead:1", H_USER: "u1@im.wechat"}
    seq = office.letter("wechat.out.s1", b'{"text":"hi"}', about)
    page = (await office.browser.get("/dead")).text
    assert "unreadable" in page
    assert '"text"' not in page
    answer = await office.post(f"/dead/{seq}", do="retry")
    assert "is stored again on wechat.out.s1." in answer.text
    (again,) = office.bench.bus.found("OUT")
    subject = office.bench.bus.stored_subject("wechat.out.s1")
    assert (again.subject, again.data) == (subject, b'{"text":"hi","user":"u1@im.wechat"}')
    assert again.headers == {"traceparent": "00-1", H_MSG_ID: f"retry-{seq}-1700000000000"}
    assert office.bench.bus.found("DEAD") == []


async def test_what_a_user_wrote_cannot_be_tried_again(office: Office) -> None:
    seq = office.letter("wechat.inbox.s1.0123456789abcdef")
    assert "Try again" not in (await office.browser.get("/dead")).text
    answer = await office.post(f"/dead/{seq}", do="retry")
    assert answer.status_code == 400
    assert "they have to write" in answer.text
    assert len(office.bench.bus.found("DEAD")) == 1


async def test_a_letter_that_is_not_stored_again_stays(office: Office) -> None:
    seq = office.letter("wechat.out.s1", headers={H_USER: "u1@im.wechat"})
    office.bench.bus.refuse = lambda message: BusRefused(10077, "maximum messages per subject exceeded")
    answer = await office.post(f"/dead/{seq}", do="retry")
    assert (answer.status_code, "That did not work" in answer.text) == (409, True)
    assert len(office.bench.bus.found("DEAD")) == 1


async def test_a_letter_is_dropped_once(office: Office) -> None:
    seq = office.letter("wechat.out.s1")
    assert f"Letter {seq} is dropped." in (await office.post(f"/dead/{seq}", do="drop")).text
    answer = await office.post(f"/dead/{seq}", do="drop")
    assert (answer.status_code, f"no dead letter {seq}" in answer.text) == (404, True)
    assert (await office.post(f"/dead/{seq}", do="burn")).status_code == 404


async def test_old_letters_are_found_by_leafing(office: Office) -> None:
    for _ in range(60):
        office.letter("wechat.out.s1")
    page = (await office.browser.get("/dead")).text
    numbers = re.findall(r"number (\d+)", page)
    assert (numbers[0], numbers[-1], len(numbers)) == ("60", "11", 50)
    (older,) = re.findall(r'href="(/dead\?before=\d+)"', page)
    page = (await office.browser.get(older)).text
    assert re.findall(r"number (\d+)", page) == [str(number) for number in range(10, 0, -1)]
    assert "Older" not in page


# logins ---------------------------------------------------------------------------------------------


async def test_a_login_shows_its_code_and_no_secret_in_the_address(office: Office) -> None:
    answer = await office.post("/logins", sandbox="s1", auto_typing="on")
    assert answer.status_code == 303
    ((login, record),) = list(office.records)
    (asked,) = office.started
    assert (record.sandbox, asked.options) == ("s1", Options(auto_typing=True))
    place = answer.headers["Location"]
    assert login not in place
    page = (await office.browser.get(place)).text
    assert "<svg" in page
    assert login not in page
    assert "q/q1" not in page
    assert place in (await office.browser.get("/logins")).text
    answer = await office.post(f"{place}/cancel")
    assert answer.headers["Location"] == place
    page = (await office.browser.get(place)).text
    assert "Cancelled" in page
    assert "<svg" not in page
    assert place not in (await office.browser.get("/logins")).text


async def test_digits_are_handed_on_as_they_are_typed(office: Office) -> None:
    place = (await office.post("/logins", sandbox="s1")).headers["Location"]
    answer = await office.post(f"{place}/verify", digits="4711")
    assert (answer.status_code, "No digits are asked for" in answer.text) == (400, True)
    ((login, record),) = list(office.records)
    await office.records.update(login, lambda now: next_step(now, status="need_verify_code"))
    page = (await office.browser.get(place)).text
    assert "Type the digits that the phone shows." in page
    assert (await office.post(f"{place}/verify", digits=" 47 11 ")).status_code == 303
    ((_, record),) = list(office.records)
    assert office.bench.sealer.open(login_context(login, "digits"), record.digits) == "4711"
    assert "The digits are being checked." in (await office.browser.get(place)).text
    assert 'class="digits"' not in (await office.browser.get(place)).text
    await office.records.update(
        login, lambda now: next_step(now, status="need_verify_code", reason="wrong_code", digits="")
    )
    assert "type them once more" in (await office.browser.get(place)).text


async def test_a_login_that_another_person_took_than_was_bound_before_says_so(office: Office) -> None:
    place = (await office.post("/logins", sandbox="s1")).headers["Location"]
    ((login, _),) = list(office.records)
    words = {"former_user": "u0@im.wechat", "detail": "Another person than before."}
    await office.records.update(login, lambda now: next_step(now, status="confirmed", **words))
    assert '<p role="status" class="warn">Another person than before.' in (await office.browser.get(place)).text


async def test_any_replica_finds_a_login_by_its_address(office: Office) -> None:
    place = (await office.post("/logins", sandbox="s1")).headers["Location"]
    with office.console() as other:
        answer = await office.browser.get(f"{other.url}{place}")
    assert "<svg" in answer.text
    assert (await office.browser.get("/logins/" + "f" * 24)).status_code == 404


# without a bus --------------------------------------------------------------------------------------


async def test_a_bus_that_is_away_is_said_and_not_waited_for(office: Office) -> None:
    await office.bench.bind("s1")
    office.replicas.away = True
    for path in ("/", "/dead", "/logins"):
        answer = await office.browser.get(path)
        assert (answer.status_code, "The bus does not answer" in answer.text) == (503, True)


async def test_a_fault_of_ours_is_logged_and_ends_one_page_only(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    await office.bench.bind("s1")

    async def load_all(whose: object) -> None:
        raise KeyError(whose)

    monkeypatch.setattr(office.bench.persons, "load_all", load_all)
    with capture_logs() as logs:
        answer = await office.browser.get("/")
    assert answer.status_code == 500
    assert "Traceback" not in answer.text
    assert "console.crashed" in [line["event"] for line in logs]
    assert (await office.browser.get("/dead")).status_code == 200


# languages ------------------------------------------------------------------------------------------


def test_every_text_of_a_page_has_its_chinese_and_no_chinese_is_left_over() -> None:
    folder = resources.files("adapter.console")
    pages = "".join(
        page.read_text() for page in folder.joinpath("templates").iterdir() if page.name.endswith(".html")
    )
    named = set(re.findall(r'\b_\("([^"]+)"', pages))
    named |= {f"{{}} {noun}" for noun in re.findall(r'_\.count\([^"]+"([a-z]+)"\)', pages)}
    sources = "".join(
        inspect.getsource(module) for module in (server, service, pages_module, languages.Language, records)
    )
    texts = languages.CHINESE.keys()
    assert named - texts == set()
    assert {text for text in texts - named if f'"{text}"' not in sources} == {
        "Cancelled",
        "Expired",
        "Failed",
        "Lost",
    }
    assert {text: said for text, said in languages.CHINESE.items() if text.count("{}") != said.count("{}")} == {}


@pytest.mark.parametrize(
    ("given", "tag"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("fr,zh;q=0.4,en;q=0.3", "zh-CN"),
        ("de-DE, *;q=0.5", "en"),
    ],
)
async def test_a_page_is_in_the_language_that_the_browser_prefers(guest: Office, given: str, tag: str) -> None:
    page = await guest.browser.get("/", headers={"Accept-Language": given})
    assert f'<html lang="{tag}">' in page.text
    assert ("登入" in page.text) is (tag == "zh-CN")


async def test_a_link_changes_the_language_for_good(office: Office) -> None:
    page = await office.browser.get("/logins")
    assert 'href="/logins?lang=zh" lang="zh-CN">中文<' in page.text
    changed = await office.browser.get("/logins?lang=zh")
    assert (changed.status_code, changed.headers["Location"]) == (303, "/logins")
    sequence = office.letter("wechat.out.s1")
    assert "显示二维码" in (await office.browser.get("/logins")).text
    dropped = await office.post(f"/dead/{sequence}", do="drop")
    assert f"死信 {sequence} 已丢弃。" in dropped.text
    assert 'href="/dead?lang=en" lang="en">English<' in dropped.text
    elsewhere = await office.browser.get(f"{office.browser.base_url}/other.example%0d%0aX:/?lang=en")
    assert elsewhere.headers["Location"] == "/other.example%0D%0AX%3A/"
