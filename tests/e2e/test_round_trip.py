"""Every kind of item from the phone to the sandbox and back to the phone, byte for byte, over real sockets."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client

from adapter.contract.messages import FileItem, ImageItem, TextItem, VideoItem, VoiceItem
from adapter.simulator import samples
from adapter.simulator.media import KEY_FORMS
from tests.e2e.reading import arrived, inbox
from tests.e2e.world import NAMES, World, read_media, until, world

KINDS = {"image": ImageItem, "voice": VoiceItem, "file": FileItem, "video": VideoItem}
COMES_BACK_AS = {"image": "image", "voice": "file", "file": "file", "video": "video"}


async def echo(made: World, nc: Client, sandbox: str, kind: str, content: bytes) -> None:
    """The sandbox reads the newest message's media and sends the item back as it came."""
    bot = made.bots[sandbox]
    message = (await inbox(nc, sandbox))[-1]
    (item,) = message.items
    assert isinstance(item, KINDS[kind])
    assert item.media is not None, item.reason
    assert (await read_media(nc, sandbox, item.media.object)).data == content
    before = len(made.sim.phone(bot.user))
    body = msgspec.json.encode({"items": msgspec.to_builtins(message.items)})
    await nc.jetstream().publish(NAMES.out(sandbox), body, headers={"Nats-Msg-Id": f"echo of {message.id}"})
    await until(lambda: len(made.sim.phone(bot.user)) > before, "it is shown")
    (media,) = made.sim.phone(bot.user)[-1].media
    assert (media.kind, media.viewable, media.size) == (COMES_BACK_AS[kind], True, len(content))
    assert media.md5 == hashlib.md5(content).hexdigest()
    assert made.sim.media_content(media.reference) == content


async def scene(made: World) -> Client:
    await made.add_adapter(WECHAT_NATS_SENDS_PER_WINDOW="0")
    nc = await made.nc()
    await made.bind(nc, "s1", made.sim.add_bot())
    return nc


@pytest.mark.parametrize("kind", KINDS)
async def test_each_kind_in_each_encoding_of_its_key(tmp_path: Path, kind: str) -> None:
    made_of = {"image": samples.png(20, 10), "voice": samples.silk(), "file": b"x", "video": samples.mp4()}
    async with world(tmp_path) as made:
        nc = await scene(made)
        for count, (key_form, url) in enumerate(zip(KEY_FORMS, itertools.cycle(("both", "full", "param"))), 1):
            made.sim.say_media(made.bots["s1"].bot, kind, made_of[kind], key_form=key_form, url=url)
            await arrived(nc, "s1", count)
            await echo(made, nc, "s1", kind, made_of[kind])
        assert made.sim.stats().violations == {}


async def test_sizes_around_every_boundary(tmp_path: Path) -> None:
    sizes = (1, 15, 16, 17, 131_071, 131_072, 131_073)
    async with world(tmp_path) as made:
        nc = await scene(made)
        for number, size in enumerate(sizes, 1):
            content = samples.blob(size, seed=size)
            made.sim.say_media(made.bots["s1"].bot, "file", content)
            await arrived(nc, "s1", number)
            await echo(made, nc, "s1", "file", content)
        assert made.sim.stats().violations == {}


async def test_texts_of_all_scripts(tmp_path: Path) -> None:
    texts = ["a", "你好，世界", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "línea\nuna\n\nline two", "\u202eright to left", " spaces "]
    async with world(tmp_path) as made:
        nc = await scene(made)
        user = made.bots["s1"].user
        for number, text in enumerate(texts, 1):
            made.say("s1", text)
            await arrived(nc, "s1", number)
            message = (await inbox(nc, "s1"))[-1]
            assert message.items == [TextItem(text=text)]
            await nc.jetstream().publish(NAMES.out("s1"), msgspec.json.encode({"text": message.text}))
            await until(lambda number=number: len(made.sim.phone(user)) == number, "it is shown")  # type: ignore[misc]
        assert [shown.text for shown in made.sim.phone(made.bots["s1"].user)] == texts


async def test_copies_of_a_message_arrive_once_and_repeated_words_twice(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        nc = await scene(made)
        bot = made.bots["s1"].bot
        first = made.sim.say(bot, "ok")
        for change in ("same", "message_id", "no_message_id", "empty_message_id", "context_token", "ids"):
            made.sim.repeat(bot, first.message_id, change)
        await arrived(nc, "s1", 1)
        made.sim.replay(bot, 1)
        made.sim.advance(8)
        made.sim.say(bot, "ok")  # the same words, meant
        made.sim.say(bot, "the end")
        await arrived(nc, "s1", 3)
        assert [message.text for message in await inbox(nc, "s1")] == ["ok", "ok", "the end"]
