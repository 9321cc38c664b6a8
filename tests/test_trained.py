"""What the closed forms are compared with: every rival does what its name says, on the pocket models."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import make, refused

import alignment  # noqa: F401  registers hidden, aligned and projected
from chassis_utils import Activations, LanguageModel, Probes, evaluate, fit, harvest, load, probe_set
from chassis_utils.models import tensor_hash
from plugs import SyntheticExpert
from recast import recast
from trained import (
    Contest,
    _cut,
    choose_lr,
    head_only,
    lora,
    multiply_adds,
    proxy,
    second_moments,
    tuned_lens,
    weight_svd,
)

HIDDEN, VOCAB, RANK = 192, 4096, 4
#: Rows and columns of every linear map of a pocket block: q, k, v, o, gate, up, down.
MAPS = [(192, 192), (192, 64), (192, 64), (192, 192), (192, 512), (192, 512), (512, 192)]


@pytest.fixture(scope="module")
def pocket() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-base", device="cpu"), load("pocket-math", device="cpu")


@pytest.fixture(scope="module")
def prompts() -> Probes:
    return probe_set("math-text", "train", 16)


@pytest.fixture(scope="module")
def held(pocket: tuple[LanguageModel, LanguageModel]) -> Activations:
    return harvest(*pocket, probe_set("math-text", "val", 3), "all", [-2], progress=False)


@pytest.fixture(scope="module")
def contest(pocket: tuple[LanguageModel, LanguageModel], prompts: Probes, held: Activations) -> Contest:
    return Contest(*pocket, prompts, held, steps=10)


@pytest.fixture(autouse=True)
def untouched(pocket: tuple[LanguageModel, LanguageModel]) -> Iterator[None]:
    """No rival changes a weight of base or expert, nor whether it wants a gradient."""

    def state() -> tuple[str, list[str], bool]:
        names, weights = zip(*(pair for model in pocket for pair in model.model.named_parameters()), strict=True)
        return tensor_hash(*weights), [*names], any(p.requires_grad for p in weights)

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="module")
def courses(contest: Contest) -> dict[str, pd.DataFrame]:
    return {
        "lora": lora(contest, RANK, lr=1e-2),
        "lora_head": lora(contest, RANK, lr=1e-2, head=True),
        "head_only": head_only(contest, lr=1e-3),
        "tuned_lens": tuned_lens(contest, batch_tokens=2048),
        "tuned_lens_adam": tuned_lens(contest, optimizer="adam"),
        "tuned_lens_muon": tuned_lens(contest, optimizer="muon"),
    }


def test_every_course_goes_down(courses: dict[str, pd.DataFrame]) -> None:
    for name, course in courses.items():
        assert set(course["method"]) == {name}
        assert course["kl"].iloc[-1] < 0.99 * course["kl"].iloc[0], name
        assert course["step"].is_monotonic_increasing and course["step"].iloc[-1] == 10
        assert course["seconds"].is_monotonic_increasing
        assert course["tokens"].iloc[0] == 0 and course["tokens"].iloc[-1] > 1000
        assert course["recovered"].iloc[-1] > course["recovered"].iloc[0]


def test_what_starts_as_the_base_starts_at_its_kl(contest: Contest, courses: dict[str, pd.DataFrame]) -> None:
    row = evaluate(contest.base, contest.expert, [], contest.held).iloc[0]
    for name in ("lora", "lora_head", "head_only"):
        first = courses[name].iloc[0]
        assert first["kl"] == pytest.approx(row["kl"], rel=1e-5)
        assert first["recovered"] == pytest.approx(0, abs=1e-5)
        assert first["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
        assert first["top1_agreement"] == pytest.approx(row["top1_agreement"], abs=1e-3)


def test_zero_steps_of_lora_are_the_base(contest: Contest) -> None:
    course = lora(replace(contest, steps=0), 64)
    assert len(course) == 1
    assert course["kl"].iloc[0] == pytest.approx(contest.identity["kl"], rel=1e-5)


def test_a_lens_starts_at_the_experts_reading_of_the_state(
    contest: Contest, courses: dict[str, pd.DataFrame], held: Activations
) -> None:
    normed = contest.expert.final_norm(held.layer(-2))
    q = contest.expert.readout(normed).double().log_softmax(-1)
    p = contest.expert.readout(held.expert_hidden).double().log_softmax(-1)
    by_hand = float((p.exp() * (p - q)).sum(-1).mean())
    assert courses["tuned_lens"]["kl"].iloc[0] == pytest.approx(by_hand, rel=1e-5)


def test_a_lens_at_the_final_layer_can_reach_below_the_closed_one(contest: Contest, prompts: Probes) -> None:
    # One family there, affine maps of the final state read by the expert's head; on its own prompts, where the
    # trained one goes down the KL and the closed one the squares.
    own = harvest(contest.base, contest.expert, prompts, "all", [-1], progress=False)
    closed = evaluate(contest.base, contest.expert, fit(own, "lens"), own).iloc[1]["kl"]
    there = Contest(contest.base, contest.expert, prompts, own, steps=25)
    course = tuned_lens(there, -1, optimizer="muon", lr=2e-2)
    assert course["layer"].iloc[0] == contest.base.num_layers
    assert course["kl"].iloc[-1] < closed


def test_same_seed_same_course_other_seed_another(contest: Contest) -> None:
    short = replace(contest, steps=4)
    one, again, other = (lora(replace(short, seed=seed), RANK, lr=1e-2).drop(columns="seconds") for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again, check_exact=True)
    assert other["kl"].iloc[-1] != one["kl"].iloc[-1]
    assert other["kl"].iloc[-1] == pytest.approx(one["kl"].iloc[-1], rel=0.1)


def test_time_ends_training_and_measuring_takes_none(contest: Contest) -> None:
    course = head_only(replace(contest, steps=None, seconds=2.0, timer=time.process_time), batch_tokens=256)
    # One step may still be under way when time is up.
    assert 2.0 <= course["seconds"].iloc[-1] < 3.0
    assert len(course) >= 4
    assert course["kl"].iloc[-1] < course["kl"].iloc[0]


def test_another_clock_may_count(contest: Contest) -> None:
    ticks = itertools.count(0.0, 0.25)
    course = head_only(replace(contest, steps=None, seconds=10.0, timer=lambda: next(ticks)), batch_tokens=256)
    assert 10.0 <= course["seconds"].iloc[-1] < 11.0
    assert (course["seconds"] % 0.25 == 0).all()


def test_parameters_and_multiply_adds(contest: Contest, courses: dict[str, pd.DataFrame]) -> None:
    maps = 6 * sum(rows * columns for rows, columns in MAPS)
    base = maps + HIDDEN * VOCAB
    assert multiply_adds(contest.base) == base
    low_rank = 6 * RANK * sum(rows + columns for rows, columns in MAPS)
    head = RANK * (HIDDEN + VOCAB)
    lens = HIDDEN * HIDDEN
    wanted = {
        "lora": (low_rank, base + low_rank),
        "lora_head": (low_rank + head, base + low_rank + head),
        "head_only": (HIDDEN * VOCAB, base),
        "tuned_lens": (lens + HIDDEN, maps * 5 // 6 + lens + HIDDEN * VOCAB),
    }
    for name, (parameters, macs) in wanted.items():
        assert set(courses[name]["parameters"]) == {parameters}
        assert set(courses[name]["macs"]) == {macs}


def test_weight_svd_falls_with_rank_to_nothing(contest: Contest) -> None:
    table = weight_svd(contest, (1, 8, 32, 128, 192))
    assert table["kl"].is_monotonic_decreasing
    assert table["kl"].iloc[-1] < 1e-9
    assert table["top1_agreement"].iloc[-1] == 1
    assert table["parameters"].is_monotonic_increasing and table["macs"].is_monotonic_increasing
    matrices = 6 * sum(rows + columns for rows, columns in MAPS) + 2 * (HIDDEN + VOCAB)
    norms = (2 * 6 + 1) * HIDDEN
    assert table["parameters"].iloc[1] == 8 * matrices + norms
    # Of the embedding one row is looked up, not multiplied.
    assert table["macs"].iloc[1] == multiply_adds(contest.base) + 8 * (matrices - VOCAB)


def test_weight_svd_without_embeddings_leaves_them(contest: Contest) -> None:
    inner, outer = (weight_svd(contest, (192,), embeddings=given).iloc[0] for given in (False, True))
    model = load("pocket-math", device="cpu")
    with torch.no_grad():
        model.model.model.embed_tokens.weight.copy_(contest.base.model.model.embed_tokens.weight)
        model.model.lm_head.weight.copy_(contest.base.model.lm_head.weight)
    port = LanguageModel("expert with the base's embeddings", model.model, model.tokenizer)
    by_hand = evaluate(port, contest.expert, [], harvest(port, contest.expert, contest.held.probes, "all", [-1]))
    assert inner["kl"] == pytest.approx(by_hand["kl"].iloc[0], rel=1e-4)
    assert inner["kl"] > outer["kl"] and inner["parameters"] < outer["parameters"]


def test_weight_svd_on_the_data_is_exact_at_full_rank_and_nearer_below(contest: Contest) -> None:
    there = weight_svd(contest, (16, 64, 192), data=True)
    plain = weight_svd(contest, (16, 64, 192))
    assert set(there["method"]) == {"weight_svd_data"}
    assert there["kl"].iloc[-1] < 1e-9
    assert (there["kl"].iloc[:2] < plain["kl"].iloc[:2]).all()
    for same in ("parameters", "macs", "rank"):
        assert there[same].tolist() == plain[same].tolist()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("second", [True, False])
def test_a_cut_is_never_worse_in_its_own_metric_and_plain_where_inputs_are_white(
    shape: tuple[int, int], second: bool
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    difference = torch.randn(shape, generator=generator)
    p = shape[1] if second else shape[0]
    x = torch.randn(500, p, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, p)
    moment = x.T @ x / len(x)

    def lost(change: torch.Tensor) -> float:
        left = (difference - change).double()
        return float((x @ (left.T if second else left)).square().sum())

    own, plain = _cut(difference, moment, second), _cut(difference, None, second)
    white = _cut(difference, 3 * torch.eye(p, dtype=torch.float64), second)
    for rank in range(1, min(shape) + 1):
        changes = [left[:, :rank] @ right[:rank] for left, right in (own, plain, white)]
        assert all(torch.linalg.matrix_rank(change) <= rank for change in changes)
        assert lost(changes[0]) <= lost(changes[1]) * (1 + 1e-4) + 1e-6
        torch.testing.assert_close(changes[2], changes[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changes[0], difference, atol=2e-3, rtol=2e-3)


def test_tokens_that_occur_more_often_are_nearer() -> None:
    difference = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(30, dtype=torch.float64)
    counts[:5] = 1e4
    left, right = _cut(difference, counts, False)
    kept, plain = left[:, :5] @ right[:5], torch.linalg.svd(difference, full_matrices=False)
    by_svd = (plain.U[:, :5] * plain.S[:5]) @ plain.Vh[:5]
    far = [(difference - change)[:5].norm() for change in (kept, by_svd)]
    assert far[0] < 0.1 * far[1]
    torch.testing.assert_close(left @ right, difference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bloom"])
def test_moments_are_of_what_every_matrix_reads(kind: str, tmp_path: Path) -> None:
    """Brute force: one prompt at a time, every module's own input."""
    model = load(str(make(tmp_path / kind, kind)), device="cpu")
    prompts = Probes("hills", "train", ("The river rises in the hills.", "Nine towns.", "A baker has 24 rolls."))
    found, inputs = second_moments(model, prompts), {}
    head = model.model.get_output_embeddings()
    linear = {n: m for n, m in model.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0][0].detach()))
        for n, m in linear.items()
    ]
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in prompts.prompts]
    for own in ids:
        model.model(torch.tensor([own]))
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_pre_hooks for m in linear.values())
    for name, module in linear.items():
        x = torch.cat(inputs[name]).double()
        wanted = x.T @ x / len(x)
        moment, second = found[f"{name}.weight"]
        assert second == (type(module).__name__ == "Linear")
        torch.testing.assert_close(moment, wanted, atol=2e-6 * float(wanted.diagonal().max()), rtol=1e-4)
    table = model.model.get_input_embeddings()
    name = next(n for n, m in model.model.named_modules() if m is table)
    moment, _ = found[f"{name}.weight"]
    if table.weight is head.weight:
        assert moment.shape == (model.hidden_size, model.hidden_size)
    else:
        counts = torch.tensor([sum(own.count(i) for own in ids) for i in range(len(table.weight))])
        assert torch.equal(moment, counts.double() + 1)


