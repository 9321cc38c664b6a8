"""How heavy the pages of the built book are, and how soon each is first painted, from a server of this machine.

python benchmarks/pages.py [_build/html] [--pictures book/pictures]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from lab import CHROMIUM, QUIET, ROOT

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
#: Pictures of the README: the page, and which of its figures; None for the top of the page.
PICTURES = {
    "landing": ("book/index.html", None),
    "lens": ("book/run/pocket/03_layerwise_lenses.html", 1),
    "exact_bridge": ("book/run/pocket/19_vocab_bridge_exact.html", 1),
    "two_plugs": ("book/run/pocket/21_the_port.html", 0),
}


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


def main() -> int:
    """Print the heaviest page and the slowest, each beside the median; 1 where a page misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="take the README's pictures instead")
    asked = parser.parse_args()
    site = asked.site
    names = sorted(str(path.relative_to(site)) for path in (site / "book").rglob("*.html"))
    if not names:
        sys.exit(f"no pages in {site}: make book first")
    weights, paints = {name: (site / name).stat().st_size / 1e6 for name in names}, {}
    if asked.pictures:
        taken(site, asked.pictures)
        return 0
    with served(site) as (browser, address):
        for name in names:  # each in a context of its own, which has no script in its cache
            page = browser.new_page(viewport={"width": 1280, "height": 844})
            page.goto(f"{address}/{name}")
            paints[name] = page.wait_for_function(PAINTED).json_value() / 1000
            page.close()
    for what, unit, found in (("weight", "MB", weights), ("first paint", "s", paints)):
        worst = max(found, key=found.get)
        print(f"{what}: {statistics.median(found.values()):.2f} {unit} in the median, {found[worst]:.2f} of {worst}")
    return max(weights.values()) > 1.5 or max(paints.values()) > 1


if __name__ == "__main__":
    sys.exit(main())
