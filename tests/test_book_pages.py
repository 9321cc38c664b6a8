"""A small book, built with the project's own settings and read in a real browser, from disk and offline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import papermill
import plotly.graph_objects as go
import pytest
from conftest import walk
from pages import barriers
from test_plots import PHASE, grid

from bookpages import figure_html
from phase import phase_diagram
from plots import METHODS, kl_vs_rank
from stills import still

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")

#: A kernel works where the notebooks lie, beside what they import.
NOTEBOOKS = ROOT / "notebooks"
#: Page -> how many plots it must draw.
PLOTS = {"index": 1, "two": 2, "none": 0, "table": 0}
FIGURE = """
import plotly.graph_objects as go
from gluing import glue_figure
figure = go.Figure(go.Scatter(x=[1, 2, 4], y=[0.3, 0.1, 0.01], text=["</script><b>", "<!--", "&"]))
figure = figure.update_layout(title_text="KL <i>against</i> rank", xaxis_type="log")
"""
TABLE = """
import pandas as pd
from plots import Table
frame = pd.DataFrame({"method": ["a", "b", "c", "d", "e"], "kl": [0.5, 1e-9, 20000.0, float("nan"), 3.0],
                      "recovered": [0.05, 1.0, float("nan"), -2.0, 0.3], "rank": [2, 10, 9, None, 100]})
frame["rank"] = frame["rank"].astype("Int64")
for i in range(30):
    frame[f"figure {i}"] = i
