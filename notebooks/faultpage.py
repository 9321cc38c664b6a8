"""Tables and figure of page A3: kills and other faults, and what was lost, as scripts counted them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from plots import PALETTE

#: What was killed, as people know it.
WORKS = {
    "harvest": "harvest of hidden states", "gather": "sums by two workers", "grid": "grid on two workers",
    "run": "pages of a book", "save": "saving an adapter",
}  # fmt: skip
#: Fault -> what was done, on how it shows.
FAULTS = {
    "disk": "the disk is full", "interrupt": "Ctrl-C", "shard": "a file is damaged", "clock": "the clock jumps",
    "memory": "memory is short", "worker": "a worker is lost", "scheduler": "the scheduler is lost",
    "network": "a wire is out",
}  # fmt: skip


def kills_table(kills: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a work: kills, rounds that ended, pieces begun again, and rounds or saves whose result was another."""
    rows = [
        {
            "work": WORKS[one["what"]],
            "kills": one["kills"],
            "runs that ended": one.get("rounds"),
            "pieces begun again": one.get("begun_again") if one["what"] != "harvest" else None,
            "most by one restart": one.get("most_by_a_restart") if one["what"] != "harvest" else None,
            "lost or different": one.get("rounds_that_differ", one.get("lost")),
        }
        for one in kills.values()
    ]
    return pd.DataFrame(rows).astype({name: "Int64" for name in rows[0] if name != "work"})


def faults_table(faults: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a fault and a work: trials, those it struck, those it was said in or got over, and what was lost."""
    rows = [
        {
            "fault": FAULTS[one["fault"]],
            "work": WORKS[one["work"]],
            "trials": one["trials"],
            "struck": one["struck"],
            "said, or got over": one["said"],
            "files left behind": one["litter"],
            "lost or different": one["differ"],
        }
        for one in faults.values()
    ]
    return pd.DataFrame(rows)


def moments(kills: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """When in an undisturbed run's time each kill came, a row a work; what is saved is killed within a second."""
    figure = go.Figure()
    for colour, one in zip(PALETTE, kills.values(), strict=False):
        name, times = WORKS[one["what"]], one["moments"]
        figure.add_scatter(
            x=times, y=[name] * len(times), mode="markers", name=name, marker={"color": colour, "opacity": 0.6},
            hovertemplate=f"{name}: killed at %{{x:.0%}} of a whole run<extra></extra>",
        )  # fmt: skip
    return figure.update_layout(
        template="chassis",
        title_text="Moments of the kills",
        xaxis={"title_text": "share of an undisturbed run's time", "tickformat": ".0%", "range": [-0.02, 1.02]},
        yaxis={"autorange": "reversed", "automargin": True},
        showlegend=False,
        height=340,
        meta={
            "alt": "Each kill as a point on the time of an undisturbed run, one row a work, from start to end",
            "caption": "Look for gaps: a row whose points leave none was struck at every stage of its work, beginning, "
            "middle and end. What came of each kill is in the table.",
            "columns": {"y": "work"},
        },
    )