def test_ends_are_judged_on_text_of_their_own(contest: Contest) -> None:
    probes = probe_set("math-text", "test", 2)
    test = harvest(contest.base, contest.expert, probes, "all", [-1], progress=False)
    there = replace(contest, steps=4, points=(0.5,), test=test)
    course = head_only(there, lr=1e-3)
    assert course["step"].tolist() == [0, 2, 4]
    assert course["test_kl"].isna().tolist() == [True, True, False]
    again = head_only(replace(there, held=test, test=None), lr=1e-3)
    assert course["test_kl"].iloc[-1] == again["kl"].iloc[-1]
    assert weight_svd(there, (4,))["test_kl"].iloc[0] == weight_svd(replace(there, held=test), (4,))["kl"].iloc[0]
    with refused("of the prompts are held out"):
        Contest(contest.base, contest.expert, probes, contest.held, steps=1, test=test)


def test_the_share_has_the_interval_over_prompts_that_evaluate_gives(contest: Contest) -> None:
    a = harvest(contest.base, contest.expert, contest.prompts, "all", [-1], progress=False)
    hidden = fit(a, "hidden", lam=1.0)
    wanted = evaluate(contest.base, contest.expert, hidden, contest.held).iloc[1]
    states = contest.held.layer(-1)
    got = contest.measure(contest.base, states + hidden.correction(contest.held.hidden))
    for name, value in got.items():
        assert value == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
    assert got["recovered_low"] < got["recovered"] < got["recovered_high"]


