"""The closed forms of experiment 2: once imported, `fit` knows them as `aligned` and `projected`."""

from __future__ import annotations

import torch

from chassis_utils import Activations, Adapter, ChassisError, Gram, ridge
from chassis_utils.adapter import assembled, method, same_size
from chassis_utils.solve import low_rank


@method("aligned")
def aligned(a: Activations, layer: int, lam: float) -> Adapter:
    """Ridge from base to expert hidden state, in place of the base's own; lower ranks by SVD."""
    same_size(a)
    weight, bias = ridge(Gram.of(a.layer(layer), a.expert_hidden), lam)
    return assembled(a, layer, low_rank(weight), bias, space="hidden", onto="nothing")


@method("projected")
def projected(a: Activations, layer: int, lam: float, dim: int | None = None, seed: int = 0) -> Adapter:
    """Both sides projected at random to `dim`, ridge there, lifted back by the transpose.

    `dim` is 256 of 2,048 in the study and the same share here.

    Raises:
        ChassisError: dim outside 1..hidden, or an expert of another hidden size.
    """
    same_size(a)
    hidden = a.base.hidden_size
    dim = max(1, hidden // 8) if dim is None else dim
    if not 1 <= dim <= hidden:
        raise ChassisError(f"dim = {dim} is outside 1..{hidden}, the hidden size of {a.base.name}")
    generator = torch.Generator().manual_seed(seed)
    projection = torch.linalg.qr(torch.randn(hidden, dim, generator=generator, dtype=torch.float64)).Q
    weight, bias = ridge(Gram.of(a.layer(layer).double() @ projection, a.expert_hidden.double() @ projection), lam)
    down, up, values = low_rank(weight)
    lifted = projection @ down, up @ projection.T, values
    return assembled(a, layer, lifted, bias @ projection.T, space="hidden", onto="nothing", info={"dim": dim})