Table(frame, "A <small> table", sortable=True)
"""


def notebook(folder: Path, name: str, cells: list[str]) -> None:
    """Execute a notebook of these cells into `folder`."""
    language = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    opening = nbformat.v4.new_markdown_cell(f"# Page {name}\n\nA formula: $h J$.")
    book = nbformat.v4.new_notebook(cells=[opening, *map(nbformat.v4.new_code_cell, cells)], metadata=language)
    source = folder.parent / f"{name}.ipynb"
    nbformat.write(book, source)
    papermill.execute_notebook(source, folder / f"{name}.ipynb", progress_bar=False, cwd=NOTEBOOKS)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("site") / "book"
    folder.mkdir()
    shutil.copy(ROOT / "_config.yml", folder)
    (folder / "book").mkdir()
    shutil.copy(ROOT / "book" / "references.bib", folder / "book")
    (folder / "notebooks").mkdir()
    for module in ("bookpages.py", "stills.py"):
        shutil.copy(NOTEBOOKS / module, folder / "notebooks")
    shutil.copytree(ROOT / "book" / "assets", folder / "book" / "assets")
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters: "
        "[{file: two}, {file: none}, {file: menu}, {file: map}, {file: table}]\n"
    )
    (folder / "index.md").write_text("# Landing\n\n```{glue:} first\n:doc: two.ipynb\n```\n")
    (folder / "stray.md").write_text("# Not in the table of contents, so not in the book\n")
    notebook(folder, "two", [FIGURE, "glue_figure('first', figure)", "figure", "figure.update_traces(mode='markers')"])
    notebook(folder, "table", [TABLE])
    notebook(folder, "none", ["print('no figure here')"])
    for name, figure in (("menu", kl_vs_rank(grid(("v1", "rrr")))), ("map", phase_diagram(PHASE))):
        notebook(folder, name, [f"import plotly.io\nplotly.io.from_json({figure.to_json()!r})"])
    build = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(folder)]
    done = subprocess.run([*build, "-W", "-n", "--keep-going"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the book did not build:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def test_no_string_of_a_figure_can_leave_its_script() -> None:
    figure = go.Figure(go.Bar(x=["</script><script>alert(1)</script>"], y=[1]))
    page = figure_html(figure.update_layout(title_text='A "bold" <b>title</b>').to_plotly_json())
    assert page.count("</script>") == 1
    assert 'aria-label="A &quot;bold&quot; title"' in page
    assert 'role="figure"' in page and "<noscript>" in page


def test_plotly_is_there_once_and_loaded_only_where_it_is_needed(site: Path) -> None:
    copies = [path.name for path in site.rglob("*plotly*.js")]
    assert copies == ["plotly.min.js"]
    for page, plots in PLOTS.items():
        tags = re.findall(r"<script[^>]*plotly\.min\.js[^>]*>", (site / f"{page}.html").read_text())
        assert len(tags) == (plots > 0), page
        assert all("defer" in tag for tag in tags)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_whole_offline(site: Path, browser: object, width: int) -> None:
    for name, _, theme, page in walk(browser, site, PLOTS, width):
        assert not barriers(page, theme), name
        assert page.locator(".chassis-plot .scatterlayer .trace").count() == PLOTS[name]
        if name != "index":
            page.wait_for_selector("mjx-container")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_without_scripts_text_tables_and_stills_remain(site: Path, browser: object, width: int) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": width, "height": 844})
    page = context.new_page()
    for name, plots in PLOTS.items():
        page.goto((site / f"{name}.html").as_uri())
        stills = page.locator("noscript svg[role=img]")
        assert stills.count() == plots
        for one in stills.all():
            box = one.bounding_box()
            assert one.get_attribute("aria-label") and 100 < box["height"] and 200 < box["width"] < width
        assert page.locator("article h1").first.is_visible()
    assert page.locator("table.sortable td", has_text="20,000").is_visible()
    page.goto((site / "two.html").as_uri())
    # Three points of a falling line, on an axis that is a log one: doubling is the same step.
    across, down = zip(*(map(float, one.split(",")) for one in line_of(page).split()), strict=True)
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2) and down[0] < down[1] < down[2]
    context.close()


def line_of(page: object) -> str:
    return page.locator("noscript svg polyline").first.get_attribute("points")


def test_a_still_leaves_out_what_a_menu_hides_and_none_is_made_of_what_it_cannot_show() -> None:
    def points(trace: dict[str, object], **layout: object) -> int:
        seen = {"type": "scatter", "mode": "markers", "x": ["a", "b", "c"], "y": [1.0, None, 2.0]}
        return still({"data": [seen, seen | trace], "layout": layout}, "two").count("<circle")

    assert points({}) == 4
    assert points({"visible": False}) == points({"visible": "legendonly"}) == points({"yaxis": "y2"}) == 2
    assert still({"data": [{"type": "pie"}]}, "shares") == still({"data": []}, "none") == ""
    assert "<b>" not in still({"data": [{"type": "scatter", "x": [1], "y": [1], "name": "<b>&"}]}, "one")


def test_a_still_of_a_map_has_its_cells_in_the_places_and_colours_of_the_figure() -> None:
    scale = {"cmin": 0, "cmax": 1, "colorscale": [[0, "#FFFFFF"], [1, "#0000FF"]]}
    cells = {"type": "heatmap", "z": [[0, 1], [0.5, None]], "x": ["a", "b"], "y": ["low", "high"]}
    cells |= {"texttemplate": "%{z:.0%}", "coloraxis": "coloraxis"}
    for order, first in (({}, "high"), ({"range": [1.5, -0.5]}, "low")):
        drawn = still({"data": [cells], "layout": {"coloraxis": scale, "yaxis": order}}, "map")
        found = re.findall(r'<rect x="([\d.]+)" y="(\d+)".*?fill="(#\w+)"/><text .*?>(\d+%)<', drawn)
        assert {words: colour for *_, colour, words in found} == {"0%": "#ffffff", "100%": "#0000ff", "50%": "#8080ff"}
        places = {words: (float(x), float(y)) for x, y, _, words in found}
        (x, y), (right, same), (below, other) = (places[words] for words in ("0%", "100%", "50%"))
        assert right > x == below and same == y and (other < y) == (first == "high")


def test_a_still_reads_numbers_that_came_as_arrays() -> None:
    figure = go.Figure(go.Scatter(x=np.array([1, 2, 4]), y=np.array([0.3, np.nan, 0.1]), mode="markers"))
    told = json.loads(figure.to_json())
    assert "bdata" in told["data"][0]["x"]
    assert still(told, "two").count("<circle") == 2


def test_a_figure_of_another_make_has_a_still_or_none() -> None:
    mixed = go.Figure(go.Scatter(x=["base", 1, 2], y=np.array([1, 2, 3], "uint16"), mode="markers"))
    assert still(json.loads(mixed.to_json()), "mixed").count("<circle") == 3
    flow = go.Sankey(node={"label": [*"ab"]}, link={"source": [0], "target": [1], "value": [1]})
    for trace in (go.Heatmap(z=[[1, 2], [3, 4]]), go.Heatmap(z=np.eye(3)), flow):
        assert still(json.loads(go.Figure(trace).to_json()), "without colours") == ""


def test_stacked_bars_of_a_still_begin_where_those_before_end() -> None:
    bars = [{"type": "bar", "orientation": "h", "x": x, "y": ["p", "q"]} for x in ([0.25, 0.5], [0.75, 0.5])]
    drawn = still({"data": bars, "layout": {"barmode": "stack"}}, "bars")
    first, second = re.findall(r'<path d="([^"]*)" stroke="[^"]*" stroke-width="14"', drawn)
    ends, starts = re.findall(r"H([\d.]+)", first), re.findall(r"M([\d.]+)", second)
    assert ends == starts and len({*ends}) == 2 and len({*re.findall(r"H([\d.]+)", second)}) == 1


def test_bands_of_a_still_carry_what_the_figure_says() -> None:
    link = {"source": [0, 1, 2], "target": [2, 2, 3], "value": [3, 1, 4], "color": ["red", "green", "blue"]}
    drawn = still({"data": [{"type": "sankey", "node": {"label": [*"abcd"]}, "link": link}]}, "flow")
    wide = {colour: float(w) for colour, w in re.findall(r'stroke="(\w+)" stroke-width="([\d.]+)"', drawn)}
    assert wide["red"] == pytest.approx(3 * wide["green"], abs=0.2) and wide["blue"] == pytest.approx(
        wide["red"] + wide["green"], abs=0.2
    )
    nodes = [float(x) for x in re.findall(r'<rect x="([\d.]+)"', drawn)]
    assert nodes[0] == nodes[1] < nodes[2] < nodes[3], "a node stands behind all that lead to it"


def test_a_caption_stands_below_its_figure_and_holds_no_markup_of_its_own() -> None:
    figure = {"data": [], "layout": {"meta": {"alt": "a", "caption": "Choose `text`: <b>a</b> & b."}}}
    wanted = "<figcaption>Choose <code>text</code>: &lt;b&gt;a&lt;/b&gt; &amp; b.</figcaption></figure>"
    assert wanted in figure_html(figure)
    assert "figcaption" not in figure_html({"data": [], "layout": {"meta": [1], "title": {"text": "none"}}})


@needs_browser
def test_a_caption_is_read_without_scripts_too(site: Path, browser: object) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 844})
    page = context.new_page()
    for name in ("menu", "map"):
        page.goto((site / f"{name}.html").as_uri())
        caption = page.locator("figure figcaption")
        assert caption.is_visible() and "worse than" in caption.inner_text()
        assert 250 < caption.bounding_box()["width"] < 390
        assert page.locator("noscript svg[role=img]").count() == 1
    context.close()


@needs_browser
def test_figures_follow_the_theme(site: Path, browser: object) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto((site / "two.html").as_uri())
    page.wait_for_selector(".chassis-plot[data-drawn]")
    ink = "getComputedStyle(document.querySelector('.chassis-plot .gtitle')).fill"
    before = page.evaluate(ink)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"{ink} !== '{before}'")
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (before, page.evaluate(ink)))
    assert dark - light > 255, "the text of a figure must turn pale on a dark page"
    page.close()


def test_the_sorting_script_is_loaded_only_where_there_is_a_table(site: Path) -> None:
    for page in PLOTS:
        assert ("tables.js" in (site / f"{page}.html").read_text()) == (page == "table"), page


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_table_is_sorted_and_filtered_by_keyboard(site: Path, browser: object, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.goto((site / "table.html").as_uri())

    def rows() -> str:
        return "".join(page.locator("table.sortable tbody tr:visible td:first-child").all_inner_texts())

    def press(name: str, key: str) -> str:
        page.get_by_role("button", name=name, exact=True).focus()
        page.keyboard.press(key)
        return rows()

    assert rows() == "abcde"
    assert page.locator("th[aria-sort]").count() == 0
    # As numbers, not as text; what is blank comes last whichever way it is sorted.
    assert press("kl", "Enter") == "baecd"
    assert press("kl", "Enter") == "ceabd"
    assert press("recovered", "Space") == "daebc"
    assert press("rank", "Enter") == "acbed"
    assert press("rank", "Space") == "ebcad"
    marked = page.locator("th[aria-sort]")
    assert marked.count() == 1 and marked.inner_text().strip() == "rank"
    assert marked.get_attribute("aria-sort") == "descending"
    assert press("method", "Enter") == "abcde"
    assert page.locator("table.sortable td").nth(3).inner_text() == "2", "a rank is a whole number"
    page.get_by_role("searchbox", name="Filter rows").focus()
    page.keyboard.type("20,000 C")
    assert rows() == "c"
    assert "1 of 5 rows" in page.locator("output").inner_text()
    # The table scrolls in a box of its own, which the keyboard can reach; the page does not.
    box = page.get_by_role("region", name="A <small> table")
    assert box.get_attribute("tabindex") == "0"
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@needs_browser
def test_what_is_hidden_through_the_legend_stays_hidden_at_another_layer(site: Path, browser: object) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 844})
    page.goto((site / "menu.html").as_uri())
    page.wait_for_selector(".chassis-plot[data-drawn]")
    traces = "document.querySelector('.chassis-canvas').data"
    lines = f"{traces}.filter(t => t.visible === true && t.legendgroup).map(t => `${{t.legendgroup}} ${{t.meta[1]}}`)"
    shown = f"[...new Set({lines})].sort()"
    assert page.evaluate(shown) == ["identity null", "rrr layer 6", "v1 layer 6"]

    def choose(layer: str, *expected: str) -> None:
        page.locator(".updatemenu-header").first.click()
        page.locator(".updatemenu-dropdown-button", has_text=layer).click()
        page.wait_for_function(f"JSON.stringify({shown}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")

    for name in ("v1", "identity"):
        page.locator(".legend .traces", has_text=METHODS[name][0]).locator(".legendtoggle").click()
        page.wait_for_function(f"{traces}.some(t => t.legendgroup === '{name}' && t.visible === 'legendonly')")
    choose("layer 2", "rrr layer 2")
    page.locator(".legend .traces", has_text=METHODS["v1"][0]).locator(".legendtoggle").click()
    page.wait_for_function(f"{traces}.some(t => t.legendgroup === 'v1' && t.visible === true)")
    choose("layer 4", "rrr layer 4", "v1 layer 4")
    page.close()
