"""The chart as helm renders it: valid for every Kubernetes that it names, and what each of its values does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest
import yaml

from adapter.environment import read_settings
from adapter.jetstream import topology
from adapter.names import Names
from adapter.settings import Settings, variable_of
from tests.chart import generate
from tests.chart.helm import CHART, ROOT, Loader, Object, Refused, helm, merged, none, one, rendered, tools
from tests.monitoring.tools import need

KUBERNETES = ("1.27", "1.32", "1.37")
CI = sorted((CHART / "ci").glob("*-values.yaml"))
CORE = {
    "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Service",
    "ServiceAccount", "StatefulSet",
}  # fmt: skip
OPERATORS = {"PodMonitor", "PrometheusRule", "ScaledObject"}


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


def test_the_validators_refuse_what_is_wrong(tmp_path: Path, operators: dict[str, Object]) -> None:
    """A check that takes everything would pass, too."""
    values = CHART / "ci" / "everything-values.yaml"
    objects = rendered(values)
    monitor = one(objects, "PodMonitor")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(monitor, {"spec": {"podMetricEndpoints": []}}), operators["PodMonitor"])
    file = tmp_path / "object.yaml"
    file.write_text(yaml.safe_dump(merged(one(objects, "Deployment"), {"spec": {"replica": 1}})))
    checked = subprocess.run(
        [tools() / "bin" / "kubernetes-validate", "--strict", "-k", KUBERNETES[0], file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode != 0


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
        "WECHAT_NATS_STALE_RETRY_S": "1,2.5",
        "WECHAT_NATS_NOTIFY": False,
        "WECHAT_NATS_CONTINUE_TEXT": 'Say "more": 100 % {{ . }}',
        "WECHAT_NATS_LOG": "debug",
    }
    read = read_settings(env_of(adapter_of(rendered({"settings": settings, "drainSeconds": 90.5}))))
    assert read.in_max_bytes == 107374182400
    assert read.media_store_bytes == -1
    assert read.window_hours == 22.5
    assert read.stale_retry_s == (1.0, 2.5)
    assert read.notify is False
    assert read.continue_text == 'Say "more": 100 % {{ . }}'
    assert (read.log, read.drain_s, read.http_addr) == ("debug", 90.5, ":9464")


REFUSALS: list[tuple[str, Object, str]] = [
    ("an unknown value", {"replicas": 3}, "additional properties 'replicas' not allowed"),
    ("an unknown setting", {"settings": {"WECHAT_NATS_SEND_GAP": 1}}, "additional properties 'WECHAT_NATS_SEND_GAP'"),
    ("a setting with its own value", {"settings": {"WECHAT_NATS_DRAIN_S": 9}}, "'WECHAT_NATS_DRAIN_S' not allowed"),
    ("a setting out of bounds", {"settings": {"WECHAT_NATS_WINDOW_HOURS": 25}}, "maximum"),
    ("a setting of the wrong type", {"settings": {"WECHAT_NATS_SEND_GAP_MS": "fast"}}, "want integer"),
    ("copies of streams that cannot be", {"settings": {"WECHAT_NATS_REPLICAS": 2}}, "must be one of 1, 3, 5"),
    ("no replica", {"replicaCount": 0}, "minimum"),
    ("a URL of another kind", {"nats": {"url": "http://nats:4222"}}, "does not match pattern"),
    ("a password in the URL", {"nats": {"url": "nats://me:pw@nats:4222"}}, "does not match pattern"),
    ("half a digest", {"image": {"digest": "sha256:12"}}, "does not match pattern"),
    ("a quantity that is none", {"temporarySize": "much"}, "does not match pattern"),
    ("a duration that is none", {"podMonitor": {"interval": "30"}}, "does not match pattern"),
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
        "a password without user",
        {"nats": {"auth": {"userPassword": {"existingSecret": "s"}}}},
        "nats.auth.userPassword.user: set the user",
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
        "two budgets",
        {"podDisruptionBudget": {"maxUnavailable": 1, "minAvailable": 0}},
        "podDisruptionBudget: set maxUnavailable or minAvailable, not both.",
    ),
    (
        "two autoscalers",
        {"autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True, "prometheusAddress": "http://p"}}},
        "autoscaling: set hpa.enabled or keda.enabled, not both",
    ),
    (
        "more at least than at most",
        {"autoscaling": {"hpa": {"enabled": True}, "minReplicas": 11}},
        "autoscaling.maxReplicas: set at least autoscaling.minReplicas.",
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
        "a network policy without NATS' own port, which no URL names",
        {"networkPolicy": {"enabled": True, "natsPorts": [4443]}, "nats": {"url": "nats://[fd00::1]"}},
        "networkPolicy.natsPorts: add 4222,",
    ),
    (
        "two servers on one port",
        {"console": {"existingSecret": "s", "port": 9464}},
        "console.port: set another one than http.port, which is 9464 too.",
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
        {"networkPolicy": {"enabled": True, "natsPorts": [4222, 4443]}, "nats": {"url": "nats://a,tls://b:4443/"}},
        {"networkPolicy": {"enabled": True, "extraEgress": [{"ports": [{"port": 4443}]}]}, "nats": {"url": "tls://b:4443"}},
        {"networkPolicy": {"enabled": True, "natsPorts": [4222]}, "evaluationNats": {"enabled": True}},
        {"nats": {"url": "tls://b:4443"}},
        {"console": {"port": 9464}},
    ],
)  # fmt: skip
def test_what_can_work_is_not_refused(values: Object) -> None:
    assert rendered(values)


def test_several_faults_are_told_at_once() -> None:
    with pytest.raises(Refused) as caught:
        rendered(
            {"terminationGracePeriodSeconds": 1, "podDisruptionBudget": {"maxUnavailable": 1, "minAvailable": 1}}
        )
    assert "terminationGracePeriodSeconds" in str(caught.value)
    assert "podDisruptionBudget" in str(caught.value)


def test_values_of_a_parent_chart_do_no_harm() -> None:
    """What is global belongs to all charts of a release."""
    assert rendered({"global": {"storageClass": "fast"}}) == rendered()


# the pod ----------------------------------------------------------------------------------------------


def test_the_grace_period_follows_the_drain() -> None:
    """What Kubernetes kills with work in hand may be lost or sent twice."""
    assert pod_of(rendered())["terminationGracePeriodSeconds"] == 65
    assert pod_of(rendered({"drainSeconds": 90.5}))["terminationGracePeriodSeconds"] == 106
    assert pod_of(rendered({"terminationGracePeriodSeconds": 55}))["terminationGracePeriodSeconds"] == 55
    assert read_settings(env_of(adapter_of(rendered()))).drain_s == Settings().drain_s


@pytest.mark.parametrize("kind", ["Deployment", "Pod"])
def test_the_pod_is_nobodys(kind: str) -> None:
    pod = pod_of(rendered(), kind)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert "memory" in container["resources"]["limits"]
    assert "cpu" not in container["resources"]["limits"]


SECRETS: list[tuple[Object, dict[str, str], dict[str, str]]] = [
    (
        {"nats": {"auth": {"creds": {"existingSecret": "s"}}}},
        {"NATS_CREDS": "/etc/wechat-nats/creds/nats.creds"},
        {"creds": "s"},
    ),
    (
        {"nats": {"auth": {"nkey": {"existingSecret": "s", "key": "seed"}}}},
        {"NATS_NKEY": "/etc/wechat-nats/nkey/seed"},
        {"nkey": "s"},
    ),
    (
        {"nats": {"auth": {"token": {"existingSecret": "s"}}}},
        {"NATS_TOKEN_FILE": "/etc/wechat-nats/token/token"},
        {"token": "s"},
    ),
    (
        {"nats": {"auth": {"userPassword": {"user": "me", "existingSecret": "s"}}}},
        {"NATS_USER": "me", "NATS_PASSWORD_FILE": "/etc/wechat-nats/password/password"},
        {"password": "s"},
    ),
    ({"nats": {"inboxPrefix": "_INBOX_adapter"}}, {"NATS_INBOX_PREFIX": "_INBOX_adapter"}, {}),
    (
        {"nats": {"tls": {"ca": {"existingSecret": "s"}, "cert": {"existingSecret": "c"}, "handshakeFirst": True}}},
        {
            "NATS_CA": "/etc/wechat-nats/ca/ca.crt",
            "NATS_CERT": "/etc/wechat-nats/cert/tls.crt",
            "NATS_KEY": "/etc/wechat-nats/cert/tls.key",
            "NATS_TLS_FIRST": "true",
        },
        {"ca": "s", "cert": "c"},
    ),
    (
        {"tokenKey": {"existingSecret": "s"}},
        {"WECHAT_NATS_TOKEN_KEY_FILE": "/etc/wechat-nats/token-key/token-key"},
        {"token-key": "s"},
    ),
    (
        {"console": {"existingSecret": "s", "key": "t"}},
        {
            "WECHAT_NATS_CONSOLE_TOKEN_FILE": "/etc/wechat-nats/console/t",
            "WECHAT_NATS_CONSOLE_ADDR": "127.0.0.1:9465",  # for `kubectl port-forward` and nobody else
        },
        {"console": "s"},
    ),
]


@pytest.mark.parametrize(("values", "variables", "volumes"), SECRETS, ids=[next(iter(c[1])) for c in SECRETS])
def test_a_secret_is_a_file_and_never_a_variable(
    values: Object, variables: dict[str, str], volumes: dict[str, str]
) -> None:
    """In the Deployment and in the test; a whole volume, so that a rotated Secret reaches the running pod."""
    objects = rendered(values)
    for pod in (pod_of(objects), pod_of(objects, "Pod")):
        (container,) = pod["containers"]
        assert env_of(container).items() >= variables.items()
        assert all("valueFrom" not in each for each in container["env"])
        mounts = {each["name"]: each for each in container["volumeMounts"]}
        for name, secret in volumes.items():
            (volume,) = [each for each in pod["volumes"] if each["name"] == name]
            keys = [Path(value).name for value in variables.values() if f"/{name}/" in value]
            items = [{"key": key, "path": key} for key in keys]
            assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440, "items": items}
            assert mounts[name]["mountPath"] == f"/etc/wechat-nats/{name}"
            assert mounts[name]["readOnly"] is True
            assert "subPath" not in mounts[name]
    files = {Path(value).parent.name for name, value in variables.items() if value.startswith("/")}
    assert files == set(volumes)
    unknown = [name for name in variables if name.startswith("NATS_") and not _known(name)]
    assert unknown == []


def _known(variable: str) -> bool:
    return variable.removesuffix("_FILE") in {variable_of(field) for field in Settings.__struct_fields__}


def test_an_authority_may_be_in_a_config_map() -> None:
    pod = pod_of(rendered({"nats": {"tls": {"ca": {"existingConfigMap": "c"}}}}))
    items = [{"key": "ca.crt", "path": "ca.crt"}]
    assert {"name": "ca", "configMap": {"name": "c", "items": items}} in pod["volumes"]
    assert env_of(pod["containers"][0])["NATS_CA"] == "/etc/wechat-nats/ca/ca.crt"
    assert "ca" in {each["name"] for each in pod["containers"][0]["volumeMounts"]}


def patience(probe: Object) -> tuple[int, int, int]:
    """Seconds between two questions and for an answer, and failures in a row that count."""
    return probe["periodSeconds"], probe.get("timeoutSeconds", 1), probe["failureThreshold"]


def test_the_probes_ask_what_the_program_answers() -> None:
    """Each can be changed, and left out."""
    container = adapter_of(rendered())
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/startupz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert container["ports"] == [{"name": "http", "containerPort": 9464, "protocol": "TCP"}]
    assert {name: patience(container[name]) for name in paths} == {
        "startupProbe": (2, 1, 60), "livenessProbe": (10, 3, 3), "readinessProbe": (5, 3, 2),
    }  # fmt: skip
    changed = adapter_of(rendered({"livenessProbe": {"periodSeconds": 60}, "readinessProbe": None}))
    assert changed["livenessProbe"]["periodSeconds"] == 60
    assert changed["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert "readinessProbe" not in changed


def test_the_image_is_named_by_registry_tag_and_digest() -> None:
    digest = "sha256:" + "ab" * 32

    def image(values: Object) -> Any:
        return adapter_of(rendered(values))["image"]

    assert image({}) == "wechat-nats:0.1.0"
    assert image({"image": {"registry": "r.example.com:5000", "tag": "1"}}) == "r.example.com:5000/wechat-nats:1"
    assert image({"image": {"tag": "1", "digest": digest}}) == f"wechat-nats@{digest}"
    assert image({"image": {"registry": "own"}, "global": {"imageRegistry": "all"}}) == "all/wechat-nats:0.1.0"


def test_replicas_are_rolled_one_ahead_and_spread_over_hosts() -> None:
    deployment = one(rendered(), "Deployment")
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }  # fmt: skip
    (spread,) = pod_of([deployment])["topologySpreadConstraints"]
    assert (spread["whenUnsatisfiable"], spread["topologyKey"]) == ("ScheduleAnyway", "kubernetes.io/hostname")
    assert spread["labelSelector"]["matchLabels"] == deployment["spec"]["selector"]["matchLabels"]
    assert pod_of(rendered({"topologySpreadConstraints": []}))["topologySpreadConstraints"] == []


def test_what_can_be_added_is_where_it_belongs() -> None:
    objects = rendered(CHART / "ci" / "everything-values.yaml")
    deployment = one(objects, "Deployment")
    pod, container = pod_of(objects), adapter_of(objects)
    values = yaml.load((CHART / "ci" / "everything-values.yaml").read_text(), Loader)
    for name in (
        "nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName", "schedulerName",
        "dnsPolicy", "dnsConfig", "hostAliases", "initContainers",
    ):  # fmt: skip
        assert pod[name] == values[name], name
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert deployment["metadata"]["name"] == "chat-bridge"
    assert deployment["metadata"]["annotations"].items() >= values["deploymentAnnotations"].items()
    template = deployment["spec"]["template"]["metadata"]
    assert template["labels"].items() >= (values["podLabels"] | values["commonLabels"]).items()
    assert template["annotations"].items() >= values["podAnnotations"].items()
    assert values["extraContainers"][0] in pod["containers"]
    assert values["extraVolumes"][0] in pod["volumes"]
    assert values["extraVolumeMounts"][0] in container["volumeMounts"]
    assert container["envFrom"] == values["extraEnvFrom"]
    assert all(each in container["env"] for each in values["extraEnv"])
    assert env_of(container)["WECHAT_NATS_HTTP_ADDR"] == "[::]:8080"
    assert [each["name"] for each in pod["imagePullSecrets"]] == ["mirror", "own"]
    assert container["image"] == "mirror.example.com:5000/wechat-nats:0.1.0-rc.1"
    assert container["imagePullPolicy"] == "Always"
    assert container["args"] == ["run", *values["extraArgs"]]
    assert "livenessProbe" not in container
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}} in pod["volumes"]
    assert deployment["spec"]["revisionHistoryLimit"] == 2
    assert pod["terminationGracePeriodSeconds"] == 300
    account = one(objects, "ServiceAccount")
    assert (account["metadata"]["name"], pod["serviceAccountName"]) == ("chat", "chat")
    assert account["metadata"]["annotations"].items() >= values["serviceAccount"]["annotations"].items()
    assert account["automountServiceAccountToken"] is False
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == deployment["spec"]["selector"]["matchLabels"]
    assert one(objects, "ConfigMap", name="more")["data"] == {"release": "bridge"}
    assert one(objects, "ConfigMap", name="chat-bridge-text")
    for made in objects:
        if made["metadata"]["name"].startswith("chat-bridge") and made["metadata"]["name"] != "chat-bridge-text":
            assert made["metadata"]["labels"]["team"] == "chat"
            assert made["metadata"]["annotations"]["example.com/owner"] == "chat"
            assert made["metadata"]["namespace"] in {"elsewhere", "monitoring"}


def test_a_service_account_may_be_somebody_elses() -> None:
    for name in ("", "own"):
        objects = rendered({"serviceAccount": {"create": False, "name": name}})
        assert none(objects, "ServiceAccount")
        assert pod_of(objects)["serviceAccountName"] == (name or "default")


def selectors(objects: list[Object]) -> list[Object]:
    found = []
    for made in objects:
        match made["kind"]:
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget" | "PodMonitor":
                found.append(made["spec"]["selector"]["matchLabels"])
            case "NetworkPolicy":
                found.append(made["spec"]["podSelector"]["matchLabels"])
            case "Service":
                found.append(made["spec"]["selector"])
    return found


def test_selectors_never_change() -> None:
    """Kubernetes refuses to change them: every release would have to be made anew."""
    own = {"app.kubernetes.io/name": "wechat-nats", "app.kubernetes.io/instance": "bridge"}
    plain = rendered({"evaluationNats": {"enabled": True}, "networkPolicy": {"enabled": True}})
    dressed = rendered({
        "evaluationNats": {"enabled": True}, "networkPolicy": {"enabled": True}, "fullnameOverride": "other",
        "commonLabels": {"team": "chat", "app.kubernetes.io/name": "mine"}, "podLabels": {"tier": "edge"},
        "image": {"tag": "9"}, "commonAnnotations": {"a": "b"},
    })  # fmt: skip
    assert selectors(plain) == selectors(dressed)
    assert all(each.items() >= own.items() for each in selectors(plain))
    for made in (one(plain, "Deployment"), one(plain, "StatefulSet"), one(dressed, "Deployment")):
        wanted = made["spec"]["selector"]["matchLabels"]
        assert made["spec"]["template"]["metadata"]["labels"].items() >= wanted.items()
    test = one(plain, "Pod")["metadata"]["labels"]
    assert not test.items() >= one(plain, "Deployment")["spec"]["selector"]["matchLabels"].items()


# beside the pod ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "budget"),
    [
        ({}, {"maxUnavailable": 1}),
        ({"podDisruptionBudget": {"maxUnavailable": "25%"}}, {"maxUnavailable": "25%"}),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, {"maxUnavailable": 0}),
        ({"podDisruptionBudget": {"minAvailable": 0}}, {"minAvailable": 0}),
        ({"replicaCount": 1}, None),
        ({"replicaCount": 1, "autoscaling": {"hpa": {"enabled": True}}}, {"maxUnavailable": 1}),
        ({"autoscaling": {"hpa": {"enabled": True}, "minReplicas": 1}}, None),
        ({"podDisruptionBudget": {"enabled": False}}, None),
    ],
)
def test_there_is_a_budget_where_there_are_several(values: Object, budget: Object | None) -> None:
    """One for a single replica would keep its node from ever being drained."""
    objects = rendered(values)
    if budget is None:
        assert none(objects, "PodDisruptionBudget")
    else:
        spec = one(objects, "PodDisruptionBudget")["spec"]
        assert spec["selector"] == one(objects, "Deployment")["spec"]["selector"], "not of the test's pod"
        assert {key: spec[key] for key in spec if key != "selector"} == budget


def test_an_autoscaler_counts_bots_per_replica() -> None:
    objects = rendered(CHART / "ci" / "hpa-values.yaml")
    spec = one(objects, "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in one(objects, "Deployment")["spec"], "or each upgrade would undo what it did"
    assert spec["metrics"] == [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": "wechat_adapter_bindings"},
                "target": {"type": "AverageValue", "averageValue": "1400"},
            },
        }
    ]
    deployment = one(objects, "Deployment")
    assert spec["scaleTargetRef"] == {
        "apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"],
    }  # fmt: skip
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 1200
    plain = one(rendered({"autoscaling": {"hpa": {"enabled": True}}}), "HorizontalPodAutoscaler")["spec"]
    assert plain["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 600
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 10)


def test_keda_asks_for_metrics_that_there_are() -> None:
    objects = rendered(CHART / "ci" / "keda-values.yaml")
    spec = one(objects, "ScaledObject")["spec"]
    assert spec["scaleTargetRef"]["name"] == one(objects, "Deployment")["metadata"]["name"]
    assert spec["pollingInterval"] == 60
    scaling = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert scaling["scaleDown"]["stabilizationWindowSeconds"] == 1200
    bots, age = spec["triggers"]
    assert bots["authenticationRef"] == age["authenticationRef"] == {"name": "prometheus"}
    assert bots["metadata"]["threshold"] == str(Settings().capacity * 70 // 100)
    assert (age["metricType"], age["metadata"]["threshold"]) == ("Value", "120")
    queries = bots["metadata"]["query"] + age["metadata"]["query"]
    names = set(re.findall(r"wechat_adapter_\w+", queries))
    assert names <= exposed()
    assert len(names) == 3
    (pods,) = set(re.findall(r'namespace="chat", pod=~"([^"]+)"', queries))
    assert queries.count(pods) == 3
    for pod in ("bridge-wechat-nats-7d9c5b8f6d-x2x7q", "bridge-wechat-nats-7d9c5bx2x7q"):
        assert re.fullmatch(pods, pod)
    for pod in (
        "bridge-wechat-nats-staging-7d9c5b8f6d-x2x7q",
        "bridge-wechat-nats-nats-0",
        "a-bridge-wechat-nats-1-x2x7q",
    ):
        assert not re.fullmatch(pods, pod)


def exposed() -> set[str]:
    from adapter.metrics import Metrics

    body, _ = Metrics().expose("")
    return set(re.findall(r"^# TYPE (\w+)", body.decode(), re.MULTILINE))


def test_the_network_policy_lets_out_to_nats_and_wechat_only() -> None:
    policy = one(rendered(CHART / "ci" / "production-values.yaml"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    dns, nats, https = policy["egress"]
    assert {each["port"] for each in dns["ports"]} == {53}
    assert [each["port"] for each in nats["ports"]] == [4222]
    assert nats["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "nats"}
    assert [each["port"] for each in https["ports"]] == [443]
    (block,) = https["to"]
    assert "169.254.0.0/16" in block["ipBlock"]["except"], "the cloud's metadata"
    (ingress,) = policy["ingress"]
    assert [each["port"] for each in ingress["ports"]] == [9464]
    assert ingress["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    test = one(rendered({"networkPolicy": {"enabled": True}}), "Pod")["metadata"]["labels"]
    (expression,) = policy["podSelector"]["matchExpressions"]
    assert test["app.kubernetes.io/component"] in expression["values"], "the test talks to NATS, too"


def test_a_network_policy_takes_more_ports_and_rules() -> None:
    policy = one(rendered(CHART / "ci" / "everything-values.yaml"), "NetworkPolicy")["spec"]
    values = yaml.load((CHART / "ci" / "everything-values.yaml").read_text(), Loader)["networkPolicy"]
    assert [each["port"] for each in policy["egress"][1]["ports"]] == values["natsPorts"]
    assert policy["ingress"][1:] == values["extraIngress"]
    assert policy["egress"][3:] == values["extraEgress"]


def test_exceptions_are_of_the_kind_of_their_network() -> None:
    """An IPv4 exception of an IPv6 network is refused by the API server."""
    policy = one(rendered(CHART / "ci" / "everything-values.yaml"), "NetworkPolicy")["spec"]
    blocks = [each["ipBlock"] for each in policy["egress"][2]["to"]]
    assert blocks == [
        {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]},
        {"cidr": "::/0", "except": ["fd00::/8"]},
    ]


def test_the_pod_monitor_finds_the_pods() -> None:
    objects = rendered(CHART / "ci" / "production-values.yaml")
    monitor = one(objects, "PodMonitor")
    deployment = one(objects, "Deployment")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == [deployment["metadata"]["namespace"]]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= monitor["spec"]["selector"]["matchLabels"].items()
    assert labels[monitor["spec"]["jobLabel"]] == "wechat-nats"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_what_is_said_of_monitoring_arrives() -> None:
    monitor = one(rendered(CHART / "ci" / "everything-values.yaml"), "PodMonitor")
    values = yaml.load((CHART / "ci" / "everything-values.yaml").read_text(), Loader)["podMonitor"]
    assert monitor["metadata"]["namespace"] == values["namespace"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for name in ("interval", "scrapeTimeout", "relabelings", "metricRelabelings"):
        assert endpoint[name] == values[name], name
    rule = one(rendered(CHART / "ci" / "monitoring-values.yaml"), "PrometheusRule")["metadata"]
    assert (rule["namespace"], rule["labels"]["release"]) == ("monitoring", "prometheus")


def alerts_of(objects: list[Object]) -> dict[str, Object]:
    groups = one(objects, "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def test_the_rules_are_those_of_the_file() -> None:
    """Nothing is lost on the way through helm: templates of labels, numbers, the order of groups."""
    made = one(rendered({"prometheusRule": {"enabled": True}}), "PrometheusRule")
    assert made["spec"] == yaml.load((CHART / "files" / "alerts.yaml").read_text(), Loader)


def test_an_alert_is_changed_by_its_name() -> None:
    plain = alerts_of(rendered({"prometheusRule": {"enabled": True}}))
    objects = rendered(CHART / "ci" / "monitoring-values.yaml")
    changed = alerts_of(objects)
    assert set(plain) - set(changed) == {"WechatBotsThrottled"}
    near, before = changed["WechatCapacityNear"], plain["WechatCapacityNear"]
    assert near["expr"].split() == [*before["expr"].split()[:-1], "0.8"]
    assert near["for"] == "1h"
    anchor = before["annotations"]["runbook_url"].partition("#")[2]
    assert near["annotations"]["runbook_url"] == f"https://wiki.example.com/wechat-nats#{anchor}"
    assert all(rule["labels"]["team"] == "chat" for rule in changed.values())
    others = set(changed) - {"WechatCapacityNear"}
    assert all(changed[name]["expr"] == plain[name]["expr"] for name in others)
    assert all(changed[name].get("for") == plain[name].get("for") for name in others)
    severe = rendered(
        {"prometheusRule": {"enabled": True, "alerts": {"WechatDeadLetters": {"severity": "critical"}}}}
    )
    assert alerts_of(severe)["WechatDeadLetters"]["labels"]["severity"] == "critical"


def test_every_alert_that_ends_in_a_number_takes_a_threshold() -> None:
    """One that does not is refused with a sentence, and so is one that there is not."""
    plain = alerts_of(rendered({"prometheusRule": {"enabled": True}}))
    numbered = {name for name, rule in plain.items() if re.search(r"[<>=]=?\s*[0-9.]+\s*$", rule["expr"])}
    assert len(numbered) > len(plain) / 2
    wanted = {"enabled": True, "alerts": {name: {"threshold": 12345678} for name in numbered}}
    for name, rule in alerts_of(rendered({"prometheusRule": wanted})).items():
        assert rule["expr"].rstrip().endswith(" 12345678") == (name in numbered)
    for name in set(plain) - numbered:
        with pytest.raises(Refused, match=f"prometheusRule.alerts.{name}.threshold: remove it"):
            rendered({"prometheusRule": {"enabled": True, "alerts": {name: {"threshold": 1}}}})
    with pytest.raises(
        Refused, match=r"prometheusRule\.alerts\.WechatNothing: there is no such alert; there are Wechat"
    ):
        rendered({"prometheusRule": {"enabled": True, "alerts": {"WechatNothing": {"enabled": False}}}})


def test_prometheus_takes_the_changed_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(one(rendered(CHART / "ci" / "monitoring-values.yaml"), "PrometheusRule")["spec"]))
    checked = subprocess.run(
        [need("promtool"), "check", "rules", "--lint=all", "--lint-fatal", file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_is_handed_to_grafana_unchanged(tmp_path: Path) -> None:
    """Its legends look like templates of helm's."""
    chart = tmp_path / "wechat-nats"
    shutil.copytree(CHART, chart)
    dashboard = {"title": "wechat-nats", "panels": [{"targets": [{"legendFormat": "{{pod}} {{ .Values }}"}]}]}
    (chart / "files" / "dashboard.json").write_text(json.dumps(dashboard, indent=2))
    values = {"dashboards": {"enabled": True, "annotations": {"grafana_folder": "Chat"}, "namespace": "monitoring"}}
    made = one(rendered(values, chart=chart), "ConfigMap")
    assert json.loads(made["data"]["wechat-nats.json"]) == dashboard
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert made["metadata"]["annotations"] == {"grafana_folder": "Chat"}
    assert made["metadata"]["namespace"] == "monitoring"
    shipped = one(rendered(CHART / "ci" / "monitoring-values.yaml"), "ConfigMap")
    assert json.loads(shipped["data"]["wechat-nats.json"]) == json.loads((CHART / "files/dashboard.json").read_text())
    (chart / "files" / "dashboard.json").unlink()
    with pytest.raises(Refused, match=r"dashboards\.enabled: files/dashboard\.json is missing"):
        rendered(values, chart=chart)


