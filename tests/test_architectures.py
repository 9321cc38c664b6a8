"""Many architectures of `transformers` go the whole way: load, harvest, fit, evaluate."""

import math

import pytest
import torch
from conftest import ARCHITECTURES, make, refused

from chassis_utils import Activations, LanguageModel, Probes, evaluate, fit, harvest, load

METHODS = ("v1", "ridge", "rrr", "lens")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LanguageModel, LanguageModel]:
    """Base and expert of one architecture, from folders."""
    root = tmp_path_factory.mktemp(request.param)
    return tuple(load(str(make(root / str(seed), request.param, seed)), device="cpu") for seed in (0, 1))


@pytest.fixture(scope="module")
def activations(pair: tuple[LanguageModel, LanguageModel], prompts: Probes) -> Activations:
    return harvest(*pair, prompts, progress=False)


def test_there_are_at_least_fifteen() -> None:
    assert len(ARCHITECTURES) >= 15


def test_the_readout_gives_the_models_own_logits(pair: tuple[LanguageModel, LanguageModel], prompts: Probes) -> None:
    for model in pair:
        ids = torch.tensor([model.tokenizer(prompts.prompts[6])["input_ids"]])
        states = model.states(ids, torch.ones_like(ids), range(model.num_layers + 1))
        with torch.inference_mode():
            own = model.model(input_ids=ids).logits[..., : model.vocab_size]
        torch.testing.assert_close(model.readout(states[model.num_layers]), own, atol=1e-4, rtol=1e-4)
        assert sorted(states) == list(range(model.num_layers + 1))


def test_a_padded_batch_equals_every_prompt_alone(
    pair: tuple[LanguageModel, LanguageModel], activations: Activations, prompts: Probes
) -> None:
    base = pair[0]
    for i in (0, 1, 6):
        ids = torch.tensor([base.tokenizer(prompts.prompts[i])["input_ids"]])
        alone = base.states(ids, torch.ones_like(ids), activations.layers)
        for layer, state in alone.items():
            torch.testing.assert_close(activations.hidden[layer][i], state[0, -1], atol=1e-4, rtol=1e-4)


def test_every_method_goes_the_whole_way(
    pair: tuple[LanguageModel, LanguageModel], activations: Activations, prompts: Probes, unseen: Probes
) -> None:
    adapters = [fit(activations, method) for method in METHODS]
    table = evaluate(*pair, adapters, [activations, unseen])
    assert list(table.method) == ["identity", *METHODS] * 2
    assert (table.kl >= -1e-9).all() and table.kl.map(math.isfinite).all()
    fitted = table[table.split == "train"].set_index("method").kl
    # Two unrelated models: on the fitted rows a map to every column must bring them much nearer.
    assert (fitted[["ridge", "rrr", "lens"]] < 0.5 * fitted["identity"]).all()

    # The other side of padding, with batches of other shapes: same figures.
    left = [harvest(*pair, p, padding="left", batch_tokens=300, progress=False) for p in (prompts, unseen)]
    other = evaluate(*pair, adapters, left)
    for figure in ("kl", "kl_identity", "recovered", "top1_agreement"):
        assert other[figure].tolist() == pytest.approx(table[figure].tolist(), rel=1e-5, abs=1e-9)


def test_a_middle_layer_is_fitted_or_refused_in_one_line(activations: Activations) -> None:
    """OPT here reads its head from a narrower state than its layers have: nothing to add a `v1` correction to."""
    for method in ("ridge", "rrr", "lens"):
        assert fit(activations, method, rank=2, layer=1).layer == 1
    if activations.layer(1).shape[1] == activations.base.hidden_size:
        assert fit(activations, "v1", rank=2, layer=1).layer == 1
    else:
        with refused("layer 1", "32", "16"):
            fit(activations, "v1", rank=2, layer=1)
