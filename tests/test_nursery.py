"""Warm kernels: real ones, by papermill, beside those that start cold, and what is left when one of them is killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import psutil
import pytest
from test_batch import PARAMETERS, project, write
from test_portapp import soon

import batch
import nursery
from batch import run
from chassis_utils import ChassisError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels start warm on Linux alone")
#: What two kernels of one run differ in, warm or not.
OWN = {"JPY_PARENT_PID", "JPY_SESSION_NAME"}
TELLS = """
import json, os, signal, sys
seen = {"warm": "torch" in sys.modules, "environment": dict(os.environ), "cwd": os.getcwd(), "path": sys.path,
        "executable": sys.executable, "leader": os.getsid(0) == os.getpid(), "input": sys.__stdin__.read(),
        "children": str(signal.getsignal(signal.SIGCHLD)),
        "modules": sorted({"torch", "plots", "records"} & {*sys.modules})}
import plotly.io, torch
from tqdm.auto import tqdm
seen |= {"bars": str(tqdm.__mro__), "figures": plotly.io.renderers.default}
seen["threads"] = torch.get_num_threads()
open(os.path.join(out_dir, "seen.json"), "w").write(json.dumps(seen))
print("out"); print("err", file=sys.stderr); told = os.system("echo from a child")
"""
SLEEPS = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "300"])
if not (fork := os.fork()):
    time.sleep(300)
    os._exit(0)
open(os.path.join(out_dir, "pids.tmp"), "w").write(f"{os.getpid()} {child.pid} {fork}")
os.replace(os.path.join(out_dir, "pids.tmp"), os.path.join(out_dir, "pids"))
time.sleep(300)
"""


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The run folder of a toy project that is also the working folder; every run has a nursery."""
    root = project(tmp_path / "toy")
    monkeypatch.chdir(root)
    monkeypatch.setattr(batch, "FEW", 0)
    return root / "book" / "run" / "toy"


def look(cell: str) -> None:
    """Let the page of the toy project that says what it runs on be of this cell."""
    write(Path("notebooks"), "1_look", f"{PARAMETERS}\nranks = [1]\ndevice = 'cpu'", cell)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def servers() -> list[psutil.Process]:
    """Nurseries, and what stands for their kernels, below this process."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if alive(one.pid) and nursery.__file__ in one.cmdline()]


def test_a_warm_kernel_differs_from_a_cold_one_in_what_is_imported_alone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(TELLS)
    seen = {}
    for few in (0, 9):
        monkeypatch.setattr(batch, "FEW", few)
        run(["1_look"], "toy", progress=False)
        seen[few] = json.loads((out / "seen.json").read_text())
        page = json.loads((out / "1_look.ipynb").read_text())
        told = {one["name"]: "".join(one["text"]) for one in page["cells"][-1]["outputs"]}
        assert told["stdout"].startswith("out\n") and told["stderr"] == "err\n"
        seen[few]["environment"] = {k: v for k, v in seen[few]["environment"].items() if k not in OWN}
    warm, cold = seen[0], seen[9]
    assert (warm.pop("warm"), cold.pop("warm")) == (True, False)
    assert (warm.pop("modules"), cold.pop("modules")) == (["torch"], [])
    assert warm == cold
    assert not servers(), "a nursery outlives its run"


def test_pages_that_stay_need_no_nursery(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look("pass")
    started: list[bool] = []
    real = batch._nursery
    monkeypatch.setattr(batch, "_nursery", lambda *given: started.append(True) or real(*given))

    def again() -> int:
        """How many nurseries a run starts that leaves out what need not run again."""
        started.clear()
        run(["1_look"], "toy", progress=False, missing=True)
        return len(started)

    assert [again(), again()] == [1, 0]
    look("1 + 1")
    batch._code.cache_clear()
    assert [again(), again()] == [1, 0]


@pytest.mark.parametrize("victim", ["kernel", "stand-in", "nursery"])
def test_a_kernel_and_what_stands_for_it_end_together(out: Path, victim: str) -> None:
    look(SLEEPS)
    failed: list[str] = []

    def page() -> None:
        try:
            run(["1_look"], "toy", progress=False)
        except ChassisError as error:
            failed.append(str(error))

    thread = Thread(target=page, daemon=True)
    thread.start()
    assert soon(lambda: (out / "pids").exists() or failed) and not failed
    kernel, *children = map(int, (out / "pids").read_text().split())
    server = psutil.Process(kernel).parent()
    (standing,) = (one for one in servers() if len(one.cmdline()) > 4)
    if victim == "nursery":  # kernels that are there stay, and what ends the page ends them
        server.kill()
        assert soon(lambda: not alive(server.pid)) and alive(kernel)
    {"kernel": psutil.Process(kernel), "stand-in": standing, "nursery": standing}[victim].kill()
    thread.join(60)
    assert "died" in failed[0].lower(), failed
    assert soon(lambda: not alive(kernel) and not alive(standing.pid))
    assert soon(lambda: not any(map(alive, children))), "a child of the kernel is left"
    assert not servers() and not (out / "1_look.ipynb").exists()


def test_a_killed_run_leaves_no_kernel(out: Path) -> None:
    look(SLEEPS)
    command = [str(Path(sys.executable).with_name("chassis")), "run", "--profile", "toy"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        assert soon(lambda: (out / "pids").exists() or running.poll())
        pids = [*map(int, (out / "pids").read_text().split())]
        below = psutil.Process(running.pid).children(recursive=True)
        assert any(nursery.__file__ in one.cmdline() for one in below), "four pages had no nursery"
        running.kill()
    assert soon(lambda: not any(alive(pid) for pid in (*pids, *(one.pid for one in below))))


@pytest.mark.parametrize("there", ["nothing", "a nursery that could not import", "one that does not answer"])
def test_where_no_nursery_answers_a_kernel_starts_as_usual(tmp_path: Path, there: str) -> None:
    address = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as door:
        if there != "nothing":
            door.bind(address)
            door.listen()
        if "import" in there:
            Thread(target=lambda: door.accept()[0].close(), daemon=True).start()
        usual = [sys.executable, "-m", "this"]
        ask = f"import sys, nursery; nursery.PATIENCE = 1; nursery.ask({address!r}, *{usual!r})"
        env = os.environ | {"PYTHONPATH": str(Path(nursery.__file__).parent)}
        options = {"capture_output": True, "text": True, "check": True, "timeout": 60}
        told = subprocess.run([sys.executable, "-c", ask], env=env, **options)
    assert "Explicit is better than implicit." in told.stdout and not told.stderr


def test_a_long_environment_reaches_the_kernel(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        monkeypatch.setenv(f"LONG_{number}", "x" * 100_000)
    look("import os, sys\nassert 'torch' in sys.modules and len(os.environ['LONG_3']) == 100_000")
    assert run(["1_look"], "toy", progress=False)
