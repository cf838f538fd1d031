"""Contexts of the command `nats`, read as `nats` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapter.cli.bus import with_context
from adapter.cli.embedded import EmbeddedNats
from adapter.errors import SettingsError
from tests.cli.conftest import Command


def save(home: Path, name: str, **fields: object) -> None:
    """As `nats context save` does: every field, most of them empty."""
    folder = home / "nats" / "context"
    folder.mkdir(parents=True, exist_ok=True)
    empty = dict.fromkeys(("token", "user", "password", "creds", "nkey", "cert", "key", "ca", "user_jwt", "nsc"), "")
    (folder / f"{name}.json").write_text(json.dumps({"description": "", **empty, **fields}))


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {"NATS_URL": "nats://127.0.0.1:4222"}),
        ({"url": "nats://a,nats://b", "creds": "/c"}, {"NATS_URL": "nats://a,nats://b", "NATS_CREDS": "/c"}),
        ({"url": "tls://a", "nkey": "/n", "ca": "/ca"}, {"NATS_URL": "tls://a", "NATS_NKEY": "/n", "NATS_CA": "/ca"}),
        (
            {"url": "tls://a", "cert": "/c", "key": "/k", "tls_first": True},
            {"NATS_URL": "tls://a", "NATS_CERT": "/c", "NATS_KEY": "/k", "NATS_TLS_FIRST": "true"},
        ),
        (
            {"url": "nats://a", "user": "u", "password": "p", "token": "t", "inbox_prefix": "_INBOX_x"},
            {"NATS_URL": "nats://a", "NATS_USER": "u", "NATS_PASSWORD": "p", "NATS_INBOX_PREFIX": "_INBOX_x"},
        ),
    ],
    ids=["nothing", "creds", "nkey", "certificate", "user"],
)  # fmt: skip
def test_its_fields_are_variables(tmp_path: Path, fields: dict[str, object], variables: dict[str, str]) -> None:
    save(tmp_path, "prod", **fields)
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "NATS_CONTEXT": "prod"}
    assert with_context(environ) == environ | variables


def test_a_variable_beats_its_field(tmp_path: Path) -> None:
    save(tmp_path, "prod", url="nats://a", creds="/a.creds")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "NATS_CONTEXT": "prod", "NATS_URL": "nats://b", "NATS_CREDS": " "}
    found = with_context(environ)
    assert (found["NATS_URL"], found["NATS_CREDS"]) == ("nats://b", "/a.creds")


def test_the_home_folder_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / ".config", "prod", url="nats://a")
    assert with_context({"NATS_CONTEXT": "prod"})["NATS_URL"] == "nats://a"


def test_the_selected_one_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, "prod", url="nats://a")
    (tmp_path / "nats" / "context.txt").write_text("prod\n")
    assert with_context({"XDG_CONFIG_HOME": str(tmp_path)}) == {"XDG_CONFIG_HOME": str(tmp_path)}
    assert with_context({"XDG_CONFIG_HOME": str(tmp_path), "NATS_CONTEXT": "@selected"})["NATS_URL"] == "nats://a"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", r"absent\.json: No such file or directory; contexts: jwt, list\."),
        ("jwt", "has user_jwt, which is not supported"),
        ("list", "no JSON object"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str, words: str) -> None:
    save(tmp_path, "jwt", user_jwt="a-secret")
    (tmp_path / "nats" / "context" / "list.json").write_text('["a-secret"]')
    with pytest.raises(SettingsError, match=f"NATS_CONTEXT.*{words}") as caught:
        with_context({"XDG_CONFIG_HOME": str(tmp_path), "NATS_CONTEXT": name})
    assert "a-secret" not in str(caught.value)


async def test_a_command_connects_by_it(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("NATS_CONTEXT", "prod")
    async with EmbeddedNats(tmp_path / "data", token="a1") as server:
        host, token = server.url.rpartition("@")[2], "a1"
        save(tmp_path, "prod", url=f"nats://{host}", token=token)
        assert "No adapter runs on this bus" in (await cli("bindings")).err
        save(tmp_path, "prod", url=f"nats://{host}", token="wrong")
        assert "refused the credentials" in (await cli("bindings")).err
