from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter.cli.embedded import find_server
from tests.image.podman import IMAGE, NATS_IMAGE, ROOT, CannotRun, build, podman, prepare

CANARY = "canary-5b1f3c"
"""Lies in the checkout that the image is built from, in places where secrets lie; must not be in the image."""


@pytest.fixture(scope="session")
def machine() -> Iterator[None]:
    """Tools and base; every container of earlier runs is gone, and so are ours at the end."""
    try:
        prepare()
    except CannotRun as exc:
        pytest.fail(f"The image cannot be tried here. {exc}", pytrace=False)
    remove_all()
    yield
    remove_all()


def remove_all() -> None:
    """Every container, pod, volume and secret of our own storage; images stay."""
    podman("pod", "rm", "--all", "--force", "--time=0")
    podman("rm", "--all", "--force", "--time=0")
    podman("volume", "prune", "--force")
    podman("secret", "rm", "--all")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files under version control, as they are now, and secrets that somebody left lying about."""
    folder = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in (".env", "token.txt", "nats.creds", "data/key", ".git/config", "tests/secret", "helm/secret.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CANARY)
    return folder


@pytest.fixture(scope="session")
def image(machine: None, checkout: Path) -> str:
    """The image as `docker build` makes it for a release."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    build(checkout, IMAGE, f"--build-arg=VERSION={version}", "--build-arg=REVISION=0123abc", "--timestamp=0")
    return IMAGE


@pytest.fixture(scope="session")
def nats_image(machine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """nats-server alone: its binary is static."""
    folder = tmp_path_factory.mktemp("nats")
    shutil.copy(find_server(), folder / "nats-server")
    (folder / "Dockerfile").write_text('FROM scratch\nCOPY nats-server /\nENTRYPOINT ["/nats-server"]\n')
    build(folder, NATS_IMAGE)
    return NATS_IMAGE
