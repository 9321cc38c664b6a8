"""Kill a grid at random moments, `kill -9`, until it ends: nothing may be lost, and no figure may differ.

    python benchmarks/kills.py --kills 20 --workers 2

The grid is of toy cells that take about two seconds. Each life of the command is ended after a time drawn from the
whole length of an uninterrupted grid; one that ends by itself closes a round, whose tables must equal, to the bit,
those of the grid that nobody killed. Printed: kills, rounds, cells run again, and rounds that differed.
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
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import random, time
from records import Records
with open("../begun.txt", "a") as file:
    print(seed, file=file)
draw = random.Random(seed)
for experiment in ("first", "second"):
    records = Records(out_dir, experiment=experiment, notebook="cell", seed=seed)
    for rank in range(1, 200):
        records.add(metric="kl", value=draw.random(), method="ridge", rank=rank)
    records.save()
    time.sleep(0.2)
"""


def project(root: Path, cells: int) -> Path:
    """A project of one notebook that writes records twice, and a grid of so many cells."""
    (root / "notebooks").mkdir(parents=True)
    first = new_code_cell("seed = 0\nout_dir = '.'", metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[first, new_code_cell(CODE)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, root / "notebooks" / "cell.ipynb")
    toy = {"description": "toy", "defaults": {}, "notebooks": {"cell": {}}}
    (root / "notebooks" / "profiles.yml").write_text(yaml.safe_dump({"toy": toy}))
    whole = {"profile": "toy", "notebooks": ["cell"], "parameters": {"seed": [*range(cells)]}}
    (root / "grid.yml").write_text(yaml.safe_dump(whole))
    return root


def live(root: Path, workers: int, seconds: float | None = None) -> bool:
    """Run the command, for so many seconds at most; whether it ended by itself, and well."""
    command = [sys.executable, "-m", "chassis_utils.cli", "grid", "grid.yml", "--workers", str(workers)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "notebooks")))
    options = {"cwd": root, "env": os.environ | {"PYTHONPATH": paths}, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"a grid failed: {told}")
    return True


def tables(root: Path) -> list[pd.DataFrame]:
    """What must not differ: all records but their times, all cells but theirs."""
    out = root / "book" / "run" / "toy" / "grid" / "grid"
    gone = {"grid.csv": ["time", "git"], "cells.csv": ["seconds"]}
    return [pd.read_csv(out / name).drop(columns=columns) for name, columns in gone.items()]


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, kills, rounds, again, differ = random.Random(options.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = project(Path(folder) / "toy", options.cells)
        clock = time.monotonic()
        live(root, options.workers)
        length, whole = time.monotonic() - clock, tables(root)
        while kills < options.kills:
            shutil.rmtree(root / "book")
            (root / "begun.txt").unlink()
            # The last round is left to end.
            while not live(root, options.workers, length * draw.random() if kills < options.kills else None):
                kills += 1
            rounds, begun = rounds + 1, len((root / "begun.txt").read_text().splitlines())
            again += begun - options.cells
            differ += not all(a.equals(b) for a, b in zip(whole, tables(root), strict=True))
    print(json.dumps({"workers": options.workers, "kills": kills, "rounds": rounds, "cells_run_again": again,
                      "rounds_that_differ": differ, "seconds_of_a_grid": round(length, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
