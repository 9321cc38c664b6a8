"""What the figure of layers and tokens shows is what the models say, under every choice of its menus."""

from __future__ import annotations

import itertools
import json
import random

import pandas as pd
import pytest
import torch
from test_plots import click, labels

from chassis_utils import Adapter, ChassisError, LanguageModel, fit, harvest, load, probe_set
from lensview import MOST, layer_views, layers_by_tokens

PROMPTS = ("Question: Tom has 12 apples & buys", "The <b>town</b> lies")


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-base", device="cpu"), load("pocket-math", device="cpu")


@pytest.fixture(scope="module")
def lenses(pair: tuple[LanguageModel, LanguageModel]) -> dict[str, list[Adapter]]:
    base, _ = pair
    text = harvest(*pair, probe_set("math-text", "train", 12), "all", progress=False)
    layers = range(base.num_layers + 1)
    plain = [Adapter.identity(base, layer, onto="normed") for layer in layers]
    return {"lens_text": [fit(text, "lens", layer=layer) for layer in layers], "logit_lens": plain}


@pytest.fixture(scope="module")
def views(pair: tuple[LanguageModel, LanguageModel], lenses: dict[str, list[Adapter]]) -> pd.DataFrame:
    return pd.concat([layer_views(*pair, lenses, prompt) for prompt in PROMPTS])


def test_a_view_holds_what_the_models_themselves_say(
    pair: tuple[LanguageModel, LanguageModel], views: pd.DataFrame
) -> None:
    p, q = (
        model.model(torch.tensor([model.prompt_ids(PROMPTS[0])])).logits[0].detach().double().log_softmax(-1)
        for model in reversed(pair)
    )
    own = views[views["prompt"] == PROMPTS[0]].set_index("method")
    for name, logits in (("expert", p), ("base", q)):
        vocabulary = pair[0].tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
        assert own.loc[name, "says"].tolist() == vocabulary
        assert own.loc[name, "probability"].tolist() == pytest.approx(logits.exp().amax(-1).tolist(), rel=1e-4)
        assert own.loc[name, "entropy"].tolist() == pytest.approx((-logits.exp() * logits).sum(-1).tolist(), rel=1e-4)
    assert own.loc["base", "kl"].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3)
    assert own.loc["expert", "kl"].abs().max() < 1e-9
    # The untouched lens at the last layer is the base.
    last = own.loc["logit_lens"].query(f"layer == '{pair[0].num_layers}'")
    assert last["kl"].tolist() == pytest.approx(own.loc["base", "kl"].tolist(), rel=1e-3)
    tokens = own.loc["base", "token"].tolist()
    assert own.loc["base", "follows"].tolist() == [*tokens[1:], ""]


def test_every_combination_of_the_menus_shows_exactly_what_they_say(views: pd.DataFrame) -> None:
    figure = json.loads(layers_by_tokens(views, "Layers").to_json())
    menus = figure["layout"]["updatemenus"]
    assert labels(menus[2]) == ["KL", "probability", "entropy"]
    chosen = [menu["buttons"][menu["active"]] for menu in menus]
    walk = random.Random(2)
    for _ in range(60):
        which = walk.randrange(3)
        chosen[which] = walk.choice(menus[which]["buttons"])
        click(figure, chosen[which])
        prompt = PROMPTS[labels(menus[0]).index(chosen[0]["label"])]
        method = {"lens, fitted on text": "lens_text", "logit lens": "logit_lens"}[chosen[1]["label"]]
        column = {"KL": "kl"}.get(chosen[2]["label"], chosen[2]["label"])
        (trace,) = [one for one in figure["data"] if one.get("visible", True) and one.get("xaxis", "x") == "x"]
        wanted = views[(views["prompt"] == prompt) & views["method"].isin([method, "base", "expert"])]
        table = wanted.pivot(index="position", columns="layer", values=column)[wanted["layer"].unique()]
        assert list(itertools.chain(*trace["z"])) == pytest.approx(table.to_numpy().ravel().tolist(), rel=1e-3)
        tokens = wanted.groupby("position")["token"].first().tolist()
        shown = [
            word.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            for word in figure["layout"]["yaxis"]["ticktext"]
        ]
        assert shown == tokens and len(trace["z"]) == len(tokens)
        assert figure["layout"]["yaxis"]["range"] == [len(tokens) - 0.5, -0.5]


def test_a_token_that_does_follow_is_bold_and_no_token_is_markup(views: pd.DataFrame) -> None:
    figure = layers_by_tokens(views, "Layers")
    for trace in figure.data:
        for cells, told in zip(trace.text, trace.customdata, strict=True):
            for text, (*_, follows, _, _, _, says) in zip(cells, told, strict=True):
                assert text.startswith("<b>") == (says == follows and says != "")
                assert "<" not in text.removeprefix("<b>").removesuffix("</b>")
    assert figure.layout.meta["alt"].count(str(len(figure.data[0].z))) >= 1


@pytest.mark.parametrize(("prompt", "message"), [("", "empty"), ("one two " * MOST, f"room for {MOST}")])
def test_a_prompt_that_is_no_figure_is_refused(
    pair: tuple[LanguageModel, LanguageModel], lenses: dict[str, list[Adapter]], prompt: str, message: str
) -> None:
    with pytest.raises(ChassisError, match=message) as error:
        layer_views(*pair, lenses, prompt)
    assert "\n" not in str(error.value)
