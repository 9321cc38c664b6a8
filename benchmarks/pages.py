"""How heavy the pages of the built book are, how soon each is first painted, and what axe finds on them.

python benchmarks/pages.py [_build/html] [--pictures book/pictures]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from lab import CHROMIUM, QUIET, ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
from records import replace_text  # noqa: E402

RESULTS = Path(__file__).with_name("pages.json")
WIDTHS = (390, 1280)
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
#: Pictures of the README: the page, and which of its figures; None for the top of the page.
PICTURES = {
    "landing": ("book/index.html", None),
    "lens": ("book/run/pocket/03_layerwise_lenses.html", 1),
    "exact_bridge": ("book/run/pocket/19_vocab_bridge_exact.html", 1),
    "two_plugs": ("book/run/pocket/21_the_port.html", 0),
}


#: Of each colour in a piece of code one word stays a word of that colour.
THIN = """all => all.forEach(code => {
  const seen = new Set();
  for (const word of code.querySelectorAll("span:not(:has(*))")) {
    if (seen.has(word.className)) word.replaceWith(word.textContent);
    seen.add(word.className);
  }
})"""


def barriers(page: Any, theme: str) -> list[str]:
    """What axe finds serious on a page, and headings out of order, one line each.

    The page changes only its colours with the theme, so that in the dark one only contrast is looked at. Rows of a
    table are alike, and words of a kind in code: a few of each are enough, as axe takes minutes for a thousand.
    """
    page.locator("tbody tr:nth-child(n+4)").evaluate_all("all => all.forEach(row => row.remove())")
    page.locator("pre").evaluate_all(THIN)
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    # Without preload: that would fetch style sheets anew, which no page on a disk may.
    options = {"resultTypes": ["violations"], "preload": False}
    if theme == "dark":
        options["runOnly"] = ["color-contrast"]
    found = page.evaluate("options => axe.run(document, options)", options)
    assert found["passes"], "axe has looked at nothing"
    return [
        f"{one['id']} ({theme}): {node['html'][:200]}"
        for one in found["violations"]
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical") or one["id"] == "heading-order"
    ]


class Silent(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *_: object) -> None:
        """Print no line for a request."""


@contextmanager
def served(site: Path) -> Iterator[tuple[Any, str]]:
    """A browser, and the address at which a site is served to this machine."""
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site)) as server,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser, f"http://127.0.0.1:{server.server_port}"
        browser.close()
        server.shutdown()


def taken(site: Path, folder: Path) -> None:
    """Take the pictures of the README, in the light theme."""
    with served(site) as (browser, address):
        for name, (path, number) in PICTURES.items():
            page = browser.new_page(viewport={"width": 1180, "height": 760}, color_scheme="light")
            page.goto(f"{address}/{path}", wait_until="networkidle")
            page.wait_for_selector(".js-plotly-plot .main-svg")
            seen = page if number is None else page.locator(".chassis-canvas").nth(number)
            if number is not None:
                seen.scroll_into_view_if_needed()
                seen.locator(".main-svg").first.wait_for()
            page.wait_for_timeout(500)  # what slides or fades in
            seen.screenshot(path=folder / f"{name}.png")
            page.close()


def looked_at(browser: Any, address: str, site: Path, name: str) -> dict[str, Any]:
    """One page: megabytes, seconds to its first paint with nothing cached, and axe at either width and theme."""
    row: dict[str, Any] = {"megabytes": (site / name).stat().st_size / 1e6}
    found: list[str] = []
    for width in WIDTHS:  # each in a context of its own, which has no script in its cache
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto(f"{address}/{name}")
        row["first_paint"] = page.wait_for_function(PAINTED).json_value() / 1000  # kept of the last width
        page.wait_for_function("[...document.querySelectorAll('.chassis-plot')].every(one => one.dataset.drawn)")
        page.wait_for_function("!document.querySelector('.math') || document.querySelector('mjx-container')")
        page.add_style_tag(content="* { transition: none !important }")  # no colour is judged on its way to another
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
            found += [f"{width}: {one}" for one in barriers(page, theme)]
        page.close()
    return row | {"axe": found}


def main() -> bool:
    """Print the heaviest page and the slowest beside the median, and what axe finds; False where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="take the README's pictures instead")
    asked = parser.parse_args()
    site = asked.site
    names = sorted(str(path.relative_to(site)) for path in (site / "book").rglob("*.html"))
    if not names:
        sys.exit(f"no pages in {site}: make book first")
    if asked.pictures:
        taken(site, asked.pictures)
        return True
    pages = {}
    with served(site) as (browser, address):
        for name in [*names, *(f"{one}.html" for one in ("genindex", "prf-prf", "search"))]:
            pages[name] = looked_at(browser, address, site, name)
    worst = {}
    for what, unit in (("megabytes", "MB"), ("first_paint", "s")):
        found = {name: page[what] for name, page in pages.items()}
        worst[what] = max(found, key=found.__getitem__)
        middle = statistics.median(found.values())
        print(f"{what}: {middle:.2f} {unit} in the median, {found[worst[what]]:.2f} of {worst[what]}")
    serious = [f"{name}: {one}" for name, page in pages.items() for one in page["axe"]]
    print(f"axe: {len(serious)} serious findings on {len(pages)} pages, at {WIDTHS} in both themes", *serious, sep="\n")
    replace_text(RESULTS, json.dumps({"processors": os.cpu_count(), "pages": pages}, indent=1) + "\n")
    missed = [pages[worst["megabytes"]]["megabytes"] > 1.5, pages[worst["first_paint"]]["first_paint"] > 1, serious]
    return not any(missed)


if __name__ == "__main__":
    sys.exit(not main())
