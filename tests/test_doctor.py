"""`chassis doctor` in environments that are broken for real: every fault has its line, and costs no other check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make
from test_batch import project

from locks import locked

ROOT = Path(__file__).resolve().parents[1]
WHAT = ("python", "packages", "package", "kernel", "lab", "models", "gpu", "memory", "disk", "locks", "browser")


def doctor(where: Path, profile: str = "toy", **env: str) -> tuple[int, list[str], str]:
    """Exit code, lines, and what went to stderr."""
    path = os.pathsep.join(filter(None, (env.pop("before", ""), str(ROOT))))
    command = [sys.executable, "-m", "chassis_utils.cli", "doctor", "--profile", profile]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


def toy(root: Path, **blocks: dict) -> Path:
    """A toy project whose profiles differ from its own in their defaults."""
    path = project(root) / "notebooks" / "profiles.yml"
    own = yaml.safe_load(path.read_text())["toy"]
    told = {name: own | {"defaults": own["defaults"] | changes} for name, changes in blocks.items()}
    path.write_text(yaml.safe_dump({"toy": own} | told, sort_keys=False))
    return root


def installed(folder: Path, name: str, version: str, *requires: str) -> None:
    """What an installer leaves of a package, where Python looks before it looks into the environment."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))


def cached(hub: Path, name: str, model: Path, *without: str) -> None:
    """A model as a download leaves it in the hub's cache."""
    folder, commit = hub / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(model, folder / "snapshots" / commit, ignore=shutil.ignore_patterns(*without))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def only(lines: list[str], state: str, *words: str) -> str:
    """The one line of this state that holds all these words."""
    (found,) = [line for line in lines if line.startswith(state) and all(word in line for word in words)]
    return found


def test_where_all_is_well_each_part_has_its_line_and_nothing_is_left(tmp_path: Path) -> None:
    root = toy(tmp_path / "project")
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    code, lines, errors = doctor(root)
    assert (code, errors) == (0, ""), "\n".join(lines)
    assert lines[-1] == "everything that profile 'toy' needs works"
    assert all(re.match(r"(works |note  ) [a-z]+ +\S", line) for line in lines[:-1])
    assert {line.split()[1] for line in lines[:-1]} == {*WHAT}
    pockets = only(lines, "works", "bundled, loaded and asked")
    assert all(name in pockets for name in ("pocket-base", "pocket-math", "pocket-shakespeare", "pocket-phi"))
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before


def test_faults_that_no_page_needs_are_noted_and_fail_nothing(tmp_path: Path) -> None:
    root, site, jupyter = toy(tmp_path / "project"), tmp_path / "site", tmp_path / "jupyter"
    installed(site, "pandas", "3.0.9")  # any version is allowed, another one was tested with
    installed(site, "hypothesis", "6.1", "surely-missing>=2")
    spec = jupyter / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/nonexistent/python", "{connection_file}"], "display_name": "x", "language": "python"}')
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "chromium").write_text("#!/bin/sh\necho 'error: libnss3.so is missing' >&2\nexit 127\n")
    (programs / "chromium").chmod(0o755)
    killed = subprocess.Popen(["true"])
    killed.wait()
    left = root / "book" / "run" / "toy" / f".results.jsonl.{killed.pid}.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    mine = left.with_name(f".results.csv.{os.getpid()}.tmp")  # of a process that is alive
    mine.write_text("half")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    code, lines, errors = doctor(root, before=str(site), JUPYTER_PATH=str(jupyter), PATH=path)
    assert (code, errors) == (0, ""), "\n".join(lines)
    told = only(lines, "note", "pandas 3.0.9")
    assert re.search(r"pandas 3\.0\.9 \(3\.1\.1\)", told) and "pip install" in told
    assert "'.[test]'" in only(lines, "note", "surely-missing is missing for hypothesis")
    assert "jupyter kernelspec list" in only(lines, "note", "lab", "/nonexistent/python")
    assert only(lines, "works", "kernel"), "a run does not look a kernel up by its name"
    assert "libnss3.so is missing" in only(lines, "note", "browser")
    assert str(left) in only(lines, "note", "locks") and str(mine) not in only(lines, "note", "locks")


