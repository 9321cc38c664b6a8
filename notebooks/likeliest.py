"""How much of an expert is lost where only its k likeliest next tokens are told: the measurements of page 22."""

from __future__ import annotations

import html
import random
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
import torch
from scipy.special import rel_entr

from bridging import bounds, last_states, logits
from chassis_utils import LanguageModel, token_bytes
from chassis_utils.tokens import Pieces
from completions import Said, placed
from plots import GREY, PALETTE, _buttons, _dropdowns, _finish, _numbers
from records import Records

#: Quantity of the figure -> (column, type of axis, title, tick format).
QUANTITIES = {
    "KL (log)": ("kl", "log", "KL to the bridge from all (nats)", ""),
    "KL": ("kl", "linear", "KL to the bridge from all (nats)", ""),
    "mass kept": ("kept", "linear", "the expert's mass in its k likeliest", ".0%"),
    "mass placed": ("coverage", "linear", "mass with a place in the base", ".0%"),
    "total variation": ("total_variation", "linear", "total variation to the bridge from all", ".0%"),
}


def cut(passages: Sequence[str], each: int = 2, seed: int = 0) -> tuple[list[str], list[int]]:
    """Prompts that end before a random space of a passage, `each` of them a passage, and the passage of each."""
    rng, prompts, numbers = random.Random(seed), [], []
    for number, text in enumerate(passages):
        spaces = [i for i in range(1, len(text)) if text[i] == " " and text[i - 1].isalnum()]
        several = sorted(rng.sample(spaces, min(each, len(spaces))))
        prompts += [text[:i] for i in several]
        numbers += [number] * len(several)
    return prompts, numbers


def following(model: LanguageModel, prompts: Sequence[str]) -> torch.Tensor:
    """A model's next-token distributions `(n, vocab)` behind prompts, float64."""
    return logits(model, last_states(model, prompts)).double().softmax(-1)


