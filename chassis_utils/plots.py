"""Figures and tables, drawn from the tidy frame that `evaluate` returns: one row a measurement.

Every figure carries its data and its controls in its own JSON, so that it can be played with on a page that has
no kernel. Backgrounds are transparent and lines keep their contrast on white and on black; a page may relayout
`font.color` to follow its theme.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from chassis_utils.errors import ChassisError

GREY = "#7F868D"
# Okabe and Ito's hues, those too pale for white or too dark for black moved to a contrast of 3 on either.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#C66B9C", "#A87900", "#3A93C4", "#7B6CD9")
SPARE = ("#C4554D", "#5F8A1F", "#4E858C", "#8F7A5E", "#B454C0")
# method -> (label, colour, marker, dash). The study's own figures share the colour of their reproduction.
METHODS: dict[str, tuple[str, str, str, str]] = {
    "identity": ("identity (no adapter)", GREY, "line-ew", "dash"),
    "reported": ("reported by the study", PALETTE[1], "diamond-open", "dot"),
    "as_reported": ("reproduced", PALETTE[1], "diamond", "solid"),
    "ridge": ("ridge", PALETTE[0], "circle", "solid"),
    "rrr": ("reduced rank", PALETTE[2], "square", "solid"),
    "v1": ("v1", PALETTE[4], "triangle-up", "solid"),
    "lens": ("lens", PALETTE[3], "x", "solid"),
    "exact": ("exact", PALETTE[5], "star", "dashdot"),
    "projected": ("projected", PALETTE[6], "pentagon", "dashdot"),
}
MARKERS = ("cross", "hexagon", "triangle-down", "star-diamond", "bowtie", "hourglass")
SPLITS = ("train", "val", "test", "template", "text")
COLUMNS = ("method", "rank", "layer", "split", "n", "kl", "kl_identity", "recovered", "bits_per_byte")
_REPORTED = ("method", "rank", "layer", "split", "kl")
_HOVER = ("<b>%{fullData.name}</b>, %{meta[2]}<br>PLACE<br>KL %{customdata[0]:.3g}, identity %{customdata[1]:.3g}<br>"
          "recovered %{customdata[2]:.1%}, n = %{customdata[3]}<extra></extra>")
# KL of an exact adapter is rounding noise, at times 0, which a log axis would drop: it is drawn here instead.
KL_FLOOR = 1e-9
# label -> (column, y axis: type, title, tick format). Scale and quantity are one choice, as a log axis has no place
# for a negative share.
QUANTITIES: dict[str, tuple[str, str, str, str]] = {
    "KL (log)": ("kl", "log", "KL to the expert (nats)", ""),
    "KL (linear)": ("kl", "linear", "KL to the expert (nats)", ""),
    "recovered": ("recovered", "linear", "share of KL recovered", ".0%"),
    "bits/byte": ("bits_per_byte", "linear", "bits per byte", ""),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_AXIS = {
    "gridcolor": "rgba(128,128,128,0.22)", "gridwidth": 1, "zeroline": False, "linecolor": "rgba(128,128,128,0.5)",
    "showline": True, "exponentformat": "e", "automargin": True, "title": {"standoff": 8},
}
template = go.layout.Template(layout={
    "font": {"family": _FONT, "size": 12, "color": "#767676"},
    "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
              "pad": {"t": 10, "l": 8}, "font": {"size": 14}},
    "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "colorway": list(PALETTE),
    "autosize": True, "height": 420, "margin": {"l": 48, "r": 12, "t": 48, "b": 40},
    "xaxis": _AXIS, "yaxis": _AXIS, "hovermode": "closest", "dragmode": False,
    "hoverlabel": {"bgcolor": "#FFFFFF", "bordercolor": GREY, "align": "left",
                   "font": {"family": _FONT, "size": 12, "color": "#1F2328"}},
    "legend": {"orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 0, "yref": "container",
               "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)", "itemwidth": 30, "font": {"size": 11}},
    "modebar": {"remove": ["pan", "select", "lasso", "zoomIn", "zoomOut", "autoScale", "sendChartToCloud"],
                "bgcolor": "rgba(0,0,0,0)", "color": "#9AA0A6", "activecolor": "#767676"},
})
pio.templates["chassis"] = template


def style(method: str) -> tuple[str, str, str, str]:
    """Label, colour, marker and dash of a method; one that is not in `METHODS` gets the same ones in every figure."""
    if method in METHODS:
        return METHODS[method]
    key = sum((place + 1) * byte for place, byte in enumerate(method.encode()))
    return method.replace("_", " "), SPARE[key % len(SPARE)], MARKERS[key % len(MARKERS)], "longdash"


def _number(value: float) -> float | int | None:
    """Four digits, enough for a page; None for NaN and infinity, which JSON has no word for."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.4g}")


