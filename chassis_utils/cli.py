"""The way to the command `chassis`, which lies beside the notebooks of a clone, in `notebooks/command.py`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the clone around the working folder, or else to the one this package lies in; 1 where is none."""
    roots = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1])
    if folder := next((root / "notebooks" for root in roots if (root / "notebooks" / "command.py").is_file()), None):
        sys.path.insert(0, str(folder))
        return import_module("command").main(argv)
    if [*(sys.argv[1:] if argv is None else argv)] == ["--version"]:
        return print(f"chassis {__version__}") or 0
    print(f"chassis: no notebooks here or above {Path.cwd()}: run from inside a clone of the project", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
