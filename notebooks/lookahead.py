"""What page 19 shows of the look-ahead: mass on its way, its bound against its budget, prompts that end in a token."""

from __future__ import annotations

import html
import math
import os
import random
import re
from collections.abc import Sequence
from functools import cache

import pandas as pd
import plotly.graph_objects as go
import torch

from bridging import (
    COLOURS,
    LEAST,
    Places,
    StringBridge,
    bounds,
    lines,
    short,
    spread,
    target_logits,
    variation,
    written_alike,
)
from chassis_utils import Bridge, Bridged, ChassisError, token_bytes
from chassis_utils.bridge import Reader
from chassis_utils.metrics import kl
from plots import _dropdowns, _finish, _numbers, _owned

#: What becomes of an expert token's mass -> the colour of its flow.
FATES = {
    "same bytes": "blue", "longer token": "green", "shorter token": "cobalt", "across the end": "vermilion",
    "no token": "ochre", "not followed": "grey",
}  # fmt: skip
LEAST_SHARE = 0.01  # of all mass: thinner flows of a token are drawn as one
LEAST_DRAWN = 1e-6  # where a logarithmic axis ends


# ------------------------------------------------------------------------------------- mass on its way


def flows(bridge: Bridge, places: Places, top: int = 6) -> pd.DataFrame:
    """Where the mass of the expert's likeliest tokens goes, each followed up with a budget of its own.

    Returns:
        Columns `prompt, token, bytes, to, fate, mass`: `bytes` is what the expert's token and the base's begin with
        alike; the masses of a prompt sum to 1, "not followed" being the expert's other tokens.
    """
    base, expert = bridge.base, bridge.expert
    (pieces, own), end = (token_bytes(model.tokenizer) for model in (expert, base)), expert.tokenizer.eos_token_id
    rows = []
    for prompt, said in zip(places.probes.prompts, places.said, strict=True):
        mass, tokens = said.topk(top)
        alone = torch.eye(expert.vocab_size, dtype=said.dtype)[tokens]
        found = bridge(alone, [prompt] * top).mass * mass[:, None]
        for i, row in zip(tokens.tolist(), found, strict=True):
            begin, token = pieces[i] or b"", "end of text" if i == end else written_alike(expert, i)
            likely = {j for j in row[:-2].argsort(descending=True)[:top].tolist() if float(row[j]) >= LEAST_SHARE}
            for j in (row[:-2] > LEAST_DRAWN).nonzero()[:, 0].tolist():
                other = own[j] or b""
                shared = os.path.commonprefix([begin, other])
                fate = "same bytes" if begin == other else "longer token" if shared == begin else "shorter token"
                to = "end of text" if j == base.tokenizer.eos_token_id else written_alike(base, j)
                where = (_visible(shared) or to, to) if j in likely else (_visible(begin) or token, "other tokens")
                rows.append((prompt, token, *where, fate, float(row[j])))
            for to, share in (("across the end", float(row[-2])), ("no token", float(row[-1]))):
                if share > 1e-4:
                    rows.append((prompt, token, _visible(begin) or token, to, to, share))
        rows.append((prompt, "others", "…", "not followed", "not followed", float(1 - mass.sum())))
    frame = pd.DataFrame(rows, columns=["prompt", "token", "bytes", "to", "fate", "mass"])
    return frame.groupby([*frame][:-1], sort=False, as_index=False).sum()


def flow_figure(frame: pd.DataFrame, title: str) -> go.Figure:
    """What `flows` returned, from the expert's tokens through shared bytes to the base's, a menu for the prompt.

    Only tokens that were followed are drawn: the menu tells their share of the mass.
    """
    figure, names = go.Figure(), []
    for n, (prompt, rows) in enumerate(frame[frame["fate"] != "not followed"].groupby("prompt", sort=False)):
        nodes, links = {}, []
        names.append(name := f"{short(n, prompt)} ({rows['mass'].sum():.0%})")
        for side, (start, stop) in enumerate((("token", "bytes"), ("bytes", "to"))):
            for (a, b, fate), mass in rows.groupby([start, stop, "fate"], sort=False)["mass"].sum().items():
                ends = [nodes.setdefault((side + n, one), len(nodes)) for n, one in enumerate((a, b))]
                links.append((*ends, mass, fate))
        sources, targets, masses, fates = zip(*links, strict=True)
        figure.add_sankey(
            meta=[name], arrangement="snap",
            node={"label": [_label(one) for _, one in nodes], "pad": 16, "thickness": 8, "color": COLOURS["grey"],
                  "line": {"width": 0}, "hovertemplate": "%{label}: %{value:.3f}<extra></extra>"},
            link={"source": sources, "target": targets, "value": _numbers(masses), "customdata": fates,
                  "color": [_pale(COLOURS[FATES[fate]]) for fate in fates],
                  "hovertemplate": "%{source.label} to %{target.label}<br>%{value:.3f}, %{customdata}<extra></extra>"},
        )  # fmt: skip
    menus = _dropdowns(figure, 8, (names[0], _owned(figure, 0, names, "visible", True, False)))
    said = frame.groupby("fate")["mass"].sum() / len(names)
    alt = "Mass from the expert's tokens to the base's; mean of the prompts: "
    alt += "; ".join(f"{fate} {said.get(fate, 0):.0%}" for fate in FATES)
    for menu in menus:
        menu["pad"]["l"] = 0  # No axis stands at the left.
    figure.update_layout(updatemenus=menus, height=520, margin={"l": 8, "r": 8, "b": 12}, font_size=11)
    caption = (
        "The wider a band, the more probability it carries. Follow the widest from the left: where all is blue, the "
        "two tokenizers agree; where a band splits or changes colour, the text of the expert's token alone does not "
        "tell what the base would write."
    )
    return _finish(figure, title, f"{alt}.", caption, above=38, columns={"hover": ["fate"]})


