"""A fit spread over many workers, simulated: shards handed out one by one, gathered, and added up in a tree."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chassis_utils import ChassisError


@dataclass(frozen=True)
class Costs:
    """What the parts of a distributed fit take, in seconds, as measured; where there are several, one is drawn."""

    gather: Sequence[float]  #: One shard's passes and sums
    write: Sequence[float]  #: The sums of one worker
    read: Sequence[float]  #: The same
    add: Sequence[float]  #: Two of them
    submit: float  #: Handing out one shard

    def __post_init__(self) -> None:
        for name in ("gather", "write", "read", "add"):
            several = getattr(self, name)
            if not len(several) or not all(0 <= one < math.inf for one in several):
                raise ChassisError(f"{name} = {several!r:.60}: give seconds, one or more, none below zero")
        if not 0 <= self.submit < math.inf:
            raise ChassisError(f"submit = {self.submit}: give seconds, zero or more")


def makespan(costs: Costs, shards: int, workers: int, draw: np.random.Generator) -> float:
    """Seconds until the sums of all shards lie in one place.

    Shards are handed out in order, one every `submit` seconds, each to the worker that is free first; every worker adds
    its own up as it goes. Then pairs: one writes, the other waits for it, reads, adds; the last one writes nothing.
    """
    if shards < 1 or workers < 1:
        raise ChassisError(f"{shards} shards on {workers} workers: give one or more of each")
    free = [(0.0, worker) for worker in range(min(workers, shards))]
    took = draw.choice(np.asarray(costs.gather), shards) + draw.choice(np.asarray(costs.add), shards)
    for number, seconds in enumerate(took.tolist()):
        ready, worker = free[0]
        heapq.heapreplace(free, (max(ready, (number + 1) * costs.submit) + seconds, worker))
    done = np.array(sorted(ready for ready, _ in free))
    while len(done) > 1:
        # Neighbours in time meet: nobody waits for a straggler but its own partner.
        half = len(done) // 2
        first, second, odd = done[: 2 * half : 2], done[1 : 2 * half : 2], done[2 * half :]
        written, read, add = (draw.choice(np.asarray(one), half) for one in (costs.write, costs.read, costs.add))
        done = np.sort(np.concatenate([np.maximum(first + written, second) + read + add, odd]))
    return float(done[0])


def speedups(
    costs: Costs, shards: int, several: Sequence[int], rounds: int = 40, seed: int = 0
) -> list[dict[str, float]]:  # fmt: skip
    """By number of workers: how many times as fast as one, median and 95% over rounds, and seconds."""
    draw = np.random.default_rng(seed)
    alone = float(np.median([makespan(costs, shards, 1, draw) for _ in range(rounds)]))
    rows = []
    for workers in several:
        took = np.array([makespan(costs, shards, workers, draw) for _ in range(rounds)])
        low, middle, high = np.quantile(alone / took, [0.025, 0.5, 0.975])
        rows.append(
            {"workers": workers, "speedup": middle, "low": low, "high": high, "seconds": float(np.median(took))}
        )
    return rows
