"""Iterations that start from an adapter and go down the KL on the training rows: how far is it from the optimum?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pandas as pd
import torch
from torch.linalg import vecdot

from chassis_utils import Activations, Adapter, ChassisError, Features
from chassis_utils.adapter import heads
from chassis_utils.solve import kl_fit
from chassis_utils.statistics import available

#: (training rows, starting adapter, steps, step size) to the adapter after each step.
Refiner = Callable[["Rows", Adapter, int, float], Iterator[Adapter]]


class Rows:
    """Training rows in memory: features `(n, p)`, base logits and expert probabilities `(n, vocab)`, float32."""

    def __init__(self, a: Activations, start: Adapter) -> None:
        if start.space != "logits" or start.layer != a.final or start.onto not in ("final", "layer"):
            what = f"a {start.method} adapter of {start.space} at layer {start.layer}"
            raise ChassisError(f"{what} cannot be refined: give one that changes logits, read at the final layer")
        if [edit.revision for edit in start.edits] != [edit.revision for edit in a.base.edits]:
            raise ChassisError(
                f"this {start.method} adapter has other edits than the base: harvest base.edited(*edits)"
            )
        if a.base.readout.softcap is not None:
            raise ChassisError(f"{a.base.name} caps its logits: no linear map of them is refined here")
        device, vocab = a.base.device, a.base.vocab_size
        p = sum(a.layer(place).shape[1] for place in start.reads)
        wanted, free = 4 * len(a) * (6 * vocab + 2 * p), available()  # two of logits and two of twice the width at once
        if wanted > 0.8 * free:
            sizes = f"{wanted / 2**30:.1f} GiB of logits, where {free / 2**30:.1f} GiB are free"
            raise ChassisError(f"{len(a):,} rows need {sizes}: give fewer prompts")
        self.x = start.inputs({place: a.layer(place) for place in start.reads}).to(device)
        self.with_one = torch.cat([self.x, torch.ones_like(self.x[:, :1])], dim=1)  # for the bias
        self.base = a.base.readout(a.hidden[a.final].to(device))
        self.p = a.expert.readout(a.expert_hidden.to(device)).softmax(-1)
        self.both = torch.cat([*heads(a)[0]], dim=1)
        self.entropy = float(torch.special.entr(self.p.double()).sum())

    def kl(self, logits: torch.Tensor) -> float:
        """Mean KL in nats of logits `(n, vocab)`."""
        return (-float(vecdot(self.p, logits.log_softmax(-1)).double().sum()) - self.entropy) / len(self.x)

    def dense(self, adapter: Adapter) -> torch.Tensor:
        """The adapter as one map `(p + 1, vocab)`, float64; the last row is the bias."""
        own = torch.cat([adapter.down.double() @ adapter.up.double(), adapter.bias[None].double()])
        return self.full(adapter, own)

    def full(self, adapter: Adapter, some: torch.Tensor) -> torch.Tensor:
        """Values for the columns that an adapter changes `(m, k)`, zero for all others `(m, vocab)`."""
        columns = torch.arange(some.shape[1], device=some.device) if adapter.columns is None else adapter.columns
        return some.new_zeros(len(some), self.base.shape[1]).index_copy_(1, columns, some)


def refine(
    a: Activations, start: Adapter, how: str, steps: int = 50, rate: float = 1.0
) -> tuple[Adapter, pd.DataFrame]:
    """Improve an adapter step by step on the rows it was fitted to (experiment 8, and what should stand there).

    Args:
        a: the training rows; all logits of them are held in memory.
        start: where to begin: an adapter of logits at the final layer.
        how: `adam` (as the study did: KL by Adam, :cite:`kingma2014adam`, on U, log S, V, d, batches of 32; a step is
            an epoch), `bohning` (majorise and minimise: a ridge solve on one Cholesky factor, the KL never rises),
            `accelerated` (the same with Nesterov's momentum, :cite:`nesterov1983method`, thrown away whenever the KL
            would rise, :cite:`odonoghue2015adaptive`), `lbfgs` (:cite:`liu1989limited`, towards the optimum of all
            linear maps of what the adapter reads), `span` (the same among maps through the heads of base and expert,
            the family of the closed form) or `near` (in that family, the least KL plus `rate / 2` times the squared
            distance from the start; see `kl_fit`).
        steps: how many.
        rate: Adam's step size, or the penalty of `near`; the others need none.

    Returns:
        The last adapter, and `step`, `kl` (nats, on the training rows), `seconds`, `gradient` and `within` after each
        step, step 0 first. `gradient` is the norm that certifies an optimum, which `lbfgs` and `span` know: a convex
        function is nowhere lower than its value here less that norm times the distance, both in the metric of the
        step. `near` tells `within`, nats by which its objective is at most above its least value (see `kl_fit`), and
        `passes` over the rows so far: one that sets up, and one for each place where its search looked.

    Raises:
        ChassisError: an unknown `how`, steps below 1, no positive rate, or an adapter that is not of logits at the
            final layer.
    """
    course = []
    for reached in refined(a, start, how, steps, rate):
        course.append(reached[1])
    return reached[0], pd.DataFrame(course)


def refined(
    a: Activations, start: Adapter, how: str, steps: int = 50, rate: float = 1.0
) -> Iterator[tuple[Adapter, dict[str, float]]]:
    """As `refine`, every adapter on the way with its row of the course, the start first."""
    if how not in REFINERS:
        raise ChassisError(f"no refinement '{how}': choose from {', '.join(REFINERS)}")
    if steps < 1 or not rate > 0:
        raise ChassisError(f"steps = {steps}, rate = {rate}: take at least one step, and a rate above zero")
    rows = Rows(a, start)
    state = {place: a.layer(place).to(a.base.device) for place in {a.final, *start.reads}}
    nothing = {"seconds": 0.0} | dict.fromkeys(("gradient", "within", "passes"), math.nan)
    yield start, {"step": 0, "kl": rows.kl(start.logits(a.base, state, rows.base))} | nothing
    seconds, clock = 0.0, time.perf_counter()
    for step, adapter in enumerate(REFINERS[how](rows, start, steps, rate), 1):
        # What it costs to look is not counted.
        seconds += time.perf_counter() - clock
        told = {"step": step, "kl": rows.kl(adapter.logits(a.base, state, rows.base)), "seconds": seconds}
        told |= {name: adapter.info.get(name, math.nan) for name in ("gradient", "within", "passes")}
        told["seconds"] = adapter.info.get("seconds", seconds)  # one that takes all its steps first tells of each
        yield replace(adapter, method=how, fitted_on=a.probes.fingerprints, values=None), told
        clock = time.perf_counter()


def _adam(rows: Rows, start: Adapter, steps: int, rate: float, batch: int = 32) -> Iterator[Adapter]:
    draw = torch.Generator().manual_seed(0)
    size = start.down.norm(dim=0)
    parts = [start.down / size, (size * start.up.norm(dim=1)).log(), start.up / start.up.norm(dim=1)[:, None]]
    u, log_s, v, d = parts = [part.clone().requires_grad_() for part in (*parts, start.bias)]
    columns = torch.arange(rows.base.shape[1]) if start.columns is None else start.columns
    optimizer = torch.optim.Adam(parts, lr=rate)
    for _ in range(steps):
        for some in torch.randperm(len(rows.x), generator=draw).to(rows.x.device).split(batch):
            change = (rows.x[some] @ u * log_s.exp()) @ v + d
            ours = rows.base[some].index_add(1, columns.to(rows.x.device), change).log_softmax(-1)
            optimizer.zero_grad()
            torch.nn.functional.kl_div(ours, rows.p[some], reduction="batchmean").backward()
            optimizer.step()
        with torch.no_grad():
            yield replace(start, down=u * log_s.exp(), up=v.clone(), bias=d.clone())


def _from_dense(start: Adapter, whole: torch.Tensor) -> Adapter:
    down = torch.eye(len(whole) - 1, device=whole.device)
    return replace(start, down=down, up=whole[:-1].float(), bias=whole[-1].float(), columns=None)


def _bohning(rows: Rows, start: Adapter, steps: int, rate: float, momentum: bool = False) -> Iterator[Adapter]:
    """`W += 2 (X'X)^-1 X'(P - softmax(base + XW))`, as `diag(p) - pp' <= I/2` (:cite:`bohning1992multinomial`)."""
    x = rows.with_one
    second = x.double().T @ x.double()
    # Only against a singular matrix; the bound holds for anything larger too.
    factor = torch.linalg.cholesky(second + 1e-9 * second.diagonal().max() * torch.eye(len(second), device=x.device))
    here = look = rows.dense(start)
    age, best = 1.0, math.inf
    for _ in range(steps):
        while True:
            wrong = rows.p - (rows.base + x @ look.float()).softmax(-1)
            there = look + 2 * torch.cholesky_solve((x.T @ wrong).double(), factor)
            reached = rows.kl(rows.base + x @ there.float()) if momentum else -math.inf
            if reached <= best or age == 1.0:
                break
            look, age = here, 1.0
        older, age = age, (1 + (1 + 4 * age * age) ** 0.5) / 2 if momentum else 1.0
        look, here, best = there + (older - 1) / age * (there - here), there, reached
        yield _from_dense(start, here)


def _lbfgs(rows: Rows, start: Adapter, steps: int, rate: float, span: bool = False) -> Iterator[Adapter]:
    x = rows.with_one
    # In the data's own metric every direction counts alike, and the search needs far fewer steps.
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    root = values.clamp(min=1e-9 * float(values.max())).sqrt()
    z = (x.double() @ (vectors / root)).float()
    theta = root[:, None] * (vectors.T @ rows.dense(start))
    basis = None
    if span:
        # Orthonormal rows that span both heads: where the closed form lies, and far fewer numbers than all columns.
        _, size, basis = torch.linalg.svd(rows.both.to(x.device), full_matrices=False)
        basis = basis[size > 1e-6 * size.max()]
        theta = theta @ basis.T
    theta.requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=1, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        # Sums are long and the line search compares small differences: float64 for both.
        change = z @ theta.float() if basis is None else (z @ theta.float()) @ basis.float()
        value = -vecdot(rows.p, (rows.base + change).log_softmax(-1)).double().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
        with torch.no_grad():
            whole = (vectors / root) @ (theta if basis is None else theta @ basis)
            yield replace(_from_dense(start, whole), info=start.info | {"gradient": float(theta.grad.norm())})


def _near(rows: Rows, start: Adapter, steps: int, rate: float) -> Iterator[Adapter]:
    """The least KL that is not far from the start, which may know more rows than these."""
    both = rows.both.float().to(rows.x.device)
    own = rows.base + rows.with_one @ rows.dense(start).float()
    up, bias = (rows.full(start, some) for some in (start.up, start.bias[None]))
    up, adapters, read, clock = torch.cat([up, both]), [], 0, time.perf_counter()

    def given(some: slice) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal read
        read += some.stop - some.start
        return own[some], rows.p[some]

    def seen(weight: torch.Tensor, more: torch.Tensor, within: float) -> None:
        parts = {"down": torch.cat([start.down, weight.float()], 1), "up": up, "bias": (bias + more.float() @ both)[0]}
        told = {"within": within, "passes": read // len(own), "seconds": time.perf_counter() - clock}
        adapters.append(replace(start, **parts, columns=None, info=start.info | told))

    kl_fit(rows.x, given, both, rate, seen, steps)
    # No step is left to take from the optimum itself.
    yield from adapters or [replace(start, info=start.info | {"within": 0.0, "passes": read // len(own)})]


def last_block(final: int) -> Features:
    """The last two layers, and what every linear map of the block between them reads."""
    return Features((final, final - 1, f"block {final - 1}"))


def families(final: int, random: int = 512, seed: int = 0) -> dict[str, Features]:
    """What a map at the end may read, beside the final state alone, of a model with so many layers."""
    near = f"block {final - 1}"
    drawn = ("relu", "fourier", "square")
    return {"last_block": last_block(final), "layers": Features((*range(final + 1), near))} | {
        kind: Features((*range(final + 1), near), random=random, kind=kind, seed=seed) for kind in drawn
    }


REFINERS: dict[str, Refiner] = {
    "adam": _adam,
    "bohning": _bohning,
    "accelerated": lambda *settings: _bohning(*settings, momentum=True),
    "lbfgs": _lbfgs,
    "span": lambda *settings: _lbfgs(*settings, span=True),
    "near": _near,
}
