"""When to stop adding probes: held-out KL against the number of tokens fitted, and where that leads."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from chassis_utils import Activations, Adapter, ChassisError, Features, LanguageModel, Probes, fit, gather
from chassis_utils.activations import Expert
from chassis_utils.metrics import blocks, kl
from chassis_utils.statistics import Statistics

EXPONENTS = torch.linspace(0.1, 3.0, 146, dtype=torch.float64)  #: Tried, one by one


@dataclass(frozen=True)
class Law:
    """`KL = floor + scale * tokens ** -exponent`, several draws of it: `(draws,)` each."""

    floor: torch.Tensor
    scale: torch.Tensor
    exponent: torch.Tensor

    def __call__(self, tokens: float) -> torch.Tensor:
        """KL of each draw, nats `(draws,)`."""
        return self.floor + self.scale * tokens**-self.exponent

    def enough(self, gain: float) -> torch.Tensor:
        """Tokens from which on twice as many lower the KL by less than `gain` nats, `(draws,)`."""
        if not gain > 0:
            raise ChassisError(f"gain = {gain}: give what twice as many tokens must be worth, in nats above zero")
        halved = self.scale * (1 - 2**-self.exponent) / gain
        return halved.clamp(min=1.0) ** (1 / self.exponent)


def law(tokens: Sequence[float], kls: torch.Tensor) -> Law:
    """The law nearest to `kls (draws, sizes)` in relative terms, floor and scale not below zero.

    For each exponent of a grid, floor and scale are two-variable least squares; so there is no start to choose and no
    search that can end elsewhere. ChassisError: fewer than three sizes, or a KL that is not above zero.
    """
    n = torch.as_tensor(tokens, dtype=torch.float64)
    kls = torch.as_tensor(kls, dtype=torch.float64).reshape(-1, len(n))
    if len(n) < 3 or not (kls > 0).all() or not (n > 0).all():
        raise ChassisError(f"{len(n)} sizes with KL of {float(kls.min()):.3g} and more: give three or more, above zero")
    # Columns over the KL itself: what is left is a relative error.
    ones, falling = 1 / kls, n ** -EXPONENTS[:, None, None] / kls  # (draws, sizes), (exponents, draws, sizes)
    a, b, c = ones.square().sum(-1), (ones * falling).sum(-1), falling.square().sum(-1)
    u, v = ones.sum(-1), falling.sum(-1)
    wide = (a * c - b * b).clamp(min=1e-300)
    floor, scale = (u * c - v * b) / wide, (v * a - u * b) / wide
    # Where one would be below zero, it is zero and the other the best alone.
    scale, floor = scale.where(floor > 0, v / c), floor.clamp(min=0)
    floor, scale = floor.where(scale > 0, (u / a).expand_as(floor)), scale.clamp(min=0)
    left = (floor[..., None] * ones + scale[..., None] * falling - 1).square().sum(-1)
    best = left.argmin(0, keepdim=True)
    return Law(floor.gather(0, best)[0], scale.gather(0, best)[0], EXPONENTS[best[0]])


def laws(tokens: Sequence[float], kls: torch.Tensor) -> Law:
    """As `law`, but from where on it is fitted changes from draw to draw: at all sizes, or without the smallest ones.

    With few tokens for its features a fit leans on its penalty, and no one power describes the whole way. At least half
    of the sizes are kept, and three.
    """
    kls = torch.as_tensor(kls, dtype=torch.float64).reshape(-1, len(tokens))
    starts = max(1, len(tokens) - max(3, math.ceil(len(tokens) / 2)) + 1)
    whole = torch.empty(3, len(kls), dtype=torch.float64)
    for start in range(min(starts, len(kls))):
        one = law(tokens[start:], kls[start::starts, start:])
        whole[:, start::starts] = torch.stack([one.floor, one.scale, one.exponent])
    return Law(*whole)


def drawn(sums: torch.Tensor, rows: torch.Tensor, draws: int = 1000, seed: int = 0) -> torch.Tensor:
    """Bootstrap (:cite:`efron1979bootstrap`) of mean KL by size, `(draws, sizes)`: prompts and subsets drawn anew.

    `sums (sizes, subsets, prompts)` are sums of KL over a prompt's rows, of which it has `rows (prompts,)`. One draw
    takes the same prompts at every size, as these were judged by the same ones; subsets each size for itself.
    """
    sizes, subsets, prompts = sums.shape
    random = torch.Generator().manual_seed(seed)
    which = torch.randint(prompts, (draws, prompts), generator=random)
    weights = torch.zeros(draws, prompts, dtype=torch.float64).scatter_add_(1, which, torch.ones_like(which).double())
    means = torch.einsum("dp,nsp->dns", weights, sums.double()) / (weights @ rows.double())[:, None, None]
    chosen = torch.randint(subsets, (draws, sizes, subsets), generator=random)
    return means.gather(2, chosen).mean(2)


def interval(values: torch.Tensor, share: float = 0.95) -> tuple[float, float, float]:
    """Median, and the ends between which that share of the draws lies."""
    ends = torch.tensor([0.5, (1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
    return tuple(values.double().quantile(ends).tolist())


# ---------------------------------------------------------------------------------------- measuring


def curve(
    base: LanguageModel, expert: Expert, pool: Probes, features: Features, chunk: int, sizes: Sequence[int],
    subsets: int, seed: int = 0,
) -> Iterator[tuple[int, int, int, Adapter]]:  # fmt: skip
    """Adapters of nested subsets of the pool: number of the subset, chunks, tokens, adapter; each text is run once.

    The pool is cut into chunks of so many passages, whose statistics are gathered and added up in several orders;
    `sizes` are in chunks and ascend. ChassisError: a chunk in which nothing is held out, or more than there are.
    """
    whole = len(pool) // chunk
    if chunk < 8 or max(sizes) > whole:
        raise ChassisError(
            f"chunks of {chunk}, up to {max(sizes)} of {whole}: give 8 passages or more, and enough of them"
        )
    orders = [torch.randperm(whole, generator=torch.Generator().manual_seed(seed + i)).tolist() for i in range(subsets)]
    # What lies between one size and the next is added up by itself: a chunk is kept once an order, not once a size.
    between: dict[tuple[int, int], Statistics] = {}
    for number in range(whole):
        some = pool.prompts[number * chunk : (number + 1) * chunk]
        stats = gather(base, expert, Probes(pool.name, pool.split, some), features, progress=False)
        for subset, order in enumerate(orders):
            place = subset, bisect_right(sizes, order.index(number))
            if place[1] < len(sizes):
                between[place] = between[place] + stats if place in between else stats
    for subset in range(subsets):
        whole_until = accumulate(between[subset, place] for place in range(len(sizes)))
        for size, stats in zip(sizes, whole_until, strict=True):
            yield subset, size, len(stats), fit(stats)


def losses(adapter: Adapter | None, held: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of KL over each held-out prompt's rows, and its rows, `(prompts,)`; of no adapter those of the bare base."""
    if adapter is not None and adapter.edits:
        raise ChassisError("an adapter with edits runs the base again: give one that was fitted on statistics")
    base, found = held.base, []
    for _, hidden, theirs in blocks(held):
        own = adapter.logits(base, hidden) if adapter else base.readout(hidden[base.num_layers])
        found.append(kl(theirs, own))
    _, prompt, rows = held.prompt.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, prompt, torch.cat(found)), rows


def doublings(smallest: int, largest: int) -> list[int]:
    """1, 2, 4, ... times the smallest, up to the largest."""
    return [smallest * 2**k for k in range(int(math.log2(largest / smallest)) + 1)]
