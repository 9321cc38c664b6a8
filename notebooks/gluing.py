"""The way a plotly figure travels from the page that draws it to any other."""

from __future__ import annotations

import json

import plotly.graph_objects as go
from IPython.display import display

from bookpages import figure_html


def glue_figure(name: str, figure: go.Figure) -> None:
    """Store a plotly figure in the running notebook under `name`, for any page to embed; shows nothing.

    `myst_nb.glue` cannot: a plotly figure displays itself, which leaves the stored output empty. And of one page's
    outputs another page takes only text, HTML and images, so what is stored is the piece of the page.
    """
    prefix = "application/papermill.record/"
    page = figure_html(json.loads(figure.to_json()))
    display({f"{prefix}text/html": page}, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}})
