"""iLink clients by other people, unchanged, against the simulator: if they do not get on, it is not iLink."""

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapter.simulator import KINDS, MediaView, Simulator, SimulatorSettings, samples
from tests.authority import Authority
from tests.foreign.conftest import NODE

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PATIENCE_S = 60.0
"""A test that hangs ends; nothing is measured by it."""
CLIENTS = {
    "weixin_ilink": set[str](),
    "wechatbot_sdk": {"missing_uin"},  # when it asks for a QR code
    "weilink": set[str](),
    "weixin_ilink_client": set[str](),
    "openclaw_weixin": set[str](),
}
"""By driver: what the simulator holds against the client, which are its known manners."""
HTTPS_ONLY = frozenset({"weixin_ilink_client"})
UPLOADS = [
    ("weixin_ilink", "full_url"),
    ("weixin_ilink", "param"),
    ("wechatbot_sdk", "param"),  # it knows no other; with real servers it has broken since
    ("wechatbot_sdk", "both"),
    ("weilink", "full_url"),
    ("weilink", "param"),
    ("weixin_ilink_client", "full_url"),
    ("weixin_ilink_client", "param"),
    ("openclaw_weixin", "full_url"),
    ("openclaw_weixin", "param"),
]


def settings_for(client: str, folder: Path, **changes: Any) -> SimulatorSettings:
    """Short holds; and https by an authority in `folder` for a client that speaks nothing else."""
    if client in HTTPS_ONLY:
        cert, key = Authority(folder).issue("simulator")
        changes |= {"tls_cert": str(cert), "tls_key": str(key)}
    return SimulatorSettings(hold_ms=500, qr_hold_ms=500, **changes)


def command(client: str) -> Sequence[str | Path]:
    if client in NODE:
        return "node", HERE / f"drive_{client}.mjs"
    return sys.executable, "-P", HERE / f"drive_{client}.py"


@contextlib.asynccontextmanager
async def driven(client: str, sim: Simulator, packages: Path, tmp_path: Path) -> AsyncIterator[None]:
    """The client in a process of its own, outside this repository; its output is shown on failure."""
    names = ("PATH", "LANG", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"PYTHONPATH": str(packages), "HOME": str(tmp_path), "NO_PROXY": "*", "PYTHONUNBUFFERED": "1"}
    environment["NODE_PATH"] = str(packages / "node_modules")
    if client in HTTPS_ONLY:
        environment["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
    with (tmp_path / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command(client),
            sim.url,
            sim.cdn_url,
            stdout=output,
            stderr=output,
            stdin=asyncio.subprocess.DEVNULL,
            cwd=tmp_path,
            env=environment,
        )
        try:
            yield
        except BaseException:
            print((tmp_path / "output").read_text(errors="replace")[-5000:])
            raise
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def logged_in(sim: Simulator) -> str:
    """Plays the phone at a login whose first code nobody scans in time. Returns the user."""
    await sim.until(sim.qrcodes, PATIENCE_S)
    sim.expire(sim.qrcodes()[0].qrcode)
    await sim.until(lambda: len(sim.qrcodes()) == 2, PATIENCE_S)
    code = sim.qrcodes()[1].qrcode
    user = sim.scan(code).user
    await sim.until(lambda: sim.qrcodes()[1].polls, PATIENCE_S)
    sim.confirm(code)
    await sim.until(lambda: sim.bots() and sim.polls(user).total, PATIENCE_S)
    return user


async def echoed(sim: Simulator, user: str, text: str) -> None:
    await sim.until(lambda: any(shown.text == f"echo: {text}" for shown in sim.phone(user)), PATIENCE_S)


async def shown_media(sim: Simulator, user: str) -> MediaView:
    """The next message on the phone, which must be a medium."""
    before = len(sim.phone(user))
    await sim.until(lambda: len(sim.phone(user)) > before, PATIENCE_S)
    (view,) = sim.phone(user)[before].media
    return view


@pytest.mark.parametrize(("client", "upload_url"), UPLOADS)
async def test_a_client_by_somebody_else_talks_and_exchanges_media(
    client: str, upload_url: Any, packages: Path, tmp_path: Path
) -> None:
    settings = settings_for(client, tmp_path, upload_url=upload_url)
    async with Simulator(settings) as sim, driven(client, sim, packages, tmp_path):
        user = await logged_in(sim)
        sim.say(user, "hello 你好 😀")
        await echoed(sim, user, "hello 你好 😀")

        for kind, content in {
            "image": samples.png(300, 200, seed=1),
            "file": samples.blob(1_000_001),
            "video": samples.mp4(50_000),
        }.items():
            sim.say_media(user, kind, content)
            view = await shown_media(sim, user)
            assert (view.kind, view.viewable) == (kind, True)
            assert (view.size, view.md5) == (len(content), hashlib.md5(content).hexdigest())
            assert sim.media_content(view.reference) == content

        assert set(sim.stats().violations) == CLIENTS[client]


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_by_somebody_else_finds_the_key_wherever_it_stands(
    client: str, packages: Path, tmp_path: Path
) -> None:
    settings = settings_for(client, tmp_path, upload_url="both")
    async with Simulator(settings) as sim, driven(client, sim, packages, tmp_path):
        user = await logged_in(sim)
        for seed, key_form in enumerate(("usual", "hex", "raw_base64", "hex_base64")):
            content = samples.png(seed=seed)
            sim.say_media(user, "image", content, key_form=key_form)
            assert sim.media_content((await shown_media(sim, user)).reference) == content


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_by_somebody_else_survives_every_kind_of_message(
    client: str, packages: Path, tmp_path: Path
) -> None:
    settings = settings_for(client, tmp_path, upload_url="both", quota=0)
    async with Simulator(settings) as sim, driven(client, sim, packages, tmp_path):
        user = await logged_in(sim)
        for kind in sorted(KINDS):
            sim.say_kind(user, kind)
            sim.say(user, f"after {kind}")
            await echoed(sim, user, f"after {kind}")
