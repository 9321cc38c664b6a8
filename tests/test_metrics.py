"""Figures against other libraries and against sums done by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import WORDS, make, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import budgets
from alignment import into_hidden
from budgets import choose_rank, reaching
from chassis_utils import (
    Activations,
    Adapter,
    LanguageModel,
    Probes,
    evaluate,
    fit,
    harvest,
    load,
)
from chassis_utils.metrics import kl, ratio_bounds
from phase import interval
from plugs import SyntheticExpert, exact_adapter
from pocket_recipe import gpt2_tokenizer

TEXTS = ("The river rises in the hills, naïve and cold.", "24 - 9 = 15 rolls are left — 東京.")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 60), st.floats(0.01, 20))
def test_kl_is_everyone_elses(seed: int, vocab: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    expert, ours = (scale * torch.randn(7, vocab, generator=generator) for _ in range(2))
    got = kl(expert, ours)
    p, q = (logits.double().softmax(-1).numpy() for logits in (expert, ours))
    np.testing.assert_allclose(got, scipy.stats.entropy(p, q, axis=1), rtol=1e-8, atol=1e-10)
    batchmean = torch.nn.functional.kl_div(
        ours.double().log_softmax(-1), expert.double().softmax(-1), reduction="batchmean"
    )
    assert float(got.mean()) == pytest.approx(float(batchmean), rel=1e-9)
    assert (got >= -1e-12).all()
    assert kl(expert, expert + 3.5).abs().max() < 1e-5


def test_kl_of_many_rows_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    expert, ours = (torch.randn(53, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    alone = torch.cat([kl(expert[i : i + 1], ours[i : i + 1]) for i in range(53)])
    for logits in (1, 120, 10**6):  # 16 rows at a time, 20, and all of them
        monkeypatch.setattr("chassis_utils.metrics.BLOCK", logits)
        assert torch.equal(kl(expert, ours), alone)


def test_every_figure_is_what_its_name_says(activations: Activations, unseen: Probes) -> None:
    base, expert = activations.base, activations.expert
    adapters = [fit(activations, "rrr", rank) for rank in (2, 16)] + [fit(activations, "v1", 8, layer=1)]
    table = evaluate(base, expert, adapters, unseen)
    assert table.method.tolist() == ["identity", "rrr", "rrr", "v1"]
    assert table["rank"].tolist()[1:] == [2, 16, 8] and table.layer.tolist()[1:] == [3, 3, 1]

    a = harvest(base, expert, unseen, progress=False)
    wanted = expert.readout(a.expert_hidden)
    everyone = [base.readout(a.hidden[3]), *(x.logits(base, a.hidden) for x in adapters)]
    for row, ours in zip(table.itertuples(), everyone, strict=True):
        assert row.kl == pytest.approx(float(kl(wanted, ours).mean()), rel=1e-6)
        assert row.kl_identity == pytest.approx(table.kl[0])
        assert row.recovered == pytest.approx(1 - row.kl / row.kl_identity)
        assert row.top1_agreement == pytest.approx(float((wanted.argmax(-1) == ours.argmax(-1)).double().mean()))
        assert math.isnan(row.bits_per_byte)  # nothing follows a last position
    assert (table.base_revision == base.revision).all() and (table.expert_revision == expert.revision).all()
    assert (table.split == "test").all() and (table.n == len(unseen)).all()


def test_blocks_and_harvested_activations_change_nothing(
    activations: Activations, unseen: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expert, adapter = activations.base, activations.expert, fit(activations, "rrr", rank=4)
    table = evaluate(base, expert, adapter, unseen)
    monkeypatch.setattr("chassis_utils.metrics.BLOCK", 17 * base.vocab_size)
    a = harvest(base, expert, unseen, progress=False)
    both = evaluate(base, expert, [adapter], [unseen, a])
    for part in (both[:2], both[2:]):
        assert part.kl.tolist() == pytest.approx(table.kl.tolist(), rel=1e-6)  # logits are float32


def test_nothing_is_recovered_where_nothing_was_lost(base: LanguageModel, unseen: Probes) -> None:
    same = SyntheticExpert.from_base(base, strength=0)
    table = evaluate(base, same, exact_adapter(base, same), unseen)
    assert table.kl.abs().max() < 1e-12 and table.recovered.isna().all() and (table.top1_agreement == 1).all()


def by_hand(model: LanguageModel, text: str, skipped: str) -> tuple[float, int]:
    """Bits of every token that has one before it, by the model's own logits, and the bytes they stand for."""
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model.model(input_ids=ids).logits[0, :, : model.vocab_size]
    nats = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum")
    return float(nats) / math.log(2), len(text.encode()) - len(skipped.encode())


