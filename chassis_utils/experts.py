"""Experts that are a function of the base's own hidden state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from .errors import ChassisError
from .models import LanguageModel, Readout, tensor_hash


class HiddenExpert(Protocol):
    """Any expert that is a function of the base's final state: `harvest`, `gather` and `fit` ask no more of one."""

    @property
    def name(self) -> str:
        """As records show it."""

    @property
    def revision(self) -> str:
        """Hash of all that decides what it says."""

    @property
    def readout(self) -> Readout:
        """The base's own head, with another bias, or with more columns of weight for what `transform` adds."""

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the readout reads `(n, width)`, from the base's final states `(n, hidden)`."""


@dataclass(frozen=True)
class SyntheticExpert:
    """`h + (h U) V'` in front of the base's own head: an expert whose exact adapter is known.

    Source: the study's synthetic expert (rank 64, scale 0.01, seed 0 at hidden size 2,048).
    """

    name: str
    down: torch.Tensor  #: `U (hidden, rank)`
    up: torch.Tensor  #: `V' (rank, hidden)`
    readout: Readout

    @classmethod
    def from_base(cls, base: LanguageModel, rank: int | None = None, strength: float = 1.0, seed: int = 0) -> Self:
        """Draw one for a base of any size.

        Args:
            base: the model whose hidden states it changes.
            rank: rank of the change; hidden / 32 unless given, as 64 is to 2,048. ChassisError outside 1..hidden.
            strength: 1.0 changes `h` by the same relative amount as the study's 0.01 did at hidden 2,048 and rank 64:
                entries have size `0.01 sqrt(strength) (2048 / hidden)^(1/2)`.
            seed: of the draw.
        """
        hidden = base.hidden_size
        rank = max(1, hidden // 32) if rank is None else rank
        if not 1 <= rank <= hidden:
            raise ChassisError(f"expert rank {rank} is outside 1..{hidden}, the hidden size of {base.name}")
        generator = torch.Generator().manual_seed(seed)
        size = 0.01 * math.sqrt(strength * 2048 / hidden)
        u, v = (size * torch.randn(hidden, rank, generator=generator) for _ in "uv")
        name = f"synthetic(rank={rank}, strength={strength:g}, seed={seed})"
        return cls(name, u.to(base.device), v.T.contiguous().to(base.device), base.readout)

    @property
    def revision(self) -> str:
        """Hash of both factors."""
        return tensor_hash(self.down, self.up)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """The expert's head input `(n, hidden)` from the base's."""
        return hidden + (hidden @ self.down) @ self.up
