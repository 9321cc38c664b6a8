"""A still of a plotly figure for readers without JavaScript: its lines, points, bars, cells or bands as plain SVG.

It shows what the figure shows before a menu is used, on its first two axes and with few ticks.
"""

from __future__ import annotations

import html
import math
import re
from array import array
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, RIGHT, BASE = 480, 300, 16, 44  # pixels; on a telephone not much smaller
INK = "#767676"  # readable on white and on black
DASHES = {"dash": "8 5", "dot": "2 4", "dashdot": "8 4 2 4", "longdash": "12 5"}
BYTES = {"f8": "d", "f4": "f", "i4": "i", "i2": "h", "i1": "b", "u4": "I", "u2": "H", "u1": "B"}
LETTER = 6.3  # pixels, in the mean
THICK = 10  # pixels, of a node
#: Around words that stand on bands of any colour, on a page of either theme.
RIM = ' stroke="#FFFFFF" stroke-width="3" paint-order="stroke"'


def _text(x: float, y: float, words: Any, anchor: str = "start", colour: str = INK, more: str = "") -> str:
    written = str("" if words is None else words)
    plain = html.escape(html.unescape(re.sub(r"<[^>]*>", " ", written)))
    bold = ' font-weight="bold"' if written.startswith("<b>") else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}"{bold}{more}>{plain}</text>'


def _list(values: Any) -> Any:
    """The numbers of a trace as a list, which plotly writes as bytes where they came as an array."""
    if not isinstance(values, dict):
        return values
    told = array(BYTES[values["dtype"]], b64decode(values["bdata"]))
    return [None if value != value else value for value in told]


def _name(value: Any) -> str:
    """What an axis of categories calls a value, which may be a number."""
    return value if isinstance(value, str) else f"{value:g}"


class _Axis:
    """Where the values of an axis lie between two pixels, and what is written there."""

    def __init__(self, values: list[Any], told: dict[str, Any], start: float, end: float) -> None:
        self.start, self.end, self.log = start, end, told.get("type") == "log"
        listed = told.get("type") == "category" or any(isinstance(value, str) for value in values)
        self.names = [*dict.fromkeys(map(_name, values))] if listed else []
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
        if self.names:
            return float(self.names.index(_name(value)))
        return (math.log10(value) if value > 0 else None) if self.log else float(value)

    def __call__(self, value: Any) -> float:
        share = ((self._plain(value) or 0.0) - self.low) / (self.high - self.low or 1.0)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def _drawn(trace: dict[str, Any], x: _Axis, y: _Axis, colour: str, shift: float, before: dict[Any, float]) -> str:
    """A line and its points, or texts; or bars, so many pixels beside their places, or behind those `before`."""
    known = [pair for pair in zip(trace["x"], trace["y"], strict=True) if None not in pair]
    points = [(x(a), y(b) + shift) for a, b in known]
    if trace["type"] == "bar":
        starts = [before.get(row, 0) for _, row in known]
        before |= {row: start + share for start, (share, row) in zip(starts, known, strict=True) if row in before}
        ends = [x(before.get(row, share)) for share, row in known]
        path = "".join(
            f"M{x(start):.1f} {down:.1f}H{end:.1f}" for start, end, (_, down) in zip(starts, ends, points, strict=True)
        )
        return f'<path d="{path}" stroke="{colour}" stroke-width="{14 if before else 8}"/>'
    mode, dash = trace.get("mode", "lines"), DASHES.get(trace.get("line", {}).get("dash"), "none")
    if mode == "text":
        texts = [words for words, *at in zip(trace["text"], trace["x"], trace["y"], strict=True) if None not in at]
        return "".join(_text(a, b + 4, words) for (a, b), words in zip(points, texts, strict=True))
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points) if "lines" in mode else ""
    dots = points if "markers" in mode else []
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    return line + "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in dots)


