"""Page 10: recovered share over the ranks of expert and adapter, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from scipy.stats import sem, t

from chassis_utils import ChassisError
from plots import STYLES, _buttons, _dropdowns, _finish, _measured, _numbers, _owned, style


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the bounds of its t-interval, over seeds: two at least, or ChassisError, as one tells of no spread."""
    if len(values) < 2:
        raise ChassisError(f"an interval over {len(values)} seed: measure at least two")
    mean, reach = math.fsum(values) / len(values), float(t.ppf(0.5 + level / 2, len(values) - 1) * sem(values))
    return mean, mean - reach, mean + reach


def phase_diagram(
    frame: pd.DataFrame,
    title: str = "Recovered share over the ranks of expert and adapter",
    alt: str | None = None,
    method: str = "rrr",
    split: str = "test",
) -> go.Figure:
    """Recovered share as a map: adapter rank across, expert rank up, a slider over n_train, menus for method and split.

    `frame` is what `evaluate` returned for several experts, with columns `expert_rank` and `n_train`. As in
    `kl_vs_rank` each control owns one attribute: the slider `visible`, the method `xaxis`, the split `yaxis`.

    Raises:
        ChassisError: nothing to draw, a column is missing, one place is measured twice, or an unknown choice.
    """
    keys, by = "expert_rank rank".split(), "method split n_train".split()
    shown = [*"kl kl_identity recovered n recovered_low recovered_high".split(), *keys]
    rows = _measured(frame, [*by, *shown]).query("method != 'identity' and recovered.notna()")
    if rows.empty or rows.duplicated(by + keys).any():
        raise ChassisError("the frame holds no share to draw, or two for one place: draw one seed and strength")
    for kind, name in (("method", method), ("split", split)):
        if name not in (known := rows[kind].unique()):
            raise ChassisError(f"no {kind} {name!r} was measured: choose one of {', '.join(known)}")
    up, across, sizes = (sorted(map(int, rows[name].unique())) for name in (*keys, "n_train"))
    figure = go.Figure(layout=STYLES["layouts"]["phase"])
    for mark, group in rows.groupby(by, sort=False):
        cells = group.set_index(keys, drop=False).reindex(pd.MultiIndex.from_product([up, across]))[shown]
        lines = [[_numbers(cell) for cell in line] for line in cells.to_numpy(float).reshape(len(up), len(across), -1)]
        figure.add_heatmap(
            z=[[cell[2] for cell in line] for line in lines],
            customdata=lines,
            meta=[*mark],
            texttemplate="%{z:.0%}",
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            hovertemplate=f"<b>{style(mark[0])[0]}</b>, {mark[1]}, N = {mark[2]:g}<br>"
            "expert rank %{customdata[6]}, adapter rank %{customdata[7]}<br>recovered %{customdata[2]:.1%} "
            "(%{customdata[4]:.1%} to %{customdata[5]:.1%})<br>KL %{customdata[0]:.3g}, identity %{customdata[1]:.3g}, "
            "n = %{customdata[3]}<extra></extra>",
        )
    menus = _dropdowns(
        figure,
        8,
        (method, _owned(figure, 0, rows["method"].unique(), "xaxis", "x", "x2")),
        (split, _owned(figure, 1, rows["split"].unique(), "yaxis", "y", "y2")),
    )
    steps = _buttons(figure, sizes[-1], _owned(figure, 2, sizes, "visible", True, False))
    first = rows[(rows["method"] == method) & (rows["split"] == split) & (rows["n_train"] == sizes[-1])]["recovered"]
    alt = alt or (
        f"Share of the identity KL recovered over expert and adapter rank: {style(method)[0]} on {split}, "
        f"fitted on {sizes[-1]} prompts, from {first.min():.0%} to {first.max():.0%}."
    )
    ticks = [{"tickvals": [*range(len(of))], "ticktext": of} for of in (across, up)]
    slider = {"active": len(steps) - 1, "steps": steps, "pad_t": 50, "currentvalue_prefix": "N = "}
    caption = (
        "Read along a row: the expert has one rank, the adapter's grows to the right. Look for the step from pale to "
        "blue, and whether it lies where the two ranks are equal; then move N, and see from how many prompts on the "
        "step is there. Blue is recovered, vermilion worse than no adapter."
    )
    names = ["KL", "identity", "recovered", "n", "recovered low", "recovered high", "expert rank", "adapter rank"]
    return _finish(
        figure, title, alt, caption, above=38, columns={"z": "recovered", "hover": names}, updatemenus=menus,
        sliders=[slider], xaxis=ticks[0], yaxis=ticks[1],
    )  # fmt: skip
