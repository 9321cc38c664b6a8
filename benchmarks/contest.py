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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebooks")]
from bench import command, keep  # noqa: E402
from corpora import EXPERTS, text  # noqa: E402

from chassis_utils import LanguageModel, evaluate, fit, harvest, load  # noqa: E402
from trained import COLUMNS, Contest, choose_lr, head_only, lora, tuned_lens, weight_svd  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "contest.json"
RANKS = (4, 16, 64)
LRS = (1.6e-3, 4e-3, 1e-2)  # where a search begins; it goes on by the same factor while the best lies at an edge
LENS_BUDGETS = (4, 8, 24)  # of our own time
POINTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def search(
    method: Callable[..., pd.DataFrame], contest: Contest, lrs: Sequence[float] = LRS, most: int = 6, **options: object
) -> tuple[float, pd.DataFrame]:
    """Step size of the lowest final KL on the contest's text, which lies inside the grid unless `most` are tried."""
    best, tried = choose_lr(method, contest, lrs, **options)
    known, factor = sorted(lrs), lrs[1] / lrs[0]
    while best in (known[0], known[-1]) and len(known) < most:
        further = known[0] / factor if best == known[0] else known[-1] * factor
        _, course = choose_lr(method, contest, [further], **options)
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


def known() -> dict[str, dict]:
    """What the file holds, by expert."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(name: str, part: dict[str, object]) -> None:
    """Some of an expert's results into the file, beside what it holds; it is there whole or as it was."""
    keep(RESULTS, **{name: known().get(name, {}) | part})


def plain(frame: pd.DataFrame) -> list[dict[str, object]]:
    """Rows with five figures and null for what is not there."""
    return json.loads(frame.to_json(orient="records", double_precision=5))


def prepare(base: LanguageModel, name: str, args: argparse.Namespace) -> Contest:
    """Texts of the three splits; base and expert on those that are judged on."""
    expert = load(name, device="cpu")
    sizes = {"train": args.tokens, "val": args.val_tokens, "test": args.test_tokens}
    texts = {split: text(base, args.corpora, EXPERTS[name], split, n) for split, n in sizes.items()}
    val, test = (harvest(base, expert, texts[split], "all", [-1], progress=False) for split in ("val", "test"))
    clock = {"timer": time.process_time, "points": POINTS}
    return Contest(base, expert, texts["train"], val, args.seconds, test=test, **clock)


def time_v2(contest: Contest, args: argparse.Namespace) -> None:
    """v2's seconds, harvest and fit, and what it reaches on the contest's text and on its test text."""
    base, expert = contest.base, contest.expert
    start = time.process_time()
    a = harvest(base, expert, contest.prompts, "all", [-1], progress=False)
    v2 = fit(a)
    row = {"method": "v2", "seconds": time.process_time() - start, "parameters": v2.num_parameters}
    for prefix, held in (("", contest.held), ("test_", contest.test)):
        measured = evaluate(base, expert, v2, held).iloc[1]
        row |= {prefix + name: float(measured[name]) for name in COLUMNS}
    setting = {"tokens": len(a), "validation": len(contest.held), "test": len(contest.test), "threads": 1}
    setting |= {"kl_identity": contest.identity["kl"], "search_seconds": args.search, "first_grid": LRS}
    write(expert.name, {"setting": setting, "v2": row})


def cut_weights(contest: Contest, args: argparse.Namespace) -> None:
    """The SVD of the weights' difference, plain and in the data's metric."""
    tables = [weight_svd(contest, RANKS, data=data) for data in (False, True)]
    write(contest.expert.name, {"weight_svd": plain(pd.concat(tables, ignore_index=True))})


def train(contest: Contest, args: argparse.Namespace) -> None:
    """LoRA: step sizes, then the courses; written after every one, so that what is stopped is not lost."""
    name, chosen, ends, sought = contest.expert.name, {}, {}, {}
    there = known()[name]  # what else was trained stays
    others = pd.DataFrame([row for row in there.get("courses", []) if row["method"] in OTHERS])
    for key, of in (("step_sizes", chosen), ("search", sought)):
        of |= {what: value for what, value in there.get(key, {}).items() if what in OTHERS}
    courses: list[pd.DataFrame] = [others] if len(others) else []

    def run(rank: int, lr: float, budget: float) -> float:
        courses.append(lora(replace(contest, seconds=budget), rank, lr=lr).assign(budget=budget))
        note(name, courses, search=sought, step_sizes=chosen)
        return float(courses[-1]["kl"].iloc[-1])

    brief = replace(contest, seconds=args.search, test=None, points=())
    for rank in RANKS:
        chosen[rank], tried = search(lora, brief, rank=rank)
        sought[rank] = effort(tried)
        ends[rank] = float(tried["kl"].min())
        courses.append(tried.assign(budget=args.search))
        note(name, courses, search=sought, step_sizes=chosen)
    # Step sizes decay to the end of a budget: a course made for less time is mostly ahead of a longer one until then.
    best, second, _ = sorted(RANKS, key=ends.__getitem__)
    longer = {lr: run(best, lr, args.seconds / 4) for lr in (chosen[best], chosen[best] * LRS[0] / LRS[1])}
    chosen[best] = min(longer, key=longer.__getitem__)  # more steps may want smaller ones
    run(second, chosen[second], args.seconds / 4)
    if note(name, courses, search=sought, step_sizes=chosen)[str(best)] is None:
        run(best, chosen[best], args.seconds)