def test_every_fault_fails_with_its_advice_and_the_rest_is_still_examined(tmp_path: Path) -> None:
    gone, torn, small = tmp_path / "gone", make(tmp_path / "torn"), make(tmp_path / "small")
    (torn / "model.safetensors").unlink()
    hub, site = tmp_path / "hub", tmp_path / "site"
    cached(hub, "somebody/whole", small)
    cached(hub, "somebody/half", small, "*.safetensors")
    given = {"1_look": str(gone), "2_fail": str(torn), "3_stop": "no/where", "4_write": "somebody/half"}
    root = toy(tmp_path / "project", broken={"base": "somebody/whole", "device": "cuda:77"})
    profiles = root / "notebooks" / "profiles.yml"
    told = yaml.safe_load(profiles.read_text())
    told["broken"]["notebooks"] = {stem: {"expert": name} for stem, name in given.items()}
    profiles.write_text(yaml.safe_dump(told))
    installed(site, "torch", "2.12.0+cu117")
    installed(site, "safetensors", "0.8.0", "surely-missing>=2")
    (root / "book").mkdir()
    (root / "book" / "run").symlink_to("/proc")  # where not even root writes
    env = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    code, lines, errors = doctor(root, "broken", before=str(site), **env)
    failed = [line for line in lines if line.startswith("fails")]
    assert code == 1 and errors.startswith(f"chassis: {len(failed)} of these keep profile 'broken' from running")
    assert errors.count("\n") == 1 and "everything" not in lines[-1]
    packages = only(lines, "fails", "packages")
    assert "torch 2.12.0+cu117, not >=2.13" in packages and "surely-missing is missing for safetensors" in packages
    assert "pip install" in packages
    assert "profiles.yml" in only(lines, "fails", "models", f"no model or folder '{gone}'")
    assert "get the whole folder" in only(lines, "fails", "models", f"{torn} lacks its weights")
    assert "hf download no/where" in only(lines, "fails", "models", f"no/where is not in {hub}", "HF_HUB_OFFLINE")
    assert "hf download somebody/half" in only(lines, "fails", "models", "lacks its weights", "models--somebody--half")
    whole = sum(one.numel() for one in _parameters(small))
    assert only(lines, "works", "models", f"somebody/whole, {whole:,} numbers")
    if not torch.cuda.is_available():
        assert "device: cpu" in only(lines, "fails", "gpu", "cuda:77")
    assert "--out" in only(lines, "fails", "disk", "runs cannot be written")
    assert {line.split()[1] for line in lines} >= {*WHAT}


def _parameters(folder: Path) -> list[torch.nn.Parameter]:
    from transformers import AutoModelForCausalLM

    return [*AutoModelForCausalLM.from_pretrained(folder).parameters()]


def test_a_run_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    root = toy(tmp_path / "project")
    with locked(root / "book" / "run" / "toy" / ".run.lock"):
        code, lines, _ = doctor(root)
    assert code == 1 and "wait for its end" in only(lines, "fails", "locks", "a run is writing to")
    assert [line.split()[1] for line in lines if line.startswith("fails")] == ["locks"]


@pytest.mark.parametrize("broken", ["papermill", "yaml"])
def test_a_library_that_cannot_be_imported_is_named_and_python_still_examined(tmp_path: Path, broken: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / f"{broken}.py").write_text("raise ImportError('libsomething.so: cannot open shared object file')\n")
    code, lines, errors = doctor(toy(tmp_path / "project"), before=str(site))
    assert code == 1 and "Traceback" not in errors
    assert "libsomething.so" in only(lines, "fails", "profile") and only(lines, "works", "python")


def test_notebooks_of_one_clone_and_the_package_of_another_do_not_go_together(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "notebooks", clone / "notebooks", ignore=shutil.ignore_patterns("*.ipynb", "__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    (clone / "book" / "run").mkdir(parents=True)
    code, lines, _ = doctor(clone, "pocket")
    assert code == 1
    told = only(lines, "fails", "package ")
    assert str(ROOT) in told and str(clone) in told and "pip install" in told and told.endswith("in this clone")


def test_a_profile_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    code, lines, errors = doctor(toy(tmp_path / "project"), "nope")
    assert (code, lines) == (1, []) and errors == "chassis: unknown profile 'nope': profiles.yml has toy\n"
