"""JWTs by the scripts for `nsc`: what a sandbox's signing key gives, and that the scripts are for a shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from nats.errors import Error as NatsError

from adapter.contract.names import Names
from adapter.tools.accounts import OF_ONE, ROLES, grants
from tests.bus.guarded import NAMES, Guarded, User, guarded
from tests.bus.nsc import ACCOUNT, LONGEST_LINE, NO_LIMITS, USER, Key, encode
from tests.generate import ROOT


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


def made(server: Guarded, file: Path, **claims: Any) -> Path:
    """Credentials that are signed by the key of the role `sandbox`."""
    assert server.nsc is not None
    user = {"type": "user", "issuer_account": server.nsc.public("SANDBOX"), **claims}
    file.write_text(server.nsc.new_creds("SANDBOX", "x", user, scoped=True))
    return file


@pytest.mark.parametrize(
    ("tags", "opens"), [(["sandbox:s1"], True), ([], False), (["other:s1"], False), (["sandbox:"], False)]
)
async def test_a_user_without_a_sandbox_gets_nothing(tmp_path: Path, tags: list[str], opens: bool) -> None:
    """The template of the signing key has nothing to put in, and opens nothing instead."""
    async with guarded(tmp_path, "jwt") as server:
        assert await gets_in(server, "s1", made(server, tmp_path / "made.creds", tags=tags)) is opens


async def test_a_signing_key_gives_no_more_than_its_template(tmp_path: Path) -> None:
    """Permissions written into the user's JWT do not widen it: the server refuses the user."""
    async with guarded(tmp_path, "jwt") as server:
        wide = {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}}
        assert not await gets_in(server, "s1", made(server, tmp_path / "x.creds", tags=["sandbox:s1"], **wide))


def test_the_longest_credentials_fit_into_the_line_that_a_server_reads() -> None:
    """Also under the longest prefix, which is in every subject. Beside the JWT a signature is in it, and a name."""
    user, signer, lengths = Key(USER), Key(ACCOUNT), []
    for role in ROLES:
        may = grants(Names("w" * 32), role)
        claims = {"pub": {"allow": may.publish}, "sub": {"allow": may.subscribe}, "type": "user"} | NO_LIMITS
        lengths.append(len(encode(signer, user.public, "x", claims)))
    assert max(lengths) < LONGEST_LINE - 1024


@pytest.mark.parametrize("script", [f"nsc-{role}{each}.sh" for role in OF_ONE for each in ("", "-each")])
@pytest.mark.parametrize("name", ["S1", "*", "../s1", "", "s1\n"])
def test_no_credentials_for_a_name_that_is_none(tmp_path: Path, script: str, name: str) -> None:
    """A tag `*` would open every sandbox."""
    (tmp_path / "nsc").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/called\n')
    (tmp_path / "nsc").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "helm/nats" / script)]
    assert subprocess.run([*command, name], env=environ, check=False, capture_output=True).returncode == 2
    assert not (tmp_path / "called").exists()
    subprocess.run([*command, "s-1_a"], env=environ, check=True)
    *_, user, creds = (tmp_path / "called").read_text().splitlines()
    role = script.removeprefix("nsc-").removesuffix(".sh").removesuffix("-each")
    assert user.endswith(f"--name s-1_a --private-key {role} --tag sandbox:s-1_a")
    assert creds.endswith("--name s-1_a --output-file s-1_a.creds")
