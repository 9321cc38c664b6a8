"""CHASSIS: see what works here, run notebooks, alone or as a grid, build the book, try the port in a browser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from chassis_utils import __version__
from chassis_utils.errors import ChassisError


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value read as YAML: `ranks=[1, 2]` is a list of integers."""
    import yaml  # here, so that a Python without it gets as far as `doctor`

    key, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of {key!r} is no YAML: {value!r}") from None
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key.strip(), parsed


def _plug(text: str) -> tuple[str, str]:
    """`name=folder`."""
    name, _, folder = text.partition("=")
    if not name.strip() or not folder.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not name=folder")
    return name.strip(), folder.strip()


def _port(text: str) -> int:
    """A number that a port can have; 0 for a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    """A number of workers."""
    if not text.isdecimal() or int(text) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers: give 0 to 4096")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line; nothing slow is imported for it."""
    whole = argparse.ArgumentParser(prog="chassis", description=__doc__)
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what works here, what does not, and what to do; changes nothing")
    doctor.add_argument("--profile", default="pocket", help="what it needs decides (default: pocket)")
    run = commands.add_parser("run", help="execute notebooks into book/run/<profile>")
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 01_exact_adapter; none means all")
    run.add_argument("--profile", default="pocket", help="a block of notebooks/profiles.yml (default: pocket)")
    run.add_argument("--set", dest="settings", type=_setting, action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--out", metavar="DIR", help="write here instead")
    run.add_argument("--missing", action="store_true", help="keep pages of which nothing has changed since")
    run.add_argument("--jobs", type=_count, default=1, metavar="N", help="pages side by side (default: 1)")
    grid = commands.add_parser("grid", help="execute notebooks times lists of parameters, what is missing of them")
    grid.add_argument("file", metavar="FILE", help="YAML: profile, notebooks, parameters to lists, retries")
    where = grid.add_mutually_exclusive_group()
    where.add_argument("--workers", type=_count, default=0, metavar="N", help="processes here (default: this one)")
    where.add_argument("--scheduler", metavar="ADDRESS", help="of Dask, such as tcp://host:8786, whose workers to use")
    grid.add_argument("--out", metavar="DIR", help="write here (default: book/run/<profile>/grid/<name of FILE>)")
    book = commands.add_parser("book", help="build the HTML from executed notebooks")
    book.add_argument("--profile", default="pocket", help="whose results (default: pocket)")
    book.add_argument("--archive", action="store_true", help="also as one zip file, to be opened from disk")
    port = commands.add_parser("port", help="plugs, weights and a prompt, as a page on this machine alone")
    port.add_argument("--base", default="pocket-base", help="bundled name, folder or hub id (default: pocket-base)")
    port.add_argument("--plug", dest="plugs", type=_plug, action="append", default=[], metavar="NAME=FOLDER",
                      help="an adapter that was saved; none: two are fitted on bundled text")  # fmt: skip
    port.add_argument("--port", type=_port, default=0, metavar="N", help="of the page (default: a free one)")
    port.add_argument("--no-browser", dest="browser", action="store_false", help="only print the address")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 1: bad input or a failed notebook, 2: wrong usage, 130: interrupted.

    Ctrl-C is how `port` ends, and no failure: 0.
    """
    options = parser().parse_args(argv)
    try:
        # What is imported here takes a second or more, which a wrong option need not wait for.
        if options.command == "doctor":
            import doctor

            doctor.examine(options.profile)
        elif options.command == "port":
            import portserver

            portserver.serve(options.base, options.plugs, options.port, options.browser)
        elif options.command == "run":
            import batch

            options.settings = dict(options.settings)
            how = {"missing": options.missing, "jobs": options.jobs}
            batch.run(options.notebooks, options.profile, options.settings, options.out, **how)
        elif options.command == "grid":
            import grid

            print(f"the grid: {grid.run(options.file, options.workers, options.scheduler, options.out).as_uri()}")
        else:
            import batch

            first = batch.build_book(options.profile)
            print(f"the book: {first.as_uri()}")
            if options.archive:
                from archive import archive

                print(f"as one file: {archive(first.parent, first.parents[1] / f'chassis-{options.profile}.zip')}")
    except ChassisError as error:
        print(f"chassis: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("chassis: interrupted, what was finished is kept", file=sys.stderr)
        return 130
    return 0
