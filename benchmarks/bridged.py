"""What adapters to an expert with another tokenizer reach against how much text they read, judged once on test text.

python benchmarks/bridged.py --corpora DIR [--tokens 2000 6000 20000 60000] [--natural 800000]

Two families: `v2`, one change of the head's input (`fit`), and `natural`, edits of every block. Beside them bridges
that need the expert at run time. The rate of `natural` and all choices were made on validation text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from bench import command
from corpora import text

from chassis_utils import Bridge, ForeignExpert, Probes, evaluate, fit, harvest, load
from records import replace_text

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from natural import chunks, natural
from semantic import bytes_first, hidden_to_hidden, judged, target

RESULTS = Path(__file__).parents[1] / "notebooks" / "bridged.json"
COLUMNS = (
    "method positions seconds split n kl kl_low kl_high kl_identity recovered recovered_low recovered_high".split()
)
COLUMNS += ["bits_per_byte"]
RATE = 0.012  # of 0.004 and 0.012, after as many parts, the better on validation text


def main() -> None:
    """Fit at every size, judge, print the table, write `notebooks/bridged.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--expert", default="pocket-phi")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 6000, 20_000, 60_000], help="for v2")
    parser.add_argument("--natural", type=int, default=800_000, help="tokens that natural reads")
    parser.add_argument("--part", type=int, default=8000, help="tokens a step of natural")
    parser.add_argument("--validation", type=int, default=6000)
    parser.add_argument("--test", type=int, default=20_000)
    args = parser.parse_args()
    base, own = load("pocket-base", device="cpu"), load(args.expert, device="cpu")
    final = base.num_layers
    places = [final, final - 1, f"block {final - 1}"]
    whole = text(base, args.corpora, "math", "train", max(*args.tokens, args.natural))
    val, test = (text(base, args.corpora, "math", s, n) for s, n in (("val", args.validation), ("test", args.test)))
    lengths = [len(ids) for ids in base.tokenizer(list(whole.prompts), verbose=False)["input_ids"]]
    rows, kept = [], []

    def judge(method: str, adapter, expert: ForeignExpert, positions: int, seconds: float, on: Probes = val) -> None:
        table = evaluate(base, expert, adapter, on, positions="all")
        several = table if method == "identity" else table.iloc[1:]
        rows.append(several.iloc[-1].to_dict() | {"method": method, "positions": positions, "seconds": seconds})
        print({k: rows[-1][k] for k in ("method", "positions", "split", "kl", "recovered", "bits_per_byte", "seconds")})

    # One rule for all: counted on all the text that anything is fitted on.
    expert = ForeignExpert(Bridge(own, base, "C"), whole)
    judge("identity", [], expert, 0, 0.0)
    for tokens in args.tokens:
        start = time.perf_counter()
        some = chunks(whole, lengths, tokens)[0]
        a = harvest(base, expert, some, "all", places, progress=False)
        adapter = fit(a)
        judge("v2", adapter, expert, len(a), time.perf_counter() - start)
    kept.append(("v2", adapter, len(a), rows[-1]["seconds"]))
    bridges = {"hidden_to_hidden": hidden_to_hidden(a), "bytes": bytes_first(a)}
    start, parts = time.perf_counter(), chunks(whole, lengths, args.part)
    for number, (seen, _, adapter) in enumerate(natural(base, expert, parts, RATE), 1):
        spent = time.perf_counter() - start
        if number & (number - 1) == 0 or number % 16 == 0 or number == len(parts):
            judge("natural", adapter, expert, seen, spent)
            start = time.perf_counter() - spent  # judging is not counted
    kept.append(("natural", adapter, seen, spent))
    # The test text, once.
    judge("identity", [], expert, 0, 0.0, test)
    for method, adapter, positions, seconds in kept:
        judge(method, adapter, expert, positions, seconds, test)
    there = harvest(base, expert, test, "all", [-1], progress=False)
    at_run_time = judged(there, bridges | {"bridge": target}).assign(positions=len(a), seconds=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an expert that is as near to itself as can be
        alone = pd.concat([evaluate(own, own, [], some, positions="all") for some in (val, test)])
    alone = alone.assign(method="expert", positions=0, seconds=None)
    frame = pd.concat([pd.DataFrame(rows), at_run_time, alone], ignore_index=True)[COLUMNS]
    setting = {"base": base.name, "expert": args.expert, "counted": whole.name}
    setting |= {"threads": torch.get_num_threads(), "part": args.part, "rate": RATE}
    print(frame.to_string(index=False, float_format="{:.4g}".format))
    replace_text(RESULTS, json.dumps(setting | {"rows": json.loads(frame.to_json(orient="records"))}, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
