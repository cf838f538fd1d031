"""Fast counters and histograms in prometheus_client's registry and formats, for the path of every message.

The library's own take a lock and check labels and amounts at each step, of which a message takes a dozen: 25 µs
instead of 5 µs here. Only the event loop counts. Another thread may collect, and gets values of nearly the same
moment.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Child = TypeVar("Child")


class CounterValue:
    """The value of one child of a counter."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """`amount` must not be negative."""
        self.total += amount


class HistogramValue:
    """The values of one child of a histogram. `bounds`: inclusive upper bounds of its buckets, in order."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound's label, with the number of values up to it."""
        names = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        return list(zip(names, accumulate(self._counts), strict=True))

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self._total


class _LabelledMetric(Collector, Generic[Child]):
    """A metric with a child for each combination of values of its labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self._children: dict[tuple[str, ...], Child] = {}
        self._children_by_kwargs: dict[tuple[tuple[str, str], ...], Child] = {}
        """The children by the names and values that `labels` was called with."""
        if not labels:
            self._children[()] = self._new_child()
        registry.register(self)

    def child(self, *values: str) -> Child:
        """The child with these values, in the order of the labels.

        Takes a fifth of the time of `labels`, for values that each message decides. Other callers keep the child.
        """
        found = self._children.get(values)
        return self.labels(**dict(zip(self._labels, values, strict=True))) if found is None else found

    def labels(self, **values: str) -> Child:
        """The child with these values, a value for each label."""
        key = tuple(values.items())
        found = self._children_by_kwargs.get(key)
        if found is None:
            if values.keys() != set(self._labels):
                raise ValueError(f"{self._name} has the labels {', '.join(self._labels) or 'none'}")
            ordered = tuple(values[label] for label in self._labels)
            found = self._children_by_kwargs[key] = self._children.setdefault(ordered, self._new_child())
        return found

    def _new_child(self) -> Child:
        raise NotImplementedError

    def _new_family(self) -> Any:
        raise NotImplementedError

    def describe(self) -> Iterable[Metric]:
        """For the registry's check of names."""
        return [self._new_family()]

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = self._new_family()
        for values, child in list(self._children.items()):
            self._add_samples(family, values, child)
        yield family

    def _add_samples(self, family: Any, values: tuple[str, ...], child: Child) -> None:
        raise NotImplementedError


class Counter(_LabelledMetric[CounterValue]):
    """A counter."""

    def inc(self, amount: float = 1.0) -> None:
        """For a counter without labels."""
        self._children[()].inc(amount)

    def _new_child(self) -> CounterValue:
        return CounterValue()

    def _new_family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self._name, self._text, labels=self._labels)

    def _add_samples(self, family: CounterMetricFamily, values: tuple[str, ...], child: CounterValue) -> None:
        family.add_metric(values, child.total)


class Histogram(_LabelledMetric[HistogramValue]):
    """A histogram with these upper bounds."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry, buckets: Sequence[float]
    ) -> None:
        self._bounds = tuple(buckets)
        super().__init__(name, text, labels, registry)

    def observe(self, value: float, times: int = 1) -> None:
        """For a histogram without labels."""
        self._children[()].observe(value, times)

    def _new_child(self) -> HistogramValue:
        return HistogramValue(self._bounds)

    def _new_family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._text, labels=self._labels)

    def _add_samples(self, family: HistogramMetricFamily, values: tuple[str, ...], child: HistogramValue) -> None:
        family.add_metric(values, child.buckets(), child.total)
