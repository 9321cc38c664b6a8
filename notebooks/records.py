"""Records: one row a measurement, in `results.jsonl`. Every figure in the book comes from them."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from chassis_utils import ChassisError, __version__
from chassis_utils.files import replacing
from chassis_utils.probes import SPLITS
from locks import locked

FIELDS = tuple("experiment notebook base expert method rank layer split probes metric value seed n reported".split())
FIELDS += ("low", "high", "git", "versions", "revision", "time")
METRICS = tuple("kl recovered top1_agreement bits_per_byte coverage undecided total_variation seconds ratio".split())
#: In the order of the book, with claim and rule where a verdict is made; a name not here comes after, by alphabet.
EXPERIMENTS = json.loads(Path(__file__).with_name("experiments.json").read_text(encoding="utf-8"))
FILE = "results.jsonl"
_INTEGERS, _FLOATS = ("rank", "layer", "seed", "n"), ("value", "reported", "low", "high")
_NAMES = tuple(f for f in FIELDS[:13] if f != "value")  # what tells one measurement from another


@cache
def provenance() -> dict[str, Any]:
    """`git` revision of this project ("-dirty" if edited, None outside a repository) and `versions`."""
    folder, git = Path(__file__).parent, None
    with suppress(OSError, subprocess.CalledProcessError):
        # A copy that lies inside someone else's repository must not claim that repository's revision.
        for words in ("ls-files --error-unmatch records.py", "describe --always --dirty --abbrev=40 --exclude=*"):
            told = subprocess.run(["git", *words.split()], cwd=folder, capture_output=True, text=True, check=True)
        git = told.stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers")} | {"chassis_utils": __version__}
    return {"git": git, "versions": {"python": platform.python_version(), **packages}}


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _number(name: str, value: Any, row: dict[str, Any]) -> int | float | None:
    """A plain finite number from a Python, numpy or torch scalar; a count must be whole, only `value` must be there."""
    if name != "value" and _missing(value):
        return None
    number = math.nan
    with suppress(TypeError, ValueError, RuntimeError):
        number = float(value)
    if not math.isfinite(number) or (name in _INTEGERS and number % 1):
        kind = "whole" if name in _INTEGERS else "finite"
        names = " ".join(f"{k}={row[k]}" for k in _NAMES if not _missing(row[k]))
        raise ChassisError(f"{name} is not a {kind} number ({value!r}): mend or leave out the row {names}")
    return int(number) if name in _INTEGERS else number


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    types = dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(_FLOATS, float)
    return pd.DataFrame(list(rows), columns=list(FIELDS)).astype(types)


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a records file, or ChassisError."""
    if not path.is_file():
        raise ChassisError(f"no records at {path}: run `chassis run` first")
    with suppress(ValueError, AttributeError):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(row.keys() == {*FIELDS} for row in rows):
            return rows
    raise ChassisError(f"{path} is half-written or by another version: delete it and `chassis run` again")


def _rewrite(path: Path, dropped: Callable[[dict[str, Any]], bool], added: Iterable[dict[str, Any]] = ()) -> None:
    """Drop rows of a records file and add others, in the order of the book, while no one else writes."""
    order = {name: i for i, name in enumerate(EXPERIMENTS)}
    with locked(path.with_name(".results.lock")):
        rows = [*(row for row in _read(path) if not dropped(row)), *added] if path.exists() else [*added]
        rows.sort(key=lambda r: (order.get(r["experiment"], len(order)), r["experiment"], r["notebook"]))
        replace_text(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))


def replace_text(path: Path, text: str) -> None:
    """Write a text file through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def claim(folder: Path, mark: str, own: Mapping[str, Any], told: Callable[[Any], str], kind: str, other: str) -> None:
    """Make a folder one's own by a JSON file `mark` that says whose it is, or refuse one that holds anything else.

    `told` says of whose mark it is, in words, or nothing if that is no other; `kind` is what the folder would be of,
    and `other` what to give instead.
    """
    path, words = folder / mark, ""
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            words = told(theirs) if theirs != own else ""
        except (OSError, ValueError, LookupError, TypeError):
            words = f"a {mark} that cannot be read"
    elif others := sorted(one.name for one in folder.iterdir() if not one.name.startswith(".")):
        words = f"{others[0]}, which is of no {kind}"
    if words:
        raise ChassisError(f"{folder} holds {words}: give another {other}")
    if not path.exists():
        replace_text(path, json.dumps(own) + "\n")


def read_records(path_or_dir: str | Path) -> pd.DataFrame:
    """All rows of a run, columns `FIELDS`, from its folder or its `results.jsonl`; ChassisError if it is not whole."""
    path = Path(path_or_dir)
    return _frame(_read(path if path.suffix == ".jsonl" else path / FILE))


def forget(out_dir: str | Path, notebook: str) -> None:
    """Remove every row of one notebook, as when it has failed: its figures must not outlive its page."""
    if (path := Path(out_dir) / FILE).exists():
        _rewrite(path, lambda row: row["notebook"] == notebook)


class Records:
    """The rows of one experiment in one notebook. A row added again under the same names replaces the first."""

    def __init__(self, out_dir: str | Path, *, experiment: str, notebook: str, **defaults: Any) -> None:
        """Rows for the run folder `out_dir`; `defaults` are fields that all share (`revision`: hashes, by role)."""
        self.path = Path(out_dir) / FILE
        self._defaults = dict.fromkeys(FIELDS) | {"experiment": experiment, "notebook": notebook} | defaults
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(self, *, metric: str, value: Any, method: str, **fields: Any) -> None:
        """Add one measurement; `fields` (`split`, `rank`, `layer`, `n`, `reported`, ...) override the defaults.

        ChassisError for an unknown field, metric or split, or a figure that is not a finite number.
        """
        row = self._defaults | fields | {"metric": metric, "value": value, "method": method}
        if unknown := sorted(set(row) - set(FIELDS)):
            raise ChassisError(f"unknown record field {', '.join(unknown)}: choose from {', '.join(FIELDS)}")
        row |= provenance() | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        for name, allowed in (("metric", METRICS), ("split", (None, *SPLITS))):
            if row[name] not in allowed:
                raise ChassisError(f"unknown {name} {row[name]!r}: choose from {', '.join(filter(None, allowed))}")
        row |= {name: _number(name, row[name], row) for name in (*_INTEGERS, *_FLOATS)}
        self._rows[tuple(row[name] for name in _NAMES)] = row

    def add_frame(self, frame: pd.DataFrame, reported: Callable[[pd.Series], float | None] | None = None) -> None:
        """Add the wide rows of `evaluate`, one record a metric; a figure that is NaN there is left out.

        `reported` gives the study's KL for a row, or None.
        """
        for _, row in frame.iterrows():
            fields = {c: row[c] for c in frame.columns if c in FIELDS and not _missing(row[c])}
            if "base_revision" in row:
                fields["revision"] = {"base": row["base_revision"], "expert": row["expert_revision"]}
            for metric in METRICS[:4]:
                if not _missing(row[metric]):
                    figure = reported(row) if reported and metric == "kl" else None
                    bounds = {end: row.get(f"{metric}_{end}") for end in ("low", "high")}
                    self.add(**fields | bounds | {"metric": metric, "value": row[metric], "reported": figure})

    def save(self) -> pd.DataFrame:
        """Replace this experiment's rows of this notebook in the file, atomically; return them."""
        own = {name: self._defaults[name] for name in ("experiment", "notebook")}
        _rewrite(self.path, lambda row: own.items() <= row.items(), self._rows.values())
        return _frame(self._rows.values())
