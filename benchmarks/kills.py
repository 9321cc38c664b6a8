"""Kill long work at random moments, `kill -9`, until it ends: nothing may be lost, and no figure may differ.

    python benchmarks/kills.py --kills 50 --what grid run harvest gather save [--workers 2] [--out kills.json]

Each life of a command is ended after a time drawn from the whole length of an uninterrupted one; a life that ends by
itself closes a round, whose results must equal, to the bit, those of the command that nobody killed. `grid` and `run`
are of toy pages of about two seconds; `harvest` and `gather` write shards of eight prompts of the pocket models; `save`
writes two adapters in turn over one another, and what is found after a kill must be one of them, whole. A line of JSON
for each. `benchmarks/faults.py` does to the same works what is no kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml
from bench import keep
from lives import ROOT, life
from nbformat.v4 import new_code_cell, new_notebook

from chassis_utils import Adapter, ChassisError

CODE = """
import random, time
from records import Records
with open("../begun.txt", "a") as file:
    print(f"{stem}{suffix},{seed}", file=file)
draw = random.Random(seed)
for experiment in ("first", "second"):
    records = Records(out_dir, experiment=experiment + suffix, notebook=stem, seed=seed)
    for rank in range(1, 200):
        records.add(metric="kl", value=draw.random(), method="ridge", rank=rank)
    records.save()
    time.sleep(0.2)
"""
HARVEST = """
import hashlib, sys
from chassis_utils import activations, harvest, load, probe_set
activations.SHARD = 8
models = (load(f"pocket-{name}", device="cpu") for name in ("base", "math"))
found = harvest(*models, probe_set("math-text", n=48), "all", out_dir="shards", batch_tokens=256, progress=False)
digest = hashlib.sha256(found.expert_hidden.numpy().tobytes())
for layer in found.layers:
    digest.update(found.layer(layer).numpy().tobytes())
open("digest.txt", "w").write(digest.hexdigest())
"""
GATHER = """
import json, sys
from safetensors import safe_open
from chassis_utils import Features, load, probe_set
from gathering import Gathering
if __name__ == "__main__":
    base, expert = (load(f"pocket-{name}", device="cpu") for name in ("base", "math"))
    where = {"scheduler": sys.argv[1]} if len(sys.argv) > 1 else {"workers": 2}
    with Gathering("sums", shard=8, **where) as gather:
        gather(base, expert, probe_set("math-text", n=64), Features((base.num_layers,)), progress=False)
    from pathlib import Path
    (path,) = Path("sums").glob("*/sum.safetensors")
    with safe_open(path, framework="pt") as file:
        Path("digest.txt").write_text(json.loads(file.metadata()["key"])["sha256"])
"""
SAVE = """
from itertools import cycle
from chassis_utils import Adapter
for one in cycle([Adapter.load("first"), Adapter.load("second")]):
    one.save("adapter")
"""
TIMES = {"time", "git", "seconds"}  # what two runs need not have alike


@dataclass(frozen=True)
class Work:
    """A command in a folder, what it must leave, and what it is cleared of before a round."""

    command: list[str]
    left: Callable[[Path], Any]
    fresh: tuple[str, ...]
    #: Names of the pieces of work that were begun so far
    begun: Callable[[Path], list[str]] = lambda root: []


def notebook(path: Path, stem: str, suffix: str, code: str = CODE) -> None:
    """A page that writes records twice, or runs other code."""
    first = new_code_cell("seed = 0\nout_dir = '.'", metadata={"tags": ["parameters"]})
    page = new_notebook(cells=[first, new_code_cell(f"stem, suffix = '{stem}', '{suffix}'"), new_code_cell(code)])
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(page, path / f"{stem}.ipynb")


def project(root: Path, cells: int) -> Path:
    """A project of some pages, and a grid of as many cells of the first."""
    (root / "notebooks").mkdir(parents=True)
    stems = ["cell", *(f"page{i}" for i in range(1, cells))]
    for stem in stems:
        notebook(root / "notebooks", stem, "" if stem == "cell" else f"_{stem}")
    toy = {"description": "toy", "defaults": {}, "notebooks": {stem: {} for stem in stems}}
    (root / "notebooks" / "profiles.yml").write_text(yaml.safe_dump({"toy": toy}, sort_keys=False))
    whole = {"profile": "toy", "notebooks": ["cell"], "parameters": {"seed": [*range(cells)]}}
    (root / "grid.yml").write_text(yaml.safe_dump(whole))
    return root


def tables(root: Path) -> list[dict]:
    """All records of a grid, and its cells."""
    out = root / "book" / "run" / "toy" / "grid" / "grid"
    frames = (pd.read_csv(out / name) for name in ("grid.csv", "cells.csv"))
    return [frame.drop(columns=[*TIMES & {*frame}]).astype(object).fillna("").to_dict("list") for frame in frames]


def pages(root: Path) -> list:
    """All records of a run, and the outputs of its pages."""
    out = root / "book" / "run" / "toy"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    rows.sort(key=lambda row: json.dumps(row, sort_keys=True))  # a page that ran later wrote later
    whole = {path.name: [cell.get("outputs") for cell in nbformat.read(path, 4).cells] for path in out.glob("*.ipynb")}
    return [rows, whole, sorted(path.name for path in out.glob(".*.partial*"))]


def works(root: Path, workers: int, scheduler: str | None = None) -> dict[str, Work]:
    """What ends by itself, in a project of `project`; grid and gather on worker processes, or a scheduler's."""
    chassis, python = [sys.executable, "-m", "chassis_utils.cli"], [sys.executable]
    where = ["--workers", str(workers)] if scheduler is None else ["--scheduler", scheduler]
    (root / "gather.py").write_text(GATHER)  # a file, since worker processes import what began them

    def lines(*names: str) -> Callable[[Path], list[str]]:
        def begun(root: Path) -> list[str]:
            return [line.split()[0] for name in names for path in root.glob(name) for line in path.open()]

        return begun

    def digest(root: Path) -> str:
        return (root / "digest.txt").read_text()

    pieces, shards = lines("begun.txt"), lines("sums/*/tries.txt")
    gather = [*python, "gather.py", *([scheduler] if scheduler else [])]
    return {
        "grid": Work([*chassis, "grid", "grid.yml", *where], tables, ("book", "begun.txt"), pieces),
        "run": Work([*chassis, "run", "--profile", "toy", "--missing"], pages, ("book", "begun.txt"), pieces),
        "harvest": Work([*python, "-c", HARVEST], digest, ("shards", "digest.txt")),
        "gather": Work(gather, digest, ("sums", "digest.txt"), shards),
    }