def told(expert: LanguageModel, probabilities: torch.Tensor, k: int, pieces: Pieces | None = None) -> list[Said]:
    """What an API would tell of distributions `(n, vocab)`: the k likeliest tokens of each, by their `pieces`."""
    pieces, end = pieces or token_bytes(expert.tokenizer), expert.tokenizer.eos_token_id
    top = probabilities.topk(k)
    several = (
        zip(ids, values, strict=True) for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
    return [{pieces[i]: p for i, p in row if i == end or pieces[i] is not None} for row in several]


def loss(expert: LanguageModel, base: LanguageModel, prompts: Sequence[str], sizes: Sequence[int]) -> pd.DataFrame:
    """What is lost at each k, one row a prompt and k: 0 is the base alone, the vocabulary is everything.

    A KL exists only where every token gets something, so mass without a place is given to what the base itself would
    say: what was not told to its tokens that nothing told leads to, the rest (crossing) to all of them.

    Returns:
        Columns `prompt` (number), `k`, `kept` (the expert's mass in its k likeliest tokens), `coverage` (mass with a
        place in the base), `total_variation` and `kl` (nats) to the bridge from everything, and `kl_spread`, where
        what was not told goes to all tokens too.
    """
    full, own = following(expert, prompts), following(base, prompts)
    ks, n = sorted({*sizes, 0, expert.vocab_size}), len(prompts)
    pieces = token_bytes(expert.tokenizer)
    rows = [row for k in ks for row in told(expert, full, k, pieces)]
    bridged = placed(base, rows, [*prompts] * len(ks)).mass.reshape(len(ks), n, -1)
    kept = torch.stack([full.topk(k).values.sum(1) for k in ks])
    mass, tail = bridged[..., :-2], (1 - kept).clamp(min=0)[..., None]
    other = (bridged[..., -2:].sum(-1, keepdim=True) - tail).clamp(min=0) * own
    rest = own * (mass == 0)
    ways = {"kl": rest / rest.sum(-1, keepdim=True).clamp(min=1e-300), "kl_spread": own}
    said = {way: (mass + other + tail * share).numpy() for way, share in ways.items()}
    frames = []
    for i, k in enumerate(ks):
        columns = {"kept": kept[i], "coverage": mass[i].sum(1)}
        columns |= {"total_variation": (bridged[i] - bridged[-1]).abs().sum(1) / 2}
        columns |= {way: rel_entr(here[-1], here[i]).sum(1) for way, here in said.items()}
        frames.append(pd.DataFrame(columns).assign(prompt=range(n), k=k))
    return pd.concat(frames, ignore_index=True)


def summary(frame: pd.DataFrame, passage: Sequence[int], way: str = "kl") -> pd.DataFrame:
    """Means of `loss` by k, the share of the KL at k = 0 that is recovered, and 95% intervals over passages.

    Args:
        frame: what `loss` returned.
        passage: number of the passage that each prompt is from `(n,)`; cuts of one passage are one sample.
        way: `kl`, or `kl_spread`.
    """
    groups, table = torch.tensor(passage), frame.pivot(index="prompt", columns="k", values=way)
    nats = {k: torch.tensor(table[k].to_numpy()) for k in table}
    found = frame.groupby("k")[["kept", "coverage", "total_variation"]].mean().assign(n=len(passage))
    for k, here in nats.items():
        (low, high), (worst, best) = bounds(groups, here), bounds(groups, here, nats[0])
        shares = {"recovered": 1 - float(here.sum() / nats[0].sum()), "recovered_low": 1 - best}
        shares |= {"recovered_high": 1 - worst, "kl": float(here.mean()), "kl_low": low, "kl_high": high}
        found.loc[k, [*shares]] = [*shares.values()]
    return found.reset_index()


def record(records: Records, table: pd.DataFrame, split: str, sizes: Sequence[int], suffix: str = "") -> None:
    """Record a `summary` at some k as `top_k` with a suffix; without one, `identity` (k = 0) and `all` too."""
    names = {k: f"top_{k}{suffix}" for k in sizes} | ({} if suffix else {0: "identity", table["k"].max(): "all"})
    for row in table[table["k"].isin(names)].to_dict("records"):
        fields = {"method": names[row["k"]], "split": split, "n": row["n"]}
        for metric in ("kl", "recovered") if row["k"] else ("kl",):
            bounds = {end: row[f"{metric}_{end}"] for end in ("low", "high")}
            records.add(metric=metric, value=row[metric], **fields, **bounds)
        for metric in () if suffix or not row["k"] else ("coverage", "total_variation"):
            records.add(metric=metric, value=row[metric], **fields)


def against_k(frame: pd.DataFrame, prompts: Sequence[str], quantity: str = "KL (log)") -> go.Figure:
    """What k likeliest tokens are worth: a slider over prompts, a menu of quantities, the mean over prompts beside."""
    most = frame["k"].max()
    names = ["all" if k == most else f"{k}" for k in sorted(frame["k"].unique())]
    columns = {name: frame.pivot(index="prompt", columns="k", values=of) for name, (of, *_) in QUANTITIES.items()}
    # Nothing is lost by all, and a log axis has no place for 0.
    columns["KL (log)"] = columns["KL (log)"].where(columns["KL (log)"] > 1e-12)
    figure = go.Figure(layout={"showlegend": True, "margin": {"b": 172}, "height": 500})
    look = {
        "x": names,
        "mode": "lines+markers",
        "hovertemplate": "%{fullData.name}<br>k: %{x}<br>%{y:.4g}<extra></extra>",
    }
    figure.add_scatter(name=f"mean of {len(prompts)} prompts", line={"color": GREY, "dash": "dash"}, **look)
    for number in range(len(prompts)):
        figure.add_scatter(name=f"prompt {number + 1}", line_color=PALETTE[0], meta=[number], visible=False, **look)

    def values(name: str) -> list[list[float | int | None]]:
        table = columns[name]
        return [_numbers(table.mean()), *(_numbers(row) for _, row in table.iterrows())]

    entries = {
        name: [{"y": values(name)}, {"yaxis.type": kind, "yaxis.title.text": title, "yaxis.tickformat": form}]
        for name, (_, kind, title, form) in QUANTITIES.items()
    }
    menus = _dropdowns(figure, 8, (quantity, entries))
    # A dollar would begin a formula.
    ends = [html.escape(" ".join(prompt.split())[-34:], quote=False).replace("$", "&#36;") for prompt in prompts]
    shown = {
        i + 1: [
            {"visible": [True, *(i == other for other in range(len(prompts)))]},
            {"xaxis.title.text": f"tokens told (0: the base alone), behind<br>“…{end}”"},
        ]
        for i, end in enumerate(ends)
    }
    slider = {"steps": _buttons(figure, 1, shown), "pad_t": 78, "currentvalue_prefix": "prompt "}
    mean = columns["KL"].mean()
    alt = f"KL to the bridge from all tokens against how many are told, mean of {len(prompts)} prompts: " + "; ".join(
        f"{name}: {value:.2g}" for name, value in zip(names, mean, strict=True)
    )
    axis = {"type": "category", "tickangle": 0, "tickfont_size": 9}
    title = "What the k likeliest tokens are worth"
    caption = (
        "Follow the dashed line, the mean over prompts, from the base alone at the left: see how few tokens bring "
        "most of what all of them bring. Then move the slider: a prompt whose own line keeps away from the mean needs "
        "more of them, or fewer."
    )
    return _finish(
        figure, title, f"{alt}.", caption, above=38, columns={"x": "tokens told"}, updatemenus=menus, sliders=[slider],
        xaxis=axis,
    )  # fmt: skip
