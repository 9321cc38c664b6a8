"""How far a fit is from the convex optimum of its family, with proof, and what few passes make of it.

python benchmarks/optimum.py --corpora DIR [--parts same foreign] [--tokens 30000] [--steps 40] [--penalty 1]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebooks")]
from bench import command, keep  # noqa: E402
from corpora import EXPERTS, text  # noqa: E402

from chassis_utils import (  # noqa: E402
    Activations,
    Adapter,
    Bridge,
    Features,
    ForeignExpert,
    LanguageModel,
    Probes,
    evaluate,
    fit,
    harvest,
    load,
)
from chassis_utils.adapter import assembled  # noqa: E402
from chassis_utils.distill import PENALTIES  # noqa: E402
from chassis_utils.solve import Gram, kl_fit, low_rank  # noqa: E402
from refinement import certified, refine  # noqa: E402
from semantic import adapted, gains  # noqa: E402

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
    for name, step in (("closed", 0), ("few", min(FEW, len(course) - 1)), ("end", -1)):
        found[name] = {"rows": 1 - float(course["kl"].iloc[step]) / identity}
        found[name] |= {side: float(table.loc[name, side]) for side in ("recovered", "recovered_low", "recovered_high")}
    return found


def same(base: LanguageModel, args: argparse.Namespace) -> dict[str, list]:
    """Experts of the base's tokenizer: the final state's family, and v2's last map behind its edits."""
    kept: dict[str, list] = {}
    for name, domain in EXPERTS.items():
        expert = load(name, device="cpu")
        train, val = texts(base, domain, args)
        a, held = (harvest(base, expert, probes, "all", [-1], progress=False) for probes in (train, val))
        identity = float(evaluate(base, expert, [], a)["kl"].iloc[0])
        shallow, deep = fit(a, "rrr", lam=1e-3 * len(a)), fit(a, "v2")
        families = ((a, shallow), (a.on(base.edited(*deep.edits), [*deep.reads, base.num_layers]), deep))
        for rows, start in families:
            kept.setdefault(name, []).append(optimum(rows, start, identity, held, args))
            print(name, json.dumps(kept[name][-1]), flush=True)
    return kept


def foreign(base: LanguageModel, args: argparse.Namespace) -> dict[str, list]:
    """An expert of another tokenizer: `fit`'s v2 of it, and the optima of its objective at its penalty and beside."""
    own, (train, val), kept = load("pocket-phi", device="cpu"), texts(base, "math", args), []
    expert = ForeignExpert(Bridge(own, base, "C"), train)
    final = base.num_layers
    places = [final, final - 1, f"block {final - 1}"]
    a, held = (harvest(base, expert, probes, "all", places, progress=False) for probes in (train, val))
    v2 = fit(a)
    features = Features((final, *(place for place in a.layers if place != final)))
    x, basis = features(a.hidden), base.readout.weight.T
    basis = basis - basis.mean(1, keepdim=True)

    targets = a.expert.readout(a.expert_hidden).softmax(-1)  # made once: it costs more than the rest of a pass

    def given(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return base.readout.linear(a.hidden[final][rows]), targets[rows]

    def judged(adapter: Adapter) -> dict[str, Any]:
        row = evaluate(base, expert, adapter, held).iloc[-1]
        shares = {side: float(row[side]) for side in ("recovered", "recovered_low", "recovered_high")}
        return shares | {"gains": gains(held, adapted(adapter))}

    kept.append({"family": "v2", "rows": len(a), "passes": v2.info["steps"], "penalty": v2.info["lam"], **judged(v2)})
    print(kept[-1], flush=True)
    chosen = PENALTIES.index(v2.info["lam"])
    for penalty in PENALTIES[max(0, chosen - 1) : chosen + 2]:
        steps: list = []
        kl_fit(x, given, basis, penalty, lambda *step, to=steps: to.append(step), args.steps)
        weight, bias, gradient = steps[-1]
        factors = low_rank(weight, Gram.of(x, x[:, :0]).xx)
        end = assembled(a, final, factors, bias, features=features, space="hidden", info={}).named("optimum")
        within = certified(torch.cat([x, torch.ones_like(x[:, :1])], 1), penalty)
        told = {"family": "optimum", "rows": len(a), "passes": len(steps), "penalty": penalty}
        kept.append(told | {"gradient": gradient, "within": within(gradient)} | judged(end))
        print(kept[-1], flush=True)
    return {own.name: kept}


def texts(base: LanguageModel, domain: str, args: argparse.Namespace) -> tuple[Probes, Probes]:
    """Training and validation text of a corpus."""
    sizes = {"train": args.tokens, "val": args.val_tokens}
    train, val = (text(base, args.corpora, domain, split, n) for split, n in sizes.items())
    return train, val


def main() -> None:
    """Fit, go on to the optimum, judge, write `notebooks/optimum.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--tokens", type=int, default=30_000, help="to fit on")
    parser.add_argument("--val-tokens", type=int, default=4_000, help="of validation text, to judge on")
    parser.add_argument("--steps", type=int, default=40, help="passes to the optimum")
    parser.add_argument("--penalty", type=float, default=1.0, help="of the squared distance from the closed form")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load("pocket-base", device="cpu")
    for part in args.parts:
        keep(RESULTS, **PARTS[part](base, args))


PARTS = {"same": same, "foreign": foreign}

if __name__ == "__main__":
    command(main)
