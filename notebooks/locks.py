"""Locks of folders that several processes write to."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chassis_utils import ChassisError
from chassis_utils.files import made, writing


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[int]:
    """Hold the lock file `path`; wait for it, or with `busy` refuse with that message. Yields its descriptor."""
    with writing(made(path.parent)):
        handle = path.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise ChassisError(busy) from None
        yield handle.fileno()
