"""An agent that is a program: it reads the message's text from its standard input, and prints the answer.

The program runs without a shell, and the user's text is never part of the command. Media of the message are files in
one folder, and files that the program writes into another one are sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec
import structlog

from adapter.agent.media import save
from adapter.agent.runner import Answer, Turn, cut
from adapter.agent.sandbox import Message
from adapter.contract.messages import OutItem
from adapter.errors import Refused, SettingsError, Temporary
from adapter.tools.process import die_with_parent, hide_secrets

log = structlog.get_logger()

GRACE_S = 3.0
"""Time between SIGTERM and SIGKILL."""
MOST_BYTES = 120_000
"""Largest message in an environment variable. Linux allows 128 KiB with the name of the variable."""
REST_S = 1.0
"""Time to read the rest of the output after the program has ended, if a child keeps the output open."""
POLL_S = 0.02
"""Interval of checks whether the program has ended. `Process.wait` would also wait for the end of the output."""
ITEMS = 10
"""Most files of an answer, because a window has no more sends."""
STDERR = 2
SAID_BYTES = 4096
"""The end of the output in which the last line is looked for."""
OURS = ("NATS_", "WECHAT_NATS_", "AGENTS_NATS_")
"""Prefixes of variables that the program does not inherit, because a user may make it print what it knows."""


class Program:
    """Runs a program for each message. Calling it raises Temporary("exit_code"), ("timeout"), ("not_started")."""

    def __init__(
        self, command: str, folder: Path, *, timeout_s: float, max_output: int, stderr: int = STDERR
    ) -> None:
        """`command` is split like in a shell. `folder`: for the files of messages; a kill may have left some, which
        are removed. `max_output`: most bytes of an answer. `stderr`: the file descriptor to which the program's
        standard error is copied. Raises SettingsError."""
        try:
            self._command = shlex.split(command)
        except ValueError as exc:
            raise SettingsError("invalid_settings", f"The program cannot be read: {exc}.") from None
        if not self._command:
            raise SettingsError("invalid_settings", "The program is empty.")
        hide_secrets()  # the program would read in /proc what it does not inherit
        self._folder = folder.absolute()
        _remove(self._folder)
        self._timeout_s = timeout_s
        self._max_output = self._read_bytes = max_output
        self._stderr = stderr

    async def __call__(self, turn: Turn) -> Answer:
        folder = self._folder / f"{turn.message.position}-{os.getpid()}"  # another process may take it over
        received, written = folder / "in", folder / "out"
        try:
            folder.mkdir(mode=0o700, parents=True)
            received.mkdir()
            written.mkdir()
            text = await _prompt(turn.message, received)
            given = _about(turn) | {"WECHAT_FILES": str(received), "WECHAT_OUT": str(written)}
            said, is_cut = cut(await self._run(turn, text, given), self._max_output)
            return Answer(said, *await _items(turn.message, written), is_cut)
        finally:
            _remove(folder)

    async def _run(self, turn: Turn, text: str, given: dict[str, str]) -> str:
        """The answer's text: what the program prints. `given`: variables for it."""
        code, output, errors = await self._execute(self._command, text, given)
        if len(output) <= self._read_bytes and code:
            detail = f"The program ended with exit code {code}."
            raise Temporary("exit_code", detail, said=last_line(errors) or last_line(output))
        return output.decode(errors="replace")

    async def _execute(self, command: list[str], text: str, given: dict[str, str]) -> tuple[int, bytes, bytes]:
        """Runs a program to its end: its exit code, its output, and the end of its standard error."""
        start = asyncio.ensure_future(self._start(command, given))
        try:
            process = await asyncio.shield(start)
        except asyncio.CancelledError:  # the program may run already, and have children
            with contextlib.suppress(Temporary):
                await end(await start)
            raise
        output, errors = bytearray(), bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._converse(process, text, output, errors)
        except TimeoutError:
            detail = f"The program took more than {self._timeout_s:g} s."
            raise Temporary("timeout", detail, said=last_line(errors)) from None
        finally:
            await end(process)
        return process.returncode or 0, bytes(output), bytes(errors)

    async def _start(self, command: list[str], given: dict[str, str]) -> Process:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=inherited | given,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        except OSError as exc:
            raise Temporary("not_started", f"The program does not start: {exc.strerror}.") from exc

    async def _converse(self, process: Process, text: str, output: bytearray, errors: bytearray) -> None:
        """Collects what the program writes until it ends: the beginning of an output that is too long, and the end of
        its standard error."""
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(text.encode(errors="replace"))
        process.stdin.close()  # a program need not read its input

        readings = {
            asyncio.create_task(self._read(process.stdout, output)),
            asyncio.create_task(self._copy(process.stderr, errors)),
        }
        try:
            while process.returncode is None and len(output) <= self._read_bytes:
                await asyncio.sleep(POLL_S)
            await asyncio.wait(readings, timeout=REST_S)
        finally:
            for reading in readings:
                reading.cancel()

    async def _read(self, stdout: asyncio.StreamReader, output: bytearray) -> None:
        while len(output) <= self._read_bytes and (block := await stdout.read(65536)):
            output += block

    async def _copy(self, stderr: asyncio.StreamReader, errors: bytearray) -> None:
        while block := await stderr.read(65536):
            errors += block
            del errors[:-SAID_BYTES]
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(self._stderr, block)


def _about(turn: Turn) -> dict[str, str]:
    """Variables about the message."""
    message = msgspec.json.encode(turn.message.inbound)
    if len(message) > MOST_BYTES:
        head = msgspec.structs.replace(turn.message.inbound, text="", items=[], quote=None)
        message = msgspec.json.encode(head)
    return {
        "WECHAT_MESSAGE": message.decode(),
        "WECHAT_POSITION": turn.message.position,
        "WECHAT_SESSION": turn.session,
    }


async def _prompt(message: Message, folder: Path) -> str:
    """The text, and a line for each of the media, which are saved in the folder."""
    lines = [message.text] if message.text else []
    async for file in message.media():
        path = await asyncio.to_thread(save, folder, file) if file.data else None
        lines.append(f"[{file.kind}: {path}]" if path else f"[{file.kind}]")
    return "\n".join(lines)


async def _items(message: Message, folder: Path) -> tuple[tuple[OutItem, ...], str]:
    """The files that the program wrote, and why some are left out, which the log says, too."""
    items: list[OutItem] = []
    files = _files_in(folder)
    left_out = [f"An answer has at most {ITEMS} files."] if files[ITEMS:] else []
    for file in files[:ITEMS]:
        try:
            items.append(await message.sandbox.item_of(file))
        except (Refused, OSError) as exc:
            left_out.append(exc.detail if isinstance(exc, Refused) else f"A file cannot be read: {exc.strerror}.")
    for detail in left_out:
        log.warning("agent.file_not_sent", detail=detail, message=message.id)
    return tuple(items), " ".join(left_out)


def _files_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*")) if file.is_file() and not file.is_symlink()]


def last_line(said: bytes | bytearray) -> str:
    lines = said[-SAID_BYTES:].decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _remove(folder: Path) -> None:
    """As far as its rights let it, which the program may have changed."""
    shutil.rmtree(folder, ignore_errors=True)


async def end(process: Process) -> None:
    """Ends the program and all processes of its group."""
    if process.returncode is None:
        await _signal_group(process, signal.SIGTERM)
    await _signal_group(process, signal.SIGKILL)


async def _signal_group(process: Process, number: int) -> None:
    """Returns once the program has ended, or after GRACE_S."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_S):
            while process.returncode is None:
                await asyncio.sleep(POLL_S)
