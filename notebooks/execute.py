"""Execute one notebook by papermill, as a script in a process of its own, whose folder papermill changes.

The package is not imported: what the notebook needs is loaded by its kernel, and takes seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any

if __name__ == "__main__":
    # An optional check of web addresses by jsonschema, which takes two seconds to load and which no notebook needs.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import papermill
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

import nursery


class InterpreterKernel(AsyncKernelManager):
    """A kernel of the very interpreter that runs, whatever `python3` kernels are installed on the machine.

    It talks through sockets in a folder of its own: kernels started side by side race for TCP ports.
    """

    def __init__(self, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chassis-")
        place = os.path.join(self._folder.name, "k")
        super().__init__(transport="ipc", ip=place, connection_file=f"{place}.json", **options)

    @property
    def kernel_spec(self) -> KernelSpec:
        """The specification of `sys.executable`'s kernel, warm where there is a nursery."""
        command = make_ipkernel_cmd()
        if address := os.environ.get(nursery.ADDRESS):
            # Neither site-packages nor the environment are read by a process that only stands for another.
            command = [sys.executable, "-I", "-S", nursery.__file__, address, *command]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def _outlive_no_parent() -> None:
    """End tidily, as on Ctrl-C, when the process that waits for the notebook has gone, however it went."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a shell may have made SIGINT one that is not heard

    def watch() -> None:
        os.read(0, 1)  # the parent writes nothing: what comes is the end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    source, output, values, memory = json.loads(sys.argv[1])
    _outlive_no_parent()
    if memory:
        # What is private and can be written: an allocation that fails has a line and a name, a killed kernel has none.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    options = {"cwd": os.path.dirname(source), "kernel_manager_class": InterpreterKernel}
    try:
        papermill.execute_notebook(source, output, values, kernel_name="python3", progress_bar=False, **options)
    except KeyboardInterrupt:
        # Who waits for the notebook may have been killed, and takes nothing away.
        with suppress(FileNotFoundError):
            os.remove(output)
        raise
