"""Agents by name, whose command lines are known here: each run resumes the person's conversation.

The agent names its conversations itself, or takes our name of the session. Its names are kept by ours. A run that
resumes a conversation which the agent does not know ends with an exit code before it prints anything, and another
run begins anew. `docs/howto/agent.md` has the sources of the command lines.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from adapter.agent.program import STDERR, Program, last_line
from adapter.agent.runner import Turn, replace_json
from adapter.errors import UNDECODABLE, SettingsError, Temporary

log = structlog.get_logger()

OUTPUT_BYTES = 2**24
"""Most bytes of the events of a run, which contain what its tools print."""
HINT = "[Files that you write into {out} are sent to the person.]"


class Names:
    """The agents' names of sessions, by ours, in a file. Without the file, conversations begin anew."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._names = msgspec.json.decode(file.read_bytes(), type=dict[str, str])
        except (OSError, *UNDECODABLE):
            self._names = {}

    def get(self, session: str) -> str:
        return self._names.get(session, "")

    def keep(self, session: str, name: str) -> None:
        if name and self._names.get(session) != name:
            self._names[session] = name
            try:
                replace_json(self._file, self._names)
            except OSError as exc:
                log.error("agent.session_not_stored", detail=str(exc))


class Preset(NamedTuple):
    """How an agent is run."""

    command: Callable[[list[str], str, str, Path], list[str]]
    """The arguments by those of the user, the name of the session to resume, that of a new one, and the folder of
    the message, which has the folders `in` and `out`."""
    takes_name: bool = False
    """A new session gets our name; otherwise the agent names it."""
    variables: Callable[[Path], dict[str, str]] = lambda _folder: {}
    """Further variables, by the folder of the message."""


def _claude(more: list[str], known: str, new: str, folder: Path) -> list[str]:
    options = ["-p", "--output-format", "json", "--permission-mode", "dontAsk", "--add-dir", f"{folder}/in"]
    options += [f"{folder}/out", "--allowedTools", f"Edit(/{folder}/out/**)"]
    return [*options, *(("--resume", known) if known else ("--session-id", new)), *more]


def _codex(more: list[str], known: str, _new: str, folder: Path) -> list[str]:
    allowed = f'{{extends=":read-only",filesystem={{{json.dumps(f"{folder}/out")}="write"}}}}'
    options = ["exec", "--json", "--skip-git-repo-check", "-c", 'default_permissions="wechat"']
    return [*options, "-c", f"permissions.wechat={allowed}", *more, *(("resume", known) if known else ()), "-"]


def _gemini(more: list[str], known: str, new: str, folder: Path) -> list[str]:
    pattern = rf'"file_path":"{re.escape(str(folder))}/out/[^/"]+"'
    rule = f'toolName = ["write_file", "replace"]\nargsPattern = {json.dumps(pattern)}\ndecision = "allow"\n'
    (folder / "policy.toml").write_text(f"[[rule]]\n{rule}priority = 100\n")
    options = ["--skip-trust", "--output-format", "stream-json", "--include-directories", f"{folder}/in,{folder}/out"]
    options += ["--policy", f"{folder}/policy.toml"]
    return [*options, *(("--resume", known) if known else ("--session-id", new)), *more]


def _opencode(more: list[str], known: str, _new: str, _folder: Path) -> list[str]:
    return ["run", "--format", "json", *(("--session", known) if known else ()), *more]


def _opencode_permissions(folder: Path) -> dict[str, str]:
    """The path of a file to edit is relative to a folder that only the agent knows."""
    may: dict[str, Any] = dict.fromkeys(("read", "glob", "grep", "list"), "allow")
    may["edit"] = {"*": "deny", f"*{'/'.join(folder.parts[-3:])}/out/*": "allow"}
    may["external_directory"] = {"*": "deny", f"{folder}/in/*": "allow", f"{folder}/out/*": "allow"}
    return {"OPENCODE_PERMISSION": os.environ.get("OPENCODE_PERMISSION", json.dumps({"*": "deny"} | may))}


PRESETS = {
    "claude": Preset(_claude, takes_name=True),
    "codex": Preset(_codex),
    "gemini": Preset(_gemini, takes_name=True),
    "opencode": Preset(_opencode, variables=_opencode_permissions),
}


class PresetAgent(Program):
    """Runs one of PRESETS for each message. A call raises Temporary, as a Program does."""

    def __init__(
        self, command: str, folder: Path, *, timeout_s: float, max_output: int, stderr: int = STDERR
    ) -> None:
        """`command`: the agent's name, and further options for it. `folder`: for what survives a restart. Raises
        SettingsError."""
        super().__init__(command, folder / "files", timeout_s=timeout_s, max_output=max_output, stderr=stderr)
        self._program, *self._more = self._command
        if self._program not in PRESETS:
            raise SettingsError("invalid_settings", f"Known agents: {', '.join(PRESETS)}. Others: --exec, --acp.")
        self._preset = PRESETS[self._program]
        self._names = Names(folder / f"{self._program}.json")
        self._read_bytes = OUTPUT_BYTES

    async def _run(self, turn: Turn, text: str, given: dict[str, str]) -> str:
        out = Path(given["WECHAT_OUT"])
        text = f"{text}\n\n{HINT.format(out=out)}"
        known = self._names.get(turn.session)
        attempts = [known, ""] if known else ["", turn.session] if self._preset.takes_name else [""]
        given = self._preset.variables(out.parent) | given
        failures = []
        for name in attempts:
            command = [self._program, *self._preset.command(self._more, name, turn.session, out.parent)]
            code, output, errors = await self._execute(command, text, given)
            said = read_events(output)
            if code == 0 and not said.error:
                self._names.keep(turn.session, said.session)
                return said.text
            detail = f"{self._program} ended with exit code {code}."
            failures.append(Temporary("exit_code", detail, said=said.error or last_line(errors)))
            if code < 0 or output.strip():  # the name of the session is not the reason
                break
        raise failures[0]


class AgentOutput(NamedTuple):
    """What a run has printed."""

    text: str = ""
    session: str = ""
    error: str = ""


def read_events(output: bytes) -> AgentOutput:
    """The agent's last words, in the events of any of PRESETS: what it says before it uses a tool is no answer."""
    text = session = error = ""
    goes_on = False
    for line in output.splitlines():
        try:
            event = msgspec.json.decode(line)
        except UNDECODABLE:
            continue
        match event:
            case {"session_id": str(name)} | {"thread_id": str(name)} | {"sessionID": str(name)}:
                session = name
        match event:
            case {"type": "result", "is_error": bool(failed), "result": str(words)}:  # claude
                text, error = words, words if failed else ""
            case {"type": "item.completed", "item": {"type": "agent_message", "text": str(words)}}:  # codex
                text = words
            case {"type": "message", "role": "assistant", "content": str(words)}:  # gemini
                text, goes_on = text + words if goes_on else words, True
            case {"type": "text", "part": {"text": str(words)}}:  # opencode
                text, goes_on = text + words if goes_on else words, True
            case {"type": "tool_use"}:
                goes_on = False
            case {"type": "error", "error": {"data": {"message": str(words)}}} | {"error": {"message": str(words)}}:
                error = words
    return AgentOutput(text, session, error)
