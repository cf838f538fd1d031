"""Media of users over real sockets: no fault of the CDN delays a word, and the bytes come to who asks for them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pysilk
import pytest
from nats.aio.client import Client

from adapter.bridge.media import WHY
from adapter.contract.messages import Inbound, InboundItem, Media, TextItem, Unbind, VoiceItem
from adapter.contract.names import H_DURATION_MS, H_MIME, H_NAME
from adapter.simulator import FaultRule, samples
from tests.e2e.reading import arrived, inbox
from tests.e2e.world import NAMES, World, eventually, free_port, read_media, stream, until, world

STILL = "The media are still being fetched: ask again."


def short(inbound: Inbound) -> str:
    """Its text, or of its media `+`, or the reason why there are none."""
    (item,) = inbound.items
    if isinstance(item, TextItem):
        return item.text
    return "+" if media_of(item) else getattr(item, "reason", "")


def media_of(item: InboundItem) -> Media | None:
    found = getattr(item, "media", None)
    assert found is None or isinstance(found, Media)
    return found


async def content_of(nc: Client, inbound: Inbound) -> bytes:
    """The bytes of its only item, as the sandbox reads them, or the sentence that says why it cannot."""
    return await asked(nc, inbound, 60)


async def asked(nc: Client, inbound: Inbound, wait_s: float) -> bytes:
    """As `content_of`, with another wait."""
    (item,) = inbound.items
    media = media_of(item)
    assert media is not None
    try:
        return (await read_media(nc, inbound.sandbox, media.object, wait_s=wait_s)).data
    except LookupError as exc:
        return str(exc).encode()


async def start(made: World, nc: Client, *sandboxes: str, adapters: int = 1, **environ: str) -> None:
    """Bots bound and served."""
    for _ in range(adapters):
        await made.add_adapter(**environ)
    for sandbox in sandboxes:
        await made.bind(nc, sandbox, made.sim.add_bot())
    await until(lambda: all(made.sim.polls(bot.bot).total for bot in made.bots.values()), "every bot is polled")


async def hanging(made: World, bot: str, *behind: str, **params: Any) -> None:
    """Its user sends a picture whose download does not end, and texts behind it."""
    made.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download", bot=bot, params=params))
    made.sim.say_media(bot, "image", samples.png())
    for text in behind:
        made.sim.say(bot, text)
    await until(lambda: made.sim.faults()[0].struck >= 1, "the download has begun")


async def test_a_voice_message_comes_as_a_playable_wav(tmp_path: Path) -> None:
    """The bytes as they came, and a WAV of the same length, also of SILK by another encoder."""
    tone = b"".join((8000 if step // 27 % 2 else -8000).to_bytes(2, "little", signed=True) for step in range(24_000))
    (tmp_path / "tone.pcm").write_bytes(tone)
    with (tmp_path / "tone.pcm").open("rb") as source, (tmp_path / "tone.silk").open("wb") as sink:
        pysilk.encode(source, sink, 24_000, 24_000)
    silk = (tmp_path / "tone.silk").read_bytes()
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        made.sim.say_media(made.bots["s1"].bot, "voice", silk, playtime=1000, text="la la")
        (message,) = await arrived(nc, "s1", 1)
        (item,) = message.items
        assert isinstance(item, VoiceItem)
        assert (message.text, item.transcript, item.duration_ms) == ("la la", "la la", 1000)
        assert await content_of(nc, message) == silk
        assert item.wav is not None
        wav = await read_media(nc, "s1", item.wav.object)
        assert (wav.headers[H_MIME], wav.headers[H_NAME]) == ("audio/wav", "voice.wav")
        assert abs(int(wav.headers[H_DURATION_MS]) - 1000) <= 40
        assert wav.data[:4] == b"RIFF"


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("F25", {"status": 403}, WHY["unavailable"]),
    ("F25", {"status": 404}, WHY["unavailable"]),
    ("F25", {"status": 500}, WHY["unavailable"]),
    ("F25", {"kind": "wrong_key"}, WHY["corrupt"]),
    ("F25", {"kind": "odd_length"}, WHY["corrupt"]),
    ("F4", {"chunk": 16, "pause_ms": 500}, STILL),
    ("F5", {}, STILL),
    ("F6", {}, WHY["unavailable"]),
]


async def test_no_fault_of_the_cdn_delays_a_word_or_another_sandbox(tmp_path: Path) -> None:
    """Slow, silent, reset and failed downloads, each on a bot of its own, all at once; a silent one ends after half a
    minute. What could not be had is had once the CDN is well."""
    sandboxes = [f"s{number}" for number in range(len(FAULTS))]
    picture = samples.png()
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "sound", *sandboxes)
        for sandbox, (fault, params, _) in zip(sandboxes, FAULTS, strict=True):
            bot = made.bots[sandbox].bot
            made.sim.set_fault(FaultRule(fault=fault, endpoint="cdn/download", bot=bot, params=params))
            made.sim.say(bot, "before")
            made.sim.say_media(bot, "image", picture)
            made.sim.say(bot, "after")
        made.sim.say_media(made.bots["sound"].bot, "image", picture)
        async with asyncio.timeout(20):
            messages = [await arrived(nc, sandbox, 3) for sandbox in sandboxes]
            assert await content_of(nc, (await arrived(nc, "sound", 1))[0]) == picture
        assert [[short(message) for message in each] for each in messages] == [["before", "+", "after"]] * len(FAULTS)
        answers = await asyncio.gather(*(asked(nc, each[1], 5) for each in messages))
        for answer, (_, _, why) in zip(answers, FAULTS, strict=True):
            # one wrong key of 256 leaves what looks like a padding
            assert answer == why.encode() or (why == WHY["corrupt"] and len(answer) < 16)
        made.sim.clear_faults()
        for each, answer in zip(messages, answers, strict=True):
            if len(answer) >= 16:
                assert await content_of(nc, each[1]) == picture
        assert made.sim.stats().poll_overlaps == 0


@pytest.mark.parametrize("mode", ["ack_on_delivery", "cursor_replay"])
async def test_kill_9_in_the_middle_of_a_download(tmp_path: Path, mode: str) -> None:
    """Exactly one message in the end, and its bytes for who asks, whether iLink says it again or not."""
    async with world(tmp_path, cursor_mode=mode) as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        (adapter,) = made.adapters
        bot = made.bots["s1"].bot
        await hanging(made, bot, "after")
        await arrived(nc, "s1", 2)
        await adapter.kill()
        made.sim.clear_faults()
        await adapter.start()
        made.sim.say(bot, "last")
        messages = await arrived(nc, "s1", 3)
        assert [short(message) for message in messages] == ["+", "after", "last"]
        assert await content_of(nc, messages[0]) == samples.png()


async def test_sigterm_waits_for_no_download(tmp_path: Path) -> None:
    """Its bytes come to who asks, although iLink here never says a message again."""
    async with world(tmp_path, cursor_mode="ack_on_delivery") as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        (adapter,) = made.adapters
        await hanging(made, made.bots["s1"].bot, "after")
        messages = await arrived(nc, "s1", 2)
        adapter.signal(signal.SIGTERM)
        assert await adapter.ended() == 0
        made.sim.clear_faults()
        await adapter.start()
        assert await content_of(nc, messages[0]) == samples.png()


async def test_any_replica_that_is_asked_fetches_and_one_copy_stays(tmp_path: Path) -> None:
    """Several of them at once; also where the owner is gone."""
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "s1", adapters=2)
        bot, picture = made.bots["s1"].bot, samples.png(1000, 500)
        made.sim.set_fault(FaultRule(fault="F25", endpoint="cdn/download", bot=bot, params={"status": 500}))
        made.sim.say_media(bot, "image", picture)
        made.sim.say_media(bot, "image", picture)
        first, second = await arrived(nc, "s1", 2)
        assert await content_of(nc, first) == WHY["unavailable"].encode()
        made.sim.clear_faults()
        assert await asyncio.gather(*(content_of(nc, first) for _ in range(8))) == [picture] * 8
        stored = await stream(nc, f"OBJ_{NAMES.media}", "$O.>")
        assert b"".join(data for subject, data in stored if ".C." in subject) == picture
        await made.adapters[0].kill()
        assert await content_of(nc, second) == picture


async def test_a_nats_outage_during_downloads_costs_no_picture(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        bot = made.bots["s1"].bot
        pictures = [samples.png(seed=seed) for seed in range(8)]
        made.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download", bot=bot, params={"hang_ms": 300}))
        for picture in pictures:
            made.sim.say_media(bot, "image", picture)
        await arrived(nc, "s1", 2)
        made.server.kill()
        await asyncio.sleep(1.0)  # the length of the outage, not a wait for something
        await made.server.start()
        messages = await arrived(nc, "s1", len(pictures))
        assert [await content_of(nc, message) for message in messages] == pictures


async def test_after_an_unbind_no_media_of_the_person_are_stored(tmp_path: Path) -> None:
    """Although their download was under way; also where the bot moves to another sandbox."""
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "s1", WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        (adapter,) = made.adapters
        bot = made.bots["s1"]
        await hanging(made, bot.bot, hang_ms=5000)
        await arrived(nc, "s1", 1)
        assert (await made.control(nc, "s1", Unbind(all=True))).outcome == "applied"
        await made.bind(nc, "s2", bot)

        async def has_ended() -> bool:
            return await adapter.metric('media_fetches_total{outcome="unbound"}') == 1

        await eventually(has_ended, "the download has ended")
        assert await inbox(nc, "s1") == []
        assert await stream(nc, f"OBJ_{NAMES.media}", "$O.>") == []
