"""What `agent` refuses before it begins, and how it signs. `tests/e2e/test_agent.py` has it at work."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from adapter.agent.webhook import sign
from adapter.cli.embedded import EmbeddedNats
from tests.cli.conftest import Command

SECRET = f"whsec_{base64.b64encode(bytes(32)).decode()}"


@pytest.mark.parametrize(
    ("arguments", "secret", "sentence"),
    [
        ([], "", "Give one of --exec, --http and --nats-agent."),
        (["--exec", "true", "--http", "https://a.example"], SECRET, "Give one of --exec, --http and --nats-agent."),
        (["--exec", "printf 'no end"], "", "The program cannot be read: No closing quotation."),
        (["--exec", " "], "", "The program is empty."),
        (["--exec", "true", "--timeout", "0"], "", "Expected a number above 0."),
        (["--exec", "true", "--max-output", "50000"], "", "Must be <= 40000"),
        (["--http", "https://a.example"], "", "Set WECHAT_WEBHOOK_SECRET"),
        (["--http", "https://a.example"], "whsec_c2hvcnQ=", "The secret is whsec_"),
        (["--http", "https://a.example"], SECRET.removeprefix("whsec_"), "The secret is whsec_"),
        (["--http", "a.example"], SECRET, "Expected a URL"),
        (["--nats-agent", "a/b/c/d"], "", "Expected NAME, NAME/OWNER or NAME/OWNER/SESSION."),
        (["--nats-agent", "a//c"], "", "Expected NAME, NAME/OWNER or NAME/OWNER/SESSION."),
    ],
)
async def test_what_makes_no_sense_is_refused(
    server: EmbeddedNats,
    cli: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    secret: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("WECHAT_WEBHOOK_SECRET", secret)
    result = await cli("agent", "s1", "--state", str(tmp_path / "state"), *arguments)
    assert result.code == 2
    assert sentence in result.err
    assert not secret or secret not in result.err


async def test_a_state_that_cannot_be_used_is_said(server: EmbeddedNats, cli: Command, tmp_path: Path) -> None:
    (tmp_path / "sessions.json").write_text("no JSON")
    result = await cli("agent", "s1", "--exec", "true", "--state", str(tmp_path))
    assert result.code == 1
    assert "Cannot use" in result.err


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """By the example that libraries for it are tested with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
