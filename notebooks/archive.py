"""The built book as one file that can be sent, unpacked and opened from disk."""

from __future__ import annotations

import zipfile
from pathlib import Path

from chassis_utils import ChassisError
from chassis_utils.files import made, replacing

LEFT_OUT = {".buildinfo", "objects.inv", "_sources", ".doctrees"}  # of use to Sphinx alone
START = """CHASSIS, the book.

Unpack all of it, then open index.html in a browser. Nothing is installed and nothing is asked of a network: figures,
tables, formulas and the search work from disk.
"""


def archive(site: Path, target: Path) -> Path:
    """Write the pages of a built site into a zip file, under a folder of its name; returns it.

    The same pages give the same bytes, whenever and wherever they are packed. ChassisError: there are no pages.
    """
    files = sorted(
        path for path in site.rglob("*") if path.is_file() and not LEFT_OUT & {*path.relative_to(site).parts}
    )
    if site / "index.html" not in files:
        raise ChassisError(f"no book in {site}: run `chassis book` first")
    made(target.parent)
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        parts = {"READ ME FIRST.txt": START.encode()} | {path.relative_to(site).as_posix(): path for path in files}
        for name, part in parts.items():
            entry = zipfile.ZipInfo(f"{target.stem}/{name}", (1980, 1, 1, 0, 0, 0))
            entry.external_attr, entry.create_system, entry.compress_type = 0o100644 << 16, 3, zipfile.ZIP_DEFLATED
            out.writestr(entry, part if isinstance(part, bytes) else part.read_bytes())
    return target
