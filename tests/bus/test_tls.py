"""Connections to a server that asks for certificates, in both orders of the handshake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import nkeys
import pytest
from msgspec.structs import replace

from adapter.cli.embedded import find_server
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.settings import Settings
from tests.authority import Authority
from tests.bus.guarded import ports_of
from tests.e2e.waiting import eventually, until


@contextlib.asynccontextmanager
async def server(folder: Path, authority: Authority, *, first: bool, more: str = "") -> AsyncIterator[str]:
    """The URL of a nats-server that asks for a certificate of the authority."""
    cert, key = authority.issue("server")
    config = folder / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:-1"\nports_file_dir: "{folder}"\n'
        f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{authority.file}", verify: true,'
        f" handshake_first: {str(first).lower()} }}\n{more}\n"
    )
    process = await asyncio.create_subprocess_exec(find_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL)
    ports = folder / f"nats-server_{process.pid}.ports"
    try:

        def listens() -> bool:
            with contextlib.suppress(OSError, ValueError):
                return bool(json.loads(ports.read_text())["nats"])
            return False

        await until(listens, "the server listens")
        yield str(json.loads(ports.read_text())["nats"][0]).replace("tls://", "nats://")
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def linked(settings: Settings) -> AsyncIterator[ManagedConnection]:
    connection = ManagedConnection(settings, "test")
    task = asyncio.create_task(connection.run())
    try:
        yield connection
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("first", [False, True], ids=["after the greeting", "from the first byte"])
async def test_a_link_with_a_certificate_of_its_own(tmp_path: Path, first: bool) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("adapter")
    async with server(tmp_path, authority, first=first) as url:
        settings = Settings(
            nats_url=(url,), nats_ca=str(authority.file), nats_cert=str(cert), nats_key=str(key), nats_tls_first=first
        )
        async with linked(settings) as connection:
            nc = await connection.wait_connected(30)
            subscription = await nc.subscribe("greeting")
            await nc.publish("greeting", b"hello")
            assert (await subscription.next_msg(timeout=10)).data == b"hello"


async def test_a_server_of_another_authority_is_not_believed(tmp_path: Path) -> None:
    """And no credentials are sent to it: the handshake fails before."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    authority, other = map(Authority, folders)
    cert, key = other.issue("adapter")
    async with server(folders[0], authority, first=False) as url:
        settings = Settings(nats_url=(url,), nats_ca=str(other.file), nats_cert=str(cert), nats_key=str(key))
        async with linked(settings) as connection:
            await until(lambda: connection.down_reason != "not connected yet", "it has tried")
            assert not connection.is_connected


@pytest.mark.parametrize("by", ["the URL", "the authority"])
async def test_a_client_that_wants_tls_sends_nothing_to_a_server_without_it(tmp_path: Path, by: str) -> None:
    """The greeting is not encrypted, and may be another's than the server's: nats-py would send the password then."""
    received = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.14.0","max_payload":1048576,"headers":true}\r\n')
        while data := await reader.read(4096):
            received.extend(data)
            if b"PING\r\n" in data:
                writer.write(b"PONG\r\n")
            elif not data.startswith(b"CONNECT"):  # a handshake, which nats-server ends so
                writer.write(b"-ERR 'Unknown Protocol Operation'\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1") as attacker:
        address = f"127.0.0.1:{attacker.sockets[0].getsockname()[1]}"
        if by == "the URL":
            settings = Settings(nats_url=(f"tls://{address}",))
        else:
            settings = Settings(nats_url=(f"nats://{address}",), nats_ca=str(Authority(tmp_path).file))
        async with linked(replace(settings, nats_user="me", nats_password="not to be heard")) as connection:
            await until(lambda: connection.is_connected or "SSL" in connection.down_reason, "it has tried")
            assert not connection.is_connected
    assert received
    assert b"not to be heard" not in received


async def test_who_asks_for_tls_has_it_of_a_server_that_leaves_it_open(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("adapter")
    async with server(tmp_path, authority, first=False, more="allow_non_tls: true") as url:
        settings = Settings(nats_url=(url,), nats_ca=str(authority.file), nats_cert=str(cert), nats_key=str(key))
        async with linked(settings) as connection:
            nc = await connection.wait_connected(30)
            assert nc._transport is not None
            assert nc._transport._io_writer.get_extra_info("ssl_object") is not None  # type: ignore[attr-defined]


async def test_certificates_that_are_exchanged_serve_at_the_next_connection(tmp_path: Path) -> None:
    """As a mounted Secret is renewed under a running adapter."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("adapter")
    async with server(tmp_path, authority, first=False) as url:
        settings = Settings(nats_url=(url,), nats_ca=str(authority.file), nats_cert=str(cert), nats_key=str(key))
        async with linked(settings) as connection:
            await connection.wait_connected(30)
            cert.write_text("this is no certificate")
            await connection.client().close()
            await until(
                lambda: not connection.is_connected and "PEM" in connection.down_reason.upper(),
                "it reads the file again",
            )
            authority.issue("adapter")

            async def connected() -> bool:
                return connection.is_connected

            await eventually(connected, "it connects by the new one")


async def test_a_rotated_key_is_read_at_the_next_connection(tmp_path: Path) -> None:
    """The server knows another key of the user from now on, and ends the connection; the file has the new one."""
    file, config = tmp_path / "user.nk", tmp_path / "nats.conf"
    listen = 'listen: "127.0.0.1:-1"'

    def rotate() -> None:
        pair = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
        file.write_bytes(pair.seed)
        users = f"authorization {{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}"
        config.write_text(f'{listen}\nports_file_dir: "{tmp_path}"\n{users}\n')

    rotate()
    process = await asyncio.create_subprocess_exec(find_server(), "-c", config, stderr=asyncio.subprocess.DEVNULL)
    try:
        await until(lambda: bool(ports_of(tmp_path)), "the server listens")
        (url,) = ports_of(tmp_path)
        listen = f'listen: "{url.removeprefix("nats://")}"'  # a reload may not change it
        async with linked(Settings(nats_url=(url,), nats_nkey=str(file))) as connection:
            first = await connection.wait_connected(30)
            rotate()
            process.send_signal(signal.SIGHUP)
            await until(lambda: first.is_closed, "the old key is not taken any more")
            assert await connection.wait_connected(30) is not first
    finally:
        process.kill()
        await process.wait()
