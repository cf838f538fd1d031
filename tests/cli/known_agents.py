"""Stands in for claude, codex, gemini and opencode: takes the options of the real ones that the presets use and no
others, prints their events, keeps conversations, and writes only where the options let it. What it does was seen of
Claude Code 2.1.197, Codex 0.171.0, Gemini CLI 0.61.0 and opencode 1.18.33.

A conversation is a file of texts in $AGENT_HOME. The answer is all texts of it; the text `fail` fails, and `write:F`
writes the file F.
"""

import argparse
import json
import os
import re
import sys
import tomllib
import uuid
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn


def event(**fields: object) -> None:
    print(json.dumps(fields))


def refuse(sentence: str, code: int = 1) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(code)


def options() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(allow_abbrev=False, exit_on_error=True)


def converse(known: str | None, name: str, may_write: Callable[[str], bool]) -> tuple[str, bool]:
    """The answer, and whether it is one. `known`: the conversation to resume. `name`: of a new one."""
    file = Path(os.environ["AGENT_HOME"]) / f"conversation-{known or name}"
    if known and not file.exists():
        refuse(f"No conversation found with session ID: {known}")
    if not known and file.exists():
        refuse(f"Error: Session ID {name} is already in use.")
    text = sys.stdin.read().partition("\n\n[Files that you write into ")[0]
    with file.open("a") as history:
        history.write(text + "\n")
    path = os.path.expandvars(text.removeprefix("write:"))
    if path != text and may_write(path):
        Path(path).write_text("written")
    return ", ".join(file.read_text().splitlines()), text != "fail"


def claude(arguments: list[str]) -> int:
    parser = options()
    parser.add_argument("-p", action="store_true", required=True)
    parser.add_argument("--output-format", choices=["json"], required=True)
    parser.add_argument("--permission-mode", choices=["dontAsk"])
    parser.add_argument("--add-dir", nargs="+")
    parser.add_argument("--allowedTools", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--session-id", type=uuid.UUID)
    parser.add_argument("--resume", type=uuid.UUID)
    given = parser.parse_args(arguments)
    rules = [found[1] for rule in given.allowedTools or () if (found := re.fullmatch(r"Edit\(/(/.*)\)", rule))]
    known, name = str(given.resume or "") or None, str(given.session_id or uuid.uuid4())
    answer, good = converse(known, name, lambda path: any(fnmatch(path, rule) for rule in rules))
    result = answer if good else "Not logged in · Please run /login"
    event(type="result", subtype="success", is_error=not good, result=result, session_id=known or name)
    return 0 if good else 1


def codex(arguments: list[str]) -> int:
    parser = options()
    parser.add_argument("--json", action="store_true", required=True)
    parser.add_argument("--skip-git-repo-check", action="store_true")
    parser.add_argument("-c", action="append", default=[])
    parser.add_argument("-m")
    assert arguments.pop(0) == "exec"
    assert arguments.pop() == "-"
    known = None
    if "resume" in arguments:
        *arguments, word, known = arguments
        assert word == "resume"
    settings = tomllib.loads("\n".join(parser.parse_args(arguments).c))
    profile = settings["permissions"][settings["default_permissions"]]
    assert profile["extends"] == ":read-only"
    name = str(uuid.uuid4())
    answer, good = converse(known, name, lambda path: profile["filesystem"].get(str(Path(path).parent)) == "write")
    event(type="thread.started", thread_id=known or name)
    event(type="turn.started")
    event(type="item.completed", item={"id": "item_0", "type": "agent_message", "text": "I look into it."})
    if not good:
        event(type="turn.failed", error={"message": "Missing environment variable: `OPENAI_API_KEY`."})
        return 1
    event(type="item.completed", item={"id": "item_1", "type": "agent_message", "text": answer})
    event(type="turn.completed", usage={"input_tokens": 1})
    return 0


def gemini(arguments: list[str]) -> int:
    parser = options()
    parser.add_argument("--skip-trust", action="store_true", required=True)
    parser.add_argument("--output-format", choices=["stream-json"], required=True)
    parser.add_argument("--include-directories")
    parser.add_argument("--policy")
    parser.add_argument("-m")
    parser.add_argument("--session-id", type=uuid.UUID)
    parser.add_argument("--resume", type=uuid.UUID)
    given = parser.parse_args(arguments)
    (rule,) = tomllib.loads(Path(given.policy).read_text())["rule"]
    assert (rule["toolName"], rule["decision"]) == (["write_file", "replace"], "allow")

    def may_write(path: str) -> bool:
        return bool(
            re.search(rule["argsPattern"], json.dumps({"content": "", "file_path": path}, separators=(",", ":")))
        )

    known, name = str(given.resume or "") or None, str(given.session_id or uuid.uuid4())
    answer, good = converse(known, name, may_write)
    event(type="init", session_id=known or name, model="m")
    event(type="message", role="user", content="…")
    event(type="message", role="assistant", content="I look into it.", delta=True)
    event(type="tool_use", tool_name="read_file", tool_id="1", parameters={})
    event(type="tool_result", tool_id="1", status="success", output="")
    if not good:
        event(type="result", status="error", error={"type": "unknown", "message": "[API Error: no such key]"})
        return 144
    for part in (answer[:3], answer[3:]):
        event(type="message", role="assistant", content=part, delta=True)
    event(type="result", status="success", stats={})
    return 0


def opencode(arguments: list[str]) -> int:
    parser = options()
    parser.add_argument("--format", choices=["json"], required=True)
    parser.add_argument("--session")
    parser.add_argument("--model")
    assert arguments.pop(0) == "run"
    given = parser.parse_args(arguments)
    permission = json.loads(os.environ["OPENCODE_PERMISSION"])
    assert permission["*"] == "deny"

    def may_write(path: str) -> bool:
        asked = {"edit": os.path.relpath(path), "external_directory": path}
        decided = [
            [action for pattern, action in permission[kind].items() if fnmatch(value, pattern)][-1]
            for kind, value in asked.items()
        ]
        return decided == ["allow", "allow"]

    name = f"ses_{uuid.uuid4().hex}"
    answer, good = converse(given.session, name, may_write)
    about = {"sessionID": given.session or name}
    event(type="step_start", part={"type": "step-start"}, **about)
    event(type="text", part={"type": "text", "text": "I look into it."}, **about)
    event(type="tool_use", part={"type": "tool", "tool": "read"}, **about)
    if not good:
        event(type="error", error={"name": "APIError", "data": {"message": "no such key"}}, **about)
        return 1
    event(type="text", part={"type": "text", "text": answer}, **about)
    return 0


def install(folder: Path) -> dict[str, str]:
    """Makes programs of these names in a folder; the variables with which they are found."""
    for name in ("claude", "codex", "gemini", "opencode"):
        program = folder / name
        program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S '{__file__}' {name} \"$@\"\n")
        program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "AGENT_HOME": str(folder)}


if __name__ == "__main__":
    agents = {"claude": claude, "codex": codex, "gemini": gemini, "opencode": opencode}
    sys.exit(agents[sys.argv[1]](sys.argv[2:]))
