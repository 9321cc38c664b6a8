"""Changes on the way through a model: they flow, they compose, and the gradient tells what they would do."""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import ARCHITECTURES, make, refused

from alignment import into_hidden
from chassis_utils import Activations, Adapter, LanguageModel, Probes, evaluate, fit, harvest, load
from chassis_utils import activations as module
from chassis_utils.metrics import kl
from descent import gradient
from plugs import SyntheticExpert
from splits import subset


@dataclass(frozen=True)
class Push:
    """Adds a fixed vector."""

    layer: int
    by: torch.Tensor
    revision: str = "push"

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.layer,)

    changes = property(lambda self: self.layer)

    def correction(self, hidden: dict[int | str, torch.Tensor]) -> torch.Tensor:
        return self.by.expand_as(hidden[self.layer])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(str(make(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


def states(model: LanguageModel, prompt: str) -> dict[int, torch.Tensor]:
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    return model.states(ids, torch.ones_like(ids), range(model.num_layers + 1))


def test_an_edit_is_seen_at_its_layer_and_flows_through_the_later_ones(model: LanguageModel) -> None:
    before = states(model, "The river rises")
    by = torch.randn(before[1].shape[-1], generator=torch.Generator().manual_seed(0))
    after = states(model.edited(Push(1, by)), "The river rises")
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], before[1] + by, atol=1e-4, rtol=1e-4)
    assert (after[2] - before[2]).abs().max() > 1e-3
    # The model itself is as it was.
    assert all(torch.equal(state, before[layer]) for layer, state in states(model, "The river rises").items())


def test_what_prompts_share_may_be_run_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Probes("same", "train", tuple(f"The river rises in the hills {'and ' * (i % 4)}{i}" for i in range(40)))
    expert = SyntheticExpert.from_base(model, 2)
    ids = module.tokenize(model, prompts)[0]
    assert max(cut for cut, _ in module._shared(ids)) >= 3
    shared = [harvest(model, expert, prompts, padding=side, progress=False) for side in ("right", "left")]
    monkeypatch.setattr(module, "_shared", lambda ids: [(0, [*range(len(ids))])])
    apart = harvest(model, expert, prompts, progress=False)
    for one in shared:
        for layer, state in apart.hidden.items():
            torch.testing.assert_close(one.hidden[layer], state, atol=1e-4, rtol=1e-4)


def test_edits_at_one_layer_add_up_and_a_bare_model_is_the_first(base: LanguageModel, prompts: Probes) -> None:
    by = torch.randn(base.hidden_size, generator=torch.Generator().manual_seed(1))
    twice = base.edited(Push(1, by)).edited(Push(1, 2 * by))
    for layer, state in states(base.edited(Push(1, 3 * by)), "Nine towns").items():
        torch.testing.assert_close(states(twice, "Nine towns")[layer], state, atol=1e-5, rtol=1e-4)
    assert twice.bare.edits == () and base.bare is base
    assert len({base.revision, twice.revision, base.edited(Push(1, by)).revision}) == 3
    assert twice.bare.revision == base.revision and twice.head_hash == base.head_hash


def test_the_gradient_is_the_slope_of_the_final_kl(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> None:
    a = harvest(base, expert, prompts, "all", progress=False)
    generator = torch.Generator().manual_seed(2)
    after = fit(a, "rrr", 4)
    for layer, last in ((0, None), (1, None), (2, after), (3, after)):
        slope = gradient(a, layer, last, batch_tokens=200)
        by = torch.randn(base.hidden_size, generator=generator)
        size = 1e-3

        def total(push: float, layer: int = layer, by: torch.Tensor = by, last: Adapter | None = last) -> float:
            moved = harvest(base.edited(Push(layer, push * by)), expert, prompts, "all", [-1], progress=False)
            ours = base.readout(moved.hidden[3]) if last is None else last.logits(base, moved.hidden)
            return float(kl(expert.readout(a.expert_hidden), ours).sum())

        measured = (total(size) - total(-size)) / (2 * size)
        assert float(slope.double().sum(0) @ by.double()) == pytest.approx(measured, rel=2e-2, abs=0.05)


def test_a_step_of_descent_lowers_the_final_kl(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> None:
    a = harvest(base, expert, prompts, "all", progress=False)
    for layer in range(4):
        port = base.edited(fit(a, "descent", layer=layer, step=0.02))
        here = harvest(port, expert, prompts, "all", [-1], progress=False)
        table = evaluate(port, expert, Adapter.identity(port).named("edited"), here, bare=[a])
        assert table["kl"][1] < table["kl"][0]
        # The baseline is the bare base, found without being given too.
        assert evaluate(port, expert, [], here)["kl"][0] == pytest.approx(table["kl"][0], rel=1e-6)
        assert table["kl"][0] == pytest.approx(evaluate(base, expert, [], a)["kl"][0], rel=1e-9)


def test_a_synthetic_expert_is_a_function_of_the_bare_base(
    base: LanguageModel, synthetic: SyntheticExpert, prompts: Probes
) -> None:
    port = base.edited(Push(1, torch.ones(base.hidden_size)))
    moved, still = (harvest(one, synthetic, prompts, progress=False) for one in (port, base))
    torch.testing.assert_close(moved.expert_hidden, still.expert_hidden)
    assert not torch.allclose(moved.hidden[3], still.hidden[3])


def test_logits_become_states_by_least_squares(activations: Activations, synthetic: SyntheticExpert) -> None:
    a = activations.against(synthetic)
    rrr = fit(a, "rrr")
    table = evaluate(a.base, synthetic, [rrr, into_hidden(rrr, a.base)], a)
    # The synthetic expert's change of logits is the image of a change of state: nothing is lost.
    assert table["recovered"].iloc[1:].min() > 0.999
    v1 = fit(a, "v1", 3, top_k=50)
    turned = into_hidden(v1, a.base, "transpose")
    wanted = v1.correction(a.hidden) @ a.base.readout.weight[v1.columns]
    torch.testing.assert_close(turned.correction(a.hidden), wanted, atol=1e-4, rtol=1e-3)
    with refused("inverse", "pseudo"):
        into_hidden(v1, a.base, "inverse")
    with refused("hidden"):
        into_hidden(turned, a.base)


@pytest.mark.parametrize("kind", ["expert", "synthetic"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_rows_on_another_state_of_the_base_are_those_of_a_new_harvest_without_the_expert(
    base: LanguageModel, prompts: Probes, kind: str, positions: str, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plug = request.getfixturevalue(kind)
    by = torch.randn(base.hidden_size, generator=torch.Generator().manual_seed(3))
    port, places = base.edited(Push(1, by)), [1, f"block {base.num_layers - 1}", -1]
    anew = harvest(port, plug, prompts, positions, places, progress=False)
    bare, ran, own = harvest(base, plug, prompts, positions, [-1], progress=False), [], LanguageModel.states
    monkeypatch.setattr(LanguageModel, "states", lambda self, *args: ran.append(self) or own(self, *args))
    moved = bare.on(port, places)
    assert {*map(id, ran)} == {id(port)}, "another model than the edited base was run"
    assert moved.base is port and moved.expert is plug and moved.layers == anew.layers
    for name in ("expert_hidden", "prompt", "next_token"):
        assert torch.equal(getattr(moved, name), getattr(anew, name)), name
    assert all(torch.equal(moved.hidden[place], state) for place, state in anew.hidden.items())
    assert moved.num_bytes == anew.num_bytes
    back = moved.on(base)
    assert torch.equal(back.hidden[base.num_layers], bare.hidden[base.num_layers])
    with refused("is another base than"):
        bare.on(request.getfixturevalue("fresh"))


def test_a_part_of_the_prompts_and_another_expert_need_no_pass(
    activations: Activations, synthetic: SyntheticExpert, prompts: Probes
) -> None:
    base = activations.base
    part = subset(activations, 20).against(synthetic)
    again = harvest(base, synthetic, Probes("rivers", "train", prompts.prompts[:20]), progress=False)
    for layer, state in again.hidden.items():
        torch.testing.assert_close(part.hidden[layer], state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part.expert_hidden, again.expert_hidden, atol=1e-5, rtol=1e-4)
    assert part.probes == again.probes and len(part) == 20
    with refused("n = 91", "1..90"):
        subset(activations, 91)
    with refused("every position"):
        gradient(activations, 1)


def test_a_layer_that_is_not_there_and_blocks_that_cannot_be_found(base: LanguageModel, fresh: LanguageModel) -> None:
    with refused("layer 4 does not exist", base.name):
        base.edited(Push(4, torch.zeros(32)))
    fresh.backbone.layers = torch.nn.Sequential(*fresh.backbone.layers)
    with refused(fresh.name, "3 blocks", "tell us"):
        fresh.edited(Push(1, torch.zeros(32)))


def test_an_edited_base_is_not_taken_for_another(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> None:
    port = base.edited(Push(1, torch.ones(base.hidden_size)))
    a = harvest(port, expert, prompts, progress=False)
    wrong = harvest(base, expert, replace(prompts, prompts=("One.",)), progress=False)
    with refused("bare[0]", "order"):
        evaluate(port, expert, [], a, bare=[wrong])
