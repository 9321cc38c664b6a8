"""The port on real small models: what is plugged in acts in transformers' own generate, and the base stays as it is."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import transformers as tf
from conftest import make, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis_utils import (
    Adapter,
    Bridge,
    Bridged,
    ChassisError,
    Features,
    LanguageModel,
    Port,
    Probes,
    fit,
    harvest,
    load,
    probe_set,
)
from chassis_utils.models import tensor_hash
from routes import Router

PROMPTS = ["Tom has 12 apples and buys", "The", "What is love? It is a thing of"]


@pytest.fixture(scope="module")
def pocket() -> dict[str, LanguageModel]:
    return {name: load(f"pocket-{name}", device="cpu") for name in ("base", "math", "shakespeare", "phi")}


@pytest.fixture(scope="module")
def adapters(pocket: dict[str, LanguageModel]) -> dict[str, Adapter]:
    """Of every kind that can be plugged in: edits on the way, the final state alone, columns, the head's input."""
    base = pocket["base"]
    sets = {"math": "math-text", "shakespeare": "verse"}
    a = {k: harvest(base, pocket[k], probe_set(v, n=12), "all", progress=False) for k, v in sets.items()}
    some = {"math": fit(a["math"]), "verse": fit(a["shakespeare"]), "rrr": fit(a["math"], "rrr", rank=16)}
    return some | {"v1": fit(a["math"], "v1"), "near": fit(a["math"], "near", passes=2)}


@pytest.fixture
def port(pocket: dict[str, LanguageModel], adapters: dict[str, Adapter]) -> Port:
    port = Port(pocket["base"])
    for name, adapter in adapters.items():
        port.plug(name, adapter)
    return port


def said(base: LanguageModel, adapter: Adapter | None, prompt: str) -> torch.Tensor:
    """Logits behind every token of a prompt `(tokens, vocab)`, by the way that evaluate goes."""
    adapter = adapter or Adapter.identity(base)
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    places = [*{base.num_layers, *adapter.reads}]
    hidden = base.edited(*adapter.edits).states(ids, torch.ones_like(ids), places)
    return adapter.logits(base, {place: state[0] for place, state in hidden.items()})


def greedy_ids(base: LanguageModel, adapter: Adapter | None, prompt: str, n: int) -> list[int]:
    """At most n greedy tokens, each from a pass over everything before it: no cache, no batch, no hooks."""
    ids = list(base.tokenizer(prompt)["input_ids"])
    length, adapter = len(ids), adapter or Adapter.identity(base)
    for _ in range(n):
        row = torch.tensor([ids])
        places = [*{base.num_layers, *adapter.reads}]
        hidden = base.edited(*adapter.edits).states(row, torch.ones_like(row), places)
        last = adapter.logits(base, {place: state[0, -1:] for place, state in hidden.items()})
        if (token := int(last.argmax())) == base.tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[length:]


def greedy(base: LanguageModel, adapter: Adapter | None, prompt: str, n: int) -> str:
    """The text that they make."""
    ids, new = base.tokenizer(prompt)["input_ids"], greedy_ids(base, adapter, prompt, n)
    before, whole = (base.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + new))
    return whole[len(before) :]


def written(port: Port, prompt: str, n: int) -> list[int]:
    """Tokens that the port's own model generates."""
    ids = torch.tensor([port.base.tokenizer(prompt)["input_ids"]])
    new = port.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return [token for token in new[0, ids.shape[1] :].tolist() if token != port.base.tokenizer.eos_token_id]


