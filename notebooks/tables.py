"""The records of a run as one table, to show and to write beside them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from locks import locked
from records import METRICS, read_records, replace_text

#: What tells one row of `results_table` from another, and its columns.
_POINT = tuple("experiment base expert method rank layer split probes n seed".split())
TABLE = (*_POINT, "reported", "kl", "kl_low", "kl_high", "identity", "recovered", "recovered_low", "recovered_high")
TABLE += ("top1_agreement", "bits_per_byte")


def results_table(records: str | Path | pd.DataFrame) -> pd.DataFrame:
    """One row a measurement point, in the order of the book: every figure that belongs to one KL, side by side.

    Args:
        records: run folder, records file, or the frame of `read_records`.

    Returns:
        Columns `TABLE`: what names the point, `reported` (the study's KL), `kl` (nats) and `recovered` with their
        intervals, `top1_agreement`, `bits_per_byte`, and `identity`, the KL of the bare base on the same probes.

    Raises:
        ChassisError: the records cannot be read.
    """
    rows = records if isinstance(records, pd.DataFrame) else read_records(records)
    table = rows.loc[rows["metric"].isin(METRICS[:4]), list(_POINT)].drop_duplicates()
    for metric in METRICS[:4]:
        bounds = {end: f"{metric}_{end}" for end in ("low", "high")}
        of = rows[rows["metric"] == metric].rename(columns={"value": metric} | bounds)
        figures = [metric, *bounds.values(), *(["reported"] if metric == "kl" else [])]
        table = table.merge(of[[*_POINT, *figures]], how="left")
    bare = table[table["method"] == "identity"].rename(columns={"kl": "identity"})
    same = ["experiment", "base", "expert", "split", "probes"]
    return table.merge(bare[[*same, "identity"]].drop_duplicates(same), how="left")[list(TABLE)]


def write_table(out_dir: str | Path) -> pd.DataFrame:
    """Write `results_table` of a run beside its records and return it.

    `results.csv` holds every digit, `results.tex` four: a longtable for `booktabs`, wide enough for a landscape page.

    Raises:
        ChassisError: the records cannot be read, or the tables not written.
    """
    folder, table = Path(out_dir), results_table(out_dir)
    figures = dict.fromkeys(table.select_dtypes("float").columns, "{:.4g}")
    style = table.style.hide().format(figures, escape="latex", na_rep="--").format_index(escape="latex", axis=1)
    with locked(folder / ".results.lock"):
        replace_text(folder / "results.csv", table.to_csv(index=False))
        replace_text(folder / "results.tex", style.to_latex(environment="longtable", hrules=True))
    return table


def aims_table(rows: pd.DataFrame, caption: str) -> Styler:
    """What was measured beside what was aimed at.

    Args:
        rows: columns of words, then `bound` ("at least" or "at most"), `aim`, `low` and `high`: the ends of what was
            measured, the same where it has no interval, NaN where an end is not known. If there are such columns,
            `value` is shown before the ends, `digits` is the format of a row's figures, and `reach` the most (or
            least) that any way could come to.
        caption: of the table.

    Returns:
        A table with the words, `aim`, `measured` and `outcome`: `met` or `missed` where both ends lie on one side of
        the aim, `open` where it lies between them or an end is not known, `out of reach` where `reach` misses it too.
    """
    frame = rows.assign(**{name: rows.get(name) for name in ("value", "reach")})
    frame = frame.astype({"value": float, "reach": float})

    def told(row: pd.Series, name: str) -> str:
        """A figure in its row's format, else with three digits."""
        return row["digits"].format(row[name]) if "digits" in row else f"{float(f'{row[name]:.3g}'):,g}"

    def measured(row: pd.Series) -> str:
        low, high, value = (told(row, name) for name in ("low", "high", "value"))
        if row["low"] == row["high"]:
            return low
        if pd.isna(row["low"]) and pd.isna(row["high"]):
            return "not known"
        unknown = {"low": f"less than {high}", "high": f"more than {low}"}
        span = next((words for end, words in unknown.items() if pd.isna(row[end])), f"{low} to {high}")
        return span if pd.isna(row["value"]) else f"{value} ({span})"

    least = frame["bound"] == "at least"

    def right(lower: str, upper: str) -> pd.Series:
        """Where the end that could miss a bound keeps it; not where that end is not known."""
        return (frame[lower] >= frame["aim"]).where(least, frame[upper] <= frame["aim"])

    shown = rows[rows.columns[: rows.columns.get_loc("bound")]].copy()
    shown["aim"] = [f"{row['bound']} {told(row, 'aim')}" for _, row in frame.iterrows()]
    shown["measured"] = frame.apply(measured, axis=1)
    shown["outcome"] = "open"
    wrong = (frame["high"] < frame["aim"]).where(least, frame["low"] > frame["aim"])
    shown.loc[wrong, "outcome"] = "missed"
    shown.loc[wrong & frame["reach"].notna() & ~right("reach", "reach"), "outcome"] = "out of reach"
    shown.loc[right("low", "high"), "outcome"] = "met"
    return shown.style.hide().set_caption(caption)
