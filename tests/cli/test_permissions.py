"""`permissions`: what it makes is what servers take, keys stay private, and credentials can be taken back."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nats.errors import Error as NatsError

from adapter.cli import jwts
from adapter.cli.jwts import ACCOUNT, USER, Key
from adapter.cli.permissions import LONGEST_LINE, CredentialFolder
from adapter.contract.names import Names
from adapter.errors import Refused
from adapter.security.permissions import FILES, ROLES, grants
from tests.bus.guarded import NAMES, Guarded, User, guarded
from tests.cli.conftest import Command
from tests.generate import EXAMPLES, ROOT


def claims(creds: Path) -> dict[str, Any]:
    """What the JWT of a credentials file says."""
    body = creds.read_text().splitlines()[1].split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=="))
    return found


@pytest.mark.parametrize("own_accounts", [False, True], ids=FILES.values())
async def test_the_shipped_configurations_are_what_the_command_prints(cli: Command, own_accounts: bool) -> None:
    option = ["--own-accounts"] if own_accounts else []
    result = await cli("permissions", "config", *option, *EXAMPLES)
    assert result.code == 0
    assert result.out == (ROOT / "helm/nats" / FILES[own_accounts]).read_text()


@pytest.mark.parametrize("sandboxes", [("S1",), ("s1.s2",), ("*",), ("adapter",), ("a-b", "a_b"), ("s1", "s1")])
async def test_names_that_cannot_be_told_apart_are_refused(cli: Command, sandboxes: tuple[str, ...]) -> None:
    result = await cli("permissions", "config", *sandboxes)
    assert (result.code, result.out) == (2, "")
    assert result.err


async def test_everything_secret_is_for_its_owner_alone(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    assert (await cli("permissions", "init", str(folder))).code == 0
    result = await cli("permissions", "sandbox", str(folder), "s1")
    assert result.out == f"{folder}/creds/sandboxes/s1.creds\n"
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    seeds = [file.read_text().strip() for file in folder.rglob("*.nk")]
    assert len(seeds) == 7
    public = (folder / "server.conf").read_text() + "".join(file.read_text() for file in folder.rglob("*.jwt"))
    assert [seed for seed in seeds if seed in public] == []


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_keys_are_not_overwritten(cli: Command, tmp_path: Path) -> None:
    await cli("permissions", "init", str(tmp_path))
    before = content(tmp_path)
    result = await cli("permissions", "init", str(tmp_path))
    assert result.code == 1
    assert content(tmp_path) == before


async def test_a_user_of_a_sandbox_holds_nothing_but_its_tag(cli: Command, tmp_path: Path) -> None:
    await cli("permissions", "init", str(tmp_path))
    await cli("permissions", "sandbox", str(tmp_path), "s1", "--days", "2")
    found = claims(tmp_path / "creds/sandboxes/s1.creds")
    assert found["nats"].keys() == {"type", "version", "issuer_account", "tags"}
    assert found["nats"]["tags"] == ["sandbox:s1"]
    assert found["exp"] - found["iat"] == 2 * 86_400
    assert "exp" not in claims(tmp_path / "creds/adapter.creds")


@pytest.mark.parametrize("name", ["S1", "s1.s2", "*", ">", "s1 s2", "../s1", "s" * 65, ""])
async def test_no_credentials_for_a_name_that_is_none(cli: Command, tmp_path: Path, name: str) -> None:
    """A tag `*` would open every sandbox."""
    await cli("permissions", "init", str(tmp_path))
    assert (await cli("permissions", "sandbox", str(tmp_path), name)).code == 2
    assert not (tmp_path / "creds/sandboxes").exists()


async def test_a_folder_without_keys_is_told(cli: Command, tmp_path: Path) -> None:
    for command in ("sandbox", "revoke"):
        result = await cli("permissions", command, str(tmp_path), "s1")
        assert result.code == 2
        assert "operator.nk" in result.err
    assert (await cli("permissions", "push", str(tmp_path))).code == 2


def test_the_longest_credentials_fit_into_the_line_that_a_server_reads() -> None:
    """Also under the longest prefix, which is in every subject. Beside the JWT a signature is in it, and a name."""
    user, signer = Key.new(USER), Key.new(ACCOUNT)
    every = [jwts.user_claims(grants(Names("w" * 32), role)) for role in ROLES]
    longest = max(len(jwts.encode(signer, user.public, "x", claims)) for claims in every)
    assert longest < LONGEST_LINE - 1024


def test_a_key_signs_as_nkeys_verifies() -> None:
    key = jwts.Key.new(jwts.USER)
    jwt = jwts.encode(key, key.public, "x", {"type": "user"})
    signed, _, signature = jwt.rpartition(".")
    pair = nkeys.from_seed(bytearray(key.seed.encode()))
    assert pair.verify(signed.encode(), base64.urlsafe_b64decode(signature + "=="))
    assert jwts.Key(key.seed).public == key.public
    assert key.public.startswith("U")


@pytest.mark.parametrize("seed", ["", "SU", "hello", "UAB" + "A" * 53, "é"])
def test_what_is_no_seed_is_refused(seed: str) -> None:
    with pytest.raises(Refused):
        jwts.Key(seed)


# on a server ---------------------------------------------------------------------------------------------


async def gets_in(server: Guarded, name: str, creds: Path) -> bool:
    """Whether these credentials are taken, and open what is this sandbox's."""
    server.users["tried"] = User({"NATS_CREDS": str(creds), "NATS_INBOX_PREFIX": f"_INBOX_{name}"})
    try:
        player = await server.connect("tried")
    except NatsError as exc:
        if "authorization" not in str(exc).lower():
            raise
        return False
    await player.nc.subscribe(NAMES.live(name))
    for _ in range(2):
        await player.nc.flush()
    return player.refusals == []


