"""What /metrics of running adapters say, read as Prometheus reads it."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "wechat_adapter_"


async def scrape(*ports: int) -> dict[str, float]:
    """Every sample of the adapters on these ports, summed: by `name{label="value",…}` (labels by name), and by name
    alone over all labels. Without the prefix. Raises httpx.HTTPError."""
    sums: dict[str, float] = {}
    async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
        for port in ports:
            text = (await http.get(f"http://127.0.0.1:{port}/metrics")).raise_for_status().text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    name = sample.name.removeprefix(PREFIX)
                    labels = ",".join(f'{label}="{value}"' for label, value in sorted(sample.labels.items()))
                    sums[name] = sums.get(name, 0.0) + sample.value
                    if labels:
                        one = f"{name}{{{labels}}}"
                        sums[one] = sums.get(one, 0.0) + sample.value
    return sums


def by_label(values: dict[str, float], name: str, label: str) -> dict[str, float]:
    """Sums of a metric by one of its labels, without zeros."""
    sums: dict[str, float] = {}
    for sample, value in values.items():
        if sample.startswith(f"{name}{{") and value:
            key = sample.partition(f'{label}="')[2].partition('"')[0]
            sums[key] = sums.get(key, 0.0) + value
    return sums
