"""What an operator, or a full disk, may do to NATS while the bridge runs: nothing is lost, doubled or disordered, the
probes and metrics tell, and it heals when the cause is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import APIError

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import ImageItem, Login, LoginQuery
from adapter.contract.names import LAYOUT_KEY
from adapter.jetstream.topology import partition_consumer
from tests import snapshots
from tests.e2e.lossy import Lossy
from tests.e2e.test_bindings import ask as service
from tests.e2e.test_logins import newest, reaches, start
from tests.e2e.waiting import call
from tests.e2e.world import (
    NAMES,
    TOKEN_KEY,
    AdapterProcess,
    World,
    audit,
    eventually,
    free_port,
    inbox,
    load,
    read_media,
    stream,
    until,
    world,
)
from tests.forks import fork

BOTS = 12
ANSWER = 40
"""Messages of an answer."""
DELAY_S = 6.0
"""A lost acknowledgement holds up a bot for a second or two, and a busy machine takes its time."""


class LimitedNats(EmbeddedNats):
    """A server whose account may store so many bytes, or that may use so many without looking at the disk."""

    def __init__(self, data_dir: Path, *, account_bytes: int = 0, server_bytes: int = 0) -> None:
        super().__init__(data_dir, free_port())
        self._account_bytes = account_bytes
        self._server_bytes = server_bytes

    def _write_config(self) -> Path:
        config = super()._write_config()
        text = config.read_text()
        if self._server_bytes:
            text = text.replace("jetstream {", f"jetstream {{\n  max_file: {self._server_bytes}", 1)
        if self._account_bytes:
            text += (
                f"accounts {{ a {{ jetstream {{ max_file: {self._account_bytes} }}\n"
                'users: [ { user: "u", password: "p" } ] } }\n'
                "no_auth_user: u\n"
            )
        config.write_text(text)
        return config


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    *,
    bots: int = BOTS,
    environ: dict[str, str] | None = None,
    cursor_mode: str = "cursor_replay",
    **settings: Any,
) -> AsyncIterator[tuple[World, Client, AdapterProcess]]:
    """Bots bound, served by one adapter."""
    async with world(folder, cursor_mode=cursor_mode, environ=environ, **settings) as made:
        adapter = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        nc = await made.nc()
        records = [made.sim.add_bot() for _ in range(bots)]
        await asyncio.gather(*(made.bind(nc, f"s{number}", record) for number, record in enumerate(records)))
        await until(lambda: made.sim.stats().parked == bots, "all are polled")
        yield made, nc, adapter


async def ask(nc: Client, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A request to JetStream, whatever it answers."""
    reply = await nc.request(f"$JS.API.{verb}", msgspec.json.encode(body) if body else b"", timeout=10)
    answer: dict[str, Any] = msgspec.json.decode(reply.data)
    return answer


async def change(nc: Client, name: str, **fields: Any) -> None:
    """An operator alters a stream."""
    config = (await ask(nc, f"STREAM.INFO.{name}"))["config"]
    assert "error" not in await ask(nc, f"STREAM.UPDATE.{name}", config | fields)


async def loaded(made: World, nc: Client, rounds: int, *, first: int = 0, pause_s: float = 0.2) -> None:
    await load(made, nc, rounds=rounds, pause_s=pause_s, rng=random.Random(first), first=first)


async def faultless(made: World, nc: Client) -> None:
    await made.settle(nc)
    assert (await audit(made, nc)).faults() == []


async def fill(js: JetStreamContext) -> None:
    """Until not a byte more is taken."""
    size = 20_000
    while size:
        try:
            await js.publish("other", b"x" * size)
        except APIError:  # resource limits exceeded for account
            size //= 2


