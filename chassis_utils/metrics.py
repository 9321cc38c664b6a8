"""How close the adapted base is to the expert: KL, recovered share, agreement, bits per byte."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from scipy.special import stdtrit
from torch.linalg import vecdot

from .activations import Activations, Expert, harvest
from .adapter import Adapter
from .errors import ChassisError
from .models import LanguageModel, Place
from .probes import Probes

BLOCK = 500_000  # logits a block, which stay in a processor's cache; a GPU, asked anew for each, gets more


def block_rows(vocab: int, device: torch.device) -> int:
    """How many rows of logits make a block; at least 16, as each block reads the whole head."""
    return max(16, (16 * BLOCK if device.type == "cuda" else BLOCK) // vocab)


def kl(expert_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(expert || adapted) of each row, nats, float64: `(n, vocab)`, `(n, vocab)` to `(n,)`; some rows at a time."""
    step, found = block_rows(logits.shape[-1], logits.device), []
    for pair in zip(expert_logits.split(step), logits.split(step), strict=True):
        p, q = (part.double().log_softmax(-1) for part in pair)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


def ratio_bounds(share: torch.Tensor, of: torch.Tensor) -> tuple[float, float]:
    """95% interval of `sum(share) / sum(of)`, both `(prompts,)`: prompts are the sample, not the tokens in them."""
    m, ratio = len(of), float(share.sum() / of.sum())
    if m < 2 or not math.isfinite(ratio):
        return math.nan, math.nan
    reach = float(stdtrit(m - 1, 0.975) * ((share - ratio * of).square().sum() * m / (m - 1)).sqrt() / of.sum())
    return ratio - reach, ratio + reach


