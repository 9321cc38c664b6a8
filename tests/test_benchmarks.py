"""The benchmarks count what the code does, and carry on along a line that is known."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

from chassis_utils import LanguageModel, Probes, fit, harvest, load, probe_set, solve, statistics, token_bytes
from chassis_utils.activations import tokenize
from chassis_utils.solve import Gram
from chassis_utils.statistics import KEPT, available, room
from chassis_utils.tokens import text_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench
import bridged
import bridges
import corpora
import decided
import optimum
import scale

import costs
from bridging import Places

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_bare_passes_see_every_token_once(base: LanguageModel, prompts: Probes) -> None:
    batches = bench.whole(base, [prompts, prompts])
    given = sorted(token for ids in tokenize(base, prompts)[0] * 2 for token in ids)
    assert sorted(t for b in batches for t in b["input_ids"][b["attention_mask"].bool()].tolist()) == given


def test_a_power_law_is_found_and_lies_in_its_interval() -> None:
    work, draw = [10.0**k for k in range(5, 10)], torch.Generator().manual_seed(0)
    exponent, middle, low, high = scale.power(work, [3e-4 * one**0.8 for one in work], 1e12)
    assert exponent == pytest.approx(0.8) and low == pytest.approx(high) == pytest.approx(middle)
    assert middle == pytest.approx(3e-4 * 1e12**0.8)
    hit = 0
    for _ in range(200):
        noise = (0.1 * torch.randn(6, generator=draw, dtype=torch.float64)).exp().tolist()
        seconds = [one * n for one, n in zip([*work, 1e12], noise, strict=True)]
        _, _, low, high = scale.power(work, seconds[:-1], 1e12)
        hit += low <= seconds[-1] <= high
    assert 180 <= hit <= 199


def test_v2_runs_and_solves_as_often_as_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = scale.Shape(32, 64, 96, 4, 4, 2)
    base, text = scale.random_model(shape), scale.words(shape, 2048, 0)
    a = harvest(base, scale.turned(base), text, "all", [-1], progress=False)
    # By tokens: the one that tells the sizes of features does not count.
    passed: Counter[int] = Counter()

    def note(_: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        passed[(output if isinstance(output, torch.Tensor) else output[0])[..., 0].numel()] += 1

    for block in base._blocks():  # the expert's are the same, in another order
        block.register_forward_hook(note)
    solved, own = [], solve.ridge
    monkeypatch.setattr(solve, "ridge", lambda gram, *rest: (solved.append(len(gram.x)), own(gram, *rest))[1])
    fit(a)
    counted = scale.count(shape, 2048)["v2"]
    blocks = next(times for name, times, _ in counted if name == "forward pass")
    del passed[1]
    assert sum(passed.values()) == blocks * len(bench.whole(base, [text]))
    assert len(solved) == sum(times for name, times, _ in counted if name.startswith("ridge"))


def test_figures_of_other_parts_stay(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    bench.keep(path, one=1)
    assert bench.keep(path, two=2) == json.loads(path.read_text()) == {"one": 1, "two": 2}
    path.write_text("[1]")
    with refused(str(path), "no figures"):
        bench.keep(path, one=1)


def test_sums_lie_on_the_gpu_where_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    base = SimpleNamespace(device=torch.device("cuda", 0))
    wanted = 8 * (5 * 1024 * 2048 + 2 * KEPT * 2048)
    for free, held, used, where in (
        (2 * wanted, 0, 0, "cuda"),
        (wanted // 2, 0, 0, "cpu"),
        (wanted // 2, 2 * wanted, wanted // 2, "cuda"),  # what this process has let go of is as good as free
        (wanted // 2, 2 * wanted, 2 * wanted, "cpu"),
    ):
        for name, value in (("mem_get_info", (free, free)), ("memory_reserved", held), ("memory_allocated", used)):
            monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
        assert room(base, 1024, 1024, 0).type == where
    # The page of costs counts the same bytes.
    one = costs.shape("TinyLlama 1.1B")
    needs = costs.sizes(one, one, 10**5, 1)["peak of the fit"]
    for factor, where in ((1.26, "cuda"), (1.24, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=needs * factor: (free, free))
        assert room(base, one.hidden, 2 * one.hidden, one.vocab).type == where


def test_sums_of_two_devices_add_up_on_the_first() -> None:
    here, there = (Gram.zeros(3, 2, device) for device in ("cpu", "meta"))
    assert (there + here).xy.device.type == "meta"


def test_the_vocabulary_counts_in_what_memory_allows(base: LanguageModel) -> None:
    assert room(base, 8, 8, 0).type == "cpu"
    with refused("8 features", "GiB"):
        room(base, 8, 8, 10**10)


def test_what_is_free_counts_and_not_what_the_machine_has(
    base: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = available(tmp_path)  # no limit there
    assert 0 < whole < 2**50
    for limit, used, cached, wanted in (
        ("max", 2**30, 0, whole),
        (2**20, 2**19, 2**10, 2**19 + 2**10),
        (2**60, 0, 0, whole),
        (2**20, 2**21, 0, -(2**20)),
    ):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
        assert available(tmp_path) == pytest.approx(wanted, rel=0.5 if wanted == whole else 0)
    assert room(base, 1024, 1024, 0).type == "cpu"
    monkeypatch.setattr(statistics, "available", lambda: 2**26)
    with refused("1,024 features", "0.1 GiB to gather", "where 0.1 GiB are free"):
        room(base, 1024, 1024, 0)


def test_the_search_and_the_cut_name_the_same_first_token() -> None:
    own = ["th", "e", "the", "t", "he", "q", "a"]
    known = {text: i for i, text in enumerate(own)}
    for word in ("the", "thea", "qa", "zz", "he"):
        found = bridges.search(word, own)
        assert min(bridges.cut(word, known), default=None) == (found[0] if found else None)


def test_made_up_tokenizers_are_of_the_size_wanted_and_read_what_they_write() -> None:
    for kind in ("sentencepiece", "byte-level"):
        model = bridges.made_up(kind, 700, 3)
        assert model.vocab_size == 700
        ids = model.tokenizer("the thin air, 42", add_special_tokens=False)["input_ids"]
        assert text_bytes(token_bytes(model.tokenizer), ids).strip() == b"the thin air, 42"


def test_the_figures_of_the_corpora_grow_with_the_rank_and_are_shares_of_their_own_kl() -> None:
    rows = json.loads((NOTEBOOKS / "corpora.json").read_text())
    for expert in corpora.EXPERTS:
        own = [row for row in rows if row["expert"] == expert]
        assert len({(row["tokens"], row["n"], row["kl_identity"]) for row in own}) == 1
        for row in own:
            assert row["recovered"] == pytest.approx(1 - row["kl"] / row["kl_identity"], abs=1e-6)
            assert row["recovered_low"] <= row["recovered"] <= row["recovered_high"]
        cuts = sorted((row for row in own if row["method"] == "v2"), key=lambda row: row["rank"])
        assert [row["rank"] for row in cuts[:-1]] == [*corpora.RANKS]
        for less, more in pairwise(cuts):  # the cut is best in squares: the KL may differ by what the text leaves open
            assert more["recovered_high"] > less["recovered_low"]
        assert cuts[-1]["recovered"] > cuts[0]["recovered_high"]


def test_the_figures_of_shared_maps_are_of_one_text_and_of_as_many_numbers() -> None:
    told = json.loads((NOTEBOOKS / "together.json").read_text())
    vocab, p, count = load(told["base"], device="cpu").vocab_size, told["features"], len(corpora.EXPERTS)
    for expert in corpora.EXPERTS:
        own = [row for row in told["rows"] if row["expert"] == expert]
        assert len({(row["n"], row["kl_identity"]) for row in own}) == 1 and len(own) * count == len(told["rows"])
        for each, shared in zip(own[::2], own[1::2], strict=True):
            assert (each["way"], shared["way"]) == ("each", "shared")
            assert each["numbers"] == each["rank"] * count * (p + vocab)
            assert shared["numbers"] == shared["rank"] * (p + count * vocab)
            assert shared["numbers"] == pytest.approx(each["numbers"], rel=0.05)
            for row in (each, shared):
                assert row["recovered"] == pytest.approx(1 - row["kl"] / row["kl_identity"], abs=1e-6)
                assert row["recovered_low"] < row["recovered"] < row["recovered_high"]


def test_the_look_ahead_on_many_places_is_kept_by_pair_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept := tmp_path / "decided.json").write_text('{"another pair": 1}')
    monkeypatch.setattr(decided, "RESULTS", kept)
    monkeypatch.setattr(sys, "argv", "decided --n 2 --tables 30 --budgets 0 4".split())
    decided.main()
    found = json.loads(kept.read_text())
    assert found.pop("another pair") == 1 and [*found] == ["pocket-phi into pocket-base, math-text"]
    (told,) = found.values()
    rows = {row["bridge"]: row for row in told["rows"]}
    assert (told["places"], told["wide_places"], rows["exact 4"]["total variation"]) == (2, 30, 0)
    assert 0 <= rows["exact 4"]["least"] <= rows["exact 4"]["undecided"] < rows["exact 0"]["undecided"]
    placed = [row["placed"] for row in told["wide"]]
    assert placed == sorted(placed), "the study's table, and stages A to C"
    with refused("500000 places", "fewer"):
        Places.of(*map(load, ("pocket-base", "pocket-phi")), Probes("one", "val", ("The",))).drawn(500_000)


def test_a_family_is_kept_beside_those_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept := tmp_path / "optimum.json").write_text('{"pocket-math": [{"family": "v2", "penalty": 1.0}], "other": []}')
    monkeypatch.setattr(optimum, "RESULTS", kept)
    texts = probe_set("math-text", "train", 12), probe_set("math-text", "val", 2)
    monkeypatch.setattr(optimum, "texts", lambda *_: texts)
    asked = {"experts": ["pocket-math"], "families": ["rrr"], "penalties": [1.0, 3.0], "steps": 9}
    optimum.same(load("pocket-base", device="cpu"), SimpleNamespace(**asked))
    found = json.loads(kept.read_text())
    assert found.pop("other") == []
    *ours, there = found["pocket-math"]
    assert there == {"family": "v2", "penalty": 1.0} and [row["penalty"] for row in ours] == [3.0, 1.0]
    for row in ours:
        closed, few, end = (row[stop] for stop in ("closed", "few", "end"))
        assert closed["passes"] == 0 < few["passes"] <= optimum.FEW < end["passes"]
        assert closed["rows"] < few["rows"] <= end["rows"] + 1e-3 and row["within"] > 0
    assert ours[0]["end"]["rows"] < ours[1]["end"]["rows"], "a smaller penalty comes nearer on the rows themselves"


def test_figures_of_another_setting_are_dropped_only_if_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept := tmp_path / "bridged.json").write_text(before := '{"val": "another text", "v2": [1]}')
    monkeypatch.setattr(bridged, "RESULTS", kept)
    monkeypatch.setattr(bridged, "text", lambda base, at, domain, split, n: probe_set("math-text", split, 2))
    monkeypatch.setattr(bridged, "PARTS", {"v2": lambda *_: [{"method": "v2", "gains": None}], "shorter": None})
    monkeypatch.setattr(sys, "argv", "bridged --corpora here --parts v2".split())
    with refused("val", "--anew"):
        bridged.main()
    assert json.loads(kept.read_text()) == json.loads(before)
    sys.argv.append("--anew")
    bridged.main()
    found = json.loads(kept.read_text())
    assert found["v2"] == [{"method": "v2", "gains": None}] and found["val"] == probe_set("math-text", "val", 2).digest
