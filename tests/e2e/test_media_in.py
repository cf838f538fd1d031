"""Media of users over real sockets: byte for byte in the object store, and no fault of the CDN costs a message."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from pathlib import Path
from typing import Any

import msgspec
import pysilk
import pytest
from nats.aio.client import Client

from adapter.contract.messages import (
    Inbound,
    InboundItem,
    Media,
    TextItem,
    VoiceItem,
)
from adapter.simulator import FaultRule, samples
from tests.e2e.world import NAMES, World, eventually, stream, until, world

SHORT = {"WECHAT_NATS_MEDIA_WAIT_S": "2"}


async def inbox(nc: Client, sandbox: str) -> list[Inbound]:
    stored = await stream(nc, NAMES.stream_in, NAMES.inbox(sandbox))
    return [msgspec.json.decode(data, type=Inbound) for _, data in stored]


async def told(nc: Client, sandbox: str, count: int) -> list[Inbound]:
    """Waits until the sandbox has so many messages."""

    async def are_there() -> bool:
        return len(await inbox(nc, sandbox)) >= count

    await eventually(are_there, f"{sandbox} has {count} messages")
    return await inbox(nc, sandbox)


def short(inbound: Inbound) -> str:
    """Its text, or of its media `+`, or the reason why they are missing."""
    (item,) = inbound.items
    if isinstance(item, TextItem):
        return item.text
    return "+" if media_of(item) else getattr(item, "reason", "")


def media_of(item: InboundItem) -> Media | None:
    found = getattr(item, "media", None)
    assert found is None or isinstance(found, Media)
    return found


async def content_of(nc: Client, media: Media | None) -> bytes:
    """What any client of NATS reads under this name."""
    assert media is not None
    store = await nc.jetstream().object_store(NAMES.media)
    found = (await store.get(media.object)).data or b""
    assert len(found) == media.size
    assert hashlib.sha256(found).hexdigest() == media.sha256
    return found


async def start(made: World, nc: Client, *sandboxes: str, **options: Any) -> None:
    """Bots bound and served by one adapter."""
    await made.add_adapter()
    for sandbox in sandboxes:
        await made.bind(nc, sandbox, made.sim.add_bot(), **options)
    await until(lambda: all(made.sim.polls(bot.bot).total for bot in made.bots.values()), "every bot is polled")


async def hanging(made: World, bot: str, *behind: str) -> None:
    """Its user sends a picture whose download does not end, and texts behind it."""
    made.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download", bot=bot))
    made.sim.say_media(bot, "image", samples.png())
    for text in behind:
        made.sim.say(bot, text)
    await until(lambda: made.sim.faults()[0].struck == 1, "the download has begun")


async def test_a_voice_message_can_be_heard(tmp_path: Path) -> None:
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
        (message,) = await told(nc, "s1", 1)
        (item,) = message.items
        assert isinstance(item, VoiceItem)
        assert (message.text, item.transcript, item.duration_ms) == ("la la", "la la", 1000)
        assert await content_of(nc, item.media) == silk
        assert item.wav is not None
        assert item.wav.mime == "audio/wav"
        assert item.wav.duration_ms is not None
        assert abs(item.wav.duration_ms - 1000) <= 40
        assert (await content_of(nc, item.wav))[:4] == b"RIFF"


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("F25", {"status": 403}, "unavailable"),
    ("F25", {"status": 404}, "unavailable"),
    ("F25", {"status": 500}, "unavailable"),
    ("F25", {"kind": "wrong_key"}, "corrupt"),
    ("F25", {"kind": "odd_length"}, "corrupt"),
    ("F4", {"chunk": 16, "pause_ms": 500}, "timeout"),
    ("F5", {}, "timeout"),
    ("F6", {}, "unavailable"),
]


async def test_no_fault_of_the_cdn_holds_up_other_bots_polls_or_later_words(tmp_path: Path) -> None:
    """Slow, silent, reset and failed downloads, each on a bot of its own, all at once."""
    sandboxes = [f"s{number}" for number in range(len(FAULTS))]
    async with world(tmp_path, environ={"WECHAT_NATS_MEDIA_WAIT_S": "4"}) as made:
        nc = await made.nc()
        await start(made, nc, "sound", *sandboxes)
        for sandbox, (fault, params, _) in zip(sandboxes, FAULTS, strict=True):
            bot = made.bots[sandbox].bot
            made.sim.set_fault(FaultRule(fault=fault, endpoint="cdn/download", bot=bot, params=params))
            made.sim.say(bot, "before")
            made.sim.say_media(bot, "image", samples.png())
            made.sim.say(bot, "after")
        made.sim.say_media(made.bots["sound"].bot, "image", samples.png())
        assert short((await told(nc, "sound", 1))[0]) == "+"
        for sandbox, (_, _, reason) in zip(sandboxes, FAULTS, strict=True):
            before, picture, after = await told(nc, sandbox, 3)
            assert (short(before), short(after)) == ("before", "after")
            media = media_of(picture.items[0])
            if media is None:
                assert short(picture) == reason
            else:  # one wrong key of 256 leaves what looks like a padding
                assert (reason, media.size < 16) == ("corrupt", True)
        made.sim.clear_faults()
        for sandbox in sandboxes:
            made.sim.say_media(made.bots[sandbox].bot, "image", samples.png())
            assert short((await told(nc, sandbox, 4))[3]) == "+"
        assert made.sim.stats().poll_overlaps == 0


async def test_a_silent_download_lets_the_same_bot_be_polled_and_later_words_come_in_order(tmp_path: Path) -> None:
    async with world(tmp_path, environ={"WECHAT_NATS_MEDIA_WAIT_S": "3"}) as made:
        nc = await made.nc()
        await start(made, nc, "s1", "s2")
        bot = made.bots["s1"].bot
        await hanging(made, bot)
        for number in range(5):
            before = made.sim.polls(bot).total
            made.sim.say(bot, f"word {number}")
            await until(lambda seen=before: made.sim.polls(bot).total > seen, "polls go on")  # type: ignore[misc]
        made.sim.say(made.bots["s2"].bot, "not held up")
        await told(nc, "s2", 1)
        messages = await told(nc, "s1", 6)
        assert [short(message) for message in messages] == ["timeout", *(f"word {number}" for number in range(5))]


async def test_kill_9_in_the_middle_of_a_download(tmp_path: Path) -> None:
    """Exactly one message in the end, with its bytes, whether iLink says it again or not."""
    for mode in ("ack_on_delivery", "cursor_replay"):
        (tmp_path / mode).mkdir()
        async with world(tmp_path / mode, cursor_mode=mode) as made:
            nc = await made.nc()
            await start(made, nc, "s1")
            (adapter,) = made.adapters
            bot = made.bots["s1"].bot
            await hanging(made, bot, "after")
            await adapter.kill()
            made.sim.clear_faults()
            await adapter.start()
            await told(nc, "s1", 2)
            made.sim.say(bot, "last")
            assert [short(message) for message in await told(nc, "s1", 3)] == ["+", "after", "last"]


@pytest.mark.slow
async def test_kill_9_again_and_again_while_pictures_come(tmp_path: Path) -> None:
    """Wherever it strikes: each message once, in order, each picture with its own bytes."""
    async with world(tmp_path, cursor_mode="cursor_replay") as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        (adapter,) = made.adapters
        bot = made.bots["s1"].bot
        said: list[bytes | str] = []
        for turn in range(4):
            for number in range(6):
                said += [samples.png(seed=turn * 6 + number), f"word {turn}.{number}"]
                made.sim.say_media(bot, "image", samples.png(seed=turn * 6 + number))
                made.sim.say(bot, f"word {turn}.{number}")
            await told(nc, "s1", turn * 12 + 1 + 2 * turn)  # somewhere in the middle of it
            await adapter.kill()
            await adapter.start()
        messages = await told(nc, "s1", len(said))
        assert len(messages) == len(said)
        for expected, message in zip(said, messages, strict=True):
            found = message.text if isinstance(expected, str) else await content_of(nc, media_of(message.items[0]))
            assert found == expected


async def test_sigterm_leaves_a_slow_download_to_the_next_adapter(tmp_path: Path) -> None:
    """Although iLink here never says a message again."""
    async with world(tmp_path, cursor_mode="ack_on_delivery") as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        (adapter,) = made.adapters
        bot = made.bots["s1"].bot
        await hanging(made, bot, "after")
        adapter.signal(signal.SIGTERM)
        assert await adapter.ended() == 0
        assert await inbox(nc, "s1") == []
        made.sim.clear_faults()
        await adapter.start()
        assert [short(message) for message in await told(nc, "s1", 2)] == ["+", "after"]


async def test_another_replica_takes_over_what_waits(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        bot = made.bots["s1"].bot
        await hanging(made, bot, "after")
        await made.add_adapter()
        await made.adapters[0].kill()
        made.sim.clear_faults()
        assert [short(message) for message in await told(nc, "s1", 2)] == ["+", "after"]


async def test_a_nats_outage_during_downloads_costs_no_picture(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        bot = made.bots["s1"].bot
        pictures = [samples.png(seed=seed) for seed in range(8)]
        made.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download", bot=bot, params={"hang_ms": 300}))
        for picture in pictures:
            made.sim.say_media(bot, "image", picture)
        await told(nc, "s1", 2)
        made.server.kill()
        await asyncio.sleep(1.0)  # the length of the outage, not a wait for something
        await made.server.start()
        messages = await told(nc, "s1", len(pictures))
        assert [await content_of(nc, media_of(message.items[0])) for message in messages] == pictures


async def test_an_unbind_waits_for_the_last_messages_and_then_empties_the_inbox(tmp_path: Path) -> None:
    """Also where the bot moves to another sandbox."""
    async with world(tmp_path, environ=SHORT) as made:
        nc = await made.nc()
        await start(made, nc, "s1")
        bot = made.bots["s1"]
        live = await nc.subscribe(NAMES.live("s1"))
        await hanging(made, bot.bot)
        await made.bind(nc, "s2", bot)
        made.sim.say(bot.bot, "hello s2")
        assert [short(message) for message in await told(nc, "s2", 1)] == ["hello s2"]
        message = msgspec.json.decode((await live.next_msg(5)).data, type=Inbound)
        assert (short(message), message.sandbox) == ("timeout", "s1")
        assert await stream(nc, NAMES.stream_in, NAMES.inbox("s1")) == []
