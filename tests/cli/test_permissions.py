"""`permissions`: what it prints is a server's configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bus.guarded import guarded
from tests.cli.conftest import Command


@pytest.mark.parametrize("each", [(), ("--each",)], ids=["together", "each"])
async def test_a_server_takes_the_accounts_of_many_sandboxes(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: tuple[str, ...]
) -> None:
    file = tmp_path / "passwords.conf"
    file.write_text('PASSWORD_S7: "seven"\nPASSWORD_GONE: "gone"\n')
    sandboxes = [f"s{number}" for number in range(50)]
    printed = await cli("permissions", *sandboxes, "--untrusted", "u-1", *each, "--passwords", str(file))
    assert printed.code == 0
    passwords = dict(re.findall(r'PASSWORD_(\w+): "(\w+)"', file.read_text()))
    assert (len(passwords), passwords["S7"], len(passwords["U_1"])) == (57, "seven", 32)
    assert len(set(passwords.values())) == 57
    assert file.stat().st_mode & 0o77 == 0
    async with guarded(tmp_path, edit=lambda _: printed.out) as server:
        monkeypatch.setenv("NATS_URL", server.url)
        for name, variable in (("s7", "S7"), ("s49", "S49")):
            monkeypatch.setenv("NATS_USER", name)
            monkeypatch.setenv("NATS_PASSWORD", passwords[variable])
            monkeypatch.setenv("NATS_INBOX_PREFIX", f"_INBOX_{name}")
            result = await cli("doctor", "--sandbox", name, "--json")
            assert [(row["check"], row["state"]) for row in result.rows] == [("own", "ok"), ("others", "ok")]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("a-b", "a_b"), "a-b has the same variable"),
        (("s1", "s1"), "that name is taken"),
        (("adapter",), "that name is taken"),
        (("sys",), "that name is taken"),
        (("S1",), "1 to 64 characters"),
    ],
)
async def test_names_that_would_share_a_password_are_refused(cli: Command, names: tuple[str, ...], why: str) -> None:
    result = await cli("permissions", *names)
    assert (result.code, result.out) == (2, "")
    assert why in result.err