def cleared(root: Path, work: Work) -> None:
    """Take away what a work left."""
    for name in work.fresh:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink(missing_ok=True)


def killed(root: Path, work: Work, kills: int, draw: random.Random) -> dict[str, Any]:
    """Rounds of a work, each killed until it ends, until there were so many kills."""
    done, moments, rounds, again, most, differ = 0, [], 0, 0, 0, 0
    clock = time.monotonic()
    life(work.command, cwd=root)
    length, whole = time.monotonic() - clock, work.left(root)
    while done < kills:
        cleared(root, work)
        begun: list[str] = []
        ended = False
        while not ended:
            # The last round is left to end.
            moment = length * draw.random() if done < kills else None
            ended = life(work.command, moment, root) is not None
            done += not ended
            moments += [] if ended else [round(moment / length, 3)]
            now = work.begun(root)
            most, begun = max(most, sum(one in begun for one in now[len(begun) :])), now
        rounds, again = rounds + 1, again + len(begun) - len({*begun})
        differ += work.left(root) != whole
    told = {"kills": done, "rounds": rounds, "begun_again": again, "most_by_a_restart": most}
    return told | {"rounds_that_differ": differ, "seconds_of_a_round": round(length, 1), "moments": moments}


def saved(root: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Saves over one another, killed at moments after the first; what is there each time is one of the two, whole."""
    shape, revisions, lost, moments = (512, 64, 4096), [], 0, []
    import torch

    for seed, name in enumerate(("first", "second")):
        own = torch.Generator().manual_seed(seed)
        maps = (torch.randn(size, generator=own) for size in (shape[:2], shape[1:], shape[2:]))
        one = Adapter("ridge", 1, *maps, "pocket-base", "0" * 16)
        revisions.append(one.revision)
        one.save(root / name)
    for _ in range(kills):
        shutil.rmtree(root / "adapter", ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", SAVE], cwd=root, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while not (root / "adapter").exists():
            time.sleep(0.01)
        moments.append(moment := draw.random())
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            lost += Adapter.load(root / "adapter").revision not in revisions
        except ChassisError:
            lost += 1
    return {"kills": kills, "lost": lost, "moments": [round(one, 3) for one in moments]}


def main() -> None:
    """Print one line of JSON for each work, and with --out write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--what", nargs="+", choices=["grid", "run", "harvest", "gather", "save"], default=["grid"])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file, of which other works are kept")
    options = parser.parse_args()
    for what in options.what:
        draw = random.Random(f"{what} {options.seed}")
        with tempfile.TemporaryDirectory() as folder:
            root = project(Path(folder) / "toy", options.cells)
            work = works(root, options.workers).get(what)
            told = killed(root, work, options.kills, draw) if work else saved(root, options.kills, draw)
        told = {"what": what, "workers": options.workers} | told
        print(json.dumps({name: value for name, value in told.items() if name != "moments"}), flush=True)
        if options.out:
            keep(options.out, **{f"{what}, {options.workers} workers": told})


if __name__ == "__main__":
    main()
