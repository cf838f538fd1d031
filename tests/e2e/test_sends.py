"""Media and merged texts on the phone: what the sandbox gave is what the user sees, once, whatever breaks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.js.errors import KeyNotFoundError

from adapter.bridge.persons import open_state
from adapter.contract.names import person_token
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.objects import ObjectStore
from adapter.jetstream.publisher import Publisher
from adapter.ports import Pieces
from adapter.settings import Settings
from adapter.simulator import BotRecord, FaultRule, samples
from adapter.tools.metrics import Metrics
from adapter.tools.seal import Sealer
from adapter.tools.timing import SystemClock
from tests.e2e.test_commands import final_of
from tests.e2e.world import NAMES, TOKEN_KEY, World, eventually, until, world

PNG, MP4, PDF, WAV = samples.png(), samples.mp4(), samples.pdf(), samples.wav()


async def started(made: World, **environ: str) -> tuple[Client, BotRecord]:
    """One sandbox, s1, whose user has written."""
    await made.add_adapter(**environ)
    nc = await made.nc()
    bot = made.sim.add_bot()
    await made.bind(nc, "s1", bot)
    made.say("s1", "hello")
    await made.settle(nc)
    return nc, bot


async def send(made: World, nc: Client, ident: str, *items: dict[str, Any], plain: bool = False) -> None:
    """A command of s1, or of a service that speaks for it."""
    made.sent["s1"].append(ident)
    body: dict[str, Any] = {"items": list(items), "id": ident} | ({"sandbox": "s1"} if plain else {})
    subject = NAMES.out_plain if plain else NAMES.out("s1")
    await nc.jetstream().publish(subject, msgspec.json.encode(body))


def inline(kind: str, data: bytes, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "data": base64.b64encode(data).decode(), **fields}


def stored(kind: str, where: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "media": {"object": where}, **fields}


async def put(nc: Client, name: str, data: bytes) -> None:
    """As a program with nats-py, or `nats object put`, does it."""
    await (await nc.jetstream().object_store(NAMES.media)).put(name, data)


async def put_by_us(made: World, name: str, data: bytes) -> None:
    """As the adapter stores what a user sent."""

    async def pieces() -> Pieces:
        yield data

    connection = ManagedConnection(Settings(nats_url=(made.server.url,)), "test")
    publisher = Publisher(connection, SystemClock(), Metrics())
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(connection.run()), group.create_task(publisher.run())]
        await connection.wait_connected()
        await ObjectStore(connection, publisher, NAMES.media).put(name, pieces())
        for task in running:
            task.cancel()


def seen(made: World, bot: BotRecord) -> list[str | tuple[str, str, bytes]]:
    """The phone: texts, and kind, file name and bytes of what can be viewed."""
    shown: list[str | tuple[str, str, bytes]] = []
    for message in made.sim.phone(bot.user):
        if message.text:
            shown.append(message.text)
        for media in message.media:
            assert media.viewable, media.why
            content = made.sim.media_content(media.reference)
            assert (media.size, media.md5) == (len(content), hashlib.md5(content).hexdigest())
            shown.append((media.kind, media.file_name, content))
    return shown


async def test_receipts_of_a_service_name_what_it_has_stored(tmp_path: Path) -> None:
    """The copies by the router have other sequences."""
    async with world(tmp_path) as made:
        nc, _ = await started(made)
        stored, texts = {}, [f"answer {number}" for number in range(9)]
        for text in texts:
            body = msgspec.json.encode({"sandbox": "s1", "text": text})
            sequence = (await nc.jetstream().publish(NAMES.out_plain, body)).seq
            stored[str(sequence)] = sequence

        async def are_told() -> bool:
            return {receipt.command: receipt.sequence for receipt in await made.receipts(nc)} == stored

        await eventually(are_told, "each has its receipt")
        assert made.phone_texts("s1") == texts


async def test_media_of_every_kind_and_source_arrive_as_they_are(tmp_path: Path) -> None:
    """Pictures and videos have no file name in WeChat. A voice is a file, and a caption a text before."""
    big = samples.blob(3_000_000)
    async with world(tmp_path) as made:
        nc, bot = await started(made)
        await put(nc, "s1/big", big)
        await put(nc, "s1/v.mp4", MP4)
        await put_by_us(made, "s1/in/1-0", WAV)
        await put_by_us(made, "s1/in/1-1", PNG)
        await send(made, nc, "c0", inline("image", PNG, caption="look"))
        await send(made, nc, "c1", stored("video", "s1/v.mp4"))
        await send(made, nc, "c2", stored("file", "s1/big", name="../big.bin"), inline("file", PDF))
        await send(made, nc, "c3", stored("voice", "s1/in/1-0"))
        await send(made, nc, "c4", inline("image", PDF, name="no picture.pdf"), {"kind": "text", "text": "bye"})
        await made.settle(nc)
        await send(made, nc, "c5", stored("image", "s1/in/1-1"), plain=True)
        await made.settle(nc)
        assert seen(made, bot) == [
            "look",
            ("image", "", PNG),
            ("video", "", MP4),
            ("file", "big.bin", big),
            ("file", "file.pdf", PDF),
            ("file", "audio.wav", WAV),
            ("file", "no picture.pdf", PDF),
            "bye",
            ("image", "", PNG),
        ]
        receipt = await final_of(made, "c2")
        assert (receipt.outcome, len(receipt.message_ids), receipt.attempts) == ("accepted", 2, 2)
        assert made.sim.stats().violations == {}


async def test_media_of_other_sandboxes_and_absent_ones_are_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, bot = await started(made)
        await put(nc, "s2/secret", PDF)
        await send(made, nc, "other", stored("file", "s2/secret"))
        await send(made, nc, "other-plain", stored("file", "s2/secret"), plain=True)
        await send(made, nc, "absent", {"kind": "text", "text": "first"}, stored("file", "s1/none"))
        await made.settle(nc)
        for ident, reason, count in (("other", "invalid", 0), ("other-plain", "invalid", 0), ("absent", "media", 1)):
            receipt = await final_of(made, ident)
            assert (receipt.outcome, receipt.reason, len(receipt.message_ids)) == ("refused", reason, count)
        assert seen(made, bot) == ["first"]


F24: list[tuple[str, dict[str, Any], int, str, int, int]] = [
    ("rejected", {"kind": "rejected", "message": "illegal content"}, -1, "refused", 1, 0),
    ("error-three-times", {"kind": "error"}, 3, "accepted", 3, 1),
]


@pytest.mark.parametrize(
    ("params", "count", "outcome", "failures", "restarts"), [row[1:] for row in F24], ids=[row[0] for row in F24]
)
async def test_f24_uploads_wait_for_a_cdn_that_fails_and_a_refusal_is_final(
    tmp_path: Path, params: dict[str, Any], count: int, outcome: str, failures: int, restarts: int
) -> None:
    """Each try has an URL of its own. After an error iLink is told once more that the bot is there."""

    def calls(endpoint: str) -> int:
        return sum(call.count for call in made.sim.calls(bot.bot, endpoint))

    async with world(tmp_path) as made:
        nc, bot = await started(made)
        announced = calls("msg/notifystart")
        rule = made.sim.set_fault(FaultRule(fault="F24", endpoint="cdn/upload", count=count, params=params))
        await send(made, nc, "c", inline("file", PDF, caption="look"))
        await send(made, nc, "next", {"kind": "text", "text": "after"})
        await made.settle(nc)
        receipt = await final_of(made, "c")
        assert receipt.outcome == outcome
        if outcome == "refused":
            assert (receipt.reason, receipt.http_status, len(receipt.message_ids)) == ("media", 400, 1)
            assert "illegal content" in receipt.detail
        assert rule.struck == failures
        assert calls("getuploadurl") == failures + (outcome == "accepted")
        assert calls("msg/notifystart") - announced == restarts
        assert seen(made, bot) == ["look", *([("file", "file.pdf", PDF)] if outcome == "accepted" else []), "after"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_restart_between_two_parts_asks_for_neither_again(tmp_path: Path, number: signal.Signals) -> None:
    async with world(tmp_path) as made:
        nc, bot = await started(made, WECHAT_NATS_SEND_GAP_MS="2000")
        await send(made, nc, "c", *({"kind": "text", "text": text} for text in ("one", "two", "three")))

        key = f"s1.{person_token('s1', bot.user)}"

        async def one_is_noted() -> bool:
            records = await nc.jetstream().key_value(NAMES.persons)
            try:
                record = await records.get(key)
            except KeyNotFoundError:  # nothing is stored of the user yet
                return False
            head = open_state(key, record.value or b"", Sealer((base64.b64decode(TOKEN_KEY),)))[1].progress
            return head is not None and (head.part, head.unanswered_attempts) == (1, 0)

        await eventually(one_is_noted, "the first part is noted as sent")
        (adapter,) = made.adapters
        adapter.signal(number)
        await adapter.ended()
        await adapter.start()
        await made.settle(nc)
        assert seen(made, bot) == ["one", "two", "three"]
        assert made.sim.stats().duplicates_suppressed == 0
        receipt = await final_of(made, "c")
        assert (receipt.outcome, len(receipt.message_ids), receipt.attempts) == ("accepted", 3, 3)


LOST: list[tuple[str, FaultRule]] = [
    ("reset-after", FaultRule(fault="F6", endpoint="sendmessage", count=1, params={"when": "after"})),
    ("silence-after", FaultRule(fault="F5", endpoint="sendmessage", count=1, params={"processed": True})),
]


@pytest.mark.slow  # a request without an answer is repeated after a minute
@pytest.mark.parametrize("rule", [row[1] for row in LOST], ids=[row[0] for row in LOST])
async def test_f5_f6_a_media_message_without_an_answer_is_repeated_and_seen_once(
    tmp_path: Path, rule: FaultRule
) -> None:
    async with world(tmp_path) as made:
        nc, bot = await started(made, WECHAT_NATS_SEND_TIMEOUT_S="1")
        made.sim.set_fault(rule)
        await send(made, nc, "c", inline("file", PDF))
        await until(lambda: made.adapters[0].said("send.failed") == 1, "the first request has no answer")
        await made.bind(nc, "s2", made.sim.add_bot())
        made.say("s2", "hello")
        await made.command(nc, "s2", "other")  # iLink accepts a send of somebody else
        await made.settle(nc)
        assert seen(made, bot) == [("file", "file.pdf", PDF)]
        assert len(made.sim.sends(bot.bot)) == 2
        assert len({attempt.client_id for attempt in made.sim.sends(bot.bot)}) == 1
        assert sum(call.count for call in made.sim.calls(bot.bot, "getuploadurl")) == 1
        assert (await final_of(made, "c")).outcome == "accepted"


async def test_captions_and_media_count_and_what_does_not_fit_is_parked_unread(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc, bot = await started(made)
        await put(nc, "s1/x", PDF)
        for number in range(6):
            await send(made, nc, f"c{number}", stored("file", "s1/x", caption=f"{number}"))
        await until(lambda: len(made.sim.phone(bot.user)) == 10, "five of them fill the window")

        async def is_parked() -> bool:
            return [r.command for r in await made.receipts(nc) if r.outcome == "parked"] == ["c5"]

        await eventually(is_parked, "the sixth is parked")
        assert sum(call.count for call in made.sim.calls(bot.bot, "getuploadurl")) == 5
        made.say("s1", "go on")
        await made.settle(nc)
        one = ("file", "file.pdf", PDF)
        assert seen(made, bot) == [entry for number in range(6) for entry in (f"{number}", one)]
        assert made.sim.stats().violations == {}


@pytest.mark.slow
async def test_100_mb_pass_through_in_pieces(tmp_path: Path) -> None:
    """The adapter's memory grows by a fraction of what it carries."""
    size = 100_000_000
    async with world(tmp_path) as made:
        nc, bot = await started(made)
        (adapter,) = made.adapters
        assert adapter.process is not None
        await put(nc, "s1/small", samples.blob(1_000_000))
        await send(made, nc, "small", stored("file", "s1/small"))
        assert (await final_of(made, "small")).outcome == "accepted"
        data = samples.blob(size)
        await put(nc, "s1/large", data)
        before = peak_rss(adapter.process.pid)
        await send(made, nc, "large", stored("file", "s1/large"))
        await until(lambda: len(made.sim.phone(bot.user)) == 2, "it arrived", patience_s=300)
        grown = peak_rss(adapter.process.pid) - before
        (media,) = made.sim.phone(bot.user)[1].media
        assert (media.size, media.md5) == (size, hashlib.md5(data).hexdigest())
        assert grown < 40_000_000, f"{grown} bytes more"


