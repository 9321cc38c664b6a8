"""Several experts on one base: what page 21 measures of a port, and its figures."""

from __future__ import annotations

import math
import re
import time
import timeit
from bisect import bisect, bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import plotly.graph_objects as go
import torch

from chassis_utils import Adapter, ChassisError, LanguageModel, Port, Probes, token_bytes
from chassis_utils.activations import batched
from chassis_utils.metrics import BLOCK, ratio_bounds
from interventions import _told, tokens_figure
from likeliest import following
from plots import GREY, PALETTE, _dropdowns, _figures, _finish, _numbers
from records import Records
from routes import LENGTHS, Router, _states
from serving import vllm_refuses

Document = Sequence[tuple[str, str]]  #: Parts of one text in order: side (whose text it is), and the text
Weights = Mapping[str, float]  #: By side; one without a plug is the bare base's
TOLD = (4, 8, 16, 32, 64)  #: First tokens of a prompt that a router is told of


def alternating(sides: Mapping[str, Probes], parts: int = 3, seam: str = "\n\n") -> list[Document]:
    """Documents of so many parts, a passage each, of the sides in turn; every other one begins with the other side.

    Behind each part is `seam`; with a single line break no blank line is left within the parts either.
    """
    turns = {side: (re.sub("\n{2,}", seam, one + "\n\n") for one in some.prompts) for side, some in sides.items()}
    orders = [[*sides], [*sides][::-1]]
    many = min(map(len, sides.values())) * len(sides) // parts
    return [
        [(side, next(turns[side])) for side in (orders[i % 2] * parts)[:parts]] for i in range(many)
    ]  # fmt: skip


def placed(base: LanguageModel, documents: Sequence[Document]) -> tuple[list[list[int]], pd.DataFrame]:
    """Ids of every document, and one row a token but its first: whose text, how far into its part, UTF-8 bytes."""
    several, rows = [], []
    for number, parts in enumerate(documents):
        text, ends = "".join(part for _, part in parts), [*accumulate(len(part) for _, part in parts)]
        told = base.tokenizer(text, return_offsets_mapping=True)
        several.append(told["input_ids"])
        if len(told["input_ids"]) > base.context:
            raise ChassisError(f"document {number} has {len(told['input_ids'])} tokens, of {base.context}: cut it")
        reached, begun = 0, {}
        for token, (_, end) in enumerate(told["offset_mapping"]):
            part = bisect_left(ends, end)
            since = token - begun.setdefault(part, token)
            if token:  # a byte that is a part of a character ends where the character does: the first has them all
                rows.append((number, token, parts[part][0], since, len(text[reached:end].encode())))
            reached = max(reached, end)
    return several, pd.DataFrame(rows, columns=["document", "token", "side", "since", "bytes"])


