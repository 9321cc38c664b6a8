"""What is no kill, done to the works of `kills.py`: nothing may be lost, and no figure may differ.

    python benchmarks/faults.py [--what disk interrupt shard clock memory worker scheduler network] [--trials 10]
                                [--out faults.json]

Each fault strikes at moments, places and sizes drawn by a seed. A trial ends with the command called once more,
undisturbed; what it then leaves must equal, to the bit, what the command leaves that nothing happened to. Counted
beside: trials in which the fault struck before the command had ended, those in which the command said so in one line or
got over it, and temporary files left behind.

*disk*: the project lies on a small file system (tmpfs) that fills on the way; then it gets room. *interrupt*: Ctrl-C.
*shard*: of a run that was killed or has ended, one bit of one file is turned, or its end cut off. *clock*: the clock of
all processes jumps by up to a day either way, twice a second, and the run is killed once. *memory*: the address space
is limited; states are equal but for rounding then. *worker*, *scheduler*: one of a Dask cluster on loopback is killed,
and another begins. *network*: scheduler and workers are hosts of their own (network namespaces), and a worker's wire is
out for some seconds.

*disk* and *network* need the rights of root, *clock* a C compiler; what cannot be tried here is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from bench import keep
from kills import Work, cleared, project, works
from lives import ROOT, life

CELLS = 4
#: A library loaded before all others: the clock of the day jumps, the one that only runs does not.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
static int (*real)(clockid_t, struct timespec *);
static long jump(void) {
    struct timespec now;
    real(CLOCK_MONOTONIC, &now);
    unsigned long step = (now.tv_sec * 2 + now.tv_nsec / 500000000) * 6364136223846793005UL;
    return (long)((step >> 33) % 172800) - 86400;
}
int clock_gettime(clockid_t which, struct timespec *told) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int found = real(which, told);
    if (which == CLOCK_REALTIME) told->tv_sec += jump();
    return found;
}
time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *told, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
MEMORY = """
import json, resource, sys, warnings
import torch
from chassis_utils import ChassisError, harvest, load, probe_set
base, expert = (load(f"pocket-{name}", device="cpu") for name in ("base", "math"))
def states():
    found = harvest(base, expert, probe_set("math-text", n=48), "all", batch_tokens=16384, progress=False)
    return torch.cat([found.layer(layer) for layer in (0, 3, 6)] + [found.expert_hidden])
wanted = states()
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]), -1))
    try:
        found, refused = states(), ""
    except (ChassisError, MemoryError, RuntimeError) as error:
        found, refused = None, f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
