"""How fast this machine is at each kind of work, and what the stages of a real fit took: both measured, one thread."""

from __future__ import annotations

import cProfile
import ctypes
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaModel

from chassis_utils import metrics
from chassis_utils.statistics import KEPT
from costs import BATCH, KINDS, Rates, Shape, shape

ROWS = 1024  # of the matrices multiplied
LENGTH = 100  # tokens of a prompt, in passes of as many as `gather` takes at once
VOCAB = 8192  # columns of the heads multiplied
MOVED = (1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)  # numbers
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


@contextmanager
def one_thread() -> Iterator[None]:
    """Nothing runs beside, so that the processor's time is that of one thread; and freed memory is kept, see `keep`."""
    keep()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep() -> bool:
    """Tell glibc to keep what this process frees instead of giving it back; False where there is no glibc.

    Pages asked for anew are filled with zeros first: that costs as much as the work done on them, and whether it
    happens depends on all that was freed before. `MALLOC_TRIM_THRESHOLD_=-1` and `MALLOC_MMAP_MAX_=0` do the same from
    outside.
    """
    try:
        told = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(told(M_TRIM_THRESHOLD, -1) and told(M_MMAP_MAX, 0))


def timed(call: Callable[[], object], least: float = 0.1, most: int = 15) -> float:
    """Median of the processor's seconds of a call, three times or as often as fill `least` seconds, after a first."""
    times: list[float] = []
    call()
    while len(times) < 3 or (sum(times) < least and len(times) < most):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def body(hidden: int) -> tuple[LlamaModel, Shape]:
    """Two blocks of a Llama with random weights in TinyLlama's proportions, and their sizes."""
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8), vocab_size=1024, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel(config).eval().requires_grad_(False), shape(config)


def _products(size: int, passes: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """Kind -> a call on matrices of this size, and its amount."""
    x = torch.randn(ROWS, size, dtype=torch.float64)
    gram, y = x.T @ x + torch.eye(size), torch.randn(size, 2 * size, dtype=torch.float64)
    total, head, states = torch.zeros(size, size, dtype=torch.float64), torch.randn(size, VOCAB), x.float()
    found = {
        "readout": (lambda: states @ head, 2.0 * ROWS * size * VOCAB),
        "product": (lambda: total.addmm_(x.T, x), 2.0 * ROWS * size * size),
        "cholesky": (
            lambda: torch.cholesky_solve(y, torch.linalg.cholesky_ex(gram)[0]), size**3 / 3 + 4.0 * size**3
        ),
        "eigen": (lambda: torch.linalg.eigh(gram), float(size) ** 3),
    }  # fmt: skip
    if not passes:
        return found
    model, sizes = body(size)
    ids = torch.randint(1024, (BATCH // LENGTH, LENGTH))
    mask = torch.ones_like(ids)
    mask[::2, -1] = 0  # without padding attention takes another kernel, and real prompts have some

    def passed() -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask, use_cache=False)

    return found | {"forward": (passed, sizes.forward(ids.numel(), LENGTH))}


def calibrated(
    sizes: Sequence[int], least: float = 0.1, moved: Sequence[int] = MOVED, most: int = 1 << 62, rounds: int = 2
) -> Rates:  # fmt: skip
    """Rates of every kind of work: products at these sizes, passes at those up to `most`, moves of so many numbers.

    All on values and shapes that no check uses. Of several rounds the middle rate counts, of two the higher one, as
    what else runs on a machine can only lower it.
    """
    with one_thread():
        several = [_round(sorted(sizes), least, moved, most) for _ in range(rounds)]
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for kind, size in several[0]:
        found[kind].append((size, statistics.median_high(one[kind, size] for one in several)))
    return Rates("this machine, one thread", found)


def _round(sizes: Sequence[int], least: float, moved: Sequence[int], most: int) -> dict[tuple[str, float], float]:
    """Amount a second by kind and size, measured once."""
    found = {}
    for size in sizes:
        for kind, (call, amount) in _products(size, size <= most).items():
            found[kind, float(size)] = amount / timed(call, least)
    for numbers in moved:
        fresh = torch.randn(numbers, dtype=torch.float64)
        turned = fresh.view(VOCAB, -1).T
        found["stream", float(numbers)] = 24.0 * numbers / timed(lambda fresh=fresh: fresh + fresh, least)
        found["turn", float(numbers)] = numbers / timed(lambda turned=turned: torch.cat([turned]), least)
    found["test", 1.0] = numbers / timed(lambda: torch.isfinite(fresh).all(), least)
    logits = torch.randn(KEPT, VOCAB)
    found["compare", 1.0] = logits.numel() / timed(lambda: metrics.kl(logits, logits), least)
    return found


#: Stage -> the package's functions that it is spent in, less what these themselves call of others.
_SPENT = {
    "forward": (("states",), ()),
    "rows": (("gather",), ("states", "update", "sizes", "checked_ids", "batched")),
    "sums": (("update",), ()),
    "ridge": (("ridge", "error"), ()),
    "cut": (("low_rank", "column_weights", "heads"), ()),
    "judging": (("_read_out",), ("_ridges", "scaled_ridge", "heads", "low_rank", "column_weights", "assembled")),
}


def spent(call: Callable[[], object]) -> dict[str, float]:
    """Processor's seconds of one call by stage, and as `all else` what no stage has; read off a profile."""
    profile = cProfile.Profile(time.process_time)
    with one_thread():
        profile.runcall(call)
    stats, took, within = pstats.Stats(profile), defaultdict(float), defaultdict(float)
    for (file, _, name), (_, _, _, cumulative, callers) in stats.stats.items():
        if "chassis_utils" in file:
            took[name] += cumulative
            for (_, _, caller), (_, _, _, seconds) in callers.items():
                within[caller, name] += seconds
    found = {
        stage: sum(took[one] - sum(within[one, other] for other in others) for one in own)
        for stage, (own, others) in _SPENT.items()
    }
    return found | {"all else": stats.total_tt - sum(found.values())}
