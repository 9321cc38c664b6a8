"""Plotly figures as pieces of a page, and the renderer that MyST-NB lacks; the page brings the script that draws."""

from __future__ import annotations

import html
import json
import re
from typing import Any, ClassVar

from docutils import nodes

PLOTLY_MIME = "application/vnd.plotly.v1+json"
MARK = 'class="chassis-plot"'


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