def _visible(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").replace(" ", "▁").replace("\n", "⏎")


def _label(text: str) -> str:
    return html.escape(text if len(text) <= 14 else f"{text[:13]}…", quote=False)


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.45)"


# ------------------------------------------------------------------------------------- bound and budget


def followed(bridge: Bridge, places: Places, budgets: Sequence[int]) -> dict[int, Bridged]:
    """What the look-ahead finds behind the places, by its budget."""
    found = {}
    for bridge.budget in budgets:
        found[bridge.budget] = bridge(places.said, places.probes.prompts)
    return found


def least(bridge: Bridge, places: Places, budgets: Sequence[int]) -> dict[int, torch.Tensor]:
    """What every choice of passes leaves undecided at least, by budget, `(n,)` each, as the bridge tells it.

    A pass decides the mass of one of the expert's next tokens at most, and a longer continuation is part of one. So
    what is open before the first pass, without the budget's heaviest tokens, stays open whichever are followed up. It
    need not be reached: that takes passes after which nothing of their token is open.

    Raises:
        ChassisError: a bridge with `heal`, whose expert begins before the places.
    """
    if bridge.heal:
        raise ChassisError(f"heal = {bridge.heal}: what is open first is told of bridges without heal only")
    reader, found = Reader(bridge.base), []
    step = cache(reader.step)
    for prompt, said in zip(places.probes.prompts, places.said, strict=True):
        mass, root = [], reader.root(prompt, 0)
        for piece, share in zip(bridge.pieces, said.tolist(), strict=True):
            code = root if piece else 0
            for byte in piece or b"":
                code = code if code >= 0 else step(-1 - code, byte)
            mass += [share] * (code < 0)
        mass.sort(reverse=True)
        found.append([math.fsum(mass[budget:]) for budget in budgets])
    return dict(zip(budgets, torch.tensor(found, dtype=torch.float64).T, strict=True))


def budget_figure(
    found: dict[int, Bridged], floor: dict[int, torch.Tensor], prompts: Sequence[str],
    aims: dict[str, dict[int, float]], title: str, many: pd.DataFrame | None = None,
) -> go.Figure:  # fmt: skip
    """What is left undecided, and the total variation to the largest budget, against the budget.

    `floor` is what `least` returned; `aims` is, for "undecided" and "total variation", the most that is aimed at by
    budget. `many` are means over other places, shown first: `prompt`, what to call them, `passes`, `undecided`,
    `least` and `total variation`.
    """
    reference, rows = found[max(found)], []
    for one in () if many is None else many.to_dict("records"):
        names = {"undecided": "undecided", "undecided at least": "least", "total variation": "total variation"}
        # A logarithmic axis has no place for nothing.
        rows += [(one["prompt"], int(one["passes"]), name, one[column] or torch.nan) for name, column in names.items()]
    every = [(slice(None), f"mean of {len(prompts)}"), *((n, short(n, p)) for n, p in enumerate(prompts))]
    for number, prompt in every:
        for budget, one in found.items():
            off = variation(one.mass, reference.mass) if one is not reference else torch.full((1,), torch.nan)
            values = {"undecided": one.undecided, "undecided at least": floor[budget]}
            values["total variation"] = off.expand(len(prompts))
            rows += [(prompt, budget, name, float(x[number].mean())) for name, x in values.items()]
    several = dict.fromkeys(row[0] for row in rows)
    rows += [(prompt, n, f"aim, {name}", x) for prompt in several for name, aim in aims.items() for n, x in aim.items()]
    frame = pd.DataFrame(rows, columns=["prompt", "passes", "method", "value"])
    frame["drawn"] = frame["value"].clip(lower=LEAST_DRAWN)
    aim, looks = frame["method"].str.startswith("aim"), {"undecided at least": ("blue", "line-ew-open", "dash")}
    for name, colour in (("undecided", "blue"), ("total variation", "vermilion")):
        looks |= {name: (colour, "circle", "solid"), f"aim, {name}": (colour, "x", "dot")}
    told = frame[(frame["prompt"] == next(iter(several))) & ~aim & frame["value"].notna()]
    alt = "; ".join(f"{row.method} {row.value:.3g} at {row.passes}" for row in told.itertuples())
    caption = (
        "More passes to the right. See which of the two falls sooner, what can be certified or what is really off, "
        "and whether each has come below its cross, the aim, there. A blue cross below the dashed line is out of reach "
        "of any choice of passes. Single prompts are in the menu: few of them can make the mean."
    )
    alt, drawn = f"{next(iter(several))}: {alt}.", {"drawn": ("mass", "")}
    figure = lines(frame, "passes", drawn, looks, title, alt, caption, by="prompt")
    return figure.update_layout(xaxis_type="category", yaxis={"type": "log", "title_text": "share of all mass"})