def test_bits_per_byte_by_hand_with_a_beginning_of_text(base: LanguageModel, expert: LanguageModel) -> None:
    probes = Probes("words", "text", TEXTS)
    bits, sizes = zip(*(by_hand(base, text, "") for text in TEXTS), strict=True)
    table = evaluate(base, expert, [], probes)
    assert table.bits_per_byte[0] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert evaluate(expert, base, [], probes).bits_per_byte[0] == pytest.approx(
        sum(by_hand(expert, text, "")[0] for text in TEXTS) / sum(sizes), rel=1e-5
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Byte-level tokens and no beginning of text."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    return load(str(make(folder, "GPT2", tokenizer=gpt2_tokenizer(WORDS, 400))), device="cpu")


def test_bits_per_byte_by_hand_without_a_beginning_of_text(gpt2: LanguageModel) -> None:
    figures = []
    for text in TEXTS:
        first = gpt2.tokenizer.decode(gpt2.tokenizer(text)["input_ids"][0])
        assert first and text.startswith(first)
        figures.append(by_hand(gpt2, text, first))
    bits, sizes = zip(*figures, strict=True)
    table = evaluate(gpt2, gpt2, [], Probes("words", "text", TEXTS))
    assert table.bits_per_byte[0] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)


def test_a_first_token_that_is_half_a_character_costs_its_bytes_only(gpt2: LanguageModel) -> None:
    text = "東京 is far"
    first = gpt2.tokenizer.convert_ids_to_tokens(gpt2.tokenizer(text)["input_ids"][0])
    assert len(first) < len("東".encode())  # one letter of the byte alphabet a byte
    bits, size = by_hand(gpt2, text, "x" * len(first))
    table = evaluate(gpt2, gpt2, [], Probes("words", "text", (text,)))
    assert table.bits_per_byte[0] == pytest.approx(bits / size, rel=1e-5)


def test_real_text_is_judged_at_every_position(activations: Activations) -> None:
    base, expert = activations.base, activations.expert
    tokens = sum(len(base.tokenizer(text)["input_ids"]) for text in TEXTS)
    table = evaluate(base, expert, fit(activations, "rrr"), [Probes("words", s, TEXTS) for s in ("text", "val")])
    assert table.n.tolist() == [tokens, tokens, 2, 2]
    last = evaluate(base, expert, [], Probes("words", "text", TEXTS), positions="last")
    assert last.n.tolist() == [2] and last.bits_per_byte.isna().all()


# -------------------------------------------------------------------------------------- wrong inputs


def test_a_prompt_that_was_fitted_on_is_refused_unless_asked_for(activations: Activations, unseen: Probes) -> None:
    pair = activations.base, activations.expert
    adapter = fit(activations, "rrr", rank=2)
    leaky = Probes("leaky", "test", (*unseen.prompts, activations.probes.prompts[7]))
    with refused("1 prompt", "'leaky'", "allow_overlap"):
        evaluate(*pair, adapter, leaky)
    assert len(evaluate(*pair, adapter, leaky, allow_overlap=True)) == 2
    assert len(evaluate(*pair, adapter, activations)) == 2  # the split `train` says what it is


def test_the_leak_is_noticed_after_saving(activations: Activations, tmp_path: Path) -> None:
    adapter = Adapter.load(fit(activations, "rrr", rank=2).save(tmp_path / "adapter"))
    with refused("'rivers'", "fitted on"):
        evaluate(activations.base, activations.expert, adapter, Probes("rivers", "val", activations.probes.prompts[:3]))


def test_what_does_not_belong_together_is_refused(
    activations: Activations, synthetic: SyntheticExpert, unseen: Probes
) -> None:
    base, expert = activations.base, activations.expert
    adapter = fit(activations, "rrr", rank=2)
    with refused(base.name, expert.name):
        evaluate(expert, base, adapter, unseen)
    with refused(expert.name, "harvest"):
        evaluate(base, synthetic, adapter, activations)
    with refused("layer 1", "2, 3"):
        second = harvest(base, expert, unseen, layers=[2], progress=False)
        evaluate(base, expert, fit(activations, "rrr", layer=1), second)
    with refused("positions", "first"):
        evaluate(base, expert, adapter, unseen, positions="first")


