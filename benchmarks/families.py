"""What larger families cost over the bare passes, and what memory they take as tokens grow.

python benchmarks/families.py [--passages 64] [--small 16] [--out FILE]; `README.md` defines what is counted.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from bench import RANKS, alone, bare, command, forget, keep, quotients, reached, setting, show, timed, whole
from scale import measured, memory

from chassis_utils import (
    Activations,
    ChassisError,
    Features,
    LanguageModel,
    Probes,
    evaluate,
    fit,
    gather,
    harvest,
    load,
    probe_set,
)
from chassis_utils.activations import tokenize
from ownwords import written

RESULTS = Path(__file__).parents[1] / "notebooks" / "scale.json"
BARE = ("bare passes", "bare passes without heads")
TIMES = 16  # as many tokens, for the memory
RANDOM = 512


def run(pair: tuple[LanguageModel, LanguageModel], train: Probes, held_out: Probes, family: str) -> None:
    """From prompts to the table of the ranks on held-out text, every position, nothing kept from before."""
    forget(*pair)
    base, expert = pair
    final, options = base.num_layers, {"progress": False}
    if family == "final layer, statistics":
        adapter = fit(gather(base, expert, train, Features((final,)), **options))
    elif family.startswith("v2"):
        a = harvest(base, expert, train, "all", [-1], **options)
        adapter = fit(a, blocks=family == "v2")
    else:
        every = tuple(range(final + 1))
        features = {
            "final layer": Features((final,)),
            "last block": Features((final, final - 1, f"block {final - 1}")),
            "all layers": Features(every),
            f"all layers and {RANDOM} ReLU": Features(every, random=RANDOM),
        }[family]
        a = harvest(base, expert, train, "all", features.places, **options)
        adapter = fit(a, "rrr", lam=1e-3 * len(a), features=features)
    evaluate(base, expert, [adapter.at_rank(rank) for rank in RANKS], held_out, positions="all")


FAMILIES = ("final layer", "final layer, statistics", "last block", "all layers", f"all layers and {RANDOM} ReLU")
FAMILIES += ("v2 without edits", "v2")


def costs(base: LanguageModel, expert: LanguageModel, train: Probes, held_out: Probes) -> dict[str, list[float]]:
    """CPU time of every family over that of both models' bare passes on the same text."""
    batches = whole(base, [train, held_out])
    models = {BARE[0]: [base.model, expert.model], BARE[1]: [base.backbone, expert.backbone]}
    parts = {name: partial(bare, both, batches) for name, both in models.items()}
    parts |= {family: partial(run, (base, expert), train, held_out, family) for family in FAMILIES}
    seconds = timed(parts, time.process_time)
    return {name: ratio for family in FAMILIES for name, ratio in quotients(seconds, family, BARE).items()}


def remember(names: tuple[str, str], prompts: tuple[str, ...], way: str) -> tuple[int | None, int | None]:
    """Memory of this process, bytes: held with both models loaded and run on one prompt, and the peak above that.

    None where the system does not tell.
    """
    torch.set_num_threads(1)
    base, expert = (load(name, device="cpu") for name in names)
    for model in (base, expert):
        bare([model.backbone], whole(model, [Probes("one", "train", prompts[:1])]))
    probes, beside = Probes("written", "train", prompts), {"progress": False}

    def run() -> None:
        if way == "gather, fit":
            fit(gather(base, expert, probes, Features((base.num_layers,)), **beside))
        else:
            layers = None if way == "harvest of all layers, fit" else [-1]
            a: Activations = harvest(base, expert, probes, "all", layers, **beside)
            fit(a, blocks=way != "harvest, fit without edits")

    # The peak starts again from what is held: loading the models takes more for a moment than small runs do.
    return memory("VmRSS"), measured(run, 0.0)[1]


def memories(names: tuple[str, str], text: Probes, tokens: list[int], small: int) -> list[dict]:
    """Memory of each way at `small` passages and at 16 times as many, each in a process of its own."""
    found = []
    for way in ("gather, fit", "harvest, fit without edits", "harvest of all layers, fit"):
        sizes = [small, small * TIMES]
        (held, low), (_, high) = alone(remember, [(names, text.prompts[:n], way) for n in sizes])
        if None in (held, low, high):
            print("The peak of memory cannot be read here: Linux tells it.")
            return []
        few, many = (sum(tokens[:n]) for n in sizes)
        row = {"way": way, "tokens": few, "tokens_large": many, "held_bytes": held}
        row |= {"more_bytes": low, "more_bytes_large": high, "ratio": (held + high) / (held + low)}
        found.append(row | {"bytes_per_token": (high - low) / (many - few)})
    return found


def main() -> bool:
    """Measure, print, put the figures into the file; False if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket-base")
    parser.add_argument("--expert", default="pocket-math")
    parser.add_argument("--held-out", default="math-text", help="bundled text, of which `val` is judged on")
    parser.add_argument("--passages", type=int, default=64, help="written by the expert, to fit on; for the times")
    parser.add_argument("--small", type=int, default=16, help=f"passages, and {TIMES} times as many; for the memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, beside what is there")
    args = parser.parse_args()
    if min(args.passages, args.small) < 8:
        raise ChassisError(f"{args.passages} and {args.small} passages: give at least 8, one in eight is held out")
    torch.set_num_threads(1)
    base, expert = (load(name, device="cpu") for name in (args.base, args.expert))
    text = written(expert, max(args.passages, args.small * TIMES))
    tokens = [len(ids) for ids in tokenize(base, text)[0]]
    remembered = memories((args.base, args.expert), text, tokens, args.small)
    train = Probes(text.name, text.split, text.prompts[: args.passages])
    held_out = probe_set(args.held_out, "val")
    ratios = costs(base, expert, train, held_out)
    about = {key: value for key, value in vars(args).items() if key != "out"} | {"ranks": RANKS} | setting()
    about["tokens"] = sum(tokens[: args.passages])
    about["held_out_tokens"] = sum(map(len, tokenize(base, held_out)[0]))
    show(about, ratios)
    for row in remembered:
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    cost = statistics.median(ratios["final layer / bare passes"])
    met = {f"cost {cost:.2f} at most 1.15": cost <= 1.15}
    met |= {f"memory {row['ratio']:.2f} at most 1.2": row["ratio"] <= 1.2 for row in remembered[:1]}
    keep(args.out, families={"setting": about, "ratios": ratios, "memory": remembered, "targets": met})
    return reached(met)


if __name__ == "__main__":
    command(main)