def search_others(contest: Contest, args: argparse.Namespace) -> None:
    """Step sizes of what else page 12 trains, on the final state."""
    brief, so_far = replace(contest, seconds=args.search, test=None, points=()), known()[contest.expert.name]
    for name, method in OTHERS.items():
        best, tried = search(method, brief)
        for key, value in (("step_sizes", best), ("search", effort(tried))):
            so_far.setdefault(key, {})[name] = value
    write(contest.expert.name, {key: so_far[key] for key in ("step_sizes", "search")})


def equal_time(contest: Contest, args: argparse.Namespace) -> None:
    """What else page 12 trains on the final state, for v2's own seconds, at the step sizes that the search found."""
    so_far = known()[contest.expert.name]
    courses, seconds = [row for row in so_far["courses"] if row["method"] not in OTHERS], so_far["v2"]["seconds"]
    found = [pd.DataFrame(courses)]
    for name, method in OTHERS.items():
        course = method(replace(contest, seconds=seconds), lr=so_far["step_sizes"][name])
        found.append(course.assign(method=name, budget=seconds))
        note(contest.expert.name, found)


def lenses(contest: Contest, args: argparse.Namespace) -> None:
    """The recipe's lens as it is, and our closed form of the same layer: from when on training is nearer."""
    base, expert, found, courses = contest.base, contest.expert, [], []
    for layer, method in ((base.num_layers, "rrr"), (base.num_layers // 2, "lens")):
        start = time.process_time()
        a = harvest(base, expert, contest.prompts, "all", [layer], progress=False)
        passes = time.process_time() - start
        ours = fit(a, method, layer=layer, lam=1e-3 * len(a))
        seconds = time.process_time() - start
        held = harvest(base, expert, contest.held.probes, "all", [layer], progress=False)
        kl = float(evaluate(base, expert, ours, held)["kl"].iloc[-1])
        # Step sizes fall to the end of a budget: which one is there first is not known beforehand.
        brief = {times: replace(contest, seconds=times * seconds, test=None) for times in LENS_BUDGETS}
        mine = pd.concat([tuned_lens(one, layer).assign(budget=times) for times, one in brief.items()])
        courses.append(mine)
        found.append({"layer": layer, "method": method, "kl": kl, "passes": passes, "seconds": seconds})
        found[-1]["crossing"] = crossing(mine, kl)
        print(expert.name, found[-1], flush=True)
    write(expert.name, {"lens": {"ours": found, "courses": plain(pd.concat(courses, ignore_index=True))}})


def effort(tried: pd.DataFrame) -> dict[str, object]:
    """Step sizes that a search tried, and the seconds of all their courses."""
    return {"tried": sorted(tried["lr"].unique()), "seconds": float(tried.groupby("lr")["seconds"].last().sum())}


def train_longer(contest: Contest, args: argparse.Namespace) -> None:
    """One course more, of the rank and the step size that came nearest so far."""
    so_far = pd.DataFrame(known()[contest.expert.name]["courses"])
    lora_only = so_far[so_far["method"] == "lora"]
    nearest = lora_only.loc[lora_only["kl"].idxmin()]
    course = lora(replace(contest, seconds=args.seconds), int(nearest["rank"]), lr=float(nearest["lr"]))
    note(contest.expert.name, [so_far, course.assign(budget=args.seconds)])


def note(name: str, courses: list[pd.DataFrame], **more: object) -> dict[str, float | None]:
    """Write all courses, and where they cross v2's KL; print the last."""
    everything, goal = pd.concat(courses, ignore_index=True), known()[name]["v2"]["kl"]
    kinds = {str(rank): everything["rank"] == rank for rank in RANKS}
    kinds |= {name: everything["method"] == name for name in OTHERS if (everything["method"] == name).any()}
    crossings = {kind: crossing(everything[rows], goal) for kind, rows in kinds.items()}
    write(name, more | {"crossing": crossings, "courses": plain(everything)})
    told = ["method", "rank", "lr", "budget", "seconds", "kl", "recovered"]
    print(name, everything[told].tail(1).to_string(header=False), flush=True)
    return crossings


OTHERS = {"head_only": head_only, "tuned_lens_adam": partial(tuned_lens, layer=-1, optimizer="adam")}
UNLESS_TOLD = {"v2": time_v2, "svd": cut_weights, "lora": train, "others": search_others, "equal": equal_time}
UNLESS_TOLD |= {"lens": lenses}
PARTS = UNLESS_TOLD | {"longer": train_longer}


def main() -> None:
    """Run the parts of the contest and write `notebooks/contest.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--expert", choices=[*EXPERTS], help="only this one")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*UNLESS_TOLD], help="lora needs v2's point")
    parser.add_argument("--tokens", type=int, default=60_000, help="to fit and train on")
    parser.add_argument("--val-tokens", type=int, default=4_000, help="to choose and to draw the courses on")
    parser.add_argument("--test-tokens", type=int, default=40_000, help="to judge v2 and the ends on")
    parser.add_argument("--seconds", type=float, default=600, help="longest course, CPU seconds")
    parser.add_argument("--search", type=float, default=25, help="CPU seconds a step size tried")
    args = parser.parse_args()
    names = [*EXPERTS] if args.expert is None else [args.expert]
    if "v2" not in args.parts and any("v2" not in known().get(name, {}) for name in names):
        parser.error("everything is measured against v2's point: run the part v2 first")
    found = [known().get(name, {}).get("step_sizes", {}) for name in names] if "others" not in args.parts else []
    if "equal" in args.parts and any(name not in one for one in found for name in OTHERS):
        parser.error("the part equal takes the step sizes that the part others finds: run that first")
    torch.set_num_threads(1)
    base = load("pocket-base", device="cpu")
    for name in names:
        contest = prepare(base, name, args)
        for part in args.parts:
            PARTS[part](contest, args)


if __name__ == "__main__":
    command(main)
