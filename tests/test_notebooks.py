"""Every notebook of the book, run small with papermill on the bundled models, and the book built from them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest
from conftest import same, walk
from pages import Silent, barriers
from test_book_pages import ROOT, browser, needs_browser

from batch import Profile, build_book, load_profile, run
from bookpages import PLOTLY_MIME
from chassis_utils import ChassisError
from records import read_records
from tables import results_table
from verdicts import RULES

__all__ = ["browser"]
ROWS = 256  # of a page at most
#: Pages with all that scrolls sideways on a phone; axe looks at every page there in `benchmarks/pages.py`.
NARROW = ("book/index", "book/mathematics", "book/run/pocket/23_the_cost", "prf-prf")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The project in a folder of its own, every notebook executed."""
    root = tmp_path_factory.mktemp("project")
    for name in ("_config.yml", "_toc.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns("run"))
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    told = root / "notebooks" / "profiles.yml"
    told.write_text(re.sub(r"n_train: (\d+)", lambda n: f"n_train: {min(int(n[1]), ROWS)}", told.read_text()))
    profile = load_profile("pocket", told)
    run([], profile, progress=False)
    return profile


@pytest.fixture(scope="module")
def records(profile: Profile) -> pd.DataFrame:
    return read_records(profile.run_dir)


def test_every_notebook_is_published(profile: Profile) -> None:
    published = {path.stem for path in profile.run_dir.glob("*.ipynb")}
    assert published == set(profile.notebooks) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_notebooks_are_short(profile: Profile) -> None:
    for stem in profile.notebooks:
        cells = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text())["cells"]
        assert len(cells) <= 20, stem


def test_every_kl_has_its_identity_baseline(records: pd.DataFrame) -> None:
    keys = ["experiment", "base", "expert", "split", "probes"]
    kl = records[records["metric"] == "kl"]
    bare = kl[kl["method"] == "identity"].groupby(keys)["value"].count()
    for key in kl.groupby(keys).groups:
        assert bare.get(key) == 1, f"no identity baseline for {key}"


def test_every_kl_and_every_share_has_its_interval(records: pd.DataFrame) -> None:
    figures = records[records["metric"].isin(["kl", "recovered"]) & (records["n"] > 1)]
    assert len(figures) > 1000 and (figures["low"] <= figures["value"]).all()
    assert (figures["value"] <= figures["high"]).all()


def test_every_experiment_has_a_verdict_that_rests_on_records(profile: Profile, records: pd.DataFrame) -> None:
    verdicts = json.loads((profile.run_dir / "verdicts.json").read_text())
    assert set(verdicts) == set(RULES) == set(records["experiment"])
    values = set(records["value"])
    for name, verdict in verdicts.items():
        assert verdict["verdict"] in ("holds", "artefact", "open")
        assert verdict["rows"], f"{name} rests on nothing"
        assert {row["value"] for row in verdict["rows"]} <= values


def test_the_study_is_quoted_beside_its_reproduction(records: pd.DataFrame) -> None:
    quoted = records[records["reported"].notna()]
    assert all(method == "exact" or method.startswith("as_reported") for method in quoted["method"])
    assert {"projected_hidden_alignment", "layerwise_tuned_lens", "multi_layer_rank_sweep"} <= set(quoted["experiment"])


def test_a_second_run_gives_the_same_records(profile: Profile, records: pd.DataFrame, tmp_path: Path) -> None:
    stem = "05_multi_layer_sweep"
    run([stem], profile, out_dir=tmp_path, progress=False)
    again = read_records(tmp_path)
    assert same(records[records["notebook"] == stem], again) == []


def test_the_table_of_the_whole_run_lies_beside_its_records(profile: Profile, records: pd.DataFrame) -> None:
    table = pd.read_csv(profile.run_dir / "results.csv")
    assert set(table["experiment"]) == set(records["experiment"])
    lines = (profile.run_dir / "results.tex").read_text().splitlines()
    rows = [line for line in lines if line.endswith("\\\\") and not line.startswith(("experiment", "\\multicolumn"))]
    assert len(table) == len(results_table(records)) == len(rows)
    assert table.loc[table["kl"].notna(), "identity"].notna().all()


def test_prose_types_no_figure_by_hand() -> None:
    numbers = r"\[\d+\]\(#|\[\d+\](?=\(run/)|^## \d+\."  # of experiments and pages; keys of sources have years
    page = (ROOT / "book" / "right_and_wrong.md").read_text()
    prose = re.sub(rf"\{{(?:glue:text|cite)\}}`[^`]*`|{numbers}|\([^)\s]*\)", "", page, flags=re.MULTILINE)
    assert re.findall(r"\d[.,]\d|\d\d", prose) == ["16"]  # the strength of the synthetic expert


