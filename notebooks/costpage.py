"""Tables and figures of page 23: what is counted, predicted against measured, where time goes, when to stop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

from chassis_utils import ChassisError, LanguageModel, Probes
from chassis_utils.activations import batched, tokenize
from chassis_utils.metrics import ratio_bounds
from chassis_utils.statistics import FOLD
from costs import BATCH, LENGTH, Device, Rates, Shape, bill, overhead, reached, shape, sizes, stages, today
from crowd import Costs
from curves import drawn, interval, laws
from plots import GREY, PALETTE, _buttons, _dropdowns, _finish, _numbers, _owned
from records import Records

NEAR = (0.8, 1.2)  #: Predicted over measured that is near enough
SMALL = 0.01  #: A stage of a smaller share of its run is shown, not judged
#: Part of `costs.json`, the shape it is of, and the family: checks that take too long for a page.
KEPT_CHECKS = (("pocket", "pocket-base", "v2"), ("checks", "TinyLlama 1.1B", "final layer"))
#: Stages of `scale.py` that are shown by their calls.
_TABLE = "table of 6 ranks"
_CALLS = {"bare passes, both models": "bare passes", "gather": "gather"}
_CALLS |= {"fit on the statistics, one lam": "fit, one lam", _TABLE: "table"}
GAIN = 0.01  #: What twice as many tokens must lower the KL by, as a share of the bare base's
BEHIND = 4  #: The largest size is predicted from those that are so many times smaller, and less


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * length or unit == "s":
            return f"{float(f'{seconds / length:.2g}'):,g} {unit}"
    return ""


def size(number: float, unit: str = "B") -> str:
    """A number of bytes, or of something else, with its thousands by letter."""
    number = float(f"{number:.3g}")  # what rounds up to the next letter is told by that
    for letter, one in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= one:
            return f"{number / one:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}"


def counted(shapes: Mapping[str, Shape], tokens: int, rank: int) -> pd.DataFrame:
    """What a plug is made of, one row a model, the expert of the base's own shape."""
    rows = []
    for name, one in shapes.items():
        held, more = sizes(one, one, tokens, rank), overhead(one, rank)
        rows.append(
            {"model": name, "parameters": one.parameters, "active": one.active, "blocks": one.layers}
            | {"FLOPs a token": one.forward(1), "head": one.head(1), "sums a token": 5.0 * one.hidden**2}
            | {f"bytes: {part}": value for part, value in held.items()}
            | {"more FLOPs": more["flops"], "more memory read": more["numbers"], "dimensions from": one.source}
        )
    return pd.DataFrame(rows).set_index("model").T


# ------------------------------------------------------------------------------ predicted, measured


def padding(base: LanguageModel, probes: Probes) -> dict[str, float]:
    """Tokens of prompts, padded ones over these, the length of a padded token's prompt on average, rows held out."""
    ids = tokenize(base, probes)[0]
    batches = [tokens for _, tokens, _ in batched(ids, BATCH)]
    tokens, padded = sum(map(len, ids)), sum(one.numel() for one in batches)
    length = sum(one.numel() * one.shape[1] for one in batches) / padded
    held = sum(map(len, ids[FOLD - 1 :: FOLD])) if len(ids) >= FOLD else len(ids[-1])
    return {"tokens": tokens, "padding": padded / tokens, "length": length, "held": held}


