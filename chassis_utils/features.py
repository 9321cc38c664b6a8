"""What a linear map reads at a position: layers, inner values of blocks, random features of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from .errors import ChassisError
from .models import LanguageModel, Place

KINDS = {"relu": torch.relu, "fourier": torch.cos, "square": torch.square}


@dataclass(frozen=True)
class Features:
    """Values found at places of a model, side by side, then random features of them; nothing of it is stored.

    `places` are layers and `block b` (the inputs of every linear map of that block: its normed states, what its
    attention gathered, its MLP's inner values; the base computes them anyway). Random features are `relu(z R + u)`
    (:cite:`cho2009kernel`), `cos(z R + u)` (:cite:`rahimi2007random`) or, for products of two values, `(z R + u)^2`
    (after :cite:`kar2012random`), z being the places' values, each place at unit mean square, R and u from the seed.
    """

    places: tuple[Place, ...]
    random: int = 0  #: How many random features
    kind: str = "relu"  #: Of the random features: `relu`, `fourier` or `square`
    width: float = 1.0  #: Size of z R: how fast the random features turn
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(self.places))
        odd = len({*self.places}) < len(self.places) or any(isinstance(p, int) and p < 0 for p in self.places)
        odd = odd or not (isinstance(self.random, int) and isinstance(self.seed, int) and abs(self.seed) < 2**63)
        if not self.places or odd or self.random < 0 or self.kind not in KINDS or not 0 < self.width < 1e30:
            wanted = f"at least one place, each once, from 0; random >= 0; kind {' or '.join(KINDS)}; width > 0"
            raise ChassisError(f"{self} cannot be read: give {wanted}")

    def __call__(self, hidden: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        """Features `(..., p)` from what was found at each place, `(..., size of the place)`."""
        found = [hidden[place] for place in self.places]
        if self.random:
            scaled = [part * part.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt() for part in found]
            z = torch.cat(scaled, dim=-1)
            matrix, shift = (part.to(z) for part in _drawn(z.shape[-1], self.random, self.kind, self.width, self.seed))
            found.append(KINDS[self.kind](z @ matrix + shift))
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def sizes(self, base: LanguageModel) -> list[int]:
        """How many features each place gives, the random ones last; ChassisError: the base has no such place."""
        token, known = torch.zeros(1, 1, dtype=torch.long), [base.layer_number(place) for place in self.places]
        hidden = base.states(token, torch.ones_like(token), known)
        return [hidden[place].shape[-1] for place in self.places] + [self.random] * (self.random > 0)


@lru_cache(maxsize=2)
def _drawn(p: int, m: int, kind: str, width: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`R (p, m)` and `u (m,)`: normal, u uniform over a turn for `fourier`."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(p, m, generator=draw) * (width / p**0.5)
    shift = torch.rand(m, generator=draw) * (2 * torch.pi) if kind == "fourier" else torch.randn(m, generator=draw)
    return matrix, shift
