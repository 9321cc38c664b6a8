"""The command line as a user types it: exit codes, one-line errors, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from test_batch import PARAMETERS, project, write

from chassis_utils import __version__, cli
from chassis_utils.cli import main

PACKAGE = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "chassis_utils.cli"]


def chassis(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(PACKAGE)}
    return subprocess.run([*COMMAND, *arguments], cwd=root, env=env, capture_output=True, text=True, check=False)


def test_run_from_the_shell(tmp_path: Path) -> None:
    root = project(tmp_path)
    good = chassis(root / "notebooks", "run", "1_look", "--profile", "toy", "--set", "ranks=[8, 9]", "--set", "seed=2")
    assert (good.returncode, good.stderr) == (0, "")
    assert re.fullmatch(r"1_look: done, [\d.]+ s\n", good.stdout)
    assert '"ranks": [8, 9]' in (root / "book/run/toy/seen.json").read_text()
    bad = chassis(root, "run", "2_fail", "--profile", "toy", "--set", "seed=1", "--out", "here")
    assert bad.returncode == 1
    assert re.fullmatch(r"chassis: failed, see .*: 2_fail \(ZeroDivisionError: division by zero\)\n", bad.stderr)
    assert not (root / "here" / "2_fail.ipynb").exists() and (root / "here" / "failed" / "2_fail.ipynb").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interrupt_leaves_no_half_written_notebook_and_no_kernel(tmp_path: Path, jobs: str) -> None:
    root = project(tmp_path)
    slow = "import os, time\nopen(os.path.join(out_dir, 'pid'), 'w').write(str(os.getpid()))\ntime.sleep(300)"
    write(root / "notebooks", "3_stop", PARAMETERS, slow)
    write(root / "notebooks", "4_write", PARAMETERS, "import time\ntime.sleep(300)")
    out = root / "book" / "run" / "toy"
    command = [*COMMAND, "run", "3_stop", "4_write", "--profile", "toy", "--jobs", jobs]
    env = os.environ | {"PYTHONPATH": str(PACKAGE)}
    options = {"cwd": root, "env": env, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # A shell starts what runs in the background deaf to interrupts, and children inherit that.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, preexec_fn=hear, **options)
    limit = time.monotonic() + 180
    while not ((out / "pid").exists() and (out / "pid").read_text()):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "chassis: interrupted, what was finished is kept\n"
    assert process.returncode == 130
    assert not list(out.rglob("*.ipynb"))
    # A kernel looks after its parent once a second, and goes when that is gone.
    kernel, limit = Path("/proc", (out / "pid").read_text()), time.monotonic() + 30
    while kernel.exists():
        assert time.monotonic() < limit, "the kernel outlived its run"
        time.sleep(0.2)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run", "--set", "seed"],
        ["run", "--set", "=1"],
        ["run", "--set", "ranks=[1"],
        ["book", "x"],
        ["grid"],
        ["grid", "g.yml", "--workers", "-1"],
        ["grid", "g.yml", "--workers", "2", "--scheduler", "tcp://x:1"],
        ["port", "--port", "x"],
        ["port", "--plug", "folder"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: chassis" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "nope"], "unknown profile 'nope': profiles.yml has toy, other"),
        (["run", "--profile", "toy", "--set", "layer=3"], "unknown parameter 'layer': did you mean 'layers'?"),
        (["run", "9_gone", "--profile", "toy"], "unknown notebook 9_gone"),
        (["grid", "none.yml"], "cannot read a grid from"),
        (["book", "--profile", "toy"], "no table of contents"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project(tmp_path))
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("chassis: ") and told.err.count("\n") == 1
    assert message in told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notebooks"]


def test_outside_a_clone_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "chassis_utils" / "cli.py"))
    assert main(["run"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("chassis: ") and told.endswith("run from inside a clone of the project\n")
    assert told.count("\n") == 1
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"chassis {__version__}\n"


def test_a_wrong_option_is_answered_before_anything_slow_is_imported() -> None:
    slow = "torch|transformers|papermill|plotly|tornado|ipywidgets|pandas"
    for option in ("--help", "--nonsense"):
        command = [sys.executable, "-X", "importtime", *COMMAND[1:], "run", option]
        told = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
        assert "usage: chassis" in told.stdout + told.stderr and not re.search(rf"\b({slow})\b", told.stderr)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("chassis ")
