"""`backup` and `restore`: everything that must outlive a server, with its sequences, and nothing merged."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from adapter.cli.bus import Bus, connected_bus
from adapter.cli.embedded import EmbeddedNats
from adapter.replica.app import run
from adapter.settings import Settings
from tests.bus.guarded import guarded
from tests.cli.conftest import Command

CONSUMERS = True
LEFT_OUT = {"KV_wechat_members", "KV_wechat_claims", "KV_wechat_logins"}


async def states(bus: Bus) -> dict[str, dict[str, Any]]:
    """By stream: what is in it, and how many consumers it has."""
    names = (await bus.api_request("STREAM.NAMES"))["streams"]
    found = {}
    for name in names:
        state = (await bus.api_request(f"STREAM.INFO.{name}"))["state"]
        found[name] = {key: state[key] for key in ("messages", "last_seq", "consumer_count")}
        if state["messages"]:
            found[name]["first_seq"] = state["first_seq"]
    return found


async def fill(bus: Bus) -> tuple[list[int], int]:
    """Messages, the first two of which are purged, and an entry of a bucket: their sequences, and its revision."""
    bodies = [b"x" * 300_000 + str(number).encode() for number in range(5)]
    seqs = [(await bus.js.publish("wechat.inbox.s1", body)).seq for body in bodies]
    await bus.js.purge_stream("WECHAT_IN", seq=seqs[2])
    await bus.js.publish("wechat.out.s1", b'{"text":"hi"}')
    return seqs, await (await bus.js.key_value("wechat_bindings")).put("b1", b"{}")


async def test_all_that_must_last_comes_back_on_another_server(
    cli: Command, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seqs, revision = await fill(bus)
    before = await states(bus)
    saved = await cli("backup", str(tmp_path / "saved"), "--json")
    assert saved.code == 0, saved.err
    assert {row["stream"] for row in saved.rows} == before.keys() - LEFT_OUT
    assert (tmp_path / "saved").stat().st_mode & 0o077 == 0
    async with EmbeddedNats() as other:
        monkeypatch.setenv("NATS_URL", other.url)
        restored = await cli("restore", str(tmp_path / "saved"))
        assert restored.code == 0, restored.err
        async with connected_bus(Settings(nats_url=(other.url,))) as there:
            after = await states(there)
            assert after == {name: state for name, state in before.items() if name not in LEFT_OUT}
            assert (await there.js.get_msg("WECHAT_IN", seqs[2])).data == b"x" * 300_000 + b"2"
            entry = await (await there.js.key_value("wechat_bindings")).get("b1")
            assert (entry.value, entry.revision) == (b"{}", revision)


async def test_nothing_is_merged_and_nothing_deleted_unasked(cli: Command, bus: Bus, tmp_path: Path) -> None:
    seqs, _ = await fill(bus)
    assert (await cli("backup", str(tmp_path / "saved"))).code == 0
    again = await cli("backup", str(tmp_path / "saved"))
    assert (again.code, "not empty" in again.err) == (2, True)
    later = await bus.js.publish("wechat.inbox.s1", b"later")
    refused = await cli("restore", str(tmp_path / "saved"))
    assert (refused.code, "WECHAT_IN" in refused.err, "--replace" in refused.err) == (1, True, True)
    assert (await states(bus))["WECHAT_IN"]["last_seq"] == later.seq
    assert (await cli("restore", str(tmp_path / "saved"), "--replace")).code == 0
    assert (await states(bus))["WECHAT_IN"]["last_seq"] == seqs[-1]


async def test_a_running_adapter_forbids_it(cli: Command, bus: Bus, settings: Settings, tmp_path: Path) -> None:
    await fill(bus)
    assert (await cli("backup", str(tmp_path / "saved"))).code == 0
    stop, ready = asyncio.Event(), asyncio.Event()
    adapter = asyncio.create_task(run(settings_of_adapter(settings), stop=stop, on_ready=ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([adapter, waiting], return_when=asyncio.FIRST_COMPLETED)
    assert not adapter.done(), adapter.exception()
    refused = await cli("restore", str(tmp_path / "saved"), "--replace")
    assert (refused.code, "stop them first" in refused.err) == (1, True)
    stop.set()
    await adapter


@pytest.mark.parametrize("heard", ["$SRV.PING.wechat-nats", ">"], ids=["an adapter", "a listener to everything"])
async def test_who_hears_the_question_and_does_not_answer_forbids_it_too(
    cli: Command, bus: Bus, tmp_path: Path, heard: str
) -> None:
    """As an adapter does with permissions, where an administrator keeps the default inbox. Of who only listens it
    cannot be told, so that adapters run is not said."""
    await fill(bus)
    assert (await cli("backup", str(tmp_path / "saved"))).code == 0
    before = await states(bus)
    listener = await bus.nc.subscribe(heard)
    await bus.nc.flush()
    refused = await cli("restore", str(tmp_path / "saved"), "--replace")
    assert (refused.code, "none answers on _INBOX.>" in refused.err) == (1, True), refused.err
    assert ("listens to all subjects" in refused.err, "dapters run" in refused.err) == (True, False)
    assert await states(bus) == before
    assert "none answers on _INBOX.>" in (await cli("doctor")).out
    await listener.unsubscribe()
    await bus.nc.flush()
    assert (await cli("restore", str(tmp_path / "saved"), "--replace")).code == 0


async def test_who_may_not_ask_for_adapters_cannot_restore(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That none answers would look as if none ran."""
    saved = tmp_path / "saved"
    (saved / "WECHAT_IN").mkdir(parents=True)
    (saved / "WECHAT_IN" / "backup.json").touch()
    async with guarded(tmp_path) as server:
        for name, value in {"NATS_URL": server.url, **server.users["service"].environ}.items():
            monkeypatch.setenv(name, value)
        refused = await cli("restore", str(saved))
    assert (refused.code, "may not publish to $SRV.PING" in refused.err) == (1, True)


def settings_of_adapter(settings: Settings) -> Settings:
    return Settings(nats_url=settings.nats_url, http_addr="127.0.0.1:0", drain_s=10)


async def test_an_empty_folder_or_server_is_said(cli: Command, server: EmbeddedNats, tmp_path: Path) -> None:
    nothing = await cli("restore", str(tmp_path))
    assert (nothing.code, "holds no backup" in nothing.err) == (2, True)
    empty = await cli("backup", str(tmp_path / "saved"))
    assert (empty.code, "nothing of ours" in empty.err) == (1, True)


async def test_a_folder_that_takes_no_more_is_named(cli: Command, bus: Bus, tmp_path: Path) -> None:
    """It was told that what the command says cannot be written, as if the backup were there."""
    for _ in range(3):
        await bus.js.publish("wechat.inbox.s1", os.urandom(900_000))
    full, (soft, hard) = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        result = await cli("backup", str(full))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.code, result.out) == (1, "")
    assert result.err == f"wechat-nats: {full}/WECHAT_IN cannot be written: File too large.\n"
    (tmp_path / "file").touch()
    result = await cli("backup", str(tmp_path / "file" / "folder"))
    assert (result.code, "cannot be written: Not a directory." in result.err) == (1, True)
