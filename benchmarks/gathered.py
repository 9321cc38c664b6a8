"""Sums gathered by workers: two against one, and a worker's memory as prompts grow.

    python benchmarks/gathered.py --parts speed memory

Every run is a process of its own with its own workers. *Speed*: seconds of one worker over those of two, workers that
have loaded the models already, rounds in alternating order; beside it the share of the time in which a worker had a
core, as other work on the machine takes some. *Memory*: peak of a worker and of who sums, at some shards and at 16
times as many. Printed: one line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lives import life

TIMES = 16


def live(out: Path, workers: int, shards: int, size: int, warm: bool) -> dict[str, Any]:
    """Gather once with the pocket models; what it took of time and memory."""
    import psutil

    from chassis_utils import Features, Probes, load, probe_set
    from gathering import Gathering

    base, expert = load("pocket-base", device="cpu"), load("pocket-math", device="cpu")
    texts = probe_set("math-text").prompts
    probes = Probes("copies", "train", tuple(f"{i}. {texts[i % len(texts)]}" for i in range(shards * size)))
    with Gathering(out, shard=size, workers=workers) as gather:
        if warm:  # a pass through the first block alone, so that all workers have loaded the models
            gather(base, expert, probes, Features((0,)), layer=1, progress=False)
        children = psutil.Process().children(recursive=True)
        pids = {int(line.split()[2]) for path in out.glob("*/tries.txt") for line in path.read_text().splitlines()}
        busy, clock = [sum(one.cpu_times()[:2]) for one in children if one.pid in pids], time.monotonic()
        gather(base, expert, probes, Features((base.num_layers,)), progress=False)
        seconds = time.monotonic() - clock
        found = {"seconds": seconds, "own_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
        if warm:
            after = [sum(one.cpu_times()[:2]) for one in children if one.pid in pids]
            found["cpu"] = sum(after) - sum(busy)
        peaks = (Path(f"/proc/{one.pid}/status") for one in psutil.Process().children(recursive=True))
        peaks = [line.split()[1] for path in peaks for line in path.read_text().splitlines() if line[:5] == "VmHWM"]
        return found | {"peak": max(map(int, peaks), default=0) / 2**10}


def run(out: Path, *words: Any) -> dict[str, Any]:
    """`live` in a new process."""
    told = life([sys.executable, __file__, "--live", str(out), *map(str, words)], env={"OMP_NUM_THREADS": "1"})
    return json.loads(told.splitlines()[-1])


def speed(root: Path, rounds: int) -> dict[str, Any]:
    """One worker over two, on six shards of five seconds and more."""
    quotients, shares = [], {1: [], 2: []}
    for i in range(rounds):
        took = {}
        for workers in (1, 2) if i % 2 else (2, 1):
            one = run(root / f"speed{i}{workers}", "--workers", workers, "--shards", 6, "--size", 160, "--warm")
            took[workers] = one["seconds"]
            shares[workers].append(one["cpu"] / one["seconds"] / workers)
        quotients.append(took[1] / took[2])
    found = {"one_over_two": statistics.median(quotients), "least": min(quotients), "greatest": max(quotients)}
    found |= {f"share_of_a_core_{k}": round(statistics.median(several), 3) for k, several in shares.items()}
    return found | {"seconds_of_a_shard": round(took[1] / 6, 1)}


def memory(root: Path) -> dict[str, Any]:
    """Peaks at two shards and at 16 times as many, MiB."""
    few, many = (run(root / f"memory{n}", "--workers", 1, "--shards", n, "--size", 64) for n in (2, 2 * TIMES))
    found = {"worker_mib": few["peak"], "worker_mib_16_times": many["peak"], "worker": many["peak"] / few["peak"]}
    return found | {"own_mib": few["own_peak"], "own_mib_16_times": many["own_peak"]}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("speed", "memory"), default=["speed", "memory"])
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    for name, kind in (("--live", Path), ("--workers", int), ("--shards", int), ("--size", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.live:
        print(json.dumps(live(told.live, told.workers, told.shards, told.size, told.warm)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        parts = {"speed": lambda: speed(root, told.rounds), "memory": lambda: memory(root)}
        print(json.dumps({part: parts[part]() for part in told.parts}))


if __name__ == "__main__":
    main()
