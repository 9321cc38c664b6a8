"""Page 19: flows keep all mass and name what becomes of it rightly, cuts lie inside words, healing undoes a cut."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused

from bridging import Places
from chassis_utils import Bridge, LanguageModel, Probes, load, probe_set
from chassis_utils.metrics import kl
from lookahead import (
    FATES,
    beside,
    budget_figure,
    flow_figure,
    flows,
    followed,
    healed,
    inside,
    judged,
    least,
    measured,
    said_of,
)

PROMPTS = ("Question: A baker has 24", "The cat sat on the", "The tow")


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    """An expert and a base."""
    return load("pocket-phi", device="cpu"), load("pocket-base", device="cpu")


def test_flows_lose_nothing_and_sum_to_the_bridge(pair: tuple[LanguageModel, LanguageModel]) -> None:
    expert, base = pair
    places = Places.of(base, expert, Probes("some", "template", PROMPTS))
    frame = flows(Bridge(expert, base, budget=16), places, top=6)
    assert np.allclose(frame.groupby("prompt")["mass"].sum(), 1, atol=1e-3)
    assert set(frame["fate"]) <= set(FATES)
    # Without passes a bridge is linear: the flows are those of these six tokens together.
    bridge = Bridge(expert, base, budget=0)
    frame = flows(bridge, places, top=6)
    top = places.said.topk(6)
    six = torch.zeros_like(places.said).scatter(1, top.indices, top.values)
    together = bridge(six / six.sum(1, keepdim=True), PROMPTS).mass * six.sum(1, keepdim=True)
    for prompt, row in zip(PROMPTS, together, strict=True):
        here = frame[frame["prompt"] == prompt].groupby("to")["mass"].sum()
        assert abs(here.get("across the end", 0.0) - float(row[-2])) < 1e-3
        rest = here.drop(["across the end", "no token", "not followed"], errors="ignore")
        assert abs(rest.sum() - row[:-2].sum()) < 1e-3
    named = frame[~frame["to"].isin(["other tokens", "end of text"])]
    for row in named.itertuples():
        if row.fate == "longer token":
            assert row.to.startswith(row.token) and len(row.to) > len(row.token)
        if row.fate == "shorter token" and row.to != "�":
            assert row.token.startswith(row.to) or row.bytes == row.to


def test_the_figure_of_flows_holds_the_same_mass(pair: tuple[LanguageModel, LanguageModel]) -> None:
    expert, base = pair
    frame = flows(Bridge(expert, base, budget=0), Places.of(base, expert, Probes("some", "template", PROMPTS)), top=3)
    figure = flow_figure(frame, "Flows")
    assert [trace.visible for trace in figure.data] == [True, False, False]
    drawn = frame[frame["fate"] != "not followed"].groupby("prompt", sort=False)["mass"].sum()
    for trace, whole in zip(figure.data, drawn, strict=True):
        link, nodes = trace.link, len(trace.node.label)
        assert max(*link.source, *link.target) < nodes
        into, out = np.zeros(nodes), np.zeros(nodes)
        np.add.at(into, list(link.target), link.value)
        np.add.at(out, list(link.source), link.value)
        both = (into > 0) & (out > 0)
        assert np.allclose(into[both], out[both], atol=1e-3), "what comes into a middle node leaves it"
        assert abs(out[into == 0].sum() - whole) < 1e-2


def test_a_larger_budget_is_nearer_and_the_bound_holds(pair: tuple[LanguageModel, LanguageModel]) -> None:
    places = Places.of(*pair[::-1], Probes("some", "template", PROMPTS))
    found, floor = followed(Bridge(*pair), places, (0, 8, 64)), least(Bridge(*pair), places, (0, 8, 64))
    # Nothing was followed: all that is open is left. After that no search leaves less than the floor.
    assert torch.allclose(floor[0], found[0].undecided, atol=1e-9)
    assert all((floor[n] <= found[n].undecided + 1e-9).all() for n in (8, 64))
    # The heaviest tokens, each asked of the bridge alone: what is open of them is what a budget can take away.
    said, tokens = places.said[0].sort(descending=True)
    alone = torch.eye(len(said), dtype=said.dtype)[tokens[:200]]
    open_ = said[:200][Bridge(*pair, budget=0)(alone, PROMPTS[:1] * 200).undecided > 0.5]
    assert len(open_) > 64
    for n in (8, 64):
        assert abs(floor[0][0] - open_[:n].sum() - floor[n][0]) < 1e-9
    with refused("heal = 1", "without heal"):
        least(Bridge(*pair, heal=1), places, (8,))
    figure = budget_figure(found, floor, PROMPTS, {"undecided": {8: 0.05}}, "Budget")
    bounds = [float(found[n].undecided.mean()) for n in (0, 8, 64)]
    assert bounds == sorted(bounds, reverse=True)
    said = next(t for t in figure.data if t.name == "undecided")
    assert np.allclose(said.y, bounds, rtol=1e-3)
    drawn = next(t for t in figure.data if t.name == "undecided at least")
    assert np.allclose(drawn.y, [float(floor[n].mean()) for n in (0, 8, 64)], rtol=1e-3)
    for n in (0, 8):
        told = beside(found[n], found[64])
        assert (told["total variation"] <= found[n].undecided + found[64].undecided + 1e-9).all()
    rows = {row["bridge"]: row for row in measured(Bridge(*pair), places, found, floor)}
    assert [*rows][-3:] == ["exact 0", "exact 8", "exact 64"] and {*rows} > {"A as reported", "C in context"}
    own = judged("base", said_of(places.own, found[64]), found[64], places.passage)
    for row in (*rows.values(), own):
        assert 0 <= row["truth low"] <= row["total variation"] + 1e-9 <= row["truth high"] + 2e-9
    assert rows["exact 64"]["KL"] < 1e-5 < own["KL"], "the reference itself, and what knows nothing of it"
    assert own["placed"] == pytest.approx(rows["exact 64"]["placed"], abs=1e-9)
    means = pd.DataFrame([rows[f"exact {n}"] for n in (0, 8, 64)]).assign(prompt="many")
    first = budget_figure(found, floor, PROMPTS, {"undecided": {8: 0.05}}, "Budget", means)
    assert np.allclose(next(t for t in first.data if t.name == "undecided").y, bounds, rtol=1e-3)
    same = beside(found[64], found[64])
    assert same["total variation"].abs().max() == 0 and same["top-1 equal"].min() == 1
    assert same["KL"].max() < 1e-5 and kl(torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0


def test_cuts_lie_inside_words_and_healing_finds_the_word_again(pair: tuple[LanguageModel, LanguageModel]) -> None:
    texts = probe_set("math-text", "val", 6).prompts
    cuts = inside(texts, 4)
    assert len(cuts) == 4
    for prompt, rest in cuts:
        assert prompt[-2:].isalpha() and rest.isalpha() and any(text.startswith(prompt + rest) for text in texts)
    bridge = Bridge(*pair, budget=8)
    frame = healed(bridge, [("Question: A train goes from one to", "wn")], (0, 1, 2))
    assert bridge.heal == 0 and frame["heal"].tolist() == [0, 1, 2]
    assert frame["across the end"].iloc[-1] <= frame["across the end"].iloc[0]