def test_proxy_of_the_expert_is_the_expert_at_its_price(contest: Contest) -> None:
    row = proxy(contest).iloc[0]
    assert abs(row["kl"]) < 1e-9 and row["top1_agreement"] == 1
    assert row["macs"] == 2 * multiply_adds(contest.base)
    assert row["parameters"] == contest.expert.model.num_parameters()


def test_proxy_adds_logits(contest: Contest) -> None:
    verse = load("pocket-shakespeare", device="cpu")
    row = proxy(contest, verse, contest.expert).iloc[0]
    assert row["macs"] == 3 * multiply_adds(contest.base)
    probes, logits = contest.held.probes, 0.0
    for sign, model in ((1, contest.base), (1, verse), (-1, contest.expert)):
        states = harvest(model, contest.expert, probes, "all", [-1], progress=False).layer(-1)
        logits = logits + sign * model.readout(states).double()
    q = logits.log_softmax(-1)
    p = contest.expert.readout(contest.held.expert_hidden).double().log_softmax(-1)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_the_step_size_is_chosen_by_the_last_kl(contest: Contest) -> None:
    lr, tried = choose_lr(head_only, replace(contest, steps=4), (1e-6, 1e-3, 1e6))
    last = tried.groupby("lr")["kl"].last()
    assert lr == 1e-3 == last.idxmin()
    assert set(last.index) == {1e-6, 1e-3, 1e6}


