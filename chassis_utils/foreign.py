"""Experts with another tokenizer, as experts that adapters of the base are fitted to."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
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

    A row is `(expert hidden + hidden + 1,)`: the expert's final state behind its last token that ends at the place or
    before it, the bare base's at the place, and the number of the bytes in between, 0 where there is no such token. The
    expert's tokens that begin with these bytes, and go on, share its mass; a table tells to which base tokens each
    goes. Base tokens to which none leads keep the base's own probability, since nothing is known of them.
    """

    expert: Readout
    base: Readout
    tables: list[scipy.sparse.csr_matrix]  #: By that number, `(vocab, vocab_expert)`
    softcap: float | None = None  #: What comes out are log probabilities

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.expert.width + self.base.width + 1

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Log probabilities `(n, vocab)`."""
        states, own, numbers = rows.split([self.expert.width, self.base.width, 1], dim=1)
        target = self.base(own).softmax(-1)
        told = self.expert(states).softmax(-1).cpu().double().numpy()
        for number in numbers[numbers > 0].unique().int().tolist():
            at, table = (numbers[:, 0] == number).nonzero()[:, 0], self.tables[number]
            placed = torch.from_numpy((table @ told[at.cpu().numpy()].T).T).to(target)
            reached = torch.from_numpy(np.diff(table.indptr) > 0).to(target.device)
            base, whole = target[at], placed.sum(1, keepdim=True)
            share = (base * reached).sum(1, keepdim=True) / whole.clamp(min=1e-30)
            target[at] = torch.where(reached & (whole > 0), placed * share, base)
        return target.clamp(min=1e-30).log()


@dataclass(frozen=True)
class ForeignExpert:
    """An expert behind a bridge of stage A, B or C, which `harvest`, `fit` and `evaluate` take as any other.

    Its next-token distribution is told in base tokens by the rule of the bridge. With `text` that rule is corrected by
    counting: at each place of it, the text has a next token of either model, and the rule counts as one such place
    more. So an expert token leads also to the longer base tokens that begin with it, and to the shorter ones that later
    bytes leave, as often as they come. Where the expert is inside a token, what is left of the tokens that it may be in
    is read in the same way.

    Source: the study's bridges, rows 14 to 17; `ForeignReadout` stands for their target of log(q + 1e-8).
    """

    bridge: Bridge
    text: Probes | None = None  #: To count on, and never to judge by
    readout: ForeignReadout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.bridge.stage == "exact" or self.bridge.match == "string":
            raise ChassisError(f"{self.name}: nothing to fit to; take stage A, B or C by bytes")
        models, own = (self.bridge.base, self.model), {"_numbers": {}, "_counts": {}}
        own["_pieces"] = [token_bytes(model.tokenizer) for model in models]
        own["_sorted"] = sorted((piece, i) for i, piece in enumerate(self.bridge.pieces) if piece)
        own["readout"] = ForeignReadout(self.model.readout, self.bridge.base.readout, [None])
        vars(self).update(own)
        pairs: Counter[tuple[bytes, int, int]] = Counter()
        for prompt in self.text.prompts if self.text else ():
            ids, theirs = (model.tokenizer(prompt, verbose=False)["input_ids"] for model in models)
            for row, last, inside in self._places(ids, theirs, prompt):
                if row + 1 < len(ids) and last + 1 < len(theirs):
                    pairs[inside, theirs[last + 1], ids[row + 1]] += 1
        for (inside, token, to), count in pairs.items():
            self._counts.setdefault(inside, []).append((token, to, count))

    @property
    def model(self) -> LanguageModel:
        """The expert itself."""
        return self.bridge.expert

    @property
    def name(self) -> str:
        """Its name, the stage, and what was counted on."""
        counted = "" if self.text is None else f", counted on {self.text.name}"
        return f"{self.model.name} by bridge {self.bridge.stage}{counted}"

    @property
    def revision(self) -> str:
        """Hash of the expert, the bridge and the text."""
        bridge = self.bridge
        parts = self.model.revision, bridge.base.revision, bridge.stage, bridge.length, self.text and self.text.digest
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def rows(
        self,
        own: torch.Tensor,
        ids: Sequence[list[int]],
        theirs: torch.Tensor,
        their_ids: Sequence[list[int]],
        texts: Sequence[str],
        positions: str,
    ) -> torch.Tensor:
        """What `readout` reads, `(n, width)`, of the base's final states `own (n, hidden)`, the expert's `theirs`.

        Both are given behind every token of `ids` and `their_ids`, or with `positions` `last` behind each text.

        Raises:
            ChassisError: a text whose bytes a tokenizer changes.
        """
        found, first, their_first = [], 0, 0
        for one, other, text in zip(ids, their_ids, texts, strict=True):
            if positions == "last":
                found.append((first, their_first, self._number(b"")))
                first, their_first = first + 1, their_first + 1
                continue
            for row, last, inside in self._places(one, other, text):
                found.append((first + row, their_first + last, self._number(inside)))
            first, their_first = first + len(one), their_first + len(other)
        at, there, numbers = torch.tensor(found).view(-1, 3).T
        rows = torch.cat([torch.zeros(len(own), theirs.shape[1]), own, torch.zeros(len(own), 1)], dim=1)
        rows[at, : theirs.shape[1]], rows[at, -1] = theirs[there], numbers.float()
        return rows

    def _places(self, ids: list[int], theirs: list[int], text: str) -> list[tuple[int, int, bytes]]:
        """Base tokens behind which the expert has read a token: their numbers, that token's, the bytes since."""
        ends, their_ends = (offsets(p, own, text) for p, own in zip(self._pieces, (ids, theirs), strict=True))
        # Of several tokens that end at one byte (one without a text among them) the last has read most.
        last, raw = np.searchsorted(their_ends, ends, "right") - 1, text.encode()
        return [(n, int(k), raw[their_ends[k] : ends[n]]) for n, k in enumerate(last) if k >= 0]

    def _number(self, inside: bytes) -> int:
        """Number of the table for an expert that is so far inside a token; 0 if it has no token that goes on so."""
        if inside not in self._numbers:
            table = self._table(inside)
            self._numbers[inside] = len(self.readout.tables) if table.nnz else 0
            if table.nnz:
                self.readout.tables.append(table)
        return self._numbers[inside]

    def _table(self, inside: bytes) -> scipy.sparse.csr_matrix:
        if not inside:
            table = self.bridge.table[:, :-2]
        else:
            low = bisect_left(self._sorted, (inside + b"\0",))
            high = bisect_left(self._sorted, (inside + b"\xff" * 256,))
            left = [(i, piece[len(inside) :]) for piece, i in self._sorted[low:high]]
            starts = self.bridge.first([rest for _, rest in left])
            pairs = [(i, to) for (i, _), to in zip(left, starts, strict=True) if to is not None]
            rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
            shape = self.model.vocab_size, self.bridge.base.vocab_size
            table = scipy.sparse.csr_matrix((np.ones(len(pairs)), (rows, columns)), shape)
        if counts := self._counts.get(inside):
            tokens, to, many = np.array(counts).T
            table = table + scipy.sparse.csr_matrix((many.astype(float), (tokens, to)), table.shape)
            table = scipy.sparse.diags(1 / np.maximum(np.asarray(table.sum(1)).ravel(), 1e-30)) @ table
        return table.T.tocsr()
