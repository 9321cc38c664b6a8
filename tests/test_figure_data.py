"""The data of a figure, as a reader downloads them from the page."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from test_book_pages import browser, needs_browser, site
from test_plots import PHASE, grid

__all__ = ["browser", "site"]


def downloaded(page: object, which: int) -> list[dict[str, str]]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Data of this figure (CSV)").nth(which).click()
    with Path(download.value.path()).open(newline="") as file:
        return list(csv.DictReader(file))


@needs_browser
def test_every_figure_gives_its_points_and_what_hovering_tells_of_them(site: Path, browser: object) -> None:
    page = browser.new_page()
    page.goto((site / "menu.html").as_uri())
    page.wait_for_selector(".chassis-plot[data-drawn]")
    rows = downloaded(page, 0)
    frame = grid(("v1", "rrr"))
    # Every trace, those of other menus too; what is written is the record behind the point, not only the point.
    wanted = frame.query("method == 'rrr' and layer == 4 and split == 'test' and rank == 16").iloc[0]
    (row,) = [r for r in rows if r["trace"] == "reduced rank" and "layer 4; test" in r["choices"] and r["rank"] == "16"]
    for name, column in (("KL", "kl"), ("identity", "kl_identity"), ("recovered", "recovered"), ("n", "n")):
        assert float(row[name]) == pytest.approx(wanted[column], rel=1e-3)
    assert float(row["KL to the expert (nats)"]) == pytest.approx(wanted["kl"], rel=1e-3)
    measured = [r for r in rows if r["trace"] != "identity (no adapter)"]
    assert len(measured) == len(frame.query("method != 'identity'"))
    page.close()


@needs_browser
def test_data_bear_the_names_of_what_was_measured_where_axes_have_none(site: Path, browser: object) -> None:
    page = browser.new_page()
    page.goto((site / "map.html").as_uri())
    page.wait_for_selector(".chassis-plot[data-drawn]")
    rows = downloaded(page, 0)
    assert not {"x", "y", "value", "text", ""} & {*rows[0]} and not [name for name in rows[0] if "hover" in name]
    wanted = PHASE.query("method == 'rrr' and split == 'test' and n_train == 48 and expert_rank == 12 and rank == 4")
    told = {"choices": "rrr; test; 48", "expert rank": "12", "adapter rank": "4"}
    (row,) = [row for row in rows if told.items() <= row.items()]
    for name, column in (("KL", "kl"), ("recovered", "recovered"), ("recovered high", "recovered_high"), ("n", "n")):
        assert float(row[name]) == pytest.approx(wanted[column].item(), rel=1e-3)
    page.close()


@needs_browser
def test_a_page_offers_the_data_of_each_of_its_figures(site: Path, browser: object) -> None:
    page = browser.new_page()
    page.goto((site / "two.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.chassis-plot[data-drawn]').length === 2")
    for which in (0, 1):
        rows = downloaded(page, which)
        assert [(float(r["x"]), float(r["y"])) for r in rows] == [(1, 0.3), (2, 0.1), (4, 0.01)]
    page.close()
