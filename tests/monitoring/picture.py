"""Draws the dashboard from what a real Prometheus answered under load: `make dashboard-picture`.

No Grafana is at hand where tests run; the picture shows the same panels, queries and places, drawn by matplotlib.
"""

from __future__ import annotations

import asyncio
import io
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from tests.monitoring.dashboard import STEP_S, Shown, load_dashboard, shown, values
from tests.monitoring.servers import Series

SECONDS = 120
WIDTH_IN, ROW_IN, DPI = 16.0, 0.31, 100
MARGIN = 0.35
"""Of a grid cell, around each panel."""
COLORS = (
    "#7eb26d",
    "#eab839",
    "#6ed0e0",
    "#ef843c",
    "#e24d42",
    "#5195ce",
    "#ba43a9",
    "#b7dbab",
    "#f2c96d",
    "#aea2e0",
)
INK, FAINT, PAGE, CARD = "#d0d2d8", "#8b8f99", "#111217", "#181b1f"


def name_of(target: dict[str, Any], series: Series) -> str:
    """The legend's words."""
    words = str(target["legendFormat"])
    for label, value in series.labels.items():
        words = words.replace("{{" + label + "}}", value)
    return words


def readable(value: float, unit: str) -> str:
    match unit:
        case "bytes" | "Bps":
            power = min(3, int(math.log(max(abs(value), 1.0), 1024)))
            return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}{'/s' if unit == 'Bps' else ''}"
        case "s":
            return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
        case "reqps":
            return f"{value:.3g}/s"
        case _:
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw_stat(axes: Axes, one: Shown) -> None:
    panel, answers = one
    answer = answers[0]
    axes.set_axis_off()
    words = "–"
    color = INK
    if panel["options"]["textMode"] == "name":
        words = ", ".join(name_of(panel["targets"][0], series) for series in answer)
    elif answer:
        last = values(answer[0])[-1]
        words = f"{last:.0f}"
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        named = [step["color"] for step in steps if step["value"] is None or last >= step["value"]][-1]
        color = {"green": COLORS[0], "orange": COLORS[3], "red": COLORS[4]}[named]
    axes.text(0.5, 0.42, words, ha="center", va="center", fontsize=20, color=color, transform=axes.transAxes)


def draw_lines(axes: Axes, one: Shown, began: float) -> None:
    panel, answers = one
    unit = panel["fieldConfig"]["defaults"]["unit"]
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    named = [
        (name_of(target, series).replace("127.0.0.1", "adapter"), series)
        for target, answer in zip(panel["targets"], answers, strict=True)
        for series in answer
    ]
    named.sort(key=lambda pair: -max(values(pair[1]), default=0.0))
    shown_of = [pair for pair in named if any(values(pair[1]))] or named
    if stacked:
        seen = sorted({at for _, series in shown_of for at, _ in series.samples})
        times = [seen[0] + STEP_S * step for step in range(round((seen[-1] - seen[0]) / STEP_S) + 1)]
        heights = []
        for _, series in shown_of:
            found = dict(series.samples)
            heights.append([found.get(at, 0.0) if found.get(at, 0.0) == found.get(at, 0.0) else 0.0 for at in times])
        axes.stackplot([at - began for at in times], heights, colors=COLORS, alpha=0.75, linewidth=0)
    for number, (_, series) in enumerate(shown_of):
        if not stacked:
            points = [(at - began, value) for at, value in series.samples]
            axes.plot(*zip(*points, strict=True), color=COLORS[number % len(COLORS)], linewidth=1.1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: readable(value, unit))
    handles = [
        mpl.lines.Line2D([], [], color=COLORS[number % len(COLORS)], linewidth=2) for number in range(len(shown_of))
    ]
    limit = 6
    words = [words for words, _ in shown_of][:limit]
    axes.legend(
        handles[:limit],
        words,
        loc="upper left",
        fontsize=5.5,
        ncols=2,
        frameon=False,
        labelcolor=FAINT,
        handlelength=1.0,
        columnspacing=0.9,
        borderaxespad=0.1,
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (1.18 + 0.09 * len(words) / 2))  # room for the legend


def draw_heat(axes: Axes, one: Shown, began: float) -> None:
    """Increases by bucket: Prometheus' buckets hold all below them, the picture what is between."""
    buckets = sorted(one.answers[0], key=lambda series: float(series.labels["le"]))
    times = sorted({at for series in buckets for at, _ in series.samples})
    below = [0.0] * len(times)
    rows = []
    for series in buckets:
        found = dict(series.samples)
        whole = [found.get(at, 0.0) for at in times]
        rows.append([max(0.0, now - before) for now, before in zip(whole, below, strict=True)])
        below = whole
    axes.pcolormesh(
        [at - began for at in times], range(len(rows)), rows, cmap="inferno", shading="nearest", norm="symlog"
    )
    axes.set_yticks(range(len(rows)), [readable(float(s.labels["le"]), "s") for s in buckets[:-1]] + ["more"])


def draw(found: list[Shown], place: Path) -> None:
    began = min(series.samples[0][0] for one in found for answer in one.answers for series in answer)
    by_id = {one.panel["id"]: one for one in found}
    page = load_dashboard()["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in page)
    figure = plt.figure(figsize=(WIDTH_IN, rows * ROW_IN), dpi=DPI, facecolor=PAGE)
    for panel in page:
        grid = panel["gridPos"]
        top = 1 - grid["y"] / rows
        if panel["type"] == "row":
            figure.text(0.006, top - 0.6 / rows, f"▾ {panel['title']}", color=INK, fontsize=10, va="center")
            continue
        left, bottom = grid["x"] / 24 + 0.003, top - grid["h"] / rows + 0.1 / rows
        width, height = grid["w"] / 24 - 0.006, (grid["h"] - 0.2) / rows
        figure.add_artist(
            mpl.patches.Rectangle((left, bottom), width, height, facecolor=CARD, edgecolor="#25272c", zorder=-1)
        )
        figure.text(
            left + 0.005, bottom + height - MARGIN / rows, panel["title"], color=INK, fontsize=7.5, va="center"
        )
        small = panel["type"] == "stat"
        inner = (0.0 if small else 0.038, 0.2 / rows if small else 0.75 / rows)
        axes = figure.add_axes(
            (left + inner[0], bottom + inner[1], width - inner[0] - 0.006, height - inner[1] - 0.8 / rows),
            facecolor=CARD,
        )
        axes.tick_params(colors=FAINT, labelsize=5.5, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        one = by_id[panel["id"]]
        match panel["type"]:
            case "stat":
                draw_stat(axes, one)
            case "heatmap":
                draw_heat(axes, one, began)
            case _:
                axes.grid(color="#2a2d33", linewidth=0.5)
                draw_lines(axes, one, began)
    whole = io.BytesIO()
    figure.savefig(whole, facecolor=PAGE)
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(place, optimize=True)


async def ask() -> list[Shown]:
    with tempfile.TemporaryDirectory() as folder:
        async with shown(Path(folder), seconds=SECONDS) as found:
            return found


def main(place: Path) -> None:
    draw(asyncio.run(ask()), place)
    print(f"{place}: {place.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
