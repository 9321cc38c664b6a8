"""Experts that are the base's logits and a bias: exact, found in closed form, chosen by bytes, refused where wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import make, refused

from alignment import into_hidden  # and three methods
from chassis_utils import LanguageModel, Probes, evaluate, fit, gather, harvest, load, probe_set
from chassis_utils.features import Features
from chassis_utils.models import tensor_hash
from plugs import STRENGTHS, BiasExpert, load_expert, log_ratio, personal_gate, tokens_of

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CODE = {
    page.stem: [cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "code"]
    for page in sorted(NOTEBOOKS.glob("*.ipynb"))
}


@pytest.fixture(scope="module")
def pocket() -> LanguageModel:
    return load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def gated(base: LanguageModel) -> BiasExpert:
    """A bias everywhere in the vocabulary and a gate that is open, shut and in between on the prompts."""
    generator = torch.Generator().manual_seed(0)
    bias, gate = (torch.randn(n, generator=generator) for n in (base.vocab_size, base.hidden_size + 1))
    return BiasExpert.from_base(base, "gated", 3 * bias, gate[:, None])


def logits(model: LanguageModel | BiasExpert, hidden: torch.Tensor) -> torch.Tensor:
    return model.readout(hidden).double()


def test_a_bias_is_added_to_every_logit_and_the_base_stays_as_it_was(base: LanguageModel, prompts: Probes) -> None:
    before, bias = tensor_hash(base.readout.weight, base.readout.bias), torch.linspace(-3, 3, base.vocab_size)
    expert = BiasExpert.from_base(base, "slope", bias)
    a = harvest(base, expert, prompts, "all", [-1], progress=False)
    assert torch.equal(a.expert_hidden, a.hidden[a.final])
    torch.testing.assert_close(logits(expert, a.expert_hidden), logits(base, a.expert_hidden) + bias.double())
    assert tensor_hash(base.readout.weight, base.readout.bias) == before
    assert expert.readout.weight is base.readout.weight


def test_a_gated_bias_is_added_as_far_as_the_gate_is_open(
    base: LanguageModel, gated: BiasExpert, prompts: Probes
) -> None:
    before, final = tensor_hash(base.readout.weight, base.readout.bias), base.num_layers
    a = harvest(base, gated, prompts, "all", [-1], progress=False)
    h = a.hidden[final].double()
    wide = torch.cat([h, torch.ones(len(h), 1)], dim=1)
    opened = 1 / (1 + torch.exp(-(wide @ gated.gate.double())))
    assert opened.min() < 0.1 and opened.max() > 0.9
    added = gated.readout.weight[:, -1].double()
    torch.testing.assert_close(
        logits(gated, a.expert_hidden), logits(base, a.hidden[final]) + opened * added, atol=1e-4, rtol=1e-4
    )
    assert tensor_hash(base.readout.weight, base.readout.bias) == before


def test_a_bias_comes_before_the_cap_and_beside_a_bias_of_the_heads_own(tmp_path: Path) -> None:
    for architecture in ("Gemma2", "Phi", "Cohere"):
        model = load(str(make(tmp_path / architecture, architecture)), device="cpu")
        h, bias = torch.randn(5, model.hidden_size), torch.linspace(-1, 1, model.vocab_size)
        expert = BiasExpert.from_base(model, "slope", bias)
        wanted = model.readout.cap(model.readout.linear(h) + bias)
        torch.testing.assert_close(expert.readout(expert.transform(h)), wanted)


@pytest.mark.parametrize("method", ["ridge", "rrr", "v2"])
def test_every_closed_form_finds_a_bias(base: LanguageModel, prompts: Probes, unseen: Probes, method: str) -> None:
    expert = BiasExpert.from_base(base, "slope", torch.linspace(-3, 3, base.vocab_size))
    adapter = fit(harvest(base, expert, prompts, "all", progress=False), method)
    rows = evaluate(base, expert, adapter, unseen)
    assert rows["kl"][1] < 1e-9 and rows["kl"][0] > 0.1


def test_states_of_the_base_serve_every_such_expert(base: LanguageModel, gated: BiasExpert, prompts: Probes) -> None:
    plain = BiasExpert.from_base(base, "slope", torch.linspace(-3, 3, base.vocab_size))
    a, b = (harvest(base, one, prompts, progress=False) for one in (plain, gated))
    again = a.against(gated)
    assert torch.equal(again.expert_hidden, b.expert_hidden) and again.expert is gated
    sums = gather(base, gated, prompts, Features((base.num_layers,)), "last", progress=False)
    assert len(sums) == len(a) and sums.kept[1].shape[1] == 2 * base.hidden_size + 1


def test_an_edited_base_is_compared_with_the_same_expert(
    base: LanguageModel, gated: BiasExpert, prompts: Probes
) -> None:
    a = harvest(base, gated, prompts, progress=False)
    port = base.edited(into_hidden(fit(a.against(gated), "rrr", layer=1), base))
    moved = harvest(port, gated, prompts, progress=False)
    assert not torch.equal(moved.hidden[a.final], a.hidden[a.final])
    torch.testing.assert_close(moved.expert_hidden, a.expert_hidden, atol=1e-4, rtol=1e-4)


def test_tokens_are_chosen_by_their_bytes(base: LanguageModel, pocket: LanguageModel) -> None:
    for model in (base, pocket):
        found, names = tokens_of(model, "0123456789+", ["So"]), model.tokenizer.convert_ids_to_tokens
        assert set(found.tolist()) == {0.0, 1.0} and found.shape == (model.vocab_size,)
        chosen = {names(i) for i in found.nonzero()[:, 0].tolist()}
        # A byte token has the byte, not the digits of its name; a space before is no difference.
        assert {"1", "<0x30>", "<0x2B>"} <= chosen
        assert not {"<0x0A>", "▁", "<s>", "s"} & chosen
    assert {"So", "▁So"} & chosen and "▁+" in chosen


def test_a_style_is_the_log_ratio_of_counts(pocket: LanguageModel) -> None:
    found, logs = log_ratio(pocket, "verse", "prose"), []
    for name in ("verse", "prose"):
        cut = (pocket.tokenizer(text, add_special_tokens=False)["input_ids"] for text in probe_set(name).prompts)
        counts = Counter(i for ids in cut for i in ids)
        every = torch.tensor([counts[i] + 1.0 for i in range(pocket.vocab_size)], dtype=torch.float64)
        logs.append((every / every.sum()).log())
    torch.testing.assert_close(found.double(), logs[0] - logs[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(log_ratio(pocket, "prose", "verse"), -found)


def test_numbers_are_kept_back_only_where_they_are_personal(pocket: LanguageModel) -> None:
    expert, digits = load_expert("safety", pocket), tokens_of(pocket, "0123456789")
    said = {}
    for name in ("personal", "numbers"):
        a = harvest(pocket, expert, probe_set(name, "test", 30), layers=[-1], progress=False)
        said[name] = [(logits(m, h).softmax(-1) @ digits.double()).mean() for m, h in (
            (pocket, a.hidden[a.final]), (expert, a.expert_hidden))]  # fmt: skip
    assert said["personal"][0] > 0.9 and said["personal"][1] < 0.1
    assert min(said["numbers"]) > 0.9


@pytest.mark.parametrize("kind", ["bias", "safety", "style"])
def test_the_same_name_gives_the_same_expert_and_strength_scales_it(pocket: LanguageModel, kind: str) -> None:
    plain, again, weak = (load_expert(k, pocket) for k in (kind, f"{kind}:{STRENGTHS[kind]:g}", f"{kind}:0.5"))
    assert (plain.name, plain.revision) == (again.name, again.revision)
    assert weak.revision != plain.revision and f"{kind}(strength=0.5)" == weak.name
    h = torch.randn(4, pocket.hidden_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = (logits(one, one.transform(h)) - logits(pocket, h) for one in (weak, plain))
    torch.testing.assert_close(ours * STRENGTHS[kind], theirs * 0.5, atol=1e-4, rtol=1e-4)


def test_a_gate_is_fitted_to_the_bare_base(pocket: LanguageModel, prompts: Probes) -> None:
    a = harvest(pocket, load_expert("bias", pocket), prompts, progress=False)
    port = pocket.edited(into_hidden(fit(a.against(load_expert("style", pocket)), "rrr", layer=3), pocket))
    assert torch.equal(personal_gate(port), personal_gate(pocket))


@pytest.mark.parametrize("kind", ["bias", "safety", "style"])
@pytest.mark.parametrize("strength", ["x", "-1", "0", "nan", "inf"])
def test_a_strength_that_is_no_positive_number_is_refused(base: LanguageModel, kind: str, strength: str) -> None:
    with refused(f"'{kind}:{strength}'", "positive strength"):
        load_expert(f"{kind}:{strength}", base)


def test_a_misspelt_kind_with_a_strength_is_refused_with_the_kinds_there_are(pocket: LanguageModel) -> None:
    with refused("'syntetic'", *STRENGTHS):
        load_expert("syntetic:8", pocket)


@pytest.mark.parametrize("page", [page for page, code in CODE.items() if "\nexpert = " in code[0]])
def test_a_page_takes_the_expert_that_it_is_given(page: str, tmp_path: Path) -> None:
    parameters, *first = CODE[page][:3]
    given = f"expert, device, out_dir = 'nowhere', 'cpu', {str(tmp_path)!r}"
    with refused("no model or folder 'nowhere'"):
        exec("\n".join([parameters, given, *first]), {})


def test_biases_and_gates_of_another_shape_are_refused(base: LanguageModel) -> None:
    good, gate = torch.zeros(base.vocab_size), torch.zeros(base.hidden_size + 1, 1)
    for bias, other in ((good[1:], None), (good[:, None], None), (good / 0, None), (good, gate[1:])):
        with refused("odd", base.name, f"{base.vocab_size} finite"):
            BiasExpert.from_base(base, "odd", bias, other)


def test_a_vocabulary_without_such_tokens_is_refused(base: LanguageModel) -> None:
    with refused(base.name, "zebra"):
        tokens_of(base, "", ["zebra", "quagga"])


def test_an_expert_of_another_base_is_refused(base: LanguageModel, gated: BiasExpert, tmp_path: Path) -> None:
    wide = load(str(make(tmp_path / "wide", hidden_size=48)), device="cpu")
    same = load(str(make(tmp_path / "same", num_hidden_layers=3, seed=9)), device="cpu")
    for other in (wide, same):
        with refused("gated", other.name):
            harvest(other, gated, Probes("x", "train", ("The sea",)), progress=False)
    plain = BiasExpert.from_base(wide, "plain", torch.zeros(wide.vocab_size))
    with refused("plain", base.name):
        harvest(base, plain, Probes("x", "train", ("The sea",)), progress=False)


def test_methods_that_need_a_state_of_the_same_size_refuse_a_gate(
    base: LanguageModel, gated: BiasExpert, prompts: Probes
) -> None:
    a = harvest(base, gated, prompts, progress=False)
    for method in ("hidden", "aligned", "projected"):
        with refused("gated", "use a method on logits"):
            fit(a, method)
