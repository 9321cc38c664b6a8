"""The book's own Sphinx extension: plotly figures and long tables on its pages, which quote the run that is built.

A page holds a figure's JSON and nothing else; one `plotly.min.js`, taken from the installed plotly, is loaded where a
page has a figure. All of it works from `file://`, with no network.
"""

from __future__ import annotations

import html
import json
import os
import re
from importlib.resources import files
from typing import Any

from stills import still

PLOTLY_MIME = "application/vnd.plotly.v1+json"
MARK, SORTABLE = 'class="chassis-plot"', 'class="dataframe sortable"'


def figure_html(figure: dict[str, Any]) -> str:
    """A plotly figure (its JSON) as a piece of a page: named, drawn once the script is there.

    Its name is `layout.meta.alt` where there is one, else the title. To a screen reader it is a figure, no image, as
    it holds menus and buttons.
    """
    layout = figure.get("layout", {})
    meta, title = layout.get("meta"), layout.get("title")
    name = (meta.get("alt") if isinstance(meta, dict) else "") or (title.get("text") if isinstance(title, dict) else "")
    label = html.escape(" ".join(re.sub(r"<[^>]*>", " ", name or "Interactive figure").split()))
    height = layout.get("height") or layout.get("template", {}).get("layout", {}).get("height") or 440  # pixels
    parts = {"data": figure.get("data", []), "layout": layout, "frames": figure.get("frames", [])}
    # With no "<" in the script element, no string of the figure can close it.
    payload = json.dumps(parts).replace("<", "\\u003c")
    return (
        f'<div {MARK} style="min-height:{int(height)}px">'
        f'<div class="chassis-canvas" role="figure" aria-label="{label}"></div>'
        f'<script type="application/json">{payload}</script>'
        f"<noscript>{still(figure, label)}<p>{label} (It can be played with where there is JavaScript.)</p>"
        "</noscript></div>"
    )


def _add_plotly(app: Any, config: Any) -> None:
    """Put plotly among the site's static files, beside the scripts that draw figures and sort tables."""
    config.html_static_path.append(str(files("plotly") / "package_data" / "plotly.min.js"))


def _quote_run(app: Any, page: str, source: list[str]) -> None:
    """Let the pages that quote the run of the profile `pocket` quote the run that is built."""
    if run := os.environ.get("CHASSIS_RUN"):
        source[0] = source[0].replace("run/pocket", run)


def _show_figures(app: Any, page: str, source: list[str]) -> None:
    """Give MyST-NB, which knows no plotly, the figures of an executed notebook as HTML."""
    if app.env.doc2path(page).endswith(".ipynb"):
        notebook = json.loads(source[0])
        for data in (output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", ())):
            if figure := data.pop(PLOTLY_MIME, None):
                data["text/html"] = figure_html(figure)
        source[0] = json.dumps(notebook)


def _load_scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Load them on the pages that hold a figure or a table to sort, whichever page it was computed on."""
    # Jupyter Book always brings Thebe, declares its constants twice (an error on every page), and its library is
    # somewhere on the network. The book has no live cells.
    scripts = context["script_files"]
    scripts[:] = [script for script in scripts if "thebe" not in f"{script.filename} {script.attributes.get('body')}"]
    for mark, name in ((MARK, "plotly.min.js"), (MARK, "figures.js"), (SORTABLE, "tables.js")):
        if mark in context.get("body", ""):
            app.add_js_file(name, loading_method="defer")
    if page == "search":  # a page from disk may not read the others for an excerpt
        app.add_js_file(None, body="DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY &&= location.protocol !== 'file:'")


def _mend_sources(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Call a bibliography no list, as docutils does: it has no items, and its entries say themselves what they are."""
    context["body"] = context.get("body", "").replace(
        '<div role="list" class="citation-list">', '<div class="citation-list">'
    )


def setup(app: Any) -> dict[str, bool]:
    """The extension: plotly copied once, figures made HTML, scripts loaded per page, the run that is built quoted."""
    app.connect("config-inited", _add_plotly)
    app.connect("source-read", _quote_run)
    app.connect("source-read", _show_figures)
    app.connect("html-page-context", _load_scripts)
    app.connect("html-page-context", _mend_sources)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
