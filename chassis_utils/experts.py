"""Experts that are a function of the base's own hidden state."""

from __future__ import annotations

from typing import Protocol

import torch

from .models import Readout


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
