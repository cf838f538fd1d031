"""The JetStream objects of the chart, for NACK, are what the adapter would make."""

from __future__ import annotations

import msgspec
import pytest

from adapter.contract.names import Names
from adapter.jetstream import topology
from adapter.settings import Settings, read_settings, variable_of
from tests.chart.helm import (
    Object,
    rendered,
)

SAME_AS = {
    "subjects": "subjects", "retention": "retention", "discard": "discard", "maxAge": "max_age",
    "maxMsgsPerSubject": "max_msgs_per_subject", "maxBytes": "max_bytes",
    "discardPerSubject": "discard_new_per_subject", "allowDirect": "allow_direct",
    "allowRollup": "allow_rollup_hdrs", "denyDelete": "deny_delete", "denyPurge": "deny_purge",
    "allowMsgTtl": "allow_msg_ttl",
    "duplicateWindow": "duplicate_window", "maxMsgSize": "max_msg_size", "replicas": "num_replicas",
    "storage": "storage", "name": "name", "description": "description", "metadata": "metadata",
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
    "WECHAT_NATS_PREFIX": "we-2", "WECHAT_NATS_REPLICAS": 3, "WECHAT_NATS_PARTITIONS": 7,
    "WECHAT_NATS_IN_MAX_AGE_H": 24.5, "WECHAT_NATS_IN_MAX_PER_PERSON": 11, "WECHAT_NATS_IN_MAX_BYTES": 2**40,
    "WECHAT_NATS_OUT_MAX_PER_SANDBOX": 12, "WECHAT_NATS_MEDIA_HOURS": 2.5,
    "WECHAT_NATS_MEDIA_STORE_BYTES": -1, "WECHAT_NATS_PARK_HOURS": 100.5,
}  # fmt: skip


UNBOUNDED = {"WECHAT_NATS_IN_MAX_BYTES": -1}


@pytest.mark.parametrize(
    "settings", [{}, VARIED, UNBOUNDED], ids=["defaults", "every setting that counts", "no bound"]
)
def test_the_objects_of_nack_are_what_the_adapter_would_make(settings: Object) -> None:
    """What is not said has JetStream's default in both: compared as the adapter compares a stream that it finds."""
    read = read_settings({name: str(value) for name, value in settings.items()})
    objects = [
        made for made in rendered({"nack": {"enabled": True}, "settings": settings}) if made["kind"] == "Stream"
    ]
    found = {made["spec"]["name"]: as_jetstream(made["spec"]) for made in objects}
    wanted = {each.name: each for each in topology.wanted_streams(Names(read.prefix), read)}
    assert set(found) == set(wanted)
    for name, each in wanted.items():
        assert topology.differences(each, found[name]) == []
        for field in topology.FOR_READERS:
            assert found[name][field] == each.config[field]
        assert not set(found[name]) - set(each.config), f"{name} says more than the adapter"
    assert all(made["spec"]["preventDelete"] for made in objects), "an uninstall deletes nobody's messages"


def test_every_setting_that_shapes_a_stream_is_tried_above() -> None:
    """A new one must be in the template, too."""
    plain = [each.config for each in topology.wanted_streams(Names(), Settings())]
    shaping = {"WECHAT_NATS_PREFIX"}
    for field, kind in Settings.__annotations__.items():
        default = getattr(Settings(), field)
        for other in (3, 97.5, "memory", "x" * 5):
            if isinstance(other, type(default)) and "bool" not in str(kind):
                changed = msgspec.structs.replace(Settings(), **{field: other})
                if [each.config for each in topology.wanted_streams(Names(), changed)] != plain:
                    shaping.add(variable_of(field))
    assert shaping == set(VARIED)
