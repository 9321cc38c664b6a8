"""Which expert a prompt is for, or none, told by the base's own final hidden states; solved, not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from .activations import _check_ids, batched, tokenize
from .errors import ChassisError
from .models import LanguageModel
from .probes import Probes
from .solve import Gram
from .statistics import FOLD

LENGTHS = torch.tensor([4, 8, 16, 32, 64, 128])  # tokens of the windows fitted on, each with a limit of its own


@dataclass(frozen=True)
class Router:
    """Linear discriminants of a prompt's mean final state, and a limit beyond which it is like nothing known.

    Classes have a mean each and one covariance with a ridge (Friedman 1989), all from a `Gram` of states on one-hot
    classes. Beyond the limit in Mahalanobis distance to every class (Lee et al. 2018) a prompt is the bare base's.
    """

    base: LanguageModel = field(repr=False)  #: Whose states it reads, without edits
    names: tuple[str, ...]  #: Experts; the classes after them are the bare base's
    whiten: torch.Tensor = field(repr=False)  #: `(hidden, hidden)`: behind it the covariance is the unit matrix
    means: torch.Tensor = field(repr=False)  #: `(classes, hidden)`, whitened
    limit: torch.Tensor  #: Squared distance that is still like a class, one for each of `LENGTHS`
    fitted_on: frozenset[int] = field(repr=False)  #: Fingerprints of the passages

    @classmethod
    def fit(
        cls, base: LanguageModel, experts: Mapping[str, Probes], rest: Sequence[Probes] = (), *,
        lam: float = 1.0, slack: float = 2.0,
    ) -> Router:  # fmt: skip
        """Solve from passages of each expert's domain, and sets of texts of no expert, in one pass of the base.

        Windows of 4 to 128 tokens stand for short prompts. Limits are `slack` times what 99% of the windows of every
        eighth passage, held out, keep to: others' texts of a domain lie farther off. `lam` is a share of each state's
        variance. ChassisError: no expert or a bad name, fewer than two passages in a set, a passage in two sets or too
        long, lam or slack not above zero.
        """
        sets = [*experts.values(), *([rest] if isinstance(rest, Probes) else rest)]
        if not experts or not all(isinstance(name, str) and name not in ("", "none") for name in experts):
            raise ChassisError(f"experts named {[*experts]}: give one at least, each by a name that is not 'none'")
        if any(not isinstance(one, Probes) or len(one) < 2 for one in sets) or not (lam > 0 and slack > 0):
            raise ChassisError("a router needs probes of two passages or more a set, lam and slack above zero")
        fitted_on = frozenset().union(*(one.fingerprints for one in sets))
        if len(fitted_on) < sum(len(one.fingerprints) for one in sets):
            raise ChassisError("a passage is in two sets: give it to one, they cannot be told apart there")
        gram, held = Gram.zeros(base.hidden_size, len(sets)), []
        for one, kind in zip(sets, torch.eye(len(sets)), strict=True):
            for i, state in _states(base, tokenize(base, one)[0]):
                rows, lengths = _windows(state)
                if i % min(FOLD, len(one)) == min(FOLD, len(one)) - 1:
                    held.append((rows, lengths))
                else:
                    gram.update(rows, kind.expand(len(rows), -1))
        means = (gram.xy / gram.y).T
        within = (gram.xx - (means.T * gram.y) @ means) / gram.n
        size = within.diagonal().clamp(min=1e-12 * float(within.diagonal().max()))
        whiten = torch.linalg.inv(torch.linalg.cholesky(within + lam * size.diag())).T
        rows, lengths = map(torch.cat, zip(*held, strict=True))
        far, bins, limit = torch.cdist(rows @ whiten, means @ whiten).min(1).values.square(), _bins(lengths), []
        for k in range(len(LENGTHS)):
            # Passages may all be shorter than a length: what the shorter windows keep to counts there too.
            some = far[bins == k] if (bins == k).any() else far[bins <= k] if (bins <= k).any() else far
            limit.append(slack * some.quantile(0.99))
        return cls(base.bare, (*experts,), whiten, means @ whiten, torch.stack(limit), fitted_on)

    def __call__(self, texts: Sequence[str]) -> pd.DataFrame:
        """One row a prompt: `choice` (an expert's name, or None for the bare base), `distance`, and a score each.

        `distance` is to the nearest class, squared, as a share of its limit. Scores of every expert and of `none` sum to
        one: the discriminants' probabilities, but all `none` beyond the limit. Of a prompt that the base cannot read
        whole the end counts, which is what goes on. ChassisError: no prompt, an empty one, or a single string.
        """
        probes, context = Probes("prompts", "text", texts if isinstance(texts, str) else tuple(texts)), self.base.context
        ids = self.base.tokenizer(list(probes.prompts), verbose=False)["input_ids"]
        ids = [one[-context:] for one in ids]
        _check_ids(self.base, probes, ids)
        found = {i: (state.mean(0), len(state)) for i, state in _states(self.base, ids)}
        rows, lengths = zip(*(found[i] for i in range(len(ids))), strict=True)
        far = torch.cdist(torch.stack(rows) @ self.whiten, self.means).square()
        distance = far.min(1).values / self.limit[_bins(torch.tensor(lengths))]
        scores = (-far / 2).softmax(1).where(distance[:, None] <= 1, 0)[:, : len(self.names)]
        scores = torch.cat([scores, 1 - scores.sum(1, keepdim=True)], dim=1)
        names = [*self.names, None]
        choice = pd.Series([names[i] for i in scores.argmax(1).tolist()], dtype=object)  # strings would turn None to NaN
        return pd.DataFrame({"choice": choice, "distance": distance} | dict(zip((*self.names, "none"), scores.T)))

    def confusion(self, sets: Mapping[str | None, Probes]) -> pd.DataFrame:
        """How many prompts of each set (named for the right choice, None for the bare base) go where: truth by choice.

        ChassisError: a name that is no expert's, or prompts that were fitted on.
        """
        names = [*self.names, None]
        for truth, probes in sets.items():
            if truth not in names:
                raise ChassisError(f"no expert '{truth}': the router knows {', '.join(self.names)}, and None for the base")
            if seen := self.fitted_on & probes.fingerprints:
                raise ChassisError(f"{len(seen)} prompts of '{probes.name}' were fitted on: use other prompts")
        told = {truth or "none": self(probes.prompts)["choice"].tolist() for truth, probes in sets.items()}
        rows = {truth: [choices.count(name) for name in names] for truth, choices in told.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=[*self.names, "none"]).rename_axis("truth")


def _states(base: LanguageModel, ids: list[list[int]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of each prompt and its final states `(tokens, hidden)`, float64, without the one that begins every text."""
    special = base.tokenizer.all_special_ids
    for batch, tokens, mask in batched(ids, 4096):
        states = base.bare.states(tokens, mask)[base.num_layers].cpu()
        for i, state, own in zip(batch, states, mask.bool(), strict=True):
            yield i, state[own][int(len(ids[i]) > 1 and ids[i][0] in special) :].double()


def _windows(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over all windows side by side `(n, hidden)`, of each length and of the whole passage, and their lengths."""
    sums, total = torch.cat([torch.zeros_like(state[:1]), state.cumsum(0)]), len(state)
    lengths = [k for k in LENGTHS.tolist() if k < total] + [total]
    rows = [sums[::k].diff(dim=0) / k for k in lengths]
    return torch.cat(rows), torch.repeat_interleave(torch.tensor(lengths), torch.tensor([*map(len, rows)]))


def _bins(lengths: torch.Tensor) -> torch.Tensor:
    """The place in `LENGTHS` of the longest that is not longer; the first for what is shorter than all."""
    return (torch.bucketize(lengths, LENGTHS, right=True) - 1).clamp(min=0)
