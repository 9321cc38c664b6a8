"""Natural-gradient edits and bridges between meanings: what is said of them is what `evaluate` measures."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import refused

from chassis_utils import (
    Adapter,
    Bridge,
    ForeignExpert,
    LanguageModel,
    Probes,
    evaluate,
    harvest,
    load,
    probe_set,
)
from chassis_utils.tokens import token_bytes
from natural import chunks, natural
from semantic import (
    STRENGTHS,
    adapted,
    bytes_first,
    embeddings,
    ends,
    gains,
    half_way,
    hidden_to_hidden,
    judged,
    over,
    target,
)

TEXT = probe_set("math-text", "train", 20)
LENGTHS = [100] * len(TEXT)


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def foreign(base: LanguageModel) -> ForeignExpert:
    return ForeignExpert(Bridge(load("pocket-phi", device="cpu"), base, "C"), TEXT)


def test_what_is_told_of_a_part_is_the_kl_of_the_edits_before_it(base: LanguageModel, foreign: ForeignExpert) -> None:
    parts = chunks(TEXT, LENGTHS, 500)
    told, adapters = [], [Adapter.identity(base)]
    for _, kl, adapter in natural(base, foreign, parts, rate=0.01, tail=math.inf, batch_tokens=700):
        told.append(kl)
        adapters.append(adapter)
    for part, kl, adapter in zip(parts, told, adapters, strict=False):
        measured = evaluate(base, foreign, adapter, part, positions="all", allow_overlap=True)["kl"].iloc[-1]
        assert kl == pytest.approx(measured, rel=1e-4)


def test_the_edits_are_a_mean_of_the_steps_which_count_more_the_later(
    base: LanguageModel, foreign: ForeignExpert
) -> None:
    """The steps themselves do not know of it, and up to `tail` of them it is the last one."""
    parts = [replace(TEXT, prompts=TEXT.prompts[i : i + 2]) for i in range(0, 8, 2)]

    def course(tail: float) -> list[torch.Tensor]:
        edits = (adapter.edits[-1] for _, _, adapter in natural(base, foreign, parts, rate=0.01, tail=tail))
        return [torch.cat([edit.down @ edit.up, edit.bias[None]]) for edit in edits]

    steps, means, late = course(math.inf), course(2), course(4)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(steps, late, strict=True))
    wanted = [steps[0], steps[1], steps[1] / 3 + steps[2] * 2 / 3]  # t gets 2 / t: all, all, two thirds, a half
    wanted.append((wanted[2] + steps[3]) / 2)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(means, wanted, strict=True))
    assert not torch.allclose(means[3], steps[3], atol=1e-3 * float(steps[3].abs().max()))


def test_batches_change_nothing_and_the_base_stays_as_it_was(base: LanguageModel, foreign: ForeignExpert) -> None:
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    part = [replace(TEXT, prompts=TEXT.prompts[:4])]
    ways = [[*natural(base, foreign, part, batch_tokens=n)][-1][2].edits for n in (256, 4096)]
    for one, two in zip(*ways, strict=True):
        assert torch.allclose(one.down @ one.up, two.down @ two.up, atol=1e-5)
        assert torch.allclose(one.bias, two.bias, atol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.state_dict().items())


def test_a_small_step_lowers_the_kl_where_it_was_taken_and_an_expert_of_the_same_shape_will_do(
    base: LanguageModel,
) -> None:
    math = load("pocket-math", device="cpu")
    ((_, before, adapter),) = natural(base, math, [TEXT], rate=0.01)
    after = evaluate(base, math, adapter, TEXT, positions="all", allow_overlap=True)
    assert after["kl"].iloc[-1] < before == pytest.approx(after["kl"].iloc[0], rel=1e-4)


def test_parts_hold_every_prompt_once_and_are_long_enough() -> None:
    lengths = [10 * (1 + i % 5) for i in range(len(TEXT))]
    parts = chunks(TEXT, lengths, 70, seed=3)
    read = [prompt for part in parts for prompt in part.prompts]
    assert len(read) == len(set(read)) and set(read) <= set(TEXT.prompts)
    at = dict(zip(TEXT.prompts, lengths, strict=True))
    assert all(sum(at[prompt] for prompt in part.prompts) >= 70 for part in parts)
    assert sum(lengths) - sum(at[prompt] for prompt in read) < 70
    assert chunks(TEXT, lengths, 70, seed=4) != parts
    with refused("1000000", "more text"):
        chunks(TEXT, lengths, 1_000_000)


def test_bridges_of_the_bases_own_states_give_the_base(base: LanguageModel) -> None:
    """Where the expert is the base itself, its states are the base's, and so is what its bytes say."""
    own = ForeignExpert(Bridge(base, base, "A"))
    a = harvest(base, own, TEXT, "all", [-1], progress=False)
    plain = base.readout(a.hidden[a.final]).log_softmax(-1)
    for answer in (hidden_to_hidden(a, lam=1e-9), bytes_first(a)):
        assert float((answer(a).log_softmax(-1) - plain).abs().max()) < 0.05


