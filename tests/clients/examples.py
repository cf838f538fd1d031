"""The examples of `schemas/examples/` as processes, each language built as its page says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.e2e.world import until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "schemas" / "examples"
GOCODE = Path("/usr/share/gocode")
"""Where Debian puts Go packages."""
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1")


class Running:
    """A process; what it prints is in `said`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    async def says(self, words: str, times: int = 1) -> None:
        await until(lambda: self.said.count(words) >= times or self.process.returncode is not None, words)
        assert self.said.count(words) >= times, self.said

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    async def ended(self) -> int:
        """The exit code."""
        await until(lambda: self.process.returncode is not None, "it ends")
        assert self.process.returncode is not None
        return self.process.returncode


class Language:
    """How the three examples of a language are started, once they are built."""

    def __init__(self, name: str, folder: Path, commands: Mapping[str, Sequence[str]]) -> None:
        self.name = name
        self._folder = folder
        self._commands = commands

    @contextlib.asynccontextmanager
    async def run(self, example: str, *arguments: str, **environ: str) -> AsyncIterator[Running]:
        """Killed at the end of the block if it still runs."""
        number = len(list(self._folder.glob("*.log")))
        log = self._folder / f"{number}-{example}.log"
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(*self._commands[example], *arguments),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environ},
                stdin=asyncio.subprocess.PIPE,
                stdout=out,
                stderr=out,
            )
        running = Running(process, log)
        try:
            yield running
        except BaseException:
            print(running.said)
            raise
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


PROGRAMS = ("echo", "onboard", "send")


def copied(folder: Path, language: str) -> Path:
    """Its programs out of the repository, as whoever starts from them has them."""
    place = folder / f"{language}-copy"
    shutil.copytree(EXAMPLES / language, place, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def python(folder: Path) -> Language:
    place = copied(folder, "python")
    programs = (*PROGRAMS, "many")
    return Language("python", folder, {name: (sys.executable, str(place / f"{name}.py")) for name in programs})


def typescript(folder: Path, npm: Path) -> Language:
    """Compiled with the packages of the lock file."""
    place = copied(folder, "typescript")
    (place / "node_modules").symlink_to(npm / "node_modules")
    build("node", npm / "node_modules" / "typescript" / "bin" / "tsc", "--project", place)
    return Language("typescript", folder, {name: ("node", str(place / "dist" / f"{name}.js")) for name in PROGRAMS})


def c(folder: Path) -> Language:
    """Skips where Debian's packages are missing."""
    packages = ("libnats", "libcjson")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", *packages], capture_output=True, text=True, check=False
    ) if shutil.which("pkg-config") and shutil.which("cc") else None  # fmt: skip
    if flags is None or flags.returncode:
        pytest.skip("on Debian: apt-get install gcc libc6-dev pkg-config libnats-dev libcjson-dev")
    place = copied(folder, "c")
    for name in PROGRAMS:
        build("cc", *STRICT, place / f"{name}.c", "-o", folder / name, *flags.stdout.split())
    return Language("c", folder, {name: (str(folder / name),) for name in PROGRAMS})


def go(folder: Path) -> Language:
    """With the NATS client that Debian packages. Skips where it is missing."""
    if shutil.which("go") is None or not (GOCODE / "src/github.com/nats-io/nats.go").is_dir():
        pytest.skip("on Debian: apt-get install golang-go golang-github-nats-io-go-nats-dev")
    environ = {"GO111MODULE": "off", "GOPATH": str(GOCODE), "GOFLAGS": "-trimpath"}
    place, program = copied(folder, "go"), folder / "agents"
    build("go", "vet", ".", cwd=place, **environ)
    build("go", "build", "-o", program, ".", cwd=place, **environ)
    return Language("go", folder, {name: (str(program), name) for name in PROGRAMS})


def build(*command: str | Path, cwd: Path | None = None, **environ: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