@pytest.mark.parametrize(
    ("place", "wrong", "words"),
    [
        (0, "pocket-base", ("base is a str", "load")),
        (1, None, ("expert is a NoneType", "load")),
        (2, "adapters/rrr", ("adapter", "str", "fit")),
        (2, None, ("adapter", "NoneType", "fit")),
        (2, ["rrr"], ("adapter", "str", "fit")),
        (3, "prose", ("probes", "str", "probe set")),
        (3, None, ("probes", "NoneType", "probe set")),
        (3, ["The sea"], ("probes", "str", "probe set")),
    ],
)
def test_arguments_of_another_kind_are_refused(
    activations: Activations, unseen: Probes, place: int, wrong: object, words: tuple[str, ...]
) -> None:
    arguments = [activations.base, activations.expert, fit(activations, "rrr", rank=2), unseen]
    with refused(*words):
        evaluate(*arguments[:place], wrong, *arguments[place + 1 :])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_an_interval_over_seeds_is_students(values: list[float]) -> None:
    mean, low, high = interval(values)
    sem = scipy.stats.sem(values)
    wanted = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=sem) if sem else (mean, mean)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    np.testing.assert_allclose((low, high), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("values", [[], [0.5]])
def test_an_interval_over_one_seed_is_refused(values: list[float]) -> None:
    with refused("at least two", "seed"):
        interval(values)


def test_the_interval_over_prompts_covers_as_often_as_it_says() -> None:
    # Prompts of very different lengths, whose tokens lie together: tokens taken as the sample would cover far less.
    draw, hits, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        sizes = torch.from_numpy(draw.integers(5, 60, 40)).double()
        sums = sizes * torch.from_numpy(draw.normal(0.3, 0.1, 40))
        low, high = ratio_bounds(sums, sizes)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / tries <= 0.98


def test_every_row_has_its_interval(activations: Activations, unseen: Probes) -> None:
    base, expert = activations.base, activations.expert
    table = evaluate(base, expert, fit(activations, "rrr", rank=4), unseen)
    assert (table.kl_low < table.kl).all() and (table.kl < table.kl_high).all()
    assert table.recovered_low[0] == table.recovered_high[0] == 0
    assert table.recovered_low[1] < table.recovered[1] < table.recovered_high[1]
    alone = evaluate(base, expert, fit(activations, "rrr", rank=4), Probes("one", "test", unseen.prompts[:1]))
    assert alone[["kl_low", "kl_high", "recovered_low", "recovered_high"]].isna().all(axis=None)


# ------------------------------------------------------------------------------------ a rank for a budget


@pytest.fixture(scope="module")
def waves(activations: Activations) -> Adapter:
    """A map whose KL goes up and down with the rank: some directions are far too long, the next ones undo that."""
    whole = fit(activations, "rrr", 12, lam=1.0)
    size = torch.tensor([1.0, 6.0, -4.0, 1.0, 1.0, 9.0, -8.0, 1.0, 3.0, 1.0, 5.0, 1.0])
    columns = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9])
    return replace(whole, down=whole.down[:, columns] * size, up=whole.up[columns])


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_the_rank_for_a_kl_is_the_smallest_that_reaches_it(
    activations: Activations, unseen: Probes, waves: Adapter, space: str
) -> None:
    base, expert = activations.base, activations.expert
    adapter = waves if space == "logits" else into_hidden(waves, base)
    held = harvest(base, expert, unseen, progress=False)
    ranks = range(1, adapter.rank + 1)
    found = evaluate(base, expert, [adapter.at_rank(rank) for rank in ranks], held)["kl"].tolist()[1:]
    assert any(later > earlier for earlier, later in zip(found, found[1:], strict=False))
    for budget in (1.0001 * value for value in found):
        wanted = next(rank for rank in ranks if found[rank - 1] <= budget)
        assert choose_rank(adapter, held, kl=budget) == wanted
    with refused("no rank meets kl", "needs"):
        choose_rank(adapter, held, kl=0.999 * min(found))


def test_few_ranks_are_tried_for_a_kl(activations: Activations, unseen: Probes) -> None:
    held = harvest(activations.base, activations.expert, unseen, progress=False)
    adapter = fit(activations, "rrr", lam=1.0)
    half = float(evaluate(activations.base, activations.expert, adapter.at_rank(adapter.rank // 2), held)["kl"].iloc[1])
    rank, tried = reaching(adapter, held, half)
    assert rank <= adapter.rank // 2 and len(tried) <= adapter.rank // 3


def test_a_capped_head_has_every_rank_tried(tmp_path: Path, unseen: Probes, prompts: Probes) -> None:
    models = [load(str(make(tmp_path / str(seed), "Gemma2", seed)), device="cpu") for seed in (0, 1)]
    a, held = (harvest(*models, probes, progress=False) for probes in (prompts, unseen))
    adapter = fit(a, "rrr", 6, lam=1.0)
    found = evaluate(*models, [adapter.at_rank(rank) for rank in range(1, 7)], held)["kl"].tolist()[1:]
    for budget in (1.0001 * value for value in found):
        assert choose_rank(adapter, held, kl=budget) == 1 + next(i for i, value in enumerate(found) if value <= budget)


def test_a_noisy_clock_changes_no_more_than_its_noise(
    activations: Activations, unseen: Probes, waves: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latency as if a rank took a hundredth of the base's time, beside spikes of other work on the machine."""
    rng, now, adapter = np.random.default_rng(0), [0.0], waves
    real = Adapter.logits

    def logits(self: Adapter, *given: object) -> torch.Tensor:
        now[0] += 1.0 + 0.01 * self.rank + (rng.random() < 0.6) * rng.random()
        return real(self, *given)

    monkeypatch.setattr(Adapter, "logits", logits)
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: now[0])
    for rank in (1, 5, 11, 12):
        assert abs(choose_rank(adapter, activations, latency=0.01 * rank + 0.005) - rank) <= 1
    assert choose_rank(adapter, activations, latency=0.5) == adapter.rank
    with refused("no rank meets latency", "rank 1 needs"):
        choose_rank(adapter, activations, latency=-0.5)
