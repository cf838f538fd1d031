"""`make` on a bare machine: what it installs with, that it leaves stdin alone, and that it keeps out of the talk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh clone in which uv makes an environment whose `wechat-nats` repeats what it hears."""
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    script(
        tmp_path / "path" / "uv",
        'echo "$@" >uv-arguments; cat >uv-stdin; echo noise\n'
        "mkdir -p .venv/bin; cp path/wechat-nats .venv/bin/wechat-nats",
    )
    script(tmp_path / "path" / "wechat-nats", '[ "$1" = demo ] || exit 9; cat; exit "${STATUS:-0}"')
    return tmp_path


def make(checkout: Path, *arguments: str, said: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    path = f"{checkout / 'path'}:{os.environ['PATH']}"
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env=inherited | {"PATH": path} | environ,
        input=said,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_first_demo_installs_and_then_talks_through_the_pipe(checkout: Path) -> None:
    """What is typed belongs to the conversation, and so does all of stdout."""
    run = make(checkout, "demo", said="hello\nbye\n")
    assert (run.returncode, run.stdout) == (0, "hello\nbye\n")
    assert (checkout / "uv-stdin").read_text() == ""
    assert {"sync", "--frozen", "--all-extras"} <= set((checkout / "uv-arguments").read_text().split())


def test_the_second_demo_installs_nothing_and_says_nothing(checkout: Path) -> None:
    make(checkout, "demo")
    (checkout / "uv-arguments").unlink()
    run = make(checkout, "demo", said="hello\n")
    assert (run.returncode, run.stdout, run.stderr) == (0, "hello\n", "")
    assert not (checkout / "uv-arguments").exists()


def test_a_failed_installation_is_tried_again(checkout: Path) -> None:
    script(checkout / "path" / "uv", "exit 1")
    assert make(checkout, "demo").returncode != 0
    assert make(checkout, "demo").returncode != 0


def test_a_machine_without_python_gets_the_name_of_what_is_missing(checkout: Path) -> None:
    script(checkout / "path" / "python-old", "exit 1")
    run = make(checkout, "install", "PYTHONS=python-old python-absent")
    assert run.returncode != 0
    assert "needs Python 3.11 or newer; none of these is one: python-old python-absent" in run.stderr
    assert "make PYTHONS=/path/to/python3" in run.stderr


def test_a_machine_whose_python_cannot_install_gets_what_is_missing(checkout: Path) -> None:
    """As Debian's without its package for venv, and no uv beside it."""
    alone = checkout / "alone"
    script(
        alone / "python3",
        'case "$*" in *version_info*) ;; *_base_executable*) echo python3 ;; *) echo absent >&2; exit 1 ;; esac',
    )
    (alone / "make").symlink_to(str(shutil.which("make")))
    run = make(checkout, "install", "PYTHONS=python3", PATH=str(alone))
    assert run.returncode != 0
    assert "uv could not be installed with python3" in run.stderr
    assert "apt-get install python3-venv" in run.stderr


def test_the_first_python_that_is_new_enough_is_taken(checkout: Path) -> None:
    script(checkout / "path" / "python3", "exit 1")
    script(checkout / "path" / "python3.12", 'case "$*" in *_base_executable*) echo /twelve ;; esac')
    script(checkout / "path" / "python3.11", 'case "$*" in *_base_executable*) echo /eleven ;; esac')
    make(checkout, "install", "PYTHONS=.venv/bin/python python3 python3.12 python3.11")
    assert "--python /twelve " in (checkout / "uv-arguments").read_text()


def test_the_guide_names_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", guide)) <= targets
    assert {"demo", "test", "check", "unit", "integration", "system", "ops", "load", "format", "clean"} <= targets
