"""Profiles and papermill: notebooks in, executed notebooks out, never a failed one; then the book."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

if "rfc3987_syntax" not in sys.modules:
    # An optional check of web addresses by jsonschema, which takes two seconds to load and which nothing here needs.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import papermill
import yaml

import chassis_utils
import nursery
from chassis_utils import ChassisError
from chassis_utils.files import made
from engines import InProcess
from locks import locked
from records import FILE, forget, replace_text

PARAMETERS = ("base", "expert", "n_train", "ranks", "layers", "seed", "device", "out_dir")
#: What sets how many threads a process computes with.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
READS = "read_records"  # in a page that depends on the records of others
PATIENCE = 5  # seconds
FEW = 3  # pages for which it does not pay to import ahead
_PROFILES = Path("notebooks", "profiles.yml")


@dataclass(frozen=True)
class Profile:
    """One block of `profiles.yml`."""

    name: str
    root: Path  # the project: holds `notebooks/`, `_toc.yml` and `book/`
    defaults: dict[str, Any]  # given to the notebooks that declare them
    notebooks: dict[str, dict[str, Any]]  # stem -> its own values, in order

    @property
    def run_dir(self) -> Path:
        """Where executed notebooks and records go: `book/run/<name>`."""
        return self.root / "book" / "run" / self.name


def load_profile(name: str, path: str | Path | None = None) -> Profile:
    """Read a block of `<project>/notebooks/profiles.yml`, unless given of the project around the working folder.

    Where that is no project, it is the one that this module lies in. ChassisError: no such profile (the message lists
    them), or a file that cannot be read or has another layout.
    """
    roots = (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1])
    path = Path(path or next((x for x in (root / _PROFILES for root in roots) if x.is_file()), _PROFILES)).resolve()
    try:
        blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ChassisError(f"cannot read profiles from {path}: {last_line(error)}") from error
    if name not in blocks:
        raise ChassisError(f"unknown profile {name!r}: {path.name} has {', '.join(blocks)}")
    block = blocks[name]
    if block.keys() != {"description", "defaults", "notebooks"}:
        raise ChassisError(f"profile {name!r} in {path} must hold a description, defaults and notebooks, and no more")
    own = {stem: values or {} for stem, values in block["notebooks"].items()}
    refuse(_strange([*block["defaults"], *(key for values in own.values() for key in values)]))
    return Profile(name, path.parents[1], block["defaults"], own)


def last_line(error: BaseException | str) -> str:
    """The last line of a message that says something."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def _strange(keys: Iterable[Any]) -> list[str]:
    """What is wrong with parameters that no notebook may be given; `out_dir` is the runner's to give."""
    allowed, wrong = PARAMETERS[:-1], []
    for key in keys:
        if key not in allowed:
            close = get_close_matches(str(key), allowed, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(allowed)} (or --out)"
            wrong.append(f"unknown parameter {key!r}: {advice}")
    return wrong


def refuse(faults: Iterable[str]) -> None:
    """One ChassisError that names all faults, each once; none if there is no fault."""
    if told := "; ".join(dict.fromkeys(faults)):
        raise ChassisError(told)


def _declared(source: Path) -> dict[str, Any]:
    """Parameters that a notebook declares, with their defaults, which must be plain values."""
    try:
        told = papermill.inspect_notebook(source)
        defaults = {name: ast.literal_eval(parameter["default"]) for name, parameter in told.items()}
    except Exception as error:
        raise ChassisError(f"{source} is no notebook that can be run: {last_line(error)}") from error
    if foreign := sorted({*defaults} - {*PARAMETERS}):
        raise ChassisError(f"{source.name} declares {foreign[0]!r}: notebooks share only {', '.join(PARAMETERS)}")
    return defaults


