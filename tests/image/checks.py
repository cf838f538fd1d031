"""The image, built and run for real: `make image-test`. Not among the tests that pytest finds by itself."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import yaml

from adapter.simulator import Simulator, SimulatorSettings
from tests.chart.helm import one, rendered
from tests.e2e.memory import SMALL
from tests.e2e.waiting import eventually, free_port, until
from tests.e2e.world import World, audit, environ_of, load
from tests.image.conftest import CANARY
from tests.image.podman import BASE, HARDENED, IMAGE, ROOT, STORE, Container, build, inspect, podman

DRAIN_S = 20


def inside(image: str, *command: str) -> str:
    """What a command in the image prints; as root, to see everything."""
    return podman("run", "--rm", "--user=0", f"--entrypoint={command[0]}", image, *command[1:]).stdout


def status(url: str) -> int:
    """How it is answered; 0 where nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return 0


class Setting(World):
    """Server and adapters in containers, the simulator here."""

    def __init__(self, folder: Path, sim: Simulator, url: str, environ: dict[str, str]) -> None:
        super().__init__(folder, sim, url, environ)
        self.environ = environ
        self.containers: list[Container] = []
        self.port = free_port()

    async def add_container(
        self, image: str, *command: str, options: tuple[str, ...] = HARDENED, **environ: str
    ) -> Container:
        environ = {**self._environ, "WECHAT_NATS_HTTP_ADDR": f":{self.port}", **environ}
        container = Container(f"adapter-{len(self.containers)}", image, *command, options=options, environ=environ)
        self.containers.append(container)
        await container.start()
        return container

    def probe(self, path: str) -> int:
        """The HTTP status; 0 where nobody listens."""
        return status(f"http://127.0.0.1:{self.port}{path}")

    def metric(self, name: str) -> float:
        """A metric without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            lines: list[str] = answer.read().decode().splitlines()
        return float(next(line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")))


@contextlib.asynccontextmanager
async def setting(folder: Path, nats_image: str, config: str = "") -> AsyncIterator[Setting]:
    """A NATS container with JetStream on a folder of the host, and a simulator."""
    port = free_port()
    (folder / "nats").mkdir()
    (folder / "nats.conf").write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: /data, sync_interval: always }}\n{config}\n'
    )
    server = Container(
        "nats",
        nats_image,
        "--config=/etc/nats/nats.conf",
        options=["--read-only", "--cap-drop=all", f"--volume={folder}:/etc/nats:ro",
                 f"--volume={folder / 'nats'}:/data"],
    )  # fmt: skip
    fast = SimulatorSettings(hold_ms=500, hint_ms=5000, send_latency_ms=0)
    async with Simulator(fast) as sim:
        environ = environ_of(f"nats://127.0.0.1:{port}", sim) | SMALL
        environ |= {"WECHAT_NATS_DRAIN_S": str(DRAIN_S), "WECHAT_NATS_CAPACITY": "100"}
        made = Setting(folder, sim, environ["NATS_URL"], environ)
        await server.start()
        try:
            yield made
        finally:
            for container in made.containers:
                await container.kill()
            await server.kill()


def test_the_dockerfile_has_no_known_mistake() -> None:
    """hadolint's word, from the lock file's group `image`."""
    place = STORE / "tools"
    uv = next(found for found in (ROOT / ".tools/bin/uv", Path("uv")) if found.exists() or found.name == str(found))
    subprocess.run(
        [uv, "sync", "--quiet", "--frozen", "--only-group", "image", "--no-install-project"],
        cwd=ROOT, env={**os.environ, "UV_PROJECT_ENVIRONMENT": str(place)}, check=True,
    )  # fmt: skip
    found = subprocess.run(
        [place / "bin" / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_says_what_it_is(image: str) -> None:
    config = inspect(image, kind="image")
    own = "org.opencontainers.image."
    labels = {name.removeprefix(own): value for name, value in config["Labels"].items() if name.startswith(own)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (labels["version"], labels["revision"], labels["licenses"]) == (version, "0123abc", "Apache-2.0")
    assert labels["title"] == "wechat-nats"
    assert config["Config"]["Entrypoint"] == ["wechat-nats"]
    assert config["Config"]["Cmd"] == ["run"]
    assert config["Config"]["User"] == "65532:65532"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert podman("run", "--rm", "--read-only", image, "--version").stdout == f"{version}\n"


def test_the_image_is_small(image: str) -> None:
    """What it adds to its base: Python packages, nothing else."""
    added = inspect(image, kind="image")["Size"] - inspect(BASE, kind="image")["Size"]
    print(f"the image adds {added / 1e6:.0f} MB to its base")
    assert added < 100e6


def test_no_secret_no_test_and_no_build_tool_is_inside(image: str) -> None:
    installed = set(
        inside(image, "ls", "/opt/wechat-nats/bin", "/opt/wechat-nats/lib/python3.13/site-packages").split()
    )
    assert {"wechat-nats", "adapter", "nats", "msgspec", "pysilk", "cyclopts"} <= installed
    assert not installed & {
        "uv", "uv_build", "pip", "setuptools", "wheel", "pytest", "mypy", "ruff", "hypothesis", "tests",
        "nats-server",
    }  # fmt: skip
    gone = inside(image, "sh", "-c", "command -v uv gcc cc make git; ls -d /tools /build; true")
    assert gone == ""
    assert inside(image, "sh", "-c", f"grep -rlF {CANARY} / --exclude-dir=proc --exclude-dir=sys; true") == ""
    written = inside(
        image, "find", "/opt/wechat-nats", "!", "-user", "root", "-o", "-perm", "-o+w", "!", "-type", "l"
    )
    assert written == "", "nobody but root may write there"


def test_two_builds_are_the_same(image: str, checkout: Path) -> None:
    """The same commit gives the same layers, so that who distrusts an image can make it again."""
    build(checkout, f"{IMAGE}-again", "--no-cache", "--timestamp=0")
    again = inspect(f"{IMAGE}-again", kind="image")["RootFS"]["Layers"]
    assert again == inspect(image, kind="image")["RootFS"]["Layers"]


async def test_it_carries_messages_as_nobody_on_a_read_only_root(image: str, nats_image: str, tmp_path: Path) -> None:
    """SIGTERM under load: a clean exit, nothing lost, doubled or out of order once the next one has taken over."""
    async with setting(tmp_path, nats_image) as made:
        first = await made.add_container(image)
        await until(lambda: made.probe("/readyz") == 200, "the adapter is ready")
        assert first.status("Uid").split() == ["65532"] * 4
        assert int(first.status("CapEff"), 16) == int(first.status("CapBnd"), 16) == 0
        assert first.status("NoNewPrivs") == "1"
        found = inspect(first.name)
        assert found["HostConfig"]["ReadonlyRootfs"] is True
        assert found["HostConfig"]["Memory"] == 192 * 2**20
        podman("healthcheck", "run", first.name)
        nc = await made.nc()
        for number in range(20):
            answer = await made.bind(nc, f"s{number}", made.sim.add_bot())
            assert answer.outcome == "applied"
        rng = random.Random(1)
        await load(made, nc, rounds=4, pause_s=0.05, rng=rng)
        first.signal(signal.SIGTERM)
        await load(made, nc, rounds=2, pause_s=0.05, rng=rng, first=4)
        assert await first.ended() == 0
        assert inspect(first.name)["State"]["OOMKilled"] is False
        await made.add_container(image)
        await made.settle(nc)
        checked = await audit(made, nc)
        assert checked.faults() == []
        assert checked.outcomes == {"accepted": 20 * 6}
        doctor = podman("run", "--rm", *HARDENED, "--network=host", f"--env=NATS_URL={made.url}", image, "doctor")
        assert "fail" not in doctor.stdout
        await nc.close()


async def test_the_health_check_fails_when_the_loop_is_stuck(image: str, nats_image: str, tmp_path: Path) -> None:
    """A stopped process is as stuck as can be."""
    async with setting(tmp_path, nats_image) as made:
        container = await made.add_container(image)
        await until(lambda: made.probe("/readyz") == 200, "the adapter is ready")
        container.signal(signal.SIGSTOP)
        assert podman("healthcheck", "run", container.name, check=False).returncode != 0
        container.signal(signal.SIGCONT)

        async def healthy() -> bool:
            return podman("healthcheck", "run", container.name, check=False).returncode == 0

        await eventually(healthy, "it is healthy again")


async def test_a_sigterm_that_comes_while_it_starts_ends_it(image: str, nats_image: str, tmp_path: Path) -> None:
    """The kernel drops signals for the first process of a container until it says that it listens."""
    async with setting(tmp_path, nats_image) as made:
        container = await made.add_container(image)
        term = 1 << (signal.SIGTERM - 1)
        await until(lambda: int(container.status("SigCgt"), 16) & term != 0, "it listens to SIGTERM")
        assert made.probe("/livez") == 0, "it has not started yet"
        container.signal(signal.SIGTERM)
        assert await container.ended() == 128 + signal.SIGTERM


async def test_credentials_that_are_exchanged_under_it_serve_at_the_next_connection(
    image: str, nats_image: str, tmp_path: Path
) -> None:
    """As a mounted Secret is rotated: no restart, and the old key is of no use any more."""
    old, new = nkey(), nkey()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "seed").write_text(old[0])

    def users(*public: str) -> str:
        return "authorization { users: [ " + ", ".join(f"{{ nkey: {key} }}" for key in public) + " ] }"

    async with setting(tmp_path, nats_image, users(old[1])) as made:
        mounted = (*HARDENED, f"--volume={secrets}:/secrets:ro")
        container = await made.add_container(image, options=mounted, NATS_NKEY="/secrets/seed")
        await until(lambda: made.probe("/readyz") == 200, "the adapter is ready")
        (secrets / "seed.new").write_text(new[0])
        (secrets / "seed.new").rename(secrets / "seed")
        config = tmp_path / "nats.conf"
        config.write_text(config.read_text().replace(old[1], new[1]))
        podman("kill", "--signal=HUP", "nats")  # which closes the connections of users that are gone
        await until(
            lambda: made.metric("wechat_adapter_nats_reconnects_total") >= 1, "it is connected by the new key"
        )
        assert made.probe("/readyz") == 200
        assert container.running
        assert inspect(container.name)["RestartCount"] == 0


def nkey() -> tuple[str, str]:
    """Seed and public key of a user."""
    import nkeys

    pair = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    return pair.seed.decode(), pair.public_key.decode()


async def test_the_charts_own_pod_runs_with_its_secrets(image: str, nats_image: str, tmp_path: Path) -> None:
    """Deployment and test pod as helm renders them, played by podman: all of Kubernetes but its API server.

    podman plays one replica, has an image's own curl ask HTTP probes, which ours does not have, and knows no fsGroup:
    so the probes are commands here, and the group that may read the files is root's.
    """
    seed, public = nkey()
    name, ask = "bridge-wechat-nats", inspect(image, kind="image")["Healthcheck"]["Test"][1:]
    async with setting(tmp_path, nats_image, f"authorization {{ users: [ {{ nkey: {public} }} ] }}") as made:
        probe = {"httpGet": None, "exec": {"command": ask}}
        values = {
            "image": {"registry": "localhost", "tag": "test", "pullPolicy": "Never"},
            "replicaCount": 1,
            "http": {"port": made.port},
            "nats": {"url": made.url, "auth": {"nkey": {"existingSecret": "adapter"}}},
            "tokenKey": {"existingSecret": "adapter"},
            "settings": {
                key: int(value) if value.isdigit() else value
                for key, value in made.environ.items()
                if key.startswith("WECHAT_NATS_") and not key.endswith(("_DRAIN_S", "_HTTP_ADDR", "_TOKEN_KEY"))
            },
            "drainSeconds": DRAIN_S,
            "podSecurityContext": {"runAsGroup": 0},
            "startupProbe": probe,
            "livenessProbe": probe,
            "readinessProbe": None,
        }
        key = base64.b64encode(os.urandom(32)).decode()
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "adapter"},
            "stringData": {"nkey.seed": seed, "token-key": key},
        }
        objects = rendered(values)
        file = tmp_path / "pod.yaml"
        file.write_text(yaml.safe_dump_all([secret, one(objects, "Deployment")]))
        podman("kube", "play", "--network=host", str(file))
        try:
            container = Container(f"{name}-pod-adapter", image)
            made.containers.append(container)
            await until(lambda: made.probe("/readyz") == 200, "the adapter is ready")
            found = inspect(container.name)
            assert found["HostConfig"]["ReadonlyRootfs"] is True
            assert found["HostConfig"]["Memory"] == 2 * 2**30
            assert container.status("Uid").split() == ["65532"] * 4
            assert int(container.status("CapEff"), 16) == 0
            assert container.status("NoNewPrivs") == "1"
            assert seed not in str(found["Config"]["Env"])
            podman("healthcheck", "run", container.name)
            doctor = one(objects, "Pod")
            file.write_text(yaml.safe_dump(doctor))
            podman("kube", "play", "--network=host", str(file))
            said = await Container(f"{name}-doctor-doctor", image).ended()
            assert said == 0, podman("logs", f"{name}-doctor-doctor").stdout
            container.signal(signal.SIGTERM)
            assert await container.ended() == 0
        finally:
            print(podman("logs", f"{name}-pod-adapter", check=False).stderr[-2000:])  # shown where it fails
            podman("pod", "rm", "--all", "--force", "--time=0")


async def test_the_server_for_evaluation_runs_as_it_is_rendered(nats_image: str, tmp_path: Path) -> None:
    """Also as nobody on a read-only root; podman plays no StatefulSet, so its pod is played alone."""
    registry, _, repository = nats_image.partition("/")
    repository, _, tag = repository.partition(":")
    objects = rendered({
        "evaluationNats": {
            "enabled": True,
            "image": {"registry": registry, "repository": repository, "tag": tag, "pullPolicy": "Never"},
            "persistence": {"enabled": False},
        },
    })  # fmt: skip
    spec = one(objects, "StatefulSet")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    asked = {container.pop(probe)["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "evaluation"}, "spec": spec}
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump_all([one(objects, "ConfigMap"), pod]))
    bus, monitor = free_port(), free_port()
    published = [f"--publish=127.0.0.1:{bus}:4222", f"--publish=127.0.0.1:{monitor}:8222"]
    podman("kube", "play", *published, str(file))
    try:
        for path in sorted(asked):
            url = f"http://127.0.0.1:{monitor}{path}"
            await until(lambda url=url: status(url) == 200, f"{path} is answered")  # type: ignore[misc]
        nc = await nats.connect(f"nats://127.0.0.1:{bus}")
        await nc.jetstream().add_stream(name="kept", subjects=["kept"])
        assert (await nc.jetstream().publish("kept", b"hello")).seq == 1
        await nc.close()
        found = inspect("evaluation-nats")
        assert found["HostConfig"]["ReadonlyRootfs"] is True
        assert Container("evaluation-nats", nats_image).status("Uid").split() == ["65532"] * 4
    finally:
        print(podman("logs", "evaluation-nats", check=False).stderr[-2000:])  # shown where it fails
        podman("pod", "rm", "--all", "--force", "--time=0")


def test_an_image_that_leaves_nothing_out_holds_the_demo(image: str, checkout: Path) -> None:
    """The build argument of the Dockerfile's comment."""
    build(checkout, f"{IMAGE}-demo", "--build-arg=LEAVE_OUT=")
    options = ("--rm", "--interactive", "--read-only", "--cap-drop=all", "--tmpfs=/tmp:size=1g")
    said = podman("run", *options, f"{IMAGE}-demo", "demo", stdin="hello\n").stdout
    assert "You said: hello" in said
