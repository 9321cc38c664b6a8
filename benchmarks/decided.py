"""The look-ahead and the tables of tokens on many places: how far from the most passes, and how much is left undecided.

python benchmarks/decided.py [--n 60] [--budgets 0 8 32 128 1000 4000]

The places of page 19, on more of the bundled test text than a page has time for; nothing is chosen here.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from bench import command, keep
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from bridging import Places, StringBridge, bounds, variation  # noqa: E402
from chassis_utils import Bridge, ChassisError, load, probe_set  # noqa: E402
from chassis_utils.bridge import Bridged  # noqa: E402
from lookahead import beside, followed, least  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "decided.json"


def together(several: list[Bridged]) -> Bridged:
    """What was found behind one place after the other, as one."""
    return Bridged(*(torch.cat([getattr(one, name) for one in several]) for name in ("mass", "undecided", "passes")))


def main() -> None:
    """Follow up every place at every budget, set the tables beside the largest, write `notebooks/decided.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pocket-base")
    parser.add_argument("--expert", default="pocket-phi")
    parser.add_argument("--n", type=int, default=60, help="places")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[0, 8, 32, 128, 1000, 4000], help="the last is the reference"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.budgets != sorted({*args.budgets}) or args.budgets[0] < 0:
        raise ChassisError(f"budgets {args.budgets}: give them from 0 on, each larger than the one before")
    torch.set_num_threads(1)
    base, expert = (load(name, device="cpu") for name in (args.base, args.expert))
    places = Places.before_spaces(base, expert, probe_set("math-text", "test"), args.n, args.seed)
    exact, start, each = Bridge(expert, base), time.process_time(), []
    for i in tqdm(range(args.n), desc="places"):
        each.append(followed(exact, places.some(range(i, i + 1)), args.budgets))
    seconds = time.process_time() - start
    found = {budget: together([one[budget] for one in each]) for budget in args.budgets}
    floor, reference = least(exact, places, args.budgets), found[args.budgets[-1]]
    prompts, said = places.probes.prompts, places.said
    answers = {"A as reported": StringBridge(expert, base, "A")(said)}
    answers |= {f"{stage} in bytes": Bridge(expert, base, stage)(said) for stage in "AB"}
    answers |= {"C in context": Bridge(expert, base, "C")(said, prompts)} | {
        f"exact {n}": one for n, one in found.items()
    }
    rows = []
    for name, one in answers.items():
        row = {"bridge": name}
        for quantity, values in beside(one, reference).items():
            if quantity != "undecided" or name.startswith("exact"):
                low, high = bounds(places.passage, values.double())
                row |= {quantity: float(values.mean()), f"{quantity} low": low, f"{quantity} high": high}
        # The reference is off by what it leaves undecided at most, either way.
        off, left = variation(one.mass, reference.mass), reference.undecided
        row["truth low"] = max(0.0, bounds(places.passage, (off - left).clamp(min=0))[0])
        row["truth high"] = bounds(places.passage, off + left)[1]
        if name.startswith("exact"):
            row |= {"passes": int(name.split()[1]), "least": float(floor[int(name.split()[1])].mean())}
        rows.append(row)
        print(row)
    about = {"base": base.name, "expert": expert.name, "places": args.n, "passages": len({*places.passage.tolist()})}
    keep(RESULTS, **about, seed=args.seed, seconds=seconds, rows=rows)


if __name__ == "__main__":
    command(main)
