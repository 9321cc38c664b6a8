"""The solver against brute force: streaming, ridge, low rank."""

import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis_utils import Gram, ridge
from chassis_utils.solve import effective_rank, low_rank

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**16)


def draw(seed: int, n: int = 60, p: int = 8, q: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of uneven scale, off centre, float32 as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator) * torch.logspace(-1, 1, p) + 3
    y = x @ torch.randn(p, q, generator=generator) + torch.randn(n, q, generator=generator)
    return x, y


def assert_same(one: Gram, other: Gram) -> None:
    assert one.n == other.n
    for name in ("x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-9)


@few
@given(seeds, st.lists(st.integers(0, 60), max_size=6), st.integers(0, 60), st.randoms())
def test_streaming_in_any_split_equals_all_at_once(seed: int, cuts: list[int], half: int, random: object) -> None:
    x, y = draw(seed)
    whole = Gram.of(x, y)
    edges = [0, *sorted(cuts), len(x)]
    pieces = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    random.shuffle(pieces)
    streamed = Gram.zeros(8, 5)
    for piece in pieces:
        streamed.update(x[piece], y[piece])
    assert_same(streamed, whole)
    assert_same(Gram.of(x[:half], y[:half]) + Gram.of(x[half:], y[half:]), whole)

    a, b = x.double().numpy(), y.double().numpy()
    a, b = a - a.mean(0), b - b.mean(0)
    np.testing.assert_allclose(whole.covariance, a.T @ a, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.cross, a.T @ b, rtol=1e-9, atol=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(0)
    whole = Gram.of(x, y)
    monkeypatch.setattr("chassis_utils.solve.BLOCK", 7)
    assert_same(Gram.of(x, y), whole)


def test_merging_leaves_both_sides_as_they_were() -> None:
    x, y = draw(0)
    one, other = Gram.of(x[:20], y[:20]), Gram.of(x[20:], y[20:])
    before = one.xx.clone()
    (one + other).update(x, y)
    assert one.n == 20 and torch.equal(one.xx, before)


@few
@given(seeds, st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
def test_ridge_solves_the_augmented_least_squares(seed: int, lam: float) -> None:
    x, y = draw(seed)
    weight, bias = ridge(Gram.of(x, y), lam)
    a, b = x.double().numpy(), y.double().numpy()
    rows = np.vstack([a - a.mean(0), np.sqrt(lam) * np.eye(8)])
    wanted = np.linalg.lstsq(rows, np.vstack([b - b.mean(0), np.zeros((8, 5))]), rcond=None)[0]
    np.testing.assert_allclose(weight, wanted, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(bias, b.mean(0) - a.mean(0) @ wanted, rtol=1e-7, atol=1e-6)


@few
@given(seeds, st.floats(1e-3, 10))
def test_no_neighbour_of_the_ridge_solution_is_better(seed: int, lam: float) -> None:
    x, y = (t.double() for t in draw(seed))
    weight, bias = ridge(Gram.of(x, y), lam)

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        return float((x @ w + b - y).square().sum() + lam * w.square().sum())

    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1):
        step = size * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        shift = size * torch.randn(bias.shape, generator=generator, dtype=torch.float64)
        for sign in (-1, 1):
            assert loss(weight + sign * step, bias) > loss(weight, bias)
            assert loss(weight, bias + sign * shift) > loss(weight, bias)


def test_fewer_rows_than_dimensions_is_warned_about_with_the_effective_rank() -> None:
    x, y = draw(0, n=6)
    centred = x.double() - x.double().mean(0)
    values = torch.linalg.svdvals(centred) ** 2
    spanned = float(values.sum() ** 2 / (values**2).sum())
    assert effective_rank(centred.T @ centred) == pytest.approx(spanned)
    with pytest.warns(UserWarning, match=rf"6 rows for 8 dimensions \(effective rank {spanned:.1f}\)"):
        ridge(Gram.of(x, y))


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3)


@few
@given(seeds, st.booleans())
def test_plain_low_rank_is_the_truncated_svd(seed: int, wide: bool) -> None:
    weight = draw(seed, n=9, p=6)[0].double() - 3
    weight = weight.T if wide else weight
    down, up, values = low_rank(weight)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(values, s)
    assert down.shape == (len(weight), 6) and up.shape == (6, weight.shape[1])
    for r in range(1, 7):
        torch.testing.assert_close(down[:, :r] @ up[:r], (u[:, :r] * s[:r]) @ v[:r], atol=1e-7, rtol=1e-7)


@few
@given(seeds)
def test_discarded_values_are_the_lost_error_and_no_cut_is_better(seed: int) -> None:
    x, y = draw(seed)
    gram = Gram.of(x, y)
    weight, _ = ridge(gram)
    metric = gram.covariance
    down, up, values = low_rank(weight, metric)
    plain_down, plain_up, _ = low_rank(weight)

    def lost(cut: torch.Tensor) -> float:
        return float(((weight - cut).T @ metric @ (weight - cut)).trace())

    for r in range(1, 6):
        ours = lost(down[:, :r] @ up[:r])
        assert ours == pytest.approx(float(values[r:].square().sum()), rel=1e-6, abs=1e-6)
        assert ours <= lost(plain_down[:, :r] @ plain_up[:r]) + 1e-6
    # The scales differ by a hundred, so the plain cut keeps the wrong directions.
    assert lost(down[:, :1] @ up[:1]) < 0.99 * lost(plain_down[:, :1] @ plain_up[:1])


def test_a_metric_without_full_rank_loses_nothing_that_the_rows_can_see() -> None:
    x, y = draw(0)
    x[:, 4:] = x[:, :4]
    gram = Gram.of(x, y)
    weight, _ = ridge(gram)
    down, up, _ = low_rank(weight, gram.covariance)
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(centred @ down @ up, centred @ weight, atol=1e-5, rtol=1e-5)


def test_unusable_rows_are_refused() -> None:
    x, y = draw(0)
    with refused("59", "60"):
        Gram.of(x[:59], y)
    for bad in ([torch.nan], [torch.inf], [torch.inf, -torch.inf]):
        spoilt = y.clone()
        spoilt[17 : 17 + len(bad), 2] = torch.tensor(bad).to(y)
        with refused("NaN or infinity"):
            Gram.of(x, spoilt)


@few
@given(seeds, st.integers(2, 8))
@pytest.mark.filterwarnings("ignore:.*interpolates")
def test_a_singular_system_is_refused_without_penalty(seed: int, n: int) -> None:
    x, y = draw(seed, n=n)
    gram = Gram.of(x, y)
    with refused("singular", "lam = 0", f"{n} rows"):
        ridge(gram, lam=0)
    ridge(gram, lam=1e-3)


def test_repeated_columns_are_a_singular_system() -> None:
    x, y = draw(0)
    x[:, 7] = x[:, 0]
    with refused("singular"):
        ridge(Gram.of(x, y), lam=0)


@pytest.mark.parametrize("lam", [-1e-3, float("nan")])
def test_a_penalty_that_is_none_is_refused(lam: float) -> None:
    with refused("lam"):
        ridge(Gram.of(*draw(0)), lam)
