"""Figures and tables, drawn from the tidy frame that `evaluate` returns: one row a measurement.

A figure carries its data and controls in its own JSON: it can be played with on a page that has no kernel.
"""

from __future__ import annotations

import html
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from chassis_utils.errors import ChassisError
from chassis_utils.probes import SPLITS

STYLES = json.loads(Path(__file__).with_name("styles.json").read_text(encoding="utf-8"))
# Three of Okabe and Ito's hues and others as far from them, and from one another where they meet in a figure, as can be
# had for readers of every kind of colour vision, at a contrast of 3 on white and on black. The last three are
# for methods that have no style of their own, and for figures that run out of the others.
*_COLOURS, GREY = STYLES["colours"].values()
PALETTE, SPARE = _COLOURS[:10], _COLOURS[10:]
# method -> (label, colour, marker, dash). A method keeps its colour whatever it was fitted on, and the study's own
# figures share the colour of their reproduction.
METHODS: dict[str, tuple[str, str, str, str]] = {
    name: (label, STYLES["colours"][colour], marker, dash)
    for name, (label, colour, marker, dash) in STYLES["methods"].items()}
STUDY = ("method", "rank", "layer", "split", "kl")
COLUMNS = (*STUDY, "n", "kl_identity", "recovered", "bits_per_byte")
_HOVER = STYLES["hover"]
# KL of an exact adapter is rounding noise, at times 0, which a log axis would drop: it is drawn here instead.
KL_FLOOR = 1e-9
# label -> (column, y axis: type, title, tick format). Scale and quantity are one choice, as a log axis has no place
# for a negative share.
QUANTITIES: dict[str, tuple[str, str, str, str]] = {name: tuple(spec) for name, spec in STYLES["quantities"].items()}
# How to read them, below every figure of their kind, behind what a page says is to be seen in it.
READ_SWEEP = ("The dashed line is the base without an adapter: above it in KL or bits, below it in share, an adapter "
              "is worse than none.")
READ_BARS = "0% is the base without an adapter, 100% the expert; a bar to the left of 0% is worse than none."
pio.templates["chassis"] = template = go.layout.Template(layout=STYLES["template"])


def _show(figure: go.Figure) -> None:
    """Show a figure in a notebook, its caption below it; on a page of the book, `bookpages` puts that there."""
    from IPython.display import Markdown, display

    figure._ipython_display_()
    caption = (figure.layout.meta or {}).get("caption")
    if caption and os.environ.get("CHASSIS_HEADLESS") != "1":
        display(Markdown(caption))


# Where there is a kernel, whoever shows a figure shows it so.
if shell := "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
    shell.display_formatter.ipython_display_formatter.for_type(go.Figure, _show)


def style(method: str) -> tuple[str, str, str, str]:
    """Label, colour, marker and dash of a method; one that is not in `METHODS` gets the same ones in every figure."""
    spare = SPARE[sum(method.encode()) % len(SPARE)]
    return METHODS.get(method, (method.replace("_", " "), spare, "hourglass", "solid"))


def _numbers(values: Iterable[float]) -> list[float | int | None]:
    """Four digits each, enough for a page; None for NaN and infinity, which JSON has no word for."""
    finite = [float(value) if math.isfinite(value) else None for value in values]
    return [value and (int(value) if value.is_integer() else float(f"{value:.4g}")) for value in finite]


def _figures(value: float, unit: str = "") -> str:
    """Three significant digits as text, a dash where there is no figure."""
    return f"{float(f'{value:.3g}'):,g}{unit}" if math.isfinite(value) else "–"


def _points(rows: pd.DataFrame) -> list[list[float | int | str | None]]:
    """What hovering shows: KL, identity, recovered share, n, and the ends of the KL's 95% interval as text."""
    ends = rows.reindex(columns=["kl_low", "kl_high"]).to_numpy(float)
    spans = [f"{_figures(low)} to {_figures(high)}" if low == low else "–" for low, high in ends]
    told = rows[["kl", "kl_identity", "recovered", "n"]].to_numpy(float)
    return [[*_numbers(row), span] for row, span in zip(told, spans, strict=True)]


