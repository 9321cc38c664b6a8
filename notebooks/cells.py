"""One cell of a grid: what it is, how it is known to have ended, and how a worker runs it.

A worker may be another machine. It is sent plain values, and imports this module from the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch import THREADS, Leash, execute
from engines import alike, memory
from locks import locked
from records import FILE, replace_text

DONE = "cell.json"  # what a cell says when it has ended


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@dataclass(frozen=True)
class Cell:
    """One notebook with one set of parameters."""

    source: Path
    values: dict[str, Any]
    folder: Path
    label: str  # notebook and the parameters that vary, for people

    def known(self) -> dict[str, Any] | None:
        """What the cell said when it ended; None if it has not, or if its records are not those it wrote."""
        try:
            said = json.loads((self.folder / DONE).read_text(encoding="utf-8"))
            whole = said["records"] == _digest(self.folder / FILE) and (self.folder / self.source.name).is_file()
            return said if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def run_cell(cell: Cell, causes: list[str], env: Mapping[str, str], by: dict[str, str]) -> tuple[float, str | None]:
    """Run a cell in its folder; returns seconds and, if it failed, the cause.

    `causes` are those of earlier tries, `env` goes over the environment, and `by` says what code this is.
    """
    # Another worker may still be at it, for a command that was killed or a scheduler that took that worker for lost.
    with locked(cell.folder / ".run.lock") as lock:
        if said := cell.known():
            return said["seconds"], None
        for name in (DONE, FILE):
            (cell.folder / name).unlink(missing_ok=True)
        clock = time.monotonic()
        # What a driver of another device maps for itself is no memory of this machine's.
        limit = memory() if cell.values.get("device", "cpu") == "cpu" else None
        with Leash() as leash:
            cause = execute(cell.source, cell.folder, cell.values, lock, leash, limit, env)
        seconds = time.monotonic() - clock
        if not cause:
            said = {"notebook": cell.source.stem, "parameters": cell.values, "seconds": seconds, "causes": causes}
            said |= {"records": _digest(cell.folder / FILE), "by": by}
            replace_text(cell.folder / DONE, json.dumps(said) + "\n")
        return seconds, cause


def work_on(told: Callable[[], dict[str, str]]) -> Callable[..., tuple[float, str | None]]:
    """What a worker is sent, all it needs with it: it looks that the worker is like this machine, and runs a cell."""
    # Figures must not depend on how many cells run beside one another: all compute with as many threads.
    check, threads = alike(told), dict.fromkeys(THREADS, os.environ.get(THREADS[0], "1"))

    def work(cell: tuple[Any, ...], causes: list[str]) -> tuple[float, str | None]:
        ours = check()
        from cells import Cell, run_cell

        return run_cell(Cell(*cell), causes, threads, ours)

    return work
