"""Guides say what the code says: messages, predictions, commands, recipes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ahead  # noqa: E402

from batch import PARAMETERS  # noqa: E402
from command import parser  # noqa: E402

BOOK = ROOT / "book"


def sources() -> list[Path]:
    return [*(ROOT / "chassis_utils").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]


def literals(path: Path) -> list[str]:
    """Every string of a module; of one with values in it, the parts between these."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


MESSAGES = re.findall(r"^`+ ?(.+?) ?`+\n: ", (BOOK / "troubleshooting.md").read_text(encoding="utf-8"), re.M)


def test_messages_are_many_and_each_is_told_once() -> None:
    assert len(MESSAGES) > 30 and len({*MESSAGES}) == len(MESSAGES)


def told(part: str, strings: list[str]) -> bool:
    """Whether a part of a message stands in one string, or where one ends and another begins."""
    if any(part in one for one in strings):
        return True
    cuts = ((part[:i], part[i:]) for i in range(1, len(part)))
    return any(any(x.endswith(a) for x in strings) and any(x.startswith(b) for x in strings) for a, b in cuts)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_on_the_page_is_one_of_the_code(message: str) -> None:
    parts = [part.strip() for part in message.split("…") if len(part.strip()) > 2]
    assert parts, "nothing but gaps"
    files = [*map(literals, sources()), [(ROOT / "Makefile").read_text(encoding="utf-8")]]
    assert any(all(told(part, strings) for part in parts) for strings in files), f"no file has all of {parts}"


def test_predictions_are_those_of_the_model_of_cost() -> None:
    assert (BOOK / "ahead.md").read_text(encoding="utf-8") == ahead.told(), "run benchmarks/ahead.py again"


def test_commands_of_guides_are_understood_and_name_what_there_is() -> None:
    profiles = yaml.safe_load((ROOT / "notebooks" / "profiles.yml").read_text(encoding="utf-8"))
    seen = 0
    for page in (BOOK / "own_gpu.md", BOOK / "architecture.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for line in re.findall(r"^ *(?:\.venv/bin/)?chassis ([^#\n]*)", page.read_text(encoding="utf-8"), re.M):
            words = re.findall(r'"([^"]*)"|(\S+)', line)
            options = parser().parse_args([quoted or plain for quoted, plain in words])
            seen += 1
            assert getattr(options, "profile", "pocket") in profiles
            for stem in getattr(options, "notebooks", ()):
                assert (ROOT / "notebooks" / f"{stem}.ipynb").is_file() or stem == "24_name", stem
            assert {key for key, _ in getattr(options, "settings", ())} <= {*PARAMETERS}
    assert seen > 10


def test_models_to_fetch_are_those_of_the_profile() -> None:
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles.yml").read_text(encoding="utf-8"))["tinyllama"]
    given = [profile["defaults"], *profile["notebooks"].values()]
    named = {value for one in given for key in ("base", "expert") if "/" in (value := str(one.get(key, "")))}
    assert {*re.findall(r"hf download (\S+)", (BOOK / "own_gpu.md").read_text(encoding="utf-8"))} == named


def test_recipes_run_as_written(tmp_path: Path) -> None:
    page = (BOOK / "architecture.md").read_text(encoding="utf-8")
    recipes = page[page.index("## To add something") : page.index("## Conventions")]
    blocks = re.findall(r"^```python\n(.*?)^```", recipes, re.S | re.M)
    assert len(blocks) == 3  # the fourth is a notebook
    code = "\n".join(["import torch", "torch.set_num_threads(1)", *blocks])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
