"""How far a fit is from the convex optimum of its family, with proof, and what few passes make of it.

python benchmarks/optimum.py --corpora DIR [--parts same foreign] [--families rrr v2] [--penalties 1 0.1]

Every family is kept as soon as it is measured, and those that are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "notebooks")]
from bench import command, keep, write  # noqa: E402
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
    gather,
    harvest,
    load,
)
from chassis_utils.adapter import assembled  # noqa: E402
from chassis_utils.distill import PENALTIES  # noqa: E402
from chassis_utils.solve import Gram, kl_fit, low_rank  # noqa: E402
from refinement import REFINERS, Rows, families, last_block  # noqa: E402
from semantic import adapted, gains  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "optimum.json"
FEW = 10  # passes that the closed form may be helped by


def optimum(
    family: str, a: Activations, start: Adapter, penalty: float, held: Activations, args: argparse.Namespace
) -> dict[str, Any]:
    """Shares of the identity KL at the closed form, after few passes and at the end, on the rows and on other text."""
    rows = a.on(a.base.edited(*start.edits), [*start.reads, a.final]) if start.edits else a
    walk = [*REFINERS["near"](Rows(rows, start), start, args.steps, penalty)]
    few = max((one for one in walk if one.info["passes"] <= FEW), key=lambda one: one.info["passes"], default=start)
    found = {"family": family, "rows": len(a), "steps": len(walk), "penalty": penalty}
    stops = {"closed": start, "few": few, "end": walk[-1]}
    # Without values of the closed form's own map, which is one part of these.
    adapters = [replace(one, values=None).named(name) for name, one in stops.items()]
    on_rows, on_text = (evaluate(x.base, x.expert, adapters, x).set_index("method") for x in (a, held))
    for name, one in stops.items():
        found[name] = {"passes": one.info.get("passes", 0), "rows": float(on_rows.loc[name, "recovered"])}
        row = on_text.loc[name]
        found[name] |= {side: float(row[side]) for side in ("recovered", "recovered_low", "recovered_high")}
    return found | {"within": walk[-1].info["within"], "n": len(held), "kl_identity": float(row["kl_identity"])}


def same(base: LanguageModel, args: argparse.Namespace) -> None:
    """Experts of the base's tokenizer: the final state's family, wider ones, and v2's last map behind its edits."""
    final, wider = base.num_layers, families(base.num_layers)
    for name, family in ((name, family) for family in args.families for name in args.experts):
        expert = load(name, device="cpu")
        train, val = texts(base, EXPERTS[name], args)
        places = wider[family].places if family in wider else [final]
        a, held = (harvest(base, expert, probes, "all", places, progress=False) for probes in (train, val))
        if family in wider:
            start = fit(gather(base, expert, train, wider[family], progress=False), "v2")
        else:
            start = fit(a, family, lam=1e-3 * len(a) if family == "rrr" else None)
        for penalty in args.penalties:
            found = optimum(family, a, start, penalty, held, args)
            print(name, json.dumps(found), flush=True)
            there = keep(RESULTS)
            key = (FAMILIES.index(family), -penalty)
            kept = {(FAMILIES.index(one["family"]), -one["penalty"]): one for one in there.get(name, [])} | {key: found}
            write(RESULTS, there | {name: [kept[place] for place in sorted(kept)]})


def foreign(base: LanguageModel, args: argparse.Namespace) -> None:
    """An expert of another tokenizer: `fit`'s v2 of it, and the optima of its objective at its penalty and beside."""
    own, (train, val), kept = load("pocket-phi", device="cpu"), texts(base, "math", args), []
    expert = ForeignExpert(Bridge(own, base, "C"), train)
    final = base.num_layers
    places = last_block(final).places
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

    kept.append({"family": "v2", "rows": len(a), "steps": v2.info["steps"], "penalty": v2.info["lam"], **judged(v2)})
    print(kept[-1], flush=True)
    chosen = PENALTIES.index(v2.info["lam"])
    for penalty in PENALTIES[max(0, chosen - 1) : chosen + 2]:
        steps: list = []
        kl_fit(x, given, basis, penalty, lambda *step, to=steps: to.append(step), args.steps)
        weight, bias, within = steps[-1]
        factors = low_rank(weight, Gram.of(x, x[:, :0]).xx)
        end = assembled(a, final, factors, bias, features=features, space="hidden", info={}).named("optimum")
        told = {"family": "optimum", "rows": len(a), "steps": len(steps), "penalty": penalty, "within": within}
        kept.append(told | judged(end))
        print(kept[-1], flush=True)
    keep(RESULTS, **{own.name: kept})


def texts(base: LanguageModel, domain: str, args: argparse.Namespace) -> tuple[Probes, Probes]:
    """Training and validation text of a corpus."""
    sizes = {"train": args.tokens, "val": args.val_tokens}
    train, val = (text(base, args.corpora, domain, split, n) for split, n in sizes.items())
    return train, val


def main() -> None:
    """Fit, go on to the optimum, judge, write to `notebooks/optimum.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--experts", nargs="+", choices=[*EXPERTS], default=[*EXPERTS], help="of part same")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="of part same")
    parser.add_argument("--tokens", type=int, default=30_000, help="to fit on")
    parser.add_argument("--val-tokens", type=int, default=4_000, help="of validation text, to judge on")
    parser.add_argument("--steps", type=int, default=40, help="to the optimum")
    parser.add_argument(
        "--penalties", type=float, nargs="+", default=[1.0], help="of the squared distance from the closed form"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load("pocket-base", device="cpu")
    for part in args.parts:
        PARTS[part](base, args)


FAMILIES = ("rrr", "last_block", "layers", "relu", "fourier", "square", "v2")
PARTS = {"same": same, "foreign": foreign}

if __name__ == "__main__":
    command(main)
