"""`python -m tests.compat.freeze`: keeps what is released of the contract, for the tests of every later release.

Schemas and subjects become those of now, where they are compatible; messages are only added. To be run for a release.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from adapter.cli import schema
from adapter.contract.messages import MESSAGES, SCHEMA_VERSION
from adapter.contract.names import Names
from tests import asyncapi
from tests.compat.rules import breaks
from tests.generate import ROOT

HERE = Path(__file__).parent
NOW = HERE / f"v{SCHEMA_VERSION}"


def is_sent(name: str) -> bool:
    """Whether the adapter writes this message; else it reads it."""
    channels = asyncapi.channels(Names())
    return any(channel.answer == name or (channel.message == name and channel.does == "send") for channel in channels)


def subjects() -> dict[str, list[str]]:
    """What goes over each subject: the message, what the adapter does with it, and the message of the answer."""
    return {
        channel.subject: [channel.message, channel.does, channel.answer] for channel in asyncapi.channels(Names())
    }


def found_breaks(folder: Path = NOW) -> list[str]:
    """What the code says now that breaks a promise kept in `folder`."""
    found = []
    for path in sorted((folder / "schemas").glob("*.json")):
        if path.stem not in MESSAGES:
            found.append(f"{path.stem}: the message is gone")
            continue
        before, after = json.loads(path.read_bytes()), schema.json_schema(path.stem)
        found += [f"{path.stem}: {sentence}" for sentence in breaks(before, after, sent=is_sent(path.stem))]
    now = subjects()
    for subject, carried in json.loads((folder / "subjects.json").read_bytes()).items():
        if now.get(subject) != carried:
            found.append(f"{subject}: carried {carried}, now {now.get(subject)}")
    return found


def main() -> int:
    """Exit status."""
    if NOW.exists() and (broken := found_breaks()):
        sys.stderr.writelines(f"{sentence}\n" for sentence in broken)
        sys.stderr.write("A change that breaks needs another SCHEMA_VERSION.\n")
        return 1
    for folder in ("schemas", "messages"):
        (NOW / folder).mkdir(parents=True, exist_ok=True)
    for name in MESSAGES:
        _write(NOW / "schemas" / f"{name}.json", schema.json_schema(name))
    _write(NOW / "subjects.json", subjects())
    for sample in sorted((ROOT / "schemas" / "samples" / "valid").glob("*.json")):
        kept = NOW / "messages" / sample.name
        if not kept.exists():
            kept.write_bytes(sample.read_bytes())
    return 0


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