def _measured(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The frame with its figures as floats, or one clear line on what it lacks."""
    if missing := [name for name in columns if name not in frame.columns]:
        raise ChassisError(f"the frame lacks the columns {', '.join(missing)}: pass what evaluate returned")
    return frame.astype({name: float for name in columns if name not in ("method", "split")})


def _checked(frame: pd.DataFrame, places: Sequence[str] = ("rank", "layer")
             ) -> tuple[pd.DataFrame, list[str], dict[str, float]]:
    """The frame, its methods beside identity in the order of `METHODS`, and the identity KL by split, in nats.

    The columns `places` say, with method and split, where a row was measured: there must be one row for each place.
    """
    frame = _measured(frame, [*dict.fromkeys([*COLUMNS, *places])])
    if frame["kl"].isna().all():
        raise ChassisError("the frame holds no KL to draw: nothing was measured, or a filter left nothing")
    keys = ["method", *places, "split"]
    if (twice := frame.duplicated(keys)).any():
        raise ChassisError(f"two rows measure {frame.loc[twice, keys].iloc[0].to_dict()}: draw one expert and one seed "
                           "at a time, or average them first")
    levels = frame.groupby("split")["kl_identity"].agg(["min", "max"])
    if (mixed := levels["max"] - levels["min"] > 1e-3 * levels["max"].abs()).any():
        raise ChassisError(f"split {mixed.idxmax()} has more than one identity KL: draw one expert at a time")
    there, highest = dict.fromkeys(frame["method"]), levels["max"].to_dict()
    methods = [name for name in dict.fromkeys([*METHODS, *there]) if name != "identity" and name in there]
    return frame, methods, {name: highest[name] for name in dict.fromkeys([*SPLITS, *highest]) if name in highest}


def _finish(figure: go.Figure, title: str, alt: str, caption: str, above: int = 0,
            columns: dict[str, Any] | None = None, **layout: Any) -> go.Figure:
    """Template, title wrapped for a phone, alternative text, caption; `above` is the room for controls, in pixels.

    The caption says what to see, whatever a menu shows and whatever was measured. `columns` names those of the data
    that a reader downloads, where axes and hover do not: "x", "y" and "z", "text", and for "hover" a list, in the order
    of `customdata`. What is called None is left out.
    """
    lines = textwrap.wrap(title, 42)
    return figure.update_layout(
        template=template, title_text="<br>".join(html.escape(line, quote=False) for line in lines),
        title_pad_t=10 + 9 * (len(lines) - 1), margin_t=22 + 18 * len(lines) + above,
        meta={"alt": alt, "caption": caption} | ({"columns": columns} if columns else {}), **layout)


@dataclass
class _Draft:
    """A figure as dicts, which plotly then checks all at once: built up step by step it is drawn much later."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def update_layout(self, *changes: dict[str, Any]) -> None:
        for change in changes:
            self.layout |= change


_Drawn = go.Figure | _Draft


def _owned(figure: _Drawn, place: int, names: Iterable[Any], key: str, on: Any, off: Any) -> dict[Any, list[Any]]:
    """Name -> changes, for `_buttons`: attribute `key` shows the traces with this name at `place` of their meta.

    Controls must combine in any order, yet each knows only its own choice. So each owns one attribute of every trace
    and no other: besides `visible` an axis, as "x2" and "y2" lie over the plot with a range in which no figure falls.
    """
    marks = [trace["meta"][place] for trace in figure.data]
    return {name: [{key: [on if mark in (None, name) else off for mark in marks]}] for name in names}


def _buttons(figure: _Drawn, first: Any, entries: dict[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A control's entries, name -> changes of the traces and of the layout; the figure is changed to the `first`."""
    changes, *layout = entries[first]
    for key, values in changes.items():
        for trace, value in zip(figure.data, values, strict=True):
            trace[key] = value
    figure.update_layout(*layout)
    return [{"label": f"{name}", "method": "update", "args": args} for name, args in entries.items()]


def _dropdowns(figure: _Drawn, lift: int, *controls: tuple[Any, dict[Any, list[Any]]]) -> list[dict[str, Any]]:
    """A dropdown above the plot for each (first choice, entries as for `_buttons`) that leaves a choice.

    They are dark on light in either theme: plotly paints the entry under the pointer pale.
    """
    menus, left = [], -36.0
    for first, entries in controls:
        buttons = _buttons(figure, first, entries)
        if len(buttons) > 1:
            place = {"active": [*entries].index(first), "pad": {"l": left, "b": lift}}
            menus.append(STYLES["menu"] | place | {"buttons": buttons})
            left += 6.2 * max(map(len, entries)) + 42
    return menus


def _reach(values: pd.Series) -> dict[str, Any]:
    """How far the axis of a quantity goes: to its ends, but a share of -800% would flatten all others and leaves it."""
    if values.name != "recovered" or not values.min() < -1:
        return {"yaxis.autorange": True}
    return {"yaxis.autorange": False, "yaxis.range": [-1.05, 1.05 * max(0.2, float(values.max()))]}


def _lacking(ours: pd.DataFrame, by: str, entries: dict[Any, float], split: str, quantities: Iterable[str]
             ) -> dict[Any, list[str]]:
    """Entry of column `by` -> quantities not measured there on this split; key None if all lack the same."""
    found: dict[Any, list[str]] = {}
    for entry, value in entries.items():
        there = ours[(ours["split"] == split) & (ours[by].isna() | (ours[by] == value))]
        found[entry] = [name for name in quantities if there[QUANTITIES[name][0]].isna().all()]
    alike = len({*map(tuple, found.values())}) == 1
    return {None: next(iter(found.values()))} if alike else found


def _sweep(frame: pd.DataFrame, reported: pd.DataFrame | None, x: str, by: str, title: str, alt: str | None,
           quantity: str, split: str | None, see: str, lift: int = 8) -> tuple[go.Figure, list[float]]:
    """Lines over column `x`, one a method, with dropdowns for column `by`, for the split and for the quantity.

    A row without `x` becomes a flat line, one without `by` is shown under every entry. Returns the values of `x` too,
    smallest first.
    """
    frame, methods, identity = _checked(frame, (x, by))
    ours = frame[frame["method"].isin(methods)]
    ticks, choices = (sorted(ours[name].dropna().unique().tolist()) for name in (x, by))
    if not ticks:
        raise ChassisError(f"no row has a {x}, so there is nothing to draw against it: use bars or comparison_table")
    split = split or ("test" if "test" in identity else next(iter(identity)))
    quantities = {name: spec for name, spec in QUANTITIES.items() if ours[spec[0]].notna().any()}
    for name, value, known in (("quantity", quantity, quantities), ("split", split, identity)):
        if value not in known:
            raise ChassisError(f"no {name} {value!r} was measured: choose one of {', '.join(known)}")
    rows = frame
    if reported is not None:
        theirs = _measured(reported, STUDY)
        theirs = theirs[theirs["split"].isin(identity) & theirs[x].notna()]
        rows = pd.concat([frame, theirs.assign(method="reported")])
    rows = rows.assign(method=pd.Categorical(rows["method"], ["identity", *methods, "reported"]), hover=_points(rows),
                       kl=rows["kl"].clip(lower=KL_FLOOR)).sort_values(x)

    traces, groups, named = [], [], set()
    entries = [f"{by} {value:g}" for value in choices] or [None]
    for (method, value, flat, where), group in rows.groupby(["method", by, rows[x].isna(), "split"], dropna=False,
                                                            observed=True):
        label, colour, marker, dash = style(method)
        entry = None if math.isnan(value) else f"{by} {value:g}"
        place, special = f", {entry}" if entry else "", {}
        if method == "reported":
            special = {"hovertemplate": f"<b>{label}</b>, {where}<br>{x} %{{x}}{place} of its own base<br>"
                                        "KL %{y:.3g}<extra></extra>"}
            # The study's model is deeper and wider: its layer (or rank) goes with ours of nearest share.
            if entry := entry if choices else None:
                near = min(choices, key=lambda one: abs(one * theirs[by].max() - value * choices[-1]))
                entry = f"{by} {near:g}"
        elif flat:
            group = group.loc[group.index.repeat(len(ticks))].assign(**{x: ticks})
            special = {"mode": "lines", "hovertemplate": _HOVER.replace("PLACE", f"any {x}{place}")}
            dash = dash if method == "identity" else "dot"
        groups.append(group)
        looks = {"line": {"color": colour, "dash": dash}, "marker": {"symbol": marker}, "legendgroup": method,
                 "showlegend": (method, entry) not in named}
        traces.append({"type": "scatter", "x": _numbers(group[x]), "name": label, "customdata": [*group["hover"]],
                       "meta": [method, entry, where, place], **looks, **special})
        named.add((method, entry))
    courses = [{name: _numbers(group[spec[0]]) for name, spec in quantities.items()} for group in groups]
    # Menus combine freely: a choice of which nothing was measured says so, and is no frame without a word.
    for where in identity:
        known = dict(zip(entries, choices or [math.nan], strict=True))
        for entry, names in _lacking(ours, by, known, where, quantities).items():
            if names:
                said = {"text": [f"not measured on {where}"], "mode": "text", "showlegend": False, "hoverinfo": "skip"}
                place = {"x": [ticks[len(ticks) // 2]], "meta": [None, entry, where, ""]}
                traces.append({"type": "scatter", "name": ""} | said | place)
                courses.append({name: [1 if name in names else None] for name in quantities})

    axes = {name: {"yaxis.type": kind, "yaxis.title.text": text, "yaxis.tickformat": digits} | _reach(rows[column])
            for name, (column, kind, text, digits) in quantities.items()}
    draft = _Draft(traces, {**STYLES["layouts"]["sweep"]})
    menus = _dropdowns(
        draft, lift, (entries[-1], _owned(draft, 1, entries, "visible", True, False)),
        (split, _owned(draft, 2, identity, "yaxis", "y", "y2")),
        (quantity, {name: [{"y": [course[name] for course in courses]}, axes[name]] for name in quantities}))
    best = ours[ours["split"] == split].nsmallest(1, "kl")
    lowest = [f" The lowest is {style(row.method)[0]} at {_figures(row.kl)}." for row in best.itertuples()]
    alt = alt or (f"KL to the expert against {x} for {'; '.join(style(name)[0] for name in methods)}. On {split}, "
                  f"identity is at {_figures(identity[split])} nats.{''.join(lowest)}")
    caption = [see, READ_SWEEP]
    if rows.loc[~rows["method"].isin(["identity"]), x].isna().any():
        caption.append(f"A flat dotted line has no {x} to choose.")
    if reported is not None:
        caption.append("Hollow diamonds are the study's own figures, of its own models.")
    figure = _finish(go.Figure(draft.data, draft.layout | {"updatemenus": menus}), title, alt,
                     " ".join(filter(None, caption)), above=30 + lift if menus else 8)
    figure.layout.template.data.scatter = [go.Scatter(
        mode="lines+markers", marker_size=8, hovertemplate=_HOVER.replace("PLACE", f"{x} %{{x}}%{{meta[3]}}"))]
    return figure, ticks


def kl_vs_rank(frame: pd.DataFrame, reported: pd.DataFrame | None = None, title: str = "KL to the expert against rank",
               alt: str | None = None, quantity: str = "KL (log)", split: str | None = None, by: str = "layer",
               see: str = "") -> go.Figure:
    """KL against the rank of the adapter: one line a method, dotted and flat at full rank, identity dashed.

    Args:
        frame: what `evaluate` returned, one row a measurement.
        reported: the study's own figures, columns `method, rank, layer, split, kl`, drawn hollow.
        title: what the figure shows.
        alt: alternative text; written from the figures if not given.
        quantity: the entry of `QUANTITIES` shown first.
        split: the split shown first; "test" if there is one.
        by: the column of numbers whose values the first dropdown offers, such as `n_train`.
        see: what to look for, said below the figure before how to read it.

    Raises:
        ChassisError: nothing to draw, a column is missing, or several experts are mixed.
    """
    figure, ranks = _sweep(frame, reported, "rank", by, title, alt, quantity, split, see)
    every = {value for trace in figure.data for value in trace.x if value}
    # A label needs a twelfth of a telephone's width; ours come before the study's, large before small.
    room, ticks = math.log(max(every) / min(every)) / 12, []
    for rank in sorted(every, key=lambda rank: (rank not in ranks, -rank)):
        if all(abs(math.log(rank / other)) >= room for other in ticks):
            ticks.append(rank)
    return figure.update_layout(xaxis={"type": "log", "title_text": "rank", "tickvals": sorted(ticks),
                                       "ticktext": [f"{value:g}" for value in sorted(ticks)]})


def kl_vs_depth(frame: pd.DataFrame, reported: pd.DataFrame | None = None,
                title: str = "KL to the expert against depth", alt: str | None = None, quantity: str = "KL (log)",
                split: str | None = None, num_layers: int | None = None, see: str = "") -> go.Figure:
    """KL against the layer that is read; the study's layers run along the top, scaled to the same depth.

    Arguments and errors are those of `kl_vs_rank`, the first dropdown offering ranks. `num_layers` is the depth of
    our base, the deepest layer measured if not given.
    """
    lift = 8 if reported is None else 54
    figure, ticks = _sweep(frame, reported, "layer", "rank", title, alt, quantity, split, see, lift)
    depth = num_layers or ticks[-1] or 1
    figure.update_layout(xaxis={"title_text": "layer of our base", "range": [-0.04 * depth, 1.04 * depth],
                                "tickvals": ticks if len(ticks) <= 13 else None})
    if reported is not None:
        figure.update_traces(xaxis="x2", selector=lambda trace: trace.meta[0] == "reported")
        figure.update_layout(xaxis2=STYLES["layouts"]["study_axis"])
    return figure


def kl_vs_step(courses: pd.DataFrame, identity: float, title: str = "KL to the expert over training",
               alt: str | None = None, x: str = "step", log_seconds: bool = False, see: str = "") -> go.Figure:
    """KL against step or seconds, one line a method; `identity` dashed, the bare base's KL on the same rows.

    `courses` has the columns `method, step, kl, seconds`, as `refine` returns them; a method of one row is a large
    marker. `x`, "step" or "seconds", is shown first. With `log_seconds` their axis is a log one, and what took no time
    is drawn at the shortest time of all. `see` is what to look for, said below the figure.

    Raises:
        ChassisError: an `x` of another name.
    """
    if x not in (words := ("step", "seconds")):
        raise ChassisError(f"no course runs over {x!r}: choose one of {', '.join(words)}")
    shortest = courses["seconds"].where(courses["seconds"] > 0).min() if log_seconds else None
    drawn = courses.assign(seconds=courses["seconds"].clip(lower=shortest), true=courses["seconds"])
    figure, given = go.Figure(layout=STYLES["layouts"]["step"]), drawn.groupby("method", sort=False)
    for name, rows in given:
        label, colour, marker, dash = style(str(name))
        figure.add_scatter(y=_numbers(rows["kl"]), name=label, line_color=colour, line_dash=dash, mode="lines+markers",
                           marker={"symbol": marker, "maxdisplayed": 12, "size": 13 if len(rows) == 1 else 6},
                           customdata=[_numbers(row) for row in rows[["step", "true"]].to_numpy()], meta=[name],
                           hovertemplate=f"<b>{label}</b><br>step %{{customdata[0]}}, after %{{customdata[1]}} s<br>"
                                         "KL %{y:.3g}<extra></extra>")
    figure.add_hline(y=identity, line={"color": GREY, "dash": "dash"})
    menus = _dropdowns(figure, 8, (x, {word: [
        {"x": [_numbers(rows[word]) for _, rows in given]},
        {"xaxis.title.text": word, "xaxis.type": "log" if log_seconds and word == "seconds" else "linear"},
    ] for word in words}))
    said = "; ".join(f"{style(str(name))[0]} ends at {_figures(rows['kl'].iloc[-1])}" for name, rows in given)
    alt = alt or f"KL against {x}, identity {_figures(identity)} nats: {said}."
    # On a telephone the legend is one column: what its entries take must not be taken from the plot.
    height = template.layout.height + 19 * max(0, len(given) - 4)
    caption = [see, "The dashed line is the base without an adapter."]
    if (given.size() == 1).any():
        caption.append("A large mark is one point alone.")
    return _finish(figure, title, alt, " ".join(filter(None, caption)), above=38,
                   columns={"hover": ["step", "seconds"]}, updatemenus=menus, height=height)


def _choice(frame: pd.DataFrame, methods: Sequence[str], rank: int | None = None, layer: int | None = None
            ) -> tuple[pd.DataFrame, str]:
    """Rows of one of the methods at one rank and layer, by split, and what to call them.

    Where several remain, the one of lowest KL on split "val" (else on the first) is taken: choosing on "test" would
    flatter it.
    """
    rows = frame[frame["method"].isin(methods) & frame["kl"].notna()]
    for name, wanted in (("rank", rank), ("layer", layer)):
        if wanted is not None:
            rows = rows[rows[name] == wanted] if (rows[name] == wanted).any() else rows[rows[name].isna()]
    if rows.empty:
        wanted = " or ".join(map(repr, methods))
        raise ChassisError(f"no row of method {wanted} at rank {rank}, layer {layer}: leave them out for the best")
    judged = rows[rows["split"] == ("val" if "val" in set(rows["split"]) else rows["split"].iloc[0])]
    best = judged.nsmallest(1, "kl")[["method", "rank", "layer"]]
    words = [style(best["method"].item())[0]]
    words += [f"{name} {best[name].item():g}" for name in ("rank", "layer") if best[name].notna().item()]
    return rows.merge(best).set_index("split"), ", ".join(words)


def bars(frame: pd.DataFrame, title: str = "Share of the identity KL recovered", alt: str | None = None,
         rank: int | None = None, layer: int | None = None, see: str = "") -> go.Figure:
    """Recovered share by split, one bar a method; identity is the line at 0, and left of it is worse than identity.

    Shows `rank` and `layer`, or for each method its best on split "val". Other arguments and errors are those of
    `kl_vs_rank`.
    """
    frame, methods, identity = _checked(frame)
    figure, splits, said, low = go.Figure(layout=STYLES["layouts"]["bars"]), list(identity), [], 0.0
    for method in methods:
        rows, place = _choice(frame, [method], rank, layer)
        rows = rows.reindex(splits)
        text = [_figures(100 * value, "%") for value in rows["recovered"]]
        # A share of -5200% would flatten all others: its bar stops at the frame, its text tells.
        shares = rows["recovered"].clip(lower=-1.0)
        low, (label, colour, _, dash) = min(low, shares.min()), style(method)
        figure.add_bar(y=splits, x=_numbers(shares), orientation="h", name=label, marker_color=colour, meta=[method],
                       marker_pattern={"shape": {"longdash": "/", "dashdot": "x"}.get(dash, ""), "fillmode": "overlay",
                                       "fgcolor": "#000000", "fgopacity": 0.3}, customdata=_points(rows),
                       text=text, textangle=0, constraintext="none", textfont_size=10, insidetextfont_color="#FFFFFF",
                       hovertemplate=_HOVER.replace("PLACE", place).replace("%{meta[2]}", "%{y}"))
        said.append(f"{place}: " + ", ".join(f"{share} on {split}" for share, split in zip(text, splits, strict=True)))
    figure.add_vline(x=0, line={"color": GREY, "dash": "dash"})
    return _finish(figure, title, alt or f"Share of the identity KL recovered. {'; '.join(said)}.",
                   f"{see} {READ_BARS}".strip(), columns={"x": "recovered", "y": "split"},
                   height=max(420, 130 + 22 * len(splits) * len(said)), xaxis_range=[low - 0.02, 1.08],
                   yaxis_categoryarray=splits)


def shares(frame: pd.DataFrame) -> list[str]:
    """Recovered shares as text, each with its 95% interval where the frame has one."""
    ends = frame.reindex(columns=["recovered", "recovered_low", "recovered_high"]) * 100
    return [_figures(x, "%") + (f" ({_figures(low, '%')} to {_figures(high, '%')})" if low == low else "")
            for x, low, high in ends.itertuples(index=False)]


@dataclass
class Table:
    """A frame, one row a split, that shows itself as an HTML table in JupyterLab and in the book alike."""

    frame: pd.DataFrame
    caption: str
    sortable: bool = False  # for the frame of `results_table`: no index; in the book the reader sorts and filters

    def _repr_html_(self) -> str:
        percent = {name: lambda value: value if isinstance(value, str) else _figures(100 * value, "%")
                   for name in self.frame if "recovered" in name}
        frame = self.frame if self.sortable else self.frame.rename_axis(columns="split")
        # As objects: whole numbers stay whole, and one that is missing is shown like any other.
        table = frame.astype(object).where(frame.notna(), math.nan).to_html(
            float_format=_figures, formatters=percent, na_rep="–", border=0, index=not self.sortable,
            classes="sortable" if self.sortable else None)
        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>'
        return (f'<div class="table-scroll" style="overflow-x:auto" tabindex="0" role="region" '
                f'aria-label="{html.escape(self.caption)}">{table.replace("<thead>", caption + "<thead>", 1)}</div>')


def comparison_table(frame: pd.DataFrame, reported: pd.DataFrame | None = None, reproduced: str = "as_reported",
                     corrected: str | None = None, rank: int | None = None, layer: int | None = None) -> Table:
    """KL by split: reported by the study, reproduced and corrected here, identity; and the shares recovered.

    `corrected` is a method's name, if not given the best on "val" of all others; ranks and layers are `rank` and
    `layer`, if not given the best on "val". Other arguments and errors are those of `kl_vs_rank`.
    """
    frame, methods, identity = _checked(frame)
    found = {}
    if reported is not None:
        found["reported"] = _choice(_measured(reported, STUDY).assign(method="reported"), ["reported"])
    if reproduced in methods:
        found["reproduced"] = _choice(frame, [reproduced], rank, layer)
    if others := [corrected] if corrected else [name for name in methods if name != reproduced]:
        found["corrected"] = _choice(frame, others, rank, layer)
    columns = {name: rows["kl"] for name, (rows, _) in found.items()} | {"identity": pd.Series(identity)}
    columns |= {f"recovered, {name}": pd.Series(shares(rows), rows.index)
                for name, (rows, _) in found.items() if name != "reported"}
    columns["n"] = frame.groupby("split")["n"].max().astype(int)
    notes = [place if place.startswith(name) else f"{name}: {place}" for name, (_, place) in found.items()]
    return Table(pd.DataFrame(columns, index=list(identity)), f"{'; '.join(['KL to the expert in nats', *notes])}.")
