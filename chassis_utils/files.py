"""Files and folders that are there whole or not at all, and locks."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import ChassisError


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Say in one line that nothing can be written to a path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ChassisError(f"cannot write to {path!s:.200} ({reason}): choose another folder, or make room") from error


def replaceable(folder: str | Path, own: Sequence[str]) -> Path:
    """A folder that is not there, or holds no other files than its `own`; else ChassisError, as they would be lost."""
    if not isinstance(folder, str | Path) or "\0" in str(folder):
        raise ChassisError(f"{folder!r:.80} is no name of a folder: give one")
    with _writing(folder):
        folder = Path(folder)
        others = sorted({path.name for path in folder.iterdir()} - {*own}) if folder.exists() else []
    if others:
        raise ChassisError(f"{folder} holds {', '.join(others)[:80]}, which would be lost: choose another name")
    return folder


def made(folder: str | Path) -> Path:
    """A folder, made with those above it if it is not there; ChassisError where that cannot be."""
    with _writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[int]:
    """Hold the lock file `path`; wait for it, or with `busy` refuse with that message. Yields its descriptor."""
    with _writing(made(path.parent)):
        handle = path.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise ChassisError(busy) from None
        yield handle.fileno()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a name to write a file or a folder to, which then takes the place of `path`; readers see either whole.

    What cannot be written raises ChassisError and leaves the old one.
    """
    final = Path(os.path.realpath(path))
    temporary, aside = (final.with_name(f".{final.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    _remove(temporary, aside)
    try:
        with _writing(path):
            yield temporary
            both = temporary.is_dir() and final.is_dir()
            if not (both and _exchanged(temporary, final)):
                if both:
                    os.replace(final, aside)  # the old one waits beside the new one
                os.replace(temporary, final)
    finally:
        if aside.exists() and not final.exists():
            os.replace(aside, final)
        _remove(temporary, aside)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step, as a rename cannot; False where the system cannot either."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)  # -100 is AT_FDCWD there, 2 RENAME_EXCHANGE
    return exchange is not None and exchange(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


def _remove(*paths: Path) -> None:
    """Remove files and folders, where they are there and where that can be done."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()
