"""Marked secrets: everything that the simulator makes up as one bears a mark, and no output may hold it.

The whole suite runs with them. What each test prints is looked through when it has passed (conftest), and what a
whole bridge leaves behind when it ends (tests/e2e/world.py): logs, /metrics, and the server's disk.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapter.simulator import Simulator, ids

TOKEN = "06ca4a21ca4a21"
"""Hex, as the secret half of a bot's token begins."""
CONTEXT = "AARzJWcanaryCANARYcanary"
TICKET = base64.b64encode(b"canary-ticket-canary-").decode()
QRCODE = "ca4a21ca4a21c0de"

MARKS: Mapping[str, str] = {
    "a bot's token": TOKEN,
    "a context token": CONTEXT,
    "a ticket": TICKET,
    "a QR code": QRCODE,
}
WRITTEN = "what somebody wrote"
"""How a text is named that was found."""

WELL_KNOWN = 12
"""What is shorter may stand in base64 by chance."""
RAFT = "_js_"
"""Folder of a server's Raft logs."""

_PRINTED = re.compile(
    rf"(?<!in:)(?<![\w.-])[\w.-]+@im\.bot:\w{{4}}|AARzJW|{re.escape(TICKET)}|{QRCODE}|Bearer [0-9A-Za-z]", re.ASCII
)
"""Also of the secrets that tests make up themselves. An id of a message is none: `in:b1@im.bot:m749…`."""


def mark() -> None:
    """From now on the simulator's secrets bear marks."""

    def new_token(rng: random.Random, bot: str) -> str:
        return f"{bot}:{TOKEN}{rng.getrandbits(112):028x}"

    def new_context_token(rng: random.Random) -> str:
        return f"{CONTEXT}{ids.chars(rng, ids.BASE64, 136 - len(CONTEXT))}"

    def new_ticket(rng: random.Random) -> str:
        return TICKET + base64.b64encode(rng.randbytes(12)).decode()

    def new_qrcode(rng: random.Random) -> str:
        return f"{QRCODE}{rng.getrandbits(64):016x}"

    ids.new_token, ids.new_context_token, ids.new_ticket, ids.new_qrcode = (
        new_token,
        new_context_token,
        new_ticket,
        new_qrcode,
    )


def printed(text: str) -> str:
    """The first secret in what a test printed, "" if there is none."""
    found = _PRINTED.search(text)
    return found[0] if found else ""


def keys_of(sim: Simulator) -> dict[str, str]:
    """The keys of all media on its CDN, in each form in which they travel, and where they lie."""
    found: dict[str, str] = {}
    for reference, blob in sim.media.blobs.items():
        found[reference] = "a place on the CDN"
        if blob.key is not None:
            for form in (blob.key.hex().encode(), blob.key):
                found[base64.b64encode(form).decode()] = "a medium's key"
            found[blob.key.hex()] = "a medium's key"
    return found


def leaks(where: str, data: bytes, secrets: Iterable[tuple[str, str]]) -> list[str]:
    """What of `secrets` (the text, what it is) stands in `data`, as sentences that do not repeat it."""
    return [f"{what} is in {where}" for secret, what in secrets if any(form in data for form in forms_of(secret))]


@functools.cache
def forms_of(secret: str) -> tuple[bytes, ...]:
    """It, and what of it is to be seen in the base64 of a text in which it stands, as in iLink's cursors."""
    forms = [secret.encode()]
    for before in range(3) if len(secret) >= WELL_KNOWN else ():
        packed = base64.b64encode(bytes(before) + secret.encode())
        forms.append(packed[-(-before * 8 // 6) : (before + len(secret.encode())) * 8 // 6])
    return tuple(forms)


def arguments(pid: int) -> bytes:
    """The command line of a process and of those that it has started: everybody on a machine may read it."""
    found, pids = b"", [pid]
    while pids:
        folder = Path(f"/proc/{pids.pop()}")
        with contextlib.suppress(OSError):  # it has ended
            found += (folder / "cmdline").read_bytes()
            pids += [int(child) for child in (folder / "task" / folder.name / "children").read_text().split()]
    return found


def leaks_on_disk(folder: Path, texts: Iterable[str]) -> list[str]:
    """What lies open in the files of a NATS server, but for the log of a cluster's Raft: secrets, and in buckets also
    `texts` that somebody wrote.

    That log holds each message until the server shortens it: SECURITY.md says so.
    """
    secrets = [(secret, what) for what, secret in MARKS.items()]
    private = [*secrets, *((text, WRITTEN) for text in texts)]
    return [
        leak
        for path in sorted(folder.rglob("*"))
        if path.is_file() and RAFT not in path.parts
        for leak in leaks(
            str(path.relative_to(folder)),
            path.read_bytes(),
            private if any(part.startswith("KV_") for part in path.parts) else secrets,
        )
    ]