async def operator(made: World, *command: str) -> str:
    """A command of ours; what it prints."""
    environ = {**os.environ, "NATS_URL": made.url, "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY}
    process = await fork("adapter", *command, env=environ, stdout=PIPE, stderr=PIPE)
    return b"".join(await process.communicate()).decode()


async def test_consumers_that_are_deleted_are_made_again(tmp_path: Path) -> None:
    """The router's and every partition's, thrice, under load."""
    async with running(tmp_path) as (made, nc, adapter):
        loading = asyncio.create_task(loaded(made, nc, 10, pause_s=0.3))
        names = [f"{NAMES.stream_out}.{partition_consumer(NAMES.partition_of(sandbox))}" for sandbox in made.bots]
        names.append(f"{NAMES.stream_out}.router")
        at_start = adapter.said("consumer.created")
        for times in range(1, 4):
            reached = sum(map(len, made.sent.values())) + 2 * BOTS
            await until(  # or all have been sent by then, where the machine was slow to make the consumers again
                lambda reached=reached: loading.done() or sum(map(len, made.sent.values())) >= reached,  # type: ignore[misc]
                "commands flow",
            )
            for name in names:
                assert (await ask(nc, f"CONSUMER.DELETE.{name}")).get("success")
            created = at_start + times * len(names)
            await until(lambda created=created: adapter.said("consumer.created") == created, "all are back")  # type: ignore[misc]
        await loading
        assert (await made.bind(nc, "later", made.sim.add_bot())).outcome == "applied"
        await faultless(made, nc)
        assert await adapter.unready() == {}


async def test_bindings_that_are_lost_stop_the_polls_until_they_are_restored(tmp_path: Path) -> None:
    """Deleted, and then made anew without its keys; the adapter is neither stopped nor restarted."""
    bucket = f"KV_{NAMES.bindings}"
    async with running(tmp_path) as (made, nc, adapter):
        await loaded(made, nc, 3)
        await snapshots.backup(made.url, tmp_path / "saved")
        assert (await ask(nc, f"STREAM.PURGE.{bucket}"))["error"]["err_code"] == 10110  # not permitted
        assert (await ask(nc, f"STREAM.DELETE.{bucket}")).get("success")
        assert f"creating stream {bucket}" in await operator(made, "doctor", "--fix")

        async def is_reported() -> bool:
            return await adapter.unready() == {"streams": f"incomplete: {bucket}; restore from the backup"}

        await eventually(is_reported, "it is not ready")
        assert await adapter.metric("nats_streams_missing") == 1
        assert f"{BOTS} that adapters know are not in {bucket}" in await operator(made, "doctor", "--json")
        await until(lambda: made.sim.stats().parked == 0, "nobody is polled")
        for sandbox in made.bots:
            made.say(sandbox, "while they are gone")
        assert (await ask(nc, f"STREAM.DELETE.{bucket}")).get("success")
        await snapshots.restore(made.url, [tmp_path / "saved" / bucket], replace=True)
        await eventually(adapter.is_ready, "it is ready again")
        await loaded(made, nc, 3, first=3)
        await faultless(made, nc)
        assert adapter.said("bucket.incomplete") > 0
        await adapter.kill()
        await adapter.start()
        await loaded(made, nc, 3, first=6)
        await faultless(made, nc)


async def test_a_binding_that_is_deleted_by_hand_is_unbound(tmp_path: Path) -> None:
    """Its mark says that it is meant."""
    async with running(tmp_path, bots=3) as (made, nc, adapter):
        bucket = await nc.jetstream().key_value(NAMES.bindings)
        # nats-py's `keys` says now and then that there is none
        stored = await stream(nc, f"KV_{NAMES.bindings}", f"$KV.{NAMES.bindings}.>")
        keys = [subject.removeprefix(f"$KV.{NAMES.bindings}.") for subject, _ in stored]
        first, second, _ = [key for key in keys if key != LAYOUT_KEY]
        await bucket.delete(first)
        with pytest.raises(APIError, match="rollup not permitted"):
            await bucket.purge(second)
        await until(lambda: made.sim.stats().parked == 2, "one is polled no more")
        assert await adapter.unready() == {}


async def holds(nc: Client, bucket: str) -> bool:
    """Whether a bucket has an entry that is no mark of a deletion."""
    return any(value for _, value in await stream(nc, f"KV_{bucket}", f"$KV.{bucket}.>"))


async def test_logins_whose_bucket_was_deleted_are_begun_anew(tmp_path: Path) -> None:
    """No backup has them."""
    async with running(tmp_path, bots=1, qr_hold_ms=300) as (made, nc, adapter):
        lost = await start(nc, "s1")
        await eventually(lambda: holds(nc, NAMES.logins), "the bucket holds the login")
        assert (await ask(nc, f"STREAM.DELETE.KV_{NAMES.logins}")).get("success")
        assert f"creating stream KV_{NAMES.logins}" in await operator(made, "doctor", "--fix")

        async def not_found() -> bool:
            return bool(await service(nc, "login.status", LoginQuery(login=lost.login), Login) == "404")

        made.sim.scan(newest(made))
        await eventually(not_found, "the scan finds no login")
        again = await start(nc, "s1")
        made.sim.scan(newest(made))
        made.sim.confirm(newest(made))
        await reaches(nc, again, "confirmed")
        await until(lambda: made.sim.stats().parked == 2, "the new bot is polled")

        async def is_ready() -> bool:
            return await adapter.unready() == {}

        await eventually(is_ready, "the replica has seen the new bucket")


async def test_a_stream_that_is_deleted_takes_readiness_until_it_is_back(tmp_path: Path) -> None:
    """What was in it is gone; what comes later is in order, once, also where its numbers are remembered."""
    async with running(tmp_path) as (made, nc, adapter):
        await loaded(made, nc, 3)
        await made.settle(nc)
        assert (await audit(made, nc)).faults() == []
        gone = (NAMES.stream_out, NAMES.stream_in, f"KV_{NAMES.leases}")
        for name in gone:
            assert (await ask(nc, f"STREAM.DELETE.{name}")).get("success")

        async def noticed() -> bool:
            return await adapter.metric("nats_streams_missing") == len(gone)

        await eventually(noticed, "it is noticed")
        unready = await adapter.unready()
        assert all(name in unready["streams"] for name in gone)
        polls = made.sim.stats().polls
        made.said.clear()  # it was in WECHAT_IN
        made.say("s0", "while it is gone")
        said = asyncio.create_task(operator(made, "doctor", "--fix"))
        assert "creating stream WECHAT_OUT" in await said

        await eventually(adapter.is_ready, "it is ready again")
        assert made.sim.stats().polls >= polls
        await loaded(made, nc, 3, first=3)
        await faultless(made, nc)
        assert (await made.bind(nc, "later", made.sim.add_bot())).outcome == "applied"


async def test_streams_that_no_poll_writes_to_stop_none(tmp_path: Path) -> None:
    """Deleted, they take readiness; what waits for them goes on once they are back, and nothing else has waited."""
    async with running(tmp_path, bots=3) as (made, nc, adapter):
        await loaded(made, nc, 1)
        await made.settle(nc)
        gone = (NAMES.stream_event, NAMES.stream_dead, f"OBJ_{NAMES.media}")
        for name in gone:
            assert (await ask(nc, f"STREAM.DELETE.{name}")).get("success")

        async def noticed() -> bool:
            return await adapter.metric("nats_streams_missing") == len(gone)

        await eventually(noticed, "it is noticed")
        await made.command(nc, "s0", "while it is gone")
        await until(lambda: adapter.said("publish.retrying") > 0, "its receipt waits")
        assert "streams" in await adapter.unready()
        made.sim.say_media(made.bots["s2"].bot, "image")
        for number in range(3):
            for sandbox in ("s0", "s1"):
                made.say(sandbox, f"while it is gone {number}")
            polls = made.sim.stats().polls
            await until(lambda: made.sim.stats().polls >= polls + 6, "all are polled")  # noqa: B023

        async def stored() -> bool:
            return len(await inbox(nc, "*")) == 10

        await eventually(stored, "all is stored, and the picture is named")
        await operator(made, "doctor", "--fix")
        await eventually(adapter.is_ready, "it is ready again")
        made.sent["s0"], made.sent["s1"], made.sent["s2"] = made.sent["s0"][1:], [], []  # their receipts are gone
        await loaded(made, nc, 1, first=1)
        await made.settle(nc)
        (picture,) = [
            item for message in await inbox(nc, "*") for item in message.items if isinstance(item, ImageItem)
        ]
        assert picture.media is not None
        assert (await read_media(nc, "s2", picture.media.object)).data


@pytest.mark.parametrize("mode", ["cursor_replay", "ack_on_delivery"])
@pytest.mark.parametrize(
    ("parts", "skip"),
    [
        pytest.param((b"HPUB wechat.inbox.",), 0, id="an-entry"),
        pytest.param((b"MSG", b'{"stream":"WECHAT_IN"'), 0, id="of-an-entry"),
        pytest.param((b"HPUB $KV.wechat_persons.",), 0, id="a-record"),
        pytest.param((b"MSG", b'{"stream":"KV_wechat_persons"'), 0, id="of-a-record"),
    ],
)
async def test_a_message_or_an_acknowledgement_that_gets_lost_delays_a_bot_for_seconds(
    tmp_path: Path, parts: tuple[bytes, ...], skip: int, mode: str
) -> None:
    """The connection stays, and nothing else tells. Nothing is lost, doubled or disordered."""
    async with world(tmp_path, cursor_mode=mode) as made, Lossy(made.url) as lossy:
        await made.add_adapter(NATS_URL=lossy.url)
        nc, bot = await made.nc(), made.sim.add_bot()
        made.bots["s0"] = bot
        loss = lossy.lose(*parts, skip=skip)
        for number in range(ANSWER):  # one answer
            made.say("s0", f"before {number}")
        await made.bind(nc, "s0", bot)
        await made.command(nc, "s0", "first")
        await until(lambda: loss.has_happened, "it is lost")
        lost_s = time.monotonic()
        for number in range(4):
            made.say("s0", f"then {number}")

        async def all_stored() -> bool:
            return len(await inbox(nc, "*")) == ANSWER + 4

        await eventually(all_stored, "all is told")
        assert time.monotonic() - lost_s < DELAY_S
        for number in range(4):
            await made.command(nc, "s0", f"c{number}")
        await faultless(made, nc)


async def test_a_command_whose_acknowledgement_gets_lost_is_sent_once(tmp_path: Path) -> None:
    """It stays in its queue, holds up none behind it, and the next owner finds its receipt."""
    async with world(tmp_path, cursor_mode="cursor_replay") as made, Lossy(made.url) as lossy:
        adapter = await made.add_adapter(NATS_URL=lossy.url)
        nc = await made.nc()
        await made.bind(nc, "s0", made.sim.add_bot())
        made.say("s0", "hello")
        loss = lossy.lose(b"PUB $JS.ACK.WECHAT_OUT.")
        for number in range(3):
            await made.command(nc, "s0", f"c{number}")
        await faultless(made, nc)
        assert loss.has_happened
        await adapter.kill()
        await adapter.start()

        async def empty() -> bool:
            return not await stream(nc, NAMES.stream_out, ">")

        await eventually(empty, "it is settled")
        await faultless(made, nc)


async def test_a_stream_that_is_altered_takes_readiness_until_it_is_mended(tmp_path: Path) -> None:
    """What users write meanwhile is stored."""
    async with running(tmp_path, bots=3) as (made, nc, adapter):
        config = (await ask(nc, f"STREAM.INFO.{NAMES.stream_in}"))["config"]
        wider = {**config, "subjects": [*config["subjects"], "elsewhere.*"]}
        assert "error" not in await ask(nc, f"STREAM.UPDATE.{NAMES.stream_in}", wider)

        async def noticed() -> bool:
            return await adapter.metric("nats_streams_altered") == 1

        await eventually(noticed, "it is noticed")
        unready = await adapter.unready()
        assert unready == {"streams": "altered: WECHAT_IN (subjects); `wechat-nats doctor --fix`"}
        made.say("s0", "while it is altered")
        await until(lambda: made.sim.stats().parked == 3, "it is stored")
        assert "WECHAT_IN" in await operator(made, "doctor", "--fix")
        await eventually(adapter.is_ready, "it is ready again")
        await loaded(made, nc, 2)
        await faultless(made, nc)
        assert (adapter.said("stream.altered"), adapter.said("stream.restored")) == (1, 1)


async def test_a_replica_that_starts_makes_no_empty_bucket_of_what_was_deleted(tmp_path: Path) -> None:
    """It would know nobody, take everything over, and report ready. Restored and started, all go on."""
    bucket = f"KV_{NAMES.bindings}"
    async with running(tmp_path) as (made, nc, adapter):
        await snapshots.backup(made.url, tmp_path / "saved")
        assert (await ask(nc, f"STREAM.DELETE.{bucket}")).get("success")
        fresh = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{free_port()}")
        assert await fresh.ended() == 2
        assert f"{bucket}: missing. Restore what was deleted" in fresh.log.read_text()
        adapter.signal(signal.SIGTERM)
        assert await adapter.ended() == 0
        await snapshots.restore(made.url, [tmp_path / "saved" / bucket])
        for replica in (adapter, fresh):
            await replica.start()
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        await loaded(made, nc, 2)
        await faultless(made, nc)


async def test_a_full_stream_drops_its_oldest_or_refuses_or_delays_as_promised(tmp_path: Path) -> None:
    few = {"WECHAT_NATS_OUT_MAX_PER_SANDBOX": "5"}
    async with running(tmp_path, bots=3, environ=few) as (made, nc, adapter):
        js = nc.jetstream()
        await made.command(nc, "s0", "parked")  # nobody has written yet

        async def has_receipt(ident: str, outcome: str) -> bool:
            return any((r.command, r.outcome) == (ident, outcome) for r in await made.receipts(nc))

        await eventually(lambda: has_receipt("parked", "parked"), "the first is parked")

        messages = (await ask(nc, f"STREAM.INFO.{NAMES.stream_event}"))["state"]["messages"]
        await change(nc, NAMES.stream_event, discard="new", max_msgs=messages)
        made.say("s0", "hello")
        await until(lambda: "answer parked" in made.phone_texts("s0"), "it is sent")
        await until(lambda: adapter.said("event.retrying") > 0, "its receipt waits")
        assert not await has_receipt("parked", "accepted")
        await change(nc, NAMES.stream_event, discard="old", max_msgs=-1)
        await eventually(lambda: has_receipt("parked", "accepted"), "the receipt is there")
        assert made.phone_texts("s0").count("answer parked") == 1

        await change(nc, NAMES.stream_in, discard="new", max_msgs=1)
        made.say("s1", "it waits")
        await until(lambda: adapter.said("inbound.full") > 0, "it waits for room")
        await change(nc, NAMES.stream_in, discard="old", max_msgs=2)
        said = ["it waits", *(f"message {number}" for number in range(3))]
        for number in range(3):  # an entry each
            made.say("s1", said[number + 1])

            async def newest(kept: list[str] = said[number : number + 2]) -> bool:
                return [message.text for message in await inbox(nc, "*")] == kept

            await eventually(newest, "the oldest have gone")

        await adapter.kill()
        for number in range(5):
            await js.publish(NAMES.out("s2"), f'{{"text":"{number}"}}'.encode())
        with pytest.raises(APIError, match="maximum messages per subject"):
            await js.publish(NAMES.out("s2"), b'{"text":"one too many"}')
        await js.publish(NAMES.out("s1"), b'{"text":"another sandbox"}')
        await change(nc, NAMES.stream_in, discard="new")
        await adapter.start()
        assert await adapter.ended() != 0
        assert "WECHAT_IN: discard is 'new', must be 'old'" in adapter.log.read_text()
        assert "changing WECHAT_IN" in await operator(made, "doctor", "--fix")
        await adapter.start()
        made.say("s2", "hello")
        texts = [str(number) for number in range(5)]
        await until(lambda: made.phone_texts("s2") == texts, "those that were taken are sent")


async def test_a_lease_that_cannot_be_renewed_is_reported(tmp_path: Path) -> None:
    """All else of JetStream answers, and nothing is polled: it must not look ready, nor as if its bots were heard."""
    async with running(tmp_path, bots=3) as (made, nc, adapter):
        leases = f"KV_{NAMES.leases}"
        await change(nc, leases, max_msg_size=1)

        async def is_reported() -> bool:
            return "no lease can be renewed: 10054" in (await adapter.unready()).get("jetstream", "")

        await eventually(is_reported, "it is not ready")
        assert made.sim.stats().parked == 0
        assert await adapter.metric("oldest_poll_age_seconds") > 5
        await change(nc, leases, max_msg_size=-1)
        await until(lambda: made.sim.stats().parked == 3, "all are polled again")
        await eventually(adapter.is_ready, "it is ready again")
        await loaded(made, nc, 2)
        await faultless(made, nc)


@pytest.mark.slow
async def test_an_account_without_room_delays_everything_and_loses_nothing(tmp_path: Path) -> None:
    bus = LimitedNats(tmp_path / "nats", account_bytes=2_000_000)
    small = {"WECHAT_NATS_IN_MAX_BYTES": "-1", "WECHAT_NATS_MEDIA_STORE_BYTES": "-1"}
    async with running(tmp_path, bus=bus, environ=small) as (made, nc, adapter):
        await loaded(made, nc, 2)
        js = nc.jetstream()
        await js.add_stream(name="other", subjects=["other"])
        await fill(js)
        for sandbox in made.bots:
            made.say(sandbox, "while it is full")
        await until(lambda: adapter.said("publish.retrying") > 0, "it says that it waits")

        async def unready() -> bool:
            return "takes nothing" in (await adapter.unready()).get("jetstream", "")

        await eventually(unready, "it is not ready")
        assert await adapter.metric("nats_publish_oldest_seconds") > 2
        assert "resource limits exceeded for account" in adapter.log.read_text()
        polls = made.sim.stats().polls
        await asyncio.sleep(1)  # two holds of a poll
        assert made.sim.stats().polls == polls, "no poll starts"
        await ask(nc, "STREAM.DELETE.other")
        await loaded(made, nc, 2, first=2)
        await faultless(made, nc)
        await eventually(adapter.is_ready, "it is ready again")


async def test_a_full_disk_delays_everything_until_the_server_restarts_with_room(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if await call("mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)):
        pytest.skip("A full disk is a small tmpfs, which only root may mount.")
    try:
        bus = LimitedNats(disk, server_bytes=1 << 30)
        small = {"WECHAT_NATS_IN_MAX_BYTES": "-1", "WECHAT_NATS_MEDIA_STORE_BYTES": "-1"}
        async with running(tmp_path, bus=bus, environ=small) as (made, nc, adapter):
            await loaded(made, nc, 2)
            (disk / "filler").write_bytes(b"")
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"x" * 4096)
            for sandbox in made.bots:
                made.say(sandbox, "while it is full")
            await until(lambda: adapter.said("publish.retrying") + adapter.said("lease.paused") > 0, "it waits")
            assert await inbox(nc, "s0") != []
            (disk / "filler").unlink()
            bus.kill()
            await bus.start()
            await loaded(made, nc, 2, first=2)
            await faultless(made, nc)
    finally:
        assert not await call("umount", "--lazy", str(disk))