halved = sum("half of them" in str(one.message) for one in caught)
found = states() if found is None else found
print(json.dumps({"halved": halved, "refused": refused, "same": torch.allclose(found, wanted, atol=1e-4)}))
"""


def begun(command: list[str], root: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a terminal gives it one."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "notebooks")))
    options = {"cwd": root, "env": os.environ | {"PYTHONPATH": paths} | (env or {}), "text": True}
    # A background job of a shell is deaf to Ctrl-C, and its children with it.
    hear = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, start_new_session=True, preexec_fn=hear, **pipes, **options)


def told(wrong: str) -> str:
    """The last line of what a command said of its end."""
    lines = [line for line in wrong.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def litter(root: Path) -> int:
    """Temporary files that lie about."""
    return sum(1 for path in root.rglob(".*") if path.suffix in (".tmp", ".old") or ".partial" in path.name)


def whole(root: Path, work: Work) -> tuple[float, Any]:
    """Seconds of an undisturbed command, and what it leaves."""
    clock = time.monotonic()
    life(work.command, cwd=root)
    return time.monotonic() - clock, work.left(root)


Trial = dict[str, Any]


def again(root: Path, work: Work, wanted: Any) -> bool:
    """Whether a further call, undisturbed, leaves what it should."""
    life(work.command, cwd=root)
    return work.left(root) == wanted


# ----------------------------------------------------------------------------------------------- faults


def disk(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """A full disk."""
    if os.geteuid():
        raise NotImplementedError("a file system of its own needs the rights of root")
    plain = project(folder / "plain", CELLS)
    work = works(plain, 0)[name]
    before = _size(plain)
    _, wanted = whole(plain, work)
    needed = _size(plain) - before
    for i in range(trials):
        root = folder / f"disk{i}"
        root.mkdir()
        room = before + 64 * 2**10 + int(needed * draw.uniform(0.02, 0.98))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", root], check=True)
        try:
            project(root, CELLS)
            works(root, 0)
            process = begun(work.command, root)
            _, wrong = process.communicate(timeout=600)
            struck, line = process.returncode != 0, told(wrong)
            left = litter(root)
            subprocess.run(["mount", "-o", f"remount,size={room + 4 * needed + 2**24}", root], check=True)
            yield {"struck": struck, "said": "No space left" in line, "litter": left,
                   "same": again(root, work, wanted), "line": line.replace(str(root), "…")[-160:]}  # fmt: skip
        finally:
            subprocess.run(["umount", "-l", root], check=True)


def interrupt(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """Ctrl-C."""
    root = project(folder / "toy", CELLS)
    work = works(root, 2)[name]
    length, wanted = whole(root, work)
    for _ in range(trials):
        cleared(root, work)
        process = begun(work.command, root)
        time.sleep(length * draw.random())
        family: list[psutil.Process] = []
        if struck := process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
        _, wrong = process.communicate(timeout=120)
        _, alive = psutil.wait_procs(family, timeout=20)
        line = told(wrong)
        said = line in ("chassis: interrupted, what was finished is kept", "KeyboardInterrupt")
        yield {"struck": struck, "said": said, "processes": len(alive), "litter": litter(root),
               "same": again(root, work, wanted), "line": line[-160:]}  # fmt: skip


def shard(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """A bit turned, or an end cut off."""
    root = project(folder / "toy", CELLS)
    work = works(root, 0)[name]
    length, wanted = whole(root, work)
    for _ in range(trials):
        files: list[Path] = []
        while not files:  # killed before it had written any
            cleared(root, work)
            # Of a gathering that has ended nothing is left but the sum of all.
            life(work.command, length * draw.uniform(0.7, 1.2) if name == "gather" else None, root)
            files = [path for kept in work.fresh for path in (root / kept).rglob("*.safetensors")]
        (root / "digest.txt").unlink(missing_ok=True)
        path = draw.choice(sorted(files))
        raw = bytearray(path.read_bytes())
        if cut := draw.random() < 0.3:
            raw = raw[: draw.randrange(len(raw))]
        else:
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
        process = begun(work.command, root)
        said, wrong = process.communicate(timeout=600)
        lines = [line for line in (said + wrong).splitlines() if "made again" in line]
        yield {"struck": True, "said": bool(lines), "litter": litter(root), "same": work.left(root) == wanted,
               "line": f"{'cut' if cut else 'a bit'}: {lines[0][-120:] if lines else told(wrong)[-120:]}"}  # fmt: skip


def clock(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """A clock that jumps."""
    if (compiler := shutil.which("cc")) is None:
        raise NotImplementedError("a clock that jumps needs a C compiler")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    root = project(folder / "toy", CELLS)
    work = works(root, 2)[name]
    length, wanted = whole(root, work)
    for _ in range(trials):
        cleared(root, work)
        # Killed on the way, so that a further call must tell what is done from what is not while the clock jumps.
        process = begun(work.command, root, {"LD_PRELOAD": str(library)})
        time.sleep(length * draw.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        process = begun(work.command, root, {"LD_PRELOAD": str(library)})
        _, wrong = process.communicate(timeout=600)
        # Kernels are waited for by the clock of the day: a jump may end that wait, which is said.
        over, line = process.returncode == 0, told(wrong)
        same = work.left(root) == wanted if over else again(root, work, wanted)
        yield {"struck": True, "said": over or line.startswith("chassis:"), "over": over, "litter": litter(root),
               "same": same, "line": line.replace(str(folder), "…")[-160:]}  # fmt: skip


def memory(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """Too little memory for a batch."""
    for _ in range(trials):
        limit = int(2 ** draw.uniform(20, 27))
        one = json.loads(life([sys.executable, "-c", MEMORY, str(limit)], cwd=folder, env={"OMP_NUM_THREADS": "1"}))
        # Memory that is short elsewhere than in a pass (for what is kept of it, say) ends in torch's own words.
        said = not one["refused"] or "ChassisError" in one["refused"]
        line = f"{limit / 2**20:.0f} MiB: {one['halved']} batches halved; {one['refused'][:120]}"
        yield {"struck": bool(one["halved"] or one["refused"]), "said": said, "over": not one["refused"], "litter": 0,
               "same": one["same"], "line": line}  # fmt: skip


def worker(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """A worker that is lost."""
    yield from _clusters(folder, name, trials, draw, lambda cluster: cluster.lose_worker())


def scheduler(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """A scheduler that is lost."""
    yield from _clusters(folder, name, trials, draw, lambda cluster: cluster.lose_scheduler())


def network(folder: Path, name: str, trials: int, draw: random.Random) -> Iterator[Trial]:
    """A wire that is out for some seconds, between hosts of their own."""
    if os.geteuid() or shutil.which("ip") is None:
        raise NotImplementedError("hosts in network namespaces need the rights of root, and iproute2")
    with _hosts() as hosts:
        yield from _clusters(folder, name, trials, draw, lambda cluster: cluster.lose_wire(draw.uniform(1, 6)), hosts)


# ------------------------------------------------------------------------------------------- a cluster


class Cluster:
    """A Dask scheduler and two workers of 1.5 GiB, each a process, or each on a host of its own."""

    def __init__(self, root: Path, hosts: list[str] | None = None) -> None:
        self.root, self.hosts = root, hosts
        self.host = "127.0.0.1" if hosts is None else "10.77.0.1"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.processes = f"tcp://{self.host}:{self.port}", {}
        self.begin()

    def begin(self) -> None:
        """Begin what is not running."""
        if not self._runs("scheduler"):
            where = ["--host", self.host, "--port", str(self.port), "--no-dashboard"]
            self._start("scheduler", 0, ["-m", "distributed.cli.dask_scheduler", *where])
        for i in (1, 2):
            if not self._runs(f"worker {i}"):
                words = [self.address, "--nthreads", "1", "--memory-limit", "1536MiB", "--no-dashboard"]
                words += ["--death-timeout", "600", "--host", self.host if self.hosts is None else f"10.77.0.{1 + i}"]
                self._start(f"worker {i}", i, ["-m", "distributed.cli.dask_worker", *words])

    def _runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def _start(self, name: str, host: int, words: list[str]) -> None:
        inside = [] if self.hosts is None else ["ip", "netns", "exec", self.hosts[host]]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "notebooks"))), "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [*inside, sys.executable, *words]
        self.processes[name] = subprocess.Popen(command, cwd=self.root, env=env, start_new_session=True, **quiet)

    def inside(self, command: list[str]) -> list[str]:
        """The command, on the scheduler's host."""
        return command if self.hosts is None else ["ip", "netns", "exec", self.hosts[0], *command]

    def lose_worker(self) -> None:
        """Kill a worker with its nanny; another begins."""
        self._kill("worker 1")
        self.begin()

    def lose_scheduler(self) -> None:
        """Kill the scheduler and, a second later, begin it anew."""
        self._kill("scheduler")
        time.sleep(1)
        self.begin()

    def lose_wire(self, seconds: float) -> None:
        """Take a worker's wire away for so long."""
        for state in ("down", "up"):
            subprocess.run(["ip", "netns", "exec", self.hosts[1], "ip", "link", "set", "eth0", state], check=True)
            time.sleep(seconds if state == "down" else 0)

    def _kill(self, name: str) -> None:
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def end(self) -> None:
        """Kill what runs."""
        for name in self.processes:
            if self._runs(name):
                self._kill(name)