def peak_rss(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# long texts ---------------------------------------------------------------------------------------------------

CHINESE = "".join(f"这是第{number}句话，它说到这里为止。" for number in range(300))
ENGLISH = "".join(f"This is sentence {number}, and here it ends. " for number in range(150))
CUT = [
    ("2,000 characters", {"cut_chars": 2000}, {}, CHINESE, False),
    ("2,048 bytes of English", {"cut_bytes": 2048}, {}, ENGLISH, False),
    ("2,048 bytes of Chinese", {"cut_bytes": 2048}, {}, CHINESE, True),
    ("2,048 bytes, the setting", {"cut_bytes": 2048}, {"WECHAT_NATS_PART_BYTES": "2000"}, CHINESE, False),
    ("longer parts", {"cut_chars": 2000}, {"WECHAT_NATS_PART_CHARS": "4000"}, CHINESE, True),
]


@pytest.mark.parametrize(("phone", "environ", "text", "loses"), [row[1:] for row in CUT], ids=[row[0] for row in CUT])
async def test_a_phone_that_cuts_texts_shows_all_of_parts_that_are_short_enough(
    tmp_path: Path, phone: dict[str, Any], environ: dict[str, str], text: str, loses: bool
) -> None:
    """iLink accepts them all, so that nothing but the phone tells."""
    async with world(tmp_path, **phone) as made:
        nc, bot = await started(made, **environ)
        await send(made, nc, "long", {"kind": "text", "text": text})
        receipt = await final_of(made, "long")
        assert receipt.outcome == "accepted"
        assert len(receipt.message_ids) == len(made.sim.phone(bot.user)) <= 10
        words = [sentence for sentence in re.split(r"(?<=[.。]) ?", text) if sentence]
        lost = [sentence for sentence in words if not any(sentence in shown for shown in made.phone_texts("s1"))]
        assert bool(lost) == loses


async def test_texts_that_waited_are_merged_into_no_more_than_a_phone_shows(tmp_path: Path) -> None:
    async with world(tmp_path, cut_chars=2000) as made:
        await made.add_adapter()
        nc, bot = await made.nc(), made.sim.add_bot()
        await made.bind(nc, "s1", bot)
        texts = [f"{number}" * 800 for number in range(4)]
        for number, text in enumerate(texts):
            await send(made, nc, f"c{number}", {"kind": "text", "text": text})

        async def are_parked() -> bool:
            return len({each.command for each in await made.receipts(nc) if each.outcome == "parked"}) == 4

        await eventually(are_parked, "they wait")
        made.say("s1", "hello")
        await final_of(made, "c3")
        shown = [each.text for each in made.sim.phone(bot.user)]
        assert shown == ["\n\n".join(texts[:2]), "\n\n".join(texts[2:])]
