"""Streaming statistics of base and expert: what a fit needs of any number of tokens, in memory that does not grow."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from psutil import virtual_memory
from tqdm.auto import tqdm

from .activations import Expert, batched, checked_ids
from .errors import ChassisError
from .features import Features
from .foreign import ForeignExpert
from .models import LanguageModel, Place
from .probes import Probes
from .solve import ROWS, Gram

FOLD = 8  # prompts number 7, 15, ... are held out, to choose by
KEPT = 2048  # rows of the held-out prompts that are kept whole, to measure the KL on


@dataclass
class Statistics:
    """Sums over the rows of base and expert on the same tokens; two of them add up.

    x is what the features read in the base. y is the expert's and the base's final state side by side, or at an
    earlier layer the expert's state minus the base's.
    """

    base: LanguageModel
    expert: Expert
    probes: tuple[Probes, ...]
    positions: str  #: `last` or `all`
    features: Features
    layer: Place  #: Whose states y is made of
    train: Gram
    held: Gram  #: Of every eighth prompt
    kept: tuple[torch.Tensor, ...]  #: x `(m, p)`, y `(m, q)` and keys `(m,)` of the 2,048 held-out rows of least key

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows; ChassisError: they are of other models, features, positions or layers."""
        for what in ("base", "expert", "features", "positions", "layer"):
            ours, theirs = (getattr(one, what) for one in (self, other))
            if getattr(ours, "revision", ours) != getattr(theirs, "revision", theirs):
                both = " and ".join(f"{getattr(x, 'name', x)} {getattr(x, 'revision', '')}" for x in (ours, theirs))
                raise ChassisError(f"these statistics differ in {what} ({both}): gather both alike")
        if any(one.fingerprints & two.fingerprints for one in self.probes for two in other.probes):
            raise ChassisError("some prompts are in both statistics: gather every prompt once")
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("train", "held")}
        return replace(self, probes=self.probes + other.probes, kept=_least(self.kept, other.kept), **sums)

    def __len__(self) -> int:
        return self.train.n + self.held.n


def gather(
    base: LanguageModel, expert: Expert, probes: Probes, features: Features,
    positions: str = "all", layer: Place = -1, *, batch_tokens: int = 4096, progress: bool = True,
) -> Statistics:  # fmt: skip
    """One pass of both models, no deeper than needed; batch by batch the rows are added up and forgotten.

    The base runs with its edits, if it has any; a synthetic expert always follows the bare base. `positions` is `last`
    or `all`; `layer`, negative from the last, has the states that are the target. ChassisError: more than memory holds
    (before anything is run), a single prompt, values that are not finite, or states that cannot be subtracted.
    """
    layer = base.layer_number(layer)
    if isinstance(expert, ForeignExpert):
        raise ChassisError(f"{expert.name} gives probabilities, of which no sums serve: harvest, and fit to that")
    if positions not in ("last", "all"):
        raise ChassisError(f"positions = '{positions}': choose last or all")
    if layer != base.num_layers and (str(layer).startswith("block") or not same_shape(base, expert)):
        raise ChassisError(f"{expert.name} has no layer {layer} of the size of {base.name}'s: only the final one")
    ids, _ = checked_ids(base, expert, probes)
    if (fold := min(FOLD, len(ids))) < 2:
        raise ChassisError(f"'{probes.name}' has one prompt, and every eighth is held out: give two or more")
    p, q = sum(features.sizes(base)), base.hidden_size + expert.readout.weight.shape[1] * (layer == base.num_layers)
    device = room(base, p, q, base.vocab_size if layer == base.num_layers else 0)
    wanted, hashes = [*dict.fromkeys([*features.places, layer])], torch.tensor(probes.hashes)
    train, held = (Gram.zeros(p, q, device) for _ in range(2))
    kept = (torch.zeros(0, p, device=device), torch.zeros(0, q, device=device), torch.zeros(0, dtype=torch.long))
    bar = tqdm(total=len(ids), desc=f"{base.name} and {expert.name}, layer {layer}", disable=not progress, leave=False)
    for batch, tokens, mask in batched(ids, batch_tokens):
        real = mask.bool() if positions == "all" else mask.bool() & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        prompt = torch.tensor(batch)[:, None].expand_as(real)[real]
        hidden = {place: state[real] for place, state in base.states(tokens, mask, wanted).items()}
        if isinstance(expert, LanguageModel):
            theirs = expert.states(tokens, mask, [layer if layer != base.num_layers else expert.num_layers])
            target = next(iter(theirs.values()))[real].to(base.device)
        else:
            target = expert.transform(base.bare.states(tokens, mask)[layer][real] if base.edits else hidden[layer])
        x, own = features(hidden), hidden[layer]
        y = torch.cat([target, own], dim=1) if layer == base.num_layers else target - own
        if not (good := (x.sum(1, dtype=torch.float64) + y.sum(1, dtype=torch.float64)).isfinite()).all():
            what = f"{base.name} or {expert.name} gives NaN or infinity on prompt {int(prompt[~good.cpu()][0])}"
            raise ChassisError(f"{what} of '{probes.name}': try dtype float32, or leave that prompt out")
        x, y, out = x.to(device), y.to(device), prompt % fold == fold - 1
        train.update(x[~out], y[~out])
        held.update(x[out], y[out])
        kept = _least(kept, (x[out], y[out], _keys(hashes[prompt], mask.cumsum(1)[real])[out]))
        bar.update(len(batch))
    bar.close()
    return Statistics(base, expert, (probes,), positions, features, layer, train, held, kept)


def _keys(hashes: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """A key a row, `(n,)`, as good as random, of its prompt's hash and its position alone: splitmix64 of both."""
    z = hashes - 0x61C8864680B583EB * position
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return z


def _least(*several: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The `KEPT` rows of least key of several (x, y, keys), in order of key: the same however they came together."""
    whole = [torch.cat([part.to(parts[0].device) for part in parts]) for parts in zip(*several, strict=True)]
    order = whole[-1].argsort(stable=True)[:KEPT]
    return tuple(part[order] for part in whole)


def same_shape(base: LanguageModel, expert: Expert) -> bool:
    """Whether the expert has the base's layers and hidden size, so that states can be subtracted layer by layer."""
    alike = isinstance(expert, LanguageModel) and expert.num_layers == base.num_layers
    return alike and expert.hidden_size == base.hidden_size


def room(base: LanguageModel, p: int, q: int, vocab: int, rows: int = 0) -> torch.device:
    """Where to add up and solve: the base's GPU if that has room, else the processor; ChassisError: nor has that."""
    # Five times the sums (two sets, total, two to solve with), rows, heads, a map to them, logits.
    wanted, gpu = 8 * (5 * p * (p + q) + 2 * KEPT * (p + q)) + 4 * vocab * (2 * q + 6 * ROWS), base.device
    if gpu.type == "cuda":
        freed = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        if wanted < 0.8 * (torch.cuda.mem_get_info(gpu)[0] + freed):
            return gpu
    wanted += 4 * rows * p  # features that are not forgotten batch by batch, which stay with the processor
    if wanted > 0.8 * (free := available()):
        sizes = f"{wanted / 2**30:.1f} GiB to gather and to solve, where {free / 2**30:.1f} GiB are free"
        raise ChassisError(f"{p:,} features need {sizes}: read fewer places, or fewer random features")
    return torch.device("cpu")


def available(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process can still get: what the system can free, or what its container's limit leaves if less."""
    free = virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no limit, or of the first version
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(told["inactive_file"]))  # pages of files are given back
    return free