def _charted(traces: list[dict[str, Any]], layout: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Lines, points and bars on two axes, below a legend; and where all of it ends."""
    flat = [one for one in traces if one["type"] == "bar"]
    colours = [one.get("line", {}).get("color") or one.get("marker", {}).get("color") for one in traces]
    colours = [colour if isinstance(colour, str) else INK for colour in colours]
    named = [(one["name"], colour) for one, colour in zip(traces, colours, strict=True) if one.get("name")]
    named = dict.fromkeys(named)
    parts = [_text(8, top + 16 * i, f"■ {name}", colour=colour) for i, (name, colour) in enumerate(named)]
    top += 16 * len(named) + 16
    values = {side: [v for one in traces for v in one[side] if v is not None] for side in "xy"}
    stacked = layout.get("barmode") == "stack"
    before = dict.fromkeys(values["y"], 0.0) if stacked else {}
    up, left = _Axis(values["y"], layout.get("yaxis", {}), top + HEIGHT, top), 40.0
    left = min(WIDTH / 2, max([left, *(LETTER * len(str(words)) + 12 for _, words in up.ticks)]))
    x = _Axis(values["x"] + [0] * bool(flat), layout.get("xaxis", {}), left, WIDTH - RIGHT)
    parts.append(_text(8, top - 8, up.title))
    parts += [_text(x(at), top + HEIGHT + 16, words, "middle") for at, words in x.ticks]
    parts += [_text(left - 6, up(at) + 4, words, "end") for at, words in up.ticks]
    parts += [_text(WIDTH - RIGHT, top + HEIGHT + 34, x.title, "end")]
    parts += [f'<path d="M{left:.0f} {top}V{top + HEIGHT}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>']
    for one, colour in zip(traces, colours, strict=True):
        beside = one in flat and layout.get("barmode") == "group"
        shift = 9 * (flat.index(one) - (len(flat) - 1) / 2) if beside else 0.0
        parts.append(_drawn(one, x, up, colour, shift, before))
    return parts, top + HEIGHT + BASE


def _between(colours: Sequence[tuple[float, str]], share: float) -> tuple[str, str]:
    """The colour of a scale at a share of it, and what ink is read on that."""
    share = min(1.0, max(0.0, share))
    (low, a), (high, b) = next(pair for pair in zip(colours, colours[1:], strict=False) if share <= pair[1][0])
    part = (share - low) / (high - low)
    ends = [[int(one[n : n + 2], 16) for n in (1, 3, 5)] for one in (a, b)]
    mixed = [round(p + part * (q - p)) for p, q in zip(*ends, strict=True)]
    light = sum(weight * c for weight, c in zip((0.299, 0.587, 0.114), mixed, strict=True)) > 128
    return "#" + "".join(f"{c:02x}" for c in mixed), "#1F2328" if light else "#FFFFFF"


def _mapped(trace: dict[str, Any], layout: dict[str, Any], top: float) -> tuple[list[str], float]:
    """The cells of a map with what is written on them; and where all of it ends."""
    rows, high = trace["z"], 22
    sides = [(trace.get(side), layout.get(f"{side}axis", {}), n) for side, n in (("x", len(rows[0])), ("y", len(rows)))]
    across, down = ([*map(str, names or told.get("ticktext") or range(n))] for names, told, n in sides)
    left = min(WIDTH / 3, LETTER * max(map(len, down)) + 12)
    wide = (WIDTH - RIGHT - left) / len(across)
    (_, x, _), (_, y, _) = sides
    ends = y.get("range") or (0, 1)
    order = [*range(len(rows))] if ends[0] > ends[1] else [*range(len(rows))][::-1]
    scale, top = layout.get("coloraxis", {}), top + 40
    low, most = scale.get("cmin", 0), scale.get("cmax", 1)
    texts, form = trace.get("text"), re.fullmatch(r"%\{z:(.*)\}", trace.get("texttemplate") or "")
    parts = [
        _text(8, top - 24, " / ".join(filter(None, (y.get("title", {}).get("text"), x.get("title", {}).get("text")))))
    ]
    size = f' font-size="{12 * min(1.0, wide / (LETTER * max(map(len, across)) + 4)):.1f}"'
    parts += [_text(left + (j + 0.5) * wide, top - 6, word, "middle", more=size) for j, word in enumerate(across)]
    for place, i in enumerate(order):
        parts.append(_text(left - 6, top + high * place + 15, down[i], "end"))
        for j, value in enumerate(rows[i]):
            if value is not None:
                fill, ink = _between(scale["colorscale"], (value - low) / (most - low))
                at = f'x="{left + j * wide:.1f}" y="{top + high * place}" width="{wide - 1:.1f}" height="{high - 1}"'
                words = texts[i][j] if texts else format(value, form[1]) if form else ""
                parts.append(f'<rect {at} fill="{fill}"/>')
                parts.append(_text(left + (j + 0.5) * wide, top + high * place + 15, words, "middle", ink))
    end = top + high * len(rows)
    bar = layout.get("coloraxis", {}).get("colorbar", {}).get("title", {}).get("text")
    for k, (share, fill) in enumerate(scale["colorscale"]):
        at = f'x="{left + 60 * k:.0f}" y="{end + 10}" width="12" height="12" fill="{fill}" stroke="{INK}"'
        parts += [f"<rect {at}/>", _text(left + 60 * k + 18, end + 20, f"{low + share * (most - low):.2g}")]
    return [*parts, _text(left + 60 * len(scale["colorscale"]), end + 20, bar)], end + 34


def _flowing(trace: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Bands between nodes in columns, as wide as what they carry; and where all of it ends."""
    labels = trace["node"]["label"]
    links = [*zip(*(trace["link"][part] for part in ("source", "target", "value", "color")), strict=True)]
    column = dict.fromkeys(range(len(labels)), 0)
    for _ in labels:  # as deep as the longest way there, of which there are no more steps than nodes
        column |= {b: max(column[b], column[a] + 1) for a, b, *_ in links}
    sums = [{n: sum(link[2] for link in links if link[side] == n) for n in column} for side in (0, 1)]
    size = {n: max(one[n] for one in sums) for n in column}
    columns = [[n for n in column if column[n] == k] for k in range(max(column.values()) + 1)]
    pad = 16
    height = max(HEIGHT, 2 * pad * max(map(len, columns)))
    scale = min((height - pad * len(some)) / sum(size[n] for n in some) for some in columns)
    step, place, parts, words = (WIDTH - RIGHT - 8 - THICK) / max(1, len(columns) - 1), {}, [], []
    for k, some in enumerate(columns):
        y = top
        for n in some:
            x, tall = 8 + k * step, max(1.0, scale * size[n])
            place[n] = [x, y, y]
            words.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{THICK}" height="{tall:.1f}" fill="{INK}"/>')
            last = k == len(columns) - 1
            at, anchor = (x - 4, "end") if last else (x + THICK + 4, "start")
            words.append(_text(at, y + tall / 2 + 4, labels[n], anchor, "#1F2328", RIM))
            y += tall + pad
    for a, b, value, colour in links:
        thick = max(0.5, scale * value)
        (x, _, y), (to, down, _) = place[a], place[b]
        place[a][2], place[b][1] = y + thick, down + thick
        y, down, middle = y + thick / 2, down + thick / 2, (x + THICK + to) / 2
        curve = f"M{x + THICK:.1f} {y:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {down:.1f} {to:.1f} {down:.1f}"
        parts.append(f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="{thick:.1f}"/>')
    return parts + words, top + height + pad


def still(figure: dict[str, Any], label: str) -> str:
    """The picture of a figure (its JSON), named `label`; empty where it has kinds of trace that none is made of."""
    layout, traces = figure.get("layout", {}), figure.get("data", [])
    traces = [one for one in traces if one.get("visible", True) is True]
    traces = [one for one in traces if (one.get("xaxis", "x"), one.get("yaxis", "y")) == ("x", "y")]
    traces = [one | {side: _list(one[side]) for side in "xyz" if side in one} for one in traces]
    kinds = {"bar" if one.get("orientation") == "h" else "upright" if one.get("type") == "bar" else one.get("type")
             for one in traces}  # fmt: skip
    lines = re.split(r"<br\s*/?>", str(layout.get("title", {}).get("text") or ""))
    parts, top = [_text(8, 18 + 16 * i, line) for i, line in enumerate(lines)], 24 + 16 * len(lines)
    if (
        kinds
        and kinds <= {"scatter", "bar"}
        and all(isinstance(one.get(side), list) for one in traces for side in "xy")
    ):
        drawn, height = _charted(traces, layout, top)
    elif kinds == {"heatmap"} and isinstance(traces[0]["z"][0], list) and "colorscale" in layout.get("coloraxis", {}):
        drawn, height = _mapped(traces[0], layout, top)
    elif kinds == {"sankey"} and isinstance(traces[0]["link"].get("color"), list | tuple):
        drawn, height = _flowing(traces[0], top)
    else:
        return ""
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" font-size="12" font-family="sans-serif"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join([*parts, *drawn])}</svg>'
