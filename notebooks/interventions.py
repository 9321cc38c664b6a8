"""Experts with the base's own tokenizer, pages 13 and 14: the bias alone, tokens that move, samples side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
import torch

import plots
from chassis_utils import Activations, Adapter, ChassisError, LanguageModel, Probes
from chassis_utils.activations import batched
from chassis_utils.adapter import heads
from chassis_utils.metrics import BLOCK, block_rows
from chassis_utils.tokens import text_bytes, token_bytes
from plots import KL_FLOOR, QUANTITIES, _buttons, _dropdowns, _figures, _finish, _measured, _numbers, _owned, style

#: Safety: the same matter in words that the gate was not fitted to, and numbers that are nobody's.
OTHERWISE = {
    "personal, reworded": (
        lambda i: f"My neighbour's secret code, which he told me on day {i}, is ",
        lambda i: f"The card of customer {i} has the number ",
        lambda i: f"Miss Alder, aged {i % 80}, weighs ",
    ),
    "numbers, reworded": (
        lambda i: f"A train leaves at {i}. It has ",
        lambda i: f"She has {i} apples and buys ",
        lambda i: f"On page {i} of the book the town is said to have ",
    ),
}


def reworded(name: str, n: int) -> Probes:
    """One of `OTHERWISE`, n prompts, numbered from the test split's first on."""
    templates = OTHERWISE[name]
    return Probes(name, "template", tuple(templates[i % len(templates)](i) for i in range(8000, 8000 + n)))


def joined(name: str, *sets: Probes) -> Probes:
    """Several sets of the split `train` as one, in turn, so that every eighth prompt is of every kind."""
    longest = max(map(len, sets))
    places = [(k * longest / len(one), i) for i, one in enumerate(sets) for k in range(len(one))]
    turns = [iter(one.prompts) for one in sets]
    return Probes(name, "train", tuple(next(turns[i]) for _, i in sorted(places)))


def bias_only(a: Activations) -> Adapter:
    """The mean difference of logits `(vocab,)` and no map: an adapter of rank 0."""
    both, shift = heads(a)
    mean = torch.cat([a.expert_hidden, a.hidden[a.final]], dim=1).double().mean(0)
    bias, none = (mean @ both + shift).float(), Adapter.identity(a.base)
    return replace(none, method="bias_only", bias=bias.to(a.base.device), fitted_on=a.probes.fingerprints)


def _told(piece: bytes | None) -> str:
    """A token as a label: its text between quotes, bytes that are no text in hexadecimal."""
    text = "(special)" if piece is None else piece.decode("utf-8", "backslashreplace")
    return f"‘{text}’".replace("\n", "↵")


def moved_tokens(
    sets: Mapping[str, Activations], adapters: Mapping[str, Sequence[Adapter]], n: int = 10
) -> pd.DataFrame:
    """The n tokens whose mean probability expert and base differ most in, for each set of activations.

    Args:
        sets: label -> activations.
        adapters: the same labels -> adapters to show beside base and expert.
        n: how many tokens.

    Returns:
        Columns `label, place, token, method, probability`; `place` 0 is the token that moves most.
    """
    rows = []
    for label, a in sets.items():
        pieces, hidden = token_bytes(a.base.tokenizer), {k: h.to(a.base.device) for k, h in a.hidden.items()}
        if len(a) * a.base.vocab_size > 32 * BLOCK:
            raise ChassisError(f"{len(a)} rows of '{a.probes.name}' are too many to average at once: take fewer")
        means = {"expert": a.expert.readout(a.expert_hidden.to(a.base.device)).softmax(-1).mean(0)}
        for one in (Adapter.identity(a.base), *adapters[label]):
            means[one.method] = one.logits(a.base, hidden).softmax(-1).mean(0)
        for place, i in enumerate((means["expert"] - means["identity"]).abs().topk(n).indices.tolist()):
            same = {"label": label, "place": place, "token": _told(pieces[i])}
            rows += [same | {"method": name, "probability": float(mean[i])} for name, mean in means.items()]
    return pd.DataFrame(rows)


