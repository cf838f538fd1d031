"""Commands under the users of `helm/nats/`: which work under the adapter's, and what the others say instead."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter.jetstream import topology
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.settings import Settings
from tests.bus.guarded import NAMES, WITNESS, Guarded, Player, guarded
from tests.cli.conftest import Command


class Scene:
    """A server with permissions and streams, and who sees everything."""

    def __init__(self, server: Guarded, witness: Player, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = server
        self._witness = witness
        self._monkeypatch = monkeypatch

    def enter(self, who: str, **environ: str) -> None:
        """What this role finds in its environment."""
        for variable, value in {**self._server.users[who].environ, **environ}.items():
            self._monkeypatch.setenv(variable, value)

    async def stored(self, stream: str) -> int:
        info = await self._witness.nc.jetstream().stream_info(stream)
        return info.state.messages


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    async with guarded(tmp_path) as server:
        witness = await server.connect(WITNESS)
        connection = ManagedConnection(Settings(), "test")
        await connection.adopt_client(witness.nc)
        await topology.ensure_topology(connection, NAMES, Settings(in_max_bytes=-1, media_store_bytes=-1))
        monkeypatch.setenv("NATS_URL", server.url)
        yield Scene(server, witness, monkeypatch)


async def test_subjects_that_an_adapter_may_not_subscribe_to_are_reported_before_sending(
    cli: Command, scene: Scene
) -> None:
    scene.enter("adapter")
    result = await cli("send", "s1", "hello")
    assert (result.code, result.out) == (1, "")
    heard = re.escape("wechat.event.s1.receipt")
    assert re.search(rf"This user may not hear {heard}[^ ]*: use credentials that may", result.err)
    assert await scene.stored(NAMES.stream_out) == 0


async def test_what_it_may_is_done(cli: Command, scene: Scene) -> None:
    """A command whose receipt nobody waits for needs no right to hear it."""
    scene.enter("adapter")
    result = await cli("send", "s1", "hello", "--no-wait")
    assert (result.code, result.err) == (0, "")
    assert await scene.stored(NAMES.stream_out) == 1


FORBIDDEN = {
    "bindings": "wechat.svc.bindings.list",
    "send s2 hello --no-wait": "wechat.out.s2",
    "login s1": "wechat.svc.login.start",
    "unbind s1 --all": "wechat.unbind.s1",
    "queue drop 1": "$JS.API.STREAM.INFO.WECHAT_OUT",
    "dead ls": "$JS.API.STREAM.INFO.WECHAT_DEAD",
    "dead show 1": "$JS.API.STREAM.INFO.WECHAT_DEAD",
    "dead drop 1": "$JS.API.STREAM.INFO.WECHAT_DEAD",
    "trace s2 x": "$JS.API.STREAM.INFO.WECHAT_EVENT",
}


async def test_requests_and_writes_that_it_may_not_make_are_reported(cli: Command, scene: Scene) -> None:
    scene.enter("s1")
    for arguments, subject in FORBIDDEN.items():
        result = await cli(*arguments.split())
        assert (result.code, result.out) == (1, ""), arguments
        assert f"This user may not publish to {subject}: use credentials that may" in result.err


async def test_an_operator_finds_and_drops_what_is_queued(cli: Command, scene: Scene) -> None:
    scene.enter("operator")
    assert (await cli("send", "s1", "hello", "--no-wait", "--id", "c1")).code == 0
    (row,) = (await cli("trace", "s1", "c1", "--json")).rows
    assert (row["step"], row["what"]) == ("command", "waits")
    assert (await cli("queue", "drop", str(row["sequence"]))).code == 0
    assert await scene.stored(NAMES.stream_out) == 0


async def test_an_operator_is_told_which_user_may_fix(cli: Command, scene: Scene) -> None:
    """It was told that JetStream did not answer."""
    scene.enter("operator")
    result = await cli("doctor", "--fix")
    assert result.code == 1
    assert "This user may not do what --fix does: use the adapter's credentials." in result.err


@pytest.mark.parametrize("arguments", [["send", "s1", "hello"], ["bindings"]], ids=" ".join)
async def test_a_foreign_inbox_prefix_is_reported_by_its_setting(
    cli: Command, scene: Scene, arguments: list[str]
) -> None:
    scene.enter("operator", NATS_INBOX_PREFIX="_INBOX")
    result = await cli(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "set NATS_INBOX_PREFIX" in result.err
    assert await scene.stored(NAMES.stream_out) == 0


async def test_operators_may_ask_for_an_erasure_and_only_adapters_may_read_what_there_is(
    cli: Command, scene: Scene
) -> None:
    scene.enter("operator")
    asked = await cli("erase", "--user", "o9cq80demo@im.wechat", "--timeout", "0.5", "--yes")
    assert (asked.code, await scene.stored(NAMES.stream_out)) == (4, 1)
    refused = await cli("export", "--user", "o9cq80demo@im.wechat")
    assert (refused.code, refused.out) == (1, "")
    assert "use credentials that may" in refused.err
    scene.enter("adapter")
    assert (await cli("export", "--user", "o9cq80demo@im.wechat")).code == 0
