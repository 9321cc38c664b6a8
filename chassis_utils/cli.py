"""The command `chassis`: run notebooks, build the book."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from . import __version__
from .errors import ChassisError


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value read as YAML: `ranks=[1, 2]` is a list of integers."""
    key, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of {key!r} is no YAML: {value!r}") from None
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key.strip(), parsed


def _beside_notebooks(name: str) -> ModuleType:
    """A module of the clone around the working folder, or of the one this package lies in; ChassisError in neither."""
    roots = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1])
    folders = (root / "notebooks" for root in roots)
    if not (folder := next((one for one in folders if (one / f"{name}.py").is_file()), None)):
        raise ChassisError(f"no notebooks here or above {Path.cwd()}: run from inside a clone of the project")
    sys.path.insert(0, str(folder))
    return import_module(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 1: bad input or a failed notebook, 2: wrong usage, 130: interrupted."""
    parser = argparse.ArgumentParser(prog="chassis", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute notebooks into book/run/<profile>")
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 01_exact_adapter; none means all")
    run.add_argument("--profile", default="pocket", help="a block of notebooks/profiles.yml (default: pocket)")
    run.add_argument("--set", dest="settings", type=_setting, action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--out", metavar="DIR", help="write here instead")
    book = commands.add_parser("book", help="build the HTML from executed notebooks")
    book.add_argument("--profile", default="pocket", help="whose results (default: pocket)")
    options = parser.parse_args(argv)
    try:
        batch = _beside_notebooks("batch")  # takes a second, which a wrong option need not wait for
        if options.command == "run":
            batch.run(options.notebooks, options.profile, dict(options.settings), options.out)
        else:
            print(f"the book: {batch.build_book(options.profile).as_uri()}")
    except ChassisError as error:
        print(f"chassis: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("chassis: interrupted, what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
