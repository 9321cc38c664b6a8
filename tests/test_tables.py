"""What was aimed at, beside what was measured."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from tables import aims_table

COLUMNS = ["quantity", "bound", "aim", "low", "high"]
UNKNOWN = math.nan


@pytest.mark.parametrize(
    ("bound", "low", "high", "outcome"),
    [
        ("at least", 0.76, 0.8, "met"), ("at least", 0.75, 0.75, "met"), ("at least", 0.7, 0.8, "open"),
        ("at least", 0.6, 0.7, "missed"), ("at least", 0.9, UNKNOWN, "met"), ("at least", 0.6, UNKNOWN, "open"),
        ("at least", UNKNOWN, 0.7, "missed"), ("at most", 0.6, 0.75, "met"), ("at most", 0.6, 0.8, "open"),
        ("at most", 0.8, 0.9, "missed"), ("at most", UNKNOWN, 0.7, "met"), ("at most", 0.8, UNKNOWN, "missed"),
        ("at most", UNKNOWN, UNKNOWN, "open"),
    ],
)  # fmt: skip
def test_an_aim_is_met_or_missed_by_a_whole_interval_and_else_open(
    bound: str, low: float, high: float, outcome: str
) -> None:
    (told,) = aims_table(pd.DataFrame([("x", bound, 0.75, low, high)], columns=COLUMNS), "").data.outcome
    assert told == outcome


def test_what_no_way_could_reach_is_not_called_missed() -> None:
    rows = pd.DataFrame([("x", "at most", 0.05, 0.08, 0.08)] * 3, columns=COLUMNS).assign(reach=[0.07, 0.04, UNKNOWN])
    assert aims_table(rows, "").data["outcome"].tolist() == ["out of reach", "missed", "missed"]


def test_figures_are_told_with_their_ends_and_in_their_own_format() -> None:
    rows = pd.DataFrame(
        [("x", "at least", 0.5, 0.25, 0.75), ("y", "at most", 2, 1, 1), ("z", "at least", 20, 3, UNKNOWN)],
        columns=COLUMNS,
    )
    told = aims_table(rows.assign(digits=["{:.0%}", "{:.1f}", "{:.0f}"], value=[0.6, 1, UNKNOWN]), "Aims")
    assert told.data["measured"].tolist() == ["60% (25% to 75%)", "1.0", "more than 3"]
    assert told.data["aim"].tolist() == ["at least 50%", "at most 2.0", "at least 20"]
    assert [*told.data] == ["quantity", "aim", "measured", "outcome"] and told.caption == "Aims"