def test_the_server_for_evaluation_keeps_what_it_acknowledges() -> None:
    objects = rendered(CHART / "ci" / "evaluation-values.yaml")
    stateful = one(objects, "StatefulSet")
    service = one(objects, "Service")
    config = one(objects, "ConfigMap")["data"]["nats.conf"]
    assert "sync_interval: always" in config
    assert env_of(adapter_of(objects))["NATS_URL"] == f"nats://{service['metadata']['name']}:4222"
    assert service["spec"]["selector"] == stateful["spec"]["selector"]["matchLabels"]
    (claim,) = stateful["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "4Gi"
    read = read_settings(env_of(adapter_of(objects)))
    assert read.in_max_bytes + read.media_store_bytes <= 3 * 2**30, (
        "JetStream reserves it, of three quarters of 4 GiB"
    )
    other = rendered(CHART / "ci" / "evaluation-without-volume-values.yaml")
    assert "volumeClaimTemplates" not in one(other, "StatefulSet")["spec"]
    assert read_settings(env_of(adapter_of(other))).media_store_bytes == 2**31


def test_the_test_pod_runs_the_doctor_with_the_adapters_settings() -> None:
    image = {"pullPolicy": "Always", "pullSecrets": ["own"]}
    objects = rendered({"settings": {"WECHAT_NATS_PREFIX": "other"}, "image": image})
    pod = one(objects, "Pod")
    assert pod["metadata"]["annotations"] == {
        "helm.sh/hook": "test", "helm.sh/hook-delete-policy": "before-hook-creation",
    }, "what it said can be read until the next one"  # fmt: skip
    assert pod["spec"]["imagePullSecrets"] == pod_of(objects)["imagePullSecrets"] == [{"name": "own"}]
    assert pod["spec"]["activeDeadlineSeconds"] == 120
    (doctor,) = pod["spec"]["containers"]
    assert doctor["args"] == ["doctor"]
    assert doctor["env"] == adapter_of(objects)["env"]
    assert doctor["image"] == adapter_of(objects)["image"]
    assert doctor["imagePullPolicy"] == adapter_of(objects)["imagePullPolicy"] == "Always"
    assert pod["spec"]["restartPolicy"] == "Never"
    assert none(rendered({"test": {"enabled": False}}), "Pod")


# JetStream objects ------------------------------------------------------------------------------------

SAME_AS = {
    "subjects": "subjects", "retention": "retention", "discard": "discard", "maxAge": "max_age",
    "maxMsgsPerSubject": "max_msgs_per_subject", "maxBytes": "max_bytes", "maxConsumers": "max_consumers",
    "discardPerSubject": "discard_new_per_subject", "allowDirect": "allow_direct",
    "allowRollup": "allow_rollup_hdrs", "denyDelete": "deny_delete", "allowMsgTtl": "allow_msg_ttl",
    "duplicateWindow": "duplicate_window", "replicas": "num_replicas", "storage": "storage", "name": "name",
}  # fmt: skip
"""Fields of NACK's Stream (jetstream.nats.io/v1beta2) and of JetStream's configuration."""
SECONDS = {"s": 1, "m": 60, "h": 3600}


def as_jetstream(spec: Object) -> Object:
    """What NACK makes of a Stream, as a configuration."""
    config: Object = {}
    for field, value in spec.items():
        match field:
            case "preventDelete" | "account":
                continue
            case "republish":
                config["republish"] = {"src": value["source"], "dest": value["destination"]}
            case "subjectTransform":
                config["subject_transform"] = {"src": value["source"], "dest": value["dest"]}
            case "maxAge" | "duplicateWindow":
                config[SAME_AS[field]] = int(value[:-1]) * SECONDS[value[-1]] * 10**9
            case _:
                config[SAME_AS[field]] = value
    return config


VARIED = {
    "WECHAT_NATS_PREFIX": "we-2", "WECHAT_NATS_REPLICAS": 3, "WECHAT_NATS_STORAGE": "memory",
    "WECHAT_NATS_IN_MAX_AGE_H": 1.5, "WECHAT_NATS_IN_MAX_PER_SANDBOX": 11, "WECHAT_NATS_IN_MAX_BYTES": 2**40,
    "WECHAT_NATS_OUT_MAX_PER_SANDBOX": 12, "WECHAT_NATS_MEDIA_HOURS": 2.5, "WECHAT_NATS_MEDIA_STORE_BYTES": -1,
    "WECHAT_NATS_QUOTE_HOURS": 3,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, VARIED], ids=["defaults", "every setting that counts"])
