"""The router: whose text a prompt is, and what is left to the bare base."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis_utils import Adapter, LanguageModel, Probes, load, probe_set
from chassis_utils.activations import tokenize

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import routing

import routes
from routes import Router, confusion

VAL = {"pocket-math": probe_set("math-text", "val"), "pocket-shakespeare": probe_set("verse", "val")}
SOME = [
    *VAL["pocket-math"].prompts[:3],
    "Why, sir?",
    "x",
    *VAL["pocket-shakespeare"].prompts[:3],
    "1 2 3",
    "Où est-il ?",
]


@pytest.fixture(scope="module")
def pocket() -> LanguageModel:
    return load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def fitted(pocket: LanguageModel) -> Router:
    return routing.fitted(pocket)


def named(name: str, *prompts: str) -> Probes:
    return Probes(name, "train", prompts)


def test_held_out_text_goes_to_its_expert_and_the_rest_to_the_base(fitted: Router) -> None:
    table = confusion(fitted, VAL | {None: probe_set("prose", "val")})
    assert list(table.columns) == list(table.index) == ["pocket-math", "pocket-shakespeare", "none"]
    assert table.sum(axis=1).tolist() == [len(one) for one in (*VAL.values(), probe_set("prose", "val"))]
    right = [table.loc[name, name] / table.loc[name].sum() for name in table.index]
    assert min(right) >= 0.95


def test_a_prompt_of_one_line_is_routed_too(fitted: Router) -> None:
    told = fitted(
        [
            "Question: Ben has 12 boxes with 9 pencils in each. He gives 20 pencils away. How many are left?",
            "First Lord:\nMy liege, the night hath borne a storm,\nAnd thou dost sleep, nor heed'st what heaven would.",
            "The town lies on the north bank of the river and had a population of 4,210 in 1901.",
        ]
    )
    assert told["choice"].tolist() == ["pocket-math", "pocket-shakespeare", None]


def test_what_is_like_nothing_known_is_left_to_the_base(fitted: Router) -> None:
    kinds = routing.unseen(fitted.base, 20)
    noise = [kinds[name] for name in ("random letters", "lists of numbers", "random tokens")]
    for probes in noise:
        assert fitted(probes.prompts)["choice"].isna().mean() >= 0.9, probes.name


def test_scores_are_shares_and_the_choice_has_the_largest(fitted: Router) -> None:
    table = fitted([*SOME, *routing.unseen(fitted.base, 9)["code"].prompts])
    scores = table[[*fitted.names, "none"]]
    assert scores.to_numpy().min() >= 0 and scores.sum(axis=1).to_numpy() == pytest.approx(1)
    assert scores.idxmax(axis=1).tolist() == [choice or "none" for choice in table["choice"]]
    assert (table["distance"] > 1).any() and (table.loc[table["distance"] > 1, "none"] == 1).all()


@settings(max_examples=15, deadline=None)
@given(picked=st.lists(st.integers(0, len(SOME) - 1), min_size=1, max_size=12))
def test_neither_company_nor_order_changes_a_row(fitted: Router, picked: list[int]) -> None:
    alone = fitted(SOME)
    together = fitted([SOME[i] for i in picked])
    assert together["choice"].tolist() == [alone["choice"][i] for i in picked]
    numbers = [*fitted.names, "none", "distance"]
    assert together[numbers].to_numpy() == pytest.approx(alone[numbers].to_numpy()[picked], rel=1e-4, abs=1e-5)


def test_distance_and_score_are_those_of_the_definition(fitted: Router) -> None:
    base, prompt = fitted.base, SOME[0]
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        state = base.model.model(ids).last_hidden_state[0, 1:].double().mean(0)
    precision = fitted.whiten @ fitted.whiten.T
    gaps = [state - mean @ fitted.whiten.inverse() for mean in fitted.means]
    squares = torch.stack([gap @ precision @ gap for gap in gaps])
    number = sum(length <= ids.shape[1] - 1 for length in routes.LENGTHS) - 1
    row = fitted([prompt]).iloc[0]
    assert row["distance"] == pytest.approx(float(squares.min() / fitted.limit[number] / fitted.slack), rel=1e-4)
    assert row["pocket-math"] == pytest.approx(float((-squares / 2).softmax(0)[0]), abs=1e-4)


def test_means_and_covariance_are_those_of_all_windows_but_the_held_out(pocket: LanguageModel) -> None:
    sets = {name: Probes(name, "train", one.prompts[:9]) for name, one in VAL.items()}
    found, classes = Router.fit(pocket, sets), []
    for one in sets.values():
        means = []
        for i, ids in enumerate(tokenize(pocket, one)[0]):
            with torch.inference_mode():
                state = pocket.model.model(torch.tensor([ids])).last_hidden_state[0, 1:].double()
            lengths = [*(k for k in routes.LENGTHS if k < len(state)), len(state)]
            cuts = [state[at : at + k] for k in lengths for at in range(0, len(state) - k + 1, k)]
            means += [] if i == 7 else [part.mean(0) for part in cuts]
        classes.append(torch.stack(means))
    centres = torch.stack([rows.mean(0) for rows in classes])
    left = torch.cat([rows - centre for rows, centre in zip(classes, centres, strict=True)])
    covariance = left.T @ left / len(left)
    covariance += covariance.diagonal().diag()
    assert found.whiten.T @ covariance @ found.whiten == pytest.approx(torch.eye(len(covariance)).numpy(), abs=1e-3)
    assert found.means == pytest.approx((centres @ found.whiten).numpy(), rel=1e-3, abs=1e-3)


def test_more_slack_leaves_less_to_the_base(fitted: Router) -> None:
    texts = [*SOME, *(text for one in routing.unseen(fitted.base, 9).values() for text in one.prompts)]
    left = [int(replace(fitted, slack=slack)(texts)["choice"].isna().sum()) for slack in (0.5, 1, 2, 4, 1e9)]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]


def test_one_expert_alone_is_told_by_the_limit(pocket: LanguageModel) -> None:
    alone = Router.fit(pocket, {"math": probe_set("math-text")})
    table = confusion(alone, {"math": VAL["pocket-math"], None: VAL["pocket-shakespeare"]})
    assert table.loc["math", "math"] == len(VAL["pocket-math"]) and table.loc["none", "none"] > 0


def test_an_edited_base_is_read_without_its_edits(pocket: LanguageModel) -> None:
    size = pocket.hidden_size
    change = {"down": torch.ones(size, 1), "up": torch.ones(1, size), "bias": torch.ones(size), "columns": None}
    shift = replace(Adapter.identity(pocket), layer=2, space="hidden", onto="layer", **change)
    sets = {name: Probes(name, "train", one.prompts[:4]) for name, one in VAL.items()}
    plain, again = (Router.fit(base, sets) for base in (pocket, pocket.edited(shift)))
    assert torch.equal(again.whiten, plain.whiten) and again.base is pocket


def test_passages_shorter_than_every_window_are_enough(pocket: LanguageModel) -> None:
    found = Router.fit(pocket, {"yes": named("yes", "yes", "aye", "yea"), "no": named("no", "no", "nay", "never")})
    assert torch.isfinite(found.limit).all() and found(["aye"])["choice"].tolist() == ["yes"]


def test_every_architecture_has_a_final_state_to_route_by(base: LanguageModel) -> None:
    draw = random.Random(0)
    rivers, sums = (
        [" ".join(draw.choices(words.split(), k=20)) for _ in range(20)]
        for words in ("river town sea hills the runs", "1 2 3 + = 12")
    )
    found = Router.fit(base, {"rivers": named("r", *rivers[:14]), "sums": named("s", *sums[:14])})
    table = confusion(found, {"rivers": named("r", *rivers[14:]), "sums": named("s", *sums[14:])})
    assert table.loc["rivers", "sums"] == table.loc["sums", "rivers"] == 0 and table["none"].sum() <= 4


def test_sets_that_no_router_can_be_fitted_on_are_refused(pocket: LanguageModel) -> None:
    two = named("two", "a b c", "d e f")
    for names in ({}, {None: two}, {"": two}, {"none": two}, {"choice": two}, {3: two}):
        with refused("name"):
            Router.fit(pocket, names)
    for sets in ({"one": named("one", "a b c")}, {"same": named("same", "a", "a")}, {"text": "a passage"}):
        with refused("two passages"):
            Router.fit(pocket, sets)
    with refused("two passages"):
        Router.fit(pocket, {"two": two}, named("rest", "x"))
    with refused("none to two sets"):
        Router.fit(pocket, {"two": two, "again": named("again", "d e f", "g h i")})
    with refused("prompt 1 of 'long'", "shorten"):
        Router.fit(pocket, {"long": named("long", "short", "word " * 600)})


def test_prompts_that_cannot_be_routed_are_refused(fitted: Router) -> None:
    with refused("empty"):
        fitted(["What is this?", " "])
    with refused("empty"):
        fitted([])
    with refused("one string"):
        fitted("What is this?")
    with refused("tokens", "takes 512"):
        fitted(["word " * 600])


def test_a_confusion_on_fitted_prompts_or_of_an_unknown_expert_is_refused(fitted: Router) -> None:
    with refused("fitted on"):
        confusion(fitted, {"pocket-math": probe_set("math-text")})
    with refused("no expert's name"):
        confusion(fitted, {"pocket-law": VAL["pocket-math"]})


def test_the_benchmark_cuts_to_so_many_tokens(fitted: Router) -> None:
    cut = routing.cut(fitted.base, VAL["pocket-math"], 16)
    sizes = {len(ids) - 1 for ids in tokenize(fitted.base, cut)[0]}
    assert len(cut) == len(VAL["pocket-math"]) and sizes == {16}
    assert all(whole.startswith(one) for one, whole in zip(cut.prompts, VAL["pocket-math"].prompts, strict=True))
    with refused("empty"):
        routing.cut(fitted.base, cut, 64)
