"""An agent that is a program: it reads the message's text from its standard input, and prints the answer.

The program runs without a shell, and the user's text is never part of the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from asyncio.subprocess import PIPE, Process

import msgspec

from adapter.agent.runner import Answer, Turn, cut
from adapter.errors import SettingsError, Temporary
from adapter.kit.children import die_with_parent, hide_secrets

GRACE_S = 3.0
"""Time between SIGTERM and SIGKILL."""
MOST_BYTES = 120_000
"""Largest message in an environment variable. Linux allows 128 KiB with the name of the variable."""
REST_S = 1.0
"""Time to read the rest of the output after the program has ended, if a child keeps the output open."""
POLL_S = 0.02
"""Interval of checks whether the program has ended. `Process.wait` would also wait for the end of the output."""
OURS = ("NATS_", "WECHAT_NATS_", "AGENTS_NATS_")
"""Prefixes of variables that the program does not inherit, because a user may make it print what it knows."""


class Program:
    """Runs a program for each message. Calling it raises Temporary("exit_code"), ("timeout"), ("not_started")."""

    def __init__(self, command: str, *, timeout_s: float, max_output: int) -> None:
        """`command` is split like in a shell. `max_output`: most bytes of an answer. Raises SettingsError."""
        try:
            self._command = shlex.split(command)
        except ValueError as exc:
            raise SettingsError("invalid_settings", f"The program cannot be read: {exc}.") from None
        if not self._command:
            raise SettingsError("invalid_settings", "The program is empty.")
        hide_secrets()  # the program would read in /proc what it does not inherit
        self._timeout_s = timeout_s
        self._max_output = max_output

    async def __call__(self, turn: Turn) -> Answer:
        start = asyncio.ensure_future(self._start(turn))
        try:
            process = await asyncio.shield(start)
        except asyncio.CancelledError:  # the program may run already, and have children
            with contextlib.suppress(Temporary):
                await _end(await start)
            raise
        try:
            async with asyncio.timeout(self._timeout_s):
                output = await self._converse(process, turn.message.text)
        except TimeoutError:
            raise Temporary("timeout", f"The program took more than {self._timeout_s:g} s.") from None
        finally:
            await _end(process)
        if len(output) <= self._max_output and process.returncode:
            raise Temporary("exit_code", f"The program ended with exit code {process.returncode}.")
        return Answer(cut(output, self._max_output))

    async def _start(self, turn: Turn) -> Process:
        """The program shares this process's standard error, which is its log."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        message = msgspec.json.encode(turn.message.inbound)
        if len(message) > MOST_BYTES:
            head = msgspec.structs.replace(turn.message.inbound, text="", items=[], quote=None)
            message = msgspec.json.encode(head)
        given = {
            "WECHAT_MESSAGE": message.decode(),
            "WECHAT_SEQUENCE": str(turn.message.sequence),
            "WECHAT_SESSION": turn.session,
        }
        try:
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=PIPE,
                env=inherited | given,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        except OSError as exc:
            raise Temporary("not_started", f"The program does not start: {exc.strerror}.") from exc

    async def _converse(self, process: Process, text: str) -> bytes:
        """The output of the program until it ends, or the beginning of an output that is too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text.encode(errors="replace"))
        process.stdin.close()  # a program need not read its input
        output = bytearray()
        reading = asyncio.create_task(self._read(process.stdout, output))
        try:
            while process.returncode is None and len(output) <= self._max_output:
                await asyncio.sleep(POLL_S)
            await asyncio.wait({reading}, timeout=REST_S)
        finally:
            reading.cancel()
        return bytes(output)

    async def _read(self, stdout: asyncio.StreamReader, output: bytearray) -> None:
        while len(output) <= self._max_output and (block := await stdout.read(65536)):
            output += block


async def _end(process: Process) -> None:
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