def evaluate(
    base: LanguageModel, expert: Expert, adapter: Adapter | Iterable[Adapter],
    probes: Probes | Activations | Sequence[Probes | Activations], *,
    positions: str | None = None, bare: Sequence[Activations] = (), allow_overlap: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Compare adapted bases with the expert, one row per adapter and probe set, and one for the bare base.

    All are judged from the same passes, on probe sets (harvested at `positions`, `last` or `all`; `all` for real text
    unless given) or activations (no forward pass then, unless an adapter edits the base or reads a block). The identity
    is always the bare base: where the base or its states were edited, `bare` holds the bare one's activations on the
    same probes in order, harvested if not given. `allow_overlap` accepts prompts fitted on, outside of `train`.

    Returns columns `base, expert, method, rank, layer, onto, split, probes, n`, `kl` and `kl_identity` (nats, mean over
    rows), `recovered` (`1 - kl / kl_identity`; NaN where expert and base are the same), `kl_low, kl_high,
    recovered_low, recovered_high` (95% over prompts; NaN for a single one), `top1_agreement`, `bits_per_byte` (of the
    text that follows; NaN for last positions), `base_revision, expert_revision`. ChassisError for an argument of
    another kind or of other models, a place not harvested, or prompts fitted on.
    """
    for role, model in (("base", base), ("expert", expert)):
        if not hasattr(model, "readout"):
            raise ChassisError(f"{role} is a {type(model).__name__}, not a model: load it first")
    adapters = _several(adapter, Adapter, "adapter", "what fit returns")
    if not (sets := _several(probes, Probes | Activations, "probes", "a probe set or what harvest returns")):
        raise ChassisError("no probes to evaluate on: give at least one set")
    # Adapters with the same edits on the way share a pass; those without any come first, with the identity.
    groups: dict[tuple[str, ...], list[Adapter]] = {(): []}
    for one in adapters:
        one.check_base(base)
        groups.setdefault(tuple(edit.revision for edit in one.edits), []).append(one)
    rows = []
    for place, given in enumerate(sets):
        if isinstance(given, Probes):
            where = positions or ("all" if given.split == "text" else "last")
            given = harvest(base, expert, given, where, places_read(groups[()]), progress=False)
        if given.base is not base or given.expert is not expert:
            raise ChassisError(f"these activations are of {given.base.name} and {given.expert.name}: harvest this pair")
        plain = bare[place] if place < len(bare) else given
        if plain.base.edits:
            plain = given.on(base.bare)
        if plain.probes.digest != given.probes.digest or len(plain) != len(given):
            raise ChassisError(f"bare[{place}] is not the bare base on '{given.probes.name}': give the same order")
        found: dict[int, dict] = {}
        for edits, several in groups.items():
            here, wanted = given, places_read(several)
            if edits or any(isinstance(place, str) and place not in given.hidden for place in wanted):
                here = given.on(base.edited(*several[0].edits) if edits else base, wanted)
            theirs = _evaluate(here, several, plain.hidden[plain.final], allow_overlap)
            found = dict(zip((0, *map(id, several)), theirs, strict=True)) | found
        rows += [found[key] for key in (0, *map(id, adapters))]
    return pd.DataFrame(rows)


def places_read(adapters: list[Adapter]) -> list[Place]:
    """Everywhere that these adapters read; the final layer is always there."""
    return [*dict.fromkeys(place for one in adapters for place in (one.layer, *one.reads))]


def _several(given: Any, kind: Any, name: str, wanted: str) -> list[Any]:
    """One or several of a kind as a list, or ChassisError."""
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if wrong := [type(one).__name__ for one in several if not isinstance(one, kind)]:
        raise ChassisError(f"{name} is or holds a {wrong[0]}: give {wanted}, or several")
    return several


def blocks(a: Activations) -> Iterator[tuple[slice, dict[Place, torch.Tensor], torch.Tensor]]:
    """Some rows at a time, the base's states there `(m, size)`, and the expert's logits `(m, vocab)`."""
    step = block_rows(a.base.vocab_size, a.base.device)
    for rows in (slice(start, start + step) for start in range(0, len(a), step)):
        hidden = {place: state[rows].to(a.base.device) for place, state in a.hidden.items()}
        yield rows, hidden, a.expert.readout(a.expert_hidden[rows].to(a.base.device))


def _evaluate(a: Activations, adapters: list[Adapter], bare: torch.Tensor, allow_overlap: bool) -> list[dict]:
    base, expert = a.base, a.expert
    for place in places_read(adapters):
        a.layer(place)
    for adapter in adapters:
        seen = adapter.fitted_on & a.probes.fingerprints
        if seen and a.probes.split != "train" and not allow_overlap:
            those = f"{len(seen)} prompts of '{a.probes.name}' ({a.probes.split}) were fitted on by"
            raise ChassisError(f"{those} this {adapter.method} adapter: use other prompts, or say allow_overlap=True")
    everyone = [Adapter.identity(base), *(x.to(base.device) for x in adapters)]
    _, prompt, sizes = a.prompt.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(everyone), 3, len(sizes), dtype=torch.float64)  # KL, agreement, nats of the text, by prompt
    for rows, hidden, theirs in blocks(a):
        target, following = theirs.double().log_softmax(-1), a.next_token[rows].to(base.device)
        weight, first = target.exp(), target.argmax(-1)
        certain = vecdot(weight, target)  # minus the expert's entropy
        plain = base.readout.linear(hidden[base.num_layers])  # what all ranks add to
        for i, adapter in enumerate(everyone):
            here = hidden if i else hidden | {base.num_layers: bare[rows].to(base.device)}
            ours = adapter.logits(base, here, plain if i else None)
            top, best = ours.max(-1)
            ours = ours.double().sub_(top[:, None])
            expected, told = vecdot(weight, ours), ours.gather(1, following.clamp(min=0)[:, None])[:, 0]
            total = ours.exp_().sum(-1).log()  # in place: nothing as large as the logits is made anew
            each = certain - expected + total, (best == first).double(), (total - told).where(following >= 0, 0)
            sums[i].index_add_(1, prompt[rows], torch.stack(each).cpu())
    n, lost, rows = len(a), sums[0, 0], []
    if (reference := float(lost.sum()) / n) <= 1e-12:
        same = f"{base.name} and {expert.name} say the same on '{a.probes.name}'"
        warnings.warn(f"{same}: there is nothing to recover, and the share is left empty", stacklevel=3)
        lost = lost * math.nan
    for adapter, (kls, agree, nats) in zip(everyone, sums, strict=True):
        value, (low, high) = float(kls.sum()) / n, ratio_bounds(kls, sizes)
        recovered, (worst, best) = 1 - value / (float(lost.sum()) / n), ratio_bounds(kls, lost)
        row = {"base": base.name, "expert": expert.name, "method": adapter.method}
        rank, layer = (None, None) if adapter is everyone[0] else (adapter.rank, adapter.layer)
        row |= {"rank": rank, "layer": layer, "onto": adapter.onto, "split": a.probes.split, "probes": a.probes.name}
        row |= {"n": n, "kl": value, "kl_identity": reference, "kl_low": low, "kl_high": high}
        row |= {"recovered": recovered, "recovered_low": 1 - best, "recovered_high": 1 - worst}
        bits = float(nats.sum()) / math.log(2) / a.num_bytes if a.positions == "all" else math.nan
        row |= {"top1_agreement": float(agree.sum()) / n, "bits_per_byte": bits}
        rows.append(row | {"base_revision": base.revision, "expert_revision": expert.revision})
    return rows
