"""v2: the expert imitated block by block in closed form, then its logits read; every choice made on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from itertools import zip_longest
from operator import add

import torch

from . import statistics
from .activations import Activations
from .adapter import Adapter, assembled, column_weights, heads, method
from .errors import ChassisError
from .features import Features
from .metrics import kl
from .solve import ROWS, Gram, kl_fit, low_rank, scaled_ridge
from .statistics import FOLD, KEPT, Statistics, room, same_shape

LAMS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PENALTIES = (16.0, 5.0, 1.6, 0.5, 0.16, 0.05)  # of `near`


@method("v2")
def _v2(
    a: Activations | Statistics, layer: int, lam: float | None,
    metric: str = "kl", blocks: bool = True, edit_rank: int | None = None, progress: bool = False,
    gather: Callable[..., Statistics] | None = None,
) -> Adapter:  # fmt: skip
    """The default: blocks imitated, then logits read, choices held out.

    1. Where the expert has the base's layers and width, the states after each block are moved to the expert's by
       ridge on what the block's own linear maps read, block after block, each on the states the earlier ones cause.
    2. The final state, the one before and the last block's inner values are mapped, by ridge on the difference to
       base logits centred over the vocabulary, to all columns; lower ranks by reduced rank in the KL's own metric.
    3. On every eighth prompt, held out, are chosen: lam of the edits by squares, the rest, and whether to edit, by KL.

    From `Statistics` it is the second step on what they hold, unless they are gathered anew by a function `gather`,
    which may spread all passes over machines. `lam` is a share of the rows here; `blocks` False leaves the first step
    out; `edit_rank` cuts its maps. For a `ForeignExpert`: `near`.
    """
    if metric not in ("data", "kl"):
        raise ChassisError(f"metric = '{metric}': choose data or kl")
    base, final, lams = a.base, a.base.num_layers, LAMS if lam is None else (lam,)
    if layer != final:
        raise ChassisError(f"v2 reads out at the final layer, {final}, and edits those before: leave layer at -1")
    if a.expert.revision == base.revision:
        raise ChassisError(f"{a.expert.name} is {base.name} itself: nothing to recover, the share is undefined")
    if isinstance(a, Statistics) and gather is None:
        state = [Features((final,))] if final in a.features.places else []
        return _read_out(a, [*dict.fromkeys([*state, a.features])], metric, lams)[1]
    sets = a.probes if isinstance(a, Statistics) else (a.probes,)
    kind, one_pass = {"positions": a.positions, "progress": progress}, gather or statistics.gather

    def run(features: Features, *edits: Adapter, **layer: int | str) -> Statistics:
        return reduce(add, (one_pass(base.edited(*edits), a.expert, one, features, **kind, **layer) for one in sets))
    near = Features((final, final - 1, f"block {final - 1}"))
    edited = blocks and same_shape(base, a.expert)
    # Without edits, earlier layers hold what the last ones lost; with them, it was put right on the way.
    widest = near if edited else Features((*near.places, *range(final - 1)))
    choices = list(dict.fromkeys([Features((final,)), near, widest]))
    reached, best = _read_out(run(widest), choices, metric, lams)
    if edited:
        edits: list[Adapter] = []
        for number in (*range(1, final), "stream"):
            before = final - 1 if number == "stream" else number - 1
            edits.append(_imitation(run(Features((before, f"block {before}")), *edits, layer=number), lams, edit_rank))
        there, deep = _read_out(run(near, *edits), choices, metric, lams)
        best = replace(deep, edits=tuple(edits)) if there < reached else best
    return best


@method("near")
def _near(a: Activations, layer: int, lam: float | None, passes: int = 40) -> Adapter:
    """The change of the head's input of least KL that is not far from none; the `v2` of a `ForeignExpert`.

    It reads every place that was harvested. The targets need only be probabilities, so any expert will do. `lam`, the
    penalty of `kl_fit`, falls from 16 unless given; how far, and how many steps, is chosen on every eighth prompt.
    """
    base, readout, final = a.base, a.base.readout, a.base.num_layers
    out, lams = a.prompt % FOLD == FOLD - 1, PENALTIES if lam is None else (lam,)
    if layer != final or not 0 < lams[0] < math.inf:
        raise ChassisError(f"layer {layer}, lam = {lam}: near wants the final layer, {final}, and lam above zero")
    if not 0 < int(out.sum()) < len(out):
        raise ChassisError(f"'{a.probes.name}' has fewer than {FOLD} prompts, and every eighth is held out: give more")
    room(base, sum(x.shape[1] for x in a.hidden.values()), base.hidden_size, base.vocab_size, 2 * len(a))  # x twice
    features = Features((final, *(place for place in a.layers if place != final)))
    x, *_ = parts = features(a.hidden), a.hidden[final], a.expert_hidden
    xs, states, theirs = (part[~out].to(base.device) for part in parts)
    held, *judged = (part[out][:: -(-int(out.sum()) // KEPT)].to(base.device) for part in parts)
    target, plain, basis = a.expert.readout(judged[1]), readout.linear(judged[0]), readout.weight.T
    if readout.softcap is None:
        basis = basis - basis.mean(1, keepdim=True)
    kept = lru_cache(None if len(xs) * basis.shape[1] < 2**29 else 0)  # targets that 2 GiB hold are made once
    told = kept(lambda *at: a.expert.readout(theirs[slice(*at)]).softmax(-1))
    reached = [float(kl(target, readout.cap(plain)).mean())]
    best = reached[0], 0, lams[0], basis.new_zeros(x.shape[1], len(basis)), basis.new_zeros(len(basis))

    def seen(weight: torch.Tensor, bias: torch.Tensor, _: float) -> bool:
        nonlocal best
        reached.append(float(kl(target, readout.cap(plain + (held @ weight.float() + bias.float()) @ basis)).mean()))
        best = min(best, (reached[-1], len(reached) - 1, lam, weight, bias), key=lambda one: one[0])
        return min(reached[-3:]) > min(reached)

    def given(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return readout.linear(states[rows]), told(rows.start, rows.stop)
    for lam in lams:
        del reached[1:]
        kl_fit(xs, given, basis, lam, seen, passes, readout.cap)
        if best[2] != lam:
            break
    kind = {"space": "hidden", "info": dict(zip(("held_out_kl", "steps", "lam"), best[:3], strict=True))}
    return assembled(a, final, low_rank(best[3], Gram.of(x, x[:, :0]).xx), best[4], features=features, **kind)


def _imitation(stats: Statistics, lams: Sequence[float], rank: int | None) -> Adapter:
    """An edit of one layer: ridge from the features to the expert's state there minus the base's own."""
    found = [(stats.held.error(weight, bias), lam, weight, bias) for lam, weight, bias in _ridges(stats.train, lams)]
    _, chosen, weight, bias = min(found, key=lambda one: one[0])
    base, factors = stats.base, low_rank(weight, stats.train.xx)
    onto, layer = ("stream", base.num_layers) if stats.layer == "stream" else ("layer", stats.layer)
    edit = assembled(stats, layer, factors, bias, space="hidden", onto=onto, info={"lam": chosen}).named("imitation")
    return (edit if rank is None else edit.at_rank(min(rank, edit.rank))).to(base.device)


def _ridges(gram: Gram, lams: Sequence[float]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """The ridge at every lam at which the system can be solved; at least at the largest, or ChassisError."""
    for lam in lams:
        try:
            yield lam, *scaled_ridge(gram, lam)
        except ChassisError:
            if lam == max(lams):
                raise


def _read_out(
    stats: Statistics, choices: Sequence[Features], metric: str, lams: Sequence[float]
) -> tuple[float, Adapter]:
    """The best change of logits that these statistics allow, and its KL on the held-out rows they kept.

    For every choice of features and every lam, the ridge on all other rows is judged by it; the best gets all rows.
    """
    base, theirs, (x, y, _) = stats.base, stats.expert.readout, stats.kept
    columns = torch.arange(x.shape[1]).split(stats.features.sizes(base))
    places = [*zip_longest(stats.features.places, columns)]  # random features, which have no place, come last
    ways, states = [], []
    for features in choices:
        kept = (columns for name, columns in places if name in features.places or (name is None and features.random))
        columns = torch.cat([*kept])
        for lam, weight, bias in _ridges(stats.train.part(columns), lams):
            ways.append((lam, columns, features))
            states.append((x[:, columns].double() @ weight + bias).float().to(base.device))
    sums, cut = [0.0] * len(ways), theirs.weight.shape[1]
    for rows in torch.arange(len(y)).split(ROWS):
        said, own = y[rows].to(base.device).split([cut, base.hidden_size], dim=1)
        target, start = theirs(said), base.readout.linear(own)
        for i, state in enumerate(states):
            # What the fit says the expert's state is, and the base's, through either's head: the shift comes with it.
            told, less = state[rows].split([cut, base.hidden_size], dim=1)
            ours = start + theirs.linear(told) - base.readout.linear(less)
            sums[i] += float(kl(target, base.readout.cap(ours)).sum())
    tried = [(total / len(y), *way) for total, way in zip(sums, ways, strict=True)]
    reached, lam, columns, features = min(tried, key=lambda one: one[0])
    gram = (stats.train + stats.held).part(columns)
    weight, bias = scaled_ridge(gram, lam)
    weights, (both, shift) = column_weights(stats) if metric == "kl" else None, heads(stats, bias.device)
    factors = low_rank(weight, gram.xx, both, weights)
    kind = {"features": features, "info": {"lam": lam, "held_out_kl": reached, "metric": metric}}
    return reached, assembled(stats, base.num_layers, factors, bias @ both + shift, **kind)