def test_the_objects_of_nack_are_what_the_adapter_would_make(settings: Object) -> None:
    """What is not said has JetStream's default in both: compared as the adapter compares a stream that it finds."""
    read = read_settings({name: str(value) for name, value in settings.items()})
    objects = [
        made for made in rendered({"nack": {"enabled": True}, "settings": settings}) if made["kind"] == "Stream"
    ]
    found = {made["spec"]["name"]: as_jetstream(made["spec"]) for made in objects}
    wanted = {each.name: each for each in topology.streams(Names(read.prefix), read)}
    assert set(found) == set(wanted)
    for name, each in wanted.items():
        assert topology.compare(each, found[name]) == []
        assert not set(found[name]) - set(each.config), f"{name} says more than the adapter"
    assert all(made["spec"]["preventDelete"] for made in objects), "an uninstall deletes nobody's messages"


def test_objects_of_nack_may_be_of_an_account_and_be_deleted_with_the_release() -> None:
    nack = {"enabled": True, "account": "chat", "preventDelete": False}
    objects = [made["spec"] for made in rendered({"nack": nack}) if made["kind"] == "Stream"]
    assert {(spec["account"], spec["preventDelete"]) for spec in objects} == {("chat", False)}


def test_every_setting_that_shapes_a_stream_is_tried_above() -> None:
    """A new one must be in the template, too."""
    plain = [each.config for each in topology.streams(Names(), Settings())]
    shaping = {"WECHAT_NATS_PREFIX"}
    for field, kind in Settings.__annotations__.items():
        default = getattr(Settings(), field)
        for other in (3, 7.5, "memory", "x" * 5):
            if isinstance(other, type(default)) and "bool" not in str(kind):
                changed = msgspec.structs.replace(Settings(), **{field: other})
                if [each.config for each in topology.streams(Names(), changed)] != plain:
                    shaping.add(variable_of(field))
    assert shaping == set(VARIED)


