"""JupyterLab opened for real: notebooks run by Run All, a slider moved by mouse and by keyboard, a kernel restarted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_book_pages import ROOT, browser, needs_browser
from test_portapp import soon

__all__ = ["browser"]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
#: They take least of all that have figures; the last of them has a slider.
OPENED = ["01_exact_adapter", "02_global_alignment", "03_layerwise_lenses", "22_api_expert", "A2_your_own_expert"]
TOKEN = "a-token-for-tests"


@dataclass
class Lab:
    """A JupyterLab on a copy of the notebooks with few prompts, and what went wrong on its page."""

    folder: Path
    address: str
    page: Any
    faults: list[str] = field(default_factory=list)

    def open(self, stem: str) -> None:
        self.page.goto(f"{self.address}/lab/tree/notebooks/{stem}.ipynb?token={TOKEN}&reset")
        self.idle()

    def idle(self) -> None:
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")

    def choose(self, menu: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()

    def finished(self) -> None:
        """Every cell has run, none has failed, no figure is left out."""
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(one => one.textContent)"
        self.page.wait_for_function(
            f"{prompts}.every(one => /^\\[\\d+\\]:$/.test(one)) || {self.errors}", timeout=180_000
        )
        assert not self.page.evaluate(self.errors), self.page.locator(".jp-CodeCell .jp-OutputArea").all_inner_texts()
        self.page.wait_for_selector(".js-plotly-plot .main-svg")

    errors = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]') !== null"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for stem in OPENED:
        path = folder / "notebooks" / f"{stem}.ipynb"
        path.write_text(re.sub(r"\bn_train = \d+", "n_train = 64", path.read_text()))
    env = {name: value for name, value in os.environ.items() if name != "CHASSIS_HEADLESS"}
    env |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    env |= {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", f"--notebook-dir={folder}"]
    command = [sys.executable, "-m", "jupyter", "lab", *options, f"--IdentityProvider.token={TOKEN}"]
    with (folder / "told").open("wb") as told:
        process = subprocess.Popen(command, env=env, stdout=told, stderr=told)
    try:
        found = soon(lambda: re.search(r"http://127\.0\.0\.1:\d+(?=/lab)", (folder / "told").read_text()), 90)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        one = Lab(folder, found[0], page)
        own = (found[0], "data:", "blob:")
        page.on("pageerror", lambda error: one.faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(own) or one.faults.append(request.url))
        yield one
        page.close()
    finally:
        process.terminate()
        process.wait()


@needs_browser
@pytest.mark.parametrize("stem", OPENED)
def test_a_notebook_runs_from_top_to_bottom(lab: Lab, stem: str) -> None:
    lab.open(stem)
    lab.choose("Run", "Run All Cells")
    lab.finished()
    assert lab.page.locator(".widget-dropdown select, .widget-slider").count(), "its widgets are missing"
    assert not lab.faults


@needs_browser
def test_a_slider_moves_its_figure_by_mouse_and_by_keyboard_and_after_a_restart(lab: Lab) -> None:
    if "A2_your_own_expert" not in lab.page.url:
        lab.open("A2_your_own_expert")
        lab.choose("Run", "Run All Cells")
    lab.finished()

    def title() -> str:
        return lab.page.locator(".js-plotly-plot .gtitle").inner_text()

    def moves(act: Any) -> None:
        """The figure and the number beside the slider are both other ones, and agree."""
        before = title()
        act()
        soon(lambda: lab.page.locator(".js-plotly-plot .gtitle").count() and title() != before)
        assert title().split()[-1] == lab.page.locator(".widget-readout").inner_text()

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
