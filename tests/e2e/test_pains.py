"""Twenty things that users of other bridges suffer from, each as one test of this one.

The list is the field's and stays whole, although other tests show most of it. Everything is real: an adapter process,
a nats-server, iLink's simulator over sockets.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import BindingEvent, ImageItem, Login, Receipt, VoiceItem
from adapter.contract.names import H_HEIGHT, H_MIME, H_WIDTH
from adapter.simulator import BotRecord, FaultRule, samples
from tests.e2e.reading import arrived, inbox
from tests.e2e.test_commands import final_of
from tests.e2e.world import (
    NAMES,
    SOON,
    AdapterProcess,
    World,
    eventually,
    free_port,
    read_media,
    stream,
    until,
    world,
)

pytestmark = pytest.mark.slow  # most of it is shown elsewhere, in parts


class Scene(NamedTuple):
    """One person, their bot, their sandbox `s1`, and an adapter between them."""

    made: World
    nc: Client
    bot: BotRecord
    adapter: AdapterProcess
    port: int

    async def says(self, text: str) -> None:
        """The person writes, and the message is on the bus."""
        before = len(await inbox(self.nc, "s1"))
        self.made.say("s1", text)
        await arrived(self.nc, "s1", before + 1)

    async def sends(self, ident: str, **body: Any) -> None:
        """The sandbox says something, as the command `ident`."""
        payload = msgspec.json.encode(body or {"text": ident})
        await self.nc.jetstream().publish(NAMES.out("s1"), payload, headers={"Nats-Msg-Id": ident})

    async def final(self, ident: str) -> Receipt:
        return await final_of(self.made, ident)

    async def parked(self, *idents: str) -> list[Receipt]:
        """The `parked` receipts of these commands, once all are there."""
        found: list[Receipt] = []

        async def are_there() -> bool:
            found[:] = [r for r in await self.made.receipts(self.nc) if r.outcome == "parked" and r.command in idents]
            return {r.command for r in found} == set(idents)

        await eventually(are_there, f"{idents} are parked")
        return found

    async def events(self, kind: str, sandbox: str = "s1") -> list[dict[str, Any]]:
        stored = await stream(self.nc, NAMES.stream_event, NAMES.event(sandbox, kind))
        return [msgspec.json.decode(data) for _, data in stored]

    async def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first event that says all of `fields`, once it is there."""
        found: list[dict[str, Any]] = []

        async def is_there() -> bool:
            found[:] = [e for e in await self.events(kind) if fields.items() <= e.items()]
            return bool(found)

        await eventually(is_there, f"a {kind} event says {fields}")
        return found[0]

    def shown(self) -> list[str]:
        """The texts on the phone."""
        return [shown.text for shown in self.made.sim.phone(self.bot.user)]

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels, without the prefix."""
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://127.0.0.1:{self.port}/metrics")).text
        return {m[1]: float(m[2]) for m in re.finditer(r"^wechat_adapter_(\S+) (\S+)$", text, re.MULTILINE)}


@contextlib.asynccontextmanager
async def scene(folder: Path, environ: dict[str, str] | None = None, **settings: Any) -> AsyncIterator[Scene]:
    """`settings`: as of `world`."""
    port = free_port()
    async with world(folder, environ=environ, **settings) as made:
        adapter = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{port}")
        nc = await made.nc()
        bot = made.sim.add_bot()
        await made.bind(nc, "s1", bot)
        yield Scene(made, nc, bot, adapter, port)


async def test_pain_01_what_is_said_after_hours_of_silence_waits_for_the_user(tmp_path: Path) -> None:
    async with scene(tmp_path, {"WECHAT_NATS_WINDOW_HOURS": "0.001"}) as s:  # 3.6 seconds
        await s.says("hello")
        (said,) = await arrived(s.nc, "s1", 1)
        assert said.window.remaining == 10
        closes_ms = said.window.closes_at_ms or 0
        await until(lambda: time.time() * 1000 > closes_ms, "the window has closed")
        for number in range(3):
            await s.sends(f"c{number}")
        assert {r.reason for r in await s.parked("c0", "c1", "c2")} == {"window_closed"}
        assert s.shown() == []
        await s.says("what's new?")
        for number in range(3):
            assert (await s.final(f"c{number}")).outcome == "accepted"
        assert "\n".join(s.shown()).split() == ["c0", "c1", "c2"]


async def test_pain_02_what_ilink_refuses_is_never_called_sent(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.says("hello")
        await s.sends("good")
        good = await s.final("good")
        assert (good.outcome, good.message_ids) == ("accepted", [s.made.sim.sends(s.bot.bot)[0].message_id])
        s.made.sim.set_fault(FaultRule(fault="F11", bot=s.bot.bot, count=1))
        await s.sends("throttled", text="throttled", when_closed="refuse")
        await s.sends("stranger", text="stranger", user="o9cqNOBODY@im.wechat", when_closed="refuse")
        throttled, stranger = await s.final("throttled"), await s.final("stranger")
        assert (throttled.outcome, throttled.reason, throttled.ret) == ("refused", "throttled", -2)
        assert (stranger.outcome, stranger.reason) == ("refused", "not_bound")
        assert s.shown() == ["good"]


async def test_pain_03_success_without_a_message_id_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        s.made.sim.set_fault(FaultRule(fault="F13", bot=s.bot.bot))
        await s.says("hello")
        await s.sends("c")
        receipt = await s.final("c")
        assert (receipt.outcome, receipt.message_ids, receipt.ret) == ("accepted_unconfirmed", [], 0)
        assert len(s.made.sim.sends(s.bot.bot)) == 1
        metrics = await s.metrics()
        assert metrics['outbound_messages_total{kind="text",outcome="accepted_unconfirmed",reason="none"}'] == 1


async def test_pain_04_minus_2_is_one_state_with_its_raw_answer_until_the_user_writes(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.says("hello")
        for number, errmsg in enumerate(("prepare failed", "unknown error", "rate limited", None)):
            s.made.sim.set_fault(FaultRule(fault="F11", bot=s.bot.bot, count=1, params={"errmsg": errmsg}))
            await s.sends(f"c{number}")
            (parked,) = await s.parked(f"c{number}")
            assert (parked.reason, parked.ret or parked.errcode, parked.errmsg) == ("throttled", -2, errmsg or "")
            await s.says(f"and {number}?")
            assert (await s.final(f"c{number}")).outcome == "accepted"
        assert s.shown() == ["c0", "c1", "c2", "c3"]
        assert "prepare failed" in s.adapter.log.read_text()  # iLink's own words, for whoever reads the log


async def test_pain_05_after_ten_replies_the_rest_waits_is_merged_and_the_sandbox_knows(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.says("hello")
        idents = [f"c{number}" for number in range(16)]
        for ident in idents:
            await s.sends(ident)
        left = [(await s.final(ident)).window.remaining for ident in idents[:10]]
        assert left == list(range(9, -1, -1))
        assert {r.reason for r in await s.parked(*idents[10:])} == {"quota"}
        assert len(s.shown()) == 10
        assert s.shown()[-1] == "c9"
        await s.says("go on")
        for ident in idents[10:]:
            assert (await s.final(ident)).outcome == "accepted"
        assert "\n".join(s.shown()[10:]).split() == idents[10:]
        assert len(s.shown()) == 11  # one message for the six
        assert s.made.sim.violations(kind="quota_exceeded") == []


async def test_pain_06_a_throttle_is_not_prolonged_by_retries(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.says("hello")
        s.made.sim.set_fault(FaultRule(fault="F12", bot=s.bot.bot, params={"penalty_s": 3600}))
        for number in range(5):
            await s.sends(f"c{number}")
        await s.parked(*(f"c{number}" for number in range(5)))
        assert len(s.made.sim.sends(s.bot.bot)) == 1  # one attempt met the throttle, the rest stayed quiet
        s.made.sim.advance(3601)
        await s.says("still there?")
        for number in range(5):
            assert (await s.final(f"c{number}")).outcome == "accepted"
        assert "\n".join(s.shown()).split() == [f"c{number}" for number in range(5)]


async def test_pain_07_a_dead_login_is_published_and_nothing_is_called_any_more(tmp_path: Path) -> None:
    async with scene(tmp_path, parts=SOON) as s:
        await s.says("hello")
        s.made.sim.kill_token(s.bot.bot)
        event = BindingEvent(**(await s.event("binding", change="needs_login")))
        assert event.reason
        assert "QR" in event.detail
        before = {call.endpoint: call.count for call in s.made.sim.calls(s.bot.bot)}
        await s.sends("later")
        (parked,) = await s.parked("later")
        assert parked.reason == "needs_login"
        assert {call.endpoint: call.count for call in s.made.sim.calls(s.bot.bot)} == before


async def test_pain_08_a_login_is_renewed_over_the_bus_and_starts_again(tmp_path: Path) -> None:
    async with scene(tmp_path, parts=SOON) as s:
        await s.says("hello")
        s.made.sim.kill_token(s.bot.bot)
        await s.event("binding", change="needs_login")
        await s.sends("kept")
        await s.parked("kept")
        login = await ask(s.nc, "login.start", Login, sandbox="s1", png=True)
        assert login.qrcode_url.startswith("https://")
        assert login.qrcode_text
        assert base64.b64decode(login.qrcode_png).startswith(b"\x89PNG")
        (code,) = s.made.sim.qrcodes()
        s.made.sim.confirm(code.qrcode, s.bot.user)
        event = await s.event("login", status="confirmed")
        assert event["bot"] != s.bot.bot
        await until(lambda: bool(s.made.sim.polls(event["bot"]).records), "the new bot is polled")
        assert s.made.sim.polls(event["bot"]).records[0].cursor == ""
        s.made.sim.say(event["bot"], "I am back")
        assert (await s.final("kept")).bot == event["bot"]
        assert s.shown() == ["kept"]


async def test_pain_09_a_code_is_renewed_before_it_dies_and_every_step_is_published(tmp_path: Path) -> None:
    async with scene(tmp_path, parts={"login_refresh_s": 1}, qr_hold_ms=200) as s:
        login: Login = await ask(s.nc, "login.start", Login, sandbox="s2")
        await until(lambda: len(s.made.sim.qrcodes()) >= 2, "a second code is there")

        async def is_renewed() -> bool:
            now: Login = await ask(s.nc, "login.status", Login, login=login.login)
            return now.qrcode_url != login.qrcode_url

        await eventually(is_renewed, "the new code is to be had")
        newest = s.made.sim.qrcodes()[-1].qrcode
        s.made.sim.require_verify(newest, "4711")
        s.made.sim.scan(newest)

        async def steps() -> list[str]:
            return [event["status"] for event in await s.events("login", "s2")]

        async def is_asked() -> bool:
            return "need_verify_code" in await steps()

        await eventually(is_asked, "the digits are asked for")
        await ask(s.nc, "login.verify", Login, login=login.login, code="4711")

        async def is_scanned() -> bool:
            return "scanned" in await steps()

        await eventually(is_scanned, "the digits are taken")
        s.made.sim.confirm(newest)

        async def is_confirmed() -> bool:
            return "confirmed" in await steps()

        await eventually(is_confirmed, "the login is confirmed")
        assert [step for step, _ in itertools.groupby(await steps())] == [
            "wait",
            "need_verify_code",
            "scanned",
            "confirmed",
        ]


async def test_pain_10_one_bot_in_trouble_leaves_the_others_alone(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        others = {f"t{number}": s.made.sim.add_bot() for number in range(30)}
        for sandbox, bot in others.items():
            await s.made.bind(s.nc, sandbox, bot)
        for fault in ("F1", "F3", "F6"):
            s.made.sim.set_fault(FaultRule(fault=fault, bot=s.bot.bot, probability=0.3))
        s.made.sim.set_fault(FaultRule(fault="F5", bot=others["t0"].bot, endpoint="sendmessage"))
        for sandbox in others:
            s.made.say(sandbox, f"hello from {sandbox}")
            await s.made.command(s.nc, sandbox, f"{sandbox}.answer")
        quick = {sandbox: bot for sandbox, bot in others.items() if sandbox != "t0"}
        await until(
            lambda: all(len(s.made.sim.phone(bot.user)) == 1 for bot in quick.values()), "the others are answered"
        )


async def test_pain_11_two_replicas_never_poll_one_bot_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        second = await s.made.add_adapter()
        await until(lambda: "adapter.started" in second.log.read_text(), "the second replica runs")
        for number in range(10):
            await s.says(f"message {number}")
        s.adapter.signal(19)  # SIGSTOP: it is paused, not dead, and the other takes over
        await until(lambda: "lease.expired" in second.log.read_text(), "the second replica takes over")
        await s.says("to the second")
        s.adapter.signal(18)  # SIGCONT
        await s.says("and now?")
        stats = s.made.sim.stats()
        assert (stats.poll_overlaps, stats.redelivered) == (0, 0)
        assert [m.text for m in await inbox(s.nc, "s1")] == s.made.said["s1"]


async def test_pain_12_copies_of_a_message_arrive_once_and_repeated_words_twice(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        await s.says("ok")
        first = s.made.sim.inbound(s.bot.bot)[-1]
        for change in ("same", "message_id", "no_message_id", "empty_message_id", "context_token", "ids"):
            s.made.sim.repeat(s.bot.bot, first.message_id, change)
        s.made.sim.replay(s.bot.bot, 1)
        s.made.sim.advance(8)
        await s.says("ok")  # the same words, meant
        await s.says("the end")
        assert [m.text for m in await inbox(s.nc, "s1")] == ["ok", "ok", "the end"]


async def test_pain_13_a_crash_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path, cursor_mode="cursor_replay") as s:
        for number in range(5):
            for part in range(4):
                s.made.say("s1", f"message {number}.{part}")
                await s.made.command(s.nc, "s1", f"c{number}.{part}")
            await s.adapter.kill()
            await s.adapter.start()
        await s.made.settle(s.nc)
        assert [m.text for m in await inbox(s.nc, "s1")] == s.made.said["s1"]
        words = "\n".join(s.shown()).replace("answer ", "").split()
        assert words == s.made.sent["s1"]


async def test_pain_14_a_poll_that_hangs_for_ever_is_noticed_and_its_connection_renewed(tmp_path: Path) -> None:
    async with scene(tmp_path, hint_ms=500) as s:
        await s.says("hello")
        polls = s.made.sim.polls(s.bot.bot).total
        await until(lambda: s.made.sim.polls(s.bot.bot).total > polls + 3, "idle polls confirm the hint")
        s.made.sim.set_fault(FaultRule(fault="F5", bot=s.bot.bot, endpoint="getupdates", count=3))
        s.made.sim.cut_polls(s.bot.bot)
        await until(lambda: "poll.dead_path" in s.adapter.log.read_text(), "the dead path is told")
        metrics = await s.metrics()
        assert metrics['polls_total{outcome="client_timeout"}'] >= 3
        await s.says("are you there?")  # over a new connection


async def test_pain_15_a_long_text_is_cut_where_people_would_and_into_few_messages(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * 150 for number in range(10)]
    code = "```python\n" + "print('hello')\n" * 100 + "```"
    text = "\n\n".join([*paragraphs, code])
    async with scene(tmp_path) as s:
        await s.says("tell me")
        await s.sends("long", text=text)
        receipt = await s.final("long")
        assert receipt.outcome == "accepted"
        assert len(receipt.message_ids) == len(s.shown()) == -(-len(text) // 1800)
        for part in s.shown():
            assert part.count("```") % 2 == 0
        for paragraph in paragraphs:
            assert any(paragraph.strip() in part for part in s.shown())


async def test_pain_16_markdown_arrives_unchanged_and_less_than_hides_nothing(tmp_path: Path) -> None:
    text = "# Title\n\nNow <80%, **fine**: `a < b`, [a link](https://example.org)\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    async with scene(tmp_path) as s:
        await s.says("hello")
        await s.sends("rich", text=text)
        await s.final("rich")
        assert s.shown() == [text.replace("<80", "＜80")]


async def test_pain_17_media_arrive_whole_go_out_openable_and_never_stop_the_polls(tmp_path: Path) -> None:
    picture = samples.png(64, 48)
    async with scene(tmp_path) as s:
        for key_form in ("usual", "hex", "raw_base64", "hex_base64", "none"):
            s.made.sim.say_media(s.bot.bot, "image", picture, key_form=key_form)
        s.made.say("s1", "five pictures")
        *pictures, _ = await arrived(s.nc, "s1", 6)
        for message in pictures:
            (item,) = message.items
            assert isinstance(item, ImageItem)
            assert item.media is not None
            got = await read_media(s.nc, "s1", item.media.object)
            assert [got.headers[name] for name in (H_MIME, H_WIDTH, H_HEIGHT)] == ["image/png", "64", "48"]
            assert got.data == picture
            name = item.media.object
        await s.sends("back", items=[{"kind": "image", "media": {"object": name}, "caption": "yours"}])
        assert (await s.final("back")).outcome == "accepted"
        text, image = s.made.sim.phone(s.bot.user)
        assert text.text == "yours"
        assert image.media
        assert image.media[0].viewable
        assert s.made.sim.media_content(image.media[0].reference) == picture

        s.made.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download"))
        s.made.sim.say_media(s.bot.bot, "image", picture)
        polls = s.made.sim.polls(s.bot.bot).total
        await until(lambda: s.made.sim.polls(s.bot.bot).total > polls + 1, "polls go on during a download")
        s.made.say("s1", "after it")
        late, after = (await arrived(s.nc, "s1", 8))[-2:]
        assert after.text == "after it"
        s.made.sim.clear_faults()
        (item,) = late.items
        assert isinstance(item, ImageItem)
        assert item.media is not None
        assert (await read_media(s.nc, "s1", item.media.object)).data == picture


async def test_pain_18_voice_comes_with_its_sound_and_transcript_and_goes_out_as_a_file(tmp_path: Path) -> None:
    silk = samples.silk()
    async with scene(tmp_path) as s:
        s.made.sim.say_media(s.bot.bot, "voice", silk, text="good morning")
        s.made.say("s1", "the end")
        message, _ = await arrived(s.nc, "s1", 2)
        assert message.text == "good morning"
        (item,) = message.items
        assert isinstance(item, VoiceItem)
        assert item.transcript == "good morning"
        assert item.media is not None
        assert item.wav is not None
        assert (await read_media(s.nc, "s1", item.media.object)).data == silk
        wav = (await read_media(s.nc, "s1", item.wav.object)).data
        assert (wav[:4], wav[8:12], item.wav.mime) == (b"RIFF", b"WAVE", "audio/wav")
        await s.sends("voice", items=[{"kind": "voice", "media": {"object": item.wav.object}}])
        assert (await s.final("voice")).outcome == "accepted"
        (shown,) = s.made.sim.phone(s.bot.user)
        assert [(media.kind, media.viewable) for media in shown.media] == [("file", True)]


async def test_pain_19_typing_is_shown_renewed_taken_back_and_never_in_the_way(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as s:
        sim = s.made.sim
        sim.set_fault(FaultRule(fault="F26", bot=s.bot.bot, count=1))
        await s.says("hello")
        await s.sends("early", typing="on")
        await s.sends("unhindered")
        assert (await s.final("unhindered")).outcome == "accepted"

        await until(lambda: not sim.typing(s.bot.user).on, "nothing is shown")
        await s.says("again")
        await s.sends("on", typing="on")
        await until(lambda: sim.typing(s.bot.user).on_calls > 1, "it is shown and renewed")
        await s.sends("next")
        await until(lambda: not sim.typing(s.bot.user).on, "the answer takes it back")


async def test_pain_20_one_can_see_what_happens_and_no_secret_with_it(tmp_path: Path) -> None:
    async with scene(tmp_path, {"WECHAT_NATS_LOG": "debug"}) as s:
        await s.says("canary-question")
        await s.sends("good", text="canary-answer")
        await s.sends("bad", text="")
        await s.final("good")
        refused = await s.final("bad")
        assert (refused.outcome, refused.reason) == ("refused", "invalid")
        assert refused.detail
        log = s.adapter.log.read_text()
        metrics = await s.metrics()
        assert metrics['inbound_messages_total{kind="text",outcome="published"}'] == 1
        assert metrics['outbound_messages_total{kind="text",outcome="accepted",reason="none"}'] == 1
        assert metrics['outbound_messages_total{kind="unreadable",outcome="refused",reason="invalid"}'] == 1
        ended = [metrics[f'receipts_total{{outcome="{each}"}}'] for each in ("applied", "accepted", "refused")]
        assert (metrics["outbound_received_total"], ended) == (3, [1, 1, 1])
        for secret in ("canary", s.bot.token.partition(":")[2], s.made.sim.inbound(s.bot.bot)[0].context_token):
            assert secret not in log


async def ask(nc: Client, verb: str, kind: type[Any], **query: Any) -> Any:
    """A request to the service."""
    answer = await nc.request(NAMES.svc(verb), msgspec.json.encode(query), timeout=20)
    assert "Nats-Service-Error" not in (answer.headers or {}), answer.headers
    return msgspec.json.decode(answer.data, type=kind)