def _misfits(stem: str, values: Mapping[str, Any], declared: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of parameters that a notebook declares."""
    wrong = []
    for key, value in values.items():
        many, usual = (x if isinstance(x, list) else [x] for x in (value, declared[key]))
        if type(value) is not type(declared[key]) or {*map(type, many)} != {type(usual[0])}:
            wrong.append(f"{key}={value!r} does not fit {stem}: give something like {declared[key]!r}")
        elif key in ("n_train", "ranks") and min(many) < 1:
            wrong.append(f"{key}={value!r}: numbers of prompts and ranks begin at 1")
    return wrong


def _placed(settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Settings, with models that are folders seen from here as notebooks of a project see them.

    Inside the project that is a path from there, which names no folder of this machine.
    """
    placed = dict(settings)
    for key in {"base", "expert"} & {*settings}:
        if os.path.isfile(os.path.join(str(settings[key]), "config.json")):
            path = Path(settings[key]).resolve()
            placed[key] = os.path.relpath(path, root / "notebooks") if path.is_relative_to(root) else str(path)
    return placed


def plan(notebooks: Sequence[str], profile: Profile, choices: Sequence[Mapping[str, Any]],
         faults: Iterable[str] = ()) -> list[dict[str, dict[str, Any]]]:  # fmt: skip
    """For each choice of settings: stem -> parameters of each notebook named (if none is, of all), in profile order.

    ChassisError: `faults`, if the caller has found any, and all that is wrong with the notebooks, settings and types.
    """
    chosen = {Path(str(name)).name.removesuffix(".ipynb") for name in notebooks} or {*profile.notebooks}
    faults, plans = [*faults], []
    if wrong := sorted(chosen - {*profile.notebooks}):
        faults.append(f"unknown notebook {', '.join(wrong)}: choose from {', '.join(profile.notebooks)}")
    given = {key: None for settings in choices for key in settings}
    faults += _strange(given)
    stems = [stem for stem in profile.notebooks if stem in chosen]
    declared = {stem: _declared(profile.root / "notebooks" / f"{stem}.ipynb") for stem in stems}
    for stem in stems:
        if idle := sorted({*profile.notebooks[stem]} - {*declared[stem]}):
            faults.append(f"profile {profile.name!r} gives {stem} {', '.join(idle)}, which it does not declare")
    for settings in (_placed(one, profile.root) for one in choices):
        plans.append({})
        for stem in stems:
            known = {**profile.defaults, **profile.notebooks[stem], **settings}
            values = {key: value for key, value in known.items() if key in declared[stem]}
            faults += _misfits(stem, values, declared[stem])
            plans[-1][stem] = values | dict.fromkeys({"out_dir"} & {*declared[stem]})
    unused = {*given} & {*PARAMETERS} - {key for keys in declared.values() for key in keys}
    if unused and stems:
        faults.append(f"none of the chosen notebooks takes {', '.join(sorted(unused))}")
    refuse(faults)
    return plans


class Leash:
    """What running notebooks hang on: they end tidily when it is let go, by us or by the end of this process."""

    def __init__(self) -> None:
        self.end, self._held = os.pipe()
        self.gone = False

    def __enter__(self) -> Leash:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        os.close(self.end)

    def let_go(self) -> None:
        """End what hangs on it."""
        if not self.gone:
            self.gone = True
            os.close(self._held)


def run(
    notebooks: Sequence[str], profile: str | Profile, settings: Mapping[str, Any] | None = None,
    out_dir: str | Path | None = None, progress: bool = True, missing: bool = False, jobs: int = 1,
) -> list[Path]:  # fmt: skip
    """Execute the notebooks of these stems, or all of a profile; each is published only if it ran to its end.

    A notebook that fails goes to `failed/`, its earlier page and records are removed, and the rest still runs.
    `settings` override the profile's parameters, `out_dir` is the profile's run folder unless given, and with
    `progress` a line is printed for each. With `missing`, pages stay of which nothing has changed since (see `_stamp`):
    what was killed goes on from the page it was at. So many `jobs` run side by side, each with its share of the cores
    unless OMP_NUM_THREADS says otherwise; pages that read the records of others then come last. Returns
    the published notebooks. ChassisError for bad input, before anything has run; or for notebooks that failed, after
    all have.
    """
    profile = load_profile(profile) if isinstance(profile, str) else profile
    (planned,) = plan(notebooks, profile, [settings or {}])
    out = (profile.run_dir if out_dir is None else Path(out_dir)).resolve()
    cores = str(max(1, len(os.sched_getaffinity(0)) // max(1, jobs)))
    share = dict.fromkeys(THREADS, os.environ.get(THREADS[0], cores)) if jobs > 1 else {}
    busy = f"another run is writing to {out}: wait for its end, or give another folder"
    pages: dict[str, Future[str | None]] = {}

    def stays(source: Path, values: dict[str, Any]) -> bool:
        mark = out / f".{source.stem}.stamp"
        return missing and mark.is_file() and mark.read_text() == _stamp(source, out, values)

    def page(source: Path, values: dict[str, Any]) -> str | None:
        """Run a page unless it may stay; why it failed, if it did."""
        mark, clock = out / f".{source.stem}.stamp", time.monotonic()
        if stays(source, values):
            if progress:
                print(f"{source.stem}: kept", flush=True)
            return None
        mark.unlink(missing_ok=True)
        if not (cause := execute(source, out, values, lock, leash, env=share)):
            replace_text(mark, _stamp(source, out, values))
        if progress:
            print(f"{source.stem}: {'failed' if cause else 'done'}, {time.monotonic() - clock:.1f} s", flush=True)
        return cause

    def causes() -> dict[str, str | None]:
        """Wait for the pages so far; what is no failure of a page, such as a full disk, is raised at once."""
        ended = wait(pages.values(), return_when=FIRST_EXCEPTION).done
        return {stem: one.result() for stem, one in pages.items() if one in ended}

    sources = {stem: profile.root / "notebooks" / f"{stem}.ipynb" for stem in planned}
    readers = {stem for stem, source in sources.items() if READS in source.read_text(encoding="utf-8")}
    # Where an earlier page is what a later one waits for, nobody else has to: those that read come last.
    order = sorted(planned, key=readers.__contains__) if jobs > 1 else planned
    devices = {values.get("device", "cpu") for values in planned.values()}
    with ExitStack() as stack:
        lock, leash = stack.enter_context(_alone(out / ".run.lock", busy)), stack.enter_context(Leash())
        due = sum(not stays(source, planned[stem]) for stem, source in sources.items())  # at least: pages read others
        if due > FEW and devices == {"cpu"} and sys.platform == "linux":
            share |= stack.enter_context(_nursery(share, leash))
        with ThreadPoolExecutor(jobs) if jobs > 1 else InProcess() as pool:
            try:
                for stem in order:
                    if jobs <= 1 or stem in readers:
                        causes()
                    pages[stem] = pool.submit(page, sources[stem], planned[stem])
                ended = causes()
                failures = [f"{stem} ({ended[stem]})" for stem in planned if ended[stem]]
            except BaseException:
                leash.let_go()
                pool.shutdown(cancel_futures=True)
                raise
    if failures:
        raise ChassisError(f"failed, see {out / 'failed'}: {'; '.join(failures)}")
    return [out / f"{stem}.ipynb" for stem in planned]


@contextmanager
def _nursery(share: Mapping[str, str], leash: Leash) -> Iterator[dict[str, str]]:
    """What to add to the environment of pages that get their kernels from a nursery, which ends with the run."""
    with tempfile.TemporaryDirectory(prefix="chassis-") as folder:
        address = os.path.join(folder, "nursery")
        quiet = {"stdin": leash.end, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, nursery.__file__, address]
        with subprocess.Popen(command, env=_environment(share), start_new_session=True, **quiet) as server:
            try:
                yield {nursery.ADDRESS: address}
            finally:
                server.terminate()


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Of a process that runs notebooks: they import the package and our modules, wherever they lie themselves."""
    ours = Path(chassis_utils.__file__).resolve().parents[1], Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, (*map(str, ours), os.environ.get("PYTHONPATH"))))
    return os.environ | {"CHASSIS_HEADLESS": "1", "PYTHONPATH": path} | more


@contextmanager
def _alone(path: Path, busy: str) -> Iterator[int]:
    """Hold a run's lock; a page whose run was killed needs a moment to notice, and holds it until then."""
    limit = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                held = stack.enter_context(locked(path, busy))
                break
            except ChassisError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)
        yield held


def _stamp(source: Path, out: Path, values: Mapping[str, Any]) -> str:
    """Hash of all that decides a page, and of what it left: itself, parameters, code and data, versions, its records.

    A page that reads the records of others depends on all of them.
    """
    page, rows = out / source.name, out / FILE
    if not page.is_file():
        return "no page"
    told = source.read_text(encoding="utf-8")
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    mine = f'"notebook": {json.dumps(source.stem)}'
    own = [line for line in lines if READS in told or mine in line]
    parts = [told, json.dumps(values, sort_keys=True, default=str), page.read_text(encoding="utf-8"), *own]
    parts += [_code(source.parent), _code(Path(chassis_utils.__file__).parent)]
    parts += [sys.version, *map(version, ("torch", "transformers", "numpy", "plotly"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _code(folder: Path) -> str:
    """Hash of the code and data in a folder, other notebooks aside."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".ipynb" and not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}:
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def execute(source: Path, out: Path, values: dict[str, Any], lock: int, leash: Leash, memory: int | None = None,
            env: Mapping[str, str] | None = None) -> str | None:  # fmt: skip
    """Run one notebook and publish it, or move it to `failed/` and return the cause in a line.

    It ends when `leash` is let go: KeyboardInterrupt, and nothing is published. `memory` is what each of its processes
    may allocate, in bytes, and `env` goes over the environment.
    """
    partial, final, failed = out / f".{source.stem}.partial.ipynb", out / source.name, out / "failed" / source.name
    if "out_dir" in values:
        # A page of the book shows its parameters: inside the project they name no folder of this machine.
        inside = out.is_relative_to(source.parents[1])
        values = values | {"out_dir": os.path.relpath(out, source.parent) if inside else str(out)}
    # The child keeps the lock open, so that a run whose parent was killed still counts as one until the child has gone:
    # it goes when nobody holds the other end of its input any more.
    options = {"env": _environment(env or {}), "pass_fds": (lock,), "text": True, "stdin": leash.end}
    task = json.dumps([str(source), str(partial), values, memory])
    command = [sys.executable, "-P", str(Path(__file__).with_name("execute.py")), task]
    try:
        child = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, **options)
        if leash.gone:
            raise KeyboardInterrupt
        if not (cause := _cause(partial, child.returncode, child.stderr)):
            os.replace(partial, final)
            failed.unlink(missing_ok=True)
            return None
        final.unlink(missing_ok=True)
        forget(out, source.stem)
        if partial.exists():
            failed.parent.mkdir(exist_ok=True)
            os.replace(partial, failed)
        return cause
    finally:
        partial.unlink(missing_ok=True)


def _cause(executed: Path, code: int = 0, told: str = "") -> str | None:
    """Why a notebook has not run to its end, in one line; None if it has."""
    try:
        notebook = json.loads(executed.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return last_line(told or "nothing was written")
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
    if error := next((output for output in outputs if output["output_type"] == "error"), None):
        return f"{error['ename']}: {(error['evalue'].strip().splitlines() or [''])[0]}"
    state = notebook["metadata"].get("papermill", {})
    ended = not code and not state.get("exception") and state.get("end_time")
    return None if ended else last_line(told or "it stopped before its end")


def build_book(profile: str | Profile) -> Path:
    """Build the HTML book from executed notebooks; returns the first page.

    The profile `pocket` is built in `_build`, another in `_build/<name>`, where pages that quote a run quote that one.
    ChassisError: a notebook of the table of contents was not executed or has failed, or the build warned.
    """
    profile = load_profile(profile) if isinstance(profile, str) else profile
    root, name, toc = profile.root, profile.name, profile.root / "_toc.yml"
    if not toc.is_file():
        raise ChassisError(f"no table of contents at {toc}: run from inside a clone of the project")
    text = toc.read_text(encoding="utf-8").replace("run/pocket", f"run/{name}")
    pages = [Path(page) for page in re.findall(r"\bfile: *(\S*book/run/[^\s}]+)", text)]
    causes = {page.stem: _cause(root / page.with_suffix(".ipynb")) for page in pages}
    if missing := [f"{stem} ({cause})" for stem, cause in causes.items() if cause]:
        raise ChassisError(f"not executed: {', '.join(missing)}; run `chassis run --profile {name}` first")
    target = root if name == "pocket" else made(root / "_build" / name)
    if (table := target / "_toc.yml") != toc:
        table.write_text(text, encoding="utf-8")
    # The package has no `python -m` entry, and the command of that name on PATH may belong to another Python.
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "."]
    command += ["-W", "-n", "--keep-going", "--toc", str(table), "--path-output", str(target)]
    # Pages outside the run name that of `pocket`; `notebooks/bookpages.py` reads it as this one.
    told = os.environ | {"CHASSIS_RUN": f"run/{name}"}
    if code := subprocess.run(command, cwd=root, check=False, env=told).returncode:
        raise ChassisError(f"the book did not build (exit code {code}): the warnings above say why")
    return target / "_build" / "html" / "index.html"