@pytest.mark.parametrize("name", [None, "math", "verse", "rrr", "v1", "near"])
def test_a_pass_through_the_port_is_what_evaluate_judges(
    port: Port, adapters: dict[str, Adapter], name: str | None
) -> None:
    port.use(name)
    for prompt in PROMPTS:
        ids = torch.tensor([port.base.tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            ours = port.model(input_ids=ids).logits[0]
        torch.testing.assert_close(ours, said(port.base, adapters.get(name), prompt), atol=1e-4, rtol=1e-4)
    probabilities = port.probabilities(PROMPTS)
    for row, prompt in zip(probabilities, PROMPTS, strict=True):
        wanted = said(port.base, adapters.get(name), prompt)[-1].softmax(-1)
        torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", [None, "math", "rrr"])
def test_generation_is_that_of_a_loop_without_cache(
    port: Port, adapters: dict[str, Adapter], name: str | None
) -> None:
    port.use(name)
    wanted = [greedy(port.base, adapters.get(name), prompt, 16) for prompt in PROMPTS]
    assert port.generate(PROMPTS, max_new_tokens=16) == wanted
    assert [port.generate(prompt, max_new_tokens=16) for prompt in PROMPTS] == wanted
    assert ["".join(port.generate(prompt, max_new_tokens=16, stream=True)) for prompt in PROMPTS] == wanted
    own = tf.pipeline("text-generation", model=port.model, tokenizer=port.base.tokenizer)
    told = own(PROMPTS[0], max_new_tokens=16, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert told.strip() == wanted[0].strip()


def hooks(model: LanguageModel) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules()]


def test_the_base_is_never_changed(port: Port) -> None:
    base = port.base
    weights = {name: tensor_hash(one) for name, one in base.model.state_dict().items()}
    bare, before = said(base, None, PROMPTS[0]), hooks(base)
    for choice in ("math", {"math": 0.5, "verse": 2.0}, "v1", None, "near"):
        port.use(choice)
        port.generate(PROMPTS[0], max_new_tokens=4)
        assert torch.equal(said(base, None, PROMPTS[0]), bare)
    port.unplug("near")
    assert port.in_use == {}
    assert {name: tensor_hash(one) for name, one in base.model.state_dict().items()} == weights
    assert hooks(base) == before
    pointers = zip(base.model.parameters(), port.model.parameters(), strict=True)
    assert all(own.data_ptr() == other.data_ptr() for own, other in pointers)


def test_what_is_in_use_adds_up(port: Port, adapters: dict[str, Adapter]) -> None:
    base, prompt = port.base, PROMPTS[2]
    bare = said(base, None, prompt)
    both = bare + 0.5 * (said(base, adapters["rrr"], prompt) - bare) + 2 * (said(base, adapters["v1"], prompt) - bare)
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    for choice in ({"rrr": 0.5, "v1": 2.0}, {"v1": 2.0, "rrr": 0.5}):
        port.use(choice)
        with torch.inference_mode():
            torch.testing.assert_close(port.model(input_ids=ids).logits[0], both, atol=2e-4, rtol=1e-4)
    port.strength("rrr", 0.25)
    port.use({"rrr": 2.0, "v1": 2.0})
    with torch.inference_mode():
        torch.testing.assert_close(port.model(input_ids=ids).logits[0], both, atol=2e-4, rtol=1e-4)


def test_weights_lead_from_the_base_to_the_expert(port: Port, adapters: dict[str, Adapter]) -> None:
    wanted, told = said(port.base, adapters["math"], PROMPTS[0])[-1].softmax(-1), []
    for weight in (0.0, 0.5, 1.0):
        port.use({"math": weight} if weight else None)
        told.append(float((port.probabilities(PROMPTS[:1])[0] - wanted).abs().sum()))
    assert told[0] > told[1] > 0.01 > 1e-4 > told[2]


def test_a_live_expert_alone_says_what_it_says(pocket: dict[str, LanguageModel]) -> None:
    port = Port(pocket["base"])
    port.plug("live", pocket["math"])
    port.use("live")
    wanted = [greedy(pocket["math"], None, prompt, 8) for prompt in PROMPTS]
    assert port.generate(PROMPTS, max_new_tokens=8) == wanted
    for row, prompt in zip(port.probabilities(PROMPTS), PROMPTS, strict=True):
        torch.testing.assert_close(row, said(pocket["math"], None, prompt)[-1].softmax(-1), atol=1e-5, rtol=1e-3)
    own, other = (said(pocket[name], None, PROMPTS[0])[-1].log_softmax(-1) for name in ("base", "math"))
    port.strength("live", 0.5)
    for choice, weight in (({"live": 1.0}, 0.5), ({"live": 3.0}, 1.5)):
        port.use(choice)
        mixed = (own + weight * (other - own)).softmax(-1)
        torch.testing.assert_close(port.probabilities(PROMPTS[:1])[0], mixed, atol=1e-5, rtol=1e-3)


def test_an_expert_of_another_tokenizer_speaks_through_its_bridge(pocket: dict[str, LanguageModel]) -> None:
    base, bridge, prompt = pocket["base"], Bridge(pocket["phi"], pocket["base"], "C"), "Tom has 12 apples and"
    port, text = Port(base), prompt
    port.plug("phi", bridge)
    bare = port.probabilities([prompt])[0]
    port.use("phi")
    told, found = port.probabilities([prompt])[0], bridge(None, [prompt])
    torch.testing.assert_close(told, (found.probabilities[0] + found.unplaced[0] * bare).float(), atol=1e-5, rtol=1e-3)
    for _ in range(12):  # greedy, each token asked for anew, and told in text
        text += port.generate(text, max_new_tokens=1)
        assert text.startswith(prompt)
    assert port.generate(prompt, max_new_tokens=12) == text[len(prompt) :] != ""
    with refused("differ in tokenizer", "Bridge"):
        port.plug("bare phi", pocket["phi"])


class Own:
    """A live expert of one's own: sure of one token, whatever the text."""

    def __init__(self, token: int, odd: object = None) -> None:
        self.token, self.odd = token, odd

    def bridged(self, base: LanguageModel, prompts: list[str], progress: bool = True) -> Bridged:
        if isinstance(self.odd, Exception):
            raise self.odd
        mass = torch.zeros(len(prompts), base.vocab_size + 2, dtype=torch.float64)
        mass[:, self.token] = 1.0 if self.odd is None else self.odd
        return Bridged(mass, torch.zeros(len(prompts)), torch.zeros(len(prompts)))


def test_an_expert_of_ones_own_is_heard_if_it_bridges_itself(pocket: dict[str, LanguageModel]) -> None:
    port, token = Port(pocket["base"]), pocket["base"].prompt_ids("The apples")[-1]
    port.plug("own", Own(token))
    said = port.generate("The", max_new_tokens=3, logits_processor=[Only(token)])
    port.use("own")
    assert port.generate("The", max_new_tokens=3) == said != ""
    assert port.report().set_index("plug").loc["own", "method"] == "Own"
    for odd, words in ((math.nan, "no probabilities"), (-1.0, "no probabilities"), (ValueError("down"), "ValueError")):
        port.plug(words + str(odd), Own(token, odd))
        port.use(words + str(odd))
        for call in (lambda: port.generate("The", max_new_tokens=2), lambda: port.probabilities(["The"])):
            with refused("a live expert, Own, failed", words):
                call()
    with refused("is no plug"):
        port.plug("class", Own)


def test_a_live_model_of_a_short_context_says_so(pocket: dict[str, LanguageModel], tmp_path: Path) -> None:
    port = Port(pocket["base"])
    short = load("pocket-math", device="cpu")
    short.context = 12
    port.plug("short", short)
    port.use("short")
    with refused("pocket-math takes 12"):
        port.generate("The", max_new_tokens=20)


def test_a_text_ends_before_a_stop_string(port: Port) -> None:
    port.use("math")
    whole = port.generate(PROMPTS[0], max_new_tokens=40)
    for stop in (whole[10:12], whole[17:23], whole[-1]):
        cut = whole[: whole.index(stop)]
        assert port.generate(PROMPTS[0], max_new_tokens=40, stop=stop) == cut
        assert "".join(port.generate(PROMPTS[0], max_new_tokens=40, stop=[stop, "§"], stream=True)) == cut


class Counted(tf.LogitsProcessor):
    """Counts the tokens that are asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return scores


def test_no_token_is_written_behind_a_stop_string(port: Port) -> None:
    port.use("math")
    whole = port.generate(PROMPTS[0], max_new_tokens=40)
    ids = greedy_ids(port.base, port.plugs["math"], PROMPTS[0], 40)
    for stop in (whole[10:12], whole[17:23]):
        needed = next(n for n in range(1, 41) if stop in port.base.tokenizer.decode(ids[:n]))
        count = Counted()
        port.generate(PROMPTS[0], max_new_tokens=40, stop=stop, logits_processor=[count])
        assert count.asked == needed < 40


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 0.3}, None), ({"min_p": 0.5}, None), ({"epsilon_cutoff": 0.05}, None)],
)
def test_nothing_is_drawn_that_a_setting_leaves_out(port: Port, setting: dict, kept: int | None) -> None:
    """Of a hundred draws, with what each setting is defined to keep."""
    p = port.probabilities(["The"])[0].sort(descending=True)
    (name, value), before = next(iter(setting.items())), p.values.cumsum(0) - p.values
    kept = kept or int({"top_p": before < value, "min_p": p.values >= value * p.values[0],
                        "epsilon_cutoff": p.values >= value}[name].sum())  # fmt: skip
    one = {"max_new_tokens": 1}
    allowed = {port.generate("The", logits_processor=[Only(int(i))], **one) for i in p.indices[:kept]}
    drawn = {*port.generate(["The"] * 100, **setting, **one)}
    assert drawn <= allowed and len(drawn) > 1
    assert not {*port.generate(["The"] * 100, temperature=1.0, **one)} <= allowed, "without it, others are drawn"
    cold = port.generate("The", max_new_tokens=4, temperature=0.0, do_sample=True)
    assert cold == port.generate("The", max_new_tokens=4)


def test_characters_of_several_tokens_stream_whole_and_stop(pocket: dict[str, LanguageModel]) -> None:
    """The tokenizer spells an emoji in bytes; a bias makes the base write it over and over."""
    base = pocket["base"]
    ids = base.tokenizer("🎈", add_special_tokens=False)["input_ids"][-4:]
    port, prompt = Port(base), "The sea " + "🎈🎈"

    class Spell(tf.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            last = input_ids[0, -1].item()
            following = ids[(ids.index(last) + 1) % 4] if last in ids else ids[0]
            return torch.full_like(scores, -100.0).index_fill_(1, torch.tensor([following]), 0.0)

    assert len({*ids}) == 4
    spell = {"logits_processor": [Spell()]}
    for n in (8, 9, 10, 11):
        pieces = list(port.generate(prompt, max_new_tokens=n, stream=True, **spell))
        assert pieces == ["🎈", "🎈"], "what is cut off inside a character is left out"
        assert port.generate(prompt, max_new_tokens=n, **spell) == "🎈🎈"
    assert port.generate(prompt, max_new_tokens=12, stop="🎈", **spell) == ""


def test_a_seed_draws_the_same_text_and_leaves_the_generator_alone(port: Port) -> None:
    before = torch.get_rng_state()
    one, again, other = (port.generate("The", seed=seed, temperature=1.0, max_new_tokens=24) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_changes_under_a_generation_and_a_reader_may_leave(port: Port) -> None:
    port.use("math")
    stream = port.generate(PROMPTS[0], max_new_tokens=400, stream=True, min_new_tokens=400)
    next(stream)
    for change in (lambda: port.use(None), lambda: port.unplug("math"), lambda: port.strength("math", 2.0)):
        with refused("text is being generated"):
            change()
    before = threading.active_count()
    start = time.monotonic()
    stream.close()
    assert threading.active_count() == before - 1 and time.monotonic() - start < 2
    port.unplug("math")
    assert "math" not in port.plugs


def test_a_hundred_plugs_take_the_room_of_a_hundred(
    pocket: dict[str, LanguageModel], adapters: dict[str, Adapter]
) -> None:
    """Each its own numbers, none copied; a hundredth of each adds up to their mean."""
    port, one, draw = Port(pocket["base"]), adapters["rrr"], torch.Generator().manual_seed(0)
    own = [replace(one, up=one.up + 0.1 * torch.randn(one.up.shape, generator=draw)) for _ in range(100)]
    for i, adapter in enumerate(own):
        port.plug(f"plug {i}", adapter)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for x in port.plugs.values() for t in (x.down, x.up, x.bias)}  # fmt: skip
    assert sum(held.values()) <= 100 * 4 * one.num_parameters
    port.use({f"plug {i}": 0.01 for i in range(100)})
    ids = torch.tensor([port.base.tokenizer(PROMPTS[0])["input_ids"]])
    mean = replace(one, up=torch.stack([x.up for x in own]).mean(0))
    with torch.inference_mode():
        ours = port.model(input_ids=ids).logits[0]
    torch.testing.assert_close(ours, said(port.base, mean, PROMPTS[0]), atol=1e-3, rtol=1e-3)


def test_a_folder_is_plugged_in_by_its_name(port: Port, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    adapters["rrr"].save(tmp_path / "adapter")
    port.plug("again", str(tmp_path / "adapter"))
    port.use("again")
    again = port.probabilities(PROMPTS)
    port.use("rrr")
    assert torch.equal(port.probabilities(PROMPTS), again)


def test_the_report_tells_what_is_there(port: Port) -> None:
    port.use({"math": 0.5})
    table = port.report().set_index("plug")
    assert [*table.index[1:]] == [*port.plugs] and table.loc["math", "weight"] == 0.5
    assert table.loc["math", "edits"] == 6 and table.loc["rrr", "rank"] == 16


def test_the_last_that_counts_is_taken_out(port: Port) -> None:
    port.use({"math": 1.0, "verse": 0.0})
    port.unplug("math")
    assert port.in_use == {} and "math" not in port.plugs


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Cohere", "Phi", "OPT"])
def test_every_kind_of_head_is_corrected_as_it_was_fitted(tmp_path: Path, architecture: str) -> None:
    """Capped and scaled heads, heads with a bias or with rows that stand for no token."""
    models = [load(str(make(tmp_path / str(seed), architecture, seed)), device="cpu") for seed in (0, 1)]
    probes = Probes("x", "train", ("The river rises in the hills.", "What is 12 + 13?", "A baker has 24 rolls."))
    adapter = fit(harvest(*models, probes, "all", progress=False), "rrr", lam=1.0)
    port = Port(models[0])
    port.plug("x", adapter)
    port.use("x")
    wanted = torch.stack([said(models[0], adapter, one)[-1].softmax(-1) for one in probes.prompts])
    torch.testing.assert_close(port.probabilities(probes.prompts), wanted, atol=1e-4, rtol=1e-3)
    # A random model writes broken characters, whose text depends on where one begins to read: tokens are compared.
    for prompt in probes.prompts:
        assert written(port, prompt, 6) == greedy_ids(models[0], adapter, prompt, 6)


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral", "DeepseekV3"])
def test_edits_act_alike_with_a_cache_and_without(tmp_path: Path, architecture: str) -> None:
    """Where experts of a mixture see a part of the tokens, and where maps read what a cache holds, too."""
    base, draw = load(str(make(tmp_path, architecture)), device="cpu"), torch.Generator().manual_seed(0)

    def drawn(m: int, layer: int, *places: int | str, **kind: object) -> Adapter:
        p = sum(Features(places).sizes(base))
        maps = (0.1 * torch.randn(*shape, generator=draw) for shape in ((p, 3), (3, m), (m,)))
        return Adapter("drawn", layer, *maps, base.name, base.head_hash, features=Features(places), **kind)

    size, final = base.hidden_size, base.num_layers
    edits = (drawn(size, 1, 0, "block 0", space="hidden", onto="layer"),)
    edits += (drawn(size, final, final - 1, f"block {final - 1}", space="hidden", onto="stream"),)
    adapter = drawn(base.vocab_size, final, final, f"block {final - 1}", edits=edits)
    port = Port(base)
    port.plug("drawn", adapter)
    bare = [written(port, prompt, 6) for prompt in PROMPTS]
    port.use("drawn")
    told = [written(port, prompt, 6) for prompt in PROMPTS]
    assert told == [greedy_ids(base, adapter, one, 6) for one in PROMPTS] != bare


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 10**400, 1e308, "much", None, [1.0]])
def test_weights_that_are_none_are_refused(port: Port, weight: object) -> None:
    port.use("math")
    for change in (lambda: port.use({"math": 1.0, "verse": weight}), lambda: port.strength("math", weight)):
        with refused("finite number of at least zero"):
            change()
    assert port.in_use == {"math": 1.0}
    port.use({"math": np.float32(0.5)})
    assert port.in_use == {"math": 0.5}


def test_wrong_plugs_are_refused(
    port: Port, pocket: dict[str, LanguageModel], adapters: dict[str, Adapter]
) -> None:
    with refused("'math' is taken"):
        port.plug("math", adapters["rrr"])
    with refused("'gone' is not plugged in", "math, verse"):
        port.use("gone")
    with refused("not plugged in"):
        port.unplug("gone")
    with refused("sum to zero"):
        port.use({"math": 0.0})
    with refused("is no plug"):
        port.plug("x", 3)
    with refused("pocket-base", "pocket-math", "made for"):
        Port(pocket["math"]).plug("x", adapters["rrr"])
    a = harvest(port.base, pocket["math"], probe_set("math-text", n=4), "all", [3], progress=False)
    with refused("layer 3", "in place of"):
        port.plug("x", fit(a, "v1", layer=3, lam=1.0))
    with refused("edits already"):
        Port(port.base.edited(*adapters["math"].edits))
    with refused("pocket-base is no model", "load"):
        Port("pocket-base")
    for name in (3, ["a"], None, ""):
        with refused("the name", "no text, or empty"):
            port.plug(name, adapters["rrr"])
    for choice in (["math"], 3, {"math"}):
        with refused("is no choice", "{name: weight}"):
            port.use(choice)
    with refused("a map of sizes"):
        port.plug("narrow", replace(adapters["rrr"], up=adapters["rrr"].up[:, :-1], bias=adapters["rrr"].bias[:-1]))
    first, *rest = adapters["math"].edits
    with refused("edits the final layer"):
        port.plug("late", replace(adapters["math"], edits=(*rest, replace(first, layer=port.base.num_layers))))
    with refused("a pass with it fails"):
        port.plug("early", replace(adapters["math"], edits=(replace(rest[-2], layer=1),)))
    for odd in ([], None, "gone"):
        with refused("is not plugged in"):
            port.unplug(odd)
    ids = torch.tensor([port.base.tokenizer(PROMPTS[0])["input_ids"]])
    with refused("logits_to_keep"):
        port.model(input_ids=ids, logits_to_keep=torch.tensor([1, 2]))
    for prompts in ("The", [], None):
        with refused("a list of prompts"):
            port.probabilities(prompts)
    port.router = Router.fit(port.base, {"math": probe_set("math-text", n=4)})
    with refused("no text"):
        port.route(None)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_sequence_of_calls_changes_the_base(
    pocket: dict[str, LanguageModel], adapters: dict[str, Adapter], data: st.DataObject
) -> None:
    """Whatever is called, in whatever order, and whether it is refused or not."""
    port, base = Port(pocket["base"]), pocket["base"]
    weights = {name: tensor_hash(one) for name, one in base.model.state_dict().items()}
    here, bare = hooks(base), said(base, None, PROMPTS[1])
    names = st.sampled_from([*adapters, "live", "gone"])
    numbers = st.floats(-0.5, 3.0)
    for _ in range(data.draw(st.integers(1, 8))):
        name = data.draw(names)
        plug = adapters.get(name, pocket["math"])
        calls = {
            "plug": lambda name=name, plug=plug: port.plug(name, plug, data.draw(numbers)),
            "unplug": lambda name=name: port.unplug(name),
            "use": lambda: port.use(data.draw(st.none() | names | st.dictionaries(names, numbers, max_size=3))),
            "strength": lambda name=name: port.strength(name, data.draw(numbers)),
            "generate": lambda: port.generate(PROMPTS[:2], max_new_tokens=2),
            "stream": lambda: next(port.generate("The", max_new_tokens=3, stream=True, temperature=1.0), ""),
            "probabilities": lambda: port.probabilities(PROMPTS[:2]),
            "report": port.report,
        }
        with suppress(ChassisError):
            calls[data.draw(st.sampled_from([*calls]))]()
    assert {name: tensor_hash(one) for name, one in base.model.state_dict().items()} == weights
    assert hooks(base) == here and torch.equal(said(base, None, PROMPTS[1]), bare)


def test_passes_in_several_threads_do_not_mix(port: Port) -> None:
    port.use({"math": 0.5, "near": 0.5})
    ids = [torch.tensor([port.base.tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]

    def alone(one: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return port.model(input_ids=one).logits

    wanted = [alone(one) for one in ids]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(alone, ids * 8))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted * 8, strict=True))


def test_a_long_neighbour_takes_no_room_from_a_short_prompt(port: Port) -> None:
    long = "The sea. " * 168
    options = {"max_new_tokens": 40, "suppress_tokens": [port.base.tokenizer.eos_token_id]}
    alone = port.generate(PROMPTS[1], **options)
    assert port.generate([long, PROMPTS[1]], **options)[1] == alone
    assert len(alone) > len(port.generate(long, **options))


def test_streams_beside_one_another_draw_as_if_alone(pocket: dict[str, LanguageModel]) -> None:
    ports = [Port(pocket["base"]) for _ in range(3)]
    draw = {"temperature": 1.0, "top_k": 50, "max_new_tokens": 24}
    alone = [port.generate("The", seed=seed, **draw) for seed, port in enumerate(ports)]
    torch.manual_seed(7)
    wanted = torch.rand(8)
    torch.manual_seed(7)
    streams = [port.generate("The", seed=seed, stream=True, **draw) for seed, port in enumerate(ports)]
    texts, numbers = [""] * 3, []
    for _ in range(30):
        texts = [text + next(stream, "") for text, stream in zip(texts, streams, strict=True)]
        numbers += [torch.rand(1)] if len(numbers) < 8 else []
    assert texts == alone and len({*alone}) == 3
    assert torch.equal(torch.cat(numbers), wanted), "nobody else's draws are disturbed"


def test_what_is_drawn_comes_as_often_as_it_is_likely(pocket: dict[str, LanguageModel]) -> None:
    """And never from what top_k leaves out."""
    port, n = Port(pocket["base"]), 600
    p = port.probabilities(["The"])[0].double()
    texts = port.generate(["The"] * n, max_new_tokens=1, temperature=2.0, top_k=5, seed=3)
    likely = p.topk(5)
    share = likely.values.sqrt() / likely.values.sqrt().sum()
    names = [port.generate("The", max_new_tokens=1, logits_processor=[Only(int(i))]) for i in likely.indices]
    counts = np.array([texts.count(name) for name in names])
    assert counts.sum() == n and len({*names}) == 5
    assert scipy.stats.chisquare(counts, share.numpy() * n).pvalue > 1e-3


class Only(tf.LogitsProcessor):
    """Leaves one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf).index_fill_(1, torch.tensor([self.token]), 0.0)


def test_beams_over_live_experts_add_up_what_is_normalised(pocket: dict[str, LanguageModel]) -> None:
    """The score of the best beam is the sum of its tokens' log probabilities in the mixture."""
    port = Port(pocket["base"])
    port.plug("live", pocket["math"])
    port.use({"live": 0.5})
    ids = torch.tensor([port.base.tokenizer("Tom has 12")["input_ids"]])
    options = {"num_beams": 3, "max_new_tokens": 4, "length_penalty": 0.0, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "attention_mask": torch.ones_like(ids)}
    told = port.model.generate(ids, **options)
    row, total = told.sequences[0], 0.0
    for place in range(ids.shape[1], len(row)):
        before = row[None, :place]
        mixed = 0.0
        for name in ("base", "math"):
            model = pocket[name]
            state = model.states(before, torch.ones_like(before))[model.num_layers][0, -1]
            mixed += 0.5 * model.readout(state).double().log_softmax(-1)
        total += float(mixed.log_softmax(-1)[row[place]])
    assert float(told.sequences_scores[0]) == pytest.approx(total, abs=1e-3)


def test_a_live_model_is_heard_inside_a_character_too(pocket: dict[str, LanguageModel]) -> None:
    """The same tokenizer needs no text: an expert alone spells what it would spell."""
    port, ids = Port(pocket["base"]), pocket["base"].tokenizer("🎈", add_special_tokens=False)["input_ids"]
    port.plug("live", pocket["math"])
    port.use("live")
    row = torch.tensor([pocket["base"].tokenizer("The ")["input_ids"] + ids[:-2]])
    new = port.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=1, do_sample=False)
    own = pocket["math"].model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=1, do_sample=False)
    assert torch.equal(new, own)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("The", {"stop": ""}, "stop strings that are not empty"),
        (["The", "A"], {"stream": True}, "one to stream"),
        ("The", {"max_new_tokens": 0}, "1 or more"),
        ("The", {"heat": 3}, "transformers refuses"),
        ("\ud800", {}, "no Unicode text"),
        ([], {}, "give a prompt"),
        (None, {}, "no Unicode text"),
        (["The", 3], {}, "no Unicode text"),
        ("The", {"stop": 3}, "stop"),
        ("The", {"stop": [1]}, "stop"),
        ("The", {"stop": None}, "stop"),
        ("The", {"max_new_tokens": "5"}, "1 or more"),
        ("The", {"max_new_tokens": None}, "1 or more"),
        ("The", {"max_new_tokens": 2.5}, "1 or more"),
        ("The", {"seed": "a"}, "seed"),
        ("The", {"seed": 2**80}, "seed"),
        ("The", {"return_dict_in_generate": True}, "the port's to set"),
        ("The", {"num_return_sequences": 2, "temperature": 1.0}, "the port's to set"),
        ("The", {"temperature": -1.0}, "transformers refuses"),
        ("The", {"top_p": math.nan}, "transformers refuses"),
        ("The", {"num_beams": 0}, "transformers refuses"),
        ("The", {"custom_generate": "nobody/nothing"}, "the port's to set"),
        ("The", {"top_p": "much"}, "transformers refuses"),
        ("The", {"num_beams": 2, "temperature": 1.0}, "beams do not draw"),
        ("word " * 600, {}, "shorten it"),
    ],
)
def test_wrong_settings_are_refused(port: Port, prompt: object, options: dict, words: str) -> None:
    with refused(words):
        port.generate(prompt, **options)


