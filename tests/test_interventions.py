"""Pages 13 and 14: the bias alone, what moves, samples that share their noise, and figures whose controls work."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import refused

from chassis_utils import Activations, Adapter, LanguageModel, Probes, evaluate, fit, harvest, probe_set
from chassis_utils.probes import TEMPLATES
from chassis_utils.tokens import token_bytes
from interventions import (
    OTHERWISE,
    bias_only,
    continued,
    joined,
    moved_tokens,
    own_bits,
    rank_figure,
    reworded,
    strength_figure,
    tokens_figure,
)
from plugs import BiasExpert


@pytest.fixture(scope="module")
def slope(base: LanguageModel) -> BiasExpert:
    return BiasExpert.from_base(base, "slope", torch.linspace(-3, 3, base.vocab_size))


def test_the_bias_alone_is_exact_on_text_it_has_not_seen_and_has_no_rank(
    base: LanguageModel, slope: BiasExpert, prompts: Probes, unseen: Probes
) -> None:
    adapter = bias_only(harvest(base, slope, prompts, progress=False))
    rows = evaluate(base, slope, adapter, unseen, positions="all")
    assert adapter.rank == 0 and adapter.num_parameters == base.vocab_size
    assert rows["kl"][1] < 1e-9 < rows["kl"][0]


def test_the_bias_alone_is_the_mean_difference_of_logits(activations: Activations) -> None:
    a = activations
    mean = (a.expert.readout(a.expert_hidden).double() - a.base.readout(a.hidden[a.final]).double()).mean(0)
    torch.testing.assert_close(bias_only(a).bias.double(), mean - mean.mean(), atol=1e-4, rtol=1e-4)
    with refused("fitted on"):
        evaluate(a.base, a.expert, bias_only(a), Probes("x", "test", a.probes.prompts[:3]))


def test_joined_sets_keep_every_prompt_and_mix_them() -> None:
    sets = [probe_set("mixed", n=64), probe_set("unseen", n=16)]
    both = joined("both", *sets)
    assert sorted(both.prompts) == sorted(sets[0].prompts + sets[1].prompts) and both.split == "train"
    few = set(sets[1].prompts)
    assert all(few & set(both.prompts[first : first + 10]) for first in range(0, 80, 10))


def test_reworded_prompts_are_of_no_template_and_judged_as_such() -> None:
    fitted = [probe_set(name).fingerprints for name in TEMPLATES]
    for name in OTHERWISE:
        probes = reworded(name, 30)
        assert probes.split == "template" and len(probes.fingerprints) == 30
        assert not any(probes.fingerprints & those for those in fitted)


def test_bits_per_byte_of_the_expert_are_those_it_has_as_a_base(
    base: LanguageModel, expert: LanguageModel, unseen: Probes
) -> None:
    a = harvest(base, expert, unseen, "all", progress=False)
    as_base = evaluate(expert, base, [], unseen, positions="all")["bits_per_byte"][0]
    assert own_bits(a) == pytest.approx(as_base, rel=1e-5)


def test_greedy_continuations_are_those_of_the_model_itself(base: LanguageModel) -> None:
    prompts = ["The river rises in the hills and runs past nine towns", "What"]
    ours = continued(base, prompts, length=12, temperature=0)
    pieces = token_bytes(base.tokenizer)
    for prompt, text in zip(prompts, ours, strict=True):
        ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
        stop, n = base.tokenizer.eos_token_id, ids.shape[1]
        for _ in range(12):
            logits = base.model(ids).logits[0, -1, : base.vocab_size]
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        told = ids[0, n:].tolist()
        told = told[: told.index(stop)] if stop in told else told
        assert text == b"".join(pieces[i] or b"" for i in told).decode("utf-8", "replace")


def test_who_says_the_same_writes_the_same(base: LanguageModel, activations: Activations) -> None:
    prompts = ["The sea", "In the year 12 the council met and"]
    plain = continued(base, prompts, seed=3)
    assert continued(base, prompts, Adapter.identity(base), seed=3) == plain
    assert continued(base, prompts[::-1], seed=3) != plain[::-1]  # the noise goes with the place
    assert continued(base, prompts, seed=4) != plain != continued(base, prompts, fit(activations, "rrr"), seed=3)


def test_samples_follow_the_distribution(base: LanguageModel) -> None:
    ids = base.tokenizer("The sea", return_tensors="pt")["input_ids"]
    wanted = (base.model(ids).logits[0, -1, : base.vocab_size] / 0.5).softmax(-1)
    said = continued(base, ["The sea"] * 2000, length=1, temperature=0.5)
    pieces = token_bytes(base.tokenizer)
    for i in wanted.topk(3).indices.tolist():
        alike = [j for j, piece in enumerate(pieces[: base.vocab_size]) if piece == pieces[i]]
        share, p = said.count(pieces[i].decode("utf-8", "replace")) / 2000, float(wanted[alike].sum())
        assert abs(share - p) < 4 * (p * (1 - p) / 2000) ** 0.5 + 1e-3


def test_the_tokens_that_move_most_come_first(base: LanguageModel, slope: BiasExpert, prompts: Probes) -> None:
    a = harvest(base, slope, prompts, progress=False)
    frame = moved_tokens({"all": a}, {"all": [bias_only(a)]}, n=5)
    ours, theirs = (m.readout(h).softmax(-1).mean(0) for m, h in ((base, a.hidden[a.final]), (slope, a.expert_hidden)))
    wide = frame.pivot(index="place", columns="method", values="probability")
    assert (wide["expert"] - wide["identity"]).abs().tolist() == pytest.approx(
        sorted((theirs - ours).abs().tolist(), reverse=True)[:5], abs=1e-5
    )
    assert wide["bias_only"].tolist() == pytest.approx(wide["expert"].tolist(), abs=1e-5)


def test_the_menu_of_tokens_names_them_anew(base: LanguageModel, slope: BiasExpert, prompts: Probes) -> None:
    sets = {"front": harvest(base, slope, prompts, progress=False)}
    sets["back"] = sets["front"].against(BiasExpert.from_base(base, "back", -torch.linspace(-3, 3, base.vocab_size)))
    frame = moved_tokens(sets, dict.fromkeys(sets, []), n=4)
    figure = tokens_figure(frame, "What moves")
    assert [trace.visible for trace in figure.data] == [trace.meta[0] == "front" for trace in figure.data]
    names = {label: rows.drop_duplicates("place")["token"].tolist() for label, rows in frame.groupby("label")}
    assert list(figure.layout.yaxis.ticktext) == names["front"] != names["back"]
    front, back = figure.layout.updatemenus[0].buttons
    assert list(back.args[1]["yaxis.ticktext"]) == names["back"] and list(front.args[0]["visible"]).count(True) == 2
    with refused("no tokens of 'side'", "front"):
        tokens_figure(frame, "What moves", "side")


def measured(**columns: object) -> pd.DataFrame:
    """What `evaluate` would return: identity at KL 1 and two methods, on two probe sets."""
    rows = [
        {"method": m, "rank": r, "probes": p, "split": "test", "kl": kl, "kl_identity": 1.0, "recovered": 1 - kl}
        for m, r, kl in (("identity", None, 1.0), ("v1", 4, 0.9), ("rrr", 4, 1e-15)) for p in ("one", "two")
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(n=10, bits_per_byte=[1.5, 1.6, 1.7, 1.8, 1.9, 2.0], **columns)


def test_the_slider_shows_one_strength_and_the_menu_moves_the_marks() -> None:
    figure = strength_figure(pd.concat([measured(strength=s) for s in (1.0, 4.0)]), "By strength")
    assert {trace.meta[1] for trace in figure.data if trace.visible} == {4.0}
    (slider,), (menu,) = figure.layout.sliders, figure.layout.updatemenus
    assert [step.label for step in slider.steps] == ["1", "4"] and slider.active == 1
    assert list(slider.steps[0].args[0]["visible"]) == [trace.meta[1] == 1.0 for trace in figure.data]
    shown = {trace.meta[0]: list(trace.x) for trace in figure.data if trace.visible}
    assert shown == {"identity": [1, 1], "v1": [0.9, 0.9], "rrr": [1e-9, 1e-9]}
    share = menu.buttons[1]
    assert share.label == "recovered" and share.args[0]["x"][2] == [1, 1]
    assert share.args[1]["xaxis.type"] == "linear"


def test_a_slider_of_doubtful_rows_is_refused() -> None:
    with refused("two rows"):
        strength_figure(pd.concat([measured(strength=1.0)] * 2), "By strength")
    with refused("strength"):
        strength_figure(measured(), "By strength")
    with refused("no quantity 'x'"):
        strength_figure(measured(strength=1.0), "By strength", "x")


def test_the_target_is_shown_for_kl_alone_and_bits_in_every_hover() -> None:
    frame = measured(expert="e").query("probes == 'one'")
    figure = rank_figure(pd.concat([frame, frame.assign(expert="f")]), "By rank", (1e-3, 1e-2))
    assert figure.layout.shapes[0].y0 == 1e-3 and figure.layout.shapes[0].visible
    buttons = {button.label: button.args for menu in figure.layout.updatemenus for button in menu.buttons}
    assert {"e", "f"} <= buttons.keys()
    quantities = {label: args[1] for label, args in buttons.items() if label not in "ef"}
    assert quantities["recovered"]["shapes[0].visible"] is False and quantities["KL (log)"]["shapes[0].visible"]
    assert not rank_figure(frame, "By rank", (1e-3, 1e-2), "recovered").layout.shapes[0].visible
    bits = {trace.meta[0]: trace.customdata[0][5] for trace in figure.data if trace.meta[2] == "e"}
    assert bits == {"identity": 1.5, "v1": 1.7, "rrr": 1.9}
    assert all("bits per byte" in trace.hovertemplate for trace in figure.data)
