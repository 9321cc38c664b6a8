"""What adapters to an expert with another tokenizer reach against how much text they read, judged once on test text.

python benchmarks/bridged.py --corpora DIR [--parts v2 shorter natural] [--epochs 3]

`v2` is one change of the head's input (`fit`); `natural` edits every block, and `natural_v2` is v2 behind these edits.
Part `shorter` is `natural` on less text, every size a run of its own. Positions count once however often they were
read: of a run on its way, what it has read so far by how often it reads the text. Beside them bridges that need the
expert at run time, fitted on all the text. The rate of `natural`, how often it reads the text and all other choices
were made on validation text. The parts may run side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from bench import command, keep, write
from corpora import text

from chassis_utils import (
    Activations,
    Bridge,
    ChassisError,
    ForeignExpert,
    LanguageModel,
    Probes,
    evaluate,
    fit,
    harvest,
    load,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from natural import chunks, natural
from refinement import last_block
from semantic import Answer, adapted, bytes_first, gains, hidden_to_hidden, judged, target

RESULTS = Path(__file__).parents[1] / "notebooks" / "bridged.json"
COLUMNS = (
    "method positions seconds split n kl kl_low kl_high kl_identity recovered recovered_low recovered_high".split()
)
COLUMNS += ["bits_per_byte", "lam", "steps", "gains"]
RATE = 0.006  # 0.012 was the better one on validation text after a few parts, and got no further after many


@dataclass
class Race:
    """The models and texts that all adapters share, and what was found."""

    base: LanguageModel
    expert: ForeignExpert
    whole: Probes
    val: Probes
    test: Probes
    rows: list[dict] = field(default_factory=list)

    @property
    def places(self) -> tuple[int | str, ...]:
        """What v2 reads of an expert with another tokenizer."""
        return last_block(self.base.num_layers).places

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every prompt of the training text."""
        return [len(ids) for ids in self.base.tokenizer(list(self.whole.prompts), verbose=False)["input_ids"]]

    @cached_property
    def there(self) -> Activations:
        """The test text, read by both models."""
        return harvest(self.base, self.expert, self.test, "all", [-1], progress=False)

    def part(self, tokens: int, seed: int = 0) -> list[Probes]:
        """The training text in random order, in parts of so many tokens."""
        return chunks(self.whole, self.lengths, tokens, seed)

    def judge(self, method: str, adapter: Any, positions: int, seconds: float, last: bool = False) -> None:
        """A row of what an adapter reaches on validation text, or at last on test text."""
        table = evaluate(self.base, self.expert, adapter, self.test if last else self.val, positions="all")
        row = table.iloc[0 if method == "identity" else -1].to_dict()
        row |= {name: getattr(adapter, "info", {}).get(name) for name in ("lam", "steps")}
        row["gains"] = gains(self.there, adapted(adapter)) if last and adapter else None
        self.rows.append(row | {"method": method, "positions": positions, "seconds": seconds})
        shown = "method positions split kl recovered bits_per_byte seconds lam steps".split()
        print({key: self.rows[-1][key] for key in shown}, flush=True)

    def table(self, *more: pd.DataFrame) -> list[dict]:
        """The rows, and others of the same columns, as they are kept."""
        frame = pd.concat([pd.DataFrame(self.rows), *more], ignore_index=True).reindex(columns=COLUMNS)
        return json.loads(frame.to_json(orient="records"))


