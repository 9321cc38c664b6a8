"""Bridges between meanings, for page 20: maps of embeddings, of bytes, of hidden states, which need the expert at hand.

All speak where both tokenizers have an end, and leave the base's own opinion elsewhere, as `ForeignExpert` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from bridging import bounds, by_passage, logits
from chassis_utils import Activations, Adapter, Bridge, ChassisError, ForeignExpert, Gram, LanguageModel, ridge
from chassis_utils.metrics import kl, places_read, ratio_bounds
from chassis_utils.tokens import token_bytes

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
Answer = Callable[[Activations], torch.Tensor]


def _models(a: Activations) -> tuple[LanguageModel, LanguageModel]:
    """The expert itself, and the base."""
    if not isinstance(a.expert, ForeignExpert):
        raise ChassisError(f"{a.expert.name} has the base's own tokenizer: harvest beside a ForeignExpert")
    return a.expert.model, a.base


def _foreign(a: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each place is one where both have an end `(n,)`, and the expert's states at those `(m, hidden)`."""
    size, meet = _models(a)[0].hidden_size, a.expert_hidden[:, -1] > 0
    return meet, a.expert_hidden[meet, :size]


def _at_meetings(a: Activations, said: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The base's logits `(n, vocab)`, and where both have an end what is made of expert states and those logits."""
    own, (meet, states) = logits(a.base, a.hidden[a.final]), _foreign(a)
    own[meet] = said(states, own[meet])
    return own


def hidden_to_hidden(train: Activations, lam: float = 1e-4) -> Answer:
    """The expert's state, by ridge, as one of the base, which its head reads (:cite:`gorbett2026characterizing`).

    Ridge to the base's *logits* is the same map: they are a linear map of the states that ridge aims at.
    """
    meet, states = _foreign(train)
    weight, bias = ridge(Gram.of(states, train.hidden[train.final][meet]), lam)
    return lambda a: _at_meetings(a, lambda states, _: logits(a.base, (states.double() @ weight + bias).float()))


def embeddings(train: Activations, lam: float = 1e-4) -> Answer:
    """The study's plan (a): expert embeddings mapped to the base's by ridge on the tokens that both have.

    An embedding is a token's row of the head. What the expert says is summed up as the mean of the mapped embeddings,
    and the logits are its products with the base's, times the strength that is best on the training places.
    """
    expert, base = _models(train)
    theirs, ours = (torch.from_numpy(side).long() for side in Bridge(expert, base, "A").table[:, :-2].nonzero())
    heads = [(model.readout.weight - model.readout.weight.mean(0)).cpu() for model in (expert, base)]
    weight, bias = ridge(Gram.of(heads[0][theirs], heads[1][ours]), lam)
    mapped = (heads[0].double() @ weight + bias).float()

    def said(strength: float) -> Answer:
        def products(states: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return strength * logits(expert, states).softmax(-1) @ mapped @ heads[1].T

        return lambda a: _at_meetings(a, products)

    return min((said(strength) for strength in STRENGTHS), key=lambda one: _nats(train, one(train)))


def bytes_first(train: Activations) -> Answer:
    """The first half of the study's plan (b): the next *byte*, summed up from either's tokens.

    What the expert says of it is exact at an end; which token begins with that byte is left to the base, where the
    plan would have fitted a linear map. Nothing is fitted here.
    """
    expert, base = _models(train)
    first = [_first_bytes(model) for model in (expert, base)]

    def said(states: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        theirs = logits(expert, states).softmax(-1) @ first[0]
        own = plain.softmax(-1) @ first[1]
        ratio = (theirs.clamp(min=1e-12) / own.clamp(min=1e-12)).log() @ first[1].T
        return plain + ratio

    return lambda a: _at_meetings(a, said)


def _first_bytes(model: LanguageModel) -> torch.Tensor:
    """Which byte each token begins with `(vocab, 256)`; tokens of no text begin with none."""
    pieces = token_bytes(model.tokenizer)[: model.vocab_size]
    table = torch.zeros(model.vocab_size, 256)
    for i, piece in enumerate(pieces):
        if piece:
            table[i, piece[0]] = 1.0
    return table


def target(a: Activations) -> torch.Tensor:
    """What the bridge itself says, which an adapter aims at, `(n, vocab)`."""
    return a.expert.readout(a.expert_hidden.to(a.base.device)).cpu()


def _nats(a: Activations, said: torch.Tensor, there: torch.Tensor | None = None) -> float:
    """Nats of the text that follows, all of it unless some places are told."""
    there = a.next_token >= 0 if there is None else there
    return float(-said[there].double().log_softmax(-1).gather(1, a.next_token[there][:, None]).sum())


def judged(a: Activations, answers: Mapping[str, Answer]) -> pd.DataFrame:
    """KL from the bridge's target and bits per byte of the text, for answers that need the expert at run time.

    Returns:
        Columns as `evaluate` has them: `method, kl, kl_identity, recovered`, with 95% over prompts, `bits_per_byte`.
    """
    wanted, rows = target(a), []
    lost = kl(wanted, logits(a.base, a.hidden[a.final]))
    for method, answer in answers.items():
        nats = kl(wanted, said := answer(a))
        row = {"base": a.base.name, "expert": a.expert.name, "method": method, "rank": None, "layer": a.final}
        row |= {"onto": "final", "split": a.probes.split, "probes": a.probes.name, "n": len(a)}
        row |= {"kl": float(nats.mean()), "kl_identity": float(lost.mean())}
        row |= {"recovered": 1 - float(nats.sum() / lost.sum())}
        (low, high), (worst, best) = bounds(a.prompt, nats), bounds(a.prompt, nats, lost)
        row |= {"kl_low": low, "kl_high": high, "recovered_low": 1 - best, "recovered_high": 1 - worst}
        row |= {"top1_agreement": float((said.argmax(-1) == wanted.argmax(-1)).double().mean())}
        row |= {"base_revision": a.base.revision, "expert_revision": a.expert.revision}
        rows.append(row | {"bits_per_byte": _nats(a, said) / math.log(2) / a.num_bytes})
    return pd.DataFrame(rows)


def adapted(adapter: Adapter) -> Answer:
    """What the base alone says with an adapter and its edits."""
    return lambda a: adapter.logits(a.base, a.on(a.base.edited(*adapter.edits), places_read([adapter])).hidden)


def gains(a: Activations, answer: Answer) -> list[float]:
    """By how much an answer is nearer to the bridge's target than the base is: nats of KL, summed up by prompt."""
    wanted = target(a)
    gained = kl(wanted, logits(a.base, a.hidden[a.final])) - kl(wanted, answer(a))
    return by_passage(a.prompt, gained)[0].tolist()


def over(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Ends and value of the quotient of two shares, of `gains` at the same prompts: 95%, prompts are the sample.

    Both are judged on the same prompts, and what is hard for one may be hard for the other. NaN where the other is no
    nearer to the bridge than the base is.
    """
    gained, by = (torch.tensor(sums, dtype=torch.float64) for sums in (one, other))
    if len(gained) != len(by):
        raise ChassisError(f"{len(gained)} prompts over {len(by)}: judge both on the same")
    if by.sum() <= 0:
        return math.nan, math.nan, math.nan
    return *ratio_bounds(gained, by), float(gained.sum() / by.sum())


def ends(a: Activations) -> pd.DataFrame:
    """Places where both have an end and where the expert is inside a token, and what the text costs there.

    Returns:
        Columns `where, places, share`, and `base`, `bridge`: nats of the token that follows, mean.
    """
    meet, rows = _foreign(a)[0], []
    for where, some in (("both have an end", meet), ("inside a token", ~meet)):
        some = some & (a.next_token >= 0)
        row = {"where": where, "places": int(some.sum()), "share": float(some.double().mean())}
        for name, said in (("base", logits(a.base, a.hidden[a.final])), ("bridge", target(a))):
            row[name] = _nats(a, said, some) / max(1, row["places"])
        rows.append(row)
    return pd.DataFrame(rows)


def half_way(curve: pd.DataFrame) -> str:
    """Where a learning curve of `positions` and `closed` reaches one half, or where its last stretch would.

    The last stretch is a line, by least squares, in the logarithm of the positions, over their last factor of four, or
    through the last two points where no more lie there.
    """
    curve = curve.sort_values("positions")
    if (reached := curve[curve["closed"] >= 0.5]).size:
        return f"Half of the gap is closed after {reached['positions'].iloc[0]:,.0f} positions."
    last = curve.tail(max(2, int((curve["positions"] * 4 >= curve["positions"].max()).sum())))
    slope, level = np.polyfit(np.log(last["positions"]), last["closed"], 1)
    at = curve.iloc[-1]
    told = f"{at['closed']:.0%} of the gap is closed after {at['positions']:,.0f} positions"
    if slope * np.log(10) < 1e-3:  # of the gap, for ten times the text
        return f"{told}, and no more text closes more."
    return f"{told}; as the last stretch goes on, half would take {np.exp((0.5 - level) / slope):,.0f}."
