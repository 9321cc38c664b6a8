"""Grids: notebooks times lists of parameters; each cell in a folder of its own, on one process or on many.

A cell that has ended is known by what it wrote, so that a grid that was killed, or that has grown, runs only what is
missing. All cells of it are one table and one page in the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import pandas as pd
import yaml

from batch import Profile, last_line, load_profile, plan, refuse
from cells import DONE, Cell, work_on
from chassis_utils import ChassisError
from engines import arrived, engine, facts, outcomes, unlike
from gridpage import page
from locks import locked
from records import FIELDS, FILE, claim, read_records, replace_text

KEYS = ("profile", "notebooks", "parameters", "retries")
MARK = "grid.json"  # says whose folder it is
PATIENCE = 60  # seconds that a shared file system has to show here what a worker wrote


@dataclass(frozen=True)
class Grid:
    """A grid file that was read and checked."""

    name: str  # of the file, from the project where it lies inside
    profile: Profile
    cells: list[Cell]
    retries: int
    out: Path


def read_grid(path: str | Path, out_dir: str | Path | None = None) -> Grid:
    """Read a grid file: `profile`, `notebooks`, `parameters` (name to a list of values) and, if wanted, `retries`.

    Results go to `out_dir`, or else to `book/run/<profile>/grid/<name of the file>`. ChassisError: the file cannot be
    read, or anything in it is unknown or does not fit; all of it is named.
    """
    path = Path(path).resolve()
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ChassisError(f"cannot read a grid from {path}: {last_line(error)}") from error
    if not isinstance(told, dict):
        raise ChassisError(f"{path} is no grid: give it {', '.join(KEYS)}")
    faults = []
    for key in (key for key in told if key not in KEYS):
        close = get_close_matches(str(key), KEYS, n=1)
        faults.append(f"unknown key {key!r}: " + (f"did you mean {close[0]!r}?" if close else f"use {', '.join(KEYS)}"))
    notebooks, lists, retries = told.get("notebooks"), told.get("parameters") or {}, told.get("retries", 0)
    if not isinstance(notebooks, list) or not notebooks:
        faults.append("notebooks must be a list of at least one")
    if not isinstance(lists, dict):
        faults.append("parameters must be names, each with a list of values")
        lists = {}
    bad = [key for key, values in lists.items() if not (isinstance(values, list) and values)]
    faults += [f"{key} must be a list of at least one value" for key in bad]
    if type(retries) is not int or retries < 0:
        faults.append(f"retries={retries!r}: give a whole number, 0 or more")
    try:
        profile = load_profile(str(told.get("profile", "")))
    except ChassisError as error:
        refuse([*faults, str(error)])
    lists = {key: values for key, values in lists.items() if key not in bad}
    choices = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    plans = plan(notebooks if isinstance(notebooks, list) else [], profile, choices, faults)
    out = Path(out_dir or profile.run_dir / "grid" / path.stem).resolve()
    cells: dict[Path, Cell] = {}
    # Notebook by notebook. One that does not take a parameter is one cell for all values of it.
    for stem in plans[0]:
        source = profile.root / "notebooks" / f"{stem}.ipynb"
        code = [cell["source"] for cell in json.loads(source.read_bytes())["cells"] if cell["cell_type"] == "code"]
        for values in (planned[stem] for planned in plans):
            given = {key: value for key, value in values.items() if key != "out_dir"}
            # Prose and numbers of cells may change without a figure that does.
            digest = hashlib.sha256(json.dumps([stem, code, given], sort_keys=True).encode()).hexdigest()[:16]
            varied = "".join(f" {key}={given[key]}" for key, many in lists.items() if key in given and len(many) > 1)
            cells[out / digest] = Cell(source, values, out / digest, stem + varied)
    inside = path.is_relative_to(profile.root)
    name = path.relative_to(profile.root).as_posix() if inside else str(path)
    return Grid(name, profile, [*cells.values()], retries, out)


def run(path: str | Path, workers: int = 0, scheduler: str | None = None, out_dir: str | Path | None = None) -> Path:
    """Run what is missing of a grid, then write `grid.csv`, `cells.csv` and `grid.html`; returns the page.

    Cells run in this process, on `workers` processes of this machine, or on those of a Dask scheduler at an address.
    A line is printed for each. ChassisError: bad input, before anything runs; or cells that failed, after all have run.
    """
    grid = read_grid(path, out_dir)
    busy = f"another `chassis grid` is writing to {grid.out}: wait for its end, or give another --out"
    with locked(grid.out / ".grid.lock", busy):
        claim(grid.out, MARK, {"grid": grid.name, "profile": grid.profile.name}, _words, "grid", "--out")
        told = facts(grid.out / MARK)
        missing = [cell for cell in grid.cells if not cell.known()]
        n, before = len(grid.cells), len(grid.cells) - len(missing)
        print(f"{n} cells, {before} of them finished before", flush=True)
        _warn(grid, missing, told())
        failed: dict[Path, tuple[float, list[str]]] = {}
        if missing:
            with engine(told, workers, scheduler) as executor:
                ends = enumerate(outcomes(executor, work_on(told), missing, grid.retries), before + 1)
                for i, (cell, seconds, causes, ended) in ends:
                    if ended and not arrived(cell.known, PATIENCE):
                        ended, causes = False, [*causes, "its records have not arrived here: is the folder shared?"]
                    if not ended:
                        failed[cell.folder] = seconds, causes
                    state = "done" if ended else "failed"
                    cause = f": {causes[-1]}" if causes and not ended else ""
                    print(f"[{i}/{n}] {cell.label}: {state}, {seconds:.1f} s{cause}", flush=True)
        _write(grid, failed)
    if failed:
        names = "; ".join(f"{cell.label} ({failed[cell.folder][1][-1]})" for cell in missing if cell.folder in failed)
        raise ChassisError(f"{len(failed)} of {n} cells failed, see {grid.out / 'cells.csv'}: {names}")
    return grid.out / "grid.html"


def _words(mark: Mapping[str, str]) -> str:
    """Whose folder it is."""
    return f"the grid {mark['grid']} of profile {mark['profile']}"


def _warn(grid: Grid, missing: list[Cell], ours: dict[str, str]) -> None:
    """Say which cells are broken, and which were run by other code than ours."""
    for cell in missing:
        if (cell.folder / DONE).exists():
            print(f"{cell.label}: its records are not those it wrote, it runs again", flush=True)
    others = [words for cell in grid.cells if (said := cell.known()) and (words := unlike(ours, said["by"]))]
    if others:
        print(f"chassis: {len(others)} finished cells are by {others[0]}: kept; delete {grid.out} to run them again",
              file=sys.stderr)  # fmt: skip


def _write(grid: Grid, failed: Mapping[Path, tuple[float, list[str]]]) -> None:
    """Write all records with their parameters, the state of every cell, and the page."""
    names = [*dict.fromkeys(key for cell in grid.cells for key in cell.values if key != "out_dir")]
    columns = [f"parameter_{name}" for name in names]
    states, frames = [], [pd.DataFrame(columns=["cell", *columns, *FIELDS])]
    for cell in grid.cells:
        given = [json.dumps(x) if isinstance(x, list) else x for x in map(cell.values.get, names)]
        if said := cell.known():
            state, seconds, causes = "done", said["seconds"], said["causes"]
        else:
            state, (seconds, causes) = "failed", failed[cell.folder]
        tries = len(causes) + (state == "done")
        states.append([cell.folder.name, cell.source.stem, *given, state, tries, round(seconds, 3), "; ".join(causes)])
        if state == "done" and (cell.folder / FILE).exists():
            rows = read_records(cell.folder)
            for name in ("versions", "revision"):
                rows[name] = rows[name].map(json.dumps)
            head = pd.DataFrame([[cell.folder.name, *given]] * len(rows), columns=["cell", *columns], dtype=object)
            frames.append(pd.concat([head, rows.astype(object)], axis=1))
    table = pd.concat(frames, ignore_index=True)
    cells = pd.DataFrame(states, columns=["cell", "notebook", *columns, "state", "tries", "seconds", "causes"])
    replace_text(grid.out / "grid.csv", table.to_csv(index=False))
    replace_text(grid.out / "cells.csv", cells.to_csv(index=False))
    replace_text(grid.out / "grid.html", page(table, cells, f"Grid {grid.name}, profile {grid.profile.name}"))
