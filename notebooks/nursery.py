"""Warm kernels: one process imports what every page needs, and the kernel of each page is a fork of it.

Imports cost a page more processor time than most of its cells. A nursery serves one run, on Linux, for pages that
stay off GPUs: neither a driver nor macOS bears a fork. What papermill starts and watches is a small process that asks
for the kernel, hands its output on and ends with it; a kernel ends when that process has gone. Where no nursery
answers, it becomes a kernel of the usual kind.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from contextlib import suppress

ADDRESS = "CHASSIS_NURSERY"  # in the environment of a run: the socket at which its nursery listens
PATIENCE = 30  # seconds until an answer, of the 60 that papermill gives a kernel
#: What pages import that takes long, of other people's packages and of ours. The kernel's own comes first: by it others
#: know that they are in one, such as tqdm, whose bars are of another kind there.
HEAVY = (
    "ipykernel.kernelapp", "chassis_utils.adapter", "chassis_utils.bridge", "chassis_utils.distill",
    "chassis_utils.metrics", "ipywidgets", "myst_nb", "plotly.graph_objects", "plotly.io", "scipy.sparse",
    "transformers.models.llama.modeling_llama", "transformers.models.phi.modeling_phi",
)  # fmt: skip


def ask(address: str, *command: str) -> None:
    """Be the process that stands for a kernel of the nursery; `command`, `python -m ...`, starts one without."""
    os.environ.pop(ADDRESS, None)  # a run that a page starts is another one
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(PATIENCE)
        try:
            line.connect(address)
            kernel = int.from_bytes(line.recv(4), "big")
            line.settimeout(None)
            words = command[command.index("-m") + 2 :]
            told = json.dumps({"argv": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
            # Its output is ours: the descriptors themselves go along, now that somebody is there to take them.
            ours = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))]
            line.sendmsg([len(told).to_bytes(4, "big")], ours)
            line.sendall(told)
        except OSError:
            kernel = 0
        if not kernel:
            os.execv(command[0], command)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(ConnectionResetError):
            if code := line.recv(1):
                sys.exit(code[0])
        # It was killed: what it started goes too, as it would with a kernel that papermill started itself.
        with suppress(ProcessLookupError):
            os.killpg(kernel, signal.SIGKILL)
        sys.exit(1)


def serve(address: str) -> None:
    """Import, then fork a kernel for whoever asks, until our input ends."""
    from importlib import import_module
    from select import select

    if not sys.flags.safe_path:
        del sys.path[0]  # this script's folder, which no kernel has in front
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)  # who asks before all is imported waits
        for name in HEAVY:
            import_module(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
        while 0 not in select([0, door], [], [])[0]:
            line = door.accept()[0]
            if os.fork() == 0:
                door.close()
                _kernel(line)
            line.close()
    # Whoever made the folder may have been killed.
    with suppress(OSError):
        os.unlink(address)
        os.rmdir(os.path.dirname(address))


def _kernel(line: socket.socket) -> None:
    """In the fork: a kernel for the process at the other end of `line`, as if it ran there; never returns."""
    import atexit
    import threading
    import traceback

    code = 1
    try:
        os.setsid()
        line.send(os.getpid().to_bytes(4, "big"))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, outputs, *_ = socket.recv_fds(line, 4, 2)
        told = json.loads(line.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        for ours, theirs in zip((1, 2), outputs, strict=True):
            os.dup2(theirs, ours)
            os.close(theirs)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(told["cwd"])
        os.environ.clear()
        os.environ.update(told["env"])

        def watch() -> None:
            line.recv(1)  # nothing is said: what comes is the end
            os.killpg(0, signal.SIGKILL)

        os.register_at_fork(after_in_child=line.close)  # else its children would hold the line when it was killed
        threading.Thread(target=watch, daemon=True).start()
        from ipykernel.kernelapp import launch_new_instance

        sys.argv = ["ipykernel_launcher", *told["argv"]]
        launch_new_instance(parent_handle=0)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # To take a loaded torch apart takes a second, and gives nothing back that the end does not.
        try:
            atexit._run_exitfuncs()
            line.send(bytes([code]))
        finally:
            os._exit(code)


if __name__ == "__main__":
    (serve if len(sys.argv) == 2 else ask)(*sys.argv[1:])