def test_a_text_ends_with_the_context(port: Port) -> None:
    prompt = "The sea. " * 168
    length = len(port.base.tokenizer(prompt)["input_ids"])
    assert port.base.context - 12 < length < port.base.context
    text = port.generate(prompt, max_new_tokens=100, min_new_tokens=1)
    assert len(port.base.tokenizer(prompt + text)["input_ids"]) <= port.base.context + 2


def test_a_prompt_is_routed_to_its_plug_or_to_the_bare_base(port: Port) -> None:
    domains = {"math": probe_set("math-text"), "verse": probe_set("verse")}
    port.router = Router.fit(port.base, domains, probe_set("prose"))
    for name, prompt in (
        ("math", "Question: Ben has 12 boxes with 9 pencils in each. He gives 20 away. How many are left?\nAnswer:"),
        (None, "The town lies on the north bank of the river and had a population of 4,210 in 1901."),
        ("verse", "First Lord:\nMy liege, the night hath borne a storm,\nAnd thou dost sleep, nor heed'st what"),
    ):
        assert port.route(prompt) == name
        assert port.in_use == ({} if name is None else {name: 1.0})


def test_routes_that_lead_nowhere_are_refused(port: Port, pocket: dict[str, LanguageModel]) -> None:
    port.use("rrr")
    with refused("no router", "Router.fit"):
        port.route("What is this?")
    some = Probes("a", "train", ("3 plus 4 is 7", "12 less 5 is 7")), Probes("b", "train", ("O love", "O night"))
    port.router = Router.fit(pocket["math"], {"math": some[0], "verse": some[1]})
    with refused("a router for pocket-math", "pocket-base"):
        port.route("What is this?")
    port.router = Router.fit(pocket["base"], {"law": some[0]})
    with refused("'law' is not plugged in"):
        port.route("3 plus 4 is 7")
    assert port.in_use == {"rrr": 1.0}


def test_a_pass_that_was_broken_off_leaves_nothing_to_the_next(port: Port) -> None:
    port.use("math")
    wanted = port.generate(PROMPTS[0], max_new_tokens=3)
    block = port.model.model.layers[2].mlp.down_proj
    with block.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())):
        with pytest.raises(KeyboardInterrupt):
            port.generate(PROMPTS[0], max_new_tokens=3)
    assert port.generate(PROMPTS[0], max_new_tokens=3) == wanted
