"""The records of a run as one table, to show and to write beside them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

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
