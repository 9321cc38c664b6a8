"""Ranks that a budget buys: of KL, of numbers to store, or of time."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from chassis_utils import Activations, Adapter, ChassisError, LanguageModel
from chassis_utils.metrics import blocks, places_read
from chassis_utils.metrics import kl as divergence


def choose_rank(
    adapter: Adapter, held_out: Activations, *,
    kl: float | None = None, parameters: int | None = None, latency: float | None = None,
) -> int:  # fmt: skip
    """The rank that a budget buys, to be cut to by `Adapter.at_rank`; give exactly one of three.

    `kl`, nats a token on `held_out` (rows that nothing was fitted on): the smallest rank that reaches it. `parameters`
    stored, edits included: the largest rank that needs no more. `latency`, as a share of the base's own time on one
    full context, edits included, timed here: the largest rank that adds no more. ChassisError for none or several
    budgets, or one that no rank meets; it says what the nearest tried needs.
    """
    budgets = {"kl": kl, "parameters": parameters, "latency": latency}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ChassisError(f"{len(given)} budgets: give one of {', '.join(budgets)}")
    ((name, budget),), port, wanted = given.items(), held_out.base.edited(*adapter.edits), places_read([adapter])
    if name == "kl":
        here = held_out.on(port, wanted)
        rank, costs = reaching(adapter, here, budget)
    else:
        stored = {rank: adapter.at_rank(rank).num_parameters for rank in range(1, adapter.rank + 1)}
        costs = stored if name == "parameters" else _latencies(adapter, held_out.base, port)
        rank = max((one for one in costs if costs[one] <= budget), default=0)
    if not rank:
        nearest = min(costs, key=costs.__getitem__)
        raise ChassisError(f"no rank meets {name} = {budget:g}: rank {nearest} needs {costs[nearest]:.4g}")
    return rank


def reaching(adapter: Adapter, a: Activations, budget: float) -> tuple[int, dict[int, float]]:
    """The smallest rank whose KL is within the budget, 0 if there is none, and the KL of every rank tried.

    The KL need not fall with the rank, but (unless logits are capped) it is convex in a factor for each singular
    direction: the tangent at one rank bounds it from below at all others, and most are never tried.
    """
    bound, tried, rank = torch.full((adapter.rank,), -math.inf, dtype=torch.float64), {}, adapter.rank
    budget *= 1 + 1e-6  # one that is read off a table is met by the rank it stands at, however that was summed
    while tried.get(rank, math.inf) > budget:
        factors, tried[rank] = (torch.arange(adapter.rank) < rank).to(adapter.down).requires_grad_(), 0.0
        for _, hidden, theirs in blocks(a):
            ours = replace(adapter, down=adapter.down * factors).logits(a.base, hidden)
            loss = divergence(theirs, ours).sum() / len(a)
            loss.backward()
            tried[rank] += float(loss.detach())
        if a.base.readout.softcap is None:
            slope = factors.grad.double().cpu().cumsum(0)
            bound = torch.maximum(bound, tried[rank] + slope - slope[rank - 1])
        bound[rank - 1] = tried[rank] if tried[rank] <= budget else math.inf
        if not len(left := (bound <= budget + 1e-6).nonzero()):
            return 0, tried
        rank = int(left[0]) + 1
    return rank, tried


def _latencies(adapter: Adapter, base: LanguageModel, port: LanguageModel) -> dict[int, float]:
    """What each rank adds to the base's own time, as a share of it, on the line through the first and the last rank.

    The work grows in a line, a single timing is noise: of ten, in turn, the fastest of each counts.
    """
    ids = torch.zeros(1, min(base.context, 512), dtype=torch.long)
    fastest = [math.inf] * 3
    for _ in range(10):
        for i, cut in enumerate((Adapter.identity(base), adapter.at_rank(1), adapter)):
            start = time.perf_counter()
            hidden = (port if i else base).states(ids, torch.ones_like(ids), [*{*places_read([cut]), base.num_layers}])
            cut.logits(base, {place: state[0] for place, state in hidden.items()})
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    bare, low, high = fastest
    slope = max(0.0, high - low) / max(1, adapter.rank - 1)
    return {rank: (low + slope * (rank - 1)) / bare - 1 for rank in range(1, adapter.rank + 1)}
