"""The chart as helm renders it: valid for every Kubernetes that it names; its values and their schema."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from adapter.settings import Settings, variable_of
from tests.chart import generate
from tests.chart.helm import (
    CHART,
    ROOT,
    Loader,
    Object,
    Refused,
    adapter_of,
    helm,
    rendered,
    settings_of,
    tools,
)

KUBERNETES = ("1.27", "1.32", "1.37")
CI = sorted((CHART / "ci").glob("*-values.yaml"))
CORE = {
    "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Service",
    "ServiceAccount", "StatefulSet",
}  # fmt: skip
OPERATORS = {"PodMonitor", "PrometheusRule", "ScaledObject", "ServiceMonitor"}


# valid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_example_is_valid_for_every_kubernetes(
    version: str, tmp_path: Path, operators: dict[str, Object]
) -> None:
    """Core objects by their published schemas, the operators' by theirs, none of a kind that is not checked."""
    core: list[Object] = []
    for values in CI:
        for made in rendered(values, f"--kube-version={version}.0"):
            assert made["kind"] in CORE | OPERATORS | {"Stream"}, f"{values.name}: nobody checks {made['kind']}"
            assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", made["metadata"]["name"])
            if made["kind"] in OPERATORS:
                jsonschema.validate(made, operators[made["kind"]])
            elif made["kind"] in CORE:
                core.append(made)
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(core))
    checked = subprocess.run(
        [tools() / "bin" / "kubernetes-validate", "--strict", "-k", version, file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("INFO") + checked.stderr.count("INFO") >= len(core), "each was looked at"


def test_lint_finds_nothing() -> None:
    for values in CI:
        assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), f"--values={values}")


def test_an_older_kubernetes_is_refused() -> None:
    with pytest.raises(Refused, match=r"incompatible with Kubernetes v1\.26\.0"):
        rendered(None, "--kube-version=1.26.0")


def test_the_chart_is_of_the_programs_version() -> None:
    chart = yaml.load((CHART / "Chart.yaml").read_text(), Loader)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
    assert chart["annotations"]["artifacthub.io/license"] == project["license"]
    assert yaml.safe_load(chart["annotations"]["artifacthub.io/changes"])


# values and schema ------------------------------------------------------------------------------------


def test_what_is_generated_is_as_it_is_generated() -> None:
    """Words and settings of the schema: run `make generate`."""
    assert generate.SCHEMA.read_text(encoding="utf-8") == generate.schema()


def test_the_table_of_the_readme_is_as_it_is_generated(npm: Path) -> None:
    """`make generate` writes it anew."""
    assert generate.GENERATOR.is_relative_to(npm)
    assert generate.README.read_text(encoding="utf-8") == generate.readme()


def leaves(values: Object, path: str = "") -> Iterator[str]:
    """Paths of the values as far as they are documented one by one."""
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and here not in generate.documented():
            yield from leaves(value, here)
        else:
            yield here


def properties(schema: Object, path: str = "") -> Iterator[str]:
    for key, value in schema.get("properties", {}).items():
        here = f"{path}.{key}" if path else key
        if here in generate.documented() or "properties" not in value:
            yield here
        else:
            yield from properties(value, here)


def test_every_value_is_documented_and_in_the_schema_and_none_is_missing() -> None:
    values = yaml.load((CHART / "values.yaml").read_text(), Loader)
    schema = json.loads(generate.SCHEMA.read_text())
    assert set(leaves(values)) == set(properties(schema)) == set(generate.documented())


