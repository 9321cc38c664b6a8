"""Profiles and runs on toy notebooks, with the real papermill, kernels and Jupyter Book."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import batch
from batch import build_book, load_profile, run
from chassis_utils.errors import ChassisError
from locks import locked
from records import read_records

WRITES = """
from records import Records
records = Records(out_dir, experiment="port", notebook="{stem}", seed=seed)
records.add(metric="kl", value=0.5, method="ridge")
records.save()
"""
LOOKS = """
import json, os, sys
seen = {"executable": sys.executable, "cwd": os.getcwd(), "headless": os.environ.get("CHASSIS_HEADLESS"),
        "ranks": ranks, "seed": seed, "connection": __import__("ipykernel").get_connection_file()}
open(os.path.join(out_dir, "seen.json"), "w").write(json.dumps(seen))
"""
PARAMETERS = "seed = 0\nout_dir = '../book/run/toy'"


def write(folder: Path, stem: str, parameters: str, *cells: str) -> None:
    """A toy notebook with a tagged parameters cell."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell(f"# {stem}"), first, *map(new_code_cell, cells)])
    # The name of a kernel of another interpreter, which must not be what runs.
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / f"{stem}.ipynb")


def project(root: Path) -> Path:
    """A toy project: four notebooks, of which two fail unless `seed` is 0."""
    notebooks = root / "notebooks"
    notebooks.mkdir(parents=True)
    write(notebooks, "1_look", PARAMETERS + "\nranks = [1, 2]\ndevice = 'cpu'", LOOKS)
    write(notebooks, "2_fail", PARAMETERS, WRITES.format(stem="2_fail"), "1 / (1 - seed)")
    write(notebooks, "3_stop", PARAMETERS, "if seed == 1: raise SystemExit(0)")
    write(notebooks, "4_write", PARAMETERS, WRITES.format(stem="4_write"))
    toy = {
        "description": "toy",
        "defaults": {"base": "pocket-base", "seed": 0, "ranks": [3], "device": "cpu"},
        "notebooks": {"1_look": {"ranks": [5, 6]}, "2_fail": None, "3_stop": {}, "4_write": {}},
    }
    (notebooks / "profiles.yml").write_text(yaml.safe_dump({"toy": toy, "other": toy}, sort_keys=False))
    return root


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A toy project that is also the working folder."""
    root = project(tmp_path / "toy project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def foreign_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A `python3` kernel of another interpreter, installed where Jupyter looks first."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/nonexistent/python", "-m", "ipykernel_launcher"], "display_name": "Wrong", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


@pytest.mark.usefixtures("foreign_kernel")
def test_a_run_publishes_what_ended_and_nothing_that_failed(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = inside / "book" / "run" / "toy"
    assert run([], "toy") == [out / f"{stem}.ipynb" for stem in ("1_look", "2_fail", "3_stop", "4_write")]
    seen = json.loads((out / "seen.json").read_text())
    assert os.path.samefile(seen["executable"], sys.executable) and seen["executable"] == sys.executable
    assert Path(seen["cwd"]) == inside / "notebooks"
    assert (seen["headless"], seen["ranks"], seen["seed"]) == ("1", [5, 6], 0)
    assert not Path(seen["connection"]).parent.exists(), "the sockets of the kernel were left behind"
    page = nbformat.read(out / "1_look.ipynb", as_version=4)
    assert str(inside) not in "".join(cell.source for cell in page.cells)
    assert set(read_records(out)["notebook"]) == {"2_fail", "4_write"}
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["1_look: done", "2_fail: done", "3_stop: done", "4_write: done"]

    with pytest.raises(ChassisError) as caught:
        run(["4_write", "3_stop", "2_fail.ipynb"], "toy", {"seed": 1}, progress=False, jobs=2)
    message = str(caught.value)
    assert "2_fail (ZeroDivisionError: division by zero)" in message and "3_stop (SystemExit: 0)" in message
    assert "4_write" not in message and "\n" not in message
    assert sorted(p.name for p in out.glob("*.ipynb")) == ["1_look.ipynb", "4_write.ipynb"]
    assert sorted(p.name for p in (out / "failed").iterdir()) == ["2_fail.ipynb", "3_stop.ipynb"]
    assert not list(out.glob(".*partial*"))
    assert read_records(out)[["notebook", "seed"]].values.tolist() == [["4_write", 1]]

    assert run(["2_fail"], "toy") == [out / "2_fail.ipynb"]
    assert [p.name for p in (out / "failed").iterdir()] == ["3_stop.ipynb"]
    assert "done" in capfd.readouterr().out


def test_a_page_that_reads_records_waits_for_the_pages_before_it(inside: Path) -> None:
    reads = "from records import read_records; assert {*read_records(out_dir)['notebook']} == {'2_fail'}"
    write(inside / "notebooks", "3_stop", PARAMETERS, reads)
    assert len(run(["1_look", "2_fail", "3_stop"], "toy", progress=False, jobs=3)) == 3


def test_with_several_jobs_a_page_that_reads_records_comes_last_and_is_told_of_in_its_place(inside: Path) -> None:
    """Alone, pages come in order, and it reads what is there already."""
    fails = "from records import read_records; raise ValueError(sorted({*read_records(out_dir)['notebook']}))"
    write(inside / "notebooks", "1_look", PARAMETERS + "\nranks = [1]\ndevice = 'cpu'", fails)
    write(inside / "notebooks", "3_stop", PARAMETERS, "1 / 0")
    told = r"failed, see .*: 1_look \(ValueError: \['2_fail', '4_write'\]\); 3_stop \(ZeroDivisionError.*"
    with pytest.raises(ChassisError, match=told):
        run([], "toy", progress=False, jobs=2)
    with pytest.raises(ChassisError, match=r"1_look \((?!ValueError: \['2_fail)"):
        run([], "toy", out_dir=inside / "elsewhere", progress=False)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_cannot_be_published_ends_the_run_at_once(inside: Path, jobs: int) -> None:
    write(inside / "notebooks", "3_stop", PARAMETERS, "import time; time.sleep(300)")
    out = inside / "book" / "run" / "toy"
    (out / "1_look.ipynb").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        run(["1_look", "3_stop", "4_write"], "toy", progress=False, jobs=jobs)
    assert not [path for path in out.rglob("*.ipynb") if path.is_file()] and not (out / "results.jsonl").exists()


def test_a_model_in_a_folder_is_found_from_where_the_command_is_called(inside: Path) -> None:
    for folder in (inside / "mine", inside.parent / "theirs"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (inside / "pocket-phi").mkdir()  # no model
    says = "from pathlib import Path; Path(out_dir, 'base.txt').write_text(base)"
    write(inside / "notebooks", "4_write", PARAMETERS + "\nbase = 'pocket-base'", says)
    told = {"mine": "../mine", "../theirs": str(inside.parent / "theirs"), "pocket-phi": "pocket-phi"}
    for given, seen in told.items():
        run(["4_write"], "toy", {"base": given}, progress=False)
        assert (inside / "book" / "run" / "toy" / "base.txt").read_text() == seen


def test_another_folder_is_given_as_an_absolute_path(tmp_path: Path) -> None:
    assert run(["1_look"], "toy", {"ranks": [7]}, out_dir=tmp_path / "else where", progress=False)
    assert json.loads((tmp_path / "else where" / "seen.json").read_text())["ranks"] == [7]


def test_a_kernel_that_dies_is_a_failed_notebook(inside: Path) -> None:
    write(inside / "notebooks", "3_stop", PARAMETERS, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ChassisError, match=r"3_stop \(.*[Kk]ernel died"):
        run(["3_stop"], "toy", progress=False)
    assert not (inside / "book/run/toy/3_stop.ipynb").exists()


@pytest.mark.parametrize(
    ("notebooks", "profile", "settings", "message"),
    [
        (["5_gone"], "toy", {}, "unknown notebook 5_gone: choose from 1_look, 2_fail, 3_stop, 4_write"),
        ([], "tyo", {}, "unknown profile 'tyo': profiles.yml has toy, other"),
        ([], "toy", {"rank": [1]}, "unknown parameter 'rank': did you mean 'ranks'"),
        ([], "toy", {"zzzzzz": 1}, "unknown parameter 'zzzzzz': choose from base, expert"),
        ([], "toy", {"out_dir": "x"}, "unknown parameter 'out_dir': choose from base, .* .or --out."),
        (["2_fail"], "toy", {"ranks": [1]}, "none of the chosen notebooks takes ranks"),
        ([], "toy", {"seed": "one"}, "seed='one' does not fit 1_look: give something like 0"),
        ([], "toy", {"seed": True}, "seed=True does not fit"),
        ([], "toy", {"seed": None}, "seed=None does not fit"),
        ([], "toy", {"ranks": 4}, r"ranks=4 does not fit 1_look: give something like \[1, 2\]"),
        ([], "toy", {"ranks": [4, "8"]}, "ranks=.* does not fit"),
        ([], "toy", {"ranks": []}, "ranks=.* does not fit"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    inside: Path, notebooks: list[str], profile: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ChassisError, match=message) as caught:
        run(notebooks, profile, settings)
    assert "\n" not in str(caught.value)
    assert not (inside / "book").exists()


def test_notebooks_that_break_the_rules_are_refused(inside: Path) -> None:
    write(inside / "notebooks", "1_look", "rank = 4", "rank")
    with pytest.raises(ChassisError, match="1_look.ipynb declares 'rank': notebooks share only base, expert"):
        run(["1_look"], "toy")
    write(inside / "notebooks", "1_look", "seed = 0", "seed")
    with pytest.raises(ChassisError, match="profile 'toy' gives 1_look ranks, which it does not declare"):
        run(["1_look"], "toy")
    (inside / "notebooks" / "1_look.ipynb").write_text("{}")
    with pytest.raises(ChassisError, match="1_look.ipynb is no notebook that can be run"):
        run(["1_look"], "toy")
    (inside / "notebooks" / "1_look.ipynb").unlink()
    with pytest.raises(ChassisError, match="1_look.ipynb is no notebook that can be run"):
        run([], "toy")
    assert not (inside / "book").exists()


def test_an_output_folder_that_cannot_be_written_is_refused(inside: Path) -> None:
    (inside / "file").write_text("")
    for place in (inside / "file", inside / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(ChassisError, match="cannot write to .*: choose another folder"):
            run([], "toy", out_dir=place)


def test_two_runs_do_not_share_a_folder(inside: Path) -> None:
    out = inside / "book" / "run" / "toy"
    out.mkdir(parents=True)
    with locked(out / ".run.lock"), pytest.raises(ChassisError, match="another run is writing to .*toy"):
        run(["4_write"], "toy")
    assert not (out / "4_write.ipynb").exists()
    assert run(["4_write"], "toy", progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toy: [", "cannot read profiles from"),
        ("yot: {}", "unknown profile 'toy': profiles.yml has yot"),
        ("toy: {defaults: {}, notebooks: {}}", "must hold a description, defaults and notebooks"),
        ("toy: {description: x, defaults: {sede: 1}, notebooks: {}}", "unknown parameter 'sede': did you mean 'seed'"),
        ("toy: {description: x, defaults: {}, notebooks: {a: {layer: 1}}}", "unknown parameter 'layer'"),
    ],
)
def test_a_wrong_profiles_file_is_refused(inside: Path, text: str, message: str) -> None:
    (inside / "notebooks" / "profiles.yml").write_text(text)
    with pytest.raises(ChassisError, match=message) as caught:
        load_profile("toy")
    assert "\n" not in str(caught.value)


def test_the_project_is_found_from_inside_and_from_elsewhere(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inside / "book" / "deep").mkdir(parents=True)
    monkeypatch.chdir(inside / "book" / "deep")
    assert load_profile("toy").root == inside
    monkeypatch.chdir(tmp_path)
    own = load_profile("pocket")
    assert own.root == Path(batch.__file__).resolve().parents[1]
    assert own.run_dir == own.root / "book" / "run" / "pocket"


def test_the_profiles_of_the_project_agree_with_each_other() -> None:
    path = Path(batch.__file__).resolve().parents[1] / "notebooks" / "profiles.yml"
    pocket, tinyllama = load_profile("pocket", path), load_profile("tinyllama", path)
    assert list(pocket.notebooks) == list(tinyllama.notebooks)
    assert list(pocket.notebooks)[-1] == "00_at_a_glance"
    assert pocket.defaults.keys() == tinyllama.defaults.keys()


def test_a_book_is_built_only_from_executed_notebooks(inside: Path) -> None:
    toc = {
        "format": "jb-book",
        "root": "index",
        "chapters": [{"file": f"book/run/pocket/{s}"} for s in ("1_look", "3_stop")] + [{"file": "book/second"}],
    }
    with pytest.raises(ChassisError, match="no table of contents"):
        build_book("other")
    (inside / "_toc.yml").write_text(yaml.safe_dump(toc))
    (inside / "_config.yml").write_text(
        "title: Toy\nonly_build_toc_files: true\nexecute: {execute_notebooks: 'off'}\n"
        f"sphinx: {{local_extensions: {{bookpages: {Path(batch.__file__).resolve().parents[1] / 'notebooks'}}}}}\n"
    )
    # A link to the run of the profile that is not built would be a warning, and fail the build.
    (inside / "index.md").write_text("# Toy\n\n[A page](book/run/pocket/1_look), [another](book/second)\n")
    (inside / "book").mkdir(exist_ok=True)
    (inside / "book" / "second.md").write_text("# Second\n\n[A page](run/pocket/1_look)\n")
    with pytest.raises(
        ChassisError,
        match=r"not executed: 1_look \(nothing was written\), 3_stop .*; run `chassis run --profile other`",
    ):
        build_book("other")
    run(["1_look", "3_stop"], "other", progress=False)
    page = build_book("other")
    assert page.is_file() and (page.parent / "book/run/other/1_look.html").is_file()
    assert 'href="book/run/other/1_look.html' in page.read_text()
    assert 'href="run/other/1_look.html' in (page.parent / "book" / "second.html").read_text()
    (inside / "index.md").write_text("# Toy\n\n[nowhere](nowhere.md)\n")
    with pytest.raises(ChassisError, match="the book did not build"):
        build_book("other")
    failed = inside / "book/run/other/3_stop.ipynb"
    notebook = json.loads(failed.read_text())
    notebook["metadata"]["papermill"]["exception"] = True
    failed.write_text(json.dumps(notebook))
    with pytest.raises(ChassisError, match=r"not executed: 3_stop \("):
        build_book("other")


def test_a_run_goes_on_from_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pages stay until their source, parameters, code, records or page change; one that reads records, until any do."""
    root = project(tmp_path / "toy")
    notebooks, out = root / "notebooks", root / "book" / "run" / "toy"
    write(notebooks, "3_stop", PARAMETERS, "from records import read_records; len(read_records(out_dir))")
    profile = load_profile("toy", notebooks / "profiles.yml")

    def again(**settings: object) -> list[str]:
        batch._code.cache_clear()
        capsys.readouterr()
        run([], profile, settings, missing=True)
        return [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if ": done" in line]

    def changed(path: Path, text: str) -> None:
        path.write_text(text)

    every = ["1_look", "2_fail", "3_stop", "4_write"]
    assert again() == every
    assert again() == ["3_stop"], "4_write came after it, and its records are new"
    assert again() == []
    assert again(seed=3) == every
    assert again(seed=3) == ["3_stop"] and again(seed=3) == []
    (out / "1_look.ipynb").unlink()  # as of a run that was killed
    assert again(seed=3) == ["1_look"]
    rows = (out / "results.jsonl").read_text().splitlines()
    changed(out / "results.jsonl", "\n".join(row for row in rows if '"4_write"' not in row) + "\n")
    assert again(seed=3) == ["3_stop", "4_write"]
    assert again(seed=3) == ["3_stop"]
    changed(notebooks / "helper.py", "a = 1")
    assert again(seed=3) == every
