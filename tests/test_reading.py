"""The path a reader takes: parts with an opening page, chapters that begin with what they find and lead to the next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import yaml
from test_project import ROOT

BOOK = ROOT / "book"
ROOMS = ("chassis_utils", "notebooks", "benchmarks")
PATHS = os.environ | {"PYTHONPATH": str(ROOT / "notebooks")}
PARTS = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
FILES = [
    one["file"] for part in PARTS for chapter in part["chapters"] for one in (chapter, *chapter.get("sections", []))
]
CHAPTERS = [file.rsplit("/", 1)[1] for file in FILES if "/run/" in file]
INCLUDED = re.compile(r"```\{include\} (\w+)\.md")
OPENED = [part for part in PARTS if "book/parts/" in part["chapters"][0]["file"]]


def prose(stem: str) -> list[str]:
    """The paragraphs of a notebook."""
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4).cells
    return [part for cell in cells if cell.cell_type == "markdown" for part in cell.source.split("\n\n")]


def test_every_notebook_and_page_has_its_place() -> None:
    assert sorted(CHAPTERS) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    written = {f"{path.relative_to(ROOT).with_suffix('')}" for path in BOOK.rglob("*.md") if "run" not in path.parts}
    written -= {f"book/{name}" for text in BOOK.glob("*.md") for name in INCLUDED.findall(text.read_text())}
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
    plain = re.sub(r"\{(?:glue:text|cite)\}`[^`]*`|\([^)\s]*\)|\[\d+\]|[Cc]hapters? \d+( to \d+)?|v2", "", text)
    assert not re.search(r"\d", plain), re.findall(r".*\d.*", plain)


def test_all_but_the_story_and_the_reference_are_parts_with_an_opening() -> None:
    assert [part["caption"] for part in PARTS if part not in OPENED] == ["The story", "Guides", "Reference", "Appendix"]


def texts() -> dict[str, str]:
    """Every page of the book as it is written."""
    written = {str(path.relative_to(BOOK).with_suffix("")): path for path in BOOK.rglob("*.md")}
    pages = {name: path.read_text() for name, path in written.items() if not name.startswith("run/")}
    return pages | {stem: "\n\n".join(prose(stem)) for stem in CHAPTERS}


def test_every_source_is_cited_and_every_citation_has_a_source() -> None:
    sources = re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(), re.MULTILINE)
    cited = [
        key for text in texts().values() for keys in re.findall(r"\{cite\}`([^`]+)`", text) for key in keys.split(",")
    ]
    assert len(sources) == len(set(sources)) and set(sources) == set(cited)
    # Code names its sources by the same keys, and no other way.
    code = {path: path.read_text() for room in ROOMS for path in (ROOT / room).glob("*.py")}
    keys = [key for text in code.values() for keys in re.findall(r":cite:`([^`]+)`", text) for key in keys.split(",")]
    assert len(keys) > 20 and set(keys) <= set(sources)
    named = re.compile(r"\b[A-Z]\w+(?:,? and [A-Z]\w+|,? et al\.)?,? \(?(?:19|20)\d\d\b|arXiv:? ?\d")
    assert not {path.name: found for path, text in code.items() if (found := named.findall(text))}


def test_what_is_proved_is_proved_once_and_used() -> None:
    pages = texts()
    stated = {stem: re.findall(r":label: ([\w-]+)", text) for stem, text in pages.items()}
    assert [stem for stem, labels in stated.items() if labels] == ["mathematics"]
    text = pages["mathematics"]
    assert text.count("{prf:proposition}") == text.count("{prf:proof}") == len(stated["mathematics"]) - 1 >= 9
    used = {label for other in pages.values() for label in re.findall(r"\{prf:ref\}`([\w-]+)`", other)}
    assert used <= set(stated["mathematics"]) and len(used) >= 8


WORDS = """# The {word}s of a page

Two adapters, an *adapter* and a low-rank adapter; `rank`, [rank](other) and $rank$ are no prose. A rank is.

| rank |
|---|
| ridge |
"""


def test_a_chapter_leads_from_the_first_use_of_a_term_to_its_meaning(tmp_path: Path) -> None:
    (tmp_path / "book" / "parts").mkdir(parents=True)
    (tmp_path / "conf.py").write_text(
        "extensions = ['myst_parser', 'bookpages']\nmyst_enable_extensions = ['dollarmath']\n"
    )
    (tmp_path / "index.md").write_text("# Start\n\n```{toctree}\nbook/glossary\nbook/parts/one\nbook/other\n```\n")
    meanings = "\n\n".join(f"{word}\n  What {word} is." for word in ("adapter", "rank", "ridge"))
    (tmp_path / "book" / "glossary.md").write_text(f"# Glossary\n\nAn adapter.\n\n```{{glossary}}\n{meanings}\n```\n")
    (tmp_path / "book" / "parts" / "one.md").write_text(WORDS.replace("other", "../other").format(word="adapter"))
    (tmp_path / "book" / "other.md").write_text("# Other\n\nThe rank of an officer.\n")
    built = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(tmp_path), str(tmp_path / "html")]
    done = subprocess.run(built, capture_output=True, text=True, check=False, cwd=ROOT / "notebooks", env=PATHS)
    assert done.returncode == 0, done.stderr[-2000:]

    def linked(page: str) -> list[tuple[str, str, str]]:
        found = (tmp_path / "html" / "book" / f"{page}.html").read_text()
        return re.findall(r'<a class="term [^"]*" href="([^"]*)" title="([^"]*)">([^<]*)</a>', found)

    assert linked("parts/one") == [
        ("../glossary.html#term-adapter", "What adapter is.", "adapter"),
        ("../glossary.html#term-rank", "What rank is.", "rank"),
    ]
    assert re.search(r"Two <a [^>]*>adapter</a>s, an <em>", (tmp_path / "html/book/parts/one.html").read_text())
    assert not linked("glossary") and not linked("other")
