"""v2 on the corpora that the pocket models come from: fitted on their training text, judged once on their test text.

python benchmarks/corpora.py --corpora DIR [--tokens 60000]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pandas as pd
from bench import command

from chassis_utils import LanguageModel, Probes, evaluate, fit, harvest, load

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from pocket_recipe import read_corpora  # noqa: E402

RESULTS = Path(__file__).parents[1] / "notebooks" / "corpora.json"
EXPERTS = {"pocket-math": "math", "pocket-shakespeare": "verse"}
RANKS = (4, 8, 16, 32, 64, 128)


def text(base: LanguageModel, corpora: str, domain: str, split: str, tokens: int) -> Probes:
    """Documents of a split, in order, until there are so many tokens; in pieces that the base can read."""
    chosen, total = [], 0
    for document in read_corpora(corpora, split)[domain]:
        # Scenes are longer than the base reads: they are cut at line ends, at about a thousand characters.
        lines = document.splitlines(keepends=True)
        ends = [sum(map(len, lines[: i + 1])) // 1000 for i in range(len(lines))]
        for part in range(ends[-1] + 1):
            piece = "".join(line for line, end in zip(lines, ends, strict=True) if end == part).strip()
            length = len(base.tokenizer(piece, verbose=False)["input_ids"])
            if piece and length <= base.context and total < tokens:
                chosen.append(piece)
                total += length
    return Probes(f"{domain} corpus", "text" if split == "test" else split, tuple(chosen))


def main() -> None:
    """Fit, judge, print the table, write `notebooks/corpora.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--tokens", type=int, default=60_000, help="to fit on")
    parser.add_argument("--test-tokens", type=int, default=40_000, help="to judge on")
    args = parser.parse_args()
    base, found = load("pocket-base", device="cpu"), []
    for name, domain in EXPERTS.items():
        expert = load(name, device="cpu")
        train, test = (
            text(base, args.corpora, domain, split, n)
            for split, n in (("train", args.tokens), ("test", args.test_tokens))
        )
        start = time.perf_counter()
        a = harvest(base, expert, train, "all", [-1], progress=False)
        harvested = time.perf_counter() - start
        start = time.perf_counter()
        v2 = fit(a)
        seconds = harvested + time.perf_counter() - start
        cuts = [v2.at_rank(rank) for rank in {*RANKS, v2.rank} if rank <= v2.rank]
        table = evaluate(base, expert, [fit(a, "v1"), fit(a, "rrr", lam=1e-3 * len(a)), *cuts], test)
        found.append(table.assign(tokens=len(a), seconds=seconds, edits=len(v2.edits), parameters=v2.num_parameters))
    frame = pd.concat(found, ignore_index=True)
    columns = "expert method rank tokens n kl kl_identity recovered recovered_low recovered_high top1_agreement".split()
    columns += ["bits_per_byte", "seconds", "parameters"]
    print(frame[columns].to_string(index=False, float_format="{:.4g}".format))
    temporary = RESULTS.with_name(f".{RESULTS.name}.{os.getpid()}")
    temporary.write_text(json.dumps(json.loads(frame[columns].to_json(orient="records")), indent=1) + "\n")
    os.replace(temporary, RESULTS)


if __name__ == "__main__":
    command(main)
