"""The search for marked secrets after each whole bridge finds what lies open: else its silence would say nothing."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from nats.aio.client import Client

from adapter.bridge.persons import open_state
from adapter.tools.seal import Sealer
from tests import canary
from tests.e2e.world import NAMES, TOKEN_KEY, World, eventually, stream, until, world


async def bridge(folder: Path, happens: Callable[[World, Client], Awaitable[object]], **environ: str) -> None:
    """A bot is bound, its user writes, the sandbox answers; then `happens`, and the search."""
    async with world(folder, environ=environ) as made:
        adapter = await made.add_adapter()
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())
        made.say("s1", "a question")
        await made.command(nc, "s1", "c1")
        await until(lambda: made.phone_texts("s1") == ["answer c1"], "the answer is shown")
        assert adapter.http_port() > 0, "its /metrics are searched"
        await happens(made, nc)


async def nothing(_: World, __: Client) -> None: ...


async def test_a_persons_record_holds_the_token_and_the_text_that_are_searched(tmp_path: Path) -> None:
    async def look(made: World, nc: Client) -> None:
        await made.command(nc, "s1", "c2")  # its record has what was sent before

        async def has_sent() -> bool:
            ((subject, data),) = await stream(nc, f"KV_{NAMES.persons}", ">")
            _, record = open_state(subject.split(".", 2)[2], data, Sealer((base64.b64decode(TOKEN_KEY),)))
            return record.token.startswith(canary.CONTEXT) and [each.text for each in record.sent] == ["answer c1"]

        await eventually(has_sent, "the answer is in the record")

    await bridge(tmp_path, look)


async def test_the_dead_letter_of_a_message_leaves_no_secret_either(tmp_path: Path) -> None:
    """It is what iLink sent, with its context token."""

    async def die(made: World, nc: Client) -> None:
        made.sim.say(made.bots["s1"].bot, "to all", group_id="7@chatroom")

        async def kept() -> bool:
            return len(await stream(nc, NAMES.stream_dead, NAMES.dead_letters(NAMES.stream_in))) == 1

        await eventually(kept, "it is a dead letter")

    await bridge(tmp_path, die)


@pytest.mark.parametrize(("what", "secret"), [*canary.MARKS.items(), (canary.WRITTEN, "answer c1")])
async def test_what_is_not_sealed_is_found_on_the_servers_disk(tmp_path: Path, what: str, secret: str) -> None:
    async def store(_: World, nc: Client) -> None:
        await nc.jetstream().publish(f"$KV.{NAMES.logins}.k", secret.encode())

    with pytest.raises(AssertionError, match=f"{what} is in .*KV_wechat_logins"):
        await bridge(tmp_path, store)


@pytest.mark.parametrize("what", ["a bot's token", canary.WRITTEN])
async def test_a_secret_or_a_text_in_a_log_is_found(tmp_path: Path, what: str) -> None:
    async def log(made: World, _: Client) -> None:
        with made.adapters[0].log.open("a") as file:
            file.write(f"{made.bots['s1'].token} a question\n")

    with pytest.raises(AssertionError, match=f"{what} is in adapter-0.log"):
        await bridge(tmp_path, log)