def objects_in(schema: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    for key, value in schema.get("properties", {}).items():
        yield from objects_in(value, f"{path}.{key}")
        if value.get("properties"):
            yield f"{path}.{key}", value


def test_the_schema_is_closed_but_for_what_belongs_to_others() -> None:
    schema = json.loads(generate.SCHEMA.read_text())
    assert schema["additionalProperties"] is False
    assert {path for path, each in objects_in(schema) if each.get("additionalProperties") is not False} == {".global"}


def test_every_setting_of_the_program_has_its_place() -> None:
    """Those that the chart does not take by name it sets from a value of its own, or not at all, with a reason."""
    every = {variable_of(field) for field in Settings.__struct_fields__}
    assert {name for name in every if name.startswith("WECHAT_NATS_")} == (
        set(generate.settings_schema()) | generate.ELSEWHERE
    )
    assert every >= generate.ELSEWHERE


def test_settings_reach_the_program_as_they_are_written(tmp_path: Path) -> None:
    """The program itself reads what the pod gets: also numbers that helm holds as floats."""
    settings = {
        "WECHAT_NATS_IN_MAX_BYTES": 107374182400,
        "WECHAT_NATS_MEDIA_STORE_BYTES": -1,
        "WECHAT_NATS_WINDOW_HOURS": 22.5,
        "WECHAT_NATS_LOG": "debug",
    }
    read = settings_of(adapter_of(rendered({"settings": settings, "drainSeconds": 90.5})))
    assert read.in_max_bytes == 107374182400
    assert read.media_store_bytes == -1
    assert read.window_hours == 22.5
    assert (read.log, read.drain_s, read.http_addr) == ("debug", 90.5, ":9464")


REFUSALS: list[tuple[str, Object, str]] = [
    (
        "no key for tokens",
        {"tokenKey": {"existingSecret": ""}},
        "kubectl -n chat create secret generic bridge-wechat-nats-token-key --from-literal=token-key=",
    ),
    ("an unknown value", {"replicas": 3}, "additional properties 'replicas' not allowed"),
    ("a setting with its own value", {"settings": {"WECHAT_NATS_DRAIN_S": 9}}, "'WECHAT_NATS_DRAIN_S' not allowed"),
    ("a setting out of bounds", {"settings": {"WECHAT_NATS_WINDOW_HOURS": 97}}, "maximum"),
    ("a setting of the wrong type", {"settings": {"WECHAT_NATS_SEND_GAP_MS": "fast"}}, "want integer"),
    ("a password in the URL", {"nats": {"url": "nats://me:pw@nats:4222"}}, "does not match pattern"),
    (
        "too little patience",
        {"terminationGracePeriodSeconds": 50},
        "terminationGracePeriodSeconds: set at least 55, drainSeconds and 5 more, or the adapter is killed",
    ),
    (
        "two ways to log in",
        {"nats": {"auth": {"creds": {"existingSecret": "a"}, "nkey": {"existingSecret": "b"}}}},
        "nats.auth: set one way to log in, not nats.auth.creds and nats.auth.nkey.",
    ),
    (
        "a user without password",
        {"nats": {"auth": {"userPassword": {"user": "me"}}}},
        "nats.auth.userPassword.existingSecret: set the Secret with the password",
    ),
    (
        "two authorities",
        {"nats": {"tls": {"ca": {"existingSecret": "a", "existingConfigMap": "b"}}}},
        "nats.tls.ca: set existingSecret or existingConfigMap, not both.",
    ),
    (
        "credentials for the server that has none",
        {"evaluationNats": {"enabled": True}, "nats": {"auth": {"token": {"existingSecret": "a"}}}},
        "evaluationNats.enabled: set no nats.auth and no nats.tls with it",
    ),
    (
        "three copies on one server",
        {"evaluationNats": {"enabled": True}, "settings": {"WECHAT_NATS_REPLICAS": 3}},
        "settings.WECHAT_NATS_REPLICAS: set 1 with evaluationNats.enabled",
    ),
    (
        "a cluster and one copy",
        {"nats": {"url": "nats://a:4222,nats://b:4222,nats://c:4222"}},
        "settings.WECHAT_NATS_REPLICAS: set 3, since nats.url names a cluster",
    ),
    (
        "two autoscalers",
        {"autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True, "prometheusAddress": "http://p"}}},
        "autoscaling: set hpa.enabled or keda.enabled, not both",
    ),
    (
        "KEDA without Prometheus",
        {"autoscaling": {"keda": {"enabled": True}}},
        "autoscaling.keda.prometheusAddress: set the address of your Prometheus",
    ),
    (
        "a network policy that keeps it from NATS",
        {"networkPolicy": {"enabled": True}, "nats": {"url": "nats://a:4222,tls://b:4443/"}},
        "networkPolicy.natsPorts: add 4443, the port of tls://b:4443/ in nats.url, or allow it in extraEgress.",
    ),
    (
        "two servers on one port",
        {"console": {"existingSecret": "s", "port": 9464}},
        "console.port: set another one than http.port, which is 9464 too.",
    ),
    (
        "a Service for no console",
        {"console": {"service": {"enabled": True}}},
        "console.existingSecret: set the Secret with the token of the console that console.service makes reachable.",
    ),
    (
        "two monitors",
        {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}},
        "serviceMonitor.enabled: set it or podMonitor.enabled, not both, or each adapter is scraped twice.",
    ),
    (
        "a variable of the chart's",
        {"extraEnv": [{"name": "NATS_URL", "value": "x"}]},
        "extraEnv: remove NATS_URL, which the chart sets from a value of its own.",
    ),
    (
        "a setting past its check",
        {"extraEnv": [{"name": "WECHAT_NATS_LOG", "value": "debug"}]},
        "extraEnv: set WECHAT_NATS_LOG in settings, where it is checked.",
    ),
]


@pytest.mark.parametrize(("values", "sentence"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_what_cannot_work_is_refused_with_what_to_set(values: Object, sentence: str) -> None:
    with pytest.raises(Refused, match=re.escape(sentence)):
        rendered(values)


@pytest.mark.parametrize(
    "values",
    [
        {"networkPolicy": {"enabled": True, "natsPorts": [4222, 4443]}, "nats": {"url": "nats://a,tls://b:4443/"},
         "settings": {"WECHAT_NATS_REPLICAS": 1}},
        {"networkPolicy": {"enabled": True, "extraEgress": [{"ports": [{"port": 4443}]}]}, "nats": {"url": "tls://b:4443"}},
        {"networkPolicy": {"enabled": True, "natsPorts": [4222]}, "evaluationNats": {"enabled": True}},
        {"nats": {"url": "tls://b:4443"}},
        {"console": {"port": 9464}},
    ],
)  # fmt: skip
def test_what_can_work_is_not_refused(values: Object) -> None:
    assert rendered(values)


def test_values_of_a_parent_chart_do_no_harm() -> None:
    """What is global belongs to all charts of a release."""
    assert rendered({"global": {"storageClass": "fast"}}) == rendered()