def beside(found: Bridged, reference: Bridged) -> dict[str, torch.Tensor]:
    """Of each row: mass placed, undecided, total variation and KL to the reference, whether the likeliest is its."""
    truth, floor = spread(reference.probabilities), 1e-9
    return {
        "placed": found.probabilities.sum(1),
        "undecided": found.undecided,
        "total variation": variation(found.mass, reference.mass),
        "KL": kl(target_logits(truth), target_logits(found.probabilities, floor)),
        "top-1 equal": (found.probabilities.argmax(1) == truth.argmax(1)).double(),
    }


def said_of(logits: torch.Tensor, reference: Bridged) -> Bridged:
    """What logits `(n, vocab)` say of the base's tokens, and of what has no place there what the reference says."""
    told = logits.double().softmax(-1) * (1 - reference.unplaced)[:, None]
    none = torch.ones(len(told)).double(), torch.zeros(len(told)).long()
    return Bridged(torch.cat([told, reference.mass[:, -2:]], 1), *none)


def tables(bridge: Bridge, places: Places) -> dict[str, Bridged]:
    """What the bridges that need no look-ahead place behind the places: the study's first, and the stages in bytes."""
    both, said = (bridge.expert, bridge.base), places.said
    found = {"A as reported": StringBridge(*both, "A")(said)}
    found |= {f"{stage} in bytes": Bridge(*both, stage)(said) for stage in "AB"}
    return found | {"C in context": Bridge(*both, "C")(said, places.probes.prompts)}


def judged(name: str, one: Bridged, reference: Bridged, passage: torch.Tensor) -> dict[str, float | str]:
    """Means over places of what `beside` tells, with 95% over passages, and ends of the distance from what is right."""
    row: dict[str, float | str] = {"bridge": name}
    for quantity, values in beside(one, reference).items():
        if quantity != "undecided" or name.startswith("exact"):
            low, high = bounds(passage, values.double())
            row |= {quantity: float(values.mean()), f"{quantity} low": low, f"{quantity} high": high}
    # The reference is off by what it leaves undecided at most, either way.
    off, left = variation(one.mass, reference.mass), reference.undecided
    row["truth low"] = max(0.0, bounds(passage, (off - left).clamp(min=0))[0])
    row["truth high"] = bounds(passage, off + left)[1]
    return row


def measured(
    bridge: Bridge, places: Places, found: dict[int, Bridged], floor: dict[int, torch.Tensor]
) -> list[dict[str, float | str]]:
    """A row for each table and for each budget of `found`, against the largest; `floor` is what `least` returned."""
    reference, passage = found[max(found)], places.passage
    rows = [judged(name, one, reference, passage) for name, one in tables(bridge, places).items()]
    for passes, one in found.items():
        told = {"passes": passes, "least": float(floor[passes].mean())}
        rows.append(judged(f"exact {passes}", one, reference, passage) | told)
    return rows


# ------------------------------------------------------------------------------------- inside a token


def inside(passages: Sequence[str], n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Up to n prompts that end inside a long word of a passage, and what is left of the word."""
    rng, found = random.Random(seed), []
    for text in passages:
        words = [m.span() for m in re.finditer(r"(?<= )[A-Za-z]{6,}", text) if m.start() >= LEAST]
        if words:
            start, stop = rng.choice(words)
            cut = rng.randint(start + 2, stop - 2)
            found.append((text[:cut], text[cut:stop]))
    return found[:n]


def healed(bridge: Bridge, cuts: Sequence[tuple[str, str]], heals: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    """What the look-ahead says behind the prompts of `inside` when their last tokens are open again."""
    rows, pieces = [], token_bytes(bridge.base.tokenizer)
    for bridge.heal in heals:
        found = bridge(None, [prompt for prompt, _ in cuts])
        for (prompt, rest), row, left in zip(cuts, found.mass, found.undecided.tolist(), strict=True):
            best = int(row[:-2].argmax())
            one = {"prompt": f"…{prompt[-24:]}|{rest}", "heal": bridge.heal, "across the end": float(row[-2])}
            likeliest = {"likeliest": _visible(pieces[best] or b""), "mass": float(row[best])}
            rows.append(one | {"undecided": left} | likeliest)
    bridge.heal = 0
    return pd.DataFrame(rows)
