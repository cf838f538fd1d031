"""Which subjects a pattern covers, and that the adapter asks for nothing that its role has not."""

from __future__ import annotations

import re

import pytest

from adapter.contract.names import Names
from adapter.tools.accounts import OF_ONE, ROLES, exports, grants, imports, server_config
from adapter.tools.permissions import Allowed, Grants, Permissions, covers, overlaps
from tests.generate import ROOT

NAMES = Names()

PATTERNS = [
    ("a.b", "a.b", True, True),
    ("a.b", "a.c", False, False),
    ("a.b", "a", False, False),
    ("a", "a.b", False, False),
    ("a.*", "a.b", True, True),
    ("a.*", "a.*", True, True),
    ("a.*", "a.>", False, True),
    ("a.*", "a.b.c", False, False),
    ("a.*", "a", False, False),
    ("a.b", "a.*", False, True),
    ("a.>", "a.b.c", True, True),
    ("a.>", "a.*.c", True, True),
    ("a.>", "a", False, False),
    ("a.>", ">", False, True),
    (">", "a", True, True),
    (">", ">", True, True),
    ("*", ">", False, True),
    ("*.b", "a.*", False, True),
    ("*.b.c", "a.b.*", False, True),
    ("*.b.c", "a.x.*", False, False),
    ("a.*.>", "a.b", False, False),
    ("a.*.>", "a.>", False, True),
]


@pytest.mark.parametrize(("pattern", "subject", "all_of", "some_of"), PATTERNS)
def test_patterns(pattern: str, subject: str, all_of: bool, some_of: bool) -> None:
    assert covers(pattern, subject) is all_of
    assert overlaps(pattern, subject) is overlaps(subject, pattern) is some_of


@pytest.mark.parametrize(
    ("allowed", "subject", "all_of", "some_of"),
    [
        (Allowed(), "a.b", True, True),
        (Allowed(("a.>",)), "a.b", True, True),
        (Allowed(("a.b",)), "a.*", False, True),
        (Allowed(("x",)), "a.b", False, False),
        (Allowed((), ("a.b",)), "a.b", False, False),
        (Allowed((), ("a.b",)), "a.*", False, True),
        (Allowed(("a.>",), ("a.b.>",)), "a.c", True, True),
        (Allowed((), (">",)), "a", False, False),
    ],
)
def test_what_is_allowed_and_not_denied(allowed: Allowed, subject: str, all_of: bool, some_of: bool) -> None:
    assert allowed.allows_all_of(subject) is all_of
    assert allowed.allows_some_of(subject) is some_of


def test_what_is_missing_is_named() -> None:
    may = Permissions(Allowed(("a.*",)), Allowed((), ("c",)))
    assert may.missing(Grants(("a.b", "x"), ("c", "d"))) == ["publish x", "subscribe c"]


def test_every_request_of_the_adapter_to_jetstream_is_granted() -> None:
    """A call in a corner that no test of permissions reaches would fail with the first who uses them."""
    files = [file for file in (ROOT / "adapter").rglob("*.py") if "cli" not in file.parts]
    files = [file for file in files if file.name not in ("permissions.py", "embedded.py")]
    verb = re.compile(r'"(?:\$JS\.API\.)?((?:STREAM|CONSUMER|DIRECT)(?:\.[A-Z]+)+)\.\{')
    asked = {found for file in files for found in verb.findall(file.read_text(encoding="utf-8"))}
    assert {"STREAM.INFO", "CONSUMER.MSG.NEXT", "DIRECT.GET"} <= asked
    granted = grants(NAMES, "adapter").publish
    assert [verb for verb in asked if not any(g.startswith(f"$JS.API.{verb}.") for g in granted)] == []


def test_a_sandbox_is_granted_nothing_without_its_name() -> None:
    for role in OF_ONE:
        for subject in (*grants(NAMES, role, "s1").publish, *grants(NAMES, role, "s1").subscribe):
            assert "s1" in subject.replace("_INBOX_", "").split(".")
        for subject in (*grants(NAMES, role).publish, *grants(NAMES, role).subscribe):
            assert "{{tag(sandbox)}}" in subject


def test_nothing_is_granted_in_another_account_that_is_not_imported() -> None:
    for role in ("platform", "service", *OF_ONE):
        shared = [share.subject for share in imports(NAMES, role, "s1")]
        may = grants(NAMES, role, "s1")
        own = f"_INBOX_{'s1' if role in OF_ONE else role}.>"
        assert [s for s in (*may.publish, *may.subscribe) if s not in (*shared, own)] == []


def test_no_export_holds_another() -> None:
    """A server refuses such an account."""
    found = list(exports(NAMES))
    assert [
        (a, b) for a in found for b in found if a != b and a.kind == b.kind and covers(a.subject, b.subject)
    ] == []
    for role in ("platform", "service", *OF_ONE):
        for share in imports(NAMES, role, "s1"):
            assert any(role in roles and covers(e.subject, share.subject) for e, roles in exports(NAMES).items())


def test_another_prefix_has_other_subjects() -> None:
    text = server_config(Names("wx"), ["s1"], untrusted=["u1"])
    assert "wechat" not in text.replace("wechat-nats", "").lower().replace('"wechat"', "")
    assert {role for role in ROLES if grants(Names("wx"), role) == grants(NAMES, role)} == set()
