"""Iterations from an adapter: what each promises, against the definition."""

import pytest
import torch
from conftest import refused

from alignment import into_hidden
from chassis_utils import Activations, Adapter, LanguageModel, Probes, evaluate, fit, harvest
from chassis_utils.metrics import kl
from plugs import SyntheticExpert
from refinement import REFINERS, refine, refined


@pytest.fixture(scope="module")
def rows(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> Activations:
    return harvest(base, expert, prompts, "all", [-1], progress=False)


@pytest.mark.parametrize("how", sorted(REFINERS))
def test_a_course_begins_at_the_start_and_ends_at_what_is_returned(rows: Activations, how: str) -> None:
    start = fit(rows, "v1", 4)
    refined, course = refine(rows, start, how, steps=4, rate=1e-3)
    assert course["step"].tolist() == [0, 1, 2, 3, 4] and course["seconds"].is_monotonic_increasing
    for adapter, value in ((start, course["kl"][0]), (refined, course["kl"][4])):
        ours = adapter.logits(rows.base, rows.hidden)
        wanted = float(kl(rows.expert.readout(rows.expert_hidden), ours).mean())
        assert value == pytest.approx(wanted, abs=1e-5)
    assert course["kl"][4] < course["kl"][0] and refined.method == how


@pytest.mark.parametrize("how", ["bohning", "accelerated"])
@pytest.mark.parametrize("method", ["v1", "rrr", "ridge"])
def test_a_step_of_bohning_never_raises_the_kl(rows: Activations, how: str, method: str) -> None:
    course = refine(rows, fit(rows, method, 4), how, steps=25)[1]
    assert (course["kl"].diff().dropna() <= 1e-7).all()


def test_every_way_down_ends_above_the_optimum_and_lbfgs_is_nearest(rows: Activations) -> None:
    start = fit(rows, "rrr", 4)
    ends = {how: refine(rows, start, how, steps=30)[1]["kl"].iloc[-1] for how in ("bohning", "accelerated", "lbfgs")}
    optimum = refine(rows, start, "lbfgs", steps=120)[1]["kl"].iloc[-1]
    assert optimum <= ends["lbfgs"] < ends["accelerated"] < ends["bohning"]


def test_the_optimum_is_the_same_from_every_start(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> None:
    # More rows than dimensions, and targets no linear map reaches: one minimum.
    rows = harvest(base, expert, prompts, "all", [-1], progress=False)
    ends = [refine(rows, fit(rows, m, 4), "lbfgs", steps=150)[1]["kl"].iloc[-1] for m in ("v1", "rrr")]
    assert ends[0] == pytest.approx(ends[1], rel=2e-2)


def test_an_expert_in_the_family_is_found(base: LanguageModel, synthetic: SyntheticExpert, prompts: Probes) -> None:
    rows = harvest(base, synthetic, prompts, "all", [-1], progress=False)
    start = fit(rows, "v1", 4)
    refined = refine(rows, start, "lbfgs", steps=100)[0]
    assert evaluate(base, synthetic, refined, rows)["recovered"].iloc[-1] > 0.95


def test_a_refined_adapter_still_knows_what_it_was_fitted_on(rows: Activations, tmp_path: object) -> None:
    refined = refine(rows, fit(rows, "v1", 4), "bohning", steps=1)[0]
    assert refined.fitted_on == rows.probes.fingerprints
    again = Adapter.load(refined.save(f"{tmp_path}/kept"), rows.base)
    assert torch.equal(again.up, refined.up)


def test_what_cannot_be_refined_is_said(
    rows: Activations, activations: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = fit(rows, "rrr", 4)
    with refused("newton", "bohning", "lbfgs"):
        refine(rows, start, "newton")
    with refused("steps = 0"):
        refine(rows, start, "bohning", steps=0)
    with refused("rate = 0"):
        refine(rows, start, "near", rate=0)
    with monkeypatch.context() as memory, refused("GiB", "fewer prompts"):
        memory.setattr("refinement.available", lambda: 2**16)
        refine(rows, start, "near")
    for wrong in (fit(rows, "lens"), fit(activations, "rrr", layer=1), into_hidden(start, rows.base)):
        with refused(wrong.method, "final layer"):
            refine(rows, wrong, "bohning")


def test_near_stays_where_it_starts_under_a_large_penalty_and_else_meets_its_certificate(rows: Activations) -> None:
    start = fit(rows, "rrr", lam=1.0)
    began = refine(rows, start, "near", steps=1, rate=1e9)[1]["kl"]
    assert began.iloc[-1] == pytest.approx(began[0], abs=1e-6)
    few, many = (refine(rows, start, "near", steps=steps, rate=4.0)[1] for steps in (10, 60))
    gained = [course["kl"][0] - course["kl"].iloc[-1] for course in (few, many)]
    assert few["passes"].iloc[1] >= 3, "one to set up, one where it starts, one more at least"
    assert (few["passes"].diff().iloc[2:] >= 1).all() and (few["seconds"].diff().dropna() > 0).all()
    assert 0 < many["within"].iloc[-1] < 1e-3 * gained[1], "the last step is certified"
    assert few["within"].iloc[-1] < few["within"].iloc[1], "and nearer than the first one"
    assert 0 < gained[0] == pytest.approx(gained[1], rel=1e-2), "ten steps are within a hundredth of the optimum"


def test_near_stays_at_the_optimum(base: LanguageModel, synthetic: SyntheticExpert, prompts: Probes) -> None:
    rows = harvest(base, synthetic, prompts, "all", [-1], progress=False)
    start = fit(rows, "rrr", lam=1e-9)
    refined, course = refine(rows, start, "near", steps=5)
    assert course["within"].iloc[-1] < 1e-6
    assert course["kl"].abs().max() < 1e-6 and refined.method == "near"


def test_every_adapter_on_the_way_is_the_one_that_its_row_tells_of(rows: Activations) -> None:
    start = fit(rows, "v1", 4)
    walk = [*refined(rows, start, "near", steps=3, rate=4.0)]
    last, course = refine(rows, start, "near", steps=3, rate=4.0)
    assert walk[0][0] is start and [row["step"] for _, row in walk] == [0, 1, 2, 3] == [*course["step"]]
    assert torch.equal(walk[-1][0].bias, last.bias) and walk[-1][0].columns is None
    held = evaluate(rows.base, rows.expert, [one.named(f"step {n}") for n, (one, _) in enumerate(walk)], rows)
    told = [row["kl"] for _, row in walk]
    assert held["kl"].iloc[1:].tolist() == pytest.approx(told, rel=1e-4) == course["kl"].tolist()