def closed(race: Race, args: argparse.Namespace) -> list[dict]:
    """v2 at every size, and what needs the expert at run time."""
    base, expert, places = race.base, race.expert, race.places
    race.judge("identity", [], 0, 0.0)
    for tokens in args.tokens:
        start = time.process_time()
        a = harvest(base, expert, race.part(tokens)[0], "all", places, progress=False)
        adapter = fit(a)
        spent = time.process_time() - start
        race.judge("v2", adapter, len(a), spent)
    race.judge("identity", [], 0, 0.0, last=True)
    race.judge("v2", adapter, len(a), spent, last=True)
    a = harvest(base, expert, race.whole, "all", [-1], progress=False)
    bridges: dict[str, Answer] = {"hidden_to_hidden": hidden_to_hidden(a), "bytes": bytes_first(a), "bridge": target}
    at_run_time = judged(race.there, bridges).assign(positions=len(a), seconds=None)
    at_run_time["gains"] = [gains(race.there, answer) for answer in bridges.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an expert that is as near to itself as can be
        alone = [evaluate(expert.model, expert.model, [], some, positions="all") for some in (race.val, race.test)]
    return race.table(at_run_time, pd.concat(alone).assign(method="expert", positions=0, seconds=None))


def read(race: Race, args: argparse.Namespace) -> list[Probes]:
    """What natural reads: the text, as often as told, in another order each time."""
    return [part for seed in range(args.epochs) for part in race.part(args.part, seed)]


def shorter(race: Race, args: argparse.Namespace) -> list[dict]:
    """Edits by natural gradients from less text."""
    for tokens in args.shorter:
        some = replace(race, whole=race.part(tokens)[0])
        start = time.process_time()
        *_, (seen, _, edits) = natural(race.base, race.expert, read(some, args), RATE)
        race.judge("natural", edits, seen // args.epochs, time.process_time() - start)
    return race.table()


def descended(race: Race, args: argparse.Namespace) -> list[dict]:
    """Edits of every block by natural gradients, and v2 behind the last of them."""
    base, expert, places = race.base, race.expert, race.places
    start, parts = time.process_time(), read(race, args)
    for number, (seen, _, edits) in enumerate(natural(base, expert, parts, RATE), 1):
        spent = time.process_time() - start
        if number & (number - 1) == 0 or number % 32 == 0 or number == len(parts):
            race.judge("natural", edits, seen // args.epochs, spent)
            start = time.process_time() - spent  # judging is not counted
    start = time.process_time()
    a = harvest(base.edited(*edits.edits), expert, race.part(args.behind)[0], "all", places, progress=False)
    both = fit(a)
    # Fitted to the edited base, it and the edits belong to the bare one.
    info = both.info | {"base_revision": base.revision}
    both = replace(both, edits=edits.edits, fitted_on=both.fitted_on | edits.fitted_on, info=info)
    more, seen = spent + time.process_time() - start, seen // args.epochs
    race.judge("natural_v2", both, seen, more)
    race.judge("natural", edits, seen, spent, last=True)
    race.judge("natural_v2", both, seen, more, last=True)
    return race.table()


def main() -> None:
    """Fit, judge, put the rows of every part into `notebooks/bridged.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", required=True, help="folder as the recipe of the pocket models reads it")
    parser.add_argument("--expert", default="pocket-phi")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 6000, 20_000, 60_000, 120_000], help="for v2")
    parser.add_argument("--text", type=int, default=1_270_000, help="tokens of the text")
    parser.add_argument("--epochs", type=int, default=3, help="times that natural reads the text")
    parser.add_argument("--shorter", type=int, nargs="+", default=[20_000, 120_000], help="for part shorter")
    parser.add_argument("--part", type=int, default=8000, help="tokens a step of natural")
    parser.add_argument("--behind", type=int, default=60_000, help="tokens of it that v2 behind natural reads again")
    parser.add_argument("--anew", action="store_true", help="drop figures of another setting")
    parser.add_argument("--validation", type=int, default=6000)
    parser.add_argument("--test", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, own = load("pocket-base", device="cpu"), load(args.expert, device="cpu")
    sizes = {"train": max(*args.tokens, args.text), "val": args.validation, "test": args.test}
    whole, val, test = (text(base, args.corpora, "math", split, n) for split, n in sizes.items())
    # One rule for all: counted on all the text that anything is fitted on.
    expert = ForeignExpert(Bridge(own, base, "C"), whole)
    setting = {"base": base.name, "expert": args.expert, "counted": whole.name, "text": whole.digest}
    setting |= {"val": val.digest, "test": test.digest, "threads": torch.get_num_threads()}
    steps = {"part": args.part, "rate": RATE, "epochs": args.epochs, "behind": args.behind}
    others = ("natural", "shorter")
    wanted = setting | (steps if {*args.parts} & {*others} else {})
    there = keep(RESULTS)
    if (other := [name for name, value in wanted.items() if there.get(name, value) != value]) and not args.anew:
        raise ChassisError(f"{RESULTS.name} is of another {', '.join(other)}: --anew drops what does not go with these")
    for part in args.parts:
        found = PARTS[part](Race(base, expert, whole, val, test), args)
        shown = pd.DataFrame(found).drop(columns="gains")
        print(shown.to_string(index=False, float_format="{:.4g}".format), flush=True)
        there = keep(RESULTS)
        if any(there.get(name) != value for name, value in setting.items()):
            there = {}  # no other part of another setting
        if part in others and any(there.get(name) != value for name, value in steps.items()):
            there = {name: value for name, value in there.items() if name not in others}
        write(RESULTS, there | setting | {part: found} | (steps if part in others else {}))


PARTS = {"v2": closed, "shorter": shorter, "natural": descended}

if __name__ == "__main__":
    command(main)
