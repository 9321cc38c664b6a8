"""The study's question at a middle layer, answered by the slope of the final KL: `fit(activations, "descent")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from chassis_utils import Activations, Adapter, ChassisError, Gram, LanguageModel, ridge
from chassis_utils.activations import batched, tokenize
from chassis_utils.adapter import assembled, method
from chassis_utils.models import Place
from chassis_utils.solve import low_rank


@dataclass
class _Lever:
    """An edit that changes nothing and tells how much a change would."""

    layer: int
    revision: str = "lever"

    @property
    def reads(self) -> tuple[Place, ...]:
        return (self.layer,)

    @property
    def changes(self) -> Place:
        return self.layer

    def correction(self, hidden: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        self.zero = torch.zeros_like(hidden[self.layer], requires_grad=True)
        return self.zero


def backward(
    a: Activations, port: LanguageModel, after: Adapter | None = None, batch_tokens: int = 2048
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """One forward and one backward pass of KL(expert || port); no weight is touched, edits find their slope behind it.

    `after` is an adapter that is in place at the end.

    Yields:
        Batch by batch, when its backward pass is done: the rows of `a` in it `(m,)`, where it holds tokens
        `(batch, length)`, and their KL summed, in nats.

    Raises:
        ChassisError: harvested at last positions only: a change earlier in the prompt would be missed.
    """
    if a.positions != "all":
        raise ChassisError("gradients are taken at every position: harvest with positions='all'")
    ids, final = tokenize(a.base, a.probes)[0], a.final
    rows_of = torch.arange(len(a)).split([*map(len, ids)])
    for batch, tokens, mask in batched(ids, batch_tokens):
        real, rows = mask.bool(), torch.cat([rows_of[i] for i in batch])
        target = a.expert.readout(a.expert_hidden[rows].to(port.device))
        with torch.enable_grad():
            state = {final: port.states(tokens, mask, grad=True)[final][real]}
            ours = port.readout(state[final]) if after is None else after.logits(port, state)
            kls = kl_div(ours.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
            kls.backward()
        yield rows, real, float(kls.detach())


def gradient(a: Activations, layer: int, after: Adapter | None = None, batch_tokens: int = 2048) -> torch.Tensor:
    """Gradient of the summed KL(expert || adapted base) with respect to a layer's states, `(n, hidden)`.

    It is that of one `backward` pass, with its arguments and its errors.
    """
    lever, gradient = _Lever(a.base.layer_number(layer)), torch.zeros_like(a.layer(layer))
    for rows, real, _ in backward(a, a.base.edited(lever), after, batch_tokens):
        gradient[rows] = lever.zero.grad[real].cpu()
    return gradient


@method("descent")
def _descent(a: Activations, layer: int, lam: float, after: Adapter | None = None, step: float = 0.1) -> Adapter:
    """A step down the final KL as a map of one layer's state, to be put in place by `LanguageModel.edited`.

    The target is minus the gradient of the KL at the end with respect to the state here, `after` being in place there
    (boosting by functional gradients, :cite:`friedman2001greedy`); the change is on average `step` times as long as
    the state.
    """
    x = a.layer(layer).double()
    gram = Gram.of(x, -gradient(a, layer, after))
    weight, bias = ridge(gram, lam)
    scale = step * float(x.norm(dim=1).mean() / (x @ weight + bias).norm(dim=1).mean().clamp(min=1e-30))
    factors = low_rank(weight * scale, gram.xx)
    return assembled(a, layer, factors, bias * scale, space="hidden", onto="layer", info={"step": step})