def predicted(
    rates: Rates, base: Shape, expert: Shape, family: str, *, tokens: int, padding: float, length: float,
    held: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Seconds by stage as `spent` tells them, the passes of both models together."""
    found: dict[str, float] = {}
    for stage in stages(base, expert, tokens, family, length, padding, held):
        name = stage.name.partition(",")[0]
        found[name] = found.get(name, 0.0) + rates.seconds(stage)
    return found


def against(ahead: Mapping[str, float], took: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Predicted and measured seconds by stage, the median of several runs, their ratio over all runs, and the share.

    What no stage has is part of the whole, and predicted as nothing.
    """
    rows, whole = [], [sum(one.values()) for one in took]
    for name in [*took[0], "whole"]:
        ours = ahead.get(name, 0.0) if name != "whole" else sum(ahead.values())
        seconds = whole if name == "whole" else [one[name] for one in took]
        middle = statistics.median(seconds)
        row = {"stage": name, "predicted": ours, "measured": middle, "share": middle / statistics.median(whole)}
        known = ours > 0 and min(seconds) > 0
        row |= {"ratio": ours / middle, "low": ours / max(seconds), "high": ours / min(seconds)} if known else {}
        rows.append(row | {"runs": len(took)})
    frame = pd.DataFrame(rows)
    inside = frame["ratio"].between(*NEAR).map({True: "near", False: "off"})
    judged = frame["ratio"].notna() & (frame["share"] >= SMALL)
    return frame.assign(outcome=inside.where(judged, "–"))


def again(told: Mapping[str, Any], rates: Rates, one: Shape, family: str) -> pd.DataFrame:
    """`against` for a check that was measured before, of an expert of the base's own shape."""
    about = {name: told[name] for name in ("tokens", "padding", "length", "held")}
    runs = [dict(zip(told["seconds"], run, strict=True)) for run in zip(*told["seconds"].values(), strict=True)]
    return against(predicted(rates, one, one, family, **about), runs)


def on_card(told: Mapping[str, Any]) -> pd.DataFrame:
    """What `gpu.json` measured, beside what is predicted from the shares of peaks that it reached; a row a part.

    `gather` is passes and sums, `fit` all that is solved and judged.
    """
    device, shares = reached(told)
    rates, tiny, large = device.rates(shares), shape("TinyLlama 1.1B"), shape("Llama 3 70B")
    two = replace(large, blocks=large.blocks[:2], vocab=128_000)  # as `scale.py` rounds it
    seconds = {(row["stage"], row["layers"], row["tokens"]): row for row in (*told["tinyllama"], *told["wide"])}
    (edited,) = told["v2"]
    sums = "sums on the card"
    parts = []
    for name, one, depth in (("TinyLlama 1.1B", tiny, tiny.layers), ("two blocks of a 70B Llama", two, 2)):
        for tokens in sorted({n for _, layers, n in seconds if layers == depth}):
            both = [seconds[f"{stage}, {sums}", depth, tokens]["seconds"] for stage in ("gather", "fit")]
            parts.append((name, one, "final layer", tokens, both))
    both = [edited["gather_seconds"], edited["seconds"] - edited["gather_seconds"]]
    parts.append(("TinyLlama 1.1B", tiny, "v2", edited["tokens"], both))
    rows = []
    for name, one, family, tokens, both in parts:
        ahead = predicted(rates, one, one, family, tokens=tokens, padding=1.0, length=told["setting"]["length"])
        gathering = sum(ahead[stage] for stage in ("forward", "rows", "sums"))
        for part, ours, took in zip(("gather", "fit"), (gathering, sum(ahead.values()) - gathering), both, strict=True):
            near = "near" if NEAR[0] <= ours / took <= NEAR[1] else "off"
            row = {"model": name, "tokens": tokens, "part": f"{family}, {part}", "predicted": ours}
            rows.append(row | {"measured": took, "ratio": ours / took, "outcome": near})
    return pd.DataFrame(rows)


def at_scale(told: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """What `scale.json` holds, as tables by caption: stages, carried on, calls, families, memory."""
    stages_there, onward, families, peaks = [], [], [], []
    for row in told["checks"]:
        held = size(row["peak_in_units"][-1] * row["unit_bytes"]) if row["peak_in_units"] else "–"
        bounds = f"{row['predicted']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
        stages_there.append(
            {"stage": row["stage"], "hidden": f"{row['largest']:,}", "GFLOP/s": f"{row['gflops']:.0f}"}
            | {"seconds": f"{row['seconds']:.3g}", "from smaller sizes": bounds, "memory more": held}
        )
    for model, both in told["carried"].items():
        for family, found in both.items():
            total = found["total"]
            ends = f"{span(total['seconds'])} ({span(total['low'])} to {span(total['high'])})"
            onward.append({"model": model, "family": family, "FLOPs": f"{total['operations']:.3g}", "one thread": ends})
    called: dict[str, dict[str, Any]] = {}
    for row in (*told["depth"], *told["vocabulary"]):
        model = f"two blocks, {row['vocab']:,} tokens" if "vocab" in row else "TinyLlama's dimensions"
        own = called.setdefault(model, {"model": model, "memory at most": 0.0})
        if name := _CALLS.get(row["stage"]):
            own[f"{name}, s"] = f"{row['seconds']:.3g}"
            # None where the system does not tell.
            own["memory at most"] = max(own["memory at most"], (row["held_bytes"] or 0) + (row["peak_bytes"] or 0))
    calls = pd.DataFrame([own | {"memory at most": size(own.pop("memory at most"))} for own in called.values()])
    fitted, judged = (next(r["tokens"] for r in told["depth"] if r["stage"] == name) for name in ("gather", _TABLE))
    measured = told["families"]
    for name, quotients in measured["ratios"].items():
        family, below = name.split(" / ")
        ends = f"{statistics.median(quotients):.2f} ({min(quotients):.2f} to {max(quotients):.2f})"
        families.append({"family": family, "over": below, "quotient": ends})
    for row in measured["memory"]:
        more = {"added at once": size(row["more_bytes"]), "at 16 times": size(row["more_bytes_large"])}
        grown = {"tokens": f"{row['tokens']:,}", "process, models loaded": size(row["held_bytes"])} | more
        peaks.append({"way": row["way"]} | grown | {"ratio with that": f"{row['ratio']:.2f}"})
    wide = pd.DataFrame(families).pivot(index="family", columns="over", values="quotient")
    wide = wide.loc[[*dict.fromkeys(row["family"] for row in families)]].rename_axis(columns=None).reset_index()
    about = f"One thread, {told['setting']['total']:,} tokens, carried on by stage; all stages at their bounds at once"
    return {
        "One thread, random weights, every stage; from smaller sizes with 95%": pd.DataFrame(stages_there),
        about: pd.DataFrame(onward),
        f"One thread, random weights: the public calls on {fitted:,} tokens, the table on {judged:,}": calls,
        "Harvest, fit and table of six ranks on the pocket models, over bare passes of both": wide,
        "Memory of a process: with both models loaded, and the peak above that as tokens grow": pd.DataFrame(peaks),
    }


def aims(measured: Mapping[str, Any]) -> pd.DataFrame:
    """Rows for `aims_table` of what `families.py` measured: time over bare passes, memory as text grows."""
    rows = []
    for route, family in (("harvest", "final layer"), ("gather", "final layer, statistics")):
        quotients = measured["ratios"][f"{family} / bare passes"]
        ends = min(quotients), max(quotients), statistics.median(quotients)
        words = f"by {route}: with fit and table, over the bare passes, median and range of three rounds"
        rows.append((words, "at most", 1.15, *ends))
    grown = [row["ratio"] for row in measured["memory"] if row["way"] == "gather, fit"]
    more = "by gather: peak memory at 16 times the tokens over that at once, process and models included"
    rows += [(more, "at most", 1.2, *3 * [ratio]) for ratio in grown]
    return pd.DataFrame(rows, columns=["quantity", "bound", "aim", "low", "high", "value"])


def told_of_card(told: Mapping[str, Any]) -> dict[str, str]:
    """Figures of `gpu.json` that a text names: sums on card and processor, ratios to bare passes, v2, memory."""
    rows = {(row["stage"], row["tokens"]): row for row in told["tinyllama"]}
    few, many = (sorted({n for _, n in rows})[i] for i in (0, -1))
    card, host = (
        [rows[f"{stage}, sums on the {where}", few]["seconds"] for stage in ("gather", "fit")]
        for where in ("card", "processor")
    )
    bare = rows["bare passes of both models", many]
    passed = 1 + told["setting"]["judged"]  # bare passes are of the text that is judged too
    table = next(row for (stage, n), row in rows.items() if "table" in stage and n == many)
    ours = rows["gather, sums on the card", many]["seconds"] + rows["fit, sums on the card", many]["seconds"]
    (edited,) = told["v2"]
    far = max(abs(row["against_processor"]) for row in told["same"])
    return {
        "card": told["setting"]["device"], "few": f"{few:,}", "many": f"{many:,}",
        "threads": str(told["setting"]["threads"]), "gather": f"{card[0]:.2g}", "fit": f"{card[1]:.2g}",
        "gather_host": f"{host[0]:.2g}", "fit_host": f"{host[1]:.2g}",
        "gather_over": f"{rows['gather, sums on the card', many]['seconds'] * passed / bare['seconds']:.2f}",
        "all_over": f"{(ours + table['seconds']) / bare['seconds']:.2f}",
        "v2": f"{edited['seconds']:.0f}", "v2_gather": f"{edited['gather_seconds']:.0f}",
        "v2_memory": size(edited["held_bytes"] + edited["peak_bytes"]), "far": f"{far:.1%}",
        "again": "differs" if any(row["against_again"] for row in told["same"]) else "is the same in every digit",
        "length": str(told["setting"]["length"]), "held": f"1/{1 / told['setting']['judged']:.0f}",
    }  # fmt: skip


# ------------------------------------------------------------------------------------ where time goes


def where(
    shapes: Mapping[str, Shape], ways: Mapping[str, tuple[Rates, str]], tokens: Sequence[int], first: str = ""
) -> go.Figure:  # fmt: skip
    """Shares of the time by stage, stacked, one bar a model; a menu of ways, a slider over tokens.

    `ways` are rates and a family each. As in `kl_vs_rank` each control owns what no other touches: the menu `visible`,
    the slider the values.
    """
    first, names = first or next(iter(ways)), [*shapes]
    parts = ["forward, base", "forward, expert", "rows", "sums", "ridge", "judging", "cut"]
    colours = dict(zip(parts, PALETTE, strict=False))
    bills = {
        (way, n): [bill(one, one, n, rates, family=family) for one in shapes.values()]
        for way, (rates, family) in ways.items()
        for n in tokens
    }

    def told(way: str, part: str, n: int) -> list[list[float]]:
        """Share and seconds of a stage, model by model."""
        found = []
        for one in bills[way, n]:
            own = sum(s for stage, s in zip(one.stages, one.seconds, strict=True) if stage.name == part)
            found.append([own / sum(one.seconds), own])
        return found

    figure = go.Figure(layout={"showlegend": True, "barmode": "stack", "margin": {"b": 190}, "height": 520})
    for way in ways:
        for part in parts:
            figure.add_bar(
                y=names, orientation="h", name=part, marker_color=colours[part], meta=[way, part], legendgroup=part,
                hovertemplate=f"<b>%{{y}}</b><br>{part}: %{{customdata[0]}}, %{{x:.1%}}<extra></extra>",
            )  # fmt: skip
        figure.add_scatter(
            y=names, x=[1.02] * len(names), mode="text", textposition="middle right", textfont_size=11,
            meta=[way, None], showlegend=False, hoverinfo="skip", cliponaxis=False,
        )  # fmt: skip
    steps = {}
    for n in tokens:
        bars = [told(*trace.meta, n) if trace.meta[1] else None for trace in figure.data]
        x = [[1.02] * len(names) if one is None else _numbers(share for share, _ in one) for one in bars]
        hover = [None if one is None else [[span(seconds)] for _, seconds in one] for one in bars]
        text = [
            [span(sum(b.seconds)) for b in bills[trace.meta[0], n]] if trace.meta[1] is None else None
            for trace in figure.data
        ]
        steps[f"{n:.0e}".replace("e+0", "e")] = [{"x": x, "customdata": hover, "text": text}]
    menus = _dropdowns(figure, 8, (first, _owned(figure, 0, ways, "visible", True, False)))
    start = [*steps][len(steps) // 2]
    slider = {"active": [*steps].index(start), "steps": _buttons(figure, start, steps), "pad_t": 46}
    slider |= {"currentvalue_prefix": "tokens: "}
    n = tokens[len(steps) // 2]
    alt = f"Time of a plug by stage at {n:,} tokens, {first}: " + "; ".join(
        f"{name} {span(sum(one.seconds))}, of it passes {sum(one.seconds[:2]) / sum(one.seconds):.0%}"
        for name, one in zip(names, bills[first, n], strict=True)
    )
    axis = {"range": [0, 1.32], "tickvals": [0, 0.25, 0.5, 0.75, 1], "tickformat": ".0%", "title_text": "share of time"}
    caption = (
        "A bar is one fit, the time it takes stands behind it. Move the slider: see which stages grow with the text "
        "and which cost the same for little text and for much, and which is the widest: only there is much time to be "
        "saved."
    )
    return _finish(
        figure, "Where the time of a plug goes", f"{alt}.", caption, above=38,
        columns={"y": "model", "hover": ["time"]}, updatemenus=menus, sliders=[slider], xaxis=axis,
        yaxis={"autorange": "reversed", "showgrid": False},
    )  # fmt: skip


def invoice(
    shapes: Mapping[str, Shape], each: float, here: Rates, card: Rates, threads: int, device: Device, rate: float
) -> pd.DataFrame:  # fmt: skip
    """What a plug fitted on so many tokens a feature takes, one row a model and family.

    FLOPs, time of one thread here, hours of a device and where the sums are then (as `today`), hours if the device had
    room for them, how many hold the weights, and money for the hours of today.
    """
    rows = []
    for name, one in shapes.items():
        for family, features in (("final layer", one.hidden), ("v2", 2 * one.hidden + one.blocks[-1].inputs)):
            tokens = max(2 * LENGTH, round(each * features))
            placed = today(device, card, here, threads, one, one, tokens, family)
            own, now, then = (
                bill(one, one, tokens, rates, rate, family, device=device) for rates in (here, placed, card)
            )
            rows.append(
                {"model": name, "family": family, "features": features, "tokens": tokens}
                | {"FLOPs": sum(stage.flops for stage in own.stages), "one thread here": span(3600 * own.hours)}
                | {"device-hours": now.hours, "sums": "device" if placed is card else "host"}
                | {"if it had room": then.hours}
                | {"devices for the weights": now.devices, "money": now.money}
            )
    return pd.DataFrame(rows)


def slower(costs: Costs, rates: Rates, base: Shape, expert: Shape, tokens: int) -> Costs:
    """The same costs, but a shard of so many tokens takes what the model says of these shapes, spread as measured."""
    found = stages(base, expert, tokens)
    seconds = sum(rates.seconds(stage) for stage in found if stage.name.startswith(("forward", "sums")))
    middle = statistics.median(costs.gather)
    return replace(costs, gather=[one / middle * seconds for one in costs.gather])


# --------------------------------------------------------------------------------------- when to stop


def learned(told: Mapping[str, Any], draws: int = 1000) -> dict[str, Any]:
    """What a measured curve says: mean KL by tokens, its law from all sizes, and the largest from the smaller ones.

    `told` is a part of `curve` in `costs.json`: sums of KL by prompt of the validation text, by subset and size.
    """
    points = pd.DataFrame(told["points"])
    rows = torch.tensor(told["rows"])
    many = sorted(points["chunks"].unique())
    tokens = [float(points.loc[points["chunks"] == size, "tokens"].mean()) for size in many]
    sums = torch.tensor([points.loc[points["chunks"] == size, "kl_sums"].tolist() for size in many])
    means = sums.double().sum(-1) / rows.sum()
    bare = float(sum(told["bare"]) / rows.sum())
    fewer = sum(n * BEHIND <= tokens[-1] * 1.01 for n in tokens)
    if fewer < 3:
        raise ChassisError(f"{len(many)} sizes are too few to predict the largest from others: measure more")
    chosen = drawn(sums, rows, draws)
    ahead, whole = laws(tokens[:fewer], chosen[:, :fewer]), laws(tokens, chosen)
    # Both are of the same prompts, draw by draw: what is compared is the law, not how hard these prompts are.
    off = interval(ahead(tokens[-1]) / chosen[:, -1])
    enough = whole.enough(GAIN * bare).clamp(min=tokens[0])
    return {
        "expert": told["expert"], "family": told["family"], "features": told["features"], "tokens": tokens,
        "kl": means.mean(1).tolist(), "each": means, "bare": bare, "law": whole, "ahead": ahead, "fewer": fewer,
        "off": off, "enough": interval(enough), "floor": interval(whole.floor),
        "test": told["test"], "probes": told["probes"],
    }  # fmt: skip


def curve_figure(curves: Mapping[str, Mapping[str, Any]], first: str = "") -> go.Figure:
    """Held-out KL against tokens fitted, measured and as the law has it up to a billion; a menu of the curves."""
    first, figure = first or next(iter(curves)), go.Figure(layout={"showlegend": True, "margin_b": 130, "height": 490})
    for name, one in curves.items():
        begin = math.log10(one["tokens"][0])
        onward = [10 ** (begin + k / 40 * (9 - begin)) for k in range(41)]
        ends = [interval(one["law"](n)) for n in onward]
        # A band that is wide where little was told would flatten all else.
        top = 1.2 * max(one["bare"], float(one["each"].max()))
        band = [min(high, top) for *_, high in ends] + [low for _, low, _ in ends][::-1]
        common = {"meta": [name]}
        figure.add_scatter(
            x=onward + onward[::-1], y=_numbers(band), fill="toself", mode="lines", line={"width": 0},
            fillcolor="rgba(0,114,178,0.18)", name="95% of the law", hoverinfo="skip", **common,
        )  # fmt: skip
        figure.add_scatter(
            x=_numbers(onward), y=_numbers(middle for middle, *_ in ends), mode="lines", name="law, from all sizes",
            line={"color": PALETTE[0]}, hovertemplate="%{x:.2e} tokens: %{y:.4g}<extra></extra>", **common,
        )  # fmt: skip
        figure.add_scatter(
            x=_numbers(one["tokens"][: one["fewer"]] + [one["tokens"][-1]]), mode="lines", line_dash="dot",
            y=_numbers(interval(one["ahead"](n))[0] for n in one["tokens"][: one["fewer"]] + [one["tokens"][-1]]),
            name="law, from the smaller sizes", line_color=PALETTE[1], hoverinfo="skip", **common,
        )  # fmt: skip
        figure.add_scatter(
            x=_numbers(n for n in one["tokens"] for _ in range(one["each"].shape[1])),
            y=_numbers(one["each"].flatten().tolist()), mode="markers", name="measured, one a subset",
            marker={"color": GREY, "size": 6}, hovertemplate="%{x:,.0f} tokens: %{y:.4g}<extra></extra>", **common,
        )  # fmt: skip
        figure.add_scatter(
            x=_numbers([onward[0], onward[-1]]), y=_numbers([one["bare"]] * 2), mode="lines", name="bare base",
            line={"color": GREY, "dash": "dash"}, hovertemplate="bare base: %{y:.4g}<extra></extra>", **common,
        )  # fmt: skip
        stop, *_ = one["enough"]
        figure.add_scatter(
            x=_numbers([stop, stop]), y=_numbers([min(band), max(one["kl"])]), mode="lines", name="enough",
            line={"color": PALETTE[2], "dash": "dash"}, hovertemplate="enough: %{x:,.0f} tokens<extra></extra>",
            **common,
        )  # fmt: skip
    menus = _dropdowns(figure, 8, (first, _owned(figure, 0, curves, "visible", True, False)))
    one = curves[first]
    alt = (
        f"KL on validation text against tokens fitted, {first}: from {one['kl'][0]:.3g} at {one['tokens'][0]:,.0f} to "
        f"{one['kl'][-1]:.3g} at {one['tokens'][-1]:,.0f}, and {one['floor'][0]:.3g} in the limit as the law has it; "
        f"twice as many are worth less than a hundredth of the bare base's KL from {one['enough'][0]:,.0f} on."
    )
    caption = (
        "See where the law goes flat, and the upright line from which on twice as many tokens bring too little. How "
        "far to trust it shows in the dotted line, which knows the smaller sizes alone: see how near it passes to the "
        "largest. Right of the last points nothing was measured."
    )
    return _finish(
        figure, "When to stop adding probes", alt, caption, above=38, updatemenus=menus, yaxis_title_text="KL (nats)",
        xaxis={"type": "log", "title_text": "tokens fitted", "range": [3, 9]},
    )  # fmt: skip


def stopping(curves: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """When twice as many tokens are worth too little, and how well the largest size was told by the smaller ones."""
    rows = []
    for name, one in curves.items():
        (off, low, high), (stop, least, most), (floor, *ends) = (one[key] for key in ("off", "enough", "floor"))
        rows.append(
            {"curve": name, "features": one["features"], "bare base": one["bare"]}
            | {"largest": one["tokens"][-1], "KL there": one["kl"][-1]}
            | {"told from": one["tokens"][one["fewer"] - 1], "told / measured": f"{off:.3f} ({low:.3f} to {high:.3f})"}
            | {"KL in the limit": f"{floor:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"}
            | {"enough": f"{stop:,.0f} ({least:,.0f} to {most:,.0f})", "a feature": stop / one["features"]}
        )
    return pd.DataFrame(rows)


def crowd_figure(several: Mapping[str, Sequence[Mapping[str, float]]]) -> go.Figure:
    """How many times as fast as one worker, simulated, against the number of workers; one line a size of the fit."""
    figure = go.Figure(layout={"showlegend": True, "margin_b": 110, "height": 450})
    for number, (name, rows) in enumerate(several.items()):
        x, colour = [row["workers"] for row in rows], PALETTE[number]
        over = {"type": "data", "symmetric": False, "array": _numbers(r["high"] - r["speedup"] for r in rows)}
        over |= {"arrayminus": _numbers(r["speedup"] - r["low"] for r in rows), "thickness": 1}
        figure.add_scatter(
            x=x, y=_numbers(row["speedup"] for row in rows), name=name, line_color=colour, error_y=over,
            mode="lines+markers", customdata=[[span(row["seconds"])] for row in rows],
            hovertemplate="%{x} workers: %{y:.3g} times, %{customdata[0]}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=x, y=x, mode="lines", name="nothing lost", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    alt = "Simulated speed-up against workers. " + "; ".join(
        f"{name}: {rows[-1]['speedup']:.3g} times with {rows[-1]['workers']}" for name, rows in several.items()
    )
    axes = {axis: {"type": "log", "title_text": text} for axis, text in (("xaxis", "workers"), ("yaxis", "times one"))}
    caption = (
        "Along the dashed line nothing would be lost. See where each line turns away from it: from there on more "
        "workers bring less than they cost, and the larger the fit, the later that may be."
    )
    columns = {"hover": ["time"]}
    return _finish(figure, "A fit on many workers, simulated", f"{alt}.", caption, columns=columns, **axes)


# ------------------------------------------------------------------------------------------- records


def record(
    records: Records, checks: Mapping[str, pd.DataFrame], curves: Mapping[str, Mapping[str, Any]],
    crowds: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:  # fmt: skip
    """Every ratio that the verdict reads, test KL of the largest fits, and what was simulated."""
    for probes, table in checks.items():
        for row in table[table["ratio"].notna()].to_dict("records"):
            ends, name = {end: row[end] for end in ("low", "high")}, row["stage"].replace(" ", "_")
            same = {"metric": "ratio", "probes": probes, "n": row["runs"]}
            records.add(method=f"predicted_{name}", value=row["ratio"], **ends, **same)
            records.add(method=f"share_{name}", value=row["share"], **same)
    for one in curves.values():
        family = one["family"].replace(" ", "_")
        middle, low, high = one["off"]
        same = {"expert": one["expert"], "probes": one["probes"]}
        told = {"metric": "ratio", "split": "val", "rank": one["features"]}
        records.add(method=f"law_{family}", value=middle, low=low, high=high, **told, **same)
        stop, least, most = (end / one["features"] for end in one["enough"])
        records.add(method=f"enough_{family}", value=stop, low=least, high=most, **told, **same)
        sums, bare, rows = (torch.tensor(one["test"][key], dtype=torch.float64) for key in ("kl_sums", "bare", "rows"))
        for method, own in ((family, sums), ("identity", bare)):
            low, high = ratio_bounds(own, rows)
            value, where = float(own.sum() / rows.sum()), {"split": "text", "n": int(rows.sum())}
            records.add(metric="kl", method=method, value=value, low=low, high=high, **where, **same)
        worst, best = ratio_bounds(sums, bare)
        share = 1 - float(sums.sum() / bare.sum())
        records.add(metric="recovered", method=family, value=share, low=1 - best, high=1 - worst, **where, **same)
    for name, rows in crowds.items():
        for row in rows:
            ends = {end: row[end] for end in ("low", "high")}
            method = f"simulated_{row['workers']}"
            records.add(metric="ratio", method=method, value=row["speedup"], probes=name, **ends)
