"""The look-ahead and the tables of tokens on many places: how far from the most passes, and how much is left undecided.

python benchmarks/decided.py [--corpora DIR] [--n 60] [--tables 1000] [--budgets 0 8 32 128 1000 4000]

The places of page 19, on more text than a page has time for: test text of the mathematics corpus, or without a folder
the bundled test text, each kept under its name. With a folder also what adapters aim at there, and one of them.
Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from bench import command, keep
from corpora import text
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from bridging import Places, bounds  # noqa: E402
from chassis_utils import (  # noqa: E402
    Bridge,
    ChassisError,
    ForeignExpert,
    LanguageModel,
    Probes,
    fit,
    harvest,
    load,
    probe_set,
)
from chassis_utils.bridge import Bridged  # noqa: E402
from lookahead import followed, judged, least, measured, said_of, tables  # noqa: E402
from refinement import last_block  # noqa: E402
from semantic import adapted, target  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "decided.json"


def together(several: list[Bridged]) -> Bridged:
    """What was found behind one place after the other, as one."""
    return Bridged(*(torch.cat([getattr(one, name) for one in several]) for name in ("mass", "undecided", "passes")))


def aims(base: LanguageModel, own: LanguageModel, train: Probes, places: Places, right: Bridged) -> dict[str, Bridged]:
    """What adapters are fitted to, by the plain rule and counted on text, one of them, and the bare base."""
    foreign = {name: ForeignExpert(Bridge(own, base, "C"), some) for name, some in (("rule", None), ("counted", train))}
    reads = last_block(base.num_layers).places
    there = {name: harvest(base, one, places.probes, "last", reads, progress=False) for name, one in foreign.items()}
    v2 = fit(harvest(base, foreign["counted"], train, "all", reads, progress=False))
    answers = {f"target, {name}": target(one) for name, one in there.items()}
    answers |= {"v2 on the counted target": adapted(v2)(there["counted"])}
    answers |= {"bare base": places.own}
    return {name: said_of(one, right) for name, one in answers.items()}


def main() -> None:
    """Follow up every place at every budget, set the tables beside the largest, write `notebooks/decided.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--base", default="pocket-base")
    parser.add_argument("--expert", default="pocket-phi")
    parser.add_argument("--n", type=int, default=60, help="places")
    parser.add_argument("--tables", type=int, default=1000, help="places for the tables' own masses, or all there are")
    parser.add_argument("--tokens", type=int, default=20_000, help="of training text for adapters; twice that of test")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[0, 8, 32, 128, 1000, 4000], help="the last is the reference"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.budgets != sorted({*args.budgets}) or args.budgets[0] < 0:
        raise ChassisError(f"budgets {args.budgets}: give them from 0 on, each larger than the one before")
    torch.set_num_threads(1)
    base, expert = (load(name, device="cpu") for name in (args.base, args.expert))
    probes = probe_set("math-text", "test")
    if args.corpora:
        probes = text(base, args.corpora, "math", "test", 2 * args.tokens)
    everywhere = Places.before_spaces(base, expert, probes)
    several, places = (everywhere.drawn(n, args.seed) for n in (min(args.tables, len(everywhere)), args.n))
    exact, start, each = Bridge(expert, base), time.process_time(), []
    for i in tqdm(range(args.n), desc="places"):
        each.append(followed(exact, places.some(range(i, i + 1)), args.budgets))
    seconds = time.process_time() - start
    found = {budget: together([one[budget] for one in each]) for budget in args.budgets}
    floor, reference = least(exact, places, args.budgets), found[args.budgets[-1]]
    rows, wide = measured(exact, places, found, floor), []
    print(*rows, sep="\n", flush=True)
    for name, one in tables(exact, several).items():
        placed = one.probabilities.sum(1)
        low, high = bounds(several.passage, placed)
        wide.append({"bridge": name, "placed": float(placed.mean()), "placed low": low, "placed high": high})
    about = {"base": base.name, "expert": expert.name, "places": args.n, "passages": len({*places.passage.tolist()})}
    about |= {
        "text": probes.digest,
        "split": probes.split,
        "tokens": args.tokens,
        "seed": args.seed,
        "seconds": seconds,
        "rows": rows,
    }
    about |= {"wide": wide, "wide_places": len(several), "wide_passages": len({*several.passage.tolist()})}
    if args.corpora:
        train = text(base, args.corpora, "math", "train", args.tokens)
        targets = aims(base, expert, train, places, reference).items()
        about["targets"] = [judged(name, one, reference, places.passage) for name, one in targets]
        print(*about["targets"], sep="\n", flush=True)
    keep(RESULTS, **{f"{expert.name} into {base.name}, {probes.name}": about})


if __name__ == "__main__":
    command(main)