@contextmanager
def _hosts() -> Iterator[list[str]]:
    """A scheduler's host and two workers', joined by a bridge."""
    names, bridge = [f"chassis{os.getpid()}-{i}" for i in range(3)], f"cb{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"{bridge}v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{bridge}v{i}", "master", bridge, "up")
            for words in (f"addr add 10.77.0.{1 + i}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip("netns", "exec", name, "ip", *words.split())
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", bridge], check=False, stderr=subprocess.DEVNULL)


def _clusters(
    folder: Path, name: str, trials: int, draw: random.Random, lose: Callable[[Cluster], None],
    hosts: list[str] | None = None,
) -> Iterator[Trial]:  # fmt: skip
    """Trials of a work on a cluster of which something is lost on the way."""
    root = project(folder / "toy", CELLS)
    cluster = Cluster(root, hosts)
    try:
        work = works(root, 0, cluster.address)[name]
        work = Work(cluster.inside(work.command), work.left, work.fresh, work.begun)
        length, wanted = whole(root, work)
        for _ in range(trials):
            cleared(root, work)
            process = begun(work.command, root)
            time.sleep(length * draw.random())
            struck = process.poll() is None
            lose(cluster)
            while process.poll() is None:  # what has ended is begun again, as a cluster does it
                cluster.begin()
                time.sleep(0.5)
            line = told(process.communicate()[1])
            cluster.begin()
            # Ended well in spite of it, or with one line of ours.
            said = process.returncode == 0 or line.startswith(("chassis:", "chassis_utils.errors.ChassisError:"))
            yield {"struck": struck, "said": said, "over": process.returncode == 0, "litter": litter(root),
                   "same": again(root, work, wanted), "line": line[-160:]}  # fmt: skip
    finally:
        cluster.end()


def _size(root: Path) -> int:
    """Bytes of a folder as a file system counts them, in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in root.rglob("*"))


#: Fault -> what it is done to.
FAULTS: dict[str, tuple[Callable[..., Iterator[Trial]], tuple[str, ...]]] = {
    "disk": (disk, ("harvest", "gather", "grid", "run")),
    "interrupt": (interrupt, ("gather", "grid", "run", "harvest")),
    "shard": (shard, ("harvest", "gather")),
    "clock": (clock, ("gather", "grid", "run", "harvest")),
    "memory": (memory, ("harvest",)),
    "worker": (worker, ("gather", "grid")),
    "scheduler": (scheduler, ("gather", "grid")),
    "network": (network, ("gather", "grid")),
}


def main() -> None:
    """Print one line of JSON for each fault and work, and with --out write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--works", nargs="+", help="of those that a fault is done to; all unless given")
    parser.add_argument("--trials", type=int, default=10, help="of each fault with each work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file, of which other faults are kept")
    options = parser.parse_args()
    for what in options.what:
        strike, done_to = FAULTS[what]
        for name in (one for one in done_to if not options.works or one in options.works):
            draw, found = random.Random(f"{what} {name} {options.seed}"), []
            with tempfile.TemporaryDirectory() as folder:
                try:
                    for trial in strike(Path(folder), name, options.trials, draw):
                        found.append(trial)
                        print(f"{what}, {name}: {json.dumps(trial)}", file=sys.stderr, flush=True)
                except NotImplementedError as error:
                    print(f"{what}, {name}: not tried ({error})", file=sys.stderr)
                    continue
            counts = {"trials": len(found), "struck": sum(one["struck"] for one in found)}
            counts |= {"said": sum(one["said"] for one in found if one["struck"])}
            counts |= {"differ": sum(not one["same"] for one in found), "litter": sum(one["litter"] for one in found)}
            counts |= {k: sum(one[k] for one in found) for k in ("over", "processes") if k in found[0]}
            row = {"fault": what, "work": name} | counts | {"line": next((x["line"] for x in found if x["struck"]), "")}
            print(json.dumps(row), flush=True)
            if options.out:
                keep(options.out, **{f"{what}, {name}": row})


if __name__ == "__main__":
    main()
