"""Streaming statistics and what is solved from them: closed forms, and one descent that says how far off it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch.nn.functional import cross_entropy

from .errors import ChassisError

BLOCK = 4096  # rows cast to float64 at a time
STRIP = 256  # columns multiplied at a time
LOGITS = 2_000_000  # logits a block
ROWS = 256  # rows whose logits are held at a time where what is compared is solved from
COLUMNS = 4096  # of heads, made at a time


@dataclass
class Gram:
    """Sums over rows of `x (n, p)` and `y (n, q)`, in float64: enough for every linear fit of y on x."""

    n: int
    x: torch.Tensor  #: `(p,)` sum of x
    y: torch.Tensor  #: `(q,)` sum of y
    xx: torch.Tensor  #: `(p, p)` sum of x x'
    xy: torch.Tensor  #: `(p, q)` sum of x y'

    @classmethod
    def zeros(cls, p: int, q: int, device: torch.device | str = "cpu") -> Gram:
        """No rows yet."""
        return cls(0, *(torch.zeros(*s, dtype=torch.float64, device=device) for s in ((p,), (q,), (p, p), (p, q))))

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, device: torch.device | None = None) -> Gram:
        """Statistics of all rows at once (streamed in blocks inside), where the rows are unless told."""
        return cls.zeros(x.shape[1], y.shape[1], device or x.device).update(x, y)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> Gram:
        """Add rows `x (n, p)`, `y (n, q)`; returns itself. ChassisError: NaN, infinity, or numbers of rows differ."""
        if len(x) != len(y):
            raise ChassisError(f"{len(x)} rows of x but {len(y)} of y")
        for start in range(0, len(x), BLOCK):
            a, b = (part[start : start + BLOCK].to(self.xx) for part in (x, y))
            sums = [part.sum(0) for part in (a, b)]
            if not torch.cat(sums).isfinite().all():
                raise ChassisError(f"rows from {start} on hold NaN or infinity: harvest again in float32")
            self.n, self.x, self.y = self.n + len(a), self.x + sums[0], self.y + sums[1]
            # The upper half alone is multiplied, strip by strip, then mirrored.
            for left in range(0, a.shape[1], STRIP):
                strip = slice(left, left + STRIP)
                self.xx[strip, left:].addmm_(a[:, strip].T, a[:, left:])
                self.xx[left + STRIP :, strip] = self.xx[strip, left + STRIP :].T
            self.xy.addmm_(a.T, b)
        return self

    def __add__(self, other: Gram) -> Gram:
        """Statistics of both sets of rows."""
        return Gram(self.n + other.n, *(getattr(self, f) + getattr(other, f).to(self.x) for f in "x y xx xy".split()))

    def part(self, columns: torch.Tensor) -> Gram:
        """Only those columns of x."""
        return Gram(self.n, self.x[columns], self.y, self.xx[columns[:, None], columns], self.xy[columns])

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Sum of `|y - x W - b|^2` over the rows, less the sum of `|y|^2`, which no fit changes."""
        squares = (weight * (self.xx @ weight)).sum() + 2 * bias @ (self.x @ weight) + self.n * bias @ bias
        return float(squares - 2 * ((weight * self.xy).sum() + bias @ self.y))

    @property
    def covariance(self) -> torch.Tensor:
        """`(p, p)` centred sum of squares, `Xc' Xc`."""
        return torch.addr(self.xx, self.x, self.x, alpha=-1 / self.n)

    @property
    def cross(self) -> torch.Tensor:
        """`(p, q)` centred cross product, `Xc' Yc`."""
        return torch.addr(self.xy, self.x, self.y, alpha=-1 / self.n)


def effective_rank(covariance: torch.Tensor) -> float:
    """`(trace)^2 / trace of squares` of a covariance `(p, p)`: how many directions the data really spans."""
    return float((covariance.trace() / covariance.norm()) ** 2)


