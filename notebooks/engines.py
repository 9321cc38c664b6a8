"""Where the cells of a grid run: in this process, in worker processes here, or wherever a Dask scheduler has workers.

All are a `concurrent.futures.Executor`. Dask is imported only where it is asked for.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from chassis_utils import ChassisError

#: Begins every worker process here: Ctrl-C is for the command, which then ends them.
QUIET = """import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed").setLevel(logging.CRITICAL)
"""
PATIENCE = 4  # seconds that a scheduler has to answer


class Job(Protocol):
    """A frozen dataclass of plain values, which are what a worker is sent."""

    label: str  #: For people


class InProcess(Executor):
    """Calls what is submitted at once, one call after another."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of a call that has been made; Ctrl-C goes through."""
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def facts(shared: Path) -> Callable[[], dict[str, str]]:
    """A function that says, wherever it is called, what must be the same on every worker.

    It holds all it needs, so that it can be sent to a worker that has none of our modules. `shared` is a file that all
    must see.
    """
    place, beside = str(shared), str(Path(__file__).resolve().parent)

    def told() -> dict[str, str]:
        import hashlib
        import platform
        from importlib.metadata import PackageNotFoundError, version
        from pathlib import Path

        def code(folder: str | Path) -> str:
            """Of all modules in a folder: a version stands for many states of them."""
            parts = (path.name.encode() + path.read_bytes() for path in sorted(Path(folder).glob("*.py")))
            return hashlib.sha256(b"".join(parts)).hexdigest()[:8]

        found = {"Python": platform.python_version(), "chassis_utils": "none", "notebooks": code(beside)}
        for name in ("torch", "transformers"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "none"
        try:
            import chassis_utils

            found["chassis_utils"] = f"{chassis_utils.__version__} ({code(Path(chassis_utils.__file__).parent)})"
        except ImportError:
            pass
        seen = Path(place)
        return found | {place: hashlib.sha256(seen.read_bytes()).hexdigest()[:8] if seen.is_file() else "none"}

    return told


def unlike(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """What a worker has otherwise, in words; empty if nothing."""
    names = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    return ", ".join(f"{name} {theirs[name]} instead of {ours[name]}" for name in names)


def alike(told: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """What a worker is sent to call first: our modules can be imported from then on, if it is like this machine.

    It returns what `told`, of `facts`, says here. RuntimeError: it says something else there.
    """
    ours, here = told(), str(Path(__file__).resolve().parent)

    def check() -> dict[str, str]:
        import sys

        if here not in sys.path:
            sys.path.insert(0, here)
        from engines import unlike

        if other := unlike(ours, told()):  # a worker that came after the others were compared
            raise RuntimeError(f"its worker has {other}")
        return ours

    return check


def outcomes(executor: Executor, work: Callable[..., tuple[float, str | None]], jobs: Sequence[Job], retries: int,
             final: tuple[type[Exception], ...] = ()) -> Iterator[tuple[Job, float, list[str], bool]]:  # fmt: skip
    """Jobs as they end, with seconds, causes of failed tries, and whether they ended well.

    `work` takes the job's fields and the causes of its earlier tries, and gives seconds and a cause if it failed, as
    does an exception, unless it is `final`: that is raised. ChassisError: the scheduler was lost.
    """
    waiting: deque[tuple[Job, list[str]]] = deque((job, []) for job in jobs)
    running: dict[Future[Any], tuple[Job, list[str]]] = {}
    finished: SimpleQueue[Future[Any]] = SimpleQueue()
    try:
        while waiting or running:
            # What has ended is told before more is begun: in this process, every call has ended when it was submitted.
            while waiting and finished.empty():
                job, causes = waiting.popleft()
                future = executor.submit(work, astuple(job), causes)
                running[future] = job, causes
                future.add_done_callback(finished.put)
            future = finished.get()
            job, causes = running.pop(future)
            try:
                seconds, cause = future.result()
            except CancelledError:
                raise ChassisError("the scheduler was lost: start it again, what was finished is kept") from None
            except final:
                raise
            except Exception as error:
                seconds, cause = 0.0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if cause:
                causes = [*causes, cause]
            if cause and len(causes) <= retries:
                print(f"{job.label}: try {len(causes)} of {retries + 1} failed, {seconds:.1f} s: {cause}", flush=True)
                waiting.append((job, causes))
            else:
                yield job, seconds, causes, not cause
    finally:
        for future in running:
            future.cancel()


def arrived(known: Callable[[], Any], patience: float) -> bool:
    """Whether what a worker wrote is seen here, which a network's file system may take a while for, in seconds."""
    limit = time.monotonic() + patience
    while not known() and time.monotonic() < limit:
        time.sleep(0.5)
    return bool(known())


@contextmanager
def engine(told: Callable[[], dict[str, str]], workers: int = 0, scheduler: str | None = None
           ) -> Iterator[Executor]:  # fmt: skip
    """An executor of `workers` processes on this machine, none: this one; or of those of the scheduler at an address.

    `told` is of `facts`. ChassisError: Dask is missing, nobody answers within `PATIENCE`, or a worker differs.
    """
    if not workers and scheduler is None:
        yield InProcess()
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ChassisError("Dask, which workers need, is missing: pip install 'chassis-utils[cluster]'") from None
    if workers > (cores := len(os.sched_getaffinity(0))):
        print(f"chassis: more workers ({workers}) than cores ({cores}): they share them", file=sys.stderr)
    # That a worker was lost is worth a line of Dask's; what happens to the client is told by whoever uses it.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if scheduler is None:
            options = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": 1 / workers, "preload": [QUIET]}
            cluster = LocalCluster(host="127.0.0.1", dashboard_address="127.0.0.1:0", **options)
            where: Any = stack.enter_context(cluster)
        else:
            where = scheduler
        try:
            client = Client(where, timeout=PATIENCE, set_as_default=False)
        except Exception as error:  # of many kinds, some of them assertions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ChassisError(f"no scheduler answers at {scheduler} ({reason}): start one there") from None
        stack.enter_context(client)
        ours, answers = told(), client.run(told, on_error="return")
        wrong = {name: unlike(ours, x) if isinstance(x, dict) else str(x) for name, x in sorted(answers.items())}
        if wrong := [f"{name} has {what}" for name, what in wrong.items() if what]:
            raise ChassisError(f"workers unlike this machine: {'; '.join(wrong)}: give all the same")
        if not answers:
            print(f"chassis: no worker at {scheduler} yet: cells wait for one", file=sys.stderr)
        if scheduler is not None:  # workers of our own are begun again when they are lost
            ended = threading.Event()
            stack.callback(ended.set)
            threading.Thread(target=_watch, args=(client, scheduler, bool(answers), ended), daemon=True).start()
        print(f"dashboard: {client.dashboard_link}", flush=True)
        # Not pure: a cell that is tried again is another call.
        try:
            yield client.get_executor(pure=False)
        finally:
            # That workers are ended now is worth no line.
            logging.getLogger("distributed").setLevel(logging.CRITICAL)


def _watch(client: Any, scheduler: str, there: bool, ended: threading.Event) -> None:
    """Say when the last worker has gone, and when one has come: nothing else tells why nothing happens."""
    while not ended.wait(PATIENCE):
        with suppress(Exception):  # a scheduler that is lost is told by whoever waits for what it runs
            if there != bool(client.scheduler_info(n_workers=1)["workers"]):
                there = not there
                what = "a worker has come to" if there else "no worker is left at"
                print(f"chassis: {what} {scheduler}{'' if there else ': cells wait for one'}", file=sys.stderr)


def memory() -> int | None:
    """Bytes that the worker around this call may use; None where there is no worker, or no limit."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker().memory_manager.memory_limit
    except ValueError:
        return None
