"""Experts with another tokenizer against loops over their tokens, and what is fitted to them against plain descent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import refused
from test_edits import Push
from torch.nn.functional import kl_div

from chassis_utils import (
    Adapter,
    Bridge,
    Features,
    ForeignExpert,
    LanguageModel,
    Probes,
    evaluate,
    fit,
    harvest,
    load,
    probe_set,
    solve,
)
from chassis_utils.activations import tokenize
from chassis_utils.distill import PENALTIES
from chassis_utils.solve import kl_fit
from chassis_utils.statistics import gather
from chassis_utils.tokens import token_bytes

TEXT = probe_set("math-text", "train", 12)


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-base", device="cpu"), load("pocket-phi", device="cpu")


def prefixes(model: LanguageModel, text: str) -> list[bytes]:
    """What has been read behind each token of a text; a space that the tokenizer puts before it left out."""
    pieces, read, found = token_bytes(model.tokenizer), b"", []
    for i in model.tokenizer(text)["input_ids"]:
        read += pieces[i] or b""
        found.append(read)
    return [one.removeprefix(b" ") for one in found] if read == b" " + text.encode() else found


def test_it_is_known_where_both_have_read_the_same_bytes(models: tuple[LanguageModel, LanguageModel]) -> None:
    base, phi = models
    probes = Probes("three", "train", ("Ada has 12 apples — or 13?", " é", TEXT.prompts[0]))
    a = harvest(base, ForeignExpert(Bridge(phi, base, "C")), probes, "all", progress=False)
    wanted = [one in prefixes(phi, text) for text in probes.prompts for one in prefixes(base, text)]
    assert a.expert_hidden[:, -1].tolist() == wanted
    assert 0 < sum(wanted) < len(wanted)


def test_what_it_says_is_the_rule_and_the_base_where_it_says_nothing(
    models: tuple[LanguageModel, LanguageModel],
) -> None:
    base, phi = models
    bridge = Bridge(phi, base, "C")
    a = harvest(base, ForeignExpert(bridge), replace(TEXT, prompts=TEXT.prompts[:1]), "all", progress=False)
    said, own = a.expert.readout(a.expert_hidden).exp(), base.readout(a.hidden[a.final]).softmax(-1)
    meet = a.expert_hidden[:, -1] > 0
    assert torch.allclose(said.sum(1), torch.ones(len(said)), atol=1e-4)
    assert torch.allclose(said[~meet], own[~meet], atol=1e-6)
    text, placed = prefixes(base, TEXT.prompts[0]), []
    rows = meet.nonzero()[5:40:7, 0].tolist()
    for row in rows:
        theirs = prefixes(phi, TEXT.prompts[0])
        ids = phi.tokenizer(TEXT.prompts[0])["input_ids"]
        last = max(k for k, one in enumerate(theirs) if one == text[row])
        with torch.inference_mode():
            there = phi.model(torch.tensor([ids[: last + 1]])).logits[0, -1, : phi.vocab_size].softmax(-1)
        found = [0.0] * base.vocab_size
        for i, p in enumerate(there.tolist()):
            for t in bridge.table[[i]].nonzero()[1]:
                if t < base.vocab_size:
                    found[t] += p * bridge.table[i, t]
        known = np.asarray(bridge.table[:, : base.vocab_size].sum(0)).ravel() > 0
        left = float(own[row][torch.from_numpy(known)].sum())
        placed.append(
            [found[t] / sum(found) * left if known[t] else float(own[row, t]) for t in range(base.vocab_size)]
        )
    assert torch.allclose(said[rows], torch.tensor(placed, dtype=said.dtype), atol=1e-5)


def test_counts_lead_to_the_tokens_that_follow_in_the_text(models: tuple[LanguageModel, LanguageModel]) -> None:
    base, phi = models
    bridge = Bridge(phi, base, "A")
    table = ForeignExpert(bridge, TEXT).readout.table.T.toarray()
    counts = np.asarray(bridge.table[:, : base.vocab_size].todense()).copy()
    for text in TEXT.prompts:
        ours, theirs = prefixes(base, text), prefixes(phi, text)
        ids, their_ids = (model.tokenizer(text)["input_ids"] for model in (base, phi))
        for n in range(len(ids) - 1):
            if ours[n] in theirs:
                k = max(k for k, one in enumerate(theirs) if one == ours[n])
                counts[their_ids[k + 1], ids[n + 1]] += 1
    reached = counts.sum(1) > 0
    assert np.allclose(table[reached], counts[reached] / counts[reached].sum(1, keepdims=True), atol=1e-6)
    assert not table[~reached].any()


def test_with_the_bases_own_tokenizer_nothing_is_lost(models: tuple[LanguageModel, LanguageModel]) -> None:
    base, math = models[0], load("pocket-math", device="cpu")
    probes = replace(TEXT, prompts=TEXT.prompts[:2])
    foreign = ForeignExpert(Bridge(math, base, "A"), probes)
    there, plain = (harvest(base, expert, probes, "all", progress=False) for expert in (foreign, math))
    assert (there.expert_hidden[:, -1] == 1).all()
    said, wanted = foreign.readout(there.expert_hidden), math.readout(plain.expert_hidden).log_softmax(-1)
    # What no token's bytes lead to (part of a character, special tokens) keeps the base's opinion.
    unknown = 1 - wanted.exp()[:, np.diff(foreign.readout.table.indptr) > 0].sum(1)
    off, known = kl_div(said, wanted, log_target=True, reduction="none").sum(1), unknown < 1e-3
    assert int(known.sum()) > len(said) / 2 and float(off[known].max()) <= 0.01


@pytest.mark.parametrize("positions", ["last", "all"])
def test_batches_and_padding_change_nothing(models: tuple[LanguageModel, LanguageModel], positions: str) -> None:
    base, phi = models
    expert = ForeignExpert(Bridge(phi, base, "C"), TEXT)
    ways = ({"batch_tokens": 4096}, {"batch_tokens": 300, "padding": "left"})
    one, two = (harvest(base, expert, TEXT, positions, [-1], progress=False, **way) for way in ways)
    assert torch.allclose(one.expert_hidden, two.expert_hidden, atol=1e-4)
    assert len(one) == (len(TEXT) if positions == "last" else sum(map(len, tokenize(base, TEXT)[0])))


def test_an_adapter_to_it_helps_on_other_text_and_is_kept_in_a_file(
    models: tuple[LanguageModel, LanguageModel], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, phi = models
    expert = ForeignExpert(Bridge(phi, base, "C"), TEXT)
    a = harvest(base, expert, probe_set("math-text", "train", 16), "all", [-1, -2], progress=False)
    adapter = fit(a, passes=4)
    assert adapter.method == "v2" and adapter.info["held_out_kl"] > 0
    val = harvest(base, expert, probe_set("math-text", "val", 6), "all", adapter.reads, progress=False)
    rows = evaluate(base, expert, adapter, val)
    assert rows["recovered"].iloc[-1] > 0.02
    # The penalty is better than those beside it, and given by hand it leads to the same map, in blocks of any size.
    at = PENALTIES.index(adapter.info["lam"])
    assert 0 < at < len(PENALTIES) - 1
    monkeypatch.setattr(solve, "LOGITS", 500_000)
    larger, chosen, smaller = (fit(a, lam=lam, passes=4) for lam in PENALTIES[at - 1 : at + 2])
    torch.testing.assert_close(chosen.down @ chosen.up, adapter.down @ adapter.up, atol=1e-3, rtol=1e-3)
    assert adapter.info["held_out_kl"] < min(larger.info["held_out_kl"], smaller.info["held_out_kl"])
    path = adapter.save(tmp_path / "kept")  # type: ignore[operator]
    again = Adapter.load(path or tmp_path / "kept")  # type: ignore[operator]
    assert torch.equal(again.logits(base, val.hidden), adapter.logits(base, val.hidden))


def test_its_rows_on_an_edited_base_are_those_of_a_new_harvest(models: tuple[LanguageModel, LanguageModel]) -> None:
    base, phi = models
    expert, few = ForeignExpert(Bridge(phi, base, "C")), replace(TEXT, prompts=TEXT.prompts[:3])
    bare = harvest(base, expert, few, "all", [2, -1], progress=False)
    port = base.edited(Push(1, torch.linspace(-1, 1, base.hidden_size)))
    anew = harvest(port, expert, few, "all", [-1], progress=False)
    moved = bare.on(port)
    # What it says goes by the bare base, whatever the port does.
    assert torch.equal(moved.expert_hidden, anew.expert_hidden) and torch.equal(moved.expert_hidden, bare.expert_hidden)
    assert torch.equal(moved.layer(-1), anew.layer(-1)) and not torch.equal(moved.layer(-1), bare.layer(-1))


def test_what_cannot_be_is_refused(models: tuple[LanguageModel, LanguageModel]) -> None:
    base, phi = models
    with refused("stage A, B or C"):
        ForeignExpert(Bridge(phi, base))
    for text in ("a text", ["a text"]):
        with refused(type(text).__name__, "give Probes"):
            ForeignExpert(Bridge(phi, base, "C"), text)
    expert = ForeignExpert(Bridge(phi, base, "C"))
    other = load("pocket-math", device="cpu")
    with refused("pocket-base", "pocket-math", "bridge"):
        harvest(other, expert, TEXT, "all", progress=False)
    a = harvest(base, expert, replace(TEXT, prompts=TEXT.prompts[:9]), "all", [-1], progress=False)
    counted = ForeignExpert(Bridge(phi, base, "C"), probe_set("math-text", "test", 2))
    leaked = fit(harvest(base, counted, TEXT, "all", [-1], progress=False), lam=16.0, passes=1)
    with refused("2 prompts", "fitted on"):
        evaluate(base, counted, leaked, counted.text, positions="all")
    for method in ("ridge", "rrr", "v1"):
        with refused("v2", phi.name):
            fit(a, method)
    with refused("v2", "blocks, metric", "passes"):
        fit(a, blocks=False, metric="data")
    with refused("16", "above zero"):
        fit(a, lam=-16.0)
    with refused("prompts", "give more"):
        fit(harvest(base, expert, replace(TEXT, prompts=TEXT.prompts[:7]), "all", [-1], progress=False))
    with refused("harvest"):
        gather(base, expert, TEXT, Features((base.num_layers,)), progress=False)


@pytest.mark.parametrize("bend", [None, 4.0])
def test_least_kl_is_where_descent_ends_within_what_is_proved_and_scales_of_columns_change_nothing(
    bend: float | None,
) -> None:
    torch.manual_seed(0)
    x, basis = torch.randn(300, 5), torch.randn(3, 11)
    own, target = torch.randn(300, 11), torch.randn(300, 11).softmax(-1)
    lam, cap = 0.3, lambda logits: bend * torch.tanh(logits / bend) if bend else logits

    def solved(x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        found = []
        kl_fit(x, lambda rows: (own[rows], target[rows]), basis, lam, lambda *one: found.append(one), 200, cap)
        return found

    course = solved(x)
    weight, bias, within = course[-1]
    assert within < 1e-6 < course[0][2], "float32 over 300 rows goes no further"
    # The same objective, written down once more and lowered from elsewhere by plain steps.
    size = x.double().square().mean(0).sqrt()
    mean = target.double() @ basis.double().T
    curvature = (basis.double() * target.double().mean(0)) @ basis.double().T - mean.T @ mean / 300
    root = torch.linalg.cholesky(curvature)

    def objective(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ours = cap(own.double() + (x.double() @ weight + bias) @ basis.double()).log_softmax(-1)
        change = torch.cat([weight * size[:, None], bias[None]]) @ root
        return kl_div(ours, target.double(), reduction="sum") / 300 + lam / 2 * change.square().sum()

    free = [
        torch.randn(5, 3, dtype=torch.float64).requires_grad_(),
        torch.zeros(3, dtype=torch.float64).requires_grad_(),
    ]
    search = torch.optim.LBFGS(free, max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = objective(*free)
        value.backward()
        return value

    search.step(closure)
    least = float(objective(*free).detach())
    above = [float(objective(weight.double(), bias.double())) - least for weight, bias, _ in course]
    assert above[-1] <= 1e-6 < above[0]
    if not bend:  # convex
        assert all(gap <= proved + 1e-9 for gap, (*_, proved) in zip(above, course, strict=True))
    other, shift, _ = solved(x * torch.tensor([1.0, 10, 0.1, 1, 3]))[-1]
    assert torch.allclose(other * torch.tensor([1.0, 10, 0.1, 1, 3])[:, None], weight, atol=1e-3)
    assert torch.allclose(shift, bias, atol=1e-3)