def test_a_diverged_course_says_so_and_does_not_win(contest: Contest) -> None:
    lr, tried = choose_lr(tuned_lens, replace(contest, steps=3), (1e35, 0.1), batch_tokens=1024)
    last = tried.groupby("lr").tail(1).set_index("lr")
    assert lr == 0.1
    assert last.loc[1e35, "kl"] == math.inf and math.isnan(last.loc[1e35, "recovered"])


def test_bad_input(contest: Contest, pocket: tuple[LanguageModel, LanguageModel], prompts: Probes) -> None:
    base, expert = pocket
    for rank in (0, -1, 2.5):
        with refused("rank", str(rank)):
            lora(contest, rank)
        with refused("rank", str(rank)):
            weight_svd(contest, (4, rank))
    for method in (lora, head_only, tuned_lens):
        for lr in (0.0, -1.0, math.inf, math.nan):
            with refused("lr", "choose_lr"):
                method(contest, lr=lr)
    with refused("optimizer = 'lion'", "sgd, adam, muon"):
        tuned_lens(contest, optimizer="lion")
    with refused("layer 9 does not exist"):
        tuned_lens(contest, 9)
    with refused("of the prompts are held out"):
        Contest(base, expert, contest.held.probes, contest.held, steps=1)
    with refused("no steps"):
        Contest(base, expert, prompts, contest.held)
    with refused("steps = -1"):
        replace(contest, steps=-1)
    with refused("nothing to recover"):
        twin = load("pocket-base", device="cpu")
        Contest(base, twin, prompts, harvest(base, twin, contest.held.probes, "all", [-1], progress=False), steps=1)
    with refused("harvest this pair"):
        Contest(base, load("pocket-shakespeare", device="cpu"), prompts, contest.held, steps=1)
    with refused("positions 'last'"):
        Contest(base, expert, prompts, harvest(base, expert, contest.held.probes, progress=False), steps=1)
    with refused("SyntheticExpert", "weights"):
        Contest(base, SyntheticExpert.from_base(base), prompts, contest.held, steps=1)


