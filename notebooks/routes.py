"""Which expert a prompt is for, or none, told by the base's own final hidden states; solved, not trained."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from chassis_utils import ChassisError, Gram, LanguageModel, Probes
from chassis_utils.activations import batched, tokenize
from chassis_utils.statistics import FOLD

LENGTHS = (4, 8, 16, 32, 64, 128)  # tokens of the windows fitted on; each has a limit


@dataclass(frozen=True)
class Router:
    """Linear discriminants of a prompt's mean final state, and limits beyond which it is like nothing known.

    Classes share one covariance, with a ridge of each state's own variance (:cite:`friedman1989regularized`). What
    is farther than `slack * limit` from every mean (squared Mahalanobis distance, :cite:`lee2018simple`) is left to the
    bare base.
    """

    base: LanguageModel = field(repr=False)  #: Read without edits
    names: tuple[str, ...]  #: Experts; classes after them are the bare base's
    whiten: torch.Tensor = field(repr=False)  #: `(hidden, hidden)`: behind it the covariance is the unit matrix
    means: torch.Tensor = field(repr=False)  #: `(classes, hidden)`, whitened
    limit: torch.Tensor  #: What 99% of held-out windows keep to, one for each of `LENGTHS`
    fitted_on: frozenset[int] = field(repr=False)  #: Fingerprints of the passages
    slack: float = 2.0  #: Others' texts of a domain lie farther off than passages of one hand

    @classmethod
    def fit(cls, base: LanguageModel, experts: Mapping[str, Probes], rest: Probes | Sequence[Probes] = ()) -> Router:
        """Solve from passages of each expert's domain and sets of texts of no expert, in one pass of the base.

        Windows of 4 to 128 tokens stand for short prompts; every eighth passage is held out for the limits. Raises
        ChassisError: no expert, a bad name, a set of fewer than two passages, one that is in two sets or too long.
        """
        sets = [*experts.values(), *([rest] if isinstance(rest, Probes) else rest)]
        if not experts or not all(isinstance(n, str) and n not in ("", "none", "choice", "distance") for n in experts):
            raise ChassisError(f"experts named {[*experts]}: give at least one, and no name that the table has itself")
        seen = [one.fingerprints if isinstance(one, Probes) else () for one in sets]
        if min(map(len, seen)) < 2 or len(fitted_on := frozenset().union(*seen)) < sum(map(len, seen)):
            raise ChassisError("a router is fitted on probes: give two passages or more a set, and none to two sets")
        gram, held = Gram.zeros(base.hidden_size, len(sets)), [[] for _ in LENGTHS]
        for one, kind in zip(sets, torch.eye(len(sets)), strict=True):
            for i, state in _states(base, one):
                sums, total = torch.cat([torch.zeros_like(state[:1]), state.cumsum(0)]), len(state)
                for k in {*LENGTHS[: bisect(LENGTHS, total)], total}:
                    rows = sums[::k].diff(dim=0) / k  # means of the windows side by side
                    if (i + 1) % min(FOLD, len(one)) == 0:
                        held[bisect(LENGTHS, k, 1) - 1].append(rows)
                    else:
                        gram.update(rows, kind.expand(len(rows), -1))
        means = (gram.xy / gram.y).T
        within = (gram.xx - (means.T * gram.y) @ means) / gram.n
        ridge = within.diagonal().clamp(min=1e-12 * float(within.diagonal().max())).diag()
        whiten = torch.linalg.inv(torch.linalg.cholesky(within + ridge)).T
        limit: list[torch.Tensor] = []
        for some in held:
            # Passages may all be shorter than a length: then the last limit there is, which is wider, stands.
            far = torch.cdist(torch.cat(some) @ whiten, means @ whiten).square().amin(1) if some else limit[-1]
            limit.append(far.quantile(0.99))
        return cls(base.bare, (*experts,), whiten, means @ whiten, torch.stack(limit), fitted_on)

    def __call__(self, texts: Sequence[str]) -> pd.DataFrame:
        """One row a prompt: a score of each expert and of `none`, the `choice` (None: the bare base), the `distance`.

        Scores are the discriminants' probabilities, but all `none` beyond the limit, of which `distance`, squared, to
        the nearest class, is a share. ChassisError: no prompt, an empty one, one longer than the base's context.
        """
        probes = Probes("prompts", "text", texts if isinstance(texts, str) else (*texts,))
        states = [state for _, state in sorted(_states(self.base, probes))]  # numbers differ: no states are compared
        far = torch.cdist(torch.stack([state.mean(0) for state in states]) @ self.whiten, self.means).square()
        limit = self.limit[[bisect(LENGTHS, len(state), 1) - 1 for state in states]]
        distance = far.amin(1) / (self.slack * limit)
        scores = (-far / 2).softmax(1).where(distance[:, None] <= 1, 0)[:, : len(self.names)]
        scores = torch.cat([scores, (1 - scores.sum(1, keepdim=True)).clamp(min=0)], 1).numpy()
        choice = pd.Series([(*self.names, None)[i] for i in scores.argmax(1)], dtype=object)  # which keeps None
        return pd.DataFrame(scores, columns=[*self.names, "none"]).assign(choice=choice, distance=distance.numpy())


def _states(base: LanguageModel, probes: Probes) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of each prompt and final states `(tokens, hidden)`, float64, without the first, which tells of no text."""
    for batch, tokens, mask in batched(tokenize(base, probes)[0], 4096):
        for i, state, own in zip(batch, base.bare.states(tokens, mask)[base.num_layers].cpu(), mask, strict=True):
            yield i, state[own.bool()][int(own.sum() > 1) :].double()


def confusion(router: Router, sets: Mapping[str | None, Probes]) -> pd.DataFrame:
    """Prompts of each set (by the right choice) that go where; ChassisError: an unknown name, prompts fitted on."""
    names = [*router.names, None]
    if bad := [one.name for truth, one in sets.items() if truth not in names or router.fitted_on & one.fingerprints]:
        raise ChassisError(f"'{bad[0]}' is under no expert's name, or holds passages fitted on: take other prompts")
    told = {truth or "none": router(one.prompts)["choice"].tolist() for truth, one in sets.items()}
    rows = [[choices.count(name) for name in names] for choices in told.values()]
    return pd.DataFrame(rows, index=[*told], columns=[*router.names, "none"])
