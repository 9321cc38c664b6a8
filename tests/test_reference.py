"""The reference: every public name has an entry and an example, and every example prints what its page shows."""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chassis_utils

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book" / "api").glob("*.md"))
#: One process for all: each would take longer to start than its examples run.
RUNNER = """
import json, os, sys
import torch
torch.set_num_threads(1)
mark, pages = json.load(sys.stdin)
for stem, codes in pages.items():
    os.mkdir(stem)
    os.chdir(stem)
    print(f"{mark}page {stem}")
    names = {"__name__": "__main__"}
    for code in codes:
        print(mark)
        exec(code, names)
    os.chdir("..")
"""
ENTRY = re.compile(r"^\.\. auto(?:function|class|exception):: chassis_utils\.(\S+)", re.M)


def blocks(page: Path) -> list[tuple[str, str | None]]:
    """Each example of a page, and what it shows of its output, if anything."""
    found = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", page.read_text(encoding="utf-8"), re.S | re.M
    )
    return [(code, shown or None) for code, shown in found]


def test_every_public_name_has_one_entry_and_an_example_on_the_same_page() -> None:
    entries = {page: ENTRY.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    everywhere = [name for names in entries.values() for name in names]
    assert sorted(name for name in everywhere if "." not in name) == chassis_utils.__all__
    assert len({*everywhere}) == len(everywhere)
    for page, names in entries.items():
        text = page.read_text(encoding="utf-8")
        assert {*re.findall(r"^## (\w+)$", text, re.M)} >= {name for name in names if "." not in name}, page
        used = {node.id for code, _ in blocks(page) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        assert used >= {name for name in names if "." not in name}, f"{page.name} has no example of a name"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What every example printed, page by page: each page with names of its own, in a folder of its own."""
    mark, told = "\x00block\x00", {}
    pages = {page.stem: [code for code, _ in blocks(page)] for page in PAGES}
    folder = tmp_path_factory.mktemp("examples")
    done = subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps([mark, pages]), cwd=folder,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for told_of_page in done.stdout.split(f"{mark}page ")[1:]:
        stem, *outputs = told_of_page.split(f"{mark}\n")
        told[stem.strip()] = outputs
    return told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_print_what_their_page_shows(page: Path, printed: dict[str, list[str]]) -> None:
    shown = [shown or "" for _, shown in blocks(page)]
    assert printed[page.stem] == shown


def test_pages_are_built_without_a_warning_and_name_no_type_that_leads_nowhere(tmp_path: Path) -> None:
    files = ("_config.yml", "book/references.bib", "book/sources.md", "notebooks/bookpages.py", "notebooks/stills.py")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "book" / "assets", tmp_path / "book" / "assets")
    shutil.copytree(ROOT / "book" / "api", tmp_path / "book" / "api")
    (tmp_path / "book" / "v2.md").write_text("# The mathematics of v2\n")
    chapters = ["book/v2", "book/sources", *(f"book/api/{page.stem}" for page in PAGES if page.stem != "index")]
    lines = ["format: jb-book", "root: book/api/index", "chapters:", *(f"  - file: {one}" for one in chapters)]
    (tmp_path / "_toc.yml").write_text("\n".join(lines) + "\n")
    build = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(tmp_path)]
    done = subprocess.run([*build, "-W", "-n", "--keep-going"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for page in PAGES:
        told = (tmp_path / "_build" / "html" / "book" / "api" / f"{page.stem}.html").read_text(encoding="utf-8")
        for name in ENTRY.findall(page.read_text(encoding="utf-8")):
            assert f'id="chassis_utils.{name}"' in told, name
        # What Sphinx could not read it shows raw.
        text = html.unescape(re.sub(r"<[^>]+>", "", told))
        assert "~chassis_utils" not in text and "<factory>" not in text
    port = (tmp_path / "_build" / "html" / "book" / "api" / "port.html").read_text(encoding="utf-8")
    assert 'href="adapters.html#chassis_utils.Adapter"' in port, "a class named in a signature is linked"
    bridges = (tmp_path / "_build" / "html" / "book" / "api" / "bridges.html").read_text(encoding="utf-8")
    assert 'href="../sources.html#' in bridges, "a source named in a docstring is linked"
