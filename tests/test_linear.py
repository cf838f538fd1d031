"""What others write is read in time that grows with its length, not with the square of it: whatever they write.

A square of 160,000 characters held the service up for minutes, and the next replica after it.
"""

from __future__ import annotations

import ast
import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

import adapter
from adapter.agent import runner
from adapter.bridge import commands
from adapter.bridge.commands import Limits
from adapter.bridge.texts import closing_fence, split, widen
from adapter.cli import output, stdin, stored
from adapter.console import languages, server
from adapter.contract import names
from adapter.errors import Refused, Unreadable
from adapter.ilink import cipher, network, protocol, wire
from adapter.jetstream import client
from adapter.logins import records
from adapter.tools import decoding, logs
from adapter.tools.media_types import clean_file_name
from tests.hostile import TEXTS, steps

ROOT = Path(adapter.__file__).parent
LIMITS = Limits(command_bytes=10**7, part_chars=4000, part_bytes=16_384, parts=10, park_ms=1000)


def raw(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def unreadable(text: str) -> None:
    """A command in whose fields the text stands where it may not."""
    for field in ("when_closed", "typing", "id", "sandbox"):
        with contextlib.suppress(Unreadable):
            commands.decode_command(
                msgspec.json.encode({"text": "a", field: text.encode("utf-8", "replace").decode()}), LIMITS
            )


def url(text: str) -> None:
    for check in (network.check_url, network.check_link):
        for start in ("", "https://"):
            try:
                check(start + text[: wire.URL_CHARS], ())
            except Refused:
                continue
    network._HOST_PORT.fullmatch(text)
    network._HOST.fullmatch(text)


def name(text: str) -> None:
    names.is_sandbox(text)
    names._INBOX.fullmatch(text)
    names.escape_token(text.encode("utf-8", "replace").decode())


RULES: dict[str, Callable[[str], object]] = {
    "an answer of an agent": lambda text: runner.UNSEEN.sub("", text),
    "brackets outside code": widen,
    "a text in parts": lambda text: split(text.encode("utf-8", "replace").decode(), 4000, 16_384),
    "an open fence": closing_fence,
    "the name of a file": partial(clean_file_name, most=128),
    "a command that is none": unreadable,
    "what a decoder says": lambda text: commands._describe_error(ValueError(text)),
    "whom a command names": commands.PEER.fullmatch,
    "which command one names": lambda text: commands.identity_of({names.H_ORIGINAL: text}, 9, 9),
    "secrets in a log": logs.hide_secrets,
    "a line of a log": lambda text: logs.redact_text(text, 10**9),
    "a field of a log": lambda text: logs.redact(None, "", {text: "1"}),
    "halves of emoji": lambda text: decoding.without_halves(raw(text)),
    "halves of emoji in a string": lambda text: decoding.without_halves(b'"' + raw(text) + b'"'),
    "controls in JSON": lambda text: decoding.without_controls(raw(text)),
    "controls in a string": lambda text: decoding.without_controls(b'{"a":"' + raw(text)),
    "words of the CDN": lambda text: protocol.cdn_refusal(400, {"x-error-message": text}),
    "a URL": url,
    "a URL of a code": wire.PLAIN_URL.fullmatch,
    "a key": cipher._HEX_KEY.fullmatch,
    "a name": name,
    "the id of a login": records._ID.fullmatch,
    "a header of a command": lambda text: names.forwardable_headers({text: text}),
    "a traceparent": lambda text: names.author_traceparent({"traceparent": text}),
    "headers of a message": lambda text: client.parse_headers(b"NATS/1.0\r\n" + raw(text) + b"\r\n"),
    "headers to write": lambda text: client._publish_command("a", "", {"a": text, text: "a"}, b""),
    "a complaint of the server": lambda text: client.permission_violation(Exception(text)),
    "a name that may be a secret's": stored._SECRET_NAME.search,
    "what a command prints": output.printable,
    "JSON that a command prints": lambda text: output._UNPRINTABLE_IN_JSON.sub("", text),
    "a code on a terminal": lambda text: stdin.COLOURS.sub("", text),
    "the languages of a browser": languages.preferred,
    "a path of the console": lambda text: (server._LOGIN.fullmatch(text), server._LETTER.fullmatch(text)),
}

TRIED = {
    "agent/runner.py": 1,
    "cli/acceptance.py": 1,  # what an operator types
    "cli/stored.py": 1,
    "cli/login.py": 1,  # what an operator types
    "cli/output.py": 2,
    "cli/stdin.py": 1,
    "console/languages.py": 1,
    "console/server.py": 3,
    "tools/media_types.py": 1,
    "ilink/cipher.py": 1,
    "ilink/protocol.py": 2,
    "ilink/network.py": 2,
    "ilink/wire.py": 1,
    "jetstream/client.py": 2,
    "logins/records.py": 1,
    "tools/logs.py": 4,
    "tools/decoding.py": 4,
    "contract/names.py": 6,
    "bridge/commands.py": 3,
    "bridge/texts.py": 3,
}
"""Regular expressions by file of `adapter/`, which RULES try."""
OPERATORS = {
    "agent/openai.py": 1,
    "agent/presets.py": 1,
    "cli/permission_checks.py": 1,
    "cli/permissions.py": 1,
    "cli/run.py": 1,
    "cli/send.py": 1,
    "cli/embedded.py": 2,
    "settings.py": 3,
}
"""Those that see nothing but what an operator typed or set, and what the server beside us says of itself."""


def regexes() -> dict[str, int]:
    """How many regular expressions each file makes or uses, the simulator's apart."""
    found: dict[str, int] = {}
    for path in sorted(ROOT.rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if where.startswith("simulator/"):
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made = [
            call
            for call in calls
            if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "re"
        ]
        if made:
            found[where] = len(made)
    return found


def test_every_regular_expression_is_looked_at() -> None:
    """A new one gets a rule above, or sees no words but an operator's."""
    assert regexes() == TRIED | OPERATORS


def seconds(rule: Callable[[str], object], text: str) -> float:
    began = time.process_time()
    rule(text)
    return time.process_time() - began


@pytest.mark.parametrize("what", RULES)
def test_eight_times_the_text_takes_about_eight_times_as_long(what: str) -> None:
    """The square would take sixty-four times as long. Generous, since machines are busy."""
    slow = {}
    for text, make in TEXTS.items():
        for _ in range(2):  # a machine that is busy is busy once
            once, eight = seconds(RULES[what], make(1500)), seconds(RULES[what], make(12_000))
            if eight <= 24 * max(once, 0.001):
                break
        else:
            slow[text] = f"{once * 1000:.1f} ms, {eight * 1000:.1f} ms"
    assert slow == {}


@pytest.mark.parametrize(
    "rule", [widen, closing_fence, partial(split, max_chars=400, max_bytes=16_384)], ids=["wide", "fence", "parts"]
)
def test_twice_the_text_takes_about_twice_the_steps(rule: Callable[[str], object]) -> None:
    many = {}
    for text, make in TEXTS.items():
        if rule is not widen and "half" in text:
            continue  # no decoder lets it pass, and it cannot be encoded
        once, twice = steps(rule, make(800)), steps(rule, make(1600))
        if twice > 2.5 * once + 1000:
            many[text] = (once, twice)
    assert many == {}
