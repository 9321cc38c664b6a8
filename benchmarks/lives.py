"""One life of a command, ended by `kill -9` where it lasts too long: what `kills.py` and `gathered.py` are made of."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def life(
    command: Sequence[str], seconds: float | None = None, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str | None:
    """What a command printed that ended by itself, or None if it was killed after so many seconds.

    Our modules lie in its path, and `env` goes over the environment. SystemExit: it failed.
    """
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "notebooks")))
    options = {"cwd": cwd, "env": os.environ | {"PYTHONPATH": paths} | (env or {}), "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        told, wrong = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        raise SystemExit(f"it failed: {wrong}")
    return told