def told(
    port: Port, documents: Sequence[Document], choices: Mapping[str, Weights],
    experts: Mapping[str, LanguageModel] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """What is said of every token of documents with each choice of weights in use, one row a token and choice.

    One padded pass of `port.model` a choice and batch. With `experts` by side (the base for a side without), the same
    weights are given to the experts' own log probabilities too: these are the rows of `live` choices.

    Returns:
        The columns of `placed`, `choice, live, nats` (of the token), and with experts `kl_<side>` (nats, from that
        expert), `kl_mixture` (from the experts mixed by the same weights) and `kl_bare` (from these to the base).

    Raises:
        ChassisError: an adapter was fitted on a part, or a document is longer than the context.
    """
    base, experts = port.base, experts or {}
    parts = Probes("parts", "text", tuple(part.strip() for one in documents for _, part in one)).fingerprints
    if bad := [n for n, plug in port.plugs.items() if isinstance(plug, Adapter) and plug.fitted_on & parts]:
        raise ChassisError(f"'{bad[0]}' was fitted on a part of these documents: give held-out text")
    if live := [name for name in port.plugs if not isinstance(port.plugs[name], Adapter)]:
        raise ChassisError(f"'{live[0]}' is a live expert, which a pass over a text does not ask: give an adapter")
    ids, places = placed(base, documents)
    rows, frames = {number: some for number, some in places.groupby("document")}, []
    for numbers, given, mask in batched(ids, max(base.context, BLOCK * 2 // base.vocab_size)):
        own, given, mask = mask[:, 1:].bool(), given.to(base.device), mask.to(base.device)

        def said(model: torch.nn.Module, given=given, mask=mask, own=own) -> torch.Tensor:
            with torch.inference_mode():
                logits = model(input_ids=given, attention_mask=mask, use_cache=False).logits[:, :-1]
            return logits.cpu()[own][:, : base.vocab_size].float().log_softmax(-1)

        here, written = pd.concat([rows[n] for n in numbers]), given.cpu()[:, 1:][own][:, None]
        bare = said(base.model) if experts else None
        theirs = {side: bare if one is base else said(one.model) for side, one in experts.items()}
        shares = {side: one.exp() for side, one in theirs.items()}
        for name, weights in choices.items():
            use(port, weights)
            both, apart = {False: said(port.model)}, {}
            if experts:
                mixed = bare + sum(weight * (theirs[side] - bare) for side, weight in weights.items())
                both[True] = mixed = mixed.log_softmax(-1)
                apart = {"kl_mixture": both[False], "kl_bare": bare}
                apart = {column: _kl(mixed.exp(), mixed, one) for column, one in apart.items()}
            for live, ours in both.items():
                columns = {"nats": -ours.gather(1, written)[:, 0]} | ({} if live else apart)
                columns |= {f"kl_{side}": _kl(shares[side], one, ours) for side, one in theirs.items()}
                columns = {column: values.double().numpy() for column, values in columns.items()}
                frames.append(here.assign(choice=name, live=live, **columns))
    port.use(None)
    return pd.concat(frames, ignore_index=True)


def use(port: Port, weights: Weights) -> None:
    """Use the plugs of some sides; a side without one, or without weight, is the bare base's."""
    port.use({side: weight for side, weight in weights.items() if side in port.plugs and weight} or None)


def _kl(share: torch.Tensor, expert: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL of each row, nats, from probabilities `(n, vocab)` and the log probabilities of both."""
    return torch.linalg.vecdot(share, expert - ours).clamp(min=0)


def bits(frame: pd.DataFrame) -> float:
    """Bits per byte of rows of `told`."""
    return frame["nats"].sum() / math.log(2) / frame["bytes"].sum()


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of `told`, a row a choice, side of the text and what the KL is `to`: a side's expert, or the `mixture`.

    Columns `choice, live, side, to, n, bits_per_byte, kl, recovered` (of `identity`, the KL of the choice `base`), each
    with its 95% interval over documents.
    """
    rows = []
    for (choice, live, side), some in frame.groupby(["choice", "live", "side"], sort=False):
        own = frame[(frame["choice"] == "base") & ~frame["live"] & (frame["side"] == side)]
        same = {"choice": choice, "live": live, "side": side, "n": len(some), "bits_per_byte": bits(some)}
        for column in [c for c in frame if c.startswith("kl_") and c != "kl_bare" and some[c].notna().all()]:
            of = some["kl_bare"] if column == "kl_mixture" else own[column]
            sums = [_by_document(own, one) for one in (some[column], of)]
            sizes = _by_document(own, own["bytes"] * 0 + 1)
            (low, high), (worst, best) = ratio_bounds(sums[0], sizes), ratio_bounds(*sums)
            shares = {"recovered": 1 - float(sums[0].sum() / sums[1].sum())}
            shares |= {"recovered_low": 1 - best, "recovered_high": 1 - worst}
            kl = {"kl": float(sums[0].sum() / sizes.sum()), "kl_low": low, "kl_high": high}
            least, most = ratio_bounds(sums[1], sizes)
            kl |= {"identity": float(of.mean()), "identity_low": least, "identity_high": most}
            rows.append(same | {"to": column.removeprefix("kl_")} | kl | shares)
    return pd.DataFrame(rows)


def _by_document(frame: pd.DataFrame, values: pd.Series) -> torch.Tensor:
    """Sums of values, in the order of the frame's rows, over its documents."""
    return torch.tensor(values.groupby(frame["document"].to_numpy()).sum().to_numpy(), dtype=torch.float64)


def over(frame: pd.DataFrame, choice: str, own: str = "filtered") -> dict[str, float]:
    """Bits of one choice over those of another for the same tokens of `company`, with 95% over documents."""
    mine, theirs = (frame[frame["choice"] == one] for one in (own, choice))
    sums = [_by_document(some, some["nats"]) for some in (mine, theirs)]
    low, high = ratio_bounds(*sums)
    return {"value": float(sums[0].sum() / sums[1].sum()), "low": low, "high": high}


def record(records: Records, table: pd.DataFrame, texts: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Record a `summary` whose choices are weights of the first side: `texts` and experts' `names` are by side."""
    first, second = names
    for row in table.to_dict("records"):
        alpha, mixture = row["choice"], row["to"] == "mixture"
        if alpha == "base" and (row["live"] or mixture) or mixture and alpha in ("0.0", "1.0"):
            continue  # the base again; an expert alone, under its own name already
        method = {"0.0": f"plug_{second}", "1.0": f"plug_{first}", "base": "identity"}.get(alpha, f"mixed_{alpha}")
        method = f"live_{alpha}" if row["live"] else method
        expert = f"{alpha} {names[first]} + {1 - float(alpha):.1f} {names[second]}" if mixture else names[row["to"]]
        same = {"expert": expert, "probes": texts[row["side"]], "split": "text", "n": row["n"]}
        for metric in ("kl", "recovered") if alpha != "base" and row["identity"] > 1e-9 else ("kl",):
            ends = {end: row[f"{metric}_{end}"] for end in ("low", "high")}
            records.add(metric=metric, value=row[metric], method=method, **same, **ends)
        if mixture:
            records.add(metric="kl", value=row["identity"], method="identity", **same, low=row["identity_low"],
                        high=row["identity_high"])  # fmt: skip
        if row["to"] == row["side"]:
            records.add(metric="bits_per_byte", value=row["bits_per_byte"], method=method, **same)


def routed(
    frame: pd.DataFrame, router: Router, documents: Sequence[Document], window: int, fresh: bool, every: int = 8
) -> pd.DataFrame:  # fmt: skip
    """Of the rows of `told`, at each token those of the plug that the router chooses; `base` where it chooses none.

    It is asked before every eighth token (`every`) and told the last `window` tokens, or with `fresh` what of them
    comes after the last blank line: nothing of what follows. What came before is read anew with the plug chosen, as
    `route` and a new `generate` do.
    """
    ids, _ = placed(router.base, documents)
    starts = [(number, start) for number, row in enumerate(ids) for start in range(0, len(row), every)]
    seen = [ids[number][max(0, start - window) : start] for number, start in starts]
    texts = [router.base.tokenizer.decode(row, skip_special_tokens=True) for row in seen]
    texts = [text.rpartition("\n\n")[2] if fresh else text for text in texts]
    asked = [*dict.fromkeys(text for text in texts if text.strip())]
    choice = dict(zip(asked, router(asked)["choice"], strict=True))
    chosen = pd.DataFrame(starts, columns=["document", "token"])
    chosen = chosen.assign(block=chosen.pop("token") // every, choice=[choice.get(text) or "base" for text in texts])
    return _taken(frame, chosen, every, "routed")


def _taken(frame: pd.DataFrame, chosen: pd.DataFrame, every: int, name: str) -> pd.DataFrame:
    """The rows of `told` that `chosen` (`document, block, choice`) names, as those of the choice `name`."""
    found = frame[~frame["live"]].assign(block=frame["token"] // every).merge(chosen)
    return found.assign(choice=name).sort_values(["document", "token"], ignore_index=True)


def distances(router: Router, documents: Sequence[Document], every: int = 8) -> torch.Tensor:
    """How far each block of so many tokens is from each expert and from none: `(documents, blocks, experts + 1)`.

    Squared Mahalanobis distances of the mean final state, all of a document read in one pass; none is the nearest of
    the router's other classes, and never farther than its limit for so few tokens. Blocks that a document does not
    fill are zeros.
    """
    texts, experts, found = tuple("".join(part for _, part in parts) for parts in documents), len(router.names), []
    edge = router.slack * router.limit[bisect(LENGTHS, every, 1) - 1]
    for _, states in sorted(_states(router.base, Probes("documents", "text", texts))):
        states = torch.cat([states[: every - 1].mean(0, keepdim=True), states])  # the first tells of no text
        blocks = states[: len(states) // every * every].unflatten(0, (-1, every)).mean(1)
        far = torch.cdist(blocks @ router.whiten, router.means).square()
        none = torch.cat([far[:, experts:], edge.expand(len(far), 1)], 1).amin(1, keepdim=True)
        found.append(torch.cat([far[:, :experts], none], 1))
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


def beliefs(far: torch.Tensor, heat: float, switch: float) -> torch.Tensor:
    """Whose each block is, told by those before it: the forward filter of a hidden Markov chain.

    Source: :cite:`rabiner1989tutorial`.

    Args:
        far: `distances`.
        heat: What variances are multiplied by: a block tells less than windows side by side, as blocks are alike.
        switch: Probability that the next block is another's, for each of the others.

    Returns:
        Probabilities `(documents, blocks + 1, experts + 1)`, none last; all alike before the first block.

    Raises:
        ChassisError: `heat` is not positive, or a side is left more readily than it is kept.
    """
    sides = far.shape[-1]
    if not (heat > 0 and 0 <= switch <= 1 / sides):
        raise ChassisError(f"heat {heat}, switch {switch}: give heat above 0, and a switch from 0 to 1/{sides}")
    move = torch.full((sides, sides), switch, dtype=far.dtype).fill_diagonal_(1 - (sides - 1) * switch)
    belief = [torch.full_like(far[:, 0], 1 / sides)]
    for block in far.unbind(1):
        belief.append((belief[-1].log() - block / (2 * heat)).softmax(-1) @ move)
    return torch.stack(belief, 1)


def filtered(
    frame: pd.DataFrame, router: Router, belief: torch.Tensor, choices: Mapping[str, Weights], every: int = 8
) -> pd.DataFrame:  # fmt: skip
    """Of the rows of `told`, at each token those of the choice whose weights are nearest to `beliefs` in its block.

    Of the bare base and single plugs that is the likeliest; among mixtures, one that hedges.
    """
    weights = [[weights.get(name, 0.0) for name in router.names] for weights in choices.values()]
    weights = torch.tensor([[*row, 1 - sum(row)] for row in weights], dtype=belief.dtype)
    # Rounded, as of what is equally near the first listed counts.
    nearest = torch.cdist(belief, weights, p=1).round(decimals=9).argmin(-1)
    names, rows = [*choices], enumerate(nearest.tolist())
    chosen = [(number, block, names[one]) for number, row in rows for block, one in enumerate(row)]
    return _taken(frame, pd.DataFrame(chosen, columns=["document", "block", "choice"]), every, "filtered")


def company(
    frame: pd.DataFrame, router: Router, documents: Sequence[Document], choices: Mapping[str, Weights],
    reading: tuple[int, bool], chain: tuple[Sequence[str], float, float],
) -> pd.DataFrame:  # fmt: skip
    """The rows of `told`, those `routed` and those `filtered`, and as `oracle` those of each side's own plug.

    `reading` is the router's window and `fresh`; `chain` names the choices the filter has, its heat and its switch.
    The column `own` is the weight that the plug of the token's side has; of a side without one, that of the base.
    """
    own = [
        (name, side, weights.get(side, 0.0) if side in choices else 1 - sum(weights.values()) + weights.get(side, 0.0))
        for name, weights in choices.items() for side in frame["side"].unique()
    ]  # fmt: skip
    frame = frame.merge(pd.DataFrame(own, columns=["choice", "side", "own"]))
    among, *settings = chain
    belief = beliefs(distances(router, documents), *settings)
    chosen = filtered(frame, router, belief, {name: choices[name] for name in among})
    oracle = frame[frame["own"] == 1].assign(choice="oracle")
    return pd.concat([frame, routed(frame, router, documents, *reading), chosen, oracle], ignore_index=True)


def agents(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Bits per byte by whose part it is, for those of `company` that `names` lists, and their mean weight `own`."""
    rows = []
    for choice, name in names.items():
        some = frame[frame["choice"] == choice]
        row = {"in use": name, "all": bits(some)} | {side: bits(own) for side, own in some.groupby("side", sort=False)}
        rows.append(row | {"own plug": some["own"].mean()})
    return pd.DataFrame(rows)


def by_length(router: Router, sets: Mapping[str, tuple[str | None, Probes]]) -> pd.DataFrame:
    """Share of prompts that go where they belong, by the tokens told of them, 4 to 64 and whole; `n` prompts."""
    rows = {}
    for name, (truth, probes) in sets.items():
        if router.fitted_on & probes.fingerprints:
            raise ChassisError(f"'{probes.name}' holds passages that the router was fitted on: take other prompts")
        ids = [router.base.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in probes.prompts]
        given = {f"{n}": [router.base.tokenizer.decode(row[:n]) for row in ids if len(row) > n] for n in TOLD}
        given = {n: [text for text in some if text.strip()] for n, some in given.items()} | {"whole": probes.prompts}
        told = {n: router(some)["choice"].tolist() for n, some in given.items() if some}
        rows[name] = {n: choices.count(truth) / len(choices) for n, choices in told.items()} | {"n": len(probes)}
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=[*map(str, TOLD), "whole", "n"])


def likely(
    port: Port, experts: Mapping[str, LanguageModel], prompts: Sequence[str], choices: Mapping[str, Weights],
    n: int = 10,
) -> pd.DataFrame:  # fmt: skip
    """The n likeliest next tokens of base, expert (or experts mixed) and adapted base, as `tokens_figure` wants."""
    rows, pieces = [], token_bytes(port.base.tokenizer)
    bare = following(port.base, prompts).cpu()
    theirs = {side: following(one, prompts).cpu().log() for side, one in experts.items()}
    for name, weights in choices.items():
        use(port, weights)
        mixed = bare.log() + sum(weight * (theirs[side] - bare.log()) for side, weight in weights.items())
        said = {"identity": bare, "expert": mixed.softmax(-1), "v2": port.probabilities(prompts).double().cpu()}
        for i, prompt in enumerate(prompts):
            top = torch.stack([one[i] for one in said.values()]).amax(0).topk(n).indices.tolist()
            same = {"label": label(name, prompt)}
            rows += [
                same | {"place": place, "token": _told(pieces[t]), "method": method, "probability": float(one[i, t])}
                for place, t in enumerate(top) for method, one in said.items()
            ]  # fmt: skip
    port.use(None)
    return pd.DataFrame(rows)


def tokens_at(frame: pd.DataFrame, choice: str) -> go.Figure:
    """What comes next with one choice of `likely`; a menu over its prompts. ChassisError: it was not asked for."""
    rows = frame[frame["label"].str.startswith(f"{choice}: ")]
    if rows.empty:
        known = ", ".join(dict.fromkeys(frame["label"].str.partition(": ")[0]))
        raise ChassisError(f"nothing was measured for {choice!r}: choose one of {known}")
    return tokens_figure(rows, f"What comes next, {choice}")


def label(choice: str, prompt: str) -> str:
    """A choice and the end of a prompt, short enough for a menu on a telephone."""
    return f"{choice}: …{' '.join(prompt.split())[-26:]}"


def overhead(port: Port, prompt: str, choices: Mapping[str, Weights], tokens: int = 8, rounds: int = 15) -> pd.Series:
    """Time of a greedy text of so many tokens over that of the first choice, the median of several rounds in turn.

    On a CPU it is the processor's time, which what else runs there changes least.
    """
    clock = time.process_time if port.base.device.type == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in choices}
    for number in range(rounds):
        # Forth, then back: a machine that slows down or speeds up favours none.
        for name in [*choices][:: -1 if number % 2 else 1]:
            use(port, choices[name])
            start = clock()
            port.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens)
            taken[name].append(clock() - start)
    port.use(None)
    first, *_ = taken
    return pd.DataFrame(taken).pipe(lambda seconds: seconds.div(seconds[first], axis=0)).median()


def swap(port: Port, *choices: str | None) -> float:
    """Seconds of one `use`, in turn between choices: the fastest of five rounds of 20."""
    rounds = timeit.repeat(lambda: [port.use(one) for one in choices], number=20, repeat=5)
    port.use(None)
    return min(rounds) / 20 / len(choices)


def exported(base: LanguageModel, plugs: Mapping[str, Adapter]) -> pd.DataFrame:
    """What `to_peft` says to each adapter, how much it writes or why it cannot, and what vLLM would say to that."""
    rows = []
    with TemporaryDirectory() as folder:
        for name, plug in plugs.items():
            row = {"kind": name, "rank": plug.rank, "edits": len(plug.edits), "reads": ", ".join(map(str, plug.reads))}
            try:
                place = plug.to_peft(Path(folder, name), base)
                size = sum(file.stat().st_size for file in place.iterdir())
                vllm = "; ".join(why.partition(": ")[0] for why in vllm_refuses(place, 64)) or "takes it"
                rows.append(row | {"to peft": f"a LoRA of the head, {size / 1e6:.1f} MB", "vLLM, rank up to 64": vllm})
            except ChassisError as error:
                rows.append(row | {"to peft": f"no: {error}", "vLLM, rank up to 64": "–"})
    return pd.DataFrame(rows)


def lines(
    x: Sequence[float | str], looks: Mapping[str, Mapping[str, object]], quantities: Mapping[str, tuple], title: str,
    alt: str, caption: str, first: str, **axis: object,
) -> go.Figure:  # fmt: skip
    """Lines over x with a menu of quantities, each `(title of the y axis, {line: values})`; `looks` are the lines'."""
    figure = go.Figure(layout={"showlegend": True, "margin_b": 118, "height": 470})
    for name, look in looks.items():
        hover = "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>"
        figure.add_scatter(x=[*x], name=name, mode="lines+markers", line=dict(look), hovertemplate=hover)
    none = [None] * len(x)
    entries = {
        name: [{"y": [_numbers(told[line]) if line in told else none for line in looks]}, {"yaxis.title.text": unit}]
        for name, (unit, told) in quantities.items()
    }
    menus = _dropdowns(figure, 8, (first, entries))
    return _finish(figure, title, alt, caption, above=38, updatemenus=menus, xaxis=axis, yaxis_rangemode="tozero")


def over_weights(table: pd.DataFrame, sides: Sequence[str], quantity: str = "KL to each expert") -> go.Figure:
    """What every mixture of two plugs says of text of either side, beside the experts themselves mixed alike.

    `table` is a `summary` whose choices are the weights of the first side as text, and `base`.
    """
    alphas = sorted({one for one in table["choice"] if one != "base"}, key=float)
    colours, looks, found = dict(zip(sides, PALETTE, strict=False)), {}, {}
    table = table.set_index(["choice", "live", "side", "to"])
    for side in sides:
        for kind, dash, live in (("plugs", "solid", False), ("live experts", "dot", True), ("base", "dash", False)):
            looks[name := f"{kind}, {side} text"] = {"color": colours[side], "dash": dash}
            one = [("base" if kind == "base" else alpha, live, side) for alpha in alphas]
            found[name] = {
                "KL to each expert": [table.loc[(*key, side), "kl"] for key in one],
                "bits per byte": [table.loc[(*key, side), "bits_per_byte"] for key in one],
            }
            if not live:
                column = "identity" if kind == "base" else "kl"
                found[name]["KL to the experts mixed"] = [
                    table.loc[(alpha, False, side, "mixture"), column] for alpha in alphas
                ]
    units = {"KL to each expert": "KL to the text's own expert (nats)", "bits per byte": "bits per byte"}
    units |= {"KL to the experts mixed": "KL to the experts mixed (nats)"}
    quantities = {q: (unit, {n: told[q] for n, told in found.items() if q in told}) for q, unit in units.items()}
    middle = min(range(len(alphas)), key=lambda place: abs(float(alphas[place]) - 0.5))
    half = [found[f"plugs, {side} text"]["KL to each expert"][middle] for side in sides]
    alt = f"KL to each expert on its own text against the weight of {sides[0]}; at {alphas[middle]} " + " and ".join(
        f"{_figures(kl)} for {side}" for kl, side in zip(half, sides, strict=True)
    )
    axis = {"title_text": f"weight of {sides[0]}; {sides[1]} has the rest", "range": [-0.03, 1.03]}
    caption = (
        "At either end one plug works alone. Follow a colour inwards from the end of its own plug: what it loses on "
        "the way, if anything, is the price of the other's share. See whether solid lies as far above dotted, the "
        "experts themselves, in the middle as at the ends, and where it still lies below the dashed line, the bare "
        "base."
    )
    return lines([*map(float, alphas)], looks, quantities, "Two plugs, mixed", f"{alt}.", caption, quantity, **axis)


def since_switch(frames: Mapping[str, pd.DataFrame], methods: Mapping[str, str], quantity: str = "") -> go.Figure:
    """Bits per byte against the tokens since a part began, one line a method; a menu of texts and whose parts of it."""
    edges = [0, 8, 16, 24, 32, 64, 10**6]
    names = [f"{a}–{b - 1}" for a, b in pairwise(edges[:-1])] + [f"{edges[-2]}+"]
    looks = {name: {"color": GREY if method == "base" else PALETTE[i], "dash": "dash" if method == "base" else "solid"}
             for i, (method, name) in enumerate(methods.items())}  # fmt: skip
    quantities = {}
    for text, frame in frames.items():
        frame = frame.assign(bin=pd.cut(frame["since"], edges, right=False, labels=names))
        for side in ("", *dict.fromkeys(frame["side"])):
            some = frame[frame["side"] == side] if side else frame
            sums = some.groupby(["choice", "bin"], observed=False)[["nats", "bytes"]].sum()
            told = (sums["nats"] / sums["bytes"] / math.log(2)).unstack("bin")[names]
            found = {name: told.loc[method].tolist() for method, name in methods.items()}
            quantities[f"{text}: {side} parts" if side else text] = ("bits per byte", found)
    quantity = quantity or next(iter(quantities))
    alt = f"Bits per byte of {quantity} by tokens since a part began. " + "; ".join(
        f"{name}: {_figures(values[0])} in the first eight, {_figures(values[-1])} at the end"
        for name, values in quantities[quantity][1].items()
    )
    axis = {"type": "category", "title_text": "tokens since the part began"}
    caption = (
        "At the left, a part has just begun: how far a line starts above the one of the oracle, which knows whose "
        "text it is, is what a policy loses at a seam; how soon it comes down is how fast it notices. The dashed line "
        "is the bare base: above it no plug at all would have been better."
    )
    return lines(names, looks, quantities, "From the seam on", f"{alt}.", caption, quantity, **axis)
