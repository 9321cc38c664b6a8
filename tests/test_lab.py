"""JupyterLab opened for real: notebooks run by Run All, a slider moved by mouse and by keyboard, a kernel restarted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from lab import Lab, opened
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_book_pages import ROOT, browser, needs_browser
from test_portapp import soon

__all__ = ["browser"]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
#: They take least of all that have figures; the last of them has a slider.
OPENED = ("01_exact_adapter", "22_api_expert", "A2_your_own_expert")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Lab]:
    with opened(browser, tmp_path_factory.mktemp("lab"), OPENED, 64) as lab:
        yield lab


@needs_browser
@pytest.mark.parametrize("stem", OPENED)
def test_a_notebook_runs_from_top_to_bottom(lab: Lab, stem: str) -> None:
    lab.open(stem)
    lab.choose("Run", "Run All Cells")
    lab.finished()
    assert lab.page.locator(".widget-dropdown select, .widget-slider").count(), "its widgets are missing"
    if (menu := lab.page.locator(".widget-dropdown select").first).count():
        choose_by_key(lab, menu)
    assert not lab.faults


def choose_by_key(lab: Lab, menu: Any) -> None:
    """Open a dropdown, take the entry below, or above the last: its figure becomes another.

    The arrows alone are JupyterLab's own, which moves to the next cell.
    """
    plots = lab.page.locator(".jp-OutputArea-output:has(.widget-dropdown) .js-plotly-plot")

    def drawn() -> str:
        return plots.first.inner_html() if plots.count() else ""

    before, chosen = drawn(), menu.input_value()
    assert before, "the dropdown has no figure below it"
    menu.focus()
    last = menu.evaluate("menu => menu.selectedIndex === menu.length - 1")
    for key in ("Space", "ArrowUp" if last else "ArrowDown", "Enter"):
        lab.page.keyboard.press(key)
    soon(lambda: menu.input_value() != chosen and drawn() not in ("", before), 60)


@needs_browser
def test_a_slider_moves_its_figure_by_mouse_and_by_keyboard_and_after_a_restart(lab: Lab) -> None:
    if "A2_your_own_expert" not in lab.page.url:
        lab.open("A2_your_own_expert")
        lab.choose("Run", "Run All Cells")
    lab.finished()

    def shown() -> tuple[str, str]:
        """The rank in the figure's title, and the one beside the slider."""
        title = lab.page.locator(".js-plotly-plot .gtitle")
        told = title.first.text_content().split()[-1] if title.count() else ""
        return told, lab.page.locator(".widget-readout").inner_text()

    def moves(act: Any) -> None:
        """Another figure comes, and it is that of the slider; on its way there a slider may show others."""
        before, _ = shown()
        act()
        soon(lambda: shown()[0] not in ("", before) and shown()[0] == shown()[1], 60)

    def drag() -> None:
        box, rail = handle.bounding_box(), lab.page.locator(".noUi-base").bounding_box()
        lab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        lab.page.mouse.down()
        lab.page.mouse.move(rail["x"] + 0.8 * rail["width"], box["y"] + box["height"] / 2, steps=4)
        lab.page.mouse.up()

    handle = lab.page.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    moves(drag)
    handle.focus()
    moves(lambda: lab.page.keyboard.press("ArrowLeft"))
    lab.choose("Kernel", "Restart Kernel and Run All Cells…")
    lab.page.locator(".jp-Dialog button.jp-mod-accept").click()
    lab.page.wait_for_function(
        "[...document.querySelectorAll('.jp-InputArea-prompt')].some(one => /[*]/.test(one.textContent))"
    )
    lab.finished()
    lab.page.locator(".noUi-handle").focus()
    moves(lambda: lab.page.keyboard.press("ArrowRight"))
    assert not lab.faults


def first_failure(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, packages: str) -> str:
    """The last line of what a reader sees who runs a notebook's first cells in a folder."""
    monkeypatch.setenv("PYTHONPATH", packages)
    book = nbformat.read(path, 4)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code"][:2]
    with pytest.raises(CellExecutionError) as caught:
        NotebookClient(book, timeout=60, resources={"metadata": {"path": folder}}).execute()
    assert "During handling" not in caught.value.traceback
    return f"{caught.value.ename}: {caught.value.evalue}"


def test_a_notebook_in_another_folder_or_without_the_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = "04_final_layer_rank_sweep"
    elsewhere = shutil.copy(ROOT / "notebooks" / f"{stem}.ipynb", tmp_path)
    said = first_failure(Path(elsewhere), tmp_path, monkeypatch, str(ROOT))
    advice = "open this notebook in notebooks/ of a clone, as `make lab` does"
    assert said == f"ImportError: No module named 'records': {advice}"
    # A package of this name that is not there hides the one that is.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['chassis_utils'] = None\n")
    said = first_failure(ROOT / "notebooks" / f"{stem}.ipynb", ROOT / "notebooks", monkeypatch, str(tmp_path))
    assert said.endswith(advice) and "chassis_utils" in said and "\n" not in said


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_every_notebook_looks_for_its_modules_before_all_else(stem: str) -> None:
    def guard(name: str) -> str:
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        return code[1].partition("from None\n")[0]

    assert guard(stem) == guard("04_final_layer_rank_sweep")
