"""Grids on toy notebooks, with the real papermill, kernels, Dask workers and schedulers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import PARAMETERS, write
from test_book_pages import CHROMIUM, QUIET, needs_browser
from test_cli import COMMAND, PACKAGE

import cells
import engines
import grid
from chassis_utils.errors import ChassisError
from engines import InProcess
from gridpage import page
from locks import locked

#: Writes a line that says that it ran, then waits until its seed may end, then records a figure.
COUNTS = """
import os, time
with open("../ran.txt", "a") as file:
    file.write(f"{seed} {os.getpid()}\\n")
while seed == 1 and os.path.exists("../hold"):
    time.sleep(0.05)
"""
WRITES = """
from records import Records
records = Records(out_dir, experiment="port", notebook="1_count", seed=seed)
for rank in ranks:
    records.add(metric="kl", value=1 / (1 + seed + rank), method="ridge", rank=rank, split="test")
records.save()
"""
FLAKY = """
import os
with open(f"../tries-{seed}", "a") as file:
    print("try", file=file)
if os.path.getsize(f"../tries-{seed}") <= 4:
    raise OSError("the disk was away")
"""
PLAIN = {"profile": "toy", "notebooks": ["1_count"], "parameters": {"seed": [0, 1, 2], "ranks": [[1, 2]]}}
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), str(PACKAGE / "notebooks")])}


def project(root: Path) -> Path:
    """A toy project of three notebooks; the second fails at its first try, the third always where the seed is 1."""
    notebooks = root / "notebooks"
    notebooks.mkdir(parents=True)
    write(notebooks, "1_count", PARAMETERS + "\nranks = [1]", COUNTS, WRITES)
    write(notebooks, "2_flaky", PARAMETERS, FLAKY)
    write(notebooks, "3_fail", PARAMETERS, "1 / (1 - seed)")
    toy = {"description": "toy", "defaults": {"seed": 0}}
    toy["notebooks"] = dict.fromkeys(["1_count", "2_flaky", "3_fail"])
    (notebooks / "profiles.yml").write_text(yaml.safe_dump({"toy": toy, "other": toy}, sort_keys=False))
    (root / "plain.yml").write_text(yaml.safe_dump(PLAIN))
    return root


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A toy project that is also the working folder."""
    root = project(tmp_path / "toy project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The plain grid, run in this process, one cell after another, without a stop."""
    root = project(tmp_path_factory.mktemp("plain") / "toy project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        html = grid.run("plain.yml")
    return SimpleNamespace(root=root, page=html, out=html.parent)


def ran(root: Path) -> list[str]:
    """Seeds of the toy notebook, in the order its executions began."""
    path = root / "ran.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def tables(out: Path) -> list[pd.DataFrame]:
    """The two tables of a grid, without what times, revisions and stops may change."""
    gone = {"grid.csv": ["time", "git"], "cells.csv": ["seconds", "tries", "causes"]}
    return [pd.read_csv(out / name).drop(columns=columns) for name, columns in gone.items()]


def equal(a: Path, b: Path) -> None:
    for one, other in zip(tables(a), tables(b), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def start(root: Path, *arguments: str, program: list[str] | None = None, **env: str) -> subprocess.Popen[str]:
    """A command in a session of its own, which hears Ctrl-C whatever shell has started the tests."""
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    command = [*(program or [*COMMAND, "grid"]), *arguments]
    return subprocess.Popen(command, cwd=root, env=ENV | env, preexec_fn=hear, **options)


def until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """Wait until a condition holds, while a process lives."""
    limit = time.monotonic() + 180
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)
    return found


def test_all_records_are_one_table_with_their_parameters(plain: SimpleNamespace) -> None:
    table, cells = tables(plain.out)
    assert table["parameter_seed"].tolist() == [0, 0, 1, 1, 2, 2] == table["seed"].tolist()
    assert set(table["parameter_ranks"]) == {"[1, 2]"} and table["rank"].tolist() == [1, 2] * 3
    assert table["value"].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 3, 1 / 4, 1 / 4, 1 / 5])
    assert cells["state"].tolist() == ["done"] * 3 and cells["cell"].nunique() == 3
    assert sorted(path.name for path in plain.out.iterdir() if path.is_dir()) == sorted(cells["cell"])
    assert plain.out == plain.root / "book/run/toy/grid/plain"


