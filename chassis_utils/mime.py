"""Plotly figures in the book: the renderer MyST-NB lacks, and the scripts of its pages.

The page holds the figure's JSON and nothing else; one `plotly.min.js`, taken from the installed plotly, is
loaded where a page has a figure. All of it works from `file://`, with no network.
"""

from __future__ import annotations

import html
import json
import os
import re
from importlib.resources import files
from typing import Any, ClassVar

from docutils import nodes

PLOTLY_MIME = "application/vnd.plotly.v1+json"
MARK, SORTABLE = 'class="chassis-plot"', 'class="dataframe sortable"'


class PlotlyRenderer:
    """MyST-NB mime renderer (entry point `myst_nb.mime_renderers`) for figures as papermill stores them."""

    mime_priority_overrides: ClassVar[list[tuple[str, str, int | None]]] = [("*", PLOTLY_MIME, 1)]

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """The nodes of one output, or None where the output is not a plotly figure."""
        if inline or data.mime_type != PLOTLY_MIME:
            return None
        return [nodes.raw(text=figure_html(data.content), format="html", classes=["output"])]


def figure_html(figure: dict[str, Any]) -> str:
    """A plotly figure (its JSON) as a piece of a page: a named picture, drawn once the script is there.

    Its name is `layout.meta.alt` where there is one, else the title.
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
        f'<div class="chassis-canvas" role="img" aria-label="{label}"></div>'
        f'<script type="application/json">{payload}</script>'
        f"<noscript>{label} (This figure is drawn by JavaScript.)</noscript></div>"
    )


def _add_scripts(app: Any, config: Any) -> None:
    """Put plotly and the scripts that draw figures and sort tables among the site's static files."""
    own = [files("chassis_utils") / name for name in ("figures.js", "tables.js")]
    config.html_static_path += map(str, [files("plotly") / "package_data" / "plotly.min.js", *own])


def _quote_run(app: Any, page: str, source: list[str]) -> None:
    """Let the pages that quote the run of the profile `pocket` quote the run that is built."""
    if run := os.environ.get("CHASSIS_RUN"):
        source[0] = source[0].replace("run/pocket", run)


def _load_scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Load them on the pages that hold a figure or a table to sort, whichever page it was computed on."""
    # Jupyter Book always brings Thebe, declares its constants twice (an error on every page), and its library is
    # somewhere on the network. The book has no live cells.
    scripts = context["script_files"]
    scripts[:] = [script for script in scripts if "thebe" not in f"{script.filename} {script.attributes.get('body')}"]
    for mark, name in ((MARK, "plotly.min.js"), (MARK, "figures.js"), (SORTABLE, "tables.js")):
        if mark in context.get("body", ""):
            app.add_js_file(name, loading_method="defer")


def setup(app: Any) -> dict[str, bool]:
    """The Sphinx extension: scripts copied once, loaded per page; pages that quote the run that is built."""
    app.connect("config-inited", _add_scripts)
    app.connect("source-read", _quote_run)
    app.connect("html-page-context", _load_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
