"""What the model of cost (`notebooks/costs.py`) is calibrated with and checked against; see `README.md`.

python benchmarks/costing.py [--parts rates checks curve shards] [--tokens 2048]
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench import alone, command, keep, setting
from safetensors.torch import load_file, save_file
from scale import TINYLLAMA, random_model, turned, words
from tqdm.auto import tqdm

from calibration import MOVED, calibrated, one_thread, spent
from chassis_utils import ChassisError, Features, fit, gather, harvest, load, probe_set
from chassis_utils.solve import Gram
from costpage import KEPT_CHECKS, again, padding
from costs import Rates, shape
from curves import curve, doublings, losses
from ownwords import written

RESULTS = Path(__file__).parents[1] / "notebooks" / "costs.json"
PARTS = ("rates", "checks", "pocket", "curve", "shards")
SIZES = (128, 256, 512, 1024, 1536)  # of the rates; no check is of these
CURVES = {"pocket-math": "math-text", "pocket-shakespeare": "verse"}  # expert -> held-out text
CHUNK, SUBSETS = 8, 4  # passages gathered at once; orders in which they are added up


def load_now() -> list[float]:
    """Processes that ran or waited, means over 1, 5 and 15 minutes: who reads a time should know."""
    return [round(one, 2) for one in os.getloadavg()]


def rates() -> dict[str, Any]:
    """Rates of this machine at `SIZES`."""
    return dict(calibrated(SIZES, 0.3, (*MOVED, 1 << 26), rounds=3).measured)


def tinyllama(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of every stage of the final-layer family at TinyLlama's own dimensions, all 22 blocks."""
    torch.set_num_threads(1)
    base = random_model(TINYLLAMA)
    expert, train = turned(base), words(TINYLLAMA, tokens, 5)

    def once() -> dict[str, float]:
        return spent(lambda: fit(gather(base, expert, train, Features((base.num_layers,)), progress=False)))

    # The first one asks the machine for its memory, page by page: that is told, and not counted as work.
    first = once()
    several = [once() for _ in tqdm(range(rounds), desc="rounds")]
    about = padding(base, train) | {"rounds": rounds, "load": load_now(), "first": first}
    return about | {"seconds": {name: [one[name] for one in several] for name in several[0]}}


def pocket(rounds: int) -> dict[str, Any]:
    """Seconds of every stage of v2 on the pocket models, all training passages of word problems."""
    torch.set_num_threads(1)
    base, expert, probes = load("pocket-base", device="cpu"), load("pocket-math", device="cpu"), probe_set("math-text")
    seen = harvest(base, expert, probes, "all", [-1], progress=False)
    several = [spent(lambda: fit(seen)) for _ in tqdm(range(rounds + 1), desc="rounds")]
    about = padding(base, probes) | {"rounds": rounds, "load": load_now(), "first": several[0]}
    return about | {"seconds": {name: [one[name] for one in several[1:]] for name in several[0]}}


