"""How heavy the pages of the built book are, and how soon each is first painted, from a server of this machine.

python benchmarks/pages.py [_build/html]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from lab import CHROMIUM, QUIET, ROOT

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


class Silent(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *_: object) -> None:
        """Print no line for a request."""


def main() -> int:
    """Print the heaviest page and the slowest, each beside the median; 1 where a page misses its target."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "_build" / "html")
    site = parser.parse_args().site
    names = sorted(str(path.relative_to(site)) for path in (site / "book").rglob("*.html"))
    if not names:
        sys.exit(f"no pages in {site}: make book first")
    weights, paints = {name: (site / name).stat().st_size / 1e6 for name in names}, {}
    with (
        sync_playwright() as playwright,
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site)) as server,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        for name in names:  # each in a context of its own, which has no script in its cache
            page = browser.new_page(viewport={"width": 1280, "height": 844})
            page.goto(f"http://127.0.0.1:{server.server_port}/{name}")
            paints[name] = page.wait_for_function(PAINTED).json_value() / 1000
            page.close()
        browser.close()
        server.shutdown()
    for what, unit, found in (("weight", "MB", weights), ("first paint", "s", paints)):
        worst = max(found, key=found.get)
        print(f"{what}: {statistics.median(found.values()):.2f} {unit} in the median, {found[worst]:.2f} of {worst}")
    return max(weights.values()) > 1.5 or max(paints.values()) > 1


if __name__ == "__main__":
    sys.exit(main())