def test_the_next_byte_is_the_experts_and_the_token_within_it_the_bases(
    base: LanguageModel, foreign: ForeignExpert
) -> None:
    a = harvest(base, foreign, replace(TEXT, prompts=TEXT.prompts[:2]), "all", [-1], progress=False)
    meet = a.expert_hidden[:, -1] > 0
    said, own = bytes_first(a)(a).softmax(-1), base.readout(a.hidden[a.final]).softmax(-1)
    theirs = foreign.model.readout(a.expert_hidden[:, : foreign.model.hidden_size]).softmax(-1)
    assert torch.allclose(said[~meet], own[~meet], atol=1e-6)
    beginning = [[(piece or b"")[:1] for piece in token_bytes(model.tokenizer)] for model in (base, foreign.model)]
    # Tokens of no text, such as its end, begin with no byte: of these the base is asked.
    texts = [
        [i for i, b in enumerate(first[: p.shape[1]]) if b] for p, first in zip((said, theirs), beginning, strict=True)
    ]
    said, theirs = (
        p[meet] / p[meet][:, some].sum(1, keepdim=True) for p, some in zip((said, theirs), texts, strict=True)
    )
    for byte in (b" ", b"1", b"t", b"\n"):
        here, there = ([i for i, b in enumerate(first) if b == byte] for first in beginning)
        here, there = [i for i in here if i < base.vocab_size], [i for i in there if i < foreign.model.vocab_size]
        assert torch.allclose(said[:, here].sum(1), theirs[:, there].sum(1), atol=2e-3)
        within = said[:, here] / said[:, here].sum(1, keepdim=True)
        assert torch.allclose(within, own[meet][:, here] / own[meet][:, here].sum(1, keepdim=True), atol=1e-3)


def test_embeddings_of_the_same_head_are_products_with_it(base: LanguageModel) -> None:
    """Every token is paired with the one that is written for its bytes, here itself, so the map changes nothing."""
    own = ForeignExpert(Bridge(base, base, "A"))
    a = harvest(base, own, replace(TEXT, prompts=TEXT.prompts[:2]), "all", [-1], progress=False)
    head = base.readout.weight - base.readout.weight.mean(0)
    products = base.readout(a.hidden[a.final]).softmax(-1) @ head @ head.T
    said = embeddings(a, lam=1e-9)(a)
    off = [float((said - strength * products).norm() / (strength * products).norm()) for strength in STRENGTHS]
    assert min(off) < 0.1  # of the bytes that several tokens stand for, only one is written


def test_ends_tell_places_of_either_kind_and_where_the_bridge_is_the_base(
    base: LanguageModel, foreign: ForeignExpert
) -> None:
    a = harvest(base, foreign, TEXT, "all", [-1], progress=False)
    table, there = ends(a).set_index("where"), a.next_token >= 0
    meet = a.expert_hidden[:, -1] > 0
    assert table["places"].tolist() == [int((meet & there).sum()), int((~meet & there).sum())]
    inside, both = table.loc["inside a token"], table.loc["both have an end"]
    assert inside["bridge"] == pytest.approx(inside["base"], abs=1e-5) and both["bridge"] < both["base"]


def test_half_way_is_where_the_last_stretch_reaches_it() -> None:
    grows = pd.DataFrame({"positions": [10, 100, 1000], "closed": [0.1, 0.2, 0.3]})
    assert "100,000" in half_way(grows)  # a tenth more for ten times the text
    assert "after 1,000" in half_way(grows.assign(closed=[0.1, 0.2, 0.6])) and "Half" in half_way(grows + 0.5)
    assert "no more text" in half_way(pd.DataFrame({"positions": [500, 1000], "closed": [0.2, 0.2]}))


def test_judged_agrees_with_evaluate(base: LanguageModel, foreign: ForeignExpert) -> None:
    a = harvest(base, foreign, TEXT, "all", [-1], progress=False)
    rows = judged(a, {"identity": lambda a: base.readout(a.hidden[a.final]), "bridge": target})
    known = evaluate(base, foreign, [], a).iloc[0]
    for name in ("kl", "kl_identity", "kl_low", "kl_high", "bits_per_byte"):
        assert rows[name].iloc[0] == pytest.approx(known[name], rel=1e-5)
    assert rows["kl"].iloc[1] == pytest.approx(0, abs=1e-9) and rows["recovered"].iloc[0] == pytest.approx(0, abs=1e-9)


def test_gains_are_the_share_of_evaluate_by_prompt(base: LanguageModel, foreign: ForeignExpert) -> None:
    """Of an adapter with edits too, in any order of the prompts; the quotient of a share by itself is one, for sure."""
    *_, (_, _, edits) = natural(base, foreign, chunks(TEXT, LENGTHS, 500), rate=0.01)
    held = probe_set("math-text", "val", 6)
    a = harvest(base, foreign, held, "all", [-1], progress=False)
    row = evaluate(base, foreign, edits, held, positions="all").iloc[-1]
    sums = gains(a, adapted(edits))
    assert len(sums) == len(held)
    assert sum(sums) / len(a) == pytest.approx(row["kl_identity"] - row["kl"], rel=1e-5)
    other = replace(held, prompts=held.prompts[::-1])
    back = gains(harvest(base, foreign, other, "all", [-1], progress=False), adapted(edits))
    assert back[::-1] == pytest.approx(sums, rel=1e-4)
    assert over(sums, sums) == pytest.approx((1, 1, 1))
    whole = gains(a, target)
    assert over(sums, whole)[2] == pytest.approx(row["recovered"], rel=1e-5)
    assert over(sums, whole)[:2] == pytest.approx((row["recovered_low"], row["recovered_high"]), rel=1e-4)
    with refused("6", "5", "same"):
        over(sums, whole[1:])
    assert all(math.isnan(end) for end in over(sums, [-gained for gained in whole])), "no share to be a part of"


def test_embeddings_and_states_need_an_expert_of_another_tokenizer(base: LanguageModel) -> None:
    a = harvest(base, load("pocket-math", device="cpu"), Probes("one", "train", ("Ada has",)), "all", progress=False)
    for bridge in (hidden_to_hidden, embeddings, bytes_first):
        with refused("pocket-math", "ForeignExpert"):
            bridge(a)(a)
