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

LENGTHS = torch.tensor([4, 8, 16, 32, 64, 128])  # tokens of the windows fitted on; each has a limit


@dataclass(frozen=True)
class Router:
    """Linear discriminants of a prompt's mean final state, and a limit beyond which it is like nothing known.

    Each class has a mean, all share one covariance with a ridge (Friedman 1989): a `Gram` of states and one-hot classes.
    Farther than the limit from every class (squared Mahalanobis distance, Lee et al. 2018) is for the bare base.
    """

    base: LanguageModel = field(repr=False)  #: Whose states it reads, without edits
    names: tuple[str, ...]  #: Experts; classes after them are the bare base's
    whiten: torch.Tensor = field(repr=False)  #: `(hidden, hidden)`: behind it the covariance is the unit matrix
    means: torch.Tensor = field(repr=False)  #: `(classes, hidden)`, whitened
    limit: torch.Tensor  #: Squared distances, one for each of `LENGTHS`
    fitted_on: frozenset[int] = field(repr=False)  #: Fingerprints of the passages

    @classmethod
    def fit(
        cls, base: LanguageModel, experts: Mapping[str, Probes], rest: Probes | Sequence[Probes] = (), *,
        lam: float = 1.0, slack: float = 2.0,
    ) -> Router:  # fmt: skip
        """Solve from passages of each expert's domain and sets of texts of no expert, in one pass of the base.

        Windows of 4 to 128 tokens stand for short prompts. Limits are `slack` times what 99% of the windows of every
        eighth passage, held out, keep to: others' texts lie farther off. `lam` is a share of each variance. ChassisError:
        no or bad names, under two passages in a set, one in two sets or too long, lam or slack not above zero.
        """
        sets = [*experts.values(), *([rest] if isinstance(rest, Probes) else rest)]
        if not experts or not all(isinstance(n, str) and n not in ("", "none", "choice", "distance") for n in experts):
            raise ChassisError(f"experts named {[*experts]}: give at least one, and no name that the table has itself")
        if any(not isinstance(one, Probes) or len(one) < 2 for one in sets) or not (lam > 0 and slack > 0):
            raise ChassisError("a router is fitted on probes: give two passages or more a set, lam and slack above zero")
        fitted_on = frozenset().union(*(one.fingerprints for one in sets))
        if len(fitted_on) < sum(len(one.fingerprints) for one in sets):
            raise ChassisError("a passage is in two sets, which cannot be told apart by it: give it to one")
        gram, held = Gram.zeros(base.hidden_size, len(sets)), []
        for one, kind in zip(sets, torch.eye(len(sets)), strict=True):
            for i, state in _states(base, tokenize(base, one)[0]):
                sums, total = torch.cat([torch.zeros_like(state[:1]), state.cumsum(0)]), len(state)
                for k in [*LENGTHS[total > LENGTHS].tolist(), total]:
                    rows = sums[::k].diff(dim=0) / k  # means of the windows side by side
                    if (i + 1) % min(FOLD, len(one)) == 0:
                        held.append((rows, torch.full((len(rows),), k)))
                    else:
                        gram.update(rows, kind.expand(len(rows), -1))
        means = (gram.xy / gram.y).T
        within = (gram.xx - (means.T * gram.y) @ means) / gram.n
        size = within.diagonal().clamp(min=1e-12 * float(within.diagonal().max()))
        whiten = torch.linalg.inv(torch.linalg.cholesky(within + lam * size.diag())).T
        rows, lengths = map(torch.cat, zip(*held, strict=True))
        far, bins = torch.cdist(rows @ whiten, means @ whiten).min(1).values.square(), _bins(lengths)
        # Passages may all be shorter than a length: then the limit of the next shorter stands, which is wider.
        limit = [slack * far[bins == bins[bins <= max(k, bins.min())].max()].quantile(0.99) for k in range(len(LENGTHS))]
        return cls(base.bare, (*experts,), whiten, means @ whiten, torch.stack(limit), fitted_on)

    def __call__(self, texts: Sequence[str]) -> pd.DataFrame:
        """One row a prompt: `choice` (an expert's name, None for the bare base), `distance`, a score of each and `none`.

        `distance` is to the nearest class, as a share of its limit. Scores are the discriminants' probabilities, all
        `none` beyond the limit. A prompt too long for the base is told by its end. ChassisError: no prompt, an empty one.
        """
        probes, most = Probes("prompts", "text", texts if isinstance(texts, str) else (*texts,)), self.base.context
        ids = self.base.tokenizer([*probes.prompts], verbose=False)["input_ids"]
        ids = [one if len(one) <= most else one[:1] + one[1 - most :] for one in ids]
        _check_ids(self.base, probes, ids)
        found = dict(_states(self.base, ids))
        rows = torch.stack([found[i].mean(0) for i in range(len(ids))])
        far = torch.cdist(rows @ self.whiten, self.means).square()
        distance = far.min(1).values / self.limit[_bins(torch.tensor([len(found[i]) for i in range(len(ids))]))]
        scores = (-far / 2).softmax(1).where(distance[:, None] <= 1, 0)[:, : len(self.names)]
        scores = torch.cat([scores, 1 - scores.sum(1, keepdim=True)], 1)
        choice = pd.Series([(*self.names, None)[i] for i in scores.argmax(1)], dtype=object)  # which keeps None as it is
        return pd.DataFrame(scores, columns=[*self.names, "none"]).assign(choice=choice, distance=distance)

    def confusion(self, sets: Mapping[str | None, Probes]) -> pd.DataFrame:
        """Prompts of each set (by the right choice) that go where; ChassisError: an unknown name, prompts fitted on."""
        names, rows = [*self.names, None], {}
        for truth, probes in sets.items():
            if truth not in names or self.fitted_on & probes.fingerprints:
                raise ChassisError(f"'{truth}' is no expert here, or some of '{probes.name}' was fitted on: take others")
            told = self(probes.prompts)["choice"].tolist()
            rows[truth or "none"] = [told.count(name) for name in names]
        return pd.DataFrame.from_dict(rows, orient="index", columns=[*self.names, "none"])


def _states(base: LanguageModel, ids: list[list[int]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of each prompt and final states `(tokens, hidden)`, float64, without the first, which tells of no text."""
    for batch, tokens, mask in batched(ids, 4096):
        for i, state, own in zip(batch, base.bare.states(tokens, mask)[base.num_layers].cpu(), mask, strict=True):
            yield i, state[own.bool()][int(len(ids[i]) > 1) :].double()


def _bins(lengths: torch.Tensor) -> torch.Tensor:
    """Number in `LENGTHS` of the longest that is not longer; 0 for what is shorter than all."""
    return (torch.bucketize(lengths, LENGTHS, right=True) - 1).clamp(min=0)
