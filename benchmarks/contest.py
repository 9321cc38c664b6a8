"""v2 against LoRA on the corpora that the pocket models come from: KL on held-out text against CPU seconds.

python benchmarks/contest.py --corpora DIR [--expert pocket-math] [--seconds 600]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebooks")]
from corpora import EXPERTS, text  # noqa: E402

from chassis_utils import ChassisError, LanguageModel, evaluate, fit, harvest, load  # noqa: E402
from chassis_utils.records import replacing  # noqa: E402
from trained import Contest, choose_lr, lora  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "contest.json"
RANKS = (4, 16, 64)
LRS = (1.6e-3, 4e-3, 1e-2)  # where a search begins; it goes on by the same factor while the best lies at an edge
POINTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def search(contest: Contest, rank: int, lrs: Sequence[float] = LRS, most: int = 6) -> tuple[float, pd.DataFrame]:
    """Step size of the lowest final KL on the contest's text, which lies inside the grid unless `most` are tried."""
    best, tried = choose_lr(lora, contest, lrs, rank=rank)
    known, factor = sorted(lrs), lrs[1] / lrs[0]
    while best in (known[0], known[-1]) and len(known) < most:
        further = known[0] / factor if best == known[0] else known[-1] * factor
        _, course = choose_lr(lora, contest, [further], rank=rank)
        tried, known = pd.concat([tried, course], ignore_index=True), sorted([*known, further])
        best = float(tried.groupby("lr")["kl"].last().fillna(math.inf).idxmin())
    return best, tried


def crossing(courses: pd.DataFrame, kl: float) -> float | None:
    """Second at which the lowest KL that any of these courses had by then reaches `kl`; None if it never does.

    Between two measurements the KL is taken to fall evenly.
    """
    falls = courses[courses["seconds"] > 0].sort_values("seconds")
    falls = falls[falls["kl"] <= falls["kl"].cummin()][["seconds", "kl"]].to_numpy().tolist()
    if not falls or falls[-1][1] > kl:
        return None
    if falls[0][1] <= kl:
        return falls[0][0]
    (t, before), (u, after) = next(pair for pair in itertools.pairwise(falls) if pair[1][1] <= kl)
    return t + (u - t) * (before - kl) / (before - after)


def closed(contest: Contest, seconds: float, adapter: object) -> dict[str, float]:
    """v2 on the contest's text, and on its test text."""
    row = {"method": "v2", "seconds": seconds, "parameters": adapter.num_parameters}
    for prefix, held in (("", contest.held), ("test_", contest.test)):
        measured = evaluate(contest.base, contest.expert, adapter, held).iloc[1]
        names = ["kl", "kl_low", "kl_high", "recovered", "recovered_low", "recovered_high", "top1_agreement"]
        row |= {prefix + name: float(measured[name]) for name in [*names, "bits_per_byte"]}
    return row


def write(name: str, part: dict[str, object]) -> None:
    """Some of an expert's results into the file, beside what it holds; it is there whole or as it was."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[name] = known.get(name, {}) | part
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def plain(frame: pd.DataFrame) -> list[dict[str, object]]:
    """Rows with five figures and null for what is not there."""
    return json.loads(frame.to_json(orient="records", double_precision=5))


def compete(base: LanguageModel, name: str, args: argparse.Namespace) -> None:
    """Everything for one expert, written after every course, so that what is stopped is not lost."""
    expert = load(name, device="cpu")
    sizes = {"train": args.tokens, "val": args.val_tokens, "test": args.test_tokens}
    texts = {split: text(base, args.corpora, EXPERTS[name], split, n) for split, n in sizes.items()}
    val, test = (harvest(base, expert, texts[split], "all", [-1], progress=False) for split in ("val", "test"))
    start = time.process_time()
    a = harvest(base, expert, texts["train"], "all", [-1], progress=False)
    v2 = fit(a)
    seconds = time.process_time() - start
    clock = {"timer": time.process_time, "points": POINTS}
    contest = Contest(base, expert, texts["train"], val, args.seconds, test=test, **clock)
    ours = closed(contest, seconds, v2)
    setting = {"tokens": len(a), "validation": len(val), "test": len(test), "threads": torch.get_num_threads()}
    setting |= {"kl_identity": contest.identity["kl"], "search_seconds": args.search, "first_grid": LRS}
    part: dict[str, object] = {"setting": setting, "v2": ours, "search": {}}
    chosen: dict[int, float] = {}
    ends: dict[int, float] = {}
    courses: list[pd.DataFrame] = []

    def note() -> None:
        everything = pd.concat(courses, ignore_index=True)
        of = {rank: everything[everything["rank"] == rank] for rank in RANKS}
        part["step_sizes"] = chosen
        part["crossing"] = {rank: crossing(rows, ours["kl"]) for rank, rows in of.items()}
        part["courses"] = plain(everything)
        write(name, part)
        last = everything.groupby(["rank", "lr", "budget"], sort=False).tail(1)
        print(name, last[["rank", "lr", "budget", "seconds", "kl", "recovered"]].tail(1).to_string(header=False))

    def run(rank: int, lr: float, budget: float) -> float:
        course = lora(replace(contest, seconds=budget), rank, lr=lr)
        courses.append(course.assign(budget=budget))
        note()
        return float(course["kl"].iloc[-1])

    write(name, part)
    for rank in RANKS:
        brief = replace(contest, seconds=args.search, test=None, points=())
        chosen[rank], tried = search(brief, rank)
        taken = float(tried.groupby("lr")["seconds"].last().sum())
        part["search"] |= {rank: {"tried": sorted(tried["lr"].unique()), "seconds": taken}}
        ends[rank] = float(tried["kl"].min())
        courses.append(tried.assign(budget=args.search))
        note()
    # Step sizes decay to the end of a budget: a course that is made for less time is ahead of a longer one until then.
    best, second, _ = sorted(RANKS, key=ends.__getitem__)
    longer = {lr: run(best, lr, args.seconds / 4) for lr in (chosen[best], chosen[best] * LRS[0] / LRS[1])}
    chosen[best] = min(longer, key=longer.__getitem__)  # more steps may want smaller ones
    run(second, chosen[second], args.seconds / 4)
    if part["crossing"][best] is None:
        run(best, chosen[best], args.seconds)


def main() -> None:
    """Time v2, search the step sizes, run LoRA, write `notebooks/contest.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--expert", choices=[*EXPERTS], help="only this one")
    parser.add_argument("--tokens", type=int, default=60_000, help="to fit and train on")
    parser.add_argument("--val-tokens", type=int, default=4_000, help="to choose and to draw the courses on")
    parser.add_argument("--test-tokens", type=int, default=40_000, help="to judge v2 and the ends on")
    parser.add_argument("--seconds", type=float, default=600, help="longest course, CPU seconds")
    parser.add_argument("--search", type=float, default=25, help="CPU seconds a step size tried")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load("pocket-base", device="cpu")
    for name in EXPERTS if args.expert is None else [args.expert]:
        compete(base, name, args)


if __name__ == "__main__":
    try:
        main()
    except ChassisError as error:
        sys.exit(f"contest: {error}")
