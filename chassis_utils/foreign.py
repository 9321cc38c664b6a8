"""Experts with another tokenizer, as experts that adapters of the base are fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
import torch

from .bridge import Bridge
from .errors import ChassisError
from .models import LanguageModel, Readout
from .probes import Probes
from .tokens import offsets, token_bytes


@dataclass(frozen=True)
class ForeignReadout:
    """From the states of expert and base to log probabilities in the base's vocabulary: what an adapter should say.

    A row is `(expert hidden + hidden + 1,)`: the expert's final state behind its last token, the bare base's, and
    whether both stand at the same byte. Where they do not, nothing is known and the base's own opinion stands. So it
    does for base tokens to which no expert token leads; the others share the rest as `table` tells the expert's.
    """

    expert: Readout
    base: Readout
    table: scipy.sparse.csr_matrix  #: `(vocab, vocab_expert)`
    softcap: float | None = None  #: What comes out are log probabilities

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Log probabilities `(n, vocab)`."""
        states, own, meet = rows.split([self.expert.weight.shape[1], self.base.weight.shape[1], 1], dim=1)
        target, meet = self.base(own).softmax(-1), meet[:, 0] > 0
        told = self.expert(states[meet]).softmax(-1).cpu().numpy()
        placed = torch.from_numpy(np.ascontiguousarray((self.table @ told.T).T)).to(target)
        known = torch.from_numpy(np.diff(self.table.indptr) > 0).to(target.device)
        base, whole = target[meet], placed.sum(1, keepdim=True)
        share = (base * known).sum(1, keepdim=True) / whole.clamp(min=1e-30)
        target[meet] = torch.where(known & (whole > 0), placed * share, base)
        return target.clamp(min=1e-30).log()


@dataclass(frozen=True)
class ForeignExpert:
    """An expert behind a bridge of stage A, B or C, which `harvest`, `fit` and `evaluate` take as any other.

    Behind texts where both models have a token's end, its next token is told in base tokens by the rule of the bridge.
    With `text` that rule is corrected by counting: wherever both have an end in it, it has a next token of either, and
    the rule counts as one such place more. So an expert's token leads also to longer base tokens that begin with it,
    and to the shorter ones that later bytes leave, as often as they come.

    Source: the study's bridges, rows 14 to 17; `ForeignReadout` stands for their target of log(q + 1e-8).
    """

    bridge: Bridge
    text: Probes | None = None  #: To count on, and never to judge by
    readout: ForeignReadout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.bridge.stage == "exact":
            raise ChassisError(f"{self.name} has no rule for every place: take a bridge of stage A, B or C")
        if not isinstance(self.text, Probes | None):
            raise ChassisError(f"text is a {type(self.text).__name__}: give Probes to count on, as probe_set returns")
        models = self.bridge.base, self.model
        pieces, pairs = [token_bytes(model.tokenizer) for model in models], []
        for text in self.text.prompts if self.text else ():
            ids, theirs = (model.tokenizer(text, verbose=False)["input_ids"] for model in models)
            both = zip(*_meetings(pieces, ids, theirs, text), strict=True)
            pairs += [(theirs[k + 1], ids[n + 1]) for n, k in both if n + 1 < len(ids) and k + 1 < len(theirs)]
        table = self.bridge.table[:, :-2]
        if pairs:
            token, to = np.array(pairs).T
            table = table + scipy.sparse.csr_matrix((np.ones(len(pairs)), (token, to)), table.shape)
            table = scipy.sparse.diags(1 / np.maximum(np.asarray(table.sum(1)).ravel(), 1e-30)) @ table
        readout = ForeignReadout(self.model.readout, self.bridge.base.readout, table.T.tocsr().astype(np.float32))
        vars(self).update(_pieces=pieces, readout=readout)

    @property
    def model(self) -> LanguageModel:
        """The expert itself."""
        return self.bridge.expert

    @property
    def name(self) -> str:
        """Its name, the stage, and what was counted on."""
        return f"{self.model.name} by bridge {self.bridge.stage}{f', counted on {self.text.name}' if self.text else ''}"

    @property
    def revision(self) -> str:
        """Hash of the expert, the bridge and the text."""
        bridge = self.bridge
        parts = self.model.revision, bridge.base.revision, type(bridge).__name__, bridge.stage, bridge.length
        return hashlib.sha256(repr((*parts, self.text and self.text.digest)).encode()).hexdigest()[:16]

    def rows(
        self, states: Sequence[torch.Tensor], ids: Sequence[list[list[int]]], texts: Sequence[str], positions: str
    ) -> torch.Tensor:
        """What `readout` reads, `(n, expert hidden + hidden + 1)`, of final states of the base and of the expert.

        Both are given behind every one of their `ids`, or with `positions` `last` behind each text. ChassisError, with
        `all`, for a text whose bytes a tokenizer changes.
        """
        own, theirs = states
        rows = torch.cat([own.new_zeros(len(own), theirs.shape[1]), own, own.new_zeros(len(own), 1)], dim=1)
        at, there, first, their_first = [], [], 0, 0
        for one, other, text in zip(*ids, texts, strict=True):
            every = positions == "all"
            here, beside = _meetings(self._pieces, one, other, text) if every else ([0], [0])
            at += [first + n for n in here]
            there += [their_first + k for k in beside]
            first, their_first = first + (len(one) if every else 1), their_first + (len(other) if every else 1)
        rows[at, : theirs.shape[1]], rows[at, -1] = theirs[there], 1.0
        return rows


def _meetings(
    pieces: Sequence[Sequence[bytes | None]], ids: list[int], theirs: list[int], text: str
) -> tuple[list[int], list[int]]:
    """Numbers of the tokens of either behind which both have read the same bytes; an end of the text is none."""
    ends, their_ends = (offsets(known, own, text) for known, own in zip(pieces, (ids, theirs), strict=True))
    # Of several tokens that end at one byte (one without a text among them) the last has read most.
    last = np.searchsorted(their_ends, ends, "right") - 1
    meet = np.flatnonzero((last >= 0) & (np.asarray(their_ends)[last] == ends))
    return meet.tolist(), last[meet].tolist()
