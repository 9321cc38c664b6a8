"""The long contest of v2 and LoRA: where curves cross, how step sizes are found, what the committed figures say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import contest


def course(*points: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["seconds", "kl"])


def test_a_crossing_lies_on_the_line_between_two_points() -> None:
    falling = course((0, 1.0), (10, 0.8), (20, 0.4), (40, 0.2))
    assert contest.crossing(falling, 0.6) == pytest.approx(15)
    assert contest.crossing(falling, 0.3) == pytest.approx(30)
    assert contest.crossing(falling, 0.2) == 40
    assert contest.crossing(falling, 0.1) is None
    assert contest.crossing(falling, 0.9) == 10  # what was there at the first look took no longer than that


def test_the_best_of_several_courses_counts() -> None:
    long = course((0, 1.0), (50, 0.9), (100, 0.3))
    short = course((0, 1.0), (20, 0.5), (40, 0.45), (60, 0.7))
    both = pd.concat([long, short])
    assert contest.crossing(both, 0.475) == pytest.approx(30)
    assert contest.crossing(both, 0.4) == pytest.approx(40 + 60 * 0.05 / 0.15)
    diverged = course((0, 1.0), (10, math.inf), (20, math.nan))
    assert contest.crossing(diverged, 0.5) is None
    assert contest.crossing(pd.concat([both, diverged]), 0.475) == pytest.approx(30)


@pytest.mark.parametrize(("at", "tried"), [(4e-3, 3), (1.2e-2, 4), (2e-4, 6), (1.0, 6)])
def test_a_grid_is_widened_until_the_best_lies_inside(at: float, tried: int) -> None:
    def method(given: object, lr: float, rank: int) -> pd.DataFrame:
        assert given == "text" and rank == 7
        return course((0, 9.0), (1, abs(math.log(lr / at)))).assign(lr=lr)

    best, courses = contest.search(method, "text", rank=7)
    known = sorted(courses["lr"].unique())
    assert len(known) == tried and best == min(known, key=lambda lr: abs(math.log(lr / at)))
    assert tried == 6 or known[0] < best < known[-1]
    assert contest.effort(courses)["seconds"] == tried


def test_the_committed_crossings_follow_from_the_committed_courses() -> None:
    for name, part in json.loads(contest.RESULTS.read_text()).items():
        assert name in contest.EXPERTS
        courses, setting = pd.DataFrame(part["courses"]), part["setting"]
        for rank in contest.RANKS:
            mine = courses[courses["rank"] == rank]
            wanted, told = contest.crossing(mine, part["v2"]["kl"]), part["crossing"][str(rank)]
            assert (wanted is None) == (told is None)
            assert wanted is None or told == pytest.approx(wanted, rel=1e-3)
            assert part["search"][str(rank)]["seconds"] >= setting["search_seconds"] * 3
        ends = courses[courses["test_kl"].notna()]
        # What is chosen is chosen on the brief courses and on validation text; no brief course has read the test text.
        assert (ends["budget"] > setting["search_seconds"]).all() and len(ends) >= 3
        assert (courses.groupby(["rank", "lr", "budget"])["seconds"].max() < 1.1 * courses["budget"].max()).all()


def test_the_committed_crossings_of_lenses_follow_from_their_courses() -> None:
    for part in json.loads(contest.RESULTS.read_text()).values():
        courses = pd.DataFrame(part["lens"]["courses"])
        assert {one["layer"] for one in part["lens"]["ours"]} == set(courses["layer"])
        for ours in part["lens"]["ours"]:
            told = contest.crossing(courses[courses["layer"] == ours["layer"]], ours["kl"])
            assert ours["passes"] < ours["seconds"] and told == pytest.approx(ours["crossing"], rel=1e-3)


def test_parts_of_several_runs_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "RESULTS", tmp_path / "contest.json")
    assert contest.known() == {}
    contest.write("one", {"v2": {"kl": 1.0}})
    contest.write("two", {"v2": {"kl": 2.0}})
    contest.write("one", {"svd": [1]})
    assert contest.known() == {"one": {"v2": {"kl": 1.0}, "svd": [1]}, "two": {"v2": {"kl": 2.0}}}
    assert [path.name for path in tmp_path.iterdir()] == ["contest.json"]
