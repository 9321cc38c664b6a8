"""What pages 15 to 18 ask of an expert with another tokenizer: against loops, brute force and wrong inputs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import refused

from bridging import (
    LEAST,
    Places,
    StringBridge,
    Target,
    all_tokens,
    chosen,
    compare,
    coverage,
    drift,
    dumbbells,
    families,
    fates,
    firsts_of_pairs,
    greedy,
    homes,
    kept,
    last_states,
    likeliest,
    lines,
    logits,
    pairs_map,
    quoted,
    short,
    softened,
    spread,
    states,
    study_of,
    studys_rank,
    summary,
    target_logits,
    variation,
    with_firsts,
    written_alike,
)
from chassis_utils import Bridge, LanguageModel, Probes, evaluate, fit, load, probe_set, token_bytes

PROMPTS = (
    "Why is the sky blue?",
    "Two and",
    "A baker has 24 rolls and sells 9. How many are left?",
    "In physics, derive F",
)
pytestmark = pytest.mark.filterwarnings("ignore:.*the fit interpolates")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def plug() -> LanguageModel:
    return load("pocket-phi", device="cpu")


@pytest.fixture(scope="module")
def in_bytes(model: LanguageModel, plug: LanguageModel) -> Bridge:
    return Bridge(plug, model, "A")


@pytest.fixture(scope="module")
def segments(model: LanguageModel, plug: LanguageModel) -> Bridge:
    return Bridge(plug, model, "C")


@pytest.fixture(scope="module")
def places(model: LanguageModel, plug: LanguageModel) -> Places:
    return Places.before_spaces(model, plug, probe_set("math-text", "train", 4), 24, seed=1)


def said_alone(model: LanguageModel, text: str) -> torch.Tensor:
    """Logits `(length, vocab)` of one text in a pass of its own."""
    with torch.inference_mode():
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        return model.model(ids).logits[0, :, : model.vocab_size].float()


def test_states_of_many_texts_are_those_of_each_alone(model: LanguageModel, plug: LanguageModel) -> None:
    for reader in (model, plug):
        for text, own, last in zip(PROMPTS, states(reader, PROMPTS), last_states(reader, PROMPTS), strict=True):
            alone = said_alone(reader, text)
            assert torch.allclose(logits(reader, own), alone, atol=1e-3)
            assert torch.allclose(logits(reader, last[None])[0], alone[-1], atol=1e-3)


def test_a_misread_prompt_is_read_earlier_by_what_was_padded(plug: LanguageModel) -> None:
    prompts = ["Why is the sky blue?", "Why is the sky"]
    more, fewer = (len(plug.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    misread = logits(plug, last_states(plug, prompts, misread=True))
    assert 0 < more - fewer < fewer
    assert torch.allclose(misread[0], said_alone(plug, prompts[0])[-1], atol=1e-3), "the longest is read rightly"
    assert torch.allclose(misread[1], said_alone(plug, prompts[1])[fewer - 1 - (more - fewer)], atol=1e-3)


def test_greedy_texts_are_those_of_a_loop_over_tokens(model: LanguageModel, plug: LanguageModel) -> None:
    for writer in (model, plug):
        for prompt, text in zip(PROMPTS, greedy(writer, PROMPTS, tokens=6), strict=True):
            ids = writer.tokenizer(prompt)["input_ids"]
            start = len(ids)
            while len(ids) < start + 6 and writer.tokenizer.eos_token_id not in ids[start:]:
                with torch.inference_mode():
                    ids.append(int(writer.model(torch.tensor([ids])).logits[0, -1, : writer.vocab_size].argmax()))
            assert text == prompt + writer.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_what_a_model_cannot_read_is_refused(model: LanguageModel, plug: LanguageModel) -> None:
    for read in (states, last_states, greedy):
        with refused("text 1", "0 tokens", plug.name):
            read(plug, ["fine", ""])
        with refused("text 0", "tokens", model.name, str(model.context)):
            read(model, ["word " * (model.context + 1)])


def test_drift_is_nothing_at_the_prompt_and_a_loop_behind_it(model: LanguageModel) -> None:
    texts = [PROMPTS[0] + " It is because", PROMPTS[1] + " three"]
    frame = drift(model, PROMPTS[:2], texts, most=3)
    assert (frame.loc[frame["tokens read"] == 0, "KL"] == 0).all()
    for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=False)):
        head, whole = (
            said_alone(model, prompt).double().log_softmax(-1),
            said_alone(model, text).double().log_softmax(-1),
        )
        rows = frame[(frame["number"] == number) & (frame["tokens read"] > 0)]
        assert len(rows) == min(3, len(whole) - len(head))
        for read, value in rows[["tokens read", "KL"]].itertuples(index=False):
            later = whole[len(head) - 1 + int(read)]
            assert value == pytest.approx(float((later.exp() * (later - head[-1])).sum()), rel=1e-3)


def test_places_before_spaces_are_boundaries_of_both(model: LanguageModel, plug: LanguageModel, places: Places) -> None:
    passages = probe_set("math-text", "train", 4).prompts
    assert len(places) == 24 == len({*places.probes.prompts})
    for prompt, number in zip(places.probes.prompts, places.passage.tolist(), strict=True):
        assert passages[number].startswith(prompt + " ") and len(prompt.encode()) >= LEAST
        for one in (model, plug):  # what follows changes no token of the prompt
            ids = one.tokenizer(prompt)["input_ids"]
            assert one.tokenizer(passages[number])["input_ids"][: len(ids)] == ids
    again = Places.of(model, plug, places.probes)
    assert torch.allclose(again.hidden, places.hidden, atol=1e-4)
    assert torch.allclose(again.expert_hidden, places.expert_hidden, atol=1e-4)
    assert torch.allclose(places.said.sum(1), torch.ones(24).double())


def test_places_are_drawn_by_seed_and_too_many_are_refused(model: LanguageModel, plug: LanguageModel) -> None:
    probes = probe_set("math-text", "train", 2)
    drawn = [Places.before_spaces(model, plug, probes, 8, seed).probes.prompts for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for wrong in (0, 100_000):
        with refused(f"{wrong} places", "math-text", "ask for fewer"):
            Places.before_spaces(model, plug, probes, wrong)


def test_some_places_are_the_rows_of_those_numbers(places: Places) -> None:
    few = places.some([3, 1], "few", "val")
    assert (few.probes.name, few.probes.split) == ("few", "val")
    assert few.probes.prompts == (places.probes.prompts[3], places.probes.prompts[1])
    assert torch.equal(few.hidden, places.hidden[[3, 1]]) and torch.equal(few.passage, places.passage[[3, 1]])
    assert torch.allclose(few.said, places.said[[3, 1]], rtol=1e-3)


def test_targets_are_distributions_with_a_floor_of_their_own() -> None:
    placed = torch.tensor([[0.2, 0.0, 0.3], [0.0, 0.5, 0.0]]).double()
    own = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
    assert torch.allclose(spread(placed), torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]).double())
    assert torch.allclose(target_logits(placed).softmax(-1), spread(placed))
    assert target_logits(placed, 1e-8)[0, 1] == pytest.approx(math.log(1e-8))
    mixed = softened(placed, own, 0.25)
    assert torch.allclose(mixed.exp(), 0.75 * spread(placed) + 0.25 * own.double().softmax(-1))
    # Where nothing was placed, the base's own order stays.
    assert mixed[1, 0] - mixed[1, 2] == pytest.approx(4.0)
    assert torch.isfinite(spread(torch.zeros(1, 3))).all()


def test_variation_is_a_distance_between_0_and_1() -> None:
    p, q, r = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    assert torch.equal(variation(p, p), torch.zeros(5)) and torch.equal(variation(p, q), variation(q, p))
    assert (variation(p, r) <= variation(p, q) + variation(q, r) + 1e-12).all()
    one, other = torch.eye(2).double()
    assert float(variation(one[None], other[None])) == 1
    assert coverage(torch.stack([one, other]) / 4, torch.eye(2)) == {"placed": 0.25, "off": 0.0}


def test_a_told_fit_is_the_ridge_of_its_definition(places: Places, segments: Bridge) -> None:
    wanted = softened(places.placed(segments), places.own)
    a = places.beside(Target("told", "1"), wanted)
    adapter, x = fit(a, "told", lam=2.0), places.hidden.double()
    y = (wanted.float() - places.own).double()
    xc = x - x.mean(0)
    weight = torch.linalg.solve(xc.T @ xc + 2.0 * torch.eye(x.shape[1]), xc.T @ (y - y.mean(0)))
    added = adapter.correction({adapter.layer: places.hidden}).double()
    assert torch.allclose(added, xc @ weight + y.mean(0), atol=1e-3)
    assert adapter.fitted_on == places.probes.fingerprints


def test_v1_of_given_logits_is_v1_of_an_expert_that_has_a_head(model: LanguageModel, places: Places) -> None:
    other = replace(model, name="other")
    state = places.hidden + torch.randn(places.hidden.shape, generator=torch.Generator().manual_seed(0))
    with_head = replace(places.beside(Target("t", "1"), places.own), expert=other, expert_hidden=state)
    given = places.beside(Target("t", "1"), logits(model, state))
    theirs, ours = fit(with_head, "v1", lam=1.0), fit(given, "told_v1", lam=1.0)
    assert torch.equal(theirs.columns, ours.columns)
    added = [one.correction({one.layer: places.hidden}) for one in (theirs, ours)]
    assert torch.allclose(*added, atol=1e-2)


def test_the_penalty_chosen_is_the_best_on_val(places: Places, segments: Bridge) -> None:
    target, train, val = Target("told", "1"), places.some(range(16)), places.some(range(16, 24))
    a = train.beside(target, softened(train.placed(segments), train.own))
    b = val.beside(target, target_logits(val.placed(segments)))
    lams = (0.1, 10.0, 1000.0)
    several = [fit(a, "told", lam=lam).named(f"{lam}") for lam in lams]
    judged = evaluate(places.base, target, [*several, chosen(a, b, lams)], b)[1:]
    assert judged["method"].tolist()[-1] == "ridge"
    assert judged["kl"].iloc[-1] == pytest.approx(judged["kl"].iloc[:-1].min())


def test_the_study_is_repeated_with_its_leak(model: LanguageModel, plug: LanguageModel, in_bytes: Bridge) -> None:
    target = Target("by bytes", plug.revision)
    adapter, frame = study_of(in_bytes, target, 12, "How to compute 2 + 2?")
    assert (adapter.method, adapter.rank) == ("as_reported", studys_rank(model))
    rows = frame[frame["method"] == "as_reported"].set_index("split")
    assert rows["n"].to_dict() == {"val": 6, "test": 6, "template": 1}
    assert rows["kl"]["val"] == rows["kl"]["test"], "val and test are the same prompts"
    assert adapter.fitted_on >= Probes("x", "val", probe_set("reasoning", "train", 12).prompts[:6]).fingerprints
    quote = quoted("vocab_bridge_stage_a")
    said = frame.apply(quote, axis=1)
    assert said[frame["method"] == "identity"].isna().all() and said[frame["method"] == "as_reported"].notna().all()
    table = summary(frame, {"as_reported": "as reported"}, quote).data
    assert (table["what"] == "as reported").all() and len(table) == 3
    assert table["reported"].tolist() == said.dropna().tolist()
    assert summary(frame, {"as_reported": "as reported"}).data["reported"].isna().all()


def test_mass_goes_where_homes_say(model: LanguageModel, plug: LanguageModel, in_bytes: Bridge) -> None:
    at, ours, theirs = homes(in_bytes), token_bytes(model.tokenizer), token_bytes(plug.tokenizer)
    assert len(at) == plug.vocab_size
    for i in range(0, plug.vocab_size, 97):
        if at[i] >= 0 and theirs[i]:
            assert ours[at[i]] == theirs[i]
        elif theirs[i]:
            assert theirs[i] not in ours
    said = torch.eye(plug.vocab_size)[::97].double()
    placed = all_tokens(in_bytes, said)
    assert torch.equal(placed.sum(1) > 0.999, torch.from_numpy(at[::97] >= 0))
    assert torch.allclose(placed, in_bytes(said).probabilities)


def test_all_tokens_keeps_what_a_bridge_by_string_drops(model: LanguageModel, plug: LanguageModel) -> None:
    strings = StringBridge(plug, model, "A")
    said = torch.rand(2, plug.vocab_size, generator=torch.Generator().manual_seed(0)).double()
    said = said / said.sum(1, keepdim=True)
    cut = kept(said, 256)
    assert (cut > 0).sum(1).tolist() == [256, 256] and torch.equal(cut[cut > 0], said[cut > 0])
    assert cut[cut > 0].min() >= said[cut == 0].median()
    assert torch.allclose(all_tokens(strings, cut), strings(said).probabilities)
    assert (all_tokens(strings, said).sum(1) > strings(said).probabilities.sum(1)).all()


def test_pairs_spell_the_token_they_stand_for(model: LanguageModel, plug: LanguageModel, in_bytes: Bridge) -> None:
    firsts, at = firsts_of_pairs(in_bytes), homes(in_bytes)
    ours, theirs = token_bytes(model.tokenizer), token_bytes(plug.tokenizer)
    known = {piece for piece in ours if piece}
    for i, several in [*firsts.items()][::53]:
        assert at[i] == -1 and several
        spelled = [ours[first] for first in several]
        assert spelled == [theirs[i][:n] for n in range(1, len(theirs[i])) if {theirs[i][:n], theirs[i][n:]} <= known]
    lost = [i for i, piece in enumerate(theirs) if piece and at[i] < 0 and i not in firsts and i < plug.vocab_size]
    for i in lost[::53]:
        assert not any({theirs[i][:n], theirs[i][n:]} <= known for n in range(1, len(theirs[i])))
    said = torch.full((1, plug.vocab_size), 1 / plug.vocab_size).double()
    lowest = {i: min(ids) for i, ids in firsts.items()}
    placed, added = with_firsts(in_bytes, lowest, said)
    assert float(added.sum()) == pytest.approx(len(firsts) / plug.vocab_size)
    assert torch.allclose(placed, Bridge(plug, model, "B")(said).probabilities)


def test_the_likeliest_tokens_are_in_order_with_their_fates(places: Places) -> None:
    frame = likeliest(places.some([0, 5]), lambda i: ("even" if i % 2 == 0 else "odd", f"id {i}"), top=4)
    assert frame.groupby("prompt", sort=False).size().tolist() == [4, 4]
    for prompt, rows in frame.groupby("prompt", sort=False):
        said = places.said[places.probes.prompts.index(prompt)]
        assert rows["p"].tolist() == pytest.approx(said.topk(4).values.tolist(), rel=1e-4)
        for token, note in rows[["token", "note"]].itertuples(index=False):
            assert written_alike(places.expert, int(note.split()[1])) == token
    assert written_alike(places.base, places.base.tokenizer.convert_tokens_to_ids("▁the")) == "▁the"
    assert written_alike(places.expert, places.expert.tokenizer.convert_tokens_to_ids("Ġthe")) == "▁the"


@pytest.fixture(scope="module")
def made() -> dict[str, LanguageModel]:
    return families([*probe_set("prose", "train", 3).prompts], 420)


def test_tokenizers_trained_twice_are_the_same(made: dict[str, LanguageModel]) -> None:
    again = families([*probe_set("prose", "train", 3).prompts], 420)
    for name, toy in made.items():
        one, two = (model.tokenizer.backend_tokenizer.to_str() for model in (toy, again[name]))
        assert one == two, name


def test_every_family_writes_text_and_reads_it_again(made: dict[str, LanguageModel]) -> None:
    text = "and the old house"
    for name, one in made.items():
        ids = one.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert one.tokenizer.decode(ids).strip() == text, name
    assert len(made["bytes"].tokenizer("the house", add_special_tokens=False)["input_ids"]) == 9
    kinds = {json.loads(one.tokenizer.backend_tokenizer.to_str())["model"]["type"] for one in made.values()}
    assert kinds == {"BPE", "Unigram", "WordPiece"}


def test_pairs_of_tokenizers_are_compared_as_a_loop_would(made: dict[str, LanguageModel]) -> None:
    some = [made["byte-level BPE"], made["bytes"], made["Unigram"]]
    frame = compare(some, ["the old house, and the river"])
    assert len(frame) == 6 and set(map(tuple, frame[["expert", "base"]].to_numpy())) == {
        (a.name, b.name) for a in some for b in some if a is not b
    }
    of = frame.set_index(["expert", "base"])
    theirs, ours = ({p for p in token_bytes(one.tokenizer) if p} for one in some[:2])
    assert of.loc[("byte-level BPE", "bytes"), "byte overlap"] == len(theirs & ours) / len(theirs)
    assert of.loc[("bytes", "byte-level BPE"), "byte overlap"] == 1
    shares = frame.drop(columns=["expert", "base"]).to_numpy()
    assert ((shares >= 0) & (shares <= 1 + 1e-9)).all() and (frame["A"] <= frame["B"] + 1e-9).all()
    assert of.loc[("bytes", "byte-level BPE"), "A"] == pytest.approx(1)
    # Bytes cut a word of ASCII letters everywhere: the other agrees where it writes letter by letter.
    tokens = some[0].tokenizer.tokenize("the old house, and the river")
    words = " ".join(" " * token.startswith("Ġ") + token.replace("Ġ", "") for token in tokens).split("  ")
    letters = [all(len(piece) == 1 for piece in word.split()) for word in words]
    assert len(letters) == 6 and of.loc[("bytes", "byte-level BPE"), "exact match"] == sum(letters) / 6
    same = compare([some[0], replace(some[0], name="again")], ["the old house"])
    assert same[["byte overlap", "exact match", "A", "B", "C"]].to_numpy() == pytest.approx(1)


def test_figures_carry_their_data_and_controls(places: Places) -> None:
    frame = pd.DataFrame(
        [{"probes": p, "method": m, "x": x, "a": x / 10, "b": 1 - x / 10} for p in "uv" for m in "st" for x in (1, 2)]
    )
    looks = {"s": ("blue", "circle", "solid"), "t": ("green", "square", "dot")}
    figure = lines(frame, "x", {"a": ("first", ".0%"), "b": ("second", "")}, looks, "A title", "An alt", "See.")
    assert [trace.visible for trace in figure.data] == [True, True, False, False]
    assert [b.label for menu in figure.layout.updatemenus for b in menu.buttons] == ["u", "v", "first", "second"]
    assert list(figure.data[0].y) == [0.1, 0.2] and figure.layout.meta["alt"] == "An alt"
    figure = dumbbells(pd.DataFrame({"label": ["p", "q"], "identity": [1.0, 0.0], "kl": [0.5, 2.0]}), "Causes", "Look.")
    assert list(figure.data[-1].x) == [0.5, 2.0] and list(figure.data[-2].x) == [1.0, 0.01]
    assert "q: 0 and 2" in figure.layout.meta["alt"]
    some = likeliest(places.some([0, 1]), lambda i: ("kept" if i % 2 else "lost", ""), top=3)
    figure = fates(some, {"kept": "blue", "lost": "grey"}, "Fates")
    for trace in figure.data[:2]:
        here = some[(some["prompt"] == some["prompt"][0]) & (some["fate"] == trace.name)]
        assert sum(share for share in trace.x if share is not None) == pytest.approx(here["p"].sum(), rel=1e-3)
    assert short(0, "a\nb" + "x" * 40) == "1: …" + "x" * 26
    pairs = pd.DataFrame({"expert": ["k", "l"], "base": ["l", "k"], "A": [0.5, 0.25], "C": [1.0, 0.75]})
    figure = pairs_map(pairs)
    assert "75% to 100%" in figure.layout.meta["alt"]
    assert [b.label for b in figure.layout.updatemenus[0].buttons] == ["C: mass placed", "A: mass placed"]
