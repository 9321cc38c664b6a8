"""What is lost where only the likeliest tokens are told: the measurements and the figure of page 22."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from chassis_utils import Bridge, LanguageModel, load, probe_set
from likeliest import QUANTITIES, against_k, cut, following, loss, record, summary
from records import Records

SIZES = [1, 20, 300]


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-phi", device="cpu"), load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def cuts() -> tuple[list[str], list[int]]:
    return cut(probe_set("math-text", "train", 4).prompts, each=2, seed=3)


@pytest.fixture(scope="module")
def frame(pair: tuple[LanguageModel, LanguageModel], cuts: tuple[list[str], list[int]]) -> pd.DataFrame:
    return loss(*pair, cuts[0], SIZES)


def test_prompts_are_beginnings_of_passages_that_end_before_a_space(cuts: tuple[list[str], list[int]]) -> None:
    passages = probe_set("math-text", "train", 4).prompts
    assert cuts == cut(passages, each=2, seed=3) != cut(passages, each=2, seed=4)
    assert cuts[1] == [0, 0, 1, 1, 2, 2, 3, 3] and len({*cuts[0]}) == 8
    for prompt, number in zip(*cuts, strict=True):
        assert passages[number].startswith(prompt + " ") and prompt.strip()


def test_losses_are_those_of_a_loop_over_prompts(
    pair: tuple[LanguageModel, LanguageModel], cuts: tuple[list[str], list[int]], frame: pd.DataFrame
) -> None:
    expert, base = pair
    full, own = following(expert, cuts[0]), following(base, cuts[0])
    bridge = Bridge(expert, base, "C")
    whole = bridge(full, cuts[0]).mass
    for i, k in ((i, k) for i in range(len(cuts[0])) for k in (0, *SIZES, expert.vocab_size)):
        row = frame[(frame["prompt"] == i) & (frame["k"] == k)].iloc[0]
        p = torch.zeros_like(full[i])
        p[full[i].topk(k).indices] = full[i].topk(k).values
        kept = float(p.sum())
        mass = bridge(p[None] / kept, cuts[0][i : i + 1]).mass[0] * kept if k else torch.zeros_like(whole[i])
        mass[-1] += 1 - kept
        assert row["kept"] == pytest.approx(kept)
        assert row["coverage"] == pytest.approx(float(mass[:-2].sum()), abs=1e-5)
        assert row["total_variation"] == pytest.approx(float((mass - whole[i]).abs().sum() / 2), abs=1e-5)
        said = []
        for one, tail in ((whole[i], 0.0), (mass, 1 - kept)):
            places = one[:-2]
            free = torch.where(places == 0, own[i], 0.0)
            share = tail * free / free.sum() if tail else 0.0
            said.append(places + (one[-2:].sum() - tail) * own[i] + share)
        p, q = said
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert sum(q.tolist()) == pytest.approx(1)


def test_nothing_is_lost_by_all_and_the_tail_bounds_what_is_lost(frame: pd.DataFrame) -> None:
    everything = frame[frame["k"] == frame["k"].max()]
    assert everything[["kl", "kl_spread", "total_variation"]].abs().to_numpy().max() < 1e-12
    assert (frame["total_variation"] <= 1 - frame["kept"] + 1e-5).all()
    steps = frame.pivot(index="prompt", columns="k", values="coverage").diff(axis=1).iloc[:, 1:]
    assert (steps >= -1e-5).all().all()
    bare = frame[frame["k"] == 0]
    assert (bare["kl"] - bare["kl_spread"]).abs().max() < 1e-12 and (bare["kept"] == 0).all()


def test_the_summary_is_of_means_and_records_say_the_same(
    frame: pd.DataFrame, cuts: tuple[list[str], list[int]], tmp_path: object
) -> None:
    table = summary(frame, cuts[1])
    means = frame.groupby("k")["kl"].mean()
    assert table["kl"].tolist() == pytest.approx(means.tolist())
    assert table["recovered"].tolist() == pytest.approx((1 - means / means[0]).tolist())
    inner = table[table["k"].isin(SIZES)]
    assert ((inner["kl_low"] < inner["kl"]) & (inner["kl"] < inner["kl_high"])).all()
    # A passage cut once more at the same place says nothing new.
    doubled = pd.concat([frame, frame.assign(prompt=frame["prompt"] + len(cuts[0]))])
    again = summary(doubled, [*cuts[1], *cuts[1]])
    assert again["kl_low"].tolist() == pytest.approx(table["kl_low"].tolist())
    records = Records(tmp_path, experiment="api_expert", notebook="n", base="b", expert="e", probes="p")
    record(records, table, "text", [20])
    record(records, summary(frame, cuts[1], "kl_spread"), "text", [20], "_spread")
    rows = records.save()
    assert {*rows["method"]} == {"identity", "top_20", "top_20_spread", "all"}
    kl = rows[rows["metric"] == "kl"].set_index("method")["value"]
    assert kl["identity"] == pytest.approx(means[0]) and kl["top_20"] == pytest.approx(means[20])


def test_every_step_of_the_slider_shows_one_prompt_and_its_end(
    frame: pd.DataFrame, cuts: tuple[list[str], list[int]]
) -> None:
    prompts = [*cuts[0][:-1], "It costs $4 < $5"]
    figure = against_k(frame, prompts, "KL")
    steps = figure.layout.sliders[0].steps
    assert len(steps) == len(prompts) and figure.layout.meta["alt"]
    for i, step in enumerate(steps):
        visible = step.args[0]["visible"]
        assert visible[0] and [j for j, one in enumerate(visible[1:]) if one] == [i]
        assert "$" not in step.args[1]["xaxis.title.text"]
    assert "&#36;4 &lt; &#36;5" in steps[-1].args[1]["xaxis.title.text"]
    menu = figure.layout.updatemenus[0].buttons
    assert [button.label for button in menu] == [*QUANTITIES]
    for button, (column, *_) in zip(menu, QUANTITIES.values(), strict=True):
        drawn, wanted = button.args[0]["y"], frame.pivot(index="prompt", columns="k", values=column)
        last = -1 if "log" in button.label else None  # Nothing is lost by all: a log axis has no place for it.
        assert drawn[0][:last] == pytest.approx(wanted.mean().tolist()[:last], rel=1e-3)
        assert drawn[3][:last] == pytest.approx(wanted.loc[2].tolist()[:last], rel=1e-3, abs=1e-12)
