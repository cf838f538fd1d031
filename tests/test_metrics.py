"""Metrics: names, help texts and size, as Prometheus' naming guide and our budget want them."""

from __future__ import annotations

import re

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from adapter import __version__
from adapter.tools.metrics import Metrics

LIBRARY = ("process_", "python_gc_")


def families(metrics: Metrics) -> list[Metric]:
    """Ours, without those of the client library."""
    text = metrics.expose()[0].decode()
    return [family for family in text_string_to_metric_families(text) if not family.name.startswith(LIBRARY)]


def test_names_have_the_prefix_and_their_unit() -> None:
    for family in families(Metrics()):
        assert re.fullmatch(r"wechat_adapter_[a-z][a-z0-9_]*", family.name), family.name
        assert not re.search(r"_(ms|millis|minutes|hours|count|total|kb|mb)$", family.name), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds"), family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name
        if family.type == "gauge" and "age" in family.name.split("_"):
            assert family.name.endswith("_seconds"), family.name


def test_help_is_a_sentence_that_lists_every_value_of_every_label() -> None:
    for family in families(Metrics()):
        assert family.documentation.endswith("."), family.name
        if family.name == "wechat_adapter_build_info":
            continue
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label != "le":
                    assert re.search(rf"\b{label}: [^.]*\b{value}\b", family.documentation), (
                        family.name,
                        label,
                        value,
                    )


def test_no_label_is_unbounded() -> None:
    labels = {label for family in families(Metrics()) for sample in family.samples for label in sample.labels}
    assert labels == {
        *("consumer", "direction", "endpoint", "kind", "le", "outcome", "reason", "state", "stream", "verb"),
        *("version", "python", "schema_version"),
    }


def test_build_info_says_what_runs() -> None:
    body = Metrics().expose()[0].decode()
    labels = rf'python="[\d.]+",schema_version="1",version="{re.escape(__version__)}"'
    assert re.search(rf"wechat_adapter_build_info\{{{labels}\}} 1.0", body)


def test_only_plausible_outcomes_of_commands_exist_in_advance() -> None:
    body = Metrics().expose()[0].decode()
    made = re.findall(r'outbound_messages_total\{kind="(\w+)",outcome="(\w+)",reason="(\w+)"\}', body)
    assert ("text", "refused", "quota") in made
    assert ("media", "accepted", "none") in made
    assert ("text", "accepted", "quota") not in made
