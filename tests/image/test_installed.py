"""`pip install .` on a machine that has nothing else: every command works, and what is left out is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNREACHABLE = ("Temporary failure in name resolution", "Network is unreachable", "Connection refused", "timed out")
"""What pip says when there is no network."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program. Skips where there is no index of packages."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT / "adapter", source / "adapter", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", with_pip=True)
    pip = (folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        reason = f"cannot install: {done.stderr.strip()[-300:]}"
        if any(word in done.stderr for word in UNREACHABLE) and not os.environ.get("CI"):
            pytest.skip(reason)
        pytest.fail(reason)
    return folder / "venv" / "bin" / "wechat-nats"


def call(program: Path, *arguments: str, said: str = "", code: int = 0) -> str:
    """What it prints, in a folder without a checkout."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("NATS_", "WECHAT_NATS_"))}
    environ["NATS_URL"] = "nats://127.0.0.1:9"
    done = subprocess.run(
        [program, *arguments],
        cwd=program.parent,
        env=environ,
        input=said,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_it_talks(installed: Path) -> None:
    assert "You said: hello" in call(installed, "demo", said="hello\n")


def test_it_says_that_voice_stays_as_it_is(installed: Path) -> None:
    said = call(installed, "demo", "--verbose")
    assert "voice.not_converted" in said
    assert "pip install silk-python" in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]),
        (["schema", "outbound"], 0, '"$id": "urn:wechat-nats:schema:1:outbound"'),
        (["schema"], 2, "Name a message, one of"),
        (["simulator", "--help"], 0, "--port"),
        (["bindings"], 3, "127.0.0.1:9"),
        (["doctor"], 3, "127.0.0.1:9"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_need_no_checkout(installed: Path, arguments: list[str], code: int, words: str) -> None:
    assert words in call(installed, *arguments, code=code)


def test_it_runs_on_what_pyproject_names_alone(installed: Path) -> None:
    """pip's own word on what is missing or does not fit."""
    assert call(installed.with_name("python"), "-m", "pip", "check") == "No broken requirements found.\n"
