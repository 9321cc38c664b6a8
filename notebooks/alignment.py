"""Closed forms from hidden state to hidden state: once imported, `fit` knows `hidden`, `aligned` and `projected`."""

from __future__ import annotations

from dataclasses import replace

import torch

from chassis_utils import Activations, Adapter, ChassisError, Gram, LanguageModel, ridge
from chassis_utils.adapter import assembled, method
from chassis_utils.solve import low_rank


@method("hidden")
def hidden(a: Activations, layer: int, lam: float) -> Adapter:
    """Difference of the hidden states themselves, read by the base's head; lower ranks in the data's metric."""
    _same_size(a)
    gram = Gram.of(a.layer(layer), a.expert_hidden - a.hidden[a.final])
    weight, bias = ridge(gram, lam)
    return assembled(a, layer, low_rank(weight, gram.xx), bias, space="hidden")


@method("aligned")
def aligned(a: Activations, layer: int, lam: float) -> Adapter:
    """Ridge from base to expert hidden state, in place of the base's own (experiment 2); lower ranks by SVD."""
    _same_size(a)
    weight, bias = ridge(Gram.of(a.layer(layer), a.expert_hidden), lam)
    return assembled(a, layer, low_rank(weight), bias, space="hidden", onto="nothing")


@method("projected")
def projected(a: Activations, layer: int, lam: float, dim: int | None = None, seed: int = 0) -> Adapter:
    """Both sides projected at random to `dim`, ridge there, lifted back by the transpose (experiment 2).

    `dim` is 256 of 2,048 in the study and the same share here.

    Raises:
        ChassisError: dim outside 1..hidden, or an expert of another hidden size.
    """
    _same_size(a)
    size = a.base.hidden_size
    dim = max(1, size // 8) if dim is None else dim
    if not 1 <= dim <= size:
        raise ChassisError(f"dim = {dim} is outside 1..{size}, the hidden size of {a.base.name}")
    generator = torch.Generator().manual_seed(seed)
    projection = torch.linalg.qr(torch.randn(size, dim, generator=generator, dtype=torch.float64)).Q
    weight, bias = ridge(Gram.of(a.layer(layer).double() @ projection, a.expert_hidden.double() @ projection), lam)
    down, up, values = low_rank(weight)
    lifted = projection @ down, up @ projection.T, values
    return assembled(a, layer, lifted, bias @ projection.T, space="hidden", onto="nothing", info={"dim": dim})


def _same_size(a: Activations) -> None:
    ours, theirs = a.base.hidden_size, a.expert_hidden.shape[1]
    if ours != theirs:
        sizes = f"{a.base.name} has hidden size {ours}, {a.expert.name} {theirs}"
        raise ChassisError(f"{sizes}: use a method on logits, as rrr")


def into_hidden(adapter: Adapter, base: LanguageModel, inverse: str = "pseudo") -> Adapter:
    """The change of logits as a change of the head's input.

    The inverse of the base's head is `pseudo` (least squares over the corrected columns), or `transpose`, which
    multiplies by the head's rows instead, as experiment 6 did. ChassisError where it changes hidden states already.
    """
    if adapter.space == "hidden" or inverse not in ("pseudo", "transpose"):
        raise ChassisError(f"inverse = '{inverse}' of an adapter in {adapter.space}: logits by pseudo or transpose")
    rows = base.readout.weight if adapter.columns is None else base.readout.weight[adapter.columns]
    back = rows if inverse == "transpose" else torch.linalg.pinv(rows.double().T).to(rows.dtype)
    return replace(adapter, up=adapter.up @ back, bias=adapter.bias @ back, columns=None, space="hidden")
