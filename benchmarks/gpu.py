"""What a fit takes on a GPU at the true dimensions of models, on random weights; `README.md` says what and how.

python benchmarks/gpu.py [--parts same rates tinyllama v2 wide] [--tokens 131072] [--device cuda]
"""

import argparse
import statistics as numbers
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import RANKS, bare, command, keep, setting, whole
from scale import LENGTH, SHAPES, TINYLLAMA, Shape, random_model, turned, words

from chassis_utils import ChassisError, Features, LanguageModel, evaluate, fit, gather, harvest, load, probe_set
from chassis_utils import adapter as adapters
from chassis_utils import statistics as summed
from costs import PASSES

RESULTS = Path(__file__).parents[1] / "notebooks" / "gpu.json"
PARTS = ("same", "rates", "tinyllama", "v2", "wide")
METHODS = ("v2", "rrr", "ridge", "lens", "v1")
JUDGED = 1 / 8  # tokens of the table, over those fitted
PROCESSOR = torch.device("cpu")


def waited(device: torch.device) -> float:
    """The clock, once the card has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(call: Callable[[], object], device: torch.device, times: int = 3) -> dict[str, Any]:
    """Seconds by the clock of so many calls, their median, and the peak of the card's memory beyond what was held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    seconds = []
    for _ in range(times):
        start = waited(device)
        call()
        seconds.append(waited(device) - start)
    row: dict[str, Any] = {"seconds": numbers.median(seconds), "all": seconds}
    if device.type == "cuda":
        row |= {"held_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated(device) - held}
    return row


def models(shape: Shape, device: torch.device) -> tuple[LanguageModel, LanguageModel]:
    """A base with random weights in bfloat16, and an expert of its shape that shares its blocks."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            base = random_model(shape)
            return base, turned(base)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def on_the_processor() -> Iterator[None]:
    """Sums and solves where a machine without double precision on its GPU would have them."""
    with patch.object(summed, "room", lambda *_: PROCESSOR), patch.object(adapters, "room", lambda *_: PROCESSOR):
        yield


def same(device: torch.device, _: int) -> list[dict[str, Any]]:
    """KL on validation text of adapters fitted on the card, on the processor, and on the card again: pocket models."""
    found, kls = [], {}
    train, val = probe_set("math-text"), probe_set("math-text", "val")
    for run, where in (("card", device), ("processor", PROCESSOR), ("again", device)):
        base, expert = (load(name, device=str(where)) for name in ("pocket-base", "pocket-math"))
        rows = harvest(base, expert, train, "all", progress=False)
        for name in METHODS:
            table = evaluate(base, expert, fit(rows, name).at_rank(32), val)
            kls[name, run] = table.kl.iloc[-1]
    for name in METHODS:
        card, other, again = (float(kls[name, run]) for run in ("card", "processor", "again"))
        gaps = {"against_processor": card / other - 1, "against_again": card / again - 1}
        found.append({"method": name, "kl": card} | gaps)
    return found


def rates(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """Operations a second of what a fit is made of."""
    found = []

    def add(name: str, size: int, work: float, call: Callable[[], object]) -> None:
        call()
        row = timed(call, device, 5)
        found.append({"what": name, "size": size, "rate": work / row["seconds"], "seconds": row["seconds"]})

    for size in (2048, 4096, 8192):
        half = torch.randn(8192, size, device=device, dtype=torch.bfloat16)
        add("product, bfloat16", size, 2.0 * 8192 * size * size, lambda half=half: half @ half[: half.shape[1]])
        plain = half.float()
        add("product, float32", size, 2.0 * 8192 * size * size, lambda plain=plain: plain @ plain[: plain.shape[1]])
        x = torch.randn(8192, size, device=device, dtype=torch.float64)
        square = x.T @ x
        add("product, float64", size, 2.0 * 8192 * size * size, lambda x=x: x.T @ x)
        add("Cholesky, float64", size, size**3 / 3, lambda square=square: torch.linalg.cholesky_ex(square))
        add("eigenproblem, float64 (cubes)", size, float(size) ** 3, lambda square=square: torch.linalg.eigh(square))
    many = torch.randn(1 << 28, device=device)
    add("bytes copied", 1 << 28, 8.0 * (1 << 28), lambda: many.clone())
    return found


def family(
    base: LanguageModel, expert: LanguageModel, shape: Shape, tokens: int, ways: Sequence[str], times: int = 3
) -> list[dict[str, Any]]:
    """The final-layer family by the public calls, and the bare passes of both models over the same text."""
    device = base.device
    train, held_out = words(shape, tokens, 2), words(shape, int(tokens * JUDGED), 3)
    batches = [{k: t.to(device) for k, t in batch.items()} for batch in whole(base, [train, held_out])]
    both, features, found = (base, expert), Features((base.num_layers,)), {}
    rows = []

    def add(name: str, call: Callable[[], object], times: int = times) -> None:
        rows.append({"stage": name, "layers": shape.layers, "tokens": tokens} | timed(call, device, times))
        print(f"{rows[-1]['seconds']:9.2f} s  {name}", flush=True)

    def gathered() -> None:
        found.update(sums=gather(base, expert, train, features, progress=False))

    def fitted() -> None:
        found.update(adapter=fit(found["sums"]))

    def judged() -> None:
        rows = harvest(base, expert, held_out, "all", [-1], progress=False)
        evaluate(base, expert, [found["adapter"].at_rank(rank) for rank in RANKS], rows)

    bare([one.model for one in both], batches[:1])
    add("bare passes of both models", lambda: bare([one.model for one in both], batches))
    add(PASSES, lambda: bare([one.backbone for one in both], batches))
    for way in ways:
        where = f", sums on the {way}"
        with on_the_processor() if way == "processor" else nullcontext():
            add(f"gather{where}", gathered, 1 if way == "processor" else times)
            add(f"fit{where}", fitted, 1 if way == "processor" else times)
    add(f"held-out passes and table of {len(RANKS)} ranks", judged)
    return rows


def tinyllama(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """TinyLlama's own dimensions, all 22 blocks."""
    both = models(TINYLLAMA, device)
    return [
        *family(*both, TINYLLAMA, tokens, ("card", "processor")),
        *family(*both, TINYLLAMA, 4 * tokens, ("card",)),
    ]


def v2(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """v2 with all its edits at TinyLlama's dimensions, and how much of it its passes and sums take."""
    base, expert = models(TINYLLAMA, device)
    train, spent = words(TINYLLAMA, tokens, 2), [0.0]

    def clocked(*given: Any, **options: Any) -> summed.Statistics:
        start = waited(device)
        sums = gather(*given, **options)
        spent[0] += waited(device) - start
        return sums

    sums = gather(base, expert, train, Features((base.num_layers,)), progress=False)
    row = timed(lambda: fit(sums, "v2", gather=clocked), device, 1)
    print(f"{row['seconds']:9.2f} s  v2, {spent[0]:.2f} s of it in gather", flush=True)
    return [{"stage": "v2", "tokens": tokens, "gather_seconds": spent[0]} | row]


def wide(device: torch.device, tokens: int) -> list[dict[str, Any]]:
    """Two blocks at the width and the vocabulary of a 70B Llama, where all that depends on depth is the passes."""
    shape = Shape(**asdict(SHAPES["Llama 70B"]) | {"layers": 2})
    return family(*models(shape, device), shape, tokens // 4, ("card",), times=1)


def main() -> None:
    """Measure, print, put the figures into `notebooks/gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="to measure; others stay as kept")
    parser.add_argument("--tokens", type=int, default=131_072, help="to fit on")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.tokens < 64 * LENGTH:
        raise ChassisError(f"tokens = {args.tokens}: give at least {64 * LENGTH}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ChassisError("torch sees no GPU here: these figures are of one")
    about = setting() | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else args.device}
    about |= {"length": LENGTH, "judged": JUDGED}
    kept = keep(args.out) if args.out.exists() and {*args.parts} < {*PARTS} else {}
    if kept and kept.get("setting") != about:
        there = kept.get("setting", {})
        raise ChassisError(
            f"{args.out} is of {there.get('device')}, torch {there.get('torch')}: measure all parts, or give --out"
        )
    keep(args.out, setting=about)
    calls = {"same": same, "rates": rates, "tinyllama": tinyllama, "v2": v2, "wide": wide}
    for part in args.parts:
        print(part, flush=True)
        keep(args.out, **{part: calls[part](device, args.tokens)})
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    command(main)