def ridge(gram: Gram, lam: float = 1e-3, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`W (p, q) = (Xc'Xc + lam I)^-1 Xc'Yc` and `b (q,) = mean(y) - mean(x) W`, in float64.

    Source: the study's `ridge`; lam is added to the sum of squares, not to the mean. `scale (p,)` stands for I's ones.
    ChassisError: lam is negative, or the system is singular (lam too small for these rows).
    """
    if not 0 <= lam < float("inf"):
        raise ChassisError(f"lam = {lam}: give a finite number of at least zero")
    factor = gram.covariance  # made into its factor: there may be no room for both
    p = len(factor)
    if gram.n <= p:
        spanned = f"{gram.n} rows for {p} dimensions (effective rank {effective_rank(factor):.1f})"
        warnings.warn(f"{spanned}: the fit interpolates", stacklevel=3)
    factor.diagonal().add_(lam if scale is None else lam * scale)
    factor, info = torch.linalg.cholesky_ex(factor)
    # Without a penalty, rounding may let a singular matrix through with a last pivot of its own size.
    lost = factor.diagonal() ** 2 < p * torch.finfo(torch.float64).eps * gram.xx.diagonal()
    if int(info) != 0 or (lam == 0 and (gram.n <= p or lost.any())):
        raise ChassisError(f"the system is singular at lam = {lam:g} with {gram.n} rows of {p} dimensions: raise lam")
    weight = torch.cholesky_solve(gram.cross, factor)
    return weight, (gram.y - gram.x @ weight) / gram.n


def scaled_ridge(gram: Gram, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`ridge` after every column of x is scaled to unit variance, lam being a share of the n rows.

    For features of different size side by side, which one absolute lam would not treat alike.
    """
    size = (gram.xx.diagonal() / gram.n - (gram.x / gram.n) ** 2).clamp(min=0).sqrt()
    # A column that never changes tells nothing: it stays as small as it is.
    size = size.clamp(min=1e-6 * float(size.max().clamp(min=1e-30)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows fewer than columns: here lam is chosen on other rows
        # The same as scaling x itself, without a copy of the squares; Cholesky does not mind the scale of a column.
        return ridge(gram, lam * gram.n, size.square())


@dataclass(frozen=True)
class Heads:
    """`J (k, vocab)`: heads one above the other, less a mean, by columns: never whole in float64."""

    parts: tuple[tuple[float, torch.Tensor], ...]  #: Factor and weight `(vocab, hidden)` of each
    mean: torch.Tensor | None = None  #: `(k, 1)`, taken from every column
    device: torch.device | str = "cpu"  #: Where columns are made and multiplied: that of the sums

    def __iter__(self) -> Iterator[torch.Tensor]:
        for strips in zip(*(weight.split(COLUMNS) for _, weight in self.parts), strict=True):
            some = [f * own.T.to(self.device, torch.float64) for (f, _), own in zip(self.parts, strips, strict=True)]
            yield torch.cat(some) if self.mean is None else torch.cat(some).sub_(self.mean)

    def __rmatmul__(self, left: torch.Tensor) -> torch.Tensor:
        """`left (..., k) @ J`, `(..., vocab)`, float32."""
        found = left.new_empty(*left.shape[:-1], len(self.parts[0][1]), dtype=torch.float32)
        for into, some in zip(found.split(COLUMNS, -1), self, strict=True):
            into.copy_(left.double() @ some)
        return found

    def centred(self) -> Heads:
        """Less their mean over the vocabulary: a constant there changes no probability."""
        means = [factor * own.mean(0, dtype=torch.float64).to(self.device) for factor, own in self.parts]
        return Heads(self.parts, torch.cat(means)[:, None], self.device)

    def squares(self, columns: torch.Tensor | None = None) -> torch.Tensor:
        """`J D J' (k, k)` for weights `D (vocab,)` of the columns."""
        weights = repeat(1.0) if columns is None else columns.to(self.device, torch.float64).split(COLUMNS)
        return sum((some * weight) @ some.T for some, weight in zip(self, weights, strict=False))


def low_rank(
    weight: torch.Tensor, metric: torch.Tensor | None = None,
    basis: Heads | None = None, columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Factors of `weight (p, k) @ basis (k, q)` whose first r columns are its best rank-r approximation, for every r.

    Without a metric that is the SVD. With the squares `C = x'x (p, p)` of x it is reduced-rank regression: the SVD of
    `C^(1/2) weight`, and the squares it discards are what a cut changes in the fitted values, the intercept kept
    (:cite:`izenman1975reduced`). With weights `D (q,)` of the columns it is `C^(1/2) weight basis D^(1/2)`. Only
    matrices of the sizes of p and k are decomposed, never q x q; no basis is the unit matrix. Returns `down (p, m)`,
    `up (m, q)`, singular values `(m,)`, m = min(p, k), largest first; float64, but `up` float32 behind a basis.
    """
    weight, root, back = weight.double(), None, None
    if basis is not None:
        values, vectors = torch.linalg.eigh(basis.squares(columns))
        # Directions that no column sees cannot be told apart from rounding.
        keep = values > values.max() * 1e-14
        size, vectors = values[keep].sqrt(), vectors[:, keep]
        weight, back = weight @ (vectors * size), (vectors / size).T
    if metric is not None and weight.shape[0] > weight.shape[1]:
        squares, right = torch.linalg.eigh(weight.T @ (metric.to(weight) @ weight))
        right, values = right.flip(1), squares.flip(0).clamp(min=0).sqrt()
        up = right.T if back is None else (right.T @ back) @ basis
        return weight @ right, up, values
    if metric is not None:
        values, vectors = torch.linalg.eigh(metric.to(weight))
        # Directions without data cannot be seen in the fit; they get no part in the factors.
        keep = values > values.max() * 1e-14
        size, vectors = values[keep].sqrt(), vectors[:, keep]
        weight, root = (vectors * size) @ vectors.T @ weight, (vectors / size) @ vectors.T
    squares, left = torch.linalg.eigh(weight @ weight.T)
    order = squares.argsort(descending=True)[: min(weight.shape)]
    left, values = left[:, order], squares[order].clamp(min=0).sqrt()
    up = left.T @ weight
    return left if root is None else root @ left, up if back is None else (up @ back) @ basis, values


def kl_fit(
    x: torch.Tensor, given: Callable[[slice], tuple[torch.Tensor, torch.Tensor]], basis: torch.Tensor, lam: float,
    seen: Callable[[torch.Tensor, torch.Tensor, float], bool | None],
    passes: int = 10, cap: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> None:  # fmt: skip
    """From no change towards the affine map of least KL that is not far from none.

    Logits are `cap(own + (x W + b) basis)`. What is minimised over `W (p, k)` and `b (k,)` is the mean KL plus half of
    `lam` times the squared size of both, each column of x at unit mean square and the output measured in the
    KL's own curvature `F = mean basis (diag(p) - p p') basis'`, p the target, floored at 1e-4 of its largest value. In
    the coordinates `(C + lam I)^(1/2) . F^(1/2)` the curvature is near the unit matrix (:cite:`martens2015optimizing`),
    so that L-BFGS (:cite:`liu1989limited`) takes few passes over the rows. Without a cap the objective is as strongly
    convex as the penalty: nowhere lower by more than the gradient's squared norm in the penalty's metric over `2 lam`.

    `x` is `(n, p)`, `basis (k, q)`; `given` takes a slice of the rows to their `own` logits and target probabilities,
    `(m, q)` each; `seen`, called after each step with `W`, `b` and that bound in nats, ends the search by True.
    `passes` are steps at most, and the one that sets up F is another. `lam` is above zero.
    """
    parts = torch.arange(len(x)).split(max(1, LOGITS // basis.shape[1]))
    blocks = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
    n, size = len(x), x.double().square().mean(0).sqrt()
    size = torch.cat([size.clamp(min=1e-6 * float(size.max().clamp(min=1e-30))), size.new_ones(1)])[:, None]
    gram = Gram.of(x, x.new_ones(n, 1))
    second = torch.cat([torch.cat([gram.xx, gram.xy], 1), torch.cat([gram.xy.T, gram.y.new_full((1, 1), n)], 1)]) / n
    values, vectors = torch.linalg.eigh(second / size / size.T)
    left = (vectors / (values.clamp(min=0) + lam).sqrt()) @ vectors.T
    curvature, entropy = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=x.device), 0.0
    for block in blocks:
        p = given(block)[1]
        entropy += float(torch.special.entr(p).sum(dtype=torch.float64))
        mean = p @ basis.T
        curvature += ((basis * p.sum(0)) @ basis.T - mean.T @ mean).double() / n
    values, vectors = torch.linalg.eigh(curvature)
    right = (vectors / values.clamp(min=1e-4 * float(values[-1])).sqrt()).T
    bounds: list[float] = []

    def affine(point: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        moved = left @ torch.from_numpy(point).view(len(left), len(right)).to(left)
        whole = moved @ right / size
        return moved, whole[:-1], whole[-1]

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        moved, *parts = affine(point)
        weight, bias = (part.float().requires_grad_() for part in parts)
        total = 0.0
        for block in blocks:
            own, target = given(block)
            with torch.enable_grad():
                part = cross_entropy(cap(own + (x[block] @ weight + bias) @ basis), target, reduction="sum")
                part.backward()
            total += float(part.detach())
        slope = torch.cat([weight.grad.double(), bias.grad.double()[None]]) / size / n @ right.T + lam * moved
        bounds.append(float(slope.square().sum()) / (2 * lam))
        return (total - entropy) / n + lam / 2 * float(moved.square().sum()), (left @ slope).flatten().cpu().numpy()

    def after(intermediate_result: OptimizeResult) -> None:
        if seen(*affine(intermediate_result.x)[1:], bounds[-1]):
            raise StopIteration
    options = {"maxiter": passes, "ftol": 0, "gtol": 0}
    minimize(loss, np.zeros(len(left) * len(right)), jac=True, method="L-BFGS-B", callback=after, options=options)
