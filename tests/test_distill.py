"""v2, its features and its statistics: against definitions, and that nothing about batches, order or files matters."""

from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, make, refused
from transformers import GenerationConfig

from budgets import choose_rank
from chassis_utils import (
    Activations,
    Adapter,
    Features,
    LanguageModel,
    Probes,
    distill,
    evaluate,
    fit,
    gather,
    harvest,
    load,
    probe_set,
    solve,
    statistics,
)
from chassis_utils.solve import Gram, Heads, low_rank, scaled_ridge
from ownwords import _cut, written
from plugs import SyntheticExpert

ENDS = {"eos_token_id": 2, "pad_token_id": 2}


@pytest.fixture(scope="module")
def rows(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> Activations:
    return harvest(base, expert, prompts, "all", progress=False)


@pytest.fixture(scope="module")
def pocket() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-base", device="cpu"), load("pocket-shakespeare", device="cpu")


@pytest.fixture(scope="module")
def solved(pocket: tuple[LanguageModel, LanguageModel]) -> tuple[Activations, Adapter]:
    base, expert = pocket
    a = harvest(base, expert, written(expert, 24, length=128), "all", [-1], progress=False)
    return a, fit(a)


# ------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k in ("Llama", "GPT2", "Phi", "Gemma2", "OPT", "GPTJ")])
def test_a_block_is_read_as_its_linear_maps_read_it(kind: str, tmp_path: Path) -> None:
    model = load(str(make(tmp_path / kind, kind)), device="cpu")
    ids = torch.arange(3, 19).reshape(2, 8)
    mask = torch.ones_like(ids)
    block, inputs = model._blocks()[1], []
    linear = [m for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in linear]
    model.states(ids, mask)
    for hook in hooks:
        hook.remove()
    found = model.states(ids, mask, ["block 1", 1])
    assert all(
        any(torch.equal(x.reshape(part.shape), part) for part in _windows(found["block 1"], x.shape[-1]))
        for x in inputs
    )
    assert found["block 1"].shape[-1] <= sum(x.shape[-1] for x in inputs)
    torch.testing.assert_close(found[1], model.states(ids, mask, [1, model.num_layers])[1])


def _windows(whole: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [whole[..., i : i + size] for i in range(whole.shape[-1] - size + 1)]


def test_the_stream_is_what_the_final_norm_reads(base: LanguageModel) -> None:
    ids = torch.arange(3, 11)[None]
    found = base.states(ids, torch.ones_like(ids), ["stream", base.num_layers])
    torch.testing.assert_close(base.final_norm(found["stream"]), found[base.num_layers])


def test_random_features_come_from_the_seed_alone() -> None:
    hidden = {0: torch.randn(7, 12), 2: torch.randn(7, 5)}
    one, again, other = (Features((0, 2), random=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one(hidden), again(hidden)) and not torch.equal(one(hidden), other(hidden))
    turned = Features((0, 2), random=9, kind="fourier")(hidden)[:, 17:]
    assert one(hidden).shape == (7, 26) and turned.abs().max() <= 1 and one(hidden)[:, 17:].min() == 0
    relu, squared = one(hidden)[:, 17:], Features((0, 2), random=9, kind="square", seed=1)(hidden)[:, 17:]
    torch.testing.assert_close(squared[relu > 0], relu[relu > 0].square())
    assert squared[relu == 0].min() > 0
    # The random part sees directions only: places of any size count alike.
    larger = one({0: 100 * hidden[0], 2: hidden[2]})
    torch.testing.assert_close(larger[:, 17:], one(hidden)[:, 17:], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_all_rows_at_once(rows: Activations, expert: LanguageModel, prompts: Probes) -> None:
    features = Features((3, 1))
    whole = Gram.of(features(rows.hidden), torch.cat([rows.expert_hidden, rows.hidden[3]], dim=1))
    for size in (64, 4096):
        sums = gather(rows.base, expert, prompts, features, batch_tokens=size, progress=False)
        for name in ("n", "x", "y", "xx", "xy"):
            both = sums.train + sums.held, whole
            given, wanted = (torch.as_tensor(getattr(g, name), dtype=torch.float64) for g in both)
            torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-3)
    odd = [i for i in range(len(prompts)) if i % 2]
    halves = [
        replace(prompts, prompts=tuple(prompts.prompts[i] for i in part))
        for part in (odd, sorted({*range(len(prompts))} - {*odd}))
    ]
    both = [gather(rows.base, expert, half, features, progress=False) for half in halves]
    for total in (both[0] + both[1], both[1] + both[0]):
        torch.testing.assert_close((total.train + total.held).xy, whole.xy, rtol=1e-5, atol=1e-3)
        assert len(total) == len(rows)
    assert fit(both[0] + both[1], "rrr").fitted_on == prompts.fingerprints


def test_statistics_of_other_models_or_features_do_not_add_up(
    base: LanguageModel, expert: LanguageModel, prompts: Probes, synthetic: SyntheticExpert, fresh: LanguageModel
) -> None:
    one = gather(base, expert, prompts, Features((3,)), progress=False)
    fresh.model.model.layers[0].mlp.down_proj.weight[0] += 1.0
    with refused("differ in base", base.name, base.revision):
        one + gather(fresh, expert, prompts, Features((3,)), progress=False)
    with refused("differ in expert", synthetic.name, expert.name):
        one + gather(base, synthetic, prompts, Features((3,)), progress=False)
    with refused("in both statistics", "once"):
        one + one
    with refused("differ in features", "(2,)"):
        one + gather(base, expert, prompts, Features((2,)), progress=False)


def test_too_many_features_are_refused_before_anything_runs(
    base: LanguageModel, expert: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = LanguageModel.states

    def one_token(model: LanguageModel, ids: torch.Tensor, *rest: object) -> dict:
        assert ids.numel() == 1, "only the pass that tells the sizes of features"
        return states(model, ids, *rest)

    monkeypatch.setattr(LanguageModel, "states", one_token)
    with refused("1,000,032 features", "GiB", "fewer"):
        gather(base, expert, probe_set("mixed", "train", 8), Features((3,), random=1_000_000), progress=False)


def test_a_fit_to_the_kl_is_refused_where_memory_is_short(rows: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "available", lambda: 10**6)
    monkeypatch.setattr(distill, "kl_fit", lambda *_: pytest.fail("it was begun"))
    with refused(f"{sum(x.shape[1] for x in rows.hidden.values())} features", "0.0 GiB are free"):
        fit(rows, "near")


@pytest.mark.parametrize(
    "features",
    [
        {"places": ()},
        {"places": (-1,)},
        {"places": (1, 1)},
        {"places": (1,), "random": -1},
        {"places": (1,), "kind": "sine"},
    ],
)
def test_features_that_cannot_be_read_are_refused(features: dict) -> None:
    with refused("cannot be read", "at least one place"):
        Features(**features)


def test_a_place_that_does_not_exist_is_refused(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> None:
    for place in ("block 7", "attention", 9):
        with refused(str(place), base.name):
            gather(base, expert, prompts, Features((place,)), progress=False)


# ------------------------------------------------------------------------------------------ solvers


def test_a_scaled_ridge_does_not_depend_on_the_units_of_a_feature() -> None:
    x, y = torch.randn(300, 6, dtype=torch.float64), torch.randn(300, 4, dtype=torch.float64)
    units = torch.tensor([1.0, 1e3, 1e-2, 1.0, 5.0, 0.1], dtype=torch.float64)
    plain, scaled = scaled_ridge(Gram.of(x, y), 0.1), scaled_ridge(Gram.of(x * units, y), 0.1)
    torch.testing.assert_close(plain[0], scaled[0] * units[:, None])
    torch.testing.assert_close(plain[1], scaled[1])


def test_the_error_from_sums_is_the_error_of_the_rows() -> None:
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    w, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    wanted = (y - x @ w - b).square().sum() - y.square().sum()
    assert Gram.of(x, y).error(w, b) == pytest.approx(float(wanted))


@pytest.mark.parametrize("p", [5, 40])
def test_low_rank_in_both_metrics_is_the_weighted_svd(p: int) -> None:
    draw = torch.Generator().manual_seed(p)
    weight, basis = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((p, 12), (12, 60)))
    x = torch.randn(200, p, generator=draw, dtype=torch.float64)
    columns = torch.rand(60, generator=draw, dtype=torch.float64) + 0.1
    down, up, values = low_rank(weight, x.T @ x, Heads(((1.0, basis.T),)), columns)
    truth = torch.linalg.svdvals(x @ weight @ basis * columns.sqrt())
    torch.testing.assert_close(values, truth[: len(values)], rtol=1e-6, atol=1e-6)
    for rank in (1, 3, len(values)):
        lost = ((x @ (weight @ basis - down[:, :rank] @ up[:rank].double())) * columns.sqrt()).square().sum()
        torch.testing.assert_close(lost, truth[rank:].square().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 60, solve.COLUMNS, solve.COLUMNS + 1])
def test_heads_by_columns_are_the_whole_matrix(vocab: int) -> None:
    draw = torch.Generator().manual_seed(vocab)
    one, other = (torch.randn(vocab, hidden, generator=draw) for hidden in (3, 5))
    left, columns = torch.randn(4, 8, generator=draw), torch.rand(vocab, generator=draw)
    heads = Heads(((1.0, one), (-0.5, other)))
    whole = torch.cat([one.double().T, -0.5 * other.double().T])
    for some, truth in ((heads, whole), (heads.centred(), whole - whole.mean(1, keepdim=True))):
        torch.testing.assert_close(left @ some, (left.double() @ truth).float())
        torch.testing.assert_close(left[0] @ some, (left[0].double() @ truth).float())
        torch.testing.assert_close(some.squares(), truth @ truth.T)
        torch.testing.assert_close(some.squares(columns), truth * columns.double() @ truth.T)


# ----------------------------------------------------------------------------------------------- v2


def test_v2_is_the_default_and_beats_the_last_state_alone(solved: tuple[Activations, Adapter]) -> None:
    a, v2 = solved
    other = written(a.expert, 4, "test", length=128)
    table = evaluate(a.base, a.expert, [v2, fit(a, "rrr", lam=len(a) * 1e-3)], other)
    identity, ours, state = table["recovered"]
    assert v2.method == "v2" and identity == 0 and ours > state


def test_v2_of_a_synthetic_expert_is_exact_without_edits(
    base: LanguageModel, synthetic: SyntheticExpert, prompts: Probes, unseen: Probes
) -> None:
    v2 = fit(harvest(base, synthetic, prompts, "all", progress=False))
    assert not v2.edits
    assert evaluate(base, synthetic, v2, unseen)["recovered"].iloc[-1] > 0.999


def test_v2_comes_back_from_its_folder(solved: tuple[Activations, Adapter], tmp_path: Path) -> None:
    a, v2 = solved
    back = Adapter.load(v2.save(tmp_path / "v2"), a.base)
    assert back.revision == v2.revision and back.num_parameters == v2.num_parameters
    tables = [evaluate(a.base, a.expert, one, probe_set("verse", "val", 2), positions="all") for one in (v2, back)]
    assert tables[0]["kl"].tolist() == tables[1]["kl"].tolist()
    assert [p.name for p in sorted((tmp_path / "v2").iterdir())] == ["README.md", "adapter.json", "adapter.safetensors"]


def test_v2_does_not_care_for_the_order_of_prompts_beyond_which_are_held_out(
    solved: tuple[Activations, Adapter],
) -> None:
    a, v2 = solved
    probes = replace(a.probes, prompts=(*a.probes.prompts[6::-1], *a.probes.prompts[7:]))
    other = fit(harvest(a.base, a.expert, probes, "all", [-1], progress=False))
    tables = [evaluate(a.base, a.expert, one, probe_set("verse", "val", 2), positions="all") for one in (v2, other)]
    assert tables[0]["kl"].iloc[1] == pytest.approx(tables[1]["kl"].iloc[1], rel=1e-2)


def test_edits_leave_the_base_as_it_was(solved: tuple[Activations, Adapter]) -> None:
    a, v2 = solved
    before = a.base.revision
    evaluate(a.base, a.expert, v2, probe_set("verse", "test", 1))
    assert a.base.revision == before and not a.base.edits and v2.edits


def test_an_expert_that_is_the_base_is_refused(base: LanguageModel, prompts: Probes) -> None:
    with refused("itself", "undefined"):
        fit(harvest(base, base, prompts, "all", [-1], progress=False))
    with pytest.warns(UserWarning, match="nothing to recover"):
        assert evaluate(base, base, [], prompts, positions="all")["recovered"].isna().all()


def test_a_token_that_the_expert_never_says_costs_no_other(
    base: LanguageModel, expert: LanguageModel, prompts: Probes
) -> None:
    silent, shift = copy(expert), expert.readout.shift
    shift[7] = -80.0
    silent.readout = replace(expert.readout, bias=shift)
    a = harvest(base, silent, prompts, "all", [-1], progress=False)
    ours, plain = (fit(a, "rrr", metric=metric) for metric in ("kl", "data"))
    # Of full rank it is the same map, whatever columns weigh.
    torch.testing.assert_close(ours.down @ ours.up, plain.down @ plain.up, rtol=1e-3, atol=1e-3)
    assert ours.at_rank(2).logits(base, a.hidden).softmax(-1)[:, 7].max() < 1e-6


def test_half_precision_that_overflows_names_the_prompt_and_what_to_do(
    folders: dict[str, Path], expert: LanguageModel
) -> None:
    texts = [f"The sea, {'at last ' * (i % 4)}in year {i}" for i in range(40)]
    texts[29] += " [é]"
    probes = Probes("sea", "train", tuple(texts))
    for dtype in (torch.float16, torch.float32):
        model = load(str(folders["base"]), device="cpu", dtype=dtype)
        rare = model.tokenizer("é", add_special_tokens=False)["input_ids"][-1]
        table = model.model.model.embed_tokens.weight
        table[rare] = 65504.0 * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0)).sign()
        model.model.model.layers[0].mlp.down_proj.weight.mul_(1e3)
        if dtype == torch.float32:
            assert len(gather(model, expert, probes, Features((1,)), progress=False))
            continue
        with refused("NaN or infinity", "prompt 29 ", "float32"):
            gather(model, expert, probes, Features((1,)), progress=False)


def test_a_rank_for_a_budget_is_the_last_that_meets_it(solved: tuple[Activations, Adapter]) -> None:
    a, v2 = solved
    held = harvest(a.base, a.expert, probe_set("verse", "val", 2), "all", [-1], progress=False)
    table = evaluate(a.base, a.expert, [v2.at_rank(r) for r in (11, 12)], held)
    assert choose_rank(v2, held, kl=float(table["kl"].iloc[2])) <= 12
    rank = choose_rank(v2, held, parameters=v2.at_rank(17).num_parameters + 5)
    assert rank == 17
    assert 1 <= choose_rank(v2, held, latency=50.0) <= v2.rank
    with refused("no rank meets kl", f"rank {v2.rank} needs"):
        choose_rank(v2, held, kl=1e-9)
    with refused("no rank meets parameters", "rank 1 needs"):
        choose_rank(v2, held, parameters=5)
    with refused("0 budgets"):
        choose_rank(v2, held)


def test_what_v2_cannot_do_is_said(rows: Activations, base: LanguageModel, expert: LanguageModel) -> None:
    with refused("final layer", "leave layer at -1"):
        fit(rows, layer=1)
    with refused("metric", "data or kl"):
        fit(rows, metric="l1")
    one = Probes("one", "train", ("a single prompt",))
    with refused("one prompt", "held out"):
        gather(base, expert, one, Features((3,)), progress=False)
    with refused("needs every row"):
        fit(gather(base, expert, rows.probes, Features((3,)), progress=False), "v1")


def test_statistics_are_not_read_otherwise_than_they_were_gathered(rows: Activations) -> None:
    read = Features((2, 3))
    stats = gather(rows.base, rows.expert, rows.probes, read, progress=False)
    for options in ({"features": Features((3,))}, {"layer": 1}, {"layer": -2}):
        for method in ("ridge", "rrr"):
            with refused("statistics", "gather"):
                fit(stats, method, lam=1.0, **options)
    assert fit(stats, "rrr", lam=1.0, layer=3).features == read


# -------------------------------------------------------------------------------------------- probes


def test_an_expert_writes_the_same_from_the_same_seed(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    expert = pocket[1]
    state = torch.get_rng_state()
    one, again, other = (written(expert, 3, length=24, seed=seed) for seed in (0, 0, 1))
    assert one == again and one.prompts != other.prompts and len(one) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.fingerprints & written(expert, 3, "test", length=24).fingerprints
    for passage in written(expert, 40, length=12).prompts:
        assert len(expert.tokenizer(passage)["input_ids"]) <= 12
    with refused("n = 0", "n >= 1"):
        written(expert, 0)


def test_an_expert_writes_from_its_distribution_whatever_its_settings_say(
    pocket: tuple[LanguageModel, LanguageModel],
) -> None:
    settings = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, min_p=0.9, max_length=8, **ENDS)
    other = load("pocket-shakespeare", device="cpu")
    other.model.generation_config = settings
    assert written(other, 3, length=40).prompts == written(pocket[1], 3, length=40).prompts
    assert other.model.generation_config is settings


def test_a_passage_that_reads_back_as_more_tokens_is_cut(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    tokenizer = pocket[1].tokenizer
    text = "To be, or not to be, that is the question: whether 'tis nobler – née 東京 – in the mind to suffer"
    whole = len(tokenizer(text)["input_ids"])
    for length in (2, 3, 7, 20, whole - 1, whole):
        cut = _cut(tokenizer, text, length)
        assert len(tokenizer(cut)["input_ids"]) <= length
        # A character of several bytes may be cut in the middle; what comes before it is the text's own.
        assert text.startswith(cut.rstrip("\ufffd").rstrip())
    assert _cut(tokenizer, text, whole) == text
