"""What the chart makes around the pod: budget, autoscaling, network policy, monitoring, the server for evaluation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from adapter.contract.names import Names
from adapter.jetstream.topology import wanted_streams
from adapter.settings import Settings
from tests.chart.helm import (
    CHART,
    Loader,
    Object,
    Refused,
    adapter_of,
    env_of,
    none,
    one,
    pod_of,
    rendered,
    settings_of,
)


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
        assert spec.pop("unhealthyPodEvictionPolicy") == "AlwaysAllow", "an outage of NATS must not block a drain"
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
                "target": {"type": "AverageValue", "averageValue": "1000"},
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
    assert bots["metadata"]["threshold"] == str(Settings().capacity * 50 // 100)
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
    from adapter.tools.metrics import Metrics

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


def test_the_service_has_the_ports_that_are_asked_for_and_its_monitor_finds_it() -> None:
    values = CHART / "ci" / "service-values.yaml"
    objects = rendered(values)
    monitor, service, deployment = (one(objects, kind) for kind in ("ServiceMonitor", "Service", "Deployment"))
    assert service["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "wechat-nats"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"], endpoint["interval"]) == ("http", "/metrics", "1m")
    assert [(port["name"], port["port"]) for port in service["spec"]["ports"]] == [("http", 9464), ("console", 8080)]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 9464, "console": 9465}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["WECHAT_NATS_CONSOLE_ADDR"] == ":9465"
    assert container["lifecycle"]["preStop"] == {"httpGet": {"path": "/livez", "port": "http"}}
    _, console = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert console["ports"] == [{"port": 9465, "protocol": "TCP"}]
    for parts in ({"serviceMonitor": {"enabled": True}}, {}):
        made = rendered({"console": {"existingSecret": "console"}, **parts})
        assert len([each for each in made if each["kind"] == "Service"]) == len(parts)
        (container,) = one(made, "Deployment")["spec"]["template"]["spec"]["containers"]
        assert [port["name"] for port in container["ports"]] == ["http"]
        env = {each["name"]: each.get("value") for each in container["env"]}
        assert env["WECHAT_NATS_CONSOLE_ADDR"] == "127.0.0.1:9465"


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
    read = settings_of(adapter_of(objects))
    reserved = sum(w.config["max_bytes"] for w in wanted_streams(Names(), read) if w.reserves_space)
    assert reserved <= 3 * 2**30, "JetStream reserves it, of three quarters of 4 GiB"
    other = rendered(CHART / "ci" / "evaluation-without-volume-values.yaml")
    assert "volumeClaimTemplates" not in one(other, "StatefulSet")["spec"]
    assert settings_of(adapter_of(other)).media_store_bytes == 2**31


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
