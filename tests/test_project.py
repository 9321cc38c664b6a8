"""The project's own files agree with one another, and name nothing of the machine they were written on."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chassis_utils import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXT = {".py", ".js", ".md", ".yml", ".yaml", ".toml", ".txt", ".ipynb", ".css", ".bib", ".json", ""}


def pinned() -> dict[str, str]:
    """Package -> version, of constraints.txt; any line that is not a plain pin fails."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        assert requirement.url is None
        assert [clause.operator for clause in requirement.specifier] == ["=="], requirement
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


def project_files() -> list[Path]:
    """What git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in found if path.is_file() and path.suffix in TEXT]


def test_every_dependency_is_pinned_at_a_version_it_allows() -> None:
    pins = pinned()
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{line} does not allow {version}"
    assert pins["torch"] == "2.13.0"


def test_the_version_is_told_in_one_voice() -> None:
    assert __version__ == PROJECT["version"]


def test_the_extras_are_the_documented_ones() -> None:
    assert set(EXTRAS) == {"book", "lab", "peft", "cluster", "test"}


def test_conda_environment_agrees() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    python = next(line.removeprefix("python=") for line in plain if line.startswith("python="))
    assert f">={python}," in PROJECT["requires-python"]
    assert python == f"{sys.version_info.major}.{sys.version_info.minor}"
    through_pip = next(line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    constraint, editable = (line.split(maxsplit=1)[1] for line in through_pip)
    assert (ROOT / constraint).is_file()
    installed = re.fullmatch(r"\.\[([\w,]+)\]", editable)
    assert installed and set(installed[1].split(",")) <= set(EXTRAS)
    assert f'-c {constraint} -e "{editable}"' in (ROOT / "Makefile").read_text(), "make installs something else"


def test_make_has_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("book", "test", "lab", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_make_refuses_another_python() -> None:
    answer = subprocess.run(
        ["make", "--always-make", "--no-print-directory", ".venv/.installed", "PYTHON=/bin/false"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode != 0
    assert answer.stderr.splitlines()[0].startswith("CHASSIS needs Python 3.11")


def test_the_ci_script_is_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("make --no-print-directory test")


def test_the_package_stays_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "chassis_utils").rglob("*.py"))
    assert lines <= 3500


def test_no_file_names_the_machine_it_was_written_on() -> None:
    # A letter in brackets, so that this file does not match itself.
    paths = r"(?<![\w.$}/])/(?:[w]ork|[t]mp|[o]pt|[h]ome)/|\.\./[s]hared"
    hosts = r"file:///(?:[w]ork|[o]pt)|(?:[i]ndex|[f]ind)[-_](?:url|links)|//[^/\s]*(?:[p]ypi|[p]ythonhosted)"
    found = re.compile(f"{paths}|{hosts}")
    for path in project_files():
        hit = found.search(path.read_text(encoding="utf-8"))
        assert not hit, f"{path.relative_to(ROOT)}: {hit[0]}"


def test_committed_notebooks_have_no_outputs() -> None:
    notebooks = [path for path in project_files() if path.suffix == ".ipynb"]
    stripped = subprocess.run(
        [sys.executable, "-m", "nbstripout", "--verify", *map(str, notebooks)], capture_output=True, text=True
    )
    assert not notebooks or stripped.returncode == 0, stripped.stdout


def test_code_and_notebooks_pass_the_linter() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
