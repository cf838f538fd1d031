"""Prints the JSON Schemas of the objects that Kubernetes itself does not know; runs with the tools' own Python."""

import json
import re
import sys
from typing import Any

from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule, ServiceMonitor


def closed(node: Any) -> Any:
    """No property that is not named, as an API server with strict validation; and Python's regular expressions."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: closed(value) for key, value in node.items()}
    if "properties" in made:
        made["additionalProperties"] = False
    if isinstance(made.get("pattern"), str):
        made["pattern"] = re.sub(r"^\^\(\?i\)", "(?i)^", made["pattern"])  # Go has the flag after the anchor
    return made


json.dump({model.__name__: closed(model.model_json_schema(by_alias=True)) for model in (
    PodMonitor, PrometheusRule, ScaledObject, ServiceMonitor,
)}, sys.stdout)  # fmt: skip
