"""What it costs to hand out the cells of a grid: two workers over one, and the share of their time that is no cell's.

    python benchmarks/grids.py [--cells 8] [--seconds 10] [--busy]

Cells of so many seconds wait, and so need no core for themselves; with `--busy` they compute, and two workers are
faster than one by as much as there are cores for them. Counted from the begin of the first cell to the end of the last:
seconds of one worker over those of two, and for either the share of the workers' time in which no cell was running.
Starting its kernel is part of a cell. Printed: one line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from kills import notebook
from lives import ROOT

WAIT = "time.sleep({seconds})"
BUSY = "start = time.process_time()\nwhile time.process_time() < start + {seconds}: sum(range(10**5))"


def ran(root: Path, workers: int) -> tuple[float, float]:
    """Seconds from the begin of the first cell to the end of the last, and the share in which no cell ran."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "notebooks"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "chassis_utils.cli", "grid", "grid.yml", "--workers", str(workers)]
    ends: list[tuple[float, float]] = []
    with subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.search(r": done, ([\d.]+) s", line):
                ends.append((time.monotonic(), float(found[1])))
    if process.returncode:
        raise SystemExit("the grid failed")
    begin = min(end - seconds for end, seconds in ends)
    whole = max(end for end, _ in ends) - begin
    return whole, 1 - sum(seconds for _, seconds in ends) / (workers * whole)


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8, help="an even number")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a cell, its kernel's start aside")
    parser.add_argument("--busy", action="store_true", help="cells that compute")
    options = parser.parse_args()
    found: dict[str, Any] = {"cells": options.cells, "seconds": options.seconds, "busy": options.busy}
    took = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "notebooks").mkdir()
            code = (BUSY if options.busy else WAIT).format(seconds=options.seconds)
            notebook(root / "notebooks", "cell", "", f"import time\n{code}")
            toy = {"description": "toy", "defaults": {}, "notebooks": {"cell": {}}}
            (root / "notebooks" / "profiles.yml").write_text(yaml.safe_dump({"toy": toy}))
            grid = {"profile": "toy", "notebooks": ["cell"], "parameters": {"seed": [*range(options.cells)]}}
            (root / "grid.yml").write_text(yaml.safe_dump(grid))
            took[workers], found[f"no_cell_{workers}"] = ran(root, workers)
    print(json.dumps(found | {"one_over_two": took[1] / took[2]}))


if __name__ == "__main__":
    main()
