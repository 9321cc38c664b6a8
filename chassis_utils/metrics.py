"""How close the adapted base is to the expert: KL, recovered share, agreement, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from .activations import Activations, Expert, harvest
from .adapter import Adapter
from .errors import ChassisError
from .models import LanguageModel
from .probes import Probes

BLOCK = 4_000_000  # logits a block


def kl(expert_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(expert || adapted) of each row, nats, float64: `(n, vocab)`, `(n, vocab)` to `(n,)`."""
    p, q = expert_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def evaluate(
    base: LanguageModel,
    expert: Expert,
    adapter: Adapter | Iterable[Adapter],
    probes: Probes | Activations | Sequence[Probes | Activations],
    *,
    positions: str | None = None,
    allow_overlap: bool = False,
) -> pd.DataFrame:
    """Compare adapted bases with the expert, one row per adapter and probe set, and one for the bare base.

    Args:
        base: the base.
        expert: the expert.
        adapter: one adapter or several; all are judged from the same forward passes.
        probes: probe sets, or activations of them already harvested (no forward pass then).
        positions: for probe sets, `last` or `all`; `all` for real text unless given.
        allow_overlap: accept prompts that the adapter was fitted on, outside the split `train`.

    Returns:
        Columns `base, expert, method, rank, layer, onto, split, probes, n`, `kl` and `kl_identity` (nats, mean over
        rows), `recovered` (`1 - kl / kl_identity`; NaN where expert and base are the same), `top1_agreement`,
        `bits_per_byte` (of the text that follows; NaN for last positions), `base_revision, expert_revision`.

    Raises:
        ChassisError: an argument of another kind, an adapter of another base, an adapter's layer not harvested, or a
            prompt that an adapter was fitted on in a split that is not `train`.
    """
    for role, model in (("base", base), ("expert", expert)):
        if not hasattr(model, "readout"):
            raise ChassisError(f"{role} is a {type(model).__name__}, not a model: load it first")
    adapters = _several(adapter, Adapter, "adapter", "what fit returns")
    sets = _several(probes, Probes | Activations, "probes", "a probe set or what harvest returns")
    if not sets:
        raise ChassisError("no probes to evaluate on: give at least one set")
    for one in adapters:
        one.check_base(base)
    layers = sorted({a.layer for a in adapters} | {base.num_layers})
    rows = []
    for given in sets:
        if isinstance(given, Probes):
            where = positions or ("all" if given.split == "text" else "last")
            given = harvest(base, expert, given, where, layers, progress=False)
        if given.base is not base or given.expert is not expert:
            raise ChassisError(
                f"these activations are of {given.base.name} and {given.expert.name}: harvest for this pair"
            )
        rows += _evaluate(given, adapters, allow_overlap)
    return pd.DataFrame(rows)


def _several(given: Any, kind: Any, name: str, wanted: str) -> list[Any]:
    """One or several of a kind as a list, or ChassisError."""
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for one in several:
        if not isinstance(one, kind):
            raise ChassisError(f"{name} is or holds a {type(one).__name__}: give {wanted}, or several")
    return several


def _evaluate(a: Activations, adapters: list[Adapter], allow_overlap: bool) -> list[dict]:
    base, expert = a.base, a.expert
    for adapter in adapters:
        a.layer(adapter.layer)
        seen = adapter.fitted_on & a.probes.fingerprints
        if seen and a.probes.split != "train" and not allow_overlap:
            raise ChassisError(
                f"{len(seen)} prompts of '{a.probes.name}' ({a.probes.split}) were fitted on by this {adapter.method} "
                "adapter: use other prompts, or say allow_overlap=True"
            )
    everyone = [Adapter.identity(base), *(x.to(base.device) for x in adapters)]
    totals = torch.zeros(len(everyone), 3, dtype=torch.float64)
    step = max(1, BLOCK // base.vocab_size)
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        hidden = {layer: h[rows].to(base.device) for layer, h in a.hidden.items()}
        target = expert.readout(a.expert_hidden[rows].to(base.device)).double().log_softmax(-1)
        weight, best = target.exp(), target.argmax(-1)
        following = a.next_token[rows].to(base.device)
        known = following >= 0
        for i, adapter in enumerate(everyone):
            ours = adapter.logits(base, hidden).double().log_softmax(-1)
            nats = -ours.gather(1, following.clamp(min=0)[:, None])[:, 0][known].sum()
            agree = (ours.argmax(-1) == best).sum()
            totals[i] += torch.stack([(weight * (target - ours)).sum(), agree.double(), nats]).cpu()
    n = len(a)
    reference = float(totals[0, 0]) / n
    rows = []
    for adapter, (divergence, agree, nats) in zip(everyone, totals.tolist(), strict=True):
        value = divergence / n
        identity = adapter is everyone[0]
        rows.append(
            {
                "base": base.name,
                "expert": expert.name,
                "method": adapter.method,
                "rank": None if identity else adapter.rank,
                "layer": None if identity else adapter.layer,
                "onto": adapter.onto,
                "split": a.probes.split,
                "probes": a.probes.name,
                "n": n,
                "kl": value,
                "kl_identity": reference,
                "recovered": 1 - value / reference if reference > 1e-12 else math.nan,
                "top1_agreement": agree / n,
                "bits_per_byte": nats / math.log(2) / a.num_bytes if a.positions == "all" else math.nan,
                "base_revision": base.revision,
                "expert_revision": expert.revision,
            }
        )
    return rows
