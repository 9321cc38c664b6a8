"""Harvesting: the same figures however the prompts are run, and shards that survive."""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import WORDS, make, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from chassis_utils import Activations, Features, LanguageModel, Probes, evaluate, fit, gather, harvest, load
from plugs import SyntheticExpert
from pocket_recipe import gpt2_tokenizer, llama_tokenizer
from splits import subset

FIGURES = ["kl", "kl_identity", "recovered", "top1_agreement", "bits_per_byte"]
METHODS = ("v1", "rrr", "lens")
# The package offers the function under the same name, so the module is found by hand.
MODULE = sys.modules["chassis_utils.activations"]


def whole_way(train: Activations, test: Activations) -> pd.DataFrame:
    """Fit at two layers on one, judge on the other."""
    adapters = [fit(train, method, rank=8, layer=layer, lam=1.0) for method in METHODS for layer in (1, 3)]
    return evaluate(train.base, train.expert, adapters, test)[FIGURES]


def same_figures(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def text(base: LanguageModel, expert: LanguageModel) -> Activations:
    """Every position of two passages."""
    return harvest(base, expert, Probes("words", "text", tuple(WORDS[:2])), "all", progress=False)


@pytest.fixture(scope="module")
def reference(activations: Activations, text: Activations) -> pd.DataFrame:
    return whole_way(activations, text)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_tokens=st.integers(1, 4096),
    padding=st.sampled_from(["left", "right"]),
    order=st.permutations(range(90)),
    extra=st.sets(st.sampled_from([0, 2])),
)
def test_how_prompts_are_run_changes_no_figure(
    activations: Activations,
    text: Activations,
    reference: pd.DataFrame,
    batch_tokens: int,
    padding: str,
    order: list[int],
    extra: set[int],
) -> None:
    base, expert, probes = activations.base, activations.expert, activations.probes
    mixed = Probes(probes.name, probes.split, tuple(probes.prompts[i] for i in order))
    options = {"layers": [1, *extra], "batch_tokens": batch_tokens, "padding": padding, "progress": False}
    again = harvest(base, expert, mixed, **options)
    assert again.layers == sorted({1, 3, *extra}) and again.prompt.tolist() == list(range(90))
    for layer in again.layers:
        torch.testing.assert_close(again.hidden[layer], activations.hidden[layer][order], atol=1e-5, rtol=1e-4)
    same_figures(whole_way(again, harvest(base, expert, text.probes, "all", **options)), reference)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_are_those_of_every_prompt_alone(
    base: LanguageModel, expert: LanguageModel, prompts: Probes, padding: str
) -> None:
    few = replace(prompts, prompts=prompts.prompts[:9])
    a = harvest(base, expert, few, "all", padding=padding, batch_tokens=100, progress=False)
    last = harvest(base, expert, few, padding=padding, batch_tokens=100, progress=False)
    for i, prompt in enumerate(few.prompts):
        ids = base.tokenizer(prompt)["input_ids"]
        rows = (a.prompt == i).nonzero()[:, 0]
        assert rows.tolist() == list(range(rows[0], rows[0] + len(ids)))
        assert a.next_token[rows].tolist() == [*ids[1:], -1]
        for model, got, end in (
            (base, a.hidden[base.num_layers], last.hidden[base.num_layers]),
            (expert, a.expert_hidden, last.expert_hidden),
        ):
            alone = model.states(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[model.num_layers][0]
            torch.testing.assert_close(got[rows], alone, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(end[i], alone[-1], atol=1e-5, rtol=1e-4)
    assert (last.next_token == -1).all()


def test_layers_count_from_the_last_too(activations: Activations, base: LanguageModel, expert: LanguageModel) -> None:
    assert torch.equal(activations.layer(-1), activations.hidden[3])
    assert torch.equal(activations.layer(-4), activations.hidden[0])
    some = harvest(base, expert, activations.probes, layers=[-2], progress=False)
    assert some.layers == [2, 3]
    with refused("layer 1", "2, 3"):
        some.layer(1)


def test_a_synthetic_expert_costs_no_forward_pass(
    base: LanguageModel, synthetic: SyntheticExpert, activations: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count(base, monkeypatch)
    a = harvest(base, synthetic, activations.probes, layers=[], batch_tokens=10**6, progress=False)
    assert len(calls) == 1
    h = a.hidden[3].double()
    wanted = h + h @ synthetic.down.double() @ synthetic.up.double()
    torch.testing.assert_close(a.expert_hidden.double(), wanted, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ on disk


def count(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of every forward pass from here on."""
    calls, states = [], model.states

    def counted(ids: torch.Tensor, *rest: object) -> dict[int, torch.Tensor]:
        calls.append(len(ids))
        return states(ids, *rest)

    monkeypatch.setattr(model, "states", counted)
    return calls


def assert_equal(one: Activations, other: Activations) -> None:
    """To the bit."""
    assert one.layers == other.layers and one.num_bytes == other.num_bytes and one.probes == other.probes
    assert all(torch.equal(one.hidden[layer], other.hidden[layer]) for layer in one.layers)
    assert all(torch.equal(getattr(one, k), getattr(other, k)) for k in ("expert_hidden", "prompt", "next_token"))


@pytest.fixture
def sharded(
    base: LanguageModel, expert: LanguageModel, prompts: Probes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Activations, Path, list[int], list[int]]:
    """Activations, their folder of 2 x 6 shards, and the forward passes made after they were written."""
    monkeypatch.setattr(MODULE, "SHARD", 16)
    made = harvest(base, expert, prompts, "all", out_dir=tmp_path / "deep" / "shards", progress=False)
    return made, tmp_path / "deep" / "shards", count(base, monkeypatch), count(expert, monkeypatch)


def again(made: Activations, folder: Path | None) -> Activations:
    return harvest(made.base, made.expert, made.probes, made.positions, out_dir=folder, progress=False)


def test_a_second_harvest_makes_no_forward_pass(sharded: tuple) -> None:
    made, folder, base_calls, expert_calls = sharded
    assert len(list(folder.iterdir())) == 12 and not list(folder.glob(".*"))
    assert_equal(again(made, folder), made)
    assert not base_calls and not expert_calls
    assert_equal(again(made, None), made)
    assert sum(base_calls) == sum(expert_calls) == 90


def test_shards_are_shared_by_experts_and_not_by_other_questions(sharded: tuple, synthetic: SyntheticExpert) -> None:
    made, folder, base_calls, _ = sharded
    harvest(made.base, synthetic, made.probes, "all", out_dir=folder, progress=False)
    assert not base_calls
    for change in ({"positions": "last"}, {"positions": "all", "layers": [1]}):
        base_calls.clear()
        harvest(made.base, synthetic, made.probes, out_dir=folder, progress=False, **change)
        assert sum(base_calls) == 90


def test_shards_of_another_size_are_not_mixed_in(sharded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folder, _, _ = sharded
    monkeypatch.setattr(MODULE, "SHARD", 32)
    assert_equal(again(made, folder), again(made, None))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "flipped"])
def test_only_a_lost_shard_is_made_again(sharded: tuple, damage: str, capsys: pytest.CaptureFixture) -> None:
    made, folder, base_calls, expert_calls = sharded
    base_shards = {p for p in folder.iterdir() if "hidden.0" in p.read_bytes()[:4000].decode(errors="replace")}
    victim = sorted(base_shards)[2]
    whole = victim.read_bytes()
    if damage == "deleted":
        victim.unlink()
    elif damage == "flipped":  # one bit of one number
        victim.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    else:
        victim.write_bytes(whole[: len(whole) // 2 if damage == "truncated" else 0])
    assert_equal(again(made, folder), made)
    assert sum(base_calls) == 16 and not expert_calls
    assert victim.read_bytes() == whole and not list(folder.glob(".*"))
    said = "".join(capsys.readouterr())
    assert (victim.name in said and "damaged" in said) == (damage != "deleted")


def test_a_harvest_that_was_cut_off_goes_on(sharded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folder, base_calls, _ = sharded
    for shard in folder.iterdir():
        shard.unlink()
    counted = made.base.states

    def cut_off(*given: object) -> object:
        if sum(base_calls) >= 48:
            raise KeyboardInterrupt
        return counted(*given)

    with monkeypatch.context() as patch:
        patch.setattr(made.base, "states", cut_off)
        with pytest.raises(KeyboardInterrupt):
            again(made, folder)
    assert len(list(folder.iterdir())) == 3
    assert_equal(again(made, folder), made)
    assert sum(base_calls) == 90


# -------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [4]}, ("layer 4", "0 (embedding) to 3")),
        ({"layers": [1, -5]}, ("layer -5",)),
        ({"positions": "first"}, ("positions", "first", "last or all")),
        ({"padding": "both"}, ("padding", "both", "left or right")),
    ],
)
def test_wrong_options_are_refused_before_any_pass(
    base: LanguageModel,
    expert: LanguageModel,
    prompts: Probes,
    tmp_path: Path,
    options: dict,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count(base, monkeypatch)
    with refused(*words):
        harvest(base, expert, prompts, **options, out_dir=tmp_path / "out", progress=False)
    assert not calls and not (tmp_path / "out").exists()


def test_a_prompt_longer_than_either_model_is_refused(base: LanguageModel, tmp_path: Path) -> None:
    short = load(str(make(tmp_path / "short", max_position_embeddings=40)), device="cpu")
    probes = Probes("long", "train", ("The sea", "river " * 50))
    for pair in ((short, base), (base, short)):
        with refused("prompt 1", "'long'", short.name, "40"):
            harvest(*pair, probes, progress=False)


def test_other_tokenizers_are_refused(base: LanguageModel, tmp_path: Path) -> None:
    foreign = load(str(make(tmp_path / "foreign", tokenizer=gpt2_tokenizer(WORDS, 300))), device="cpu")
    with refused(base.name, foreign.name, "tokenizers"):
        harvest(base, foreign, Probes("x", "train", ("The sea",)), progress=False)


def test_equal_vocabularies_that_cut_a_prompt_differently_are_refused(base: LanguageModel, tmp_path: Path) -> None:
    """The same table of tokens, but this one adds no beginning of text: its rows would be one token off."""
    tokenizer = llama_tokenizer(WORDS, len(base.tokenizer))
    tokenizer.backend_tokenizer.post_processor = gpt2_tokenizer(WORDS, 300).backend_tokenizer.post_processor
    bare = load(str(make(tmp_path / "bare", tokenizer=tokenizer)), device="cpu")
    assert bare.tokenizer("The sea")["input_ids"] == base.tokenizer("The sea")["input_ids"][1:]
    with refused(base.name, bare.name, "token"):
        harvest(base, bare, Probes("x", "train", ("The sea",)), "all", progress=False)


def test_prompts_are_cut_again_only_where_tokenizers_are_written_differently(
    activations: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, whole = [], MODULE.tokenize
    monkeypatch.setattr(MODULE, "tokenize", lambda model, probes: cut.append(model.name) or whole(model, probes))
    assert_equal(again(activations, None), activations)
    assert cut == [activations.base.name]
    tokenizer = llama_tokenizer(WORDS, len(activations.base.tokenizer))
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([backend.normalizer, normalizers.Replace("no such words", "")])
    twin = load(str(make(tmp_path / "twin", seed=1, tokenizer=tokenizer)), device="cpu")
    assert twin.tokenizer_hash != activations.base.tokenizer_hash
    assert_equal(again(replace(activations, expert=twin), None), activations)
    assert cut[1:] == [activations.base.name, twin.name]


def test_a_synthetic_expert_of_another_base_is_refused(base: LanguageModel, tmp_path: Path) -> None:
    wide = load(str(make(tmp_path / "wide", hidden_size=48)), device="cpu")
    for other in (base, wide), (wide, base):
        with refused("synthetic", other[0].name):
            harvest(other[0], SyntheticExpert.from_base(other[1]), Probes("x", "train", ("The sea",)), progress=False)


def test_a_synthetic_expert_of_no_rank_is_refused(base: LanguageModel) -> None:
    for rank in (0, -1, base.hidden_size + 1):
        with refused(f"rank {rank} ", "1..32"):
            SyntheticExpert.from_base(base, rank=rank)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_prompt_and_layer(
    fresh: LanguageModel, expert: LanguageModel, prompts: Probes, tmp_path: Path, value: float
) -> None:
    fresh.model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with refused("layer 2", "prompt ", "'rivers'", fresh.name):
        harvest(fresh, expert, prompts, out_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_one_prompt_that_is_not_finite_is_named(
    fresh: LanguageModel, expert: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "SHARD", 16)
    texts = [f"The sea, {'at last ' * (i % 4)}in year {i}" for i in range(40)]
    texts[29] += " [é]"
    rare = fresh.tokenizer("é", add_special_tokens=False)["input_ids"][-1]
    fresh.model.model.embed_tokens.weight[rare] = torch.nan
    with refused("layer 0", "prompt 29 ", "'sea'"):
        harvest(fresh, expert, Probes("sea", "train", tuple(texts)), "all", progress=False)
    for value in (torch.nan, torch.inf, -torch.inf):
        fresh.model.model.embed_tokens.weight[rare] = value
        with refused("NaN or infinity", "prompt 29 ", "'sea'"):
            gather(fresh, expert, Probes("sea", "train", tuple(texts)), Features((0,)), progress=False)


def test_a_folder_that_cannot_be_written_is_refused(activations: Activations, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for folder in (blocked, blocked / "below"):
        with refused(str(folder), "cannot write"):
            again(activations, folder)
    assert blocked.read_text() == "in the way"


def test_a_part_of_the_prompts_is_the_same_as_harvesting_that_part(
    base: LanguageModel, expert: LanguageModel, activations: Activations
) -> None:
    part, whole = subset(activations, 20, 50), activations.probes
    alone = harvest(base, expert, Probes(whole.name, whole.split, whole.prompts[50:70]), progress=False)
    assert part.probes == alone.probes and len(part) == 20
    for layer in activations.layers:
        torch.testing.assert_close(part.hidden[layer], alone.hidden[layer], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.expert_hidden, alone.expert_hidden, atol=1e-4, rtol=1e-4)
    for n, first in ((0, 0), (91, 0), (41, 50), (5, -1)):
        with refused(f"n = {n}", "90"):
            subset(activations, n, first)


def test_shards_of_other_weights_are_noticed_said_and_made_again(
    base: LanguageModel, fresh: LanguageModel, synthetic: SyntheticExpert, prompts: Probes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    harvest(base, synthetic, prompts, out_dir=tmp_path, progress=False)
    with torch.no_grad():
        fresh.backbone.layers[1].mlp.up_proj.weight += 0.1
    fresh.__dict__.pop("revision", None)
    own = SyntheticExpert.from_base(fresh, 4, 2.0)
    made = harvest(fresh, own, prompts, out_dir=tmp_path, progress=False)
    assert "is of other weights and is made again" in capsys.readouterr().out
    wanted = harvest(fresh, own, prompts, progress=False)
    assert all(torch.equal(made.hidden[layer], state) for layer, state in wanted.hidden.items())
    monkeypatch.setattr(torch, "__version__", f"{torch.__version__}.other")
    harvest(fresh, own, prompts, out_dir=tmp_path, progress=False)
    assert "is of other torch and is made again" in capsys.readouterr().out
    harvest(fresh, own, prompts, out_dir=tmp_path, progress=False)
    assert not capsys.readouterr().out
