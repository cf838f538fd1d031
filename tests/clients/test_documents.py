"""What tools of others make of the documents in `schemas/`: the AsyncAPI parser, and TypeScript's compiler."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.generate import ROOT, TYPES

ASYNCAPI = ROOT / "schemas" / "asyncapi.json"


def node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["node", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def dangling(document: dict[str, Any]) -> None:
    document["operations"]["out"]["channel"]["$ref"] = "#/channels/nowhere"


def discriminated(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["OutText"]["discriminator"] = {"propertyName": "kind"}


def unknown(document: dict[str, Any]) -> None:
    document["operations"]["out"]["action"] = "publish"  # as AsyncAPI 2 called it


def test_the_asyncapi_document_is_valid_and_broken_ones_are_not(npm: Path, tmp_path: Path) -> None:
    """All in one run, so that a parser that takes anything proves nothing."""
    others = []
    for harm in (dangling, discriminated, unknown):
        document = json.loads(ASYNCAPI.read_bytes())
        harm(document)
        others.append(tmp_path / f"{harm.__name__}.json")
        others[-1].write_text(json.dumps(document))
    done = node(npm / "asyncapi.mjs", ASYNCAPI, *others)
    assert done.returncode == 1, done.stderr
    valid, *complaints = done.stdout.splitlines()
    assert valid.startswith(f"{ASYNCAPI}: {len(document['channels'])} channels")
    assert {Path(line.partition(":")[0]) for line in complaints} == set(others)
    assert not any("channels," in line for line in complaints)


def test_the_types_are_what_the_schemas_say(npm: Path) -> None:
    """`make generate` writes them anew."""
    done = node(npm / "types.mjs", ROOT / "schemas")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / TYPES).read_text(encoding="utf-8")


COMMANDS = """
import type {{ Inbound, Outbound, Receipt }} from "./wechat-nats";
export const command: Outbound = {command};
export function read(said: Inbound, receipt: Receipt): string[] {{
  return said.items.map((item) => {{
    switch (item.kind) {{
      case "text":
        return item.text;
      case "voice":
        return item.transcript ?? "";
      default:
        return receipt.outcome === "{outcome}" ? item.kind : "";
    }}
  }});
}}
"""


FITS = '{ items: [{ kind: "text", text: "hi" }, { kind: "image", data: "" }], when_closed: "refuse" }'
MISFITS = [
    ('{ txt: "hi" }', "accepted", "'txt' does not exist in type 'Outbound'"),
    ('{ text: "hi", when_closed: "drop" }', "accepted", """Type '"drop"' is not assignable"""),
    ('{ items: [{ kind: "text", data: "" }] }', "accepted", "'data' does not exist in type 'OutText'"),
    ("{}", "delivered", "have no overlap"),
]


def test_the_types_accept_valid_and_reject_invalid_messages(npm: Path, tmp_path: Path) -> None:
    (tmp_path / "wechat-nats.d.ts").write_bytes((ROOT / TYPES).read_bytes())
    (tmp_path / "fits.ts").write_text(COMMANDS.format(command=FITS, outcome="accepted"))
    for number, (command, outcome, _) in enumerate(MISFITS):
        (tmp_path / f"misfit{number}.ts").write_text(COMMANDS.format(command=command, outcome=outcome))
    tsc = npm / "node_modules" / "typescript" / "bin" / "tsc"
    done = node(tsc, "--strict", "--noEmit", *sorted(tmp_path.glob("*fit*.ts")))
    assert "/fits.ts" not in done.stdout, done.stdout
    for number, (_, _, complaint) in enumerate(MISFITS):
        (said,) = [line for line in done.stdout.splitlines() if f"/misfit{number}.ts" in line]
        assert complaint in said


def test_what_the_page_says_to_install_is_what_was_tried() -> None:
    """The packages of the TypeScript examples, by their versions."""
    shown = json.loads((ROOT / "schemas" / "examples" / "typescript" / "package.json").read_bytes())
    tried = json.loads((ROOT / "tests" / "npm" / "package.json").read_bytes())["devDependencies"]
    for kind in ("dependencies", "devDependencies"):
        assert shown[kind].items() <= tried.items()
