"""Edits of every block by natural-gradient steps down the KL at the end: what depth and more text add to a closed form.

Each step is one: where `v2` solves `C W = G` for states to imitate, this solves `C W F = G` for the slope of the KL
with respect to the states, C the second moments of what a block's maps read and F those of the slopes (natural
gradients, :cite:`amari1998natural`, by Kronecker factors, :cite:`martens2015optimizing`). So it needs no states to
imitate, and serves experts of any shape. No weight of the base changes, but text after text is read: it stands between
the closed form and training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from chassis_utils import Adapter, ChassisError, Features, LanguageModel, Probes, harvest
from chassis_utils.activations import Expert
from chassis_utils.models import Place
from chassis_utils.solve import low_rank
from descent import backward

FLOOR = 1e-2  # of the mean slope, beneath which a direction of the output counts as that


@dataclass
class _Edit:
    """A map of what a block reads, which remembers what it read, and how much a change would be worth."""

    layer: int
    reads: tuple[Place, ...]
    changes: Place
    weight: torch.Tensor  #: `(p + 1, hidden)`, the bias last
    mean: torch.Tensor | None = None  #: of the weights after each step, the later ones counting more
    speed: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None  #: C and F, running means
    revision: str = "edit"

    def correction(self, hidden: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        seen = torch.cat([hidden[place] for place in self.reads], dim=-1)
        self.seen = torch.cat([seen, seen.new_ones(*seen.shape[:-1], 1)], dim=-1).detach()
        self.lever = torch.zeros(*seen.shape[:-1], self.weight.shape[1], device=seen.device, requires_grad=True)
        return self.seen @ self.weight + self.lever

    def step(
        self, sums: Sequence[torch.Tensor], n: int, share: float, rate: float, damping: float, momentum: float,
        latest: float,
    ) -> None:  # fmt: skip
        """Move along the natural gradient of these sums over n places; the mean goes `latest` of the way to there."""
        c, slope, f = (one / n for one in sums)
        if self.factors is not None:
            c, f = ((1 - share) * old + share * new for old, new in zip(self.factors, (c, f), strict=True))
        self.factors = c, f
        size = c.diagonal().clamp(min=1e-12).sqrt()[:, None]
        eye = [torch.eye(len(one), dtype=one.dtype, device=one.device) for one in (c, f)]
        down = torch.linalg.solve(c / size / size.T + damping * eye[0], slope / size)
        down = torch.linalg.solve(f + FLOOR * f.diagonal().mean() * eye[1], down.T).T / size
        self.speed = -down if self.speed is None else momentum * self.speed - down
        self.weight = self.weight + (rate * self.speed).float()
        self.mean = self.weight if self.mean is None else self.mean.lerp(self.weight, latest)


def chunks(probes: Probes, lengths: Sequence[int], tokens: int, seed: int = 0) -> list[Probes]:
    """The prompts in random order, in parts of at least so many tokens; what is left over is left out."""
    if len(lengths) != len(probes):
        raise ChassisError(f"{len(lengths)} lengths for the {len(probes)} prompts of '{probes.name}': give one each")
    order, found, part, total = [*range(len(probes))], [], [], 0
    random.Random(seed).shuffle(order)
    for i in order:
        part.append(probes.prompts[i])
        total += lengths[i]
        if total >= tokens:
            found.append(replace(probes, prompts=tuple(part)))
            part, total = [], 0
    if not found:
        raise ChassisError(
            f"'{probes.name}' has {total} tokens, and {tokens} make a part: give more text, or smaller parts"
        )
    return found


def natural(
    base: LanguageModel,
    expert: Expert,
    parts: Sequence[Probes],
    rate: float = 0.004,
    damping: float = 1.0,
    momentum: float = 0.8,
    tail: float = 4.0,
    batch_tokens: int = 2048,
) -> Iterator[tuple[int, float, Adapter]]:
    """A step after each part of the text; what is said of a part was not fitted on it, unless parts share prompts.

    `rate` is shared by the layers, rises over three parts and falls in a line to a tenth; `damping` is a share of each
    column's mean square. The edits that are given are a mean over steps, as single ones follow the noise of their
    part: at step t it moves towards that step by `tail / t` of the way, or at first all of it (a variant of
    :cite:`shamir2013stochastic`).

    Yields:
        Positions seen, KL (nats) on the part before its step, where the step starts from, and the adapter after it:
        edits, and no map at the end.
    """
    final, edits = base.num_layers, []
    for layer in range(1, final + 1):
        reads: tuple[Place, ...] = (layer - 1, f"block {layer - 1}")
        weight = torch.zeros(sum(Features(reads).sizes(base)) + 1, base.hidden_size, device=base.device)
        edits.append(_Edit(layer, reads, layer if layer < final else "stream", weight))
    port, seen = base.edited(*edits), 0
    for number, probes in enumerate(parts):
        a = harvest(base, expert, probes, "all", [-1], progress=False)
        lost, sums = 0.0, [[] for _ in edits]
        for _, real, away in backward(a, port, batch_tokens=batch_tokens):
            lost += away
            for edit, found in zip(edits, sums, strict=True):
                x, slope = edit.seen[real], edit.lever.grad[real]
                new = [(x.T @ x).double(), (x.T @ slope).double(), (slope.T @ slope).double()]
                found[:] = [old + more for old, more in zip(found, new, strict=True)] if found else new
        now = rate / final * min(1.0, (number + 1) / 3) * max(0.1, 1 - number / len(parts))
        for edit, found in zip(edits, sums, strict=True):
            edit.step(found, len(a), 1 / min(number + 1, 10), now, damping, momentum, min(1.0, tail / (number + 1)))
        seen += len(a)
        yield seen, lost / len(a), _adapter(base, expert, edits, parts[: number + 1])


def _adapter(base: LanguageModel, expert: Expert, edits: Sequence[_Edit], read: Sequence[Probes]) -> Adapter:
    """The edits as they stand; the adapter itself adds nothing."""
    found = []
    for edit in edits:
        weight, seconds = edit.mean[:-1].double(), edit.factors[0][:-1, :-1]
        down, up, values = (part.float() for part in low_rank(weight, seconds))
        kind = {"space": "hidden", "features": Features(edit.reads), "values": values}
        kind["onto"] = "stream" if edit.changes == "stream" else "layer"
        found.append(
            Adapter("natural", edit.layer, down, up, edit.mean[-1].clone(), base.name, base.head_hash, **kind)
        )
    read = [*read, *filter(None, [getattr(expert, "text", None)])]
    fitted = frozenset().union(*(probes.fingerprints for probes in read))
    return replace(Adapter.identity(base), method="natural", edits=tuple(found), fitted_on=fitted)
