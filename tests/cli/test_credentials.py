"""Files of credentials that cannot be used: told by the setting's name, and tried again."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import nkeys
import pytest

from adapter.cli.embedded import EmbeddedNats
from adapter.errors import Temporary
from adapter.jetstream.credentials import UserKey
from adapter.jetstream.managed_connection import connect_options
from adapter.settings import Settings
from tests.authority import Authority
from tests.bus.guarded import guarded
from tests.bus.test_tls import linked
from tests.cli.conftest import Command
from tests.e2e.waiting import eventually, until

SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
JWT_PART = "-----BEGIN NATS USER JWT-----\na.b.c\n------END NATS USER JWT------\n"
SEED_PART = "-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n"

UNUSABLE = {
    "creds, empty": ("nats_creds", b""),
    "creds, binary": ("nats_creds", bytes(range(256))),
    "creds without a JWT": ("nats_creds", SEED_PART.format(SEED).encode()),
    "creds with half a seed": ("nats_creds", (JWT_PART + SEED_PART.format(SEED[:20])).encode()),
    "nkey, garbage": ("nats_nkey", b"a private word\n"),
    "nkey, not ASCII": ("nats_nkey", "é".encode()),
    "nkey, a public one": ("nats_nkey", nkeys.from_seed(bytearray(SEED.encode())).public_key),
    "CA, garbage": ("nats_ca", b"a private word\n"),
    "certificate, garbage": ("nats_cert", b"a private word\n"),
}


@pytest.mark.parametrize(("field", "content"), UNUSABLE.values(), ids=UNUSABLE)
async def test_credentials_that_cannot_be_used_are_reported_by_their_setting(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, content: bytes
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    settings = msgspec.structs.replace(Settings(), **{field: str(file)})
    with pytest.raises(Temporary) as caught:
        connect_options(settings, "test", ["nats://127.0.0.1:1"])
    assert caught.value.detail.startswith(field.upper())
    monkeypatch.setenv(field.upper(), str(file))
    if field == "nats_cert":
        monkeypatch.setenv("NATS_KEY", str(file))
    result = await cli("send", "s1", "hello")
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith(f"wechat-nats: {field.upper()}")
    assert (await cli("doctor")).code == 3
    for text in (SEED[:20], "private word"):
        assert text not in caught.value.detail + result.err


WRONG = {
    "of an account": nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_ACCOUNT).decode(),
    "another character": SEED[:20] + ("A" if SEED[20] != "A" else "B") + SEED[21:],
    "lower case": SEED.lower(),
    "too long": SEED + "AAAAAAAA",
}


@pytest.mark.parametrize("seed", WRONG.values(), ids=WRONG)
def test_what_is_no_seed_of_a_user_is_refused(seed: str) -> None:
    with pytest.raises(ValueError):
        UserKey(seed)


async def test_a_server_knows_a_user_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "seed").write_text(SEED + "\n")

    class Keyed(EmbeddedNats):
        def _write_config(self) -> Path:
            config = super()._write_config()
            key = UserKey(SEED).public
            config.write_text(f"{config.read_text()}\nauthorization {{ users: [ {{ nkey: {key} }} ] }}\n")
            return config

        async def _wait_jetstream(self) -> None:
            return

    async with Keyed() as server:
        settings = Settings(nats_url=(server.url,), nats_nkey=str(tmp_path / "seed"))
        async with linked(settings) as connection:
            nc = await connection.wait_connected(30)
            said = await nc.request("$SYS.REQ.USER.INFO", timeout=10)
            assert UserKey(SEED).public.encode() in said.data


async def test_credentials_that_break_under_a_running_link_are_read_again_until_they_serve(
    tmp_path: Path,
) -> None:
    """As when a Secret is exchanged by hand: a link outlives what cannot be read, and takes what comes next."""
    async with guarded(tmp_path, "jwt") as server:
        file = tmp_path / "mounted.creds"
        good = (tmp_path / "jwt/adapter.creds").read_bytes()
        file.write_bytes(good)
        settings = Settings(nats_url=(server.url,), nats_creds=str(file), nats_inbox_prefix="_INBOX_adapter")
        async with linked(settings) as connection:
            await connection.wait_connected(30)
            file.write_bytes(b"a private word\n")
            await connection.client().close()
            await until(
                lambda: connection.down_reason.startswith("NATS_CREDS cannot be used"), "it reads the file again"
            )
            swap = tmp_path / "next"
            swap.write_bytes(good)
            os.replace(swap, file)

            async def up() -> bool:
                return connection.is_connected

            await eventually(up, "it connects by what is there now")


async def test_an_authority_is_read_again_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    settings = Settings(nats_url=("nats://127.0.0.1:1",), nats_ca=str(authority.file))
    good = authority.file.read_bytes()
    authority.file.write_bytes(b"garbage")
    async with linked(settings) as connection:
        await until(lambda: connection.down_reason.startswith("NATS_CA"), "it names what it cannot read")
        authority.file.write_bytes(good)
        await until(lambda: "NATS_CA" not in connection.down_reason, "it goes on by what is there now")