def _points(rows: pd.DataFrame) -> list[list[float | int | None]]:
    """What hovering shows: KL, identity, recovered share, n."""
    return [[_number(value) for value in row] for row in rows[["kl", "kl_identity", "recovered", "n"]].to_numpy(float)]


def _figures(value: float, unit: str = "") -> str:
    """Three significant digits as text, a dash where there is no figure."""
    if not math.isfinite(value):
        return "–"
    short = float(f"{value:.3g}")
    return (f"{short:,.0f}" if abs(short) >= 1000 else f"{short:.3g}") + unit


def _checked(frame: pd.DataFrame, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """The frame with numeric figures, or one clear line on why it cannot be drawn."""
    if not isinstance(frame, pd.DataFrame):
        raise ChassisError(f"{type(frame).__name__} is not a DataFrame of measurements: pass what evaluate returned")
    if missing := [name for name in columns if name not in frame.columns]:
        raise ChassisError(f"the frame lacks the columns {', '.join(missing)}: pass what evaluate returned")
    if frame.empty or frame["kl"].isna().all():
        raise ChassisError("the frame holds no KL to draw: nothing was measured, or a filter left nothing")
    frame = frame.copy()
    for name in set(columns) - {"method", "split"}:
        try:
            frame[name] = pd.to_numeric(frame[name]).astype(float)
        except (ValueError, TypeError):
            raise ChassisError(f"column {name} must hold figures only: pass what evaluate returned") from None
    keys = ["method", "rank", "layer", "split"]
    if (twice := frame.duplicated(keys)).any():
        raise ChassisError(f"two rows measure {frame.loc[twice, keys].iloc[0].to_dict()}: draw one expert and one seed "
                           "at a time, or average them first")
    return frame


def _identity(frame: pd.DataFrame) -> dict[str, float]:
    """KL of the unadapted base, in nats, by split, in the order of `SPLITS`."""
    found = {}
    for split in sorted(frame["split"].unique(), key=lambda name: (SPLITS.index(name) if name in SPLITS else 99, name)):
        rows = frame[frame["split"] == split]
        values = pd.concat([rows["kl_identity"], rows.loc[rows["method"] == "identity", "kl"]]).dropna()
        if values.empty:
            raise ChassisError(f"split {split} has no identity baseline: fill kl_identity or add an identity row")
        if values.max() - values.min() > 1e-3 * values.abs().max():
            raise ChassisError(f"split {split} has identity baselines from {values.min():.3g} to {values.max():.3g}: "
                               "draw one expert at a time")
        found[split] = float(values.iloc[0])
    return found


def _methods(frame: pd.DataFrame) -> list[str]:
    """Methods beside identity: the known ones in the order of `METHODS`, then the others by name."""
    order = list(METHODS)
    return sorted(set(frame["method"]) - {"identity", "reported"},
                  key=lambda name: (order.index(name) if name in order else len(order), name))


def _finish(figure: go.Figure, title: str, alt: str, above: int = 0, **layout: Any) -> go.Figure:
    """Template, title wrapped for a phone, alternative text; `above` is the room for controls, in pixels."""
    lines = textwrap.wrap(title, 42) or [""]
    return figure.update_layout(
        template="chassis", title_text="<br>".join(html.escape(line, quote=False) for line in lines),
        title_pad_t=10 + 9 * (len(lines) - 1), margin_t=22 + 18 * len(lines) + above, meta={"alt": alt}, **layout)


def _menu(labels: Sequence[str], method: str, args: Sequence[list[Any]], active: int, **pad: float) -> dict[str, Any]:
    """A dropdown, dark on light in either theme: plotly paints the entry under the pointer in a fixed pale colour."""
    return {"active": active, "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "pad": pad, "bgcolor": "#EEF1F4",
            "bordercolor": GREY, "font": {"size": 11, "color": "#1F2328"},
            "buttons": [{"label": label, "method": method, "args": arg}
                        for label, arg in zip(labels, args, strict=True)]}


def _entry(name: str, value: float) -> str:
    """What a dropdown calls a layer or rank; infinity stands for a method that was not restricted to one."""
    return f"{name} {value:g}" if math.isfinite(value) else {"rank": "full rank"}.get(name, f"every {name}")


def _rows(frame: pd.DataFrame, reported: pd.DataFrame | None, identity: dict[str, float], x: str,
          by: str) -> pd.DataFrame:
    """All that a sweep draws, with the columns "choice" (the entry of the dropdown; NaN: every one), "own" and "flat".

    A method measured with and without `by` (rank 8, 16, and full) gets one more entry; one that never has it (an
    exact adapter has no layer to choose) is shown under every entry. A row without `x` becomes a flat line.
    """
    ours = frame[frame["method"].isin(_methods(frame))]
    if ours[x].isna().all():
        raise ChassisError(f"no row has a {x}, so there is nothing to draw against it: use bars or comparison_table")
    mixed = ours[by].isna() & ours["method"].isin(ours.loc[ours[by].notna(), "method"])
    ours = ours.assign(choice=ours[by].mask(mixed, math.inf), own=ours[by].mask(mixed, math.inf))
    base = frame.drop_duplicates("split")
    base = base.assign(method="identity", kl=base["split"].map(identity), recovered=0.0, choice=math.nan, own=math.nan,
                       kl_identity=base["split"].map(identity), bits_per_byte=base["split"].map(
                           frame[frame["method"] == "identity"].groupby("split")["bits_per_byte"].first()),
                       **{x: math.nan})
    parts = [base, ours]
    if reported is not None:
        theirs = _checked(reported, _REPORTED).reindex(columns=_REPORTED)
        theirs = theirs[theirs["split"].isin(identity) & theirs[x].notna()]
        # The study's model is deeper and wider: its layer (or rank) goes with ours of nearest share.
        choices, top = ours[by].dropna().unique(), theirs[by].max() or 1
        near = [min(choices, key=lambda ours, v=value: abs(ours / (max(choices) or 1) - v / top), default=math.nan)
                if math.isfinite(value) else math.nan for value in theirs[by]]
        parts.insert(1, theirs.assign(method="reported", choice=near, own=theirs[by]))
    rows = pd.concat([part.reindex(columns=[*COLUMNS, "choice", "own"]) for part in parts], ignore_index=True)
    ticks = (rows if x == "rank" else ours)[x].dropna().unique()
    flat = rows[rows[x].isna()].drop(columns=x).merge(pd.DataFrame({x: ticks}), how="cross")
    return pd.concat([flat.assign(flat=True), rows[rows[x].notna()].assign(flat=False)]).sort_values(x)


def _sweep(frame: pd.DataFrame, reported: pd.DataFrame | None, x: str, by: str, title: str, alt: str | None,
           quantity: str, split: str | None, lift: int = 8) -> tuple[go.Figure, list[float]]:
    """Lines over column `x`, one a method, with dropdowns for column `by`, for the split and for the quantity.

    The dropdowns must combine in any order, yet each knows only its own choice. So each owns one attribute of
    every trace and no other: `by` owns `visible`, the quantity owns `y`, and the split owns `yaxis`, where the
    axis "y2" lies over the plot with a range in which no figure falls. A click in the legend hides a method
    for all splits and quantities, until another entry of `by` is chosen.
    """
    frame = _checked(frame)
    identity = _identity(frame)
    rows = _rows(frame, reported, identity, x, by)
    ours = rows[rows["method"].isin(_methods(frame))]
    split = split or ("test" if "test" in identity else next(iter(identity)))
    quantities = {name: spec for name, spec in QUANTITIES.items() if ours[spec[0]].notna().any()}
    for name, value, known in (("quantity", quantity, quantities), ("split", split, identity)):
        if value not in known:
            raise ChassisError(f"no {name} {value!r} was measured: choose one of {', '.join(known)}")
    choices = sorted(ours["choice"].dropna().unique())
    figure, shown, splits = go.Figure(), [], []
    ys: dict[str, list[list[float | int | None]]] = {name: [] for name in quantities}
    named: set[tuple[str, str]] = set()
    for method in ("identity", "reported", *_methods(frame)):
        for (choice, own, flat, where), group in rows[rows["method"] == method].groupby(
                ["choice", "own", "flat", "split"], dropna=False):
            label, colour, marker, dash = style(method)
            for name, (column, kind, _, _) in quantities.items():
                values = group[column].clip(lower=KL_FLOOR) if kind == "log" else group[column]
                ys[name].append([_number(value) for value in values])
            shown.append([math.isnan(choice) or choice == value for value in choices] or [True])
            splits.append(where)
            place = "" if math.isnan(own) else f", {_entry(by, own)}"
            special: dict[str, Any] = {}
            if method == "reported":
                special = {"legendrank": 1002, "hovertemplate": f"<b>{label}</b>, {where}<br>{x} %{{x}}{place} of its "
                                                                "own base<br>KL %{y:.3g}<extra></extra>"}
            elif flat:
                special = {"mode": "lines", "hovertemplate": _HOVER.replace(
                    "PLACE", "the frozen base alone" if method == "identity" else _entry(x, math.inf) + place)}
                dash = "dash" if method == "identity" else "dot"
            figure.add_trace(go.Scatter(
                x=[_number(value) for value in group[x]], y=ys[quantity][-1], name=label, legendgroup=method,
                showlegend=(method, str(choice)) not in named, visible=shown[-1][-1], line_color=colour, line_dash=dash,
                yaxis="y" if where == split else "y2", marker_symbol=marker, customdata=_points(group),
                meta=[method, None if math.isnan(choice) else _entry(by, choice), where, place], **special))
            named.add((method, str(choice)))

    def scale(name: str) -> dict[str, Any]:
        _, kind, text, digits = quantities[name]
        return {"yaxis.type": kind, "yaxis.title.text": text, "yaxis.tickformat": digits, "yaxis.autorange": True}

    menus, left = [], -36.0
    for labels, method, args, active in (
            ([_entry(by, value) for value in choices], "restyle",
             [[{"visible": list(column)}] for column in zip(*shown, strict=True)][:len(choices)], len(choices) - 1),
            (list(identity), "restyle", [[{"yaxis": ["y" if where == name else "y2" for where in splits]}]
                                         for name in identity], list(identity).index(split)),
            (list(quantities), "update", [[{"y": ys[name]}, scale(name)] for name in quantities],
             list(quantities).index(quantity))):
        if len(labels) > 1:
            menus.append(_menu(labels, method, args, active, l=left, b=lift))
            left += 6.2 * max(map(len, labels)) + 42
    best = ours[(ours["split"] == split) & ours["kl"].notna()].nsmallest(1, "kl")
    summary = "".join(f" On {split}, identity is at {_figures(identity[split])} nats, and the lowest is "
                      f"{style(row.method)[0]} at {_figures(row.kl)}." for row in best.itertuples())
    names = ", ".join(style(method)[0] for method in _methods(frame))
    _finish(figure, title, alt or f"KL to the expert against {x} for {names}.{summary}", updatemenus=menus,
            above=30 + lift if menus else 8,
            yaxis2={"overlaying": "y", "visible": False, "range": [1e9, 1.001e9], "fixedrange": True})
    figure.layout.template.data.scatter = [go.Scatter(
        mode="lines+markers", marker_size=8, hovertemplate=_HOVER.replace("PLACE", f"{x} %{{x}}%{{meta[3]}}"))]
    return figure.update_layout(scale(quantity)), [_number(value) for value in sorted(ours[x].unique())]


def kl_vs_rank(frame: pd.DataFrame, reported: pd.DataFrame | None = None, title: str = "KL to the expert against rank",
               alt: str | None = None, quantity: str = "KL (log)", split: str | None = None) -> go.Figure:
    """KL against the rank of the adapter: one line a method, dotted and flat at full rank, identity dashed.

    Args:
        frame: what `evaluate` returned, one row a measurement.
        reported: the study's own figures, columns `method, rank, layer, split, kl`, drawn hollow.
        title: what the figure shows.
        alt: alternative text; written from the figures if not given.
        quantity: the entry of `QUANTITIES` shown first.
        split: the split shown first; "test" if there is one.

    Raises:
        ChassisError: nothing to draw, a column or the baseline is missing, or several experts are mixed.
    """
    figure, _ = _sweep(frame, reported, "rank", "layer", title, alt, quantity, split)
    ticks = sorted({value for trace in figure.data for value in trace.x})
    return figure.update_layout(xaxis={"type": "log", "title_text": "rank", "tickvals": ticks, "ticktext": [
        f"{value:g}" for value in ticks]})


def kl_vs_depth(frame: pd.DataFrame, reported: pd.DataFrame | None = None,
                title: str = "KL to the expert against depth", alt: str | None = None, quantity: str = "KL (log)",
                split: str | None = None, num_layers: int | None = None, reported_layers: int = 22) -> go.Figure:
    """KL against the layer that is read; the study's layers run along the top, scaled to the same depth.

    Arguments and errors are those of `kl_vs_rank`, the first dropdown offering ranks. `num_layers` is the depth of
    our base (the deepest layer measured if not given), `reported_layers` that of the study's.
    """
    lift = 8 if reported is None else 54
    figure, ticks = _sweep(frame, reported, "layer", "rank", title, alt, quantity, split, lift)
    depth = num_layers or ticks[-1] or 1
    figure.update_layout(xaxis={"title_text": "layer of our base", "range": [-0.04 * depth, 1.04 * depth],
                                "tickvals": ticks if len(ticks) <= 13 else None})
    if reported is not None:
        figure.update_traces(xaxis="x2", selector=lambda trace: trace.meta[0] == "reported")
        figure.update_layout(xaxis2={"title_text": "layer of the study's base", "overlaying": "x", "side": "top",
                                     "range": [-0.04 * reported_layers, 1.04 * reported_layers], "showgrid": False,
                                     "tickmode": "auto", "nticks": 8})
    return figure


def _choice(frame: pd.DataFrame, method: str, rank: int | None = None, layer: int | None = None
            ) -> tuple[pd.DataFrame, str]:
    """Rows of a method at one rank and layer, by split, and what to call them.

    Where several remain, the one of lowest KL on split "val" (else on the first) is taken: choosing on "test" would
    flatter it.
    """
    rows = frame[(frame["method"] == method) & frame["kl"].notna()]
    for name, wanted in (("rank", rank), ("layer", layer)):
        if wanted is not None:
            rows = rows[rows[name] == wanted] if (rows[name] == wanted).any() else rows[rows[name].isna()]
    if rows.empty:
        raise ChassisError(f"no row of method {method!r} at rank {rank}, layer {layer}: leave them out for the best")
    judged = rows[rows["split"] == ("val" if "val" in set(rows["split"]) else rows["split"].iloc[0])]
    place = judged.sort_values("kl")[["rank", "layer"]].iloc[0]
    same = rows[["rank", "layer"]].fillna(-1).eq(place.fillna(-1)).all(axis=1)
    words = [style(method)[0], *(_entry(str(name), value) for name, value in place.dropna().items())]
    return rows[same].set_index("split"), ", ".join(words)


def bars(frame: pd.DataFrame, title: str = "Share of the identity KL recovered", alt: str | None = None,
         rank: int | None = None, layer: int | None = None) -> go.Figure:
    """Recovered share by split, one bar a method; identity is the line at 0, and left of it is worse than identity.

    Shows `rank` and `layer`, or for each method its best on split "val". Other arguments and errors are those of
    `kl_vs_rank`.
    """
    frame = _checked(frame)
    splits, figure, said = list(_identity(frame)), go.Figure(), []
    if frame.loc[frame["method"].isin(_methods(frame)), "recovered"].isna().all():
        raise ChassisError("no row has a recovered share: evaluate at least one method beside the identity")
    for method in _methods(frame):
        rows, place = _choice(frame, method, rank, layer)
        rows = rows.reindex(splits)
        label, colour, _, _ = style(method)
        text = [_figures(100 * value, "%") for value in rows["recovered"]]
        # A share of -5200% would flatten all others: its bar stops at the frame, its text tells.
        figure.add_bar(y=splits, x=[_number(max(value, -1.0)) for value in rows["recovered"]], orientation="h",
                       name=label, marker_color=colour, text=text, textangle=0, constraintext="none",
                       textfont_size=10, insidetextfont_color="#FFFFFF",
                       meta=[method], customdata=_points(rows), hovertemplate=_HOVER.replace("PLACE", place).replace(
                           "%{meta[2]}", "%{y}"))
        said.append(f"{place}: " + ", ".join(f"{share} on {split}" for share, split in zip(text, splits, strict=True)))
    label, grey, _, dash = style("identity")
    line = {"color": grey, "dash": dash}
    figure.add_scatter(x=[None], y=splits[:1], mode="lines", name=label, meta=["identity"], line=line)
    figure.add_vline(x=0, line=line)
    low = min(0.0, *(value for bar in figure.data[:-1] for value in bar.x if value is not None))
    return _finish(figure, title, alt or f"Share of the identity KL recovered. {'; '.join(said)}.", barmode="group",
                   bargap=0.25, height=max(420, 130 + 22 * len(splits) * len(said)),
                   xaxis={"tickformat": ".0%", "range": [low - 0.02, 1.08]},
                   yaxis={"autorange": "reversed", "categoryarray": splits, "showgrid": False})


def spectrum(values_by_name: Mapping[str, Sequence[float]], reported: Mapping[str, Sequence[float]] | None = None,
             title: str = "Singular values", alt: str | None = None) -> go.Figure:
    """Singular values by place, largest first, log scale; `reported` are the study's, hollow; long ones are thinned.

    Raises:
        ChassisError: no values, or values that are not finite and at least 0.
    """
    figure, said = go.Figure(), []
    for key, (name, given) in [*((key, (key, values)) for key, values in values_by_name.items()),
                               *(("reported", pair) for pair in (reported or {}).items())]:
        values = np.sort(np.asarray(given, dtype=float).ravel())[::-1]
        if not values.size or not np.isfinite(values).all() or values[-1] < 0:
            raise ChassisError(f"the spectrum of {name!r} is empty, negative or not finite: pass singular values")
        place = np.unique(np.geomspace(1, values.size, 120).round().astype(int))
        label, colour, marker, dash = style(key)
        label = label if key == name else f"{style(name)[0]}, {label}"
        figure.add_scatter(x=place.tolist(), y=[_number(value) or None for value in values[place - 1]], name=label,
                           mode="markers" if key == "reported" else "lines", meta=[key], line={"color": colour,
                           "dash": dash}, marker={"symbol": marker, "color": colour},
                           hovertemplate="<b>%{fullData.name}</b><br>singular value %{x}: %{y:.3g}<extra></extra>")
        said.append(f"{label} from {_figures(values[0])} down to {_figures(values[-1])}")
    if not said:
        raise ChassisError("no spectrum to draw: pass at least one name with its singular values")
    return _finish(figure, title, alt or f"Singular values, log scale: {'; '.join(said)}.", showlegend=True,
                   xaxis_title_text="place", yaxis={"type": "log", "title_text": "singular value"})


@dataclass
class Table:
    """A frame, one row a split, that shows itself as an HTML table in JupyterLab and in the book alike."""

    frame: pd.DataFrame
    caption: str

    def _repr_html_(self) -> str:
        cell = 'style="text-align:right;padding:.25em .7em"'
        head = "".join(f'<th scope="col" {cell}>{html.escape(name)}</th>' for name in ["split", *self.frame.columns])
        body = "".join(f'<tr><th scope="row" {cell}>{html.escape(str(split))}</th>' + "".join(
            f"<td {cell}>{_figures(100 * value, '%') if 'recovered' in name else _figures(value)}</td>"
            for name, value in row.items()) + "</tr>" for split, row in self.frame.iterrows())
        return (f'<div style="overflow-x:auto" tabindex="0"><table class="dataframe"><caption style="text-align:left">'
                f"{html.escape(self.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def comparison_table(frame: pd.DataFrame, reported: pd.DataFrame | None = None, reproduced: str = "as_reported",
                     corrected: str | None = None, rank: int | None = None, layer: int | None = None) -> Table:
    """KL by split: reported by the study, reproduced and corrected here, identity; and the shares recovered.

    `corrected` is a method's name, if not given the best on "val" of all others; ranks and layers are `rank` and
    `layer`, if not given the best on "val". Other arguments and errors are those of `kl_vs_rank`.
    """
    frame = _checked(frame)
    identity = pd.Series(_identity(frame))
    others = frame[~frame["method"].isin(["identity", "reported", reproduced]) & frame["kl"].notna()]
    if corrected is None and len(others):
        best, _ = _choice(others.assign(method="any", name=others["method"]), "any", rank, layer)
        corrected = str(best.sort_values("kl")["name"].iloc[0])
    columns, shares, notes = {}, {}, ["KL to the expert in nats"]
    if reported is not None:
        rows, place = _choice(_checked(reported, _REPORTED).assign(method="reported"), "reported")
        columns["reported"] = rows["kl"].reindex(identity.index)
        notes.append(place)
    for name, method in (("reproduced", reproduced if reproduced in set(frame["method"]) else None),
                         ("corrected", corrected)):
        if method:
            rows, place = _choice(frame, method, rank, layer)
            columns[name] = rows["kl"].reindex(identity.index)
            shares[f"recovered, {name}"] = rows["recovered"].reindex(identity.index)
            notes.append(place if place.startswith(name) else f"{name}: {place}")
    return Table(pd.DataFrame({**columns, "identity": identity, **shares}), "; ".join(notes) + ".")
