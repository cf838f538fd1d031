"""A bar chart as SVG: groups of named bars, each of one or more parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#9aa5b1", "#2f7ed8", "#d1495b")
LABEL, WIDTH, BAR, GAP, TOP = 250, 520, 12, 12, 58


def bars(title: str, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One group a line; the same name has the same colour in all of them, and its further parts are paler."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colours = dict(zip(names, COLOURS, strict=False))
    longest = max(sum(parts) for group in groups.values() for parts in group.values())
    parts, y = [_text(10, 22, title, size=15)], TOP
    for number, name in enumerate(names):
        x = LABEL + number * 150
        parts += [f'<rect x="{x}" y="32" width="10" height="10" fill="{colours[name]}"/>', _text(x + 15, 41, name)]
    for label, group in groups.items():
        parts.append(_text(LABEL - 8, y + len(group) * BAR / 2 + 4, label, anchor="end"))
        for name, values in group.items():
            at: float = LABEL
            for value, opacity in zip(values, (1, 0.45), strict=False):
                length = value / longest * WIDTH
                place = f'x="{at:.1f}" y="{y}" width="{length:.1f}" height="{BAR - 2}"'
                parts.append(f'<rect {place} fill="{colours[name]}" opacity="{opacity}"/>')
                at += length
            parts.append(_text(at + 5, y + BAR - 3, " + ".join(f"{value:,.0f}" for value in values), size=10))
            y += BAR
        y += GAP
    size = f'width="{LABEL + WIDTH + 60}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
