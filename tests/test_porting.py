"""Several experts on one base: what page 21 measures of a port, against the slow way, and its figures."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import refused

import porting
from chassis_utils import Adapter, LanguageModel, Port, Probes, evaluate, fit, harvest, load, probe_set
from chassis_utils.metrics import kl
from records import Records
from routes import Router, confusion

TEXTS = {"math": "math-text", "verse": "verse"}
NAMES = {"math": "pocket-math", "verse": "pocket-shakespeare"}
VAL = {side: probe_set(text, "val") for side, text in TEXTS.items()}
WEIGHTS = {
    "base": {},
    "0.0": {"math": 0.0, "verse": 1.0},
    "0.3": {"math": 0.3, "verse": 0.7},
    "1.0": {"math": 1.0, "verse": 0.0},
}
SINGLE = [[(side, text)] for side, probes in VAL.items() for text in probes.prompts[:3]]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def experts() -> dict[str, LanguageModel]:
    return {side: load(name, device="cpu") for side, name in NAMES.items()}


@pytest.fixture(scope="module")
def adapters(base: LanguageModel, experts: dict[str, LanguageModel]) -> dict[str, Adapter]:
    """One with edits on the way, and one that is a map of the final state."""
    train = {
        side: harvest(base, experts[side], probe_set(text, n=9), "all", [-1], progress=False)
        for side, text in TEXTS.items()
    }
    return {"math": fit(train["math"], "v2", lam=1e-2), "verse": fit(train["verse"], "rrr", rank=16)}


@pytest.fixture(scope="module")
def port(base: LanguageModel, adapters: dict[str, Adapter]) -> Port:
    assert adapters["math"].edits
    port = Port(base)
    for side, adapter in adapters.items():
        port.plug(side, adapter)
    return port


@pytest.fixture(scope="module")
def frame(port: Port, experts: dict[str, LanguageModel]) -> pd.DataFrame:
    return porting.told(port, SINGLE, WEIGHTS, experts)


@pytest.fixture(scope="module")
def table(frame: pd.DataFrame) -> pd.DataFrame:
    return porting.summary(frame)


@pytest.fixture(scope="module")
def router(base: LanguageModel) -> Router:
    rest = [probe_set("prose"), probe_set("numerals", n=32)]
    return Router.fit(base, {side: probe_set(text) for side, text in TEXTS.items()}, rest)


def test_documents_take_passages_of_the_sides_in_turn_each_once() -> None:
    documents = porting.alternating(VAL)
    assert [[side for side, _ in parts] for parts in documents[:2]] == [
        ["math", "verse", "math"],
        ["verse", "math", "verse"],
    ]
    used = [text for parts in documents for _, text in parts]
    assert len(used) == len({*used}) == 3 * len(documents) and len(documents) == 12
    assert {text.strip() for text in used} <= {prompt for probes in VAL.values() for prompt in probes.prompts}


def test_every_byte_of_a_document_belongs_to_the_side_that_wrote_it(base: LanguageModel) -> None:
    parts = [("math", "Das größte ist 12 ☀️ ∎.\n\n"), ("verse", "Où est-il,\n第三 頁?\n\n"), ("math", "x")]
    ids, places = porting.placed(base, [parts, parts[:1]])
    first = places[places["document"] == 0]
    assert first["token"].tolist() == [*range(1, len(ids[0]))]
    wanted = {"math": len((parts[0][1] + "x").encode()), "verse": len(parts[1][1].encode())}
    assert first.groupby("side")["bytes"].sum().to_dict() == wanted
    starts = first[first["since"] == 0]
    assert starts["side"].tolist() == ["verse", "math"]  # what begins the text is no token of it
    assert (first["side"] != first["side"].shift()).sum() == 3


def test_what_is_told_of_a_token_is_what_the_port_says_behind_the_text_before(
    port: Port, experts: dict[str, LanguageModel], frame: pd.DataFrame
) -> None:
    base = port.base
    ids, _ = porting.placed(base, SINGLE)
    live = Port(base)
    for side, expert in experts.items():
        live.plug(side, expert)
    for document, token in ((0, 9), (2, 40), (4, 23)):
        prompt = base.tokenizer.decode(ids[document][1:token])
        if base.tokenizer(prompt)["input_ids"] != ids[document][:token]:
            continue
        alone = {side: Port(expert).probabilities([prompt])[0].log() for side, expert in experts.items()}
        for name, weights in WEIGHTS.items():
            here = frame[(frame["document"] == document) & (frame["token"] == token) & (frame["choice"] == name)]
            for who, is_live in ((port, False), (live, True)):
                porting.use(who, weights)
                ours = who.probabilities([prompt])[0].log()
                row = here[here["live"] == is_live].iloc[0]
                assert row["nats"] == pytest.approx(-float(ours[ids[document][token]]), abs=1e-4)
                for side, theirs in alone.items():
                    assert row[f"kl_{side}"] == pytest.approx(float(kl(theirs[None], ours[None])), abs=1e-4)
    port.use(None)


def test_a_summary_is_what_evaluate_says_of_each_plug_alone(
    base: LanguageModel, experts: dict[str, LanguageModel], adapters: dict[str, Adapter], table: pd.DataFrame
) -> None:
    rows = table[~table["live"]].set_index(["choice", "side", "to"])
    for side, probes in VAL.items():
        probes = replace(probes, split="text", prompts=probes.prompts[:3])
        for to, expert in experts.items():
            for choice, adapter in (("1.0", adapters["math"]), ("0.0", adapters["verse"])):
                bare, told = evaluate(base, expert, adapter, probes).to_dict("records")
                assert rows.loc[("base", side, to), "bits_per_byte"] == pytest.approx(bare["bits_per_byte"], rel=1e-4)
                assert rows.loc[(choice, side, to), "bits_per_byte"] == pytest.approx(told["bits_per_byte"], rel=1e-4)
            # A KL behind the last token of a passage, which evaluate counts too, is of nothing that was written.
            a = harvest(base, expert, probes, "all", [-1], progress=False)
            theirs, inside = expert.readout(a.expert_hidden), a.next_token >= 0
            both = Adapter.identity(base), adapters["verse"]
            each = [kl(theirs, one.logits(base, a.hidden))[inside] for one in both]
            row = rows.loc[("0.0", side, to)]
            assert row["n"] == inside.sum()
            assert [row["identity"], row["kl"]] == pytest.approx([float(one.mean()) for one in each], rel=1e-3)
            assert row["recovered"] == pytest.approx(1 - float(each[1].sum() / each[0].sum()), abs=1e-3)
            assert row["recovered_low"] < row["recovered"] < row["recovered_high"]


def test_a_mixture_of_live_experts_at_its_ends_is_one_of_them(table: pd.DataFrame) -> None:
    live = table[table["live"]].set_index(["choice", "side", "to"])
    for choice, own in (("1.0", "math"), ("0.0", "verse")):
        for side in TEXTS:
            assert live.loc[(choice, side, own), "kl"] < 1e-5
            other = next(one for one in TEXTS if one != own)
            assert live.loc[(choice, side, other), "kl"] > 0.1
    ours = table[~table["live"]].set_index(["choice", "side", "to"])
    for side in TEXTS:  # at the ends, the experts mixed are the one expert
        assert ours.loc[("1.0", side, "mixture"), "kl"] == pytest.approx(
            ours.loc[("1.0", side, "math"), "kl"], abs=1e-5
        )
        assert ours.loc[("1.0", side, "mixture"), "identity"] == pytest.approx(
            ours.loc[("base", side, "math"), "kl"], abs=1e-5
        )


def test_text_that_was_fitted_on_and_documents_too_long_are_refused(port: Port) -> None:
    with refused("'math' was fitted on a part"):
        porting.told(port, [[("math", probe_set("math-text", n=1).prompts[0] + "\n\n")]], {"base": {}})
    with refused("document 0 has"):
        porting.told(port, [[("math", "sun and moon " * 400)]], {"base": {}})


def test_the_router_is_asked_about_nothing_that_follows(base: LanguageModel, port: Port, router: Router) -> None:
    documents = porting.alternating(VAL)[:2]
    said = porting.told(port, documents, {"base": {}, "math": {"math": 1.0}, "verse": {"verse": 1.0}})
    ids, _ = porting.placed(base, documents)
    for window, fresh in ((16, False), (48, True)):
        found = porting.routed(said, router, documents, window, fresh)
        assert len(found) == sum(map(len, ids)) - len(ids)
        merged = found.merge(said, on=["document", "token"], suffixes=("", "_told"))
        for document, start in ((0, 0), (0, 8), (0, 64), (1, 160), (1, 168)):
            seen = base.tokenizer.decode(ids[document][max(0, start - window) : start], skip_special_tokens=True)
            seen = seen.split("\n\n")[-1] if fresh else seen
            choice = (router([seen])["choice"][0] or "base") if seen.strip() else "base"
            here = merged[(merged["document"] == document) & (merged["token"] // 8 == start // 8)]
            here = here[here["choice_told"] == choice]
            assert len(here) and here["nats"].tolist() == here["nats_told"].tolist()


def test_an_oracle_takes_each_sides_own_plug_and_ratios_are_of_the_same_tokens(port: Port, router: Router) -> None:
    documents = porting.alternating(VAL)[:3]
    choices = {"base": {}, "math": {"math": 1.0}}  # verse is the bare base's
    said = porting.told(port, documents, choices)
    told = porting.company(said, router, documents, choices, (32, True), ([*choices], 1.0, 0.1))
    oracle = told[told["choice"] == "oracle"].set_index(["document", "token"])
    for side, choice in (("math", "math"), ("verse", "base")):
        own = said[(said["choice"] == choice) & (said["side"] == side)].set_index(["document", "token"])
        assert oracle.loc[own.index, "nats"].tolist() == own["nats"].tolist()
    assert len(oracle) == len(said) / 2
    ratio = porting.over(told, "base", "math")
    assert ratio["value"] == pytest.approx(
        porting.bits(said[said["choice"] == "math"]) / porting.bits(said[said["choice"] == "base"])
    )
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert porting.over(told, "base", "base") == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    names = {"math": "math always", "routed": "routed", "filtered": "filtered", "oracle": "oracle"}
    shown = porting.agents(told, names).set_index("in use")
    assert shown.loc["math always", "all"] == pytest.approx(porting.bits(said[said["choice"] == "math"]))
    assert shown.loc["oracle", "own plug"] == 1 and 0 < shown.loc["filtered", "own plug"] < 1
    assert shown.loc["math always", "own plug"] == pytest.approx((said["side"] == "math").mean())


def chain(far: torch.Tensor, heat: float, switch: float) -> torch.Tensor:
    """The probability of each side before each block, summed over all paths of one document."""
    blocks, sides = far.shape
    found = []
    for length in range(blocks + 1):
        weight = torch.zeros(sides, dtype=torch.float64)
        for path in itertools.product(range(sides), repeat=length + 1):
            moves = [1 - (sides - 1) * switch if a == b else switch for a, b in itertools.pairwise(path)]
            says = [math.exp(-float(far[i, side]) / (2 * heat)) for i, side in enumerate(path[:-1])]
            weight[path[-1]] += math.prod(moves) * math.prod(says) / sides
        found.append(weight / weight.sum())
    return torch.stack(found)


@pytest.mark.parametrize(("heat", "switch"), [(1.0, 0.1), (0.5, 0.25), (4.0, 0.0), (1.0, 1 / 3)])
def test_the_filter_is_the_sum_over_all_paths(heat: float, switch: float) -> None:
    far = 3 * torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = porting.beliefs(far, heat, switch)
    assert torch.allclose(found, torch.stack([chain(one, heat, switch) for one in far]))
    if switch == 1 / 3:  # what was read tells nothing of the next block
        assert torch.allclose(found, torch.full_like(found, 1 / 3))
    later = far.clone()
    later[:, 2:] += 5 * torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(porting.beliefs(later, heat, switch)[:, :3], found[:, :3])  # nothing of what follows
    for wrong in ((0.0, 0.1), (1.0, -0.1), (1.0, 0.4)):
        with refused("heat", "switch"):
            porting.beliefs(far, *wrong)


def test_blocks_are_as_far_as_the_router_says_of_their_mean_state(base: LanguageModel, router: Router) -> None:
    documents = porting.alternating(VAL, seam="\n")[:2]
    assert not any("\n\n" in text for parts in documents for _, text in parts)
    far = porting.distances(router, documents)
    ids, _ = porting.placed(base, documents)
    for number, row in enumerate(ids):
        with torch.inference_mode():
            states = base.model.model(torch.tensor([row])).last_hidden_state[0].double()
        for block in (0, 1, len(row) // 8 - 1):
            mean = states[max(1, 8 * block) : 8 * block + 8].mean(0)
            squares = ((mean @ router.whiten - router.means) ** 2).sum(1)
            edge = router.slack * router.limit[1]
            wanted = [*squares[:2].tolist(), float(min(edge, squares[2:].min()))]
            assert far[number, block].tolist() == pytest.approx(wanted, rel=1e-3)


def test_the_filter_takes_the_weights_that_are_nearest(port: Port, router: Router) -> None:
    documents = porting.alternating(VAL)[:1]
    choices = {"base": {}, "0.5": {"math": 0.5, "verse": 0.5}, "math": {"math": 1.0}, "verse": {"verse": 1.0}}
    said = porting.told(port, documents, choices)
    blocks = -(-(said["token"].max() + 1) // 8)
    belief = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]]).double()
    belief = belief[[0, 1, 2, 3] * int(blocks // 4 + 1)][None, :blocks]
    found = porting.filtered(said, router, belief, choices)
    assert len(found) == len(said) / len(choices)
    merged = found.merge(said, on=["document", "token"], suffixes=("", "_told"))
    for at, choice in enumerate(("math", "0.5", "base", "verse")):
        here = merged[(merged["token"] // 8 % 4 == at) & (merged["choice_told"] == choice)]
        assert len(here) and here["nats"].tolist() == here["nats_told"].tolist()


def test_shares_by_length_end_in_those_of_whole_passages(router: Router) -> None:
    sets = {text: (side, VAL[side]) for side, text in TEXTS.items()} | {"prose": (None, probe_set("prose", "val"))}
    shares = porting.by_length(router, sets)
    whole = confusion(router, dict(sets.values()))
    for name, (truth, probes) in sets.items():
        row = whole.loc[truth or "none"]
        assert shares.loc[name, "whole"] == pytest.approx(row[truth or "none"] / len(probes))
        assert shares.loc[name, "n"] == len(probes) == row.sum()
    short = porting.by_length(router, {"one": (None, Probes("one", "test", ("The town lies on the river.",)))})
    assert short.loc["one", ["16", "32", "64"]].isna().all() and short.loc["one", "whole"] in (0, 1)
    with refused("was fitted on"):
        porting.by_length(router, {"verse": ("verse", probe_set("verse"))})


def test_records_of_mixtures_name_what_they_are_near_to(table: pd.DataFrame, tmp_path: Path) -> None:
    records = Records(tmp_path, experiment="port", notebook="n", base="pocket-base")
    porting.record(records, table, TEXTS, NAMES)
    rows = records.save()
    kls = rows[rows["metric"] == "kl"]
    keys = ["expert", "split", "probes"]
    assert (kls[kls["method"] == "identity"].groupby(keys).size() == 1).all()
    assert {*kls[keys].apply(tuple, axis=1)} == {*kls.loc[kls["method"] == "identity", keys].apply(tuple, axis=1)}
    assert {*rows["expert"]} == {*NAMES.values(), "0.3 pocket-math + 0.7 pocket-shakespeare"}
    figures = rows[rows["metric"].isin(["kl", "recovered"])]
    assert (figures["low"] <= figures["value"]).all() and (figures["value"] <= figures["high"]).all()
    plug = kls[(kls["method"] == "plug_verse") & (kls["expert"] == NAMES["verse"]) & (kls["probes"] == "verse")]
    own = table[(table["choice"] == "0.0") & ~table["live"] & (table["side"] == "verse") & (table["to"] == "verse")]
    assert plug["value"].tolist() == own["kl"].tolist()


def test_the_likeliest_tokens_are_of_base_expert_and_adapted_base(
    port: Port, experts: dict[str, LanguageModel]
) -> None:
    prompts, choices = (
        ["The baker has 24", "My lord, I will"],
        {"math": {"math": 1.0}, "half": {"math": 0.5, "verse": 0.5}},
    )
    frame = porting.likely(port, experts, prompts, choices, 5)
    assert [*frame["label"].unique()] == [porting.label(name, prompt) for name in choices for prompt in prompts]
    assert (frame.groupby(["label", "method"]).size() == 5).all()
    for method, model in (("identity", port.base), ("expert", experts["math"])):
        wanted = Port(model).probabilities(prompts)[0]
        shown = frame[(frame["label"] == porting.label("math", prompts[0])) & (frame["method"] == method)][
            "probability"
        ]
        assert torch.isin(torch.tensor(shown.tolist()).round(decimals=4), wanted.round(decimals=4)).all()
    most = frame[frame["label"] == porting.label("half", prompts[1])].groupby("place")["probability"].max()
    assert most.is_monotonic_decreasing
    assert port.in_use == {}


def test_time_is_told_as_a_ratio_to_the_first_choice(port: Port) -> None:
    ratios = porting.overhead(port, "The baker has", {"bare": {}, "math": {"math": 1.0}}, tokens=4, rounds=2)
    assert ratios["bare"] == 1 and ratios["math"] > 0 and port.in_use == {}
    assert 0 < porting.swap(port, "math", "verse", None) < 0.05 and port.in_use == {}, "some 1 ms; here by far"


def test_a_live_expert_is_not_taken_for_the_bare_base(port: Port, experts: dict[str, LanguageModel]) -> None:
    live = Port(port.base)
    live.plug("math", experts["math"])
    with refused("live expert"):
        porting.told(live, [[("math", "Seven and eight.")]], {"math": {"math": 1.0}})


def test_what_can_be_exported_is_told_with_its_size_and_what_cannot_with_its_reason(
    base: LanguageModel, adapters: dict[str, Adapter]
) -> None:
    told = porting.exported(base, adapters).set_index("kind")["to peft"]
    assert told["verse"].startswith("a LoRA of the head") and "edits" in told["math"] and told["math"].startswith("no:")


def test_every_menu_entry_of_the_figure_of_weights_draws_what_was_measured(table: pd.DataFrame) -> None:
    figure = porting.over_weights(table, [*TEXTS], "bits per byte")
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == [
        "KL to each expert", "bits per byte", "KL to the experts mixed"]  # fmt: skip
    traces = {trace.name: trace for trace in figure.data}
    ours = table[~table["live"] & (table["side"] == "math") & (table["to"] == "math")].set_index("choice")
    assert [*traces["plugs, math text"].x] == [0.0, 0.3, 1.0]
    wanted = ours.loc[["0.0", "0.3", "1.0"], "bits_per_byte"].tolist()
    assert [*traces["plugs, math text"].y] == pytest.approx(wanted, rel=1e-3)
    mixed = dict(zip(traces, figure.layout.updatemenus[0].buttons[2].args[0]["y"], strict=True))
    assert mixed["live experts, verse text"] == [None] * 3 and mixed["plugs, verse text"][1] > 0
    assert figure.layout.meta["alt"].startswith("KL to each expert")


def test_the_figure_from_the_seam_on_counts_every_token_once() -> None:
    rows = [("base", "math", since, 2.0 * math.log(2), 1) for since in range(80)]
    rows += [("base", "verse", since, 4.0 * math.log(2), 2) for since in range(10)]
    frame = pd.DataFrame(rows, columns=["choice", "side", "since", "nats", "bytes"])
    figure = porting.since_switch({"documents": frame}, {"base": "bare base"}, "documents: verse parts")
    entries = {button.label: button.args[0]["y"][0] for button in figure.layout.updatemenus[0].buttons}
    assert [*entries] == ["documents", "documents: math parts", "documents: verse parts"]
    assert entries["documents"] == pytest.approx([2.0] * 6)
    assert entries["documents: verse parts"][2:] == [None] * 4
    assert figure.data[0].x[0] == "0–7" and figure.data[0].x[-1] == "64+"


def test_the_answers_written_for_the_page_are_right() -> None:
    file = json.loads((Path(porting.__file__).with_name("porting.json")).read_text(encoding="utf-8"))
    assert len(file["documents"]) == 12 and "written" in file
    bundled = {
        prompt
        for text in TEXTS.values()
        for split in ("train", "val", "test")
        for prompt in probe_set(text, split).prompts
    }
    for one in file["documents"]:
        assert one["verse"].startswith("Question: ") and one["math"].startswith("Answer: ")
        sums = re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", one["math"])
        assert sums and all(eval(left) == int(right) for left, right in sums)
        assert one["math"].rstrip().rpartition("#### ")[2] == sums[-1][1]
        assert not {one["verse"].strip(), one["math"].strip()} & bundled
