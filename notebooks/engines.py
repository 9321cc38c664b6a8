"""Where the cells of a grid run: in this process, in worker processes here, or wherever a Dask scheduler has workers.

All are a `concurrent.futures.Executor`. Dask is imported only where it is asked for.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from chassis_utils import ChassisError

#: Begins every worker process here: Ctrl-C is for the command, which then ends them.
QUIET = """import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed").setLevel(logging.CRITICAL)
"""
PATIENCE = 4  # seconds that a scheduler has to answer


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
        print(f"dashboard: {client.dashboard_link}", flush=True)
        # Not pure: a cell that is tried again is another call.
        try:
            yield client.get_executor(pure=False)
        finally:
            # That workers are ended now is worth no line.
            logging.getLogger("distributed").setLevel(logging.CRITICAL)


def memory() -> int | None:
    """Bytes that the worker around this call may use; None where there is no worker, or no limit."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker().memory_manager.memory_limit
    except ValueError:
        return None
