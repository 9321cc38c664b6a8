"""The book's own Sphinx extension: figures, long tables, words explained, names and runs quoted on its pages.

A page holds a figure's JSON and nothing else; one `plotly.min.js`, taken from the installed plotly, is loaded where a
page has a figure. All of it works from `file://`, with no network.
"""

from __future__ import annotations

import html
import json
import os
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from docutils import nodes

from stills import still

PLOTLY_MIME = "application/vnd.plotly.v1+json"
MARK, SORTABLE = 'class="chassis-plot"', 'class="dataframe sortable"'
GLOSSARY = "book/glossary"
#: Pages that are read from the front; elsewhere `head`, say, may be that of a cluster.
CHAPTERS = re.compile(r"book/(index|right_and_wrong|mathematics|v2|parts/.+|run/.+)")
#: Where a word is no prose, or leads somewhere already.
NO_PROSE = (nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.raw, nodes.table)


def figure_html(figure: dict[str, Any]) -> str:
    """A plotly figure (its JSON) as a piece of a page: named, drawn once the script is there.

    Its name is `layout.meta.alt` where there is one, else the title; below it stands `layout.meta.caption`, in which
    backticks mark what a menu or a legend says. To a screen reader it is a figure, no image, as it holds menus and
    buttons.
    """
    layout = figure.get("layout", {})
    meta, title = (told if isinstance(told, dict) else {} for told in (layout.get("meta"), layout.get("title")))
    name, caption = meta.get("alt") or title.get("text"), html.escape(meta.get("caption", ""))
    caption = re.sub(r"`([^`]+)`", r"<code>\1</code>", caption)
    label = html.escape(" ".join(re.sub(r"<[^>]*>", " ", name or "Interactive figure").split()))
    height = layout.get("height") or layout.get("template", {}).get("layout", {}).get("height") or 440  # pixels
    parts = {"data": figure.get("data", []), "layout": layout, "frames": figure.get("frames", [])}
    # With no "<" in the script element, no string of the figure can close it.
    payload = json.dumps(parts).replace("<", "\\u003c")
    return (
        f'<figure {MARK} style="min-height:{int(height)}px">'
        f'<div class="chassis-canvas" role="figure" aria-label="{label}"></div>'
        f'<script type="application/json">{payload}</script>'
        f"<noscript>{still(figure, label)}<p>{label} (It can be played with where there is JavaScript.)</p>"
        f"</noscript>{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
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


@cache
def _terms(env: Any) -> dict[str, tuple[str, str]]:
    """Term of the glossary, in small letters -> where it stands on that page, and what it means."""
    items = env.get_doctree(GLOSSARY).findall(nodes.definition_list_item)
    told = {name: item[-1].astext().replace("\n", " ") for item in items for term in item[:-1] for name in term["ids"]}
    known = env.get_domain("std").objects.items()
    return {name.lower(): (place, told[place]) for (kind, name), (_, place) in known if kind == "term"}


def _link_terms(app: Any, doctree: Any, page: str) -> None:
    """Lead from a page's first use of each term to the glossary, and show its meaning where the pointer rests."""
    if not CHAPTERS.fullmatch(page) or GLOSSARY not in app.env.found_docs or app.builder.format != "html":
        return
    left = dict(_terms(app.env))
    target = app.builder.get_relative_uri(page, GLOSSARY)
    for text in list(doctree.findall(nodes.Text)):
        one, prose = text.parent, []
        while one is not None and not isinstance(one, NO_PROSE):
            one = one.parent
        if one is not None:
            continue
        words = "|".join(map(re.escape, sorted(left, key=len, reverse=True)))
        for part in re.split(rf"(?<![\w-])({words})(?=s?(?![\w-]))", text, flags=re.IGNORECASE) if left else [text]:
            if known := left.pop(part.lower(), None):
                place, meaning = known
                link = {"internal": True, "refuri": f"{target}#{place}", "reftitle": meaning, "classes": ["term"]}
                prose.append(nodes.reference("", part, **link))
            else:
                prose.append(nodes.Text(part))
        text.parent.replace(text, prose)


def _load_scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Load them on the pages that hold a figure or a table to sort, whichever page it was computed on."""
    # Jupyter Book always brings Thebe, declares its constants twice (an error on every page), and its library is
    # somewhere on the network. The book has no live cells.
    scripts = context["script_files"]
    scripts[:] = [script for script in scripts if "thebe" not in f"{script.filename} {script.attributes.get('body')}"]
    wanted = {"plotly.min.js": (MARK,), "figures.js": (MARK,), "tables.js": (SORTABLE,)}
    for name, marks in (wanted | {"reach.js": ("text_html", 'class="math')}).items():
        if any(mark in context.get("body", "") for mark in marks):
            app.add_js_file(name, loading_method="defer")
    if page == "search":
        app.add_js_file("search.js", loading_method="defer")


def launch_buttons(stem: str, repository: str) -> list[dict[str, str]]:
    """Ways to run a notebook of a repository: on Binder, and of GitHub's also on Colab; none without a repository.

    `repository` is the address of a branch as its web page has it: `https://host/owner/name/tree/branch`, or without
    the last two, of `main`. ValueError: it is no such address.
    """
    if not repository:
        return []
    told = re.fullmatch(
        r"https://([\w.-]+)/([\w.-]+(?:/[\w.-]+?)+?)(?:\.git)?(?:/(?:-/)?tree/([\w./-]+?))?/?", repository
    )
    if not told:
        raise ValueError(f"'{repository}' is no address of a repository: give https://host/owner/name/tree/branch")
    host, name, branch = told[1], told[2], told[3] or "main"
    where = f"gh/{name}" if host == "github.com" else f"git/{quote(f'https://{host}/{name}', safe='')}"
    path = f"notebooks/{stem}.ipynb"
    ways = {"Binder": f"https://mybinder.org/v2/{where}/{quote(branch, safe='')}?urlpath=lab/tree/{path}"}
    if host == "github.com":
        ways["Colab"] = f"https://colab.research.google.com/github/{name}/blob/{branch}/{path}"
    return [{"type": "link", "text": k, "tooltip": f"Run this page on {k}", "url": url} for k, url in ways.items()]


def _check_repository(app: Any, config: Any) -> None:
    """Refuse an address that no button could be made of, before any page is read."""
    from sphinx.errors import ConfigError

    try:
        launch_buttons("page", config.chassis_repository)
    except ValueError as error:
        raise ConfigError(f"chassis_repository: {error}") from None


def _offer_launch(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Put these beside a page that is a notebook: its source, which has no outputs, never the executed one."""
    stem = page.rsplit("/", 1)[-1]
    if "/run/" in f"/{page}" and (Path(app.srcdir) / "notebooks" / f"{stem}.ipynb").is_file():
        if buttons := launch_buttons(stem, app.config.chassis_repository):
            group = {"type": "group", "tooltip": "Run this page", "icon": "fas fa-rocket", "label": "launch-buttons"}
            context["header_buttons"].append(group | {"buttons": buttons})


def _link_names(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Link a class of the package by its last name: annotations tell the module that it lives in, or none at all."""
    if node.get("refdomain") != "py":
        return None
    domain, name = env.get_domain("py"), node["reftarget"].rsplit(".", 1)[-1]
    homes = (full for full, one in domain.objects.items() if full.endswith(f".{name}") and one.objtype == "class")
    if not (full := next(homes, None)):
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "class", full, node, text)


def _readable(app: Any, what: str, name: str, object: Any, options: Any, signature: str, returns: str) -> Any:
    """A signature that Sphinx can read: a default that is made anew each time is no Python there."""
    return signature and signature.replace("<factory>", "{}"), returns


def _sections(app: Any, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    """Give Sphinx the sections of a Google docstring; an attribute has none, and its first colon ends no type."""
    from sphinx.ext.napoleon import GoogleDocstring

    if what not in ("attribute", "property"):
        lines[:] = GoogleDocstring(lines, what=what).lines()


def _mend_body(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Call a list what is one: a bibliography has no items, and the arguments of a long signature no terms."""
    body = context.get("body", "").replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    items = r'<dl>\s*((?:<dd><em class="sig-param">.*?</dd>\s*)+)</dl>'
    context["body"] = re.sub(
        items, lambda one: f'<ul class="sig-list">{one[1].replace("dd>", "li>")}</ul>', body, flags=re.DOTALL
    )


def setup(app: Any) -> dict[str, bool]:
    """The extension: plotly copied once, figures made HTML, scripts per page, runs quoted, terms and names linked."""
    app.connect("config-inited", _add_plotly)
    app.connect("source-read", _quote_run)
    app.connect("source-read", _show_figures)
    app.connect("doctree-resolved", _link_terms)
    app.connect("html-page-context", _load_scripts)
    # The workflow that publishes knows its repository; a setting of _config.yml goes before that.
    app.add_config_value("chassis_repository", os.environ.get("CHASSIS_REPOSITORY", ""), "html", [str])
    app.connect("config-inited", _check_repository)
    app.connect("html-page-context", _offer_launch, priority=502)  # the theme's own buttons come first
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", _readable)
    app.connect("autodoc-process-docstring", _sections)
    app.connect("missing-reference", _link_names)
    app.connect("html-page-context", _mend_body)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
