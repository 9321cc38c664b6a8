"""How soon a widget moves its figure in JupyterLab, over the time that the bare figure takes there.

python benchmarks/lab.py [--notebooks 01_exact_adapter A2_your_own_expert ...] [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
NOTEBOOKS = ("01_exact_adapter", "03_layerwise_lenses", "16_vocab_bridge_a", "22_api_expert", "A2_your_own_expert")
TOKEN = "of-this-machine-alone"
FAILED = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]') !== null"
#: From a change or key on, until the plot of a cell has been still for a while: when it first changed, and when last.
WATCH = """() => {
    window.plots = {from: null, first: null, last: null, cell: null};
    const start = () => { plots.from = performance.now(); plots.first = plots.last = null; };
    for (const kind of ["change", "keydown"]) document.addEventListener(kind, start, true);
    const here = (node) => plots.cell?.contains(node) && node.closest(".js-plotly-plot");
    const drawn = (one) => one.addedNodes.length && here(one.target);
    new MutationObserver((all) => {
        if (!all.some(drawn)) return;
        plots.last = performance.now();
        plots.first ??= plots.last;
    }).observe(document.querySelector(".jp-Notebook"), { subtree: true, childList: true });
}"""
STILL = "plots.last > plots.from && performance.now() - plots.last > 400"


@dataclass
class Lab:
    """A page of a running JupyterLab, and what went wrong on it."""

    address: str
    page: Any
    faults: list[str] = field(default_factory=list)

    def open(self, stem: str) -> None:
        """Open a notebook, whatever was open before, and wait for its kernel."""
        self.page.goto(f"{self.address}/lab/tree/notebooks/{stem}.ipynb?token={TOKEN}&reset")
        # Before the kernel has said so below, a run asks which kernel to take.
        self.page.locator("#jp-main-statusbar", has_text="| Idle").wait_for()

    def choose(self, menu: str, entry: str) -> None:
        """Choose an entry of the menu bar."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()

    def finished(self) -> None:
        """Wait until every cell has run and a figure is drawn; none may have failed."""
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(one => one.textContent)"
        self.page.wait_for_function(f"{prompts}.every(one => /^\\[\\d+\\]:$/.test(one)) || {FAILED}", timeout=300_000)
        assert not self.page.evaluate(FAILED), self.page.locator(".jp-CodeCell .jp-OutputArea").all_inner_texts()
        self.page.wait_for_selector(".js-plotly-plot .main-svg")


@contextmanager
def opened(browser: Any, folder: Path, stems: tuple[str, ...], n_train: int) -> Iterator[Lab]:
    """JupyterLab on a copy of the notebooks in a folder, with settings of its own and so many training prompts."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in (folder / "notebooks" / f"{stem}.ipynb" for stem in stems):
        path.write_text(re.sub(r"\bn_train = \d+", f"n_train = {n_train}", path.read_text()))
    env = {name: value for name, value in os.environ.items() if name != "CHASSIS_HEADLESS"}
    env |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    env |= {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", f"--notebook-dir={folder}"]
    command = [sys.executable, "-m", "jupyter", "lab", *options, f"--IdentityProvider.token={TOKEN}"]
    told, limit = folder / "told", time.monotonic() + 90
    with told.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+(?=/lab)", told.read_text())):
            assert process.poll() is None and time.monotonic() < limit, told.read_text()
            time.sleep(0.1)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        lab, own = Lab(found[0], page), (found[0], "data:", "blob:")
        page.on("pageerror", lambda error: lab.faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(own) or lab.faults.append(request.url))
        yield lab
        page.close()
    finally:
        process.terminate()
        process.wait()


def timed(lab: Lab, cell: Any, act: Any) -> tuple[float, float]:
    """Milliseconds from an act to the first and to the last change of the plot in a cell.

    JupyterLab's own view of a plot draws its axes a second time once it is there.
    """
    cell.evaluate("cell => { plots.from = plots.first = plots.last = null; plots.cell = cell; }")
    act()
    lab.page.wait_for_function(STILL)
    return tuple(lab.page.evaluate("[plots.first - plots.from, plots.last - plots.from]"))


def moved(lab: Lab, stem: str, rounds: int) -> list[tuple[float, float, float]]:
    """For the first widget of a notebook that has run: milliseconds of a move, and of its figure called in a cell.

    Of a move, until the new figure stands there and until nothing changes any more; of the bare figure the latter.

    They are timed in turn. The cell asks for the figure that a widget has shown, from the same function.
    """
    page = lab.page
    # Off the file: JupyterLab keeps no text of cells that are out of sight.
    draw = re.search(r"widgets\.explore\((\w+),", (ROOT / "notebooks" / f"{stem}.ipynb").read_text())[1]
    page.evaluate(WATCH)
    cells, found = page.locator(".jp-CodeCell"), []
    widget = cells.filter(has=page.locator(".widget-dropdown select, .noUi-handle")).first
    select = widget.locator(".widget-dropdown select").first
    slider = widget.locator(".noUi-handle").first
    options = select.locator("option").all_inner_texts() if select.count() else []
    for number in range(rounds):
        if options:
            at = (number + 1) % len(options)
            move = timed(lab, widget, lambda at=at: select.select_option(index=at))
        else:
            slider.focus()
            key = ("ArrowRight", "ArrowLeft")[number % 2]  # it ends somewhere
            move = timed(lab, widget, lambda key=key: page.keyboard.press(key))
        if not number:
            cells.last.click()
            page.keyboard.press("Escape")
            page.keyboard.press("b")
            page.keyboard.press("Enter")
            page.keyboard.type(f"{draw}()")
        cells.last.locator(".cm-content").focus()
        found.append((*move, timed(lab, cells.last, lambda: page.keyboard.press("Control+Enter"))[1]))
    return found


def main() -> int:
    """Print, for each notebook, a move over the bare figure; 1 where the target is missed."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notebooks", nargs="+", default=NOTEBOOKS)
    parser.add_argument("--rounds", type=int, default=9)
    asked, missed = parser.parse_args(), False
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        with opened(browser, Path(folder), tuple(asked.notebooks), 64) as lab:
            for stem in asked.notebooks:
                lab.open(stem)
                lab.choose("Run", "Run All Cells")
                lab.finished()
                found = moved(lab, stem, asked.rounds)
                ratio = statistics.median(move / bare for _, move, bare in found)
                shown, move, bare = (statistics.median(column) for column in zip(*found, strict=True))
                missed |= ratio > 2 or move > 200
                told = f"a move {move:.0f} ms (shown after {shown:.0f}), bare {bare:.0f} ms, ratio {ratio:.2f}"
                print(f"{stem}: {told}", flush=True)
        browser.close()
    return missed


if __name__ == "__main__":
    sys.exit(main())