def test_a_comparison_without_its_records_says_what_to_run(profile: Profile, tmp_path: Path) -> None:
    lines = (profile.run_dir / "results.jsonl").read_text().splitlines(keepends=True)
    for lacking in ("hidden_to_hidden", "final_adapter_rank_sweep"):
        (tmp_path / "results.jsonl").write_text("".join(line for line in lines if f'"{lacking}"' not in line))
        with pytest.raises(ChassisError, match="run 04, 07 and 08 first"):
            run(["09_comparison"], profile, out_dir=tmp_path, progress=False)


@pytest.fixture(scope="module")
def site(profile: Profile) -> Path:
    return build_book(profile).parent


def plots_of(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
    return [data[PLOTLY_MIME] for data in outputs if PLOTLY_MIME in data]


def test_no_two_names_in_the_legend_of_a_figure_look_alike(profile: Profile) -> None:
    for stem in profile.notebooks:
        for number, plot in enumerate(plots_of(profile.run_dir / f"{stem}.ipynb"), 1):
            looks: dict[tuple, set[str]] = {}
            for trace in plot["data"]:
                marker, line = trace.get("marker", {}), trace.get("line", {})
                colour = marker.get("color", line.get("color"))
                there = trace.get("showlegend", True) and trace.get("visible", True)  # at first, before any menu
                if there and trace.get("name") and isinstance(colour, str):
                    look = trace["type"], colour, marker.get("symbol"), line.get("dash"), str(marker.get("pattern"))
                    looks.setdefault(look, set()).add(trace["name"])
            assert not [names for names in looks.values() if len(names) > 1], f"{stem}, figure {number}"


def test_the_book_builds_without_a_warning(site: Path, profile: Profile) -> None:
    for stem in profile.notebooks:
        assert (site / "book" / "run" / "pocket" / f"{stem}.html").is_file()


def pages_of(profile: Profile) -> dict[str, int]:
    """Every page of the book -> how many plots it must draw."""
    told = (profile.root / "_toc.yml").read_text()
    pages = dict.fromkeys(re.findall(r"(?:root|file): *(\S+)", told), 0)
    pages |= {f"book/run/pocket/{stem}": len(plots_of(profile.run_dir / f"{stem}.ipynb")) for stem in profile.notebooks}
    # A page in Markdown shows the figures that it quotes from notebooks.
    quoted = re.compile(r"^```\{glue:\} \w*figure", re.MULTILINE)
    texts = {page: profile.root / f"{page}.md" for page in pages}
    pages |= {page: len(quoted.findall(text.read_text())) for page, text in texts.items() if text.is_file()}
    return pages | dict.fromkeys(("genindex", "prf-prf", "search"), 0)  # Sphinx makes these itself


@needs_browser
def test_every_page_is_whole_at_every_width_and_in_every_theme(site: Path, profile: Profile, browser: object) -> None:
    pages, found, nameless = pages_of(profile), [], "all => all.filter(one => !(one.ariaLabel?.length > 20)).length"
    for name, width, theme, page in walk(browser, site, pages, 390, 1280):
        assert (site / f"{name}.html").stat().st_size < 1_500_000, f"{name} is heavy"
        assert page.locator(".chassis-canvas").evaluate_all(nameless) == 0, f"a plot of {name} has no words"
        assert page.locator(".chassis-plot:not(:has(figcaption))").count() == 0, f"a plot of {name} has no caption"
        still = "all => all.filter(one => !one.textContent.includes('<svg')).length"
        assert page.locator(".chassis-plot noscript").evaluate_all(still) == 0, f"a plot of {name} has no still"
        if width == 1280 or name in NARROW:
            found += [f"{name}: {one}" for one in barriers(page, theme)]
    assert not found, "\n".join(found)
    assert {"book/index", "book/v2", "book/changelog"} < {*pages} and sum(pages.values()) > 30


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The address of the book on a server of this machine alone."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_browser
@pytest.mark.parametrize("disk", [True, False])
def test_search_finds_the_pages_that_hold_a_word(site: Path, served: str, browser: object, disk: bool) -> None:
    root, faults = site.as_uri() if disk else served, []
    page = browser.new_page(viewport={"width": 1280, "height": 844})
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: said.type == "error" and faults.append(said.text))
    page.on("request", lambda request: request.url.startswith(root) or faults.append(request.url))
    for word in ("rebinding", "Shakespeare"):
        holding = {
            str(path.relative_to(site))
            for path in (site / "book").rglob("*.html")
            if re.search(rf"\b{word}\b", re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL))
        }
        page.goto(f"{root}/book/index.html")
        page.keyboard.press("Control+k")
        page.keyboard.type(word)
        page.keyboard.press("Enter")
        page.locator("#search-results .search-summary", has_text="finished").wait_for()
        links = page.locator("#search-results li a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
        assert {link.partition("#")[0].partition("?")[0] for link in links} >= holding > set(), word
    page.close()
    assert not faults