def test_another_tokenizer_is_refused(contest: Contest, prompts: Probes) -> None:
    foreign = load("pocket-phi", device="cpu")
    with refused("pocket-phi", "different tokenizers"):
        lora(Contest(contest.base, foreign, prompts, contest.held, steps=1), 4)
    with refused("pocket-phi", "different tokenizers"):
        proxy(contest, foreign)


def test_weights_of_another_architecture_are_not_subtracted(contest: Contest, prompts: Probes) -> None:
    for kind in ("gpt2", "mistral"):
        other = recast(contest.expert, kind)
        held = harvest(contest.base, other, contest.held.probes, "all", [-1], progress=False)
        against = Contest(contest.base, other, prompts, held, steps=1)
        if kind == "gpt2":
            with refused(other.name, "other weights"):
                weight_svd(against)
        else:
            # The same names and shapes, and here the same model.
            assert weight_svd(against, (192,))["kl"].iloc[0] < 1e-9
        # LoRA asks the expert for its answers only.
        assert lora(against, 4)["step"].iloc[-1] == 1


def test_a_model_of_another_depth_is_not_subtracted(base: LanguageModel, expert: LanguageModel) -> None:
    held = harvest(base, expert, Probes("towns", "val", ("The river runs past nine towns.",)), "all", progress=False)
    contest = Contest(base, expert, Probes("hills", "train", ("The river rises in the hills.",)), held, steps=1)
    with refused(base.name, expert.name, "other weights", "layers.2"):
        weight_svd(contest)


def test_a_tied_head_takes_no_lora(tmp_path: Path) -> None:
    tied = [load(str(make(tmp_path / str(seed), seed=seed, tie_word_embeddings=True)), device="cpu") for seed in (0, 1)]
    held = harvest(*tied, Probes("towns", "val", ("The river runs past nine towns.",)), "all", progress=False)
    contest = Contest(*tied, Probes("hills", "train", ("The river rises in the hills.",)), held, steps=2)
    with refused("its embedding"):
        lora(contest, 2, head=True)
    assert weight_svd(contest, (32,))["kl"].iloc[0] < 1e-6
