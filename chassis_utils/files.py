"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psutil import pid_exists
from safetensors import SafetensorError, safe_open

from .errors import ChassisError

if TYPE_CHECKING:
    import torch  # two seconds to load, which a page of records need not wait for


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
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
    with writing(folder):
        folder = Path(folder)
        others = sorted({path.name for path in folder.iterdir()} - {*own}) if folder.exists() else []
    if others:
        raise ChassisError(f"{folder} holds {', '.join(others)[:80]}, which would be lost: choose another name")
    return folder


def made(folder: str | Path) -> Path:
    """A folder, made with those above it if it is not there; ChassisError where that cannot be."""
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a name to write a file or a folder to, which then takes the place of `path`; readers see either whole.

    What cannot be written raises ChassisError and leaves the old one. What killed processes of this machine left goes.
    """
    mark = f".{(final := Path(os.path.realpath(path))).name}.{socket.gethostname()}."
    temporary, aside = (final.with_name(f"{mark}{os.getpid()}.{end}") for end in ("tmp", "old"))
    left = [(one, one.name.split(".")[-2]) for one in final.parent.glob(glob.escape(mark) + "*.tmp")]
    ended = (one for one, pid in left if pid.isdecimal() and not pid_exists(min(int(pid), 2**31 - 1)))
    _remove(temporary, aside, *ended)
    try:
        with writing(path):
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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], key: dict[str, Any]) -> None:
    """Write tensors with the `key` of all that decides them and a checksum of their values, whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({**tensors}, temporary, metadata={"key": json.dumps(key | {"sha256": _checksum(tensors)})})


def read_tensors(path: Path, key: dict[str, Any], values: bool = True) -> dict[str, torch.Tensor] | str:
    """What `write_tensors` wrote for that key; without `values` only that it did. Or why not: "" is no file."""
    try:
        with safe_open(path, framework="pt") as file:
            theirs, wanted = json.loads((file.metadata() or {})["key"]), json.loads(json.dumps(key))
            if other := [name for name in wanted if theirs.get(name) != wanted[name]]:
                return f"is of other {', '.join(other)}"
            tensors = {name: file.get_tensor(name) for name in file.keys()} if values else {}  # noqa: SIM118
        return "is damaged" if values and _checksum(tensors) != theirs["sha256"] else tensors
    except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
        return "" if isinstance(error, FileNotFoundError) else "is damaged"


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


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
