"""The book's own Sphinx extension: plotly and the scripts of pages loaded where they are needed, the run that is built.

With the renderer of `chassis_utils.mime` a page holds the figure's JSON and nothing else; one `plotly.min.js`, taken
from the installed plotly, is loaded where a page has a figure. All of it works from `file://`, with no network.
"""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

from chassis_utils.mime import MARK

SORTABLE = 'class="dataframe sortable"'


def _add_plotly(app: Any, config: Any) -> None:
    """Put plotly among the site's static files, beside the scripts that draw figures and sort tables."""
    config.html_static_path.append(str(files("plotly") / "package_data" / "plotly.min.js"))


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
    """The extension: plotly copied once, scripts loaded per page; pages that quote the run that is built."""
    app.connect("config-inited", _add_plotly)
    app.connect("source-read", _quote_run)
    app.connect("html-page-context", _load_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
