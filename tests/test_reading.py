"""The path a reader takes: parts with an opening page, chapters that begin with what they find and lead to the next."""

from __future__ import annotations

import re
from itertools import pairwise

import nbformat
import pytest
import yaml
from test_project import ROOT

BOOK = ROOT / "book"
PARTS = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
FILES = [chapter["file"] for part in PARTS for chapter in part["chapters"]]
CHAPTERS = [file.rsplit("/", 1)[1] for file in FILES if "/run/" in file]
OPENED = [part for part in PARTS if "book/parts/" in part["chapters"][0]["file"]]


def prose(stem: str) -> list[str]:
    """The paragraphs of a notebook."""
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4).cells
    return [part for cell in cells if cell.cell_type == "markdown" for part in cell.source.split("\n\n")]


def test_every_notebook_and_page_has_its_place() -> None:
    assert sorted(CHAPTERS) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    written = {f"{path.relative_to(ROOT).with_suffix('')}" for path in BOOK.rglob("*.md") if "run" not in path.parts}
    assert written == {file for file in FILES if "/run/" not in file} | {"book/index"}


@pytest.mark.parametrize("stem", CHAPTERS)
def test_a_chapter_begins_with_its_title_and_two_sentences(stem: str) -> None:
    title, lead, *_ = prose(stem)
    assert title.startswith("# ") and "\n" not in title
    assert len(re.findall(r"\.(?=\s|$)", lead)) == 2 and lead.endswith("."), lead
    assert not re.search(r"\d", lead.replace("v2", "")), "a figure in a lead is one that no record vouches for"


def test_a_chapter_that_names_the_next_one_names_the_one_that_follows() -> None:
    follows = dict(pairwise(CHAPTERS))
    named = {stem: re.findall(r"Next: .*\((\w+)\)", prose(stem)[-1]) for stem in CHAPTERS}
    assert len(linked := {stem: found for stem, found in named.items() if found}) >= 20
    assert linked == {stem: [follows[stem]] for stem in linked}


@pytest.mark.parametrize("part", OPENED, ids=lambda part: part["caption"])
def test_a_part_opens_with_a_page_that_leads_to_its_chapters(part: dict) -> None:
    first, *others = [chapter["file"] for chapter in part["chapters"]]
    text = (ROOT / f"{first}.md").read_text()
    assert text.startswith(f"# Part {part['caption'].split('.')[0]}. ")
    assert re.findall(r"\| \[\d+\]\(\.\./run/pocket/(\w+)\)", text) == [file.rsplit("/", 1)[1] for file in others]
    # Figures come from records.
    plain = re.sub(r"\{glue:text\}`[^`]*`|\([^)\s]*\)|\[\d+\]|[Cc]hapters? \d+( to \d+)?|v2", "", text)
    assert not re.search(r"\d", plain), re.findall(r".*\d.*", plain)


def test_all_but_the_story_and_the_reference_are_parts_with_an_opening() -> None:
    assert [part["caption"] for part in PARTS if part not in OPENED] == ["The story", "Reference"]
