"""The page of a grid: one file, offline, on which metric, axis, colour and choices are picked from menus."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from plots import GREY, METHODS, PALETTE, QUANTITIES, SPARE, template

#: Columns of a record that may be an axis, a colour or a choice, beside the parameters.
_COLUMNS = ("experiment", "base", "expert", "method", "rank", "layer", "split", "probes")


def _plain(values: Iterable[Any]) -> list[Any]:
    """Values as JSON has them; None for what is missing, and numbers that are whole without a point."""
    found = []
    for value in values:
        if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
            found.append(None)
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            found.append((int(value) if float(value).is_integer() else float(value)) if number else str(value))
    return found


def page(table: pd.DataFrame, cells: pd.DataFrame, title: str) -> str:
    """HTML of a grid's records and of the state of its cells.

    Args:
        table: records with a column `parameter_<name>` for each parameter.
        cells: one row a cell, with `state` and `causes`.
        title: of the page.
    """
    data = {name.removeprefix("parameter_"): table[name] for name in table if name.startswith("parameter_")}
    # A record's own base and expert are those of the parameters, by other names: what varies in both is one choice.
    data = {name: _plain(values) for name, values in data.items()}
    data |= {name: _plain(table[name]) for name in _COLUMNS if name not in data or len({*data[name]}) < 2}
    varied = {name: values for name, values in data.items() if len({*values} - {None}) > 1}
    axes = {column: title for column, _, title, _ in QUANTITIES.values()}
    told = {
        "columns": varied, "metric": _plain(table["metric"]), "value": _plain(table["value"]),
        "axes": axes, "template": template.to_plotly_json(), "colours": [*PALETTE, *SPARE], "grey": GREY,
        "methods": {name: [label, colour] for name, (label, colour, *_) in METHODS.items()},
    }  # fmt: skip
    failed = cells[cells["state"] != "done"]
    words = f"{len(cells)} cells, {len(failed)} of them failed." if len(failed) else f"{len(cells)} cells, all done."
    shown = failed.drop(columns="state").to_html(index=False, border=0, na_rep="–") if len(failed) else ""
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # With no "<" in it, no text of a record can close the script element. Plotly last: nothing of it is a mark.
    fill = {"TITLE": html.escape(title), "STATE": html.escape(words), "FAILED": shown,
            "DATA": json.dumps(told).replace("<", "\\u003c"), "PLOTLY": get_plotlyjs()}  # fmt: skip
    parts = text.split("@@")
    return "".join(part if i % 2 == 0 else fill[part] for i, part in enumerate(parts))
