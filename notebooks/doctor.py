"""What works here, what does not, and what to do about it, for one profile: a line each.

Nothing is left or fetched. Whatever is broken, the rest is still examined: a check imports itself what it needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chassis_utils
from chassis_utils import ChassisError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from batch import Profile

ROOT = Path(__file__).resolve().parents[1]
INSTALL = 'pip install -c constraints.txt -e ".[book,lab,peft,test]"'
NEEDED = ("book", "peft")  # extras that the pages of a profile cannot do without
OTHERS = {"lab": "JupyterLab and `chassis port`", "test": "`make test`", "cluster": "grids on workers"}
FREE = (
    2 * 2**30
)  #: Bytes of memory and of disk beside a model's own: libraries, figures and pages need about half of it
WORKS, NOTE, FAILS = "works", "note", "fails"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    state: str  #: `works`; `note`, which keeps no page of the profile from running; or `fails`
    what: str
    told: str  #: How it is, and where it is not well, what to do

    def __str__(self) -> str:
        return f"{self.state:<6} {self.what:<9} {' '.join(self.told.split())}"


@dataclass(frozen=True)
class Place:
    """A model that a profile names and that is on this machine, where it lies, and how many numbers it has."""

    name: str
    folder: Path
    parameters: int


def examine(name: str) -> None:
    """Print a line for each finding. ChassisError: no such profile, or something that it needs does not work."""
    failed = 0
    for finding in findings(name):
        print(finding, flush=True)
        failed += finding.state == FAILS
    if failed:
        raise ChassisError(f"{failed} of these keep profile '{name}' from running: mend what 'fails', then ask again")
    print(f"everything that profile '{name}' needs works")


def findings(name: str) -> Iterator[Finding]:
    """Everything that is found, in the order a newcomer mends it in. ChassisError: no such profile."""
    try:
        from batch import load_profile
    except ImportError as error:
        profile, unread = None, f"{error}: mend the packages first, models and folders are examined after that"
    else:
        profile, unread = load_profile(name), ""
    yield from _guarded("python", _python)
    yield from _guarded("packages", _packages)
    yield from _guarded("package", _package)
    if profile is None:
        yield Finding(FAILS, "profile", unread)
        return
    yield from _guarded("kernel", lambda: _kernel(profile))
    yield from _guarded("lab", lambda: _lab(profile))
    yield from _guarded("models", _bundled)
    places: list[Place] = []
    yield from _guarded("models", lambda: _named(profile, places))
    yield from _guarded("gpu", lambda: _gpu(profile, places))
    yield from _guarded("memory", lambda: _memory(profile, places))
    yield from _guarded("disk", lambda: _disk(profile))
    yield from _guarded("locks", lambda: _locks(profile))
    yield from _guarded("browser", _browser)


def _guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks off says why, and the others still run."""
    try:
        yield from check()
    except Exception as error:  # a broken library raises anything
        told = " ".join(str(error).split())[:200] or type(error).__name__
        yield Finding(FAILS, what, told if isinstance(error, ChassisError) else f"{type(error).__name__}: {told}")


# --------------------------------------------------------------------------------------- environment


def _python() -> Iterator[Finding]:
    """Python 3.11, the only one that the versions are tested with."""
    version, here = ".".join(map(str, sys.version_info[:3])), f"at {sys.executable}"
    if sys.version_info[:2] == (3, 11):
        yield Finding(WORKS, "python", f"{version} {here}")
    else:
        yield Finding(FAILS, "python", f"{version} {here}: install Python 3.11, then make PYTHON=/path/to/python3.11")