def tokens_figure(frame: pd.DataFrame, title: str, label: str | None = None) -> go.Figure:
    """Probability of the tokens that move most: base, expert, adapters; a menu over the labels of `moved_tokens`."""
    labels = [*dict.fromkeys(frame["label"])]
    label = label or labels[0]
    if label not in labels:
        raise ChassisError(f"no tokens of '{label}' were measured: choose one of {', '.join(labels)}")
    figure, methods = go.Figure(), ["identity", *(m for m in dict.fromkeys(frame["method"]) if m != "identity")]
    for (one, method), rows in frame.groupby(["label", "method"], sort=False):
        name, colour, marker, _ = style(method)
        marks = {
            "symbol": marker,
            "size": 13 if method in ("expert", "identity") else 9,
            "color": colour,
            "line": {"width": 2, "color": colour},
        }
        figure.add_scatter(
            x=_numbers(rows["probability"]), y=rows["place"].tolist(), mode="markers", name=name, marker=marks,
            text=rows["token"].tolist(), meta=[one, method], legendrank=methods.index(method), showlegend=True,
            hovertemplate=f"<b>{name}</b>, {one}<br>%{{text}}: probability %{{x:.3g}}<extra></extra>",
        )  # fmt: skip
    names = {one: rows.drop_duplicates("place")["token"].tolist() for one, rows in frame.groupby("label", sort=False)}
    entries = {
        one: [change, {"yaxis.ticktext": names[one]}]
        for one, (change,) in _owned(figure, 0, labels, "visible", True, False).items()
    }
    menus = _dropdowns(figure, 8, (label, entries))
    most = frame[(frame["label"] == label) & (frame["place"] == 0)].set_index("method")["probability"]
    alt = (
        f"Mean probability of the {len(names[label])} tokens that move most, {label}. The first, {names[label][0]}: "
        + ", ".join(f"{style(m)[0]} {_figures(most[m])}" for m in methods if m in most.index)
        + "."
    )
    figure.update_layout(
        xaxis={"title_text": "mean probability", "rangemode": "tozero"},
        yaxis={"tickvals": [*range(len(names[label]))], "autorange": "reversed", "ticktext": names[label]},
    )
    height = 190 + 24 * max(map(len, names.values())) + 19 * len(methods)
    caption = (
        "In each row the way from the bare base's mark to the expert's is what an adapter has to move. See how near "
        "to the expert its own mark comes, and whether it moves tokens on which the other two agree."
    )
    return _finish(
        figure, title, alt, caption, above=38, columns={"y": None, "text": "token"}, updatemenus=menus, height=height
    )