def curves(passages: int, seed: int) -> list[dict[str, Any]]:
    """KL on validation text by tokens fitted, for both experts and two sets of features; test text once, at the end."""
    torch.set_num_threads(1)
    base, found = load("pocket-base", device="cpu"), []
    final = base.num_layers
    families = {"final layer": Features((final,)), "last block": Features((final, final - 1, f"block {final - 1}"))}
    for name, text in CURVES.items():
        expert = load(name, device="cpu")
        pool = written(expert, passages, seed=seed)
        for family, features in families.items():
            places = [*features.places]
            held = {
                split: harvest(base, expert, probe_set(text, split), "all", places, progress=False)
                for split in ("val", "test")
            }
            sizes, rows = doublings(1, passages // CHUNK // 2), []
            bar = tqdm(
                curve(base, expert, pool, features, CHUNK, sizes, SUBSETS), name, len(sizes) * SUBSETS, leave=False
            )
            last = None
            for subset, size, tokens, adapter in bar:
                sums, many = losses(adapter, held["val"])
                kept = [float(f"{value:.6g}") for value in sums.tolist()]
                rows.append({"subset": subset, "chunks": size, "tokens": tokens, "kl_sums": kept})
                last = adapter if (subset, size) == (0, sizes[-1]) else last
            bare, many = losses(None, held["val"])
            told = {
                "expert": name,
                "family": family,
                "features": sum(features.sizes(base)),
                "probes": text,
                "seed": seed,
            }
            told |= {"rows": many.tolist(), "bare": bare.tolist(), "points": rows}
            (sums, many), (bare, _) = (losses(one, held["test"]) for one in (last, None))
            told["test"] = {"kl_sums": sums.tolist(), "rows": many.tolist(), "bare": bare.tolist()}
            found.append(told)
    return found


def timed(call: Callable[[], object], times: int) -> list[float]:
    """Seconds by the clock of so many calls, after a first."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def shards(times: int) -> dict[str, Any]:
    """What a worker does: gather one shard of pocket text; write, read and add sums of TinyLlama's size; submit."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ChassisError(
            "distributed is missing: pip install the extra 'cluster', or leave out the part shards"
        ) from None
    base, expert = load("pocket-base", device="cpu"), load("pocket-math", device="cpu")
    text = probe_set("math-text", n=32)
    found: dict[str, Any] = {"tokens": padding(base, text)["tokens"], "load": load_now()}
    p, q = TINYLLAMA.hidden, 2 * TINYLLAMA.hidden
    sums, other = (Gram.zeros(p, q) for _ in range(2))
    with one_thread(), TemporaryDirectory() as folder:
        features, path = Features((base.num_layers,)), Path(folder, "sums.safetensors")
        found["gather"] = timed(lambda: gather(base, expert, text, features, progress=False), times)
        parts = {name: getattr(sums, name) for name in ("x", "y", "xx", "xy")}
        found["bytes"] = sum(part.nbytes for part in parts.values())
        found["write"] = timed(lambda: save_file(parts, path), times)
        found["read"] = timed(lambda: [part.sum() for part in load_file(path).values()], times)
        found["add"] = timed(lambda: reduce(add, (sums, other)), times)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        client.gather(client.map(abs, range(10)))
        many, start = 1000, time.perf_counter()
        client.gather(client.map(abs, range(-many, 0), pure=False))
        found["submit"] = (time.perf_counter() - start) / many
    return found


def show(figures: dict[str, Any]) -> None:
    """Print what is kept; predictions are by the rates that are kept with it."""
    if "rates" not in figures:
        return
    for part, name, family in KEPT_CHECKS:
        if part in figures:
            table = again(figures[part], Rates("kept", figures["rates"]), shape(name), family)
            print(f"{name}, {family}", table.to_string(index=False, float_format="{:.3f}".format), sep="\n")


def main() -> None:
    """Measure, print, put the figures into `notebooks/costs.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="to measure; others stay as kept")
    parser.add_argument("--tokens", type=int, default=2048, help="of the passes at TinyLlama's dimensions")
    parser.add_argument("--rounds", type=int, default=2, help="of the fit at those, after a first")
    parser.add_argument("--passages", type=int, default=1024, help="that each pocket expert writes, of 256 tokens")
    parser.add_argument("--seed", type=int, default=1, help="of what they write")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.tokens < 1024 or args.rounds < 1 or args.passages < 8 * CHUNK:
        least = f"1024 tokens, 1 round, {8 * CHUNK} passages"
        raise ChassisError(
            f"{args.tokens} tokens, {args.rounds} rounds, {args.passages} passages: give at least {least}"
        )
    calls = {
        "rates": (rates, ()), "checks": (tinyllama, (args.tokens, args.rounds)),
        "pocket": (pocket, (args.rounds,)),
        "curve": (curves, (args.passages, args.seed)), "shards": (shards, (20,)),
    }  # fmt: skip
    figures = keep(args.out, setting=setting())
    for part in args.parts:
        function, given = calls[part]
        # Dask's workers are processes too, which a process of a pool may not have.
        (found,) = [function(*given)] if part == "shards" else alone(function, [given])
        figures = keep(args.out, **{part: found})
    show(figures)


if __name__ == "__main__":
    command(main)
