"""Samples of a long run, whether they stay flat, and how that is shown: a Markdown table and an SVG."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

MIB = 2**20


class Bound(NamedTuple):
    """How much a series may grow over what is judged: `least`, or that part of its level if it is more."""

    series: re.Pattern[str]
    least: float
    part: float
    why: str


class Series(NamedTuple):
    """One figure over time. `at_s` since the start."""

    name: str
    at_s: list[float]
    values: list[float]

    def since(self, start_s: float) -> Series:
        kept = [(at, value) for at, value in zip(self.at_s, self.values, strict=True) if at >= start_s]
        return Series(self.name, [at for at, _ in kept], [value for _, value in kept])


class Verdict(NamedTuple):
    """What was found of one series."""

    name: str
    first: float
    last: float
    """Medians of the first and of the last fifth of what is judged."""
    growth: float
    """By the slope, over what is judged."""
    allowed: float

    @property
    def is_flat(self) -> bool:
        return self.growth <= self.allowed


def slope(at_s: Sequence[float], values: Sequence[float]) -> float:
    """Theil-Sen: the median of the slopes of all pairs, per second. A third of the samples may be wild."""
    slopes = [
        (values[later] - values[earlier]) / (at_s[later] - at_s[earlier])
        for later in range(len(values))
        for earlier in range(later)
        if at_s[later] > at_s[earlier]
    ]
    return statistics.median(slopes) if slopes else 0.0


def judge(series: Series, start_s: float, bounds: Sequence[Bound]) -> Verdict | None:
    """None: no bound is for this series, or there is too little to judge."""
    bound = next((bound for bound in bounds if bound.series.fullmatch(series.name)), None)
    judged = series.since(start_s)
    if bound is None or len(judged.values) < 5:
        return None
    fifth = max(1, len(judged.values) // 5)
    first, last = statistics.median(judged.values[:fifth]), statistics.median(judged.values[-fifth:])
    growth = slope(judged.at_s, judged.values) * (judged.at_s[-1] - judged.at_s[0])
    allowed = max(bound.least, bound.part * statistics.median(judged.values))
    return Verdict(series.name, first, last, growth, allowed)


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown."""
    lines = ["| what | first | last | growth by slope | allowed | |", "|---|---:|---:|---:|---:|---|"]
    for verdict in verdicts:
        figures = (verdict.first, verdict.last, verdict.growth, verdict.allowed)
        shown = " | ".join(_plain(figure, verdict.name) for figure in figures)
        lines.append(f"| {verdict.name} | {shown} | {'flat' if verdict.is_flat else '**grows**'} |")
    return "\n".join(lines)


def _plain(figure: float, name: str) -> str:
    if "bytes" in name or "memory" in name:
        return f"{figure / MIB:.2f} MiB"
    return f"{figure:.1f}".removesuffix(".0")


# the picture ---------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 90, 130, 22, 34
POINTS = 120
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def picture(panels: Sequence[tuple[str, Sequence[Series]]], judged_from_s: float) -> str:
    """An SVG: a panel each, from zero to its highest value, over the same time; what is judged is on white."""
    longest_s = max((series.at_s[-1] for _, lines in panels for series in lines if series.at_s), default=1.0)
    height = TOP + len(panels) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="{height}" fill="#fff"/>',
    ]
    for number, (title, lines) in enumerate(panels):
        top = TOP + number * (HEIGHT + GAP)
        highest = max((max(series.values) for series in lines if series.values), default=0.0) or 1.0
        warm = WIDTH * judged_from_s / longest_s
        parts += [
            f'<text x="4" y="{top - 7}" font-weight="bold">{title}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{warm:.0f}" height="{HEIGHT}" fill="#eee"/>',
            f'<path d="M{LEFT} {top}V{top + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#888"/>',
            f'<text x="{LEFT - 4}" y="{top + 9}" text-anchor="end">{_plain(highest, title)}</text>',
            f'<text x="{LEFT - 4}" y="{top + HEIGHT}" text-anchor="end">0</text>',
            f'<text x="{LEFT + WIDTH}" y="{top + HEIGHT + 13}" text-anchor="end">{longest_s / 60:.0f} min</text>',
        ]
        for index, series in enumerate(lines):
            colour = COLOURS[index % len(COLOURS)]
            points = " ".join(
                f"{LEFT + WIDTH * at / longest_s:.0f},{top + HEIGHT * (1 - value / highest):.1f}"
                for at, value in _thinned(series)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
            label_y = top + 22 + 12 * index
            parts.append(f'<text x="4" y="{label_y}" fill="{colour}">{series.name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _thinned(series: Series) -> list[tuple[float, float]]:
    """Medians of equal stretches."""
    size = max(1, -(-len(series.values) // POINTS))
    edges = [*range(0, len(series.values), size), len(series.values)]
    return [
        (series.at_s[begin], statistics.median(series.values[begin:end]))
        for begin, end in pairwise(edges)
        if end > begin
    ]


# the machine ---------------------------------------------------------------------------------------------


def of_process(pid: int) -> dict[str, float]:
    """Memory of one process in bytes, all of it and its own alone, and its threads and open files."""
    proc = Path(f"/proc/{pid}")
    memory = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in (proc / "smaps_rollup").read_text().splitlines()[1:]
    }
    (threads,) = re.findall(r"^Threads:\s+(\d+)$", (proc / "status").read_text(), re.MULTILINE)
    return {
        "memory": memory["Rss"],
        "own memory": memory["Private_Clean"] + memory["Private_Dirty"],
        "threads": int(threads),
        "open files": len(list((proc / "fd").iterdir())),
    }


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, in seconds (at 100 ticks a second)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