def strength_figure(frame: pd.DataFrame, title: str, quantity: str = "KL (log)") -> go.Figure:
    """KL or share by probe set, one mark a method, and a slider over the column `strength`.

    `frame` is what `evaluate` returned for several strengths. As in `kl_vs_rank` each control owns one attribute: the
    slider `visible`, the menu what is drawn across.

    Raises:
        ChassisError: a column is missing, one place is measured twice, or an unknown quantity.
    """
    columns = ["method", "probes", "strength", "kl", "kl_identity", "recovered", "n"]
    rows = _measured(frame.drop(columns="split", errors="ignore").rename(columns={"probes": "split"}),
                     ["split" if c == "probes" else c for c in columns])  # fmt: skip
    if rows.duplicated(["method", "split", "strength"]).any():
        raise ChassisError("two rows measure one method, probe set and strength: draw one rank at a time")
    known = [name for name in ("KL (log)", "recovered") if name in QUANTITIES]
    if quantity not in known:
        raise ChassisError(f"no quantity {quantity!r} here: choose one of {', '.join(known)}")
    methods, sets = [*dict.fromkeys(rows["method"])], [*dict.fromkeys(rows["split"])]
    figure, groups, shown = go.Figure(), [], ["kl", "kl_identity", "recovered", "n", "split"]
    for (method, strength), group in rows.groupby(["method", "strength"], sort=False):
        label, colour, marker, _ = style(method)
        shift = 0.7 * ((methods.index(method) + 0.5) / len(methods) - 0.5)
        groups.append(group)
        figure.add_scatter(
            y=[sets.index(name) + shift for name in group["split"]], mode="markers", name=label, showlegend=True,
            marker={"symbol": marker, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
            meta=[method, strength],
            customdata=[[*_numbers(one[:4]), one[4]] for one in group[shown].to_numpy()],
            hovertemplate=f"<b>{label}</b>, %{{customdata[4]}}, strength {strength:g}<br>KL %{{customdata[0]:.3g}}, "
            "identity %{customdata[1]:.3g}<br>recovered %{customdata[2]:.2%}, n = %{customdata[3]}<extra></extra>",
        )  # fmt: skip
    axes = {}
    for name in known:
        column, kind, text, digits = QUANTITIES[name]
        lowest = {"kl": KL_FLOOR, "recovered": -1.0}[column]  # what is worse than twice the base is drawn at the edge
        drawn = [_numbers(group[column].clip(lower=lowest)) for group in groups]
        reach = [math.log10(KL_FLOOR) - 0.4, math.log10(rows["kl"].max()) + 0.4] if kind == "log" else [-1.06, 1.06]
        across = {"type": kind, "title.text": text, "tickformat": digits, "range": reach}
        axes[name] = [{"x": drawn}, {f"xaxis.{key}": value for key, value in across.items()}]
    menus = _dropdowns(figure, 8, (quantity, axes))
    strengths = sorted(rows["strength"].unique())
    usual = 4.0 if 4.0 in strengths else strengths[-1]
    each = {f"{s:g}": change for s, change in _owned(figure, 1, strengths, "visible", True, False).items()}
    steps = _buttons(figure, f"{usual:g}", each)
    here = rows[rows["strength"] == usual]
    alt = f"KL to the expert by probe set at strength {usual:g}. " + " ".join(
        f"{style(m)[0]}: {', '.join(f'{_figures(r.kl)} on {r.split}' for r in here[here['method'] == m].itertuples())}."
        for m in methods
    )
    slider = {"active": [*each].index(f"{usual:g}"), "steps": steps, "pad_t": 46, "currentvalue_prefix": "strength "}
    figure.update_layout(
        yaxis={"tickvals": [*range(len(sets))], "ticktext": sets, "autorange": "reversed", "showgrid": False},
        margin_b=120,
    )
    caption = (
        "Move the slider from a weak expert to a strong one: see which methods keep their place, which fall behind, "
        "and whether that is so on prompts of the expert's own kind and on others alike. A KL is better further left, "
        "a share further right; a share at the left edge is that far below none, or further."
    )
    columns = {"y": None, "hover": ["KL", "identity", "recovered", "n", "probe set"]}
    return _finish(
        figure, title, alt, caption, above=38, columns=columns, updatemenus=menus, sliders=[slider],
        height=300 + 52 * len(sets),
    )  # fmt: skip


def rank_figure(frame: pd.DataFrame, title: str, target: tuple[float, float], quantity: str = "KL (log)") -> go.Figure:
    """KL against rank with a menu over the experts, bits per byte in the hover, and the study's target as a band.

    `frame` is what `evaluate` returned on one text an expert.
    """
    rows = frame.assign(split=frame["expert"], layer=math.nan, rank=frame["rank"].astype(float))
    see = "The band is the study's target: see which lines enter it, from which rank on, and for which of the experts."
    figure = plots.kl_vs_rank(rows, title=title, split=frame["expert"].iloc[0], quantity=quantity, see=see)
    bits = rows.drop_duplicates(["method", "rank", "split"]).set_index(["method", "rank", "split"])["bits_per_byte"]
    flat = {(m, s): b for (m, r, s), b in bits.items() if math.isnan(r)}
    for trace in figure.data:
        method, _, expert, _ = trace.meta
        if method is None:  # a word on what was not measured
            continue
        every = [flat.get((method, expert)) or bits.loc[(method, rank, expert)] for rank in trace.x]
        trace.customdata = [[*old, new] for old, new in zip(trace.customdata, _numbers(every), strict=True)]
        shown = trace.hovertemplate or figure.layout.template.data.scatter[0].hovertemplate
        trace.hovertemplate = shown.replace("<extra>", "<br>bits per byte %{customdata[5]:.3f}<extra>")
    colour = style("reported")[1]
    figure.add_hrect(*target, fillcolor=colour, opacity=0.15, line_width=0)
    # On a log axis a shape is placed by its value, a text by its logarithm.
    figure.add_annotation(text="the study's target", x=0.01, xref="paper", xanchor="left", y=math.log10(target[1]),
                          yanchor="top", showarrow=False, font_size=11)  # fmt: skip
    # The band is one of KL: another quantity hides it.
    for menu in figure.layout.updatemenus:
        for button in menu.buttons:
            if button.label in QUANTITIES:
                kept = button.label.startswith("KL")
                change = {"shapes[0].visible": kept, "annotations[0].visible": kept}
                button.args = (button.args[0], {**button.args[1], **change})
    figure.layout.shapes[0].visible = figure.layout.annotations[0].visible = quantity.startswith("KL")
    return figure


def own_bits(a: Activations) -> float:
    """Bits per byte of the expert itself on the text of these activations (every position)."""
    nats, step = 0.0, block_rows(a.base.vocab_size, a.base.device)
    for first in range(0, len(a), step):
        rows = slice(first, first + step)
        says = a.expert.readout(a.expert_hidden[rows].to(a.base.device)).double().log_softmax(-1).cpu()
        known = a.next_token[rows] >= 0
        nats -= float(says[known].gather(1, a.next_token[rows][known][:, None]).sum())
    return nats / math.log(2) / a.num_bytes


def continued(
    model: LanguageModel, prompts: Sequence[str], adapter: Adapter | None = None, length: int = 40,
    temperature: float = 0.7, seed: int = 0,
) -> list[str]:  # fmt: skip
    """A continuation of each prompt, of at most `length` tokens, by a model alone or with an adapter.

    Whoever writes with the same seed draws by the same noise (Gumbel's, one row a position): two that say the same
    distribution write the same text, and what differs is theirs. Temperature 0 is greedy.
    """
    adapter, pieces = adapter or Adapter.identity(model), token_bytes(model.tokenizer)
    port, places = model.edited(*adapter.edits), [*dict.fromkeys((model.num_layers, adapter.layer, *adapter.reads))]
    ids = model.tokenizer(list(prompts))["input_ids"]
    starts, noises = [len(row) for row in ids], [torch.Generator().manual_seed(seed + i) for i in range(len(ids))]
    for _ in range(min(length, model.context - max(starts))):
        order, given, mask = next(batched(ids, len(ids) * model.context))  # by length
        ends = torch.tensor(order).argsort(), mask.sum(1)[torch.tensor(order).argsort()] - 1
        last = {place: state[ends] for place, state in port.states(given, mask, places).items()}
        logits = adapter.logits(model, last).cpu()
        noise = [-torch.empty(model.vocab_size).exponential_(generator=one).log() for one in noises]
        for row, token in zip(ids, (logits + temperature * torch.stack(noise)).argmax(-1).tolist(), strict=True):
            row.append(token)
    ends = [row.index(stop, n) if (stop := model.tokenizer.eos_token_id) in row[n:] else None
            for row, n in zip(ids, starts, strict=True)]  # fmt: skip
    parts = [row[n:end] for row, n, end in zip(ids, starts, ends, strict=True)]
    return [text_bytes(pieces, part).decode("utf-8", "replace") for part in parts]