async def test_credentials_are_taken_back_and_given_anew(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leaked file counts no longer, also for who is connected; a new one does; others notice nothing."""
    async with guarded(tmp_path, "jwt") as server:
        monkeypatch.setenv("NATS_URL", server.url)
        folder = tmp_path / "jwt"
        leaked = tmp_path / "leaked.creds"
        leaked.write_text((folder / "creds/sandboxes/s1.creds").read_text())
        assert await gets_in(server, "s1", leaked)
        inside, other = await server.connect("tried"), await server.connect("s2")
        assert (await cli("permissions", "revoke", str(folder), "s1")).code == 0
        assert await gets_in(server, "s1", leaked), "the servers do not know yet"
        result = await cli("permissions", "push", str(folder))
        assert (result.code, result.out) == (0, "5 accounts pushed.\n")
        assert not await gets_in(server, "s1", leaked)
        async with asyncio.timeout(60):
            while not inside.nc.is_closed:
                await asyncio.sleep(0.01)
        assert other.nc.is_connected
        assert (await cli("permissions", "sandbox", str(folder), "s1")).code == 0
        assert await gets_in(server, "s1", folder / "creds/sandboxes/s1.creds")
        assert not await gets_in(server, "s1", leaked)
        assert (await cli("permissions", "revoke", str(folder), "s3")).code == 1


async def test_an_account_of_its_own_is_pushed_to_a_server_that_runs(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(tmp_path, "jwt-each") as server:
        monkeypatch.setenv("NATS_URL", server.url)
        folder = tmp_path / "jwt"
        assert (await cli("permissions", "sandbox", str(folder), "signing", "--own-account")).code == 0
        creds = folder / "creds/sandboxes/signing.creds"
        assert not await gets_in(server, "signing", creds)
        assert (await cli("permissions", "push", str(folder))).code == 0
        assert await gets_in(server, "signing", creds)
        assert claims(creds)["nats"]["issuer_account"] == CredentialFolder(folder).keys["signing"].public


async def test_credentials_that_have_expired_do_not_count(cli: Command, tmp_path: Path) -> None:
    async with guarded(tmp_path, "jwt") as server:
        kept = CredentialFolder(tmp_path / "jwt")
        for days, counts in ((-1.0, False), (1.0, True)):
            claim = jwts.sandbox_claims(kept.keys["SANDBOX"].public, "s1")
            file = tmp_path / "made.creds"
            file.write_text(jwts.new_creds(kept.signing, "s1", claim, days=days)[1])
            assert await gets_in(server, "s1", file) is counts


async def test_an_administrator_backs_up_what_no_role_may(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(tmp_path, "jwt") as server:
        monkeypatch.setenv("NATS_URL", server.url)
        folder = tmp_path / "jwt"
        result = await cli("permissions", "admin", str(folder))
        assert (result.code, result.out) == (0, f"{folder}/creds/admin.creds\n")
        found = claims(folder / "creds/admin.creds")
        assert found["exp"] - found["iat"] == 86_400
        monkeypatch.setenv("NATS_CREDS", result.out.strip())
        assert "creating stream WECHAT_IN" in (await cli("doctor", "--fix")).out
        saved = await cli("backup", str(tmp_path / "saved"))
        assert (saved.code, saved.err) == (0, "")
        monkeypatch.setenv("NATS_CREDS", str(folder / "creds/operator.creds"))
        monkeypatch.setenv("NATS_INBOX_PREFIX", "_INBOX_operator")
        refused = await cli("backup", str(tmp_path / "other"))
        assert (refused.code, "use an administrator's credentials" in refused.err) == (1, True), refused.err


@pytest.mark.parametrize("tags", [[], ["other:s1"], ["sandbox:"]])
async def test_a_user_without_a_sandbox_gets_nothing(tmp_path: Path, tags: list[str]) -> None:
    """The template of the signing key has nothing to put in, and opens nothing instead."""
    async with guarded(tmp_path, "jwt") as server:
        kept = CredentialFolder(tmp_path / "jwt")
        claim: dict[str, Any] = {"type": "user", "issuer_account": kept.keys["SANDBOX"].public, "tags": tags}
        file = tmp_path / "made.creds"
        file.write_text(jwts.new_creds(kept.signing, "x", claim)[1])
        assert not await gets_in(server, "s1", file)


async def test_a_signing_key_gives_no_more_than_its_template(tmp_path: Path) -> None:
    """Permissions written into the user's JWT do not widen it: the server refuses the user."""
    async with guarded(tmp_path, "jwt") as server:
        kept = CredentialFolder(tmp_path / "jwt")
        claim: dict[str, Any] = {
            "type": "user",
            "issuer_account": kept.keys["SANDBOX"].public,
            "tags": ["sandbox:s1"],
        }
        claim |= {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}}
        file = tmp_path / "made.creds"
        file.write_text(jwts.new_creds(kept.signing, "x", claim)[1])
        assert not await gets_in(server, "s1", file)
