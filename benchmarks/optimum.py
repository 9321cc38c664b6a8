"""How far the closed form is from the convex optimum of its family, with proof, and what ten passes make of it.

python benchmarks/optimum.py --corpora DIR [--tokens 30000] [--steps 120] [--penalty 0.01]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebooks")]
from bench import command, keep  # noqa: E402
from corpora import EXPERTS, text  # noqa: E402

from chassis_utils import Activations, Adapter, evaluate, fit, harvest, load  # noqa: E402
from refinement import refine  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "optimum.json"
FEW = 10  # passes that the closed form may be helped by


def optimum(rows: Activations, start: Adapter, identity: float, held: Activations, args: argparse.Namespace) -> dict:
    """Shares of the identity KL at the closed form, after few passes and at the end, on the rows and on other text."""
    few, _ = refine(rows, start, "near", FEW, args.penalty)
    end, course = refine(rows, start, "near", args.steps, args.penalty)
    named = [one.named(name) for name, one in (("closed", start), ("few", few), ("end", end))]
    table = evaluate(held.base, held.expert, named, held).set_index("method").drop(index="identity")
    last = course.iloc[-1]
    found = {"family": start.method, "rows": len(rows), "passes": int(last["step"]), "penalty": args.penalty}
    found |= {name: float(last[name]) for name in ("gradient", "within")}
    for name, step in (("closed", 0), ("few", FEW), ("end", -1)):
        found[name] = {"rows": 1 - float(course["kl"].iloc[step]) / identity}
        found[name] |= {side: float(table.loc[name, side]) for side in ("recovered", "recovered_low", "recovered_high")}
    return found


def main() -> None:
    """Fit, refine, judge, write `notebooks/optimum.json` after every family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--tokens", type=int, default=30_000, help="to fit on")
    parser.add_argument("--val-tokens", type=int, default=4_000, help="of validation text, to judge on")
    parser.add_argument("--steps", type=int, default=120, help="passes to the optimum")
    parser.add_argument("--penalty", type=float, default=0.01, help="of the squared distance from the closed form")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, kept = load("pocket-base", device="cpu"), {}
    for name, domain in EXPERTS.items():
        expert = load(name, device="cpu")
        train, val = (
            text(base, args.corpora, domain, split, n)
            for split, n in (("train", args.tokens), ("val", args.val_tokens))
        )
        a, held = (harvest(base, expert, probes, "all", [-1], progress=False) for probes in (train, val))
        identity = float(evaluate(base, expert, [], a)["kl"].iloc[0])
        shallow, deep = fit(a, "rrr", lam=1e-3 * len(a)), fit(a, "v2")
        families = ((a, shallow), (a.on(base.edited(*deep.edits), [*deep.reads, base.num_layers]), deep))
        for rows, start in families:
            kept.setdefault(name, []).append(optimum(rows, start, identity, held, args))
            print(name, json.dumps(kept[name][-1]), flush=True)
            keep(RESULTS, **kept)


if __name__ == "__main__":
    command(main)
