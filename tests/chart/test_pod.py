"""The adapter's pod as the chart makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter.settings import Settings, variable_of
from tests.chart.helm import (
    CHART,
    Loader,
    Object,
    adapter_of,
    env_of,
    none,
    one,
    pod_of,
    rendered,
    settings_of,
)


def test_the_grace_period_follows_the_drain() -> None:
    """What Kubernetes kills with work in hand may be lost or sent twice."""
    assert pod_of(rendered())["terminationGracePeriodSeconds"] == 65
    assert pod_of(rendered({"drainSeconds": 90.5}))["terminationGracePeriodSeconds"] == 106
    assert pod_of(rendered({"terminationGracePeriodSeconds": 55}))["terminationGracePeriodSeconds"] == 55
    assert settings_of(adapter_of(rendered())).drain_s == Settings().drain_s


@pytest.mark.parametrize("kind", ["Deployment", "Pod"])
def test_the_pod_runs_as_an_unprivileged_user(kind: str) -> None:
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
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
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
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget" | "PodMonitor" | "ServiceMonitor":
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
