"""`acceptance`, with a scripted person who answers by what the simulated phone shows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len

from adapter.cli.acceptance import COMPARED, FIRST, INTRODUCTION, MARKS, STEPS
from adapter.cli.acceptance_report import PAGE, Result, findings, part_limits, settings
from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats, adapter_running
from adapter.settings import Settings, read_settings
from adapter.simulator import FaultRule, Simulator, SimulatorSettings
from tests.cli.process import Running, started, until
from tests.test_docs import ROOT, anchors

START_S = 60.0
PROMPT = re.compile(r"(?s)(.*?)(?:  \? ([^\n]*) \[[^\n]*\] $|  > ([^\n]*)\n)")
SAID = "what nobody else reads"
COMMAND_S = 100.0


class Bridge:
    """The adapter, which can be stopped and started."""

    def __init__(self, url: str, sim: Simulator) -> None:
        self.usual = msgspec.structs.replace(demo_settings(url, sim.url), send_gap_ms=20)
        asked = read_settings(dict(re.findall(r"(WECHAT_NATS_\w+)=(\S+)", INTRODUCTION)))
        names = ("part_chars", "part_bytes", "sends_per_window", "window_hours")
        self.settings = msgspec.structs.replace(self.usual, **{name: getattr(asked, name) for name in names})
        """Of an adapter that holds nothing back, as the command asks for it."""
        self._running = contextlib.AsyncExitStack()

    async def start(self, settings: Settings | None = None) -> None:
        running = adapter_running(settings or self.settings, start_s=START_S, drain_s=START_S)
        await self._running.enter_async_context(running)

    async def stop(self) -> None:
        await self._running.aclose()


class Person:
    """Has a phone, reads the terminal and types."""

    def __init__(self, sim: Simulator, bridge: Bridge, process: Running, ends_at: str) -> None:
        self.sim, self.bridge, self.process, self.ends_at = sim, bridge, process, ends_at
        self.read = ""

    @property
    def user(self) -> str:
        return self.sim.bots()[-1].user

    def says(self, text: str) -> None:
        self.sim.say(self.user, text)

    async def follow(self) -> None:
        """Until the command ends."""
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        left = ""
        while block := await self.process.stdout.read(4096):
            text = block.decode()
            self.read += text
            left += text
            while match := PROMPT.match(left):
                left = left[match.end() :]
                if "Scan this code" in match[1]:
                    self.sim.confirm(self.sim.qrcodes()[-1].qrcode)
                if match[3]:
                    await self.acts(match[3])
                    continue
                if self.ends_at and self.ends_at in match[2]:
                    os.kill(self.process.pid, signal.SIGINT)
                    continue
                self.process.stdin.write(f"{await self.answers(match[2])}\n".encode())
            if "Scan this code" in left:
                self.sim.confirm(self.sim.qrcodes()[-1].qrcode)
                left = left.replace("Scan this code", "")

    async def acts(self, request: str) -> None:
        """Does what the command asks for."""
        if sent := re.search("Send the bot a (?:short )?(picture|file|video)", request):
            self.sim.say_media(self.user, {"picture": "image"}.get(sent[1], sent[1]))
        elif "microphone" in request:
            self.sim.say_kind(self.user, "voice_transcript")
        elif "Then write a word" in request:
            (first,) = [shown for shown in self.sim.phone(self.user) if shown.text == FIRST]
            self.sim.say_kind(self.user, "quote_full", of=first.message_id)
            self.says("one more, which nobody asked for")
        elif "Stop the adapter" in request:
            await self.bridge.stop()
        elif "Start the adapter" in request:
            await self.bridge.start()
        elif said := re.search("Write (?:“(.*)”|a word)", request):
            self.says(said[1] or SAID)

    async def answers(self, question: str) -> str:
        """By what the phone shows."""
        if "upgrade" in question:
            return "ny"[any("upgrade" in code.phone for code in self.sim.qrcodes())]
        shown = self.sim.phone(self.user)
        last = shown[-1] if shown else None
        words = re.search("“(.*)”", question)
        if "It is stopped" in question:
            self.says("one")
            return ""
        if "sends a message" in question:
            return ""
        if last is None:
            return "n"
        if "last whole number" in question:
            return str(re.findall(r"(?<!\d)\d{4}(?!\d)", last.text)[-1])
        if "How many of the eleven" in question:
            return str(sum(bool(re.match(r"\d+ of 11", one.text)) for one in shown))
        if "scroll to its end" in question:
            return "ny"[last.text.endswith("⟂END")]
        if "in bold" in question:
            return "ny"[last.text == COMPARED.translate(str.maketrans("<>", "＜＞"))]
        if MARKS in question:
            return "ny"[last.text == MARKS]
        if "is typing" in question:
            await until(lambda: self.sim.typing(self.user).on)  # a person needs longer than the request
            return "y"
        if "stripes" in question or "come back" in question or "came back" in question:
            return "ny"[last.media[-1].viewable]
        if "file.txt" in question:
            (file,) = last.media
            content = self.sim.media_content(file.reference).decode()
            return "ny"[file.file_name == "file.txt" and content == "⟂END"]
        if "a line of its own" in question:
            return "ny"["\nsecond line" in last.text]
        assert words, question
        return "ny"[words[1] in last.text]


@contextlib.asynccontextmanager
async def world(server: EmbeddedNats, **settings: Any) -> AsyncIterator[tuple[Simulator, Bridge]]:
    async with Simulator(SimulatorSettings(hold_ms=300, hint_ms=300, qr_hold_ms=300, **settings)) as sim:
        bridge = Bridge(server.url, sim)
        await bridge.start()
        try:
            yield sim, bridge
        finally:
            await bridge.stop()


async def walked(sim: Simulator, bridge: Bridge, folder: Path, *options: str, ends_at: str = "") -> Person:
    """A person who goes through all steps that are left, or up to a question."""
    async with started("acceptance", "s1", "--out", str(folder), *options) as process, asyncio.timeout(COMMAND_S):
        person = Person(sim, bridge, process, ends_at)
        await person.follow()
        assert process.stderr is not None
        assert (await process.stderr.read(), await process.wait()) == (b"", 130 if ends_at else 0)
    return person


class ReadReport:
    """What the files say."""

    def __init__(self, folder: Path) -> None:
        files = [folder / "acceptance-s1.json", folder / "acceptance-s1.md"]
        assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
        raw, words = (file.read_text() for file in files)
        self.text = raw + words
        self.statuses = {name: step["status"] for name, step in msgspec.json.decode(raw)["steps"].items()}
        self.settings = dict(re.findall(r"\| `(\w+)` \| (.*?) \|", words))
        self.findings = re.findall(r"- \[(.*)\]\(.*\): \*\*(\w+)\*\*: (.*)\.", words)


CUTS: dict[str, tuple[dict[str, int], tuple[str, str], str]] = {
    "2048-bytes": ({"cut_bytes": 2048}, ("2040", "2040"), "shown: no, cut near 1,020 characters, 2,040 bytes"),
    "2000-characters": ({"cut_chars": 2000}, ("2000", "16384"), "shown: no, cut near 2,000 characters, 4,000 bytes"),
}
"""What the phone shows of a text, the settings that follow, and what is said of the Chinese text."""


@pytest.mark.parametrize("variant", CUTS)
async def test_a_report_follows_from_what_the_phone_shows(variant: str, server: EmbeddedNats, tmp_path: Path) -> None:
    simulated, parts, said = CUTS[variant]
    async with world(server, **simulated) as (sim, bridge):
        person = await walked(sim, bridge, tmp_path)
        (bot,) = sim.bots()
        shown = sim.phone(bot.user)
    report = ReadReport(tmp_path)
    assert report.statuses == {name: "done" for name in STEPS if name != "late"}
    assert (report.settings["WECHAT_NATS_PART_CHARS"], report.settings["WECHAT_NATS_PART_BYTES"]) == parts
    assert report.settings["WECHAT_NATS_SENDS_PER_WINDOW"] == "10"
    assert report.settings["WECHAT_NATS_ILINK_VERSION"] == bridge.settings.ilink_version
    assert ("Known numbers", "measured", f"4,000 characters, half Chinese, {said}") in report.findings
    assert ("Rules for outbound messages", "refuted", "Underscores as Markdown, shown: yes") in report.findings
    refusal = "send number 11 was refused (reason throttled, ret -2, errmsg prepare failed); the phone shows 10"
    assert ("Refused sends", "confirmed", refusal) in report.findings
    for words in ("Video, arrived: yes", "Voice, has transcript: yes", "Quote, words known: yes"):
        assert words in [found[2] for found in report.findings]
    for words in ("Eleven sends, opened by a message: yes", "Restart, came once: yes", "Restart, goes on: yes"):
        assert words in [found[2] for found in report.findings]
    typed = re.sub(r"( \? .*?\[\S+\] )", r"\1y\n", person.read.partition("[2/16]")[2])
    assert [line for line in typed.replace(str(tmp_path), ".").splitlines() if cell_len(line) > 80] == []
    for secret in (bot.bot, bot.user, SAID, *(one.message_id for one in shown)):
        assert secret not in report.text


async def test_it_goes_on_where_it_stopped(server: EmbeddedNats, tmp_path: Path) -> None:
    """With an adapter that holds back what it usually does, then with one that does not; and a day later. The phone
    shows all."""
    async with world(server) as (sim, bridge):
        await bridge.stop()
        await bridge.start(bridge.usual)
        first = await walked(sim, bridge, tmp_path, ends_at="is typing")
        report = ReadReport(tmp_path)
        held = {"text-2100": "held back", "text-4000": "held back"}
        assert report.statuses == dict.fromkeys(("login", "first", "compared", "markdown", "newline"), "done") | held
        assert "WECHAT_NATS_PART_CHARS" not in report.settings
        assert "The report is in" in first.read
        await bridge.stop()
        await bridge.start()
        second = await walked(sim, bridge, tmp_path)
        assert ReadReport(tmp_path).statuses == {name: "done" for name in STEPS if name != "late"}
        assert "[2/16]" not in second.read
        sim.advance(25 * 3600)
        await walked(sim, bridge, tmp_path, "--late")
    report = ReadReport(tmp_path)
    assert set(report.statuses.values()) == {"done"}
    refusal = "0.0 h after the last message a send was refused (reason throttled, ret -2, errmsg prepare failed)"
    assert ("Refused sends", "refuted", refusal) in report.findings  # the adapter's clock was not advanced
    assert report.settings["WECHAT_NATS_WINDOW_HOURS"] == "below 0.0"
    assert ("Known numbers", "measured", "4,000 characters, half Chinese, shown: yes") in report.findings
    assert (report.settings["WECHAT_NATS_PART_CHARS"], report.settings["WECHAT_NATS_PART_BYTES"]) == ("4000", "16384")


async def test_a_phone_that_refuses_the_version_ends_it(server: EmbeddedNats, tmp_path: Path) -> None:
    async with (
        world(server, oldest_version="99.0.0", qr_ttl_s=0.3) as (sim, bridge),
        started("acceptance", "s1", "--out", str(tmp_path)) as process,
    ):
        person = Person(sim, bridge, process, "")
        await person.follow()
        assert await process.wait() == 1
        read = person.read.replace(str(tmp_path), ".")
        assert [line for line in read.splitlines() if cell_len(line) > 80] == []
    report = ReadReport(tmp_path)
    assert report.findings == [("Login", "refuted", "Login, succeeded: no")]
    assert report.settings == {"WECHAT_NATS_ILINK_VERSION": f"newer than {bridge.usual.ilink_version}"}


async def test_a_phone_that_shows_nothing_ends_it_each_time(server: EmbeddedNats, tmp_path: Path) -> None:
    """More sends do not help such a person: neither where iLink loses them, nor where it refuses them."""
    reports = []
    async with world(server) as (sim, bridge):
        for place, fault in (("[1/16]", "F13"), ("[2/16]", "F11")):
            sim.set_fault(FaultRule(fault=fault, count=-1))
            async with started("acceptance", "s1", "--out", str(tmp_path)) as process:
                person = Person(sim, bridge, process, "")
                await person.follow()
                assert await process.wait() == 1
            assert place in person.read
            assert "[3/16]" not in person.read
            reports.append(ReadReport(tmp_path))
            sim.clear_faults()
    said = ("Success without a message id", "confirmed", "First reply, `ret` 0 without an id")
    assert said in reports[0].findings
    assert reports[1].statuses == {"login": "done", "first": "refused"}


async def test_a_report_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "acceptance-s1.json"
    login = {"title": "", "section": "", "status": "done", "at_ms": 0, "facts": {"succeeded": True}}
    for damaged in (b"", msgspec.json.encode({"sandbox": "s1", "version": "1", "steps": {"login": login}})):
        path.write_bytes(damaged)
        async with started("acceptance", "s1", "--out", str(tmp_path)) as process:
            assert process.stderr is not None
            assert b"no report of this command" in await process.stderr.read()
            assert await process.wait() == 2
        assert path.read_bytes() == damaged


def test_what_no_phone_showed_sets_no_limit() -> None:
    lost = {"chars": 2100, "bytes": 2100, "shown": False, "last": 0, "last_bytes": 0}
    facts = {"text-2100": lost, "eleven": {"accepted": 0, "shown_sends": 0}}
    assert [*settings({name: Result("", "", "done", 0, found) for name, found in facts.items()})] == []


def test_a_send_a_day_later_confirms_or_refutes_the_window() -> None:
    for outcome, hours, verdict, value in (
        *(("refused", 25.0, True, 23.0), ("accepted", 25.0, False, 23.0)),
        *(("refused", 16.5, False, "below 16.5"), ("accepted", 16.5, True, 23.0)),
    ):
        sent = {"outcome": outcome, "reason": "", "ret": -2, "errcode": None, "errmsg": ""}
        steps = {
            "late": Result(
                "",
                "Refused sends",
                "done",
                0,
                {"hours": hours, "sends": [sent], "on_the_phone": "ny"[outcome == "accepted"]},
            )
        }
        assert [found[:2] for found in findings(steps)] == [("Refused sends", verdict)]
        assert [found[:2] for found in settings(steps)] == [("WECHAT_NATS_WINDOW_HOURS", value)]


def test_cuts_that_no_unit_explains_limit_both() -> None:
    ascii_, chinese = {"chars": 2100, "bytes": 2100}, {"chars": 4000, "bytes": 8000}
    only = part_limits([ascii_ | {"shown": True}, chinese | {"shown": False, "last": 3000, "last_bytes": 6000}])
    assert only[:2] == (3000, 6000)
    both = part_limits(
        [
            ascii_ | {"shown": False, "last": 1000, "last_bytes": 1000},
            chinese | {"shown": False, "last": 3000, "last_bytes": 6000},
        ]
    )
    assert both[:2] == (1000, 1000)


def test_all_steps_name_a_section_of_the_page() -> None:
    sections = {step.section for step in STEPS.values()} | {"Download", "Success without a message id"}
    assert {section.lower().replace(" ", "-") for section in sections} <= anchors(ROOT / PAGE)