def test_a_second_call_runs_what_is_missing_and_nothing_else(
    plain: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(plain.root)
    before, text = len(ran(plain.root)), (plain.out / "grid.csv").read_text()
    grid.run("plain.yml", workers=2)
    assert len(ran(plain.root)) == before and (plain.out / "grid.csv").read_text() == text
    assert capfd.readouterr().out == "3 cells, 3 of them finished before\n"
    # One more seed, and one cell whose records somebody has edited.
    broken = plain.out / tables(plain.out)[1]["cell"][0] / "results.jsonl"
    broken.write_text(broken.read_text().replace("0.5", "0.4"))
    more = PLAIN | {"parameters": {"seed": [0, 3], "ranks": [[1, 2]]}}
    (plain.root / "more").mkdir()
    whole = (plain.root / "plain.yml").read_text()
    (plain.root / "plain.yml").write_text(yaml.safe_dump(more))
    grid.run("plain.yml")
    assert ran(plain.root)[before:] == ["0", "3"]
    told = capfd.readouterr().out
    assert "1_count seed=0: its records are not those it wrote, it runs again" in told
    assert "[2/2] 1_count seed=3: done" in told
    (plain.root / "plain.yml").write_text(whole)
    grid.run("plain.yml")
    assert len(ran(plain.root)) == before + 2
    pd.testing.assert_frame_equal(pd.read_csv(plain.out / "grid.csv").drop(columns=["time"]),
                                  pd.read_csv(pd.io.common.StringIO(text)).drop(columns=["time"]))  # fmt: skip


def test_a_failed_cell_costs_only_itself(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    both = {"profile": "toy", "notebooks": ["2_flaky", "3_fail"], "parameters": {"seed": [1]}, "retries": 1}
    (inside / "g.yml").write_text(yaml.safe_dump(both))
    with refused("1 of 2 cells failed, see", "cells.csv: 3_fail (ZeroDivisionError: division by zero)"):
        grid.run("g.yml")
    told = capfd.readouterr().out
    assert "2_flaky: try 1 of 2 failed" in told and "OSError: the disk was away" in told and "2_flaky: done" in told
    assert told.count("\n") == 5, told
    cells = pd.read_csv(inside / "book/run/toy/grid/g/cells.csv").set_index("notebook")
    assert cells["state"].to_dict() == {"2_flaky": "done", "3_fail": "failed"} and set(cells["tries"]) == {2}
    assert cells["causes"]["2_flaky"] == "OSError: the disk was away"
    assert cells["causes"]["3_fail"].count("ZeroDivisionError") == 2
    failed = inside / "book/run/toy/grid/g" / cells["cell"]["3_fail"] / "failed" / "3_fail.ipynb"
    assert "ZeroDivisionError" in json.dumps(nbformat.read(failed, as_version=4))
    assert "ZeroDivisionError" in (inside / "book/run/toy/grid/g/grid.html").read_text()


def test_a_killed_command_goes_on_where_it_was(plain: SimpleNamespace, inside: Path) -> None:
    (inside / "hold").touch()
    process = start(inside, "plain.yml")
    until(lambda: ran(inside) == ["0", "1"], process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kernel = int((inside / "ran.txt").read_text().split()[-1])
    (inside / "hold").unlink()
    again = start(inside, "plain.yml")
    told, wrong = again.communicate(timeout=180)
    assert (again.returncode, wrong) == (0, "") and "3 cells, 1 of them finished before" in told
    assert not psutil.pid_exists(kernel), "the notebook of the killed command went on"
    assert ran(inside) == ["0", "1", "1", "2"]
    equal(plain.out, inside / "book/run/toy/grid/plain")


def test_a_killed_worker_costs_one_try(plain: SimpleNamespace, inside: Path) -> None:
    (inside / "hold").touch()
    process = start(inside, "plain.yml", "--workers", "2")
    kernel = int(until(lambda: [line for line in lines(inside) if line.startswith("1 ")], process)[0].split()[1])
    runner = psutil.Process(kernel).parent()
    assert any("execute.py" in word for word in runner.cmdline())
    runner.parent().kill()  # the worker that waits for the notebook
    until(lambda: not psutil.pid_exists(kernel), process)
    (inside / "hold").unlink()
    told, wrong = process.communicate(timeout=180)
    assert process.returncode == 0, wrong
    assert "dashboard: http://127.0.0.1:" in told and "[3/3]" in told
    assert sorted(ran(inside)) == ["0", "1", "1", "2"]
    equal(plain.out, inside / "book/run/toy/grid/plain")


def test_an_interrupt_ends_workers_and_notebooks_in_silence(inside: Path) -> None:
    (inside / "hold").touch()
    process = start(inside, "plain.yml", "--workers", "2")
    until(lambda: {"1", "2"} <= {*ran(inside)}, process)
    os.killpg(process.pid, signal.SIGINT)
    told, wrong = process.communicate(timeout=60)
    assert (process.returncode, wrong) == (130, "chassis: interrupted, what was finished is kept\n")
    assert "[1/3] 1_count seed=0: done" in told
    kernels = [int(line.split()[1]) for line in lines(inside)]
    until(lambda: not any(map(psutil.pid_exists, kernels)))
    until(lambda: not [*(inside / "book").rglob(".*partial*")])
    assert not [*(inside / "book").rglob("grid.csv")] and len([*(inside / "book").rglob("cell.json")]) in (1, 2)


def lines(root: Path) -> list[str]:
    return (root / "ran.txt").read_text().splitlines() if (root / "ran.txt").exists() else []


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A real scheduler on loopback, and a way to add workers to it."""
    folder, running = tmp_path_factory.mktemp("dask"), []
    dask = [sys.executable, "-m", "distributed.cli.dask_"]
    quiet = {"DASK_LOGGING__DISTRIBUTED": "critical"}

    def launch(kind: str, *words: str, **env: str) -> subprocess.Popen[str]:
        running.append(start(folder, *words, program=[*dask[:2], dask[2] + kind], **quiet | env))
        return running[-1]

    place = folder / "scheduler.json"
    launch("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0",
           "--scheduler-file", str(place))  # fmt: skip
    address = until(lambda: place.exists() and json.loads(place.read_text())["address"], running[0])

    def worker(name: str, **env: str) -> subprocess.Popen[str]:
        return launch("worker", address, "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard", "--name", name,
                      "--memory-limit", "3GiB", **env)  # fmt: skip

    yield SimpleNamespace(address=address, worker=worker, process=running[0], running=running)
    for process in reversed(running):
        process.kill()
        process.communicate()


def test_any_scheduler_carries_a_grid(
    scheduler: SimpleNamespace, plain: SimpleNamespace, inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Nobody is there yet: cells wait for the worker.
    late = threading.Timer(1, scheduler.worker, ["late"])
    late.start()
    grid.run("plain.yml", scheduler=scheduler.address)
    late.join()
    told = capfd.readouterr()
    assert f"chassis: no worker at {scheduler.address} yet" in told.err and "dashboard: http://127.0.0.1:" in told.out
    assert ran(inside) == ["0", "1", "2"]
    equal(plain.out, inside / "book/run/toy/grid/plain")


def test_a_worker_of_other_versions_is_refused_by_name(
    scheduler: SimpleNamespace, inside: Path, tmp_path: Path
) -> None:
    package, told = tmp_path / "older" / "chassis_utils", tmp_path / "older" / "torch-1.0.dist-info"
    for folder in (package, told):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.1"\n')
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    process = scheduler.worker("older", PYTHONPATH=str(tmp_path / "older"))
    from distributed import Client

    with Client(scheduler.address, set_as_default=False) as client:
        until(lambda: "older" in {w["name"] for w in client.scheduler_info(n_workers=-1)["workers"].values()}, process)
    with refused("workers unlike this machine: tcp://127.0.0.1:", "torch 1.0 instead of 2", "chassis_utils 0.0.1 ("):
        grid.run("plain.yml", scheduler=scheduler.address)
    process.kill()
    assert not ran(inside)


def test_a_grid_whose_workers_have_all_gone_says_so_and_goes_on_with_the_next(
    plain: SimpleNamespace, scheduler: SimpleNamespace, inside: Path
) -> None:
    scheduler.worker("first")
    (inside / "hold").touch()
    command = start(inside, "plain.yml", "--scheduler", scheduler.address)
    until(lambda: "1" in ran(inside), command)
    for process in scheduler.running[1:]:
        process.kill()
    wrong = iter(command.stderr.readline, "")
    assert f"chassis: no worker is left at {scheduler.address}: cells wait for one\n" in wrong
    scheduler.worker("second")
    assert f"chassis: a worker has come to {scheduler.address}\n" in wrong
    (inside / "hold").unlink()  # not before: what ends within a second is over before it is looked at
    assert command.wait(180) == 0
    equal(plain.out, inside / "book/run/toy/grid/plain")


def test_a_scheduler_that_is_lost_is_told_and_nothing_is_lost(plain: SimpleNamespace, scheduler: SimpleNamespace,
                                                              inside: Path) -> None:  # fmt: skip
    scheduler.worker("another")
    (inside / "hold").touch()
    command = start(inside, "plain.yml", "--scheduler", scheduler.address)
    until(lambda: "1" in ran(inside), command)
    scheduler.process.kill()
    _, wrong = command.communicate(timeout=180)
    assert command.returncode == 1
    assert wrong == "chassis: the scheduler was lost: start it again, what was finished is kept\n"
    (inside / "hold").unlink()
    grid.run("plain.yml")
    equal(plain.out, inside / "book/run/toy/grid/plain")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1", "foo://x:1", ""])
def test_a_scheduler_that_does_not_answer_is_told_in_seconds(inside: Path, address: str) -> None:
    clock = time.monotonic()
    with refused(f"no scheduler answers at {address} (", "start one there"):
        grid.run("plain.yml", scheduler=address)
    assert time.monotonic() - clock < 10 and not ran(inside)


def test_more_workers_than_cores_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    (tmp_path / "grid.json").touch()
    with engines.engine(engines.facts(tmp_path / "grid.json"), workers=2) as executor:
        limits = {executor.submit(engines.memory).result() for _ in range(2)}
    assert "chassis: more workers (2) than cores (1): they share them" in capsys.readouterr().err
    assert all(0 < limit <= psutil.virtual_memory().total / 2 for limit in limits) and engines.memory() is None


class Scattered(Executor):
    """Ends what is submitted in another order, from another thread."""

    def __init__(self, seed: int) -> None:
        self._pool, self._seed = ThreadPoolExecutor(3), seed

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._seed = self._seed * 1103515245 % 2**31 + 12345

        def later(wait: float) -> Any:
            time.sleep(wait)
            return call(*args, **kwargs)

        return self._pool.submit(later, self._seed % 7 / 4000)


@settings(max_examples=40, deadline=None)
@given(fails=st.lists(st.integers(0, 4), max_size=8), retries=st.integers(0, 3), seed=st.integers(0, 99))
def test_outcomes_do_not_depend_on_who_runs_the_cells(fails: list[int], retries: int, seed: int) -> None:
    cells = [grid.Cell(Path("n.ipynb"), {}, Path(f"{i}"), f"{i}") for i in range(len(fails))]

    def outcomes(executor: Executor) -> dict[str, tuple[list[str], bool]]:
        def work(cell: tuple[Any, ...], causes: list[str]) -> tuple[float, str | None]:
            need = fails[int(cell[2].name)]
            if len(causes) < need and need % 2:
                raise ValueError(f"no {len(causes)}\nand more")
            return 0.0, f"no {len(causes)}" if len(causes) < need else None

        found = [*engines.outcomes(executor, work, cells, retries)]
        assert len(found) == len(cells)
        return {cell.label: (causes, ended) for cell, _, causes, ended in found}

    told = outcomes(InProcess())
    assert told == outcomes(Scattered(seed))
    for i, need in enumerate(fails):
        causes, ended = told[str(i)]
        assert ended == (need <= retries) and len(causes) == min(need, retries + 1)
        assert all(cause.endswith(f"no {k}") for k, cause in enumerate(causes))


def test_futures_that_are_cancelled_are_a_lost_scheduler() -> None:
    def lost(*_: Any) -> None:
        raise CancelledError

    with refused("the scheduler was lost"):
        [*engines.outcomes(InProcess(), lost, [grid.Cell(Path("n.ipynb"), {}, Path("0"), "0")], 1)]


def test_a_worker_that_comes_later_with_other_versions_runs_nothing(tmp_path: Path) -> None:
    told = iter([{"torch": "2.0"}, {"torch": "1.0"}])
    work = cells.work_on(lambda: next(told))
    with pytest.raises(RuntimeError, match=r"its worker has torch 1.0 instead of 2.0"):
        work((tmp_path / "n.ipynb", {}, tmp_path / "cell", "n"), [])
    assert not (tmp_path / "cell").exists()


def test_what_does_not_arrive_is_no_cell_that_ended(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PATIENCE", 0.1)
    monkeypatch.setattr(grid, "work_on", lambda told: lambda cell, causes: (0.0, None))
    with refused("3 of 3 cells failed", "1_count seed=0 (its records have not arrived here: is the folder shared?)"):
        grid.run("plain.yml")


def test_a_cell_that_wants_more_memory_than_its_worker_has_is_told(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(inside / "notebooks", "3_fail", PARAMETERS, "block = bytes(2**31)")
    monkeypatch.setattr(cells, "memory", lambda: 2**30)
    (inside / "g.yml").write_text(yaml.safe_dump(PLAIN | {"notebooks": ["3_fail"], "parameters": {}}))
    with refused("1 of 1 cells failed", "3_fail (MemoryError"):
        grid.run("g.yml")


def test_two_grids_do_not_mix(plain: SimpleNamespace, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = inside / "book/run/toy/grid/plain"
    with locked(out / ".grid.lock"), refused("another `chassis grid` is writing to", "give another --out"):
        grid.run("plain.yml")
    (inside / "other.yml").write_text(yaml.safe_dump(PLAIN | {"profile": "other"}))
    (out / "grid.json").write_text(json.dumps({"grid": "plain.yml", "profile": "toy"}))
    with refused("holds the grid plain.yml of profile toy: give another --out"):
        grid.run("other.yml", out_dir=out)
    (out / "grid.json").write_text("{")
    with refused("holds a grid.json that cannot be read"):
        grid.run("plain.yml")
    (inside / "book/run/toy/results.jsonl").touch()
    with refused("which is of no grid: give another --out"):
        grid.run("plain.yml", out_dir=inside / "book/run/toy")
    assert not ran(inside)
    # Cells of other code are kept, and that is said.
    said = {"by": grid.facts(plain.out / "grid.json")() | {"torch": "1.0"}}
    for path in plain.out.glob("*/cell.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    os.chdir(plain.root)
    grid.run("plain.yml")
    assert "chassis: 3 finished cells are by torch 1.0 instead of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"notebooks": ["1_count", "9_gone", "8_gone"]}, ["unknown notebook 8_gone, 9_gone: choose from 1_count, 2"]),
        ({"parameters": {"sede": [1], "rnks": [1]}}, ["'sede': did you mean 'seed'", "'rnks': did you mean 'ranks'"]),
        ({"parameters": {"seed": ["a", True, 0, None]}}, ["seed='a' does not fit", "seed=True", "seed=None"]),
        ({"parameters": {"ranks": [1, [0], [2]]}}, ["ranks=1 does not fit 1_count", "ranks=[0]: numbers"]),
        ({"parameters": {"seed": 1, "ranks": []}}, ["seed must be a list of at least one", "ranks must be a list"]),
        ({"parameters": [1]}, ["parameters must be names"]),
        ({"parameters": {"n_train": [8]}}, ["none of the chosen notebooks takes n_train"]),
        ({"parameters": {"out_dir": ["x"]}}, ["unknown parameter 'out_dir'"]),
        ({"retries": -1}, ["retries=-1: give a whole number"]),
        ({"retries": True, "notebooks": "1_count"}, ["retries=True", "notebooks must be a list"]),
        ({"profile": "tyo"}, ["unknown profile 'tyo': profiles.yml has toy, other"]),
        ({"retry": 1, "zzz": 2}, ["unknown key 'retry': did you mean 'retries'", "unknown key 'zzz': use profile"]),
        (
            {"notebooks": ["9_gone", "1_count"], "parameters": {"sede": [1], "seed": ["a"]}}
            | {"retries": "x", "profiles": 1},
            ["9_gone", "'sede'", "seed='a'", "retries='x'", "'profiles'"],
        ),
    ],
)
def test_all_that_is_wrong_is_named_before_anything_runs(
    inside: Path, changes: dict[str, Any], words: list[str]
) -> None:
    (inside / "bad.yml").write_text(yaml.safe_dump(PLAIN | changes))
    with pytest.raises(ChassisError) as caught:
        grid.run("bad.yml")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not (inside / "book").exists()


@pytest.mark.parametrize(("text", "word"), [("a: [", "cannot read a grid"), ("[1]", "is no grid"), ("", "is no grid")])
def test_a_file_that_is_no_grid_is_refused(inside: Path, text: str, word: str) -> None:
    (inside / "bad.yml").write_text(text)
    with refused(word):
        grid.run("bad.yml")
    with refused("cannot read a grid from", "none.yml"):
        grid.run("none.yml")


def test_a_notebook_that_takes_no_parameter_is_one_cell(inside: Path) -> None:
    both = PLAIN | {"notebooks": ["3_fail", "1_count"], "parameters": {"ranks": [[1], [2]], "seed": [0, 0, 5]}}
    (inside / "g.yml").write_text(yaml.safe_dump(both))
    labels = [f"1_count ranks=[{rank}] seed={seed}" for rank in (1, 2) for seed in (0, 5)]
    labels += ["3_fail seed=0", "3_fail seed=5"]
    assert [cell.label for cell in grid.read_grid("g.yml").cells] == labels


@needs_browser
def test_the_page_is_whole_by_itself_and_its_menus_work(plain: SimpleNamespace, tmp_path: Path) -> None:
    table = pd.read_csv(plain.out / "grid.csv").assign(experiment="</script><b>")
    easier, bare = table.assign(split="val", value=table["value"] / 2), table.assign(method="identity", rank=None)
    table = pd.concat([table, easier, bare])
    html = page(table, pd.read_csv(plain.out / "cells.csv"), "a <grid>")
    assert "</script><b>" not in html and "a &lt;grid&gt;" in html
    (tmp_path / "page.html").write_text(html)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        sheet, faults = browser.new_page(viewport={"width": 390, "height": 844}), []
        sheet.on("pageerror", lambda error: faults.append(str(error)))
        sheet.on("request", lambda request: request.url.startswith("http") and faults.append(request.url))
        sheet.goto((tmp_path / "page.html").as_uri())
        sheet.wait_for_selector("#plot[data-drawn] .main-svg")
        assert sheet.evaluate("document.documentElement.scrollWidth") <= 390
        # Split "test", of three seeds and two ranks, and the identity that has no rank: a flat line of six.
        assert sheet.inner_text("#said") == "12 rows of kl; a line joins means of up to 6 rows, which differ in seed."
        assert sheet.evaluate("document.getElementById('plot').layout.yaxis.type") == "log"
        for menu, choice in (("x", "seed"), ("only method", "ridge"), ("only split", "val"), ("colour", "rank")):
            sheet.select_option(f"select[name='{menu}']", label=choice)
        assert sheet.inner_text("#said") == "6 rows of kl."
        drawn = sheet.evaluate("document.getElementById('plot').data.filter((t) => t.mode === 'markers')")
        assert [trace["name"] for trace in drawn] == ["1", "2"] and [trace["x"] for trace in drawn] == [[0, 1, 2]] * 2
        assert drawn[0]["y"] == pytest.approx([1 / 4, 1 / 6, 1 / 8])
        browser.close()
    assert not faults