def _packages() -> Iterator[Finding]:
    """What is installed, against what is required of it and against the versions that all was tested with."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    needed = [Requirement(line) for line in (*project["dependencies"], *(one for x in NEEDED for one in extras[x]))]
    if wrong := _unmet(needed):
        yield Finding(FAILS, "packages", f"{'; '.join(wrong)}: {INSTALL}")
    others = []
    for pin in pins:
        version, wanted = _version(pin.name), next(iter(pin.specifier)).version
        # A build for a GPU has the same version and a name behind it.
        if version and Version(version).public != wanted:
            others.append(f"{canonicalize_name(pin.name)} {version} ({wanted})")
    if others:
        told = f"other versions than all was tested with (in brackets): {', '.join(others)}"
        yield Finding(NOTE, "packages", f"{told}; figures may differ, {INSTALL} brings them back")
    elif not wrong:
        yield Finding(WORKS, "packages", "what the pages need is there, every version as in constraints.txt")
    for extra, use in OTHERS.items():
        if wrong := _unmet([Requirement(line) for line in extras[extra]]):
            told = f"no {use} ({'; '.join(wrong)}): pip install -c constraints.txt -e '.[{extra}]'"
            yield Finding(NOTE, "packages", told)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet(wanted: Sequence[Requirement]) -> list[str]:
    """What is missing, or of a version that whoever needs it does not allow, and so on with what that needs."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    waiting, seen, wrong = [("", one) for one in wanted], set(), []
    while waiting:
        by, one = waiting.pop(0)
        if (key := (canonicalize_name(one.name), str(one.specifier), *sorted(one.extras))) in seen:
            continue
        seen.add(key)
        version, of = _version(one.name), f" for {by}" if by else ""
        if version is None:
            wrong.append(f"{one.name} is missing{of}")
            continue
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} {version}, not {one.specifier}{of}")
        for line in metadata.requires(one.name) or ():
            further = Requirement(line)
            if not further.marker or any(further.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                waiting.append((one.name, further))
    return wrong


def _package() -> Iterator[Finding]:
    """Whether the code that runs, here and in any notebook of this Python, is that of this clone."""
    ours = Path(chassis_utils.__file__).resolve().parents[1]
    if ours != ROOT:
        told = f"chassis_utils {chassis_utils.__version__} is that of {ours}, the notebooks are of {ROOT}"
        yield Finding(FAILS, "package", f"{told}: {INSTALL}, in this clone")
        return
    yield Finding(WORKS, "package", f"chassis_utils {chassis_utils.__version__}, of this clone")


def _said(manager: Any, folder: Path, env: Mapping[str, str]) -> str:
    """Where the package lies that a kernel imports; raises where there is no kernel, or no package."""

    async def ask() -> str:
        heard: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            heard.append(message["content"].get("text", ""))

        await manager.start_kernel(cwd=str(folder), env=dict(env), stderr=subprocess.DEVNULL)
        client = manager.client()
        try:
            client.start_channels()
            await client.wait_for_ready(timeout=60)
            code = "import chassis_utils\nprint(chassis_utils.__file__)"
            reply = (await client.execute_interactive(code, output_hook=hear, timeout=60))["content"]
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)
        if reply["status"] != "ok":
            raise ChassisError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(heard).strip()

    return asyncio.run(ask())


def _kernel(profile: Profile) -> Iterator[Finding]:
    """The kernel that `chassis run` executes pages in, started for real."""
    from execute import InterpreterKernel

    # A run puts the package before everything else.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    _said(InterpreterKernel(), profile.root / "notebooks", os.environ | {"PYTHONPATH": path})
    yield Finding(WORKS, "kernel", "pages run in a kernel of this Python, which starts and imports the package")


def _lab(profile: Profile) -> Iterator[Finding]:
    """The kernel that JupyterLab starts for a notebook: it is looked up by name, and may be another Python's."""
    from jupyter_client import AsyncKernelManager

    try:
        manager = AsyncKernelManager(kernel_name="python3")
        found = Path(_said(manager, profile.root / "notebooks", os.environ)).resolve().parents[1]
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        told = f"the kernel 'python3' of JupyterLab does not import the package ({why}): {INSTALL}"
        yield Finding(NOTE, "lab", f"{told}, and `jupyter kernelspec list` shows whose kernel it is")
        return
    if found == ROOT:
        yield Finding(WORKS, "lab", "the kernel 'python3' that JupyterLab starts imports the package of this clone")
    else:
        told = f"the kernel 'python3' of JupyterLab imports the package of {found}"
        yield Finding(NOTE, "lab", f"{told}: {INSTALL}, in this clone")