# notes ------------------------------------------------------------------------------------------------


def notes(values: Object, tmp_path: Path) -> str:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    said = helm("install", "bridge", str(CHART), "--dry-run=client", "--namespace=chat", f"--values={file}")
    return said.partition("NOTES:\n")[2]


def test_the_notes_name_the_next_commands(tmp_path: Path) -> None:
    text = notes(
        {"nats": {"auth": {"creds": {"existingSecret": "s"}}}, "tokenKey": {"existingSecret": "k"}}, tmp_path
    )
    assert text == (Path(__file__).with_name("notes.txt")).read_text()


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({}, "WARNING: bot tokens are stored as they are."),
        ({}, "WARNING: the adapter logs in to NATS without credentials"),
        ({"evaluationNats": {"enabled": True}}, "WARNING: the NATS server of this release is for evaluation"),
        ({"replicaCount": 1}, "WARNING: with one replica"),
    ],
)
def test_the_notes_warn(values: Object, warning: str, tmp_path: Path) -> None:
    assert warning in notes(values, tmp_path)


def test_the_notes_name_commands_that_there_are(tmp_path: Path) -> None:
    from adapter.cli import build

    text = notes({}, tmp_path)
    named = set(re.findall(r"-- wechat-nats (\w+)", text))
    assert named == {"doctor", "login", "tail", "send"}
    assert all(name in build() for name in named)


def test_with_credentials_the_notes_run_nothing_in_the_pod_that_its_user_may_not(tmp_path: Path) -> None:
    text = notes({"nats": {"auth": {"creds": {"existingSecret": "s"}}}}, tmp_path)
    assert re.findall(r"exec .*-- wechat-nats (\w+)", text) == ["doctor"]
    assert re.findall(r"^ +wechat-nats (\w+)", text, re.MULTILINE) == ["login", "tail", "send"]
    assert "NATS_INBOX_PREFIX=_INBOX_operator" in text
