"""The book as others get it: one file from disk, workflows, and buttons that lead to sources or are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import refused
from test_book_pages import browser, needs_browser, site

from archive import archive
from bookpages import launch_buttons

__all__ = ["browser", "site"]
ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


@pytest.fixture(scope="module")
def packed(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(site, tmp_path_factory.mktemp("packed") / "chassis-toy.zip")


def test_the_same_pages_give_the_same_bytes_whenever_they_are_packed(site: Path, packed: Path, tmp_path: Path) -> None:
    for path in site.rglob("*"):
        if path.is_file():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    mask = os.umask(0o077)
    try:
        again = archive(site, tmp_path / "other" / "chassis-toy.zip")
    finally:
        os.umask(mask)
    assert again.read_bytes() == packed.read_bytes()
    (site / "one more.html").write_text("<p>more</p>")
    try:
        assert archive(site, tmp_path / "chassis-toy.zip").read_bytes() != packed.read_bytes()
    finally:
        (site / "one more.html").unlink()


def test_it_holds_every_page_in_one_folder_and_nothing_of_the_build(site: Path, packed: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        assert file.testzip() is None
        names = file.namelist()
    assert {name.split("/")[0] for name in names} == {"chassis-toy"}
    there = {name.removeprefix("chassis-toy/") for name in names}
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.html")} <= there
    assert "READ ME FIRST.txt" in there and not {".buildinfo", "objects.inv"} & there


def test_where_no_book_was_built_nothing_is_packed(tmp_path: Path) -> None:
    with refused("no book in", "chassis book"):
        archive(tmp_path, tmp_path / "out" / "x.zip")
    assert not (tmp_path / "out").exists()


@needs_browser
def test_unpacked_it_works_from_disk_and_its_search_finds_pages(packed: Path, browser: object, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        file.extractall(tmp_path / "a folder with spaces")
    (folder,) = (tmp_path / "a folder with spaces").iterdir()
    page = browser.new_page()
    faults, elsewhere = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and elsewhere.append(request.url))
    page.goto((folder / "index.html").as_uri())
    page.wait_for_selector(".chassis-plot[data-drawn] .main-svg")
    page.goto((folder / "search.html").as_uri() + "?q=formula")
    page.wait_for_selector("#search-results .search-summary:has-text('found')")  # results come one by one until then
    found = page.locator("#search-results ul.search li a").all_inner_texts()
    assert any("Page two" in text for text in found) and not any("Landing" in text for text in found)
    page.locator("#search-results ul.search li a").first.click()
    page.wait_for_selector("article h1")
    assert (page.url.startswith(folder.as_uri()), faults, elsewhere) == (True, [], [])
    page.close()


def test_buttons_lead_to_the_source_of_a_page_on_its_own_branch() -> None:
    told = launch_buttons("01_exact_adapter", "https://github.com/some.one/a-book/tree/next/one")
    assert {one["text"]: one["url"] for one in told} == {
        "Binder": "https://mybinder.org/v2/gh/some.one/a-book/next%2Fone?urlpath=lab/tree/notebooks/01_exact_adapter.ipynb",
        "Colab": "https://colab.research.google.com/github/some.one/a-book/blob/next/one/notebooks/01_exact_adapter.ipynb",
    }
    plain = launch_buttons("a", "https://github.com/some.one/a-book")
    assert plain == launch_buttons("a", "https://github.com/some.one/a-book.git") != []
    assert "/main?" in plain[0]["url"]
    (other,) = launch_buttons("a", "https://git.example.org/group/part/book/-/tree/dev")
    assert other["url"].startswith(
        "https://mybinder.org/v2/git/https%3A%2F%2Fgit.example.org%2Fgroup%2Fpart%2Fbook/dev?"
    )


@pytest.mark.parametrize("wrong", ["github.com/a/b", "https://github.com/a", "https://github.com/a/b?x=1", "a/b"])
def test_an_address_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is no address of a repository: give https://host/owner/name"):
        launch_buttons("a", wrong)


@pytest.mark.parametrize("address", ["", "https://github.com/some.one/a-book/tree/main", "nonsense"])
def test_a_built_page_has_buttons_only_where_there_is_an_address(address: str, tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "run" / "toy").mkdir(parents=True)
    for name in ("bookpages.py", "stills.py"):
        (tmp_path / "notebooks" / name).write_bytes((ROOT / "notebooks" / name).read_bytes())
    notebook = '{"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# One"]}], '
    notebook += '"metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}'
    (tmp_path / "notebooks" / "1_look.ipynb").write_text(notebook)
    (tmp_path / "run" / "toy" / "1_look.ipynb").write_text(notebook)
    (tmp_path / "index.md").write_text("# Landing\n\n[One](run/toy/1_look)\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters: [{file: run/toy/1_look}]\n")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    del config["bibtex_bibfiles"], config["sphinx"]["config"]["html_css_files"]
    config["html"].pop("favicon", None), config["sphinx"]["config"].pop("html_favicon", None)
    config["sphinx"]["config"]["html_static_path"] = []
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    build = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(tmp_path), "-W", "-n"]
    env = os.environ | {"CHASSIS_REPOSITORY": address}
    done = subprocess.run(build, env=env, capture_output=True, text=True, check=False)
    if address == "nonsense":
        assert done.returncode != 0 and "'nonsense' is no address of a repository" in done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    pages = [(tmp_path / "_build" / "html" / name).read_text() for name in ("run/toy/1_look.html", "index.html")]
    links = [re.findall(r'href="(https://[^"]*(?:binder|colab)[^"]*)"', page) for page in pages]
    assert len(links[0]) == (2 if address else 0) and links[1] == []
    assert all(link.endswith("notebooks/1_look.ipynb") for link in links[0])


def test_workflows_run_what_there_is_with_the_python_of_the_project() -> None:
    assert {*WORKFLOWS} == {"tests", "book"}
    targets = {*re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)}
    for path in WORKFLOWS.values():
        told = yaml.safe_load(path.read_text())
        assert told["permissions"] == {"contents": "read"}, "what a job needs beside that it asks for itself"
        steps = [step for job in told["jobs"].values() for step in job["steps"]]
        pythons = {step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")}
        assert pythons == {"3.11"}
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
        for command in (step["run"] for step in steps if "run" in step):
            assert {*re.findall(r"\bmake (\w+)", command)} <= targets
            assert all((ROOT / script).is_file() for script in re.findall(r"^\.ci/\w+", command))
    on = yaml.safe_load(WORKFLOWS["tests"].read_text())[True]  # YAML takes `on` for yes
    assert {*on} == {"push", "pull_request"}
    publish = yaml.safe_load(WORKFLOWS["book"].read_text())["jobs"]["publish"]
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
