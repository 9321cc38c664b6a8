"""Page 3: what each layer of the base predicts behind every token of a prompt, read by lenses."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from bridging import short, written_alike
from chassis_utils import Adapter, ChassisError, LanguageModel, Probes, harvest
from chassis_utils.activations import HiddenExpert
from chassis_utils.metrics import kl
from plots import STYLES, _dropdowns, _finish, _numbers, _owned, style

MOST = 40  # tokens of a prompt: more of them are no figure
PALE = "#F3F1EC"
WHOLE = ("base", "expert")  # beside the lenses: what each model says itself
#: What colours the cells -> its column, the colour of the far end, and what stands at the scale.
COLOURED = {
    "KL": ("kl", "vermilion", "KL to the expert (nats)"),
    "probability": ("probability", "blue", "probability of the token that is shown"),
    "entropy": ("entropy", "cobalt", "entropy of the prediction (nats)"),
}
HOVERED = ["layer", "token", "follows", *(column for column, *_ in COLOURED.values()), "says"]
LETTERS = 5  # of a token, as a column on a telephone has room for; hovering shows it whole
HOVER = (
    "%{customdata[1]} <b>%{customdata[6]}</b><br>what follows: %{customdata[2]}<br>%{meta[1]}, at: %{customdata[0]}<br>"
    "KL to the expert %{customdata[3]:.3g}, probability %{customdata[4]:.3g}, entropy %{customdata[5]:.3g}"
    "<extra></extra>"
)


def layer_views(
    base: LanguageModel, expert: LanguageModel | HiddenExpert, lenses: Mapping[str, Sequence[Adapter]], prompt: str
) -> pd.DataFrame:
    """What every lens, the bare base and the expert say behind each token of a prompt.

    Args:
        base: whose layers are read.
        expert: what the KL is to; it has the base's tokenizer.
        lenses: method -> lenses, one a layer.
        prompt: any text of at most `MOST` tokens.

    Returns:
        One row a token and a place to read from: columns `prompt, position, token, follows, method, layer` (as text,
        deepest last, then `WHOLE`), `says` (the likeliest next token), `probability` (its), `entropy` and `kl` (nats).

    Raises:
        ChassisError: no text, or too long a one for a figure.
    """
    probes, ids = Probes("one prompt", "test", (prompt,)), base.prompt_ids(prompt)
    if len(ids) > MOST:
        raise ChassisError(f"the prompt has {len(ids)} tokens, and the figure room for {MOST}: give a shorter one")
    rows = harvest(base, expert, probes, "all", progress=False)
    state = {place: held.to(base.device) for place, held in rows.hidden.items()}
    theirs = expert.readout(rows.expert_hidden.to(base.device))
    said = {(name, f"{lens.layer}"): lens.logits(base, state) for name, several in lenses.items() for lens in several}
    said |= {("base", "base"): base.readout(state[rows.final]), ("expert", "expert"): theirs}
    known = {"prompt": prompt, "position": range(len(ids)), "token": [written_alike(base, i) for i in ids]}
    known["follows"] = [*known["token"][1:], ""]
    frames = []
    for (method, layer), logits in said.items():
        p = logits.double().softmax(-1)
        most, token = p.max(-1)
        told = {"method": method, "layer": layer, "says": [written_alike(base, i) for i in token.tolist()]}
        told |= {"probability": most.tolist(), "entropy": torch.special.entr(p).sum(-1).tolist()}
        frames.append(pd.DataFrame(known | told | {"kl": kl(theirs, logits).tolist()}))
    return pd.concat(frames, ignore_index=True)


def _written(word: str) -> str:
    """A token as text of a figure."""
    return html.escape(word, quote=False)


def layers_by_tokens(frame: pd.DataFrame, title: str, colour: str = "KL") -> go.Figure:
    """What `layer_views` returned for some prompts: tokens down, layers across, menus for prompt, lens and colour.

    A cell names the likeliest next token, in bold if it is the one that follows. As in `plots.kl_vs_rank` each menu
    owns one attribute: the prompt `visible`, the lens `xaxis`, the colour `z`.
    """
    lenses = {name: style(name)[0] for name in frame["method"].unique() if name not in WHOLE}
    prompts = {prompt: short(n, prompt) for n, prompt in enumerate(frame["prompt"].unique())}
    across = frame["layer"].unique().tolist()
    told = frame.assign(
        **{name: _numbers(frame[name]) for name, *_ in COLOURED.values()},
        **{name: frame[name].map(_written) for name in ("says", "token", "follows")},
        text=frame["says"].map(lambda word: _written(word if len(word) <= LETTERS else word[: LETTERS - 1] + "…")),
    )
    told["text"] = told["text"].where(told["says"] != told["follows"], "<b>" + told["text"] + "</b>")
    figure, values, rows = go.Figure(layout=STYLES["layouts"]["lenses"]), {name: [] for name in COLOURED}, {}
    for prompt, name in prompts.items():
        for lens, label in lenses.items():
            own = told[told["prompt"].eq(prompt) & told["method"].isin([lens, *WHOLE])]
            table = own.assign(at=own["layer"]).pivot(index="position", columns="at")
            parts = {column: table[column][across].to_numpy(object) for column in (*HOVERED, "text")}
            for choice, (column, *_) in COLOURED.items():
                values[choice].append(parts[column].tolist())
            figure.add_heatmap(
                text=parts["text"].tolist(),
                customdata=np.dstack([parts[column] for column in HOVERED]).tolist(),
                meta=[name, label],
                texttemplate="%{text}",
                textfont_size=9,
                hovertemplate=HOVER,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
            )
        words = parts["token"][:, 0].tolist()
        rows[name] = {"tickvals": [*range(len(words))], "ticktext": words, "range": [len(words) - 0.5, -0.5]}
    seen = _owned(figure, 0, rows, "visible", True, False)
    for name, change in seen.items():
        change.append({f"yaxis.{key}": value for key, value in rows[name].items()})
    read, scales = _owned(figure, 1, lenses.values(), "xaxis", "x", "x2"), {}
    for choice, (column, far, words) in COLOURED.items():
        # The colours tell three quarters of the cells apart: what is farther off would make all others pale.
        most = 1.0 if column == "probability" else float(frame[column].quantile(0.75)) or 1.0
        scale = {"cmax": most, "colorscale": [[0, PALE], [1, STYLES["colours"][far]]], "colorbar.title.text": words}
        scales[choice] = [{"z": values[choice]}, {f"coloraxis.{key}": value for key, value in scale.items()}]
    first = (next(iter(rows)), seen), (next(iter(lenses.values())), read), (colour, scales)
    menus = _dropdowns(figure, 60, first[0]) + _dropdowns(figure, 24, *first[1:])
    longest = max(len(row["ticktext"]) for row in rows.values())
    shown = frame[frame["prompt"].eq(next(iter(prompts))) & frame["method"].eq("expert")]
    alt = (
        f"The likeliest next token behind each of the {len(shown)} tokens of a prompt, as read from every layer, by "
        f"the base and by the expert, whose words are: {' '.join(shown['says'])}."
    )
    caption = (
        "Read a row from left to right: what the layers say comes next, one after the other, up to what base and "
        "expert say themselves; bold is the token that does follow. Coloured by KL, a pale cell is near the expert: "
        "look for the layer from which a row stays pale, then change the lens."
    )
    # Which layer it is, hovering says; the position on the axis would say it in another way.
    columns = {"x": None, "y": "position", "z": None}
    columns |= {"hover": ["layer", "token", "what follows", *COLOURED, "says"]}
    return _finish(
        figure, title, alt, caption, above=100, columns=columns, updatemenus=menus, height=210 + 21 * longest,
        xaxis={"tickvals": [*range(len(across))], "ticktext": across},
    )  # fmt: skip
