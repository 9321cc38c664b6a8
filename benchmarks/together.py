"""Several experts at once: one map that reads for all of them, against a map for each, at the same count of numbers.

python benchmarks/together.py --corpora DIR [--tokens 15000] [--ranks 8 32 128]

Ridge solves every expert's columns for themselves, so all that experts can share is what reads: with the maps to their
logits side by side, the best `down` of a rank for all at once is one singular value decomposition, as it is for one.
"""

import argparse
import json
from pathlib import Path

import torch
from bench import command, keep
from corpora import EXPERTS, text

from chassis_utils import Adapter, Features, Probes, evaluate, harvest, load
from chassis_utils.adapter import assembled, difference, heads
from chassis_utils.solve import low_rank

RESULTS = Path(__file__).parents[1] / "notebooks" / "together.json"
COLUMNS = ["n", "kl", "kl_identity", "recovered", "recovered_low", "recovered_high"]


def main() -> None:
    """Fit on the text of all experts, judge each on validation text of its own, write `notebooks/together.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--tokens", type=int, default=15_000, help="of every expert's text, to fit on")
    parser.add_argument("--val-tokens", type=int, default=4_000, help="of validation text each, to judge on")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128], help="of a map for each expert")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load("pocket-base", device="cpu")
    final, vocab = base.num_layers, base.vocab_size
    features = Features((final, final - 1, f"block {final - 1}"))
    parts = [text(base, args.corpora, domain, "train", args.tokens) for domain in EXPERTS.values()]
    both = Probes("both corpora", "train", tuple(prompt for part in parts for prompt in part.prompts))
    maps, shifts, rows, held = [], [], [], []
    for name, domain in EXPERTS.items():
        expert = load(name, device="cpu")
        rows.append(harvest(base, expert, both, "all", features.places, progress=False))
        weight, bias, gram = difference(rows[-1], final, 1e-3 * len(rows[-1]), features)
        head, shift = heads(rows[-1])
        maps.append(low_rank(weight, gram.xx, head))
        shifts.append(bias @ head + shift)
        val = text(base, args.corpora, domain, "val", args.val_tokens)
        held.append(harvest(base, expert, val, "all", features.places, progress=False))
    # Factors of full rank are the map itself.
    whole = torch.cat([down @ up.double() for down, up, _ in maps], dim=1)
    down, up, values = low_rank(whole, gram.xx)
    shared = [(down, part, values) for part in up.split(vocab, dim=1)]
    p, count, found = len(down), len(EXPERTS), []

    def judge(way: str, factors: list, rank: int) -> None:
        row = {"way": way, "rank": rank}
        row["numbers"] = rank * (p + count * vocab if way == "shared" else count * (p + vocab))
        for name, a, val, own, shift in zip(EXPERTS, rows, held, factors, shifts, strict=True):
            adapter: Adapter = assembled(a, final, own, shift, features=features).named(way).at_rank(rank)
            told = json.loads(evaluate(base, val.expert, adapter, val).iloc[-1][COLUMNS].to_json())
            found.append(row | {"expert": name} | told)
            print(found[-1], flush=True)

    for rank in args.ranks:
        judge("each", maps, rank)
        judge("shared", shared, round(rank * count * (p + vocab) / (p + count * vocab)))
    keep(RESULTS, base=base.name, tokens=len(rows[0]), features=p, rows=found)


if __name__ == "__main__":
    command(main)
