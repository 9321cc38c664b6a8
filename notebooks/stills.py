"""A still of a plotly figure for readers without JavaScript: its lines, points or bars as plain SVG.

It shows what the figure shows before a menu is used, on its first two axes and with few ticks.
"""

from __future__ import annotations

import html
import math
import re
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, BASE = 640, 340, 130, 16, 44  # pixels
INK = "#767676"  # readable on white and on black
DASHES = {"dash": "8 5", "dot": "2 4", "dashdot": "8 4 2 4", "longdash": "12 5"}


def _text(x: float, y: float, words: Any, anchor: str = "start", colour: str = INK) -> str:
    plain = html.escape(re.sub(r"<[^>]*>", " ", str(words or "")))
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{plain}</text>'


class _Axis:
    """Where the values of an axis lie between two pixels, and what is written there."""

    def __init__(self, values: list[Any], told: dict[str, Any], start: float, end: float) -> None:
        self.start, self.end, self.log = start, end, told.get("type") == "log"
        self.names = [*dict.fromkeys(value for value in values if isinstance(value, str))]
        placed = [p for p in map(self._plain, values) if p is not None] or [0.0, 1.0]
        pad = 0.5 if self.names else 0.05 * (max(placed) - min(placed)) or 0.5
        ends = told.get("range") or (min(placed) - pad, max(placed) + pad)
        self.low, self.high = ends[::-1] if told.get("autorange") == "reversed" else ends
        inner = (self.low + share * (self.high - self.low) for share in (0.1, 0.5, 0.9))
        at = self.names or told.get("tickvals") or [10**one if self.log else one for one in inner]
        words = told.get("ticktext") or [one if isinstance(one, str) else f"{one:.2g}" for one in at]
        self.ticks, self.title = [*zip(at, words, strict=True)], told.get("title", {}).get("text")

    def _plain(self, value: Any) -> float | None:
        """A number on the axis before it is scaled; None for one that has no place there."""
        if isinstance(value, str):
            return float(self.names.index(value))
        return (math.log10(value) if value > 0 else None) if self.log else float(value)

    def __call__(self, value: Any) -> float:
        share = ((self._plain(value) or 0.0) - self.low) / (self.high - self.low or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def _drawn(trace: dict[str, Any], x: _Axis, y: _Axis, colour: str, shift: float) -> str:
    """A line and its points; or bars, so many pixels beside their places."""
    known = [pair for pair in zip(trace["x"], trace["y"], strict=True) if None not in pair]
    points = [(x(a), y(b) + shift) for a, b in known]
    if trace["type"] == "bar":
        path = "".join(f"M{x(0):.1f} {down:.1f}H{across:.1f}" for across, down in points)
        return f'<path d="{path}" stroke="{colour}" stroke-width="8"/>'
    mode, dash = trace.get("mode", "lines"), DASHES.get(trace.get("line", {}).get("dash"), "none")
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points) if "lines" in mode else ""
    dots = points if "markers" in mode else []
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    return line + "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in dots)


def still(figure: dict[str, Any], label: str) -> str:
    """The picture of a figure (its JSON), named `label`; empty where it has kinds of trace that none is made of."""
    layout, traces = figure.get("layout", {}), figure.get("data", [])
    traces = [one for one in traces if one.get("visible", True) is True]
    traces = [one for one in traces if (one.get("xaxis", "x"), one.get("yaxis", "y")) == ("x", "y")]
    flat = [one for one in traces if one.get("type") == "bar" and one.get("orientation") == "h"]
    plain = [one for one in traces if one.get("type") == "scatter"]
    listed = all(isinstance(one.get(side), list) for one in traces for side in "xy")
    if not traces or len(flat) + len(plain) < len(traces) or not listed or layout.get("barmode") == "stack":
        return ""
    colours = [one.get("line", {}).get("color") or one.get("marker", {}).get("color") for one in traces]
    colours = [colour if isinstance(colour, str) else INK for colour in colours]
    named = zip((one.get("name") for one in traces), colours, strict=True)
    names = [(name, colour) for name, colour in dict.fromkeys(named) if name]
    top = 56 + 16 * len(names)
    values = {side: [v for one in traces for v in one[side] if v is not None] for side in "xy"}
    x = _Axis(values["x"] + [0] * bool(flat), layout.get("xaxis", {}), LEFT, WIDTH - RIGHT)
    y = _Axis(values["y"], layout.get("yaxis", {}), top + HEIGHT, top)
    parts = [_text(8, 18, layout.get("title", {}).get("text")), _text(8, top - 8, y.title)]
    parts += [_text(8, 36 + 16 * i, f"■ {name}", colour=colour) for i, (name, colour) in enumerate(names)]
    parts += [_text(x(at), top + HEIGHT + 16, words, "middle") for at, words in x.ticks]
    parts += [_text(LEFT - 6, y(at) + 4, words, "end") for at, words in y.ticks]
    parts += [_text(WIDTH - RIGHT, top + HEIGHT + 34, x.title, "end")]
    parts += [f'<path d="M{LEFT} {top}V{top + HEIGHT}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>']
    for one, colour in zip(traces, colours, strict=True):
        beside = one in flat and layout.get("barmode") == "group"
        parts.append(_drawn(one, x, y, colour, 9 * (flat.index(one) - (len(flat) - 1) / 2) if beside else 0.0))
    box = f'viewBox="0 0 {WIDTH} {top + HEIGHT + BASE}" font-size="12" font-family="sans-serif"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join(parts)}</svg>'
