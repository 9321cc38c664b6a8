"""What is counted of a plug is what torch counts, what files hold, and what laws of cost allow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make, refused
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import costs
from chassis_utils import Features, LanguageModel, Probes, fit, gather, harvest, load
from costpage import predicted, size, span
from costs import (
    DEVICES,
    KINDS,
    PASSES,
    PRESETS,
    Rates,
    Shape,
    Work,
    bill,
    mixed,
    overhead,
    reached,
    shape,
    sizes,
    stages,
    today,
)
from crowd import Costs, makespan, speedups
from curves import Law, curve, drawn, interval, law, laws, losses

LENGTH, BATCH = 12, 3
PUBLISHED = {"TinyLlama 1.1B": 1_100_048_384, "Llama 2 7B": 6_738_415_616, "Llama 3 70B": 70_553_706_496}
FLAT = Rates("flat", {kind: [(1.0, 1e9)] for kind in KINDS})


@pytest.fixture(scope="module", params=["Llama", "Phi", "Mixtral", "DeepseekV3", "GPT2", "Qwen3", "GPTNeoX"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Shape]:
    """A small model with random weights, and what is counted of its folder."""
    more = {"num_key_value_heads": 4} if request.param == "DeepseekV3" else {}
    folder = make(tmp_path_factory.mktemp("counted"), request.param, **more)
    return load(str(folder), device="cpu"), shape(folder)


def test_operations_are_those_that_torch_counts(real: tuple[LanguageModel, Shape]) -> None:
    model, one = real
    ids, tokens = torch.randint(3, VOCAB, (BATCH, LENGTH)), BATCH * LENGTH
    # Torch counts neither the CPU's own attention nor grouped products of experts: both by plain products, then.
    model.model.set_attn_implementation("eager")
    model.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False, depth=10) as counter, torch.inference_mode():
        model.model(input_ids=ids, use_cache=False)
    # Angles of rotations are a product too; they are not of the model's size, and not counted here.
    rotary = sum(sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    padded = 2 * tokens * one.hidden * (model.model.get_output_embeddings().weight.shape[0] - one.vocab)
    assert counter.get_total_flops() - rotary == one.forward(tokens, LENGTH) + one.head(tokens) + padded
    depths = [one.forward(tokens, LENGTH, depth) for depth in range(one.layers + 1)]
    assert depths == sorted(depths) and depths[0] == 0 and depths[-1] <= one.forward(tokens, LENGTH)


def test_parameters_and_inputs_are_the_models_own(real: tuple[LanguageModel, Shape]) -> None:
    model, one = real
    assert one.parameters == model.model.num_parameters() and one.layers == model.num_layers
    assert [block.inputs for block in one.blocks] == [
        Features((f"block {number}",)).sizes(model)[0] for number in range(one.layers)
    ]


def test_published_sizes_are_met() -> None:
    for name, (source, sizes_given) in PRESETS.items():
        one = shape(name)
        assert one.source == source and one.vocab == sizes_given["vocab_size"]
        assert one.parameters == PUBLISHED.get(name, one.parameters)
    # The trillion: "1T" and "32B activated" are all the digits that are published.
    assert round(one.parameters / 1e12) == 1 and 31.5e9 < one.active < 33.5e9


def test_an_adapter_takes_the_bytes_that_are_told(base: LanguageModel, prompts: Probes, tmp_path: Path) -> None:
    other = load(str(make(tmp_path / "other", seed=7, num_hidden_layers=3)), device="cpu")
    one = shape(base.name)
    one = Shape(**vars(one) | {"vocab": base.vocab_size})
    gathered = gather(base, other, prompts, Features((base.num_layers,)), progress=False)
    plugs = {"final layer": fit(gathered), "v2": fit(harvest(base, other, prompts, "all", [-1], progress=False))}
    assert plugs["v2"].edits, "v2 found nothing to edit here: choose other weights"
    for family, plug in plugs.items():
        plug = plug.at_rank(min(5, plug.rank))
        file = plug.save(tmp_path / family) / "adapter.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        told = [(len(part.down), part.rank, len(part.bias)) for part in (plug, *plug.edits)]
        assert file.stat().st_size - header == costs.adapter_bytes(told, len(plug.values), len(prompts))
        with safe_open(file, "pt") as there:
            assert all(there.get_slice(name).get_dtype() in ("F32", "I64") for name in there.keys())  # noqa: SIM118
    held = sizes(one, one, len(gathered), 5, length=len(gathered) // len(prompts))
    assert held["sums"] == sum(part.nbytes for sums in (gathered.train, gathered.held) for part in (sums.xx, sums.xy))


def test_shards_take_the_bytes_that_are_told(base: LanguageModel, prompts: Probes, tmp_path: Path) -> None:
    other = load(str(make(tmp_path / "model", seed=3, num_hidden_layers=3)), device="cpu")
    rows = harvest(base, other, prompts, "all", [-1], out_dir=tmp_path / "shards", progress=False)
    headers = [8 + int.from_bytes(p.read_bytes()[:8], "little") for p in (tmp_path / "shards").glob("*.safetensors")]
    there = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")) - sum(headers)
    one = shape(base.name)
    assert len(headers) == 2 and there == sizes(one, one, len(rows), 4)["shards"]


@pytest.mark.parametrize("family", ["final layer", "v2"])
def test_costs_grow_with_tokens_as_their_parts_do(family: str) -> None:
    one = shape("pocket-base")
    few, many = ({s.name: s for s in stages(one, one, n, family)} for n in (2**20, 2**24))
    for name in ("forward, base", "forward, expert", "rows", "sums"):
        assert FLAT.seconds(many[name]) == pytest.approx(16 * FLAT.seconds(few[name]))
    for name in ("ridge", "judging", "cut"):
        assert FLAT.seconds(many[name]) == FLAT.seconds(few[name]) > 0
    assert bill(one, one, 2**20, FLAT, 3.0, family).money == 3 * bill(one, one, 2**20, FLAT, 1.0, family).money
    fast = Rates("fast", {kind: [(1.0, 4e9)] for kind in KINDS})
    faster = bill(one, one, 2**20, fast, 1.0, family)
    assert faster.hours == pytest.approx(bill(one, one, 2**20, FLAT, 1.0, family).hours / 4)


def test_a_mixture_passes_like_its_active_part_and_weighs_like_the_whole() -> None:
    one = shape("Kimi K2 1T")
    assert one.forward(1, 1) < 2.1 * one.active < 0.1 * one.parameters
    assert sizes(one, one, 1000, 8, width=2)["weights"] == 4 * one.parameters
    assert bill(one, one, 10**6, FLAT, device=DEVICES["H100 80 GB"]).devices > 50


def test_what_a_plug_adds_grows_with_its_rank_alone() -> None:
    one = shape("Llama 2 7B")
    small, large = (overhead(one, rank) for rank in (16, 64))
    assert all(large[key] == pytest.approx(4 * small[key]) for key in small)
    assert overhead(one, 16, "v2", 16)["flops"] > small["flops"] and small["flops"] < 0.001


def test_rates_lie_on_a_line_in_logs_and_end_where_they_were_measured() -> None:
    rates = Rates("two", FLAT.measured | {"product": [(100.0, 1e9), (400.0, 4e9)]})
    told = [rates(Work("product", 1.0, size)) for size in (1.0, 100.0, 200.0, 400.0, 1e6)]
    assert told == pytest.approx([1e9, 1e9, 2e9, 4e9, 4e9])
    half = DEVICES["H100 80 GB"].rates({kind: [(1.0, 0.5)] for kind in KINDS})
    both = mixed(half, rates, 8)
    assert both(Work("product", 1.0, 400.0)) == 32e9 and both(Work("forward", 1.0, 1.0)) == 989e12 / 2
    assert half(Work("product", 1.0, 1.0)) == half(Work("readout", 1.0, 1.0)) == 67e12 / 2


def test_sums_are_where_a_device_has_room_for_them() -> None:
    device, one = DEVICES["H100 80 GB"], shape("TinyLlama 1.1B")
    card = device.rates({kind: [(1.0, 0.5)] for kind in KINDS})
    needs = sizes(one, one, 10**5, 1, "v2")["peak of the fit"]
    models = 4 * one.parameters + 8 * one.hidden * one.vocab + sum(4 * (p + 2048) * 2048 for p in one.edits)
    for memory, there in ((models + 1.3 * needs, True), (models + 1.2 * needs, False)):
        rates = today(replace(device, memory=memory), card, FLAT, 4, one, one, 10**5, "v2")
        assert (rates is card) == there
    assert today(device, card, FLAT, 4, *2 * [shape("Llama 3 70B")], 10**5, "final layer") is not card


def test_shares_of_a_card_give_back_what_was_measured() -> None:
    told = json.loads((Path(costs.__file__).with_name("gpu.json")).read_text())
    device, shares = reached(told)
    assert {*shares} == {*KINDS}
    rates = device.rates(shares)
    one, passes = shape("TinyLlama 1.1B"), next(row for row in told["tinyllama"] if row["stage"] == PASSES)
    tokens = passes["tokens"] * (1 + told["setting"]["judged"])
    work = Work("forward", 2 * one.forward(tokens, told["setting"]["length"]), float(one.hidden))
    assert work.amount / rates(work) == pytest.approx(passes["seconds"])
    with refused("NVIDIA GH200 has no data sheet", "DEVICES"):
        reached(told | {"setting": told["setting"] | {"device": "NVIDIA GH200"}})
    # A card of a hundredth of the float64 is not kept waiting by what keeps a strong one waiting, nor is it faster.
    weak = replace(device, double=device.double / 100).rates(shares, device)
    for kind in ("cholesky", "eigen"):
        small, large = (Work(kind, 1.0, size) for size in (2048.0, 8192.0))
        assert rates(small) / 100 < weak(small) <= min(rates(small), device.peaks[kind] / 100)
        assert weak(large) < rates(large)


def test_predictions_are_kept_apart_by_stage() -> None:
    one = shape("pocket-base")
    told = predicted(FLAT, one, one, "final layer", tokens=4096, padding=1.1, length=100.0)
    assert told["forward"] == pytest.approx(2 * one.forward(4096 * 1.1, 100.0) / 1e9)


def test_bad_questions_get_one_line(tmp_path: Path) -> None:
    one, two = shape("pocket-base"), shape("TinyLlama 1.1B")
    with refused("no config 'gpt-17'", "TinyLlama 1.1B", "pocket-base"):
        shape("gpt-17")
    with refused("cannot be counted"):
        shape(AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    with refused("no config that can be read"):
        shape(tmp_path)
    for tokens in (-5, 0, float("nan"), 1000.5):
        with refused("tokens"):
            stages(one, one, tokens)
    with refused("no family 'v3'"):
        stages(one, one, 1000, "v3")
    with refused("v2 edits"):
        stages(one, two, 1000, "v2")
    with refused("rank 0"):
        sizes(one, one, 1000, 0)
    with refused("share", "1.5"):
        DEVICES["A100 80 GB"].rates({"forward": [(1.0, 1.5)]})
    with refused("rate -1"):
        bill(one, one, 1000, FLAT, -1)
    with refused("no rate for"):
        Rates("none", {})


# --------------------------------------------------------------------------------------- curves


def test_a_law_is_found_again_and_enough_is_where_it_says() -> None:
    tokens = [2.0**k for k in range(10, 18)]
    truth = Law(*(torch.tensor([x], dtype=torch.float64) for x in (0.3, 50.0, 0.8)))
    found = law(tokens, torch.stack([truth(n) for n in tokens], 1))
    assert found.exponent.item() == pytest.approx(0.8) and found.floor.item() == pytest.approx(0.3)
    stop = found.enough(0.01).item()
    assert (found(stop) - found(2 * stop)).item() == pytest.approx(0.01)
    with refused("three or more"):
        law(tokens[:2], torch.ones(1, 2))
    with refused("above zero"):
        found.enough(0.0)


def test_an_interval_holds_what_comes_later_about_as_often_as_it_says() -> None:
    random, tokens, hits = torch.Generator().manual_seed(0), [2.0**k for k in range(10, 17)], 0
    prompts, subsets, rows = 24, 4, torch.full((24,), 50)
    for _ in range(60):
        hard = (0.4 * torch.randn(prompts, generator=random, dtype=torch.float64)).exp()
        noise = 1 + 0.01 * torch.randn(len(tokens), subsets, 1, generator=random, dtype=torch.float64)
        mean = torch.tensor([0.3 + 30 * n**-0.8 for n in tokens], dtype=torch.float64)
        sums = 50 * mean[:, None, None] * noise * hard
        chosen = drawn(sums, rows, 200)
        _, low, high = interval(laws(tokens[:5], chosen[:, :5])(tokens[-1]) / chosen[:, -1])
        hits += low <= 1 <= high
    assert hits >= 54


def test_a_curve_is_the_same_as_fits_to_each_part_by_itself(base: LanguageModel, prompts: Probes, unseen: Probes,
                                                            tmp_path: Path) -> None:  # fmt: skip
    other = load(str(make(tmp_path / "other", seed=5, num_hidden_layers=3)), device="cpu")
    features = Features((base.num_layers,))
    held = harvest(base, other, unseen, "all", [-1], progress=False)
    found = list(curve(base, other, prompts, features, 8, [2, 4], 2))
    assert [(subset, size) for subset, size, _, _ in found] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()[:2]
    some = tuple(text for i in sorted(order) for text in prompts.prompts[8 * i : 8 * i + 8])
    alone = fit(gather(base, other, Probes("some", "train", some), features, progress=False))
    assert sum(losses(found[0][3], held)[0]) == pytest.approx(float(sum(losses(alone, held)[0])), rel=1e-3)
    with refused("8 passages"):
        next(curve(base, other, prompts, features, 8, [12], 1))


# -------------------------------------------------------------------------------------- workers


def test_without_friction_workers_divide_the_time() -> None:
    free = Costs([2.0], [0.0], [0.0], [0.0], 0.0)
    for row in speedups(free, 1024, [1, 2, 4, 256, 1024, 4096], rounds=2):
        assert row["speedup"] == row["low"] == row["high"] == min(row["workers"], 1024)


def test_friction_bounds_what_workers_bring() -> None:
    draw = np.random.default_rng(0)
    slow = Costs([1.0, 1.5], [0.3], [0.2], [0.1], 0.01)
    for workers in (1, 7, 64, 500):
        took = makespan(slow, 500, workers, draw)
        assert took >= 500 * 0.01 + 1.0  # handed out one by one, and the last one gathered
        assert took >= 500 * 1.0 / workers
        assert took <= 500 * 1.6 + 500 * 0.01 + np.ceil(np.log2(workers) + 1) * 0.6
    assert makespan(slow, 1, 50, draw) <= 1.6 + 0.01  # one shard has nobody to meet
    with refused("shards"):
        makespan(slow, 0, 1, draw)
    with refused("gather"):
        Costs([], [1.0], [1.0], [1.0], 0.0)


def test_times_and_sizes_are_told_in_units() -> None:
    assert [span(x) for x in (0.5, 120, 7200, 2e5, 1e8)] == ["0.5 s", "2 min", "2 h", "2.3 days", "3.2 years"]
    assert [size(x) for x in (12, 2e9, 999.9e6)] == ["12 B", "2 GB", "1 GB"]
    assert {"Llama", "Phi", "Mixtral"} <= ARCHITECTURES.keys()