# -------------------------------------------------------------------------------------------- models


def _bundled() -> Iterator[Finding]:
    """Each pocket model loaded, its readout checked against its own logits, and asked for one token."""
    import torch

    told = []
    for name in chassis_utils.bundled():
        model = chassis_utils.load(name, device="cpu")
        ids = torch.tensor([model.prompt_ids("Two and two are")])
        state = model.states(ids, torch.ones_like(ids))[model.num_layers][0, -1:]
        if not torch.isfinite(model.readout(state)).all():
            raise ChassisError(f"{name} gives NaN or infinity: get the clone's chassis_utils/pocket again")
        told.append(f"{name} (head {model.head_hash[:8]})")
    yield Finding(WORKS, "models", f"bundled, loaded and asked: {', '.join(told)}")
    command = ["git", "status", "--porcelain", "--", "chassis_utils/pocket"]
    if shutil.which("git") and (changed := subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout):
        told = f"{len(changed.splitlines())} files of the bundled models are not as they were committed"
        yield Finding(NOTE, "models", f"{told}: git checkout chassis_utils/pocket")


def _named(profile: Profile, places: list[Place]) -> Iterator[Finding]:
    """Models that the profile names beside the bundled ones; those that are there are put in `places`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError

    from chassis_utils.models import POCKET, located
    from costs import shape
    from plugs import STRENGTHS

    given = [profile.defaults, *profile.notebooks.values()]
    named = dict.fromkeys(str(one[key]) for one in given for key in ("base", "expert") if one.get(key))
    for name in (one for one in named if one.partition(":")[0] not in STRENGTHS):
        if name in chassis_utils.bundled():
            places.append(Place(name, POCKET / name, shape(name).parameters))
            continue
        how = "get the whole folder"
        try:
            folder = Path(located(name))
            if not folder.is_dir():
                how = f"hf download {name}" + (", with a network and without HF_HUB_OFFLINE" if HF_HUB_OFFLINE else "")
                folder = Path(snapshot_download(name, local_files_only=True))
            wrong = _incomplete(folder)
        except LocalEntryNotFoundError:
            wrong = f"{name} is not in {HF_HUB_CACHE}"
        except ChassisError as error:
            wrong = str(error)
        if wrong:
            yield Finding(FAILS, "models", f"{wrong}: {how}; or name a folder in notebooks/profiles.yml")
            continue
        places.append(Place(name, folder, shape(folder).parameters))
        yield Finding(WORKS, "models", f"{name}, {places[-1].parameters:,} numbers, is on this machine")


def _incomplete(folder: Path) -> str:
    """What a model folder lacks; empty if nothing."""
    indices = [json.loads(path.read_text()) for path in folder.glob("*.index.json")]
    shards = {shard for index in indices for shard in index["weight_map"].values()}
    weights = shards or {path.name for kind in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(kind)}
    lost = [one for one in ("config.json", *sorted(weights)) if not (folder / one).is_file()]
    lost += [] if weights else ["its weights"]
    lost += [] if any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file() else ["its tokenizer"]
    return f"{folder} lacks {', '.join(lost)}" if lost else ""


# ------------------------------------------------------------------------------------------- machine


def _held(places: Sequence[Place], width: int) -> float:
    """Bytes of the two largest models that a page holds at once."""
    return float(width * sum(sorted((one.parameters for one in places), reverse=True)[:2]))


def _giga(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


def _gpu(profile: Profile, places: Sequence[Place]) -> Iterator[Finding]:
    """What torch sees, and a product on it; whether the profile asks for it and its models fit."""
    import torch

    device = str(profile.defaults.get("device", "auto"))
    if not torch.cuda.is_available():
        why = "torch sees none" if torch.version.cuda else "this torch is a build for the CPU alone"
        if device == "cpu":
            yield Finding(WORKS, "gpu", f"none ({why}), and none is needed: this profile computes on the CPU")
        elif device == "auto":
            told = f"none ({why}): all runs on the CPU, slowly for large models; see the page on one's own GPU"
            yield Finding(NOTE, "gpu", told)
        else:
            told = f"none ({why}), and the profile asks for {device}: install a torch for it, or set device: cpu"
            yield Finding(FAILS, "gpu", told)
        return
    name, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    if float((ones @ ones).sum()) != 64**3:
        raise ChassisError(f"{name} multiplies wrongly: update its driver, or set device: cpu")
    told, needs = f"{name}, {_giga(free)} free of {_giga(total)}", _held(places, 2)
    if device != "cpu" and needs > 0.8 * free:
        yield Finding(FAILS, "gpu", f"{told}, the models hold {_giga(needs)}: free some, or set device: cpu")
    else:
        yield Finding(WORKS, "gpu", told + (", not used by this profile" if device == "cpu" else ""))


def _memory(profile: Profile, places: Sequence[Place]) -> Iterator[Finding]:
    """Free memory against models and the largest fit; cores."""
    import torch

    from chassis_utils.statistics import available
    from costs import shape, sizes

    base = next((one for one in places if one.name == profile.defaults.get("base")), None)
    needs, own = float(FREE), str(profile.defaults.get("device", "auto"))
    if base:
        both = [shape(base.folder)] * 2
        needs += sizes(*both, tokens=2, rank=1, family="v2")["peak of the fit"]
    if own == "cpu" or not torch.cuda.is_available():
        needs += _held(places, 4)
    free, cores = available(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    unknown = "" if base else ", and more for a base that is not here"
    told = f"{_giga(free)} free, about {_giga(needs)} are needed{unknown}; {cores} cores"
    yield Finding(WORKS if free > needs else FAILS, "memory", told + ("" if free > needs else ": close other programs"))


def _disk(profile: Profile) -> Iterator[Finding]:
    """Whether a file can be written where runs, pages and temporary files go, and how much room there is."""
    for what, folder in (("runs", profile.run_dir), ("the book", profile.root / "_build"), ("temporary files", None)):
        folder = Path(tempfile.gettempdir()) if folder is None else folder
        there = next(one for one in (folder, *folder.parents) if one.exists())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"0")
            free = shutil.disk_usage(there).free
        except OSError as error:
            told = f"{what} cannot be written to {folder} ({error.strerror or error})"
            how = "set TMPDIR" if what == "temporary files" else "make it a folder that you may write to, or use --out"
            yield Finding(FAILS, "disk", f"{told}: {how}")
            continue
        told = f"{_giga(free)} free for {what} in {folder}"
        # What is temporary is small: sockets of kernels.
        if free > FREE or what == "temporary files":
            yield Finding(WORKS, "disk", told)
        else:
            yield Finding(FAILS, "disk", f"{told}, {_giga(FREE)} are needed: make room")


def _locks(profile: Profile) -> Iterator[Finding]:
    """Whether a run holds the run folder, and what runs that were killed left there."""
    from locks import locked

    lock = profile.run_dir / ".run.lock"
    if lock.is_file():
        with locked(lock, f"a run is writing to {profile.run_dir}: wait for its end, or choose another with --out"):
            pass
    names = ((path, re.search(r"\.(\d+)\.(?:tmp|old)$", path.name)) for path in profile.run_dir.rglob(".*"))
    left = [path for path, match in names if match and _gone(int(match[1]))]
    if left:
        told = f"killed runs left {len(left)} files, which nothing reads: rm -r {' '.join(map(str, left[:3]))}"
        yield Finding(NOTE, "locks", told + (" and others like these" if left[3:] else ""))
    else:
        yield Finding(WORKS, "locks", "no run is going on, and none that was killed left anything")


def _gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _browser() -> Iterator[Finding]:
    """A Chromium that starts, for the tests that read the pages in one."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        yield Finding(NOTE, "browser", "no Chromium: tests of the pages are skipped; apt-get install chromium")
        return
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it does not start"])[-1][:120]
        yield Finding(NOTE, "browser", f"{found} does not start ({why}): install it again")
    else:
        yield Finding(WORKS, "browser", f"{done.stdout.strip()}, for the tests of the pages")
