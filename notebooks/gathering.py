"""`gather` on many processes or machines: shards of prompts, each added up where it is run, all summed in one order.

Sums of a shard are a file, so that a run that was killed goes on from there; what then comes out is, to the bit, what
comes out of a run that nobody killed.

    from chassis_utils import Features, fit, load, probe_set
    from gathering import Gathering

    if __name__ == "__main__":  # worker processes import the script that began them
        base, expert, probes = load("pocket-base"), load("pocket-math"), probe_set("math-text")
        with Gathering("sums", shard=64, workers=2) as gather:
            sums = gather(base, expert, probes, Features((base.num_layers,)))
            adapter = fit(sums, "v2", gather=gather)  # every pass of v2 on the same workers
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from tqdm.auto import tqdm

from chassis_utils import Adapter, ChassisError, Features, Gram, LanguageModel, Probes, Statistics, load
from chassis_utils import __version__ as version
from chassis_utils.activations import Expert
from chassis_utils.files import made, read_tensors, replacing, write_tensors
from chassis_utils.models import Place, bundled, located
from chassis_utils.statistics import FOLD, KEPT, gather
from engines import alike, arrived, engine, facts, memory, outcomes
from locks import locked
from records import claim

MARK = "gathering.json"  # says whose folder it is
TRIES = "tries.txt"  # of a pass: a line for each shard begun, with host and process
PATIENCE = 60  # seconds that a shared file system has to show here what a worker wrote
PYTHON = 600 * 2**20  # bytes of a process that has imported torch and transformers and run a model
BYTE = 40  # bytes of memory for a byte of text: its ids, and what a tokenizer tells beside them
SUMS = ("x", "y", "xx", "xy")
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "chassis_utils": version}

_HELD: dict[Any, Any] = {}  # models, experts and edits that this process has loaded, for the next shard
_BUSY = threading.Lock()  # a model runs one pass at a time: what is read on the way is read by hooks


@dataclass(frozen=True)
class Shard:
    """Some prompts of one pass, in plain values that a worker can be sent."""

    path: Path
    label: str
    prompts: tuple[str, ...]
    split: str
    key: dict[str, Any]  # all that decides what the sums are, as the file tells it
    ways: dict[str, Any]  # how a worker comes by the models, and what it needs

    @property
    def whole_key(self) -> dict[str, Any]:
        """The key, with the prompts."""
        return self.key | {"prompts": Probes(self.label, self.split, self.prompts).digest}


# ------------------------------------------------------------------------------------------------------- on a worker


def work_on(told: Callable[[], dict[str, str]]) -> Callable[..., tuple[float, None]]:
    """What a worker is sent: it looks that the worker is like this machine, and makes a shard."""
    check = alike(told)

    def work(shard: tuple[Any, ...], causes: list[str]) -> tuple[float, None]:
        check()
        from gathering import Shard, make

        return make(Shard(*shard))

    return work


def make(shard: Shard) -> tuple[float, None]:
    """Add up a shard, unless its file is there and whole; returns seconds.

    ChassisError: the worker has not memory enough, or other models than whoever asks; or as for `gather`.
    """
    clock, ways, key = time.monotonic(), shard.ways, shard.key
    # Another worker may still be at it, for a run that was killed or a scheduler that took that worker for lost.
    with locked(shard.path.with_suffix(".lock")), _BUSY:
        if isinstance(_read(shard), dict):
            return 0.0, None
        with shard.path.with_name(TRIES).open("a") as file:
            file.write(f"{shard.path.stem} {platform.node()} {os.getpid()}\n")
        device, threads = torch.device(ways["device"]), torch.get_num_threads()
        if device.type == "cpu" and (limit := memory()) and ways["needs"] > limit:
            sizes = f"{ways['needs'] / 2**30:.1f} GiB that models, sums and {len(shard.prompts)} prompts need"
            raise ChassisError(f"a worker has {limit / 2**30:.1f} of the {sizes}: fewer workers, or a smaller shard")
        _forget(ways)
        try:
            torch.set_num_threads(key["threads"])  # sums are rounded alike, however many shards run side by side
            base, expert = (_model(ways[role], ways) for role in ("base", "expert"))
            probes, features = Probes(shard.label, shard.split, shard.prompts), Features(**key["features"])
            options = {"batch_tokens": key["batch_tokens"], "progress": False}
            _write(shard, gather(base, expert, probes, features, key["positions"], key["layer"], **options))
        finally:
            torch.set_num_threads(threads)
    return time.monotonic() - clock, None


def _forget(ways: dict[str, Any]) -> None:
    """Let go of what this pass does not need."""
    edits = {name for role in ("base", "expert") for name in ways[role]["edits"]}
    for name in _HELD.keys() - edits - {ways[role]["held"] for role in ("base", "expert")}:
        del _HELD[name]


def _had(name: str, make: Callable[[], Any], what: str) -> Any:
    """What this process holds by that name, which begins with its revision, or else makes; ChassisError if another."""
    if name not in _HELD:
        found = make()
        if found.revision != name.split()[0]:
            raise ChassisError(f"{what} is another on {platform.node()} than here: give all workers the same files")
        _HELD[name] = found
    return _HELD[name]


def _model(way: dict[str, Any], ways: dict[str, Any]) -> Expert:
    """A base or an expert as it was told to the worker, with its edits."""
    model = _had(way["held"], lambda: _loaded(way, ways), way["name"])
    folder, device = Path(ways["edits"]), ways["device"]
    edits = []
    for name in way["edits"]:
        one = name.split()[0]
        edits.append(_had(name, lambda one=one: Adapter.load(folder / one).to(device), f"edit {one}"))
    return model.edited(*edits) if edits else model


def _loaded(way: dict[str, Any], ways: dict[str, Any]) -> Expert:
    """A model by its name, or an expert that is a function, from its file."""
    if "file" not in way:
        dtype, options = getattr(torch, way["dtype"]), {"device": ways["device"], "revision": way["commit"]}
        return load(way["name"], dtype=dtype, **options, **ways["options"])
    try:
        raw = Path(way["file"]).read_bytes()
        if hashlib.sha256(raw).hexdigest() != way["sha256"]:  # a pickle runs code: only that which was sent
            raise ChassisError(f"{way['file']} is not what was written there: who else can write to that folder?")
        return torch.load(io.BytesIO(raw), map_location=ways["device"], weights_only=False)
    except (AttributeError, ImportError, OSError, RuntimeError, pickle.PickleError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.120}"
        why = f"a worker cannot load {way['name']} ({why}): put its class in a module that workers import"
        raise ChassisError(why) from error


# ------------------------------------------------------------------------------------------------------------- files


def _write(shard: Shard, sums: Statistics) -> None:
    """Write a shard's sums with its key."""
    tensors = {"n": torch.tensor([sums.train.n, sums.held.n])}
    tensors |= {f"{name}.{part}": getattr(getattr(sums, name), part) for name in ("train", "held") for part in SUMS}
    tensors |= {f"kept.{i}": part for i, part in enumerate(sums.kept)}
    write_tensors(shard.path, {name: part.cpu() for name, part in tensors.items()}, shard.whole_key)


def _read(shard: Shard, values: bool = True) -> dict[str, torch.Tensor] | str:
    """Tensors of a shard that is there and whole (none without `values`, and no checksum); or else why not."""
    return read_tensors(shard.path, shard.whole_key, values)


def _sums(tensors: dict[str, torch.Tensor], like: Statistics) -> Statistics:
    """The way back of `_write`."""
    parts = (tensors[f"{name}.{part}"] for name in ("train", "held") for part in SUMS)
    train, held = (Gram(n, *islice(parts, len(SUMS))) for n in tensors["n"].tolist())
    return replace(like, train=train, held=held, kept=tuple(tensors[f"kept.{i}"] for i in range(len(like.kept))))


# ------------------------------------------------------------------------------------------------- on who asks for it


def summed(parts: Iterable[Statistics]) -> Statistics:
    """The sum of one or more, in pairs, pairs of pairs and so on; log2(n) + 2 of n are held at a time, or fewer."""
    waiting: list[tuple[int, Statistics]] = []
    for part in parts:
        size = 1
        while waiting and waiting[-1][0] == size:
            size, part = 2 * size, waiting.pop()[1] + part
        waiting.append((size, part))
    total = waiting.pop()[1]
    while waiting:
        total = waiting.pop()[1] + total
    return total


def cuts(n: int, shard: int) -> list[tuple[int, int]]:
    """First prompt and end of every shard of n prompts; one that would hold fewer than eight goes to the last.

    All but the last begin and end at a multiple of eight, so that every eighth prompt is the same one as in one piece.
    """
    starts = [*range(0, n, shard)]
    if len(starts) > 1 and n - starts[-1] < FOLD:
        starts.pop()
    return [*zip(starts, [*starts[1:], n], strict=True)]


class Gathering:
    """`gather` with the same call and result, by `workers` processes here (none: this one), or those of a scheduler.

    A folder belongs to one base, expert, set of prompts and size of shard; passes of other features, layers or edits
    each have their own place in it. All compute with one thread, or as many as `OMP_NUM_THREADS` says.

    Args:
        out_dir: the folder, which workers elsewhere see under the same path.
        shard: prompts added up by one worker in one go, a multiple of eight: what a kill can cost.
        workers: processes on this machine.
        scheduler: address of a Dask scheduler, in place of them.
        retries: tries of a shard after one that failed.
        device: of the workers' models; that of the base unless given.
        **options: of `load`, on workers: `trust_remote_code`, or the `device_map` of a model that no one device holds.

    ChassisError, in `with`: another run is writing to the folder. When called: as for `gather`; a folder of something
    else; no answer from the scheduler; workers unlike this machine, without memory enough, or without the models; a
    shard that failed at every try.
    """

    def __init__(
        self, out_dir: str | Path, shard: int = 1024, workers: int = 0, scheduler: str | None = None, *,
        retries: int = 2, device: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if type(shard) is not int or shard < FOLD or shard % FOLD:
            raise ChassisError(f"shard = {shard!r}: give a multiple of {FOLD}, as every eighth prompt is held out")
        for name, value in (("workers", workers), ("retries", retries)):
            if type(value) is not int or value < 0:
                raise ChassisError(f"{name} = {value!r}: give a whole number, 0 or more")
        self.out, self.shard, self.retries = Path(out_dir).resolve(), shard, retries
        self._engine, self._device, self._options = (workers, scheduler), device, options
        self._stack: ExitStack | None = None
        self._executor: Executor | None = None
        self._saved: set[str] = set()  # edits that are in the folder for sure

    def __enter__(self) -> Self:
        busy = f"another gathering is writing to {self.out}: wait for its end, or give another folder"
        with ExitStack() as stack:
            stack.enter_context(locked(self.out / ".gathering.lock", busy))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        stack, self._stack, self._executor = self._stack, None, None
        _HELD.clear()
        stack.close()

    def __call__(
        self, base: LanguageModel, expert: Expert, probes: Probes, features: Features,
        positions: str = "all", layer: Place = -1, *, batch_tokens: int = 4096, progress: bool = True,
    ) -> Statistics:  # fmt: skip
        """What `gather` gives, made of the shards that are there and of those that workers add up now."""
        if self._stack is None:
            raise ChassisError("a gathering holds its folder while it is open: call it inside `with Gathering(...)`")
        # Bad input is refused before anything is run by a pass over the first prompts; it has the shape of all.
        some, options = replace(probes, prompts=probes.prompts[:FOLD]), {"batch_tokens": batch_tokens}
        tried = gather(base, expert, some, features, positions, layer, **options, progress=False)
        self._claim(base, expert, probes)
        whole, *shards = self._shards(tried, probes, batch_tokens)
        if self._unfit(whole, found := _read(whole)):
            name, like = f"{base.name} and {expert.name}, layer {tried.layer}", replace(tried, probes=())
            with tqdm(total=len(probes), desc=name, unit=" prompts", disable=not progress, leave=False) as bar:
                total = summed(self._parts(shards, like, bar))
            _write(whole, total)
        else:
            total = _sums(found, tried)
        # Sums of a shard are as large as those of all, and what a killed worker was at lies beside them.
        for path in whole.path.parent.glob("*"):
            if path.name not in (whole.path.name, TRIES):
                path.unlink(missing_ok=True)
        return replace(total, probes=(probes,))

    def _claim(self, base: LanguageModel, expert: Expert, probes: Probes) -> None:
        """Make the folder this gathering's own, or refuse one that holds anything else."""
        own = {"base": f"{base.name} ({base.bare.revision})", "expert": f"{expert.name} ({expert.revision})"}
        own |= {"probes": f"{probes.name} ({len(probes)} prompts, {probes.digest})", "shard": self.shard}

        def differs(theirs: dict[str, Any]) -> str:
            return ", ".join(f"{k} {theirs[k]} and not {own[k]}" for k in own if theirs[k] != own[k])

        claim(self.out, MARK, own, differs, "gathering", "folder")

    def _shards(self, tried: Statistics, probes: Probes, batch_tokens: int) -> list[Shard]:
        """What holds the sums of one pass in the end, and its shards, with all that a worker must know of them."""
        base, expert, device = tried.base, tried.expert, torch.device(self._device or tried.base.device)
        ways = {role: self._way(model, device) for role, model in (("base", base), ("expert", expert))}
        ways |= {"device": str(device), "options": self._options, "edits": str(self.out / "edits")}
        key = {"base": base.revision, "expert": expert.revision, "probes": probes.digest, "shard": self.shard}
        key |= {"features": asdict(tried.features), "positions": tried.positions, "layer": tried.layer}
        key |= {"batch_tokens": batch_tokens, "device": device.type, "held_out": [FOLD, KEPT]}
        key |= {"types": [str(one.model.dtype) for one in (base, expert) if isinstance(one, LanguageModel)]}
        folder = made(self.out / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16])
        # What makes a shard of the same name another one: not part of the name, so that it can be said.
        threads = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]
        key |= VERSIONS | {"threads": int(threads) if threads.isdecimal() else 1}
        ends = cuts(len(probes), self.shard)
        ways["needs"] = _needs(tried, batch_tokens, [probes.prompts[start:end] for start, end in ends])
        shards = [Shard(folder / "sum.safetensors", probes.name, probes.prompts, probes.split, key, ways)]
        for i, (start, end) in enumerate(ends):
            path, label = folder / f"{i:05d}.safetensors", f"{probes.name}[{start}:{end}]"
            shards.append(Shard(path, label, probes.prompts[start:end], probes.split, key, ways))
        return shards

    def _way(self, model: Expert, device: torch.device) -> dict[str, Any]:
        """How a worker comes by a model or an expert; what it cannot load by name is put into the folder."""
        way = {"name": model.name, "revision": model.revision, "held": f"{model.revision} {device}", "edits": []}
        alone = self._engine == (0, None)
        if not isinstance(model, LanguageModel):
            if alone:
                _HELD[way["held"]] = model
                return way
            path = self.out / "expert.pickle"
            try:
                with replacing(path) as temporary:
                    torch.save(model, temporary)
            except (AttributeError, TypeError, pickle.PickleError) as error:
                raise ChassisError(f"{model.name} cannot be sent to workers ({error!s:.150}): give a model") from error
            return way | {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for edit in model.edits:
            self._save(edit, model)
        bare, folder = model.bare, Path(model.name).expanduser()
        dtype = str(bare.model.dtype).removeprefix("torch.")
        way |= {"dtype": dtype, "held": f"{bare.revision} {dtype} {device}", "revision": bare.revision}
        way |= {"edits": [f"{edit.revision} {device}" for edit in model.edits]}
        if alone and device == bare.device:
            _HELD[way["held"]] = bare
            return way | {"commit": None}
        located(model.name)
        own = model.name not in bundled() and folder.is_dir()
        return way | {"name": str(folder.resolve()) if own else model.name,
                      "commit": getattr(bare.model.config, "_commit_hash", None)}  # fmt: skip

    def _save(self, edit: Adapter, model: LanguageModel) -> None:
        """Put an edit into the folder, under its revision, unless it is there."""
        if not isinstance(edit, Adapter):
            raise ChassisError(f"{model.name} has an edit that is no adapter ({type(edit).__name__}): it has no file")
        folder = self.out / "edits" / edit.revision
        if edit.revision in self._saved:
            return
        try:
            there = Adapter.load(folder).revision == edit.revision
        except ChassisError:
            there = False
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
            edit.save(folder)
        self._saved.add(edit.revision)

    def _parts(self, shards: list[Shard], like: Statistics, bar: tqdm) -> Iterator[Statistics]:
        """Shards in order, each as soon as it and those before it are there."""
        missing = [shard for shard in shards if self._unfit(shard, _read(shard, values=False))]
        waiting, ends = {shard.path for shard in missing}, self._made(missing)
        bar.update(sum(len(shard.prompts) for shard in shards if shard.path not in waiting))
        for shard in shards:
            while shard.path in waiting:
                one = next(ends)
                waiting.remove(one.path)
                bar.update(len(one.prompts))
            if self._unfit(shard, part := _read(shard)):
                part = [_read(one) for one in self._made([shard])][0]
            if isinstance(part, str):
                raise ChassisError(f"{shard.path} {part or 'is gone'}, as soon as it was made: check the disk")
            yield _sums(part, like)

    def _unfit(self, shard: Shard, found: dict[str, torch.Tensor] | str) -> bool:
        """Whether a shard must be made, and if it is there all the same, say why."""
        if found and isinstance(found, str):
            tqdm.write(f"{shard.path.relative_to(self.out)} ({shard.label}) {found} and is made again")
        return isinstance(found, str)

    def _made(self, shards: list[Shard]) -> Iterator[Shard]:
        """Shards as workers have made them; ChassisError: one of them failed at every try."""
        if not shards:
            return
        told = facts(self.out / MARK)
        if self._executor is None:
            self._executor = self._stack.enter_context(engine(told, *self._engine))
        ends = outcomes(self._executor, work_on(told), shards, self.retries, final=(ChassisError,))
        for shard, _, causes, ended in ends:
            if ended and not arrived(lambda shard=shard: isinstance(_read(shard, values=False), dict), PATIENCE):
                ended, causes = False, [*causes, "its file has not arrived here: is the folder shared?"]
            if not ended:
                raise ChassisError(f"{shard.label}: {len(causes)} tries failed, the last by {causes[-1]:.200}")
            yield shard


def _needs(tried: Statistics, batch_tokens: int, parts: Iterable[Sequence[str]]) -> int:
    """Bytes that a worker needs at most: models, sums and their copy for the file, a batch, the ids of a shard."""
    models = [one.bare for one in (tried.base, tried.expert) if isinstance(one, LanguageModel)]
    weights = (t for one in models for t in (*one.model.parameters(), *one.model.buffers(), one.readout.weight))
    p, q = (part.shape[1] for part in tried.kept[:2])
    # A batch's rows as they are found, joined, and in float64; and the states of all layers, twice.
    states = sum(2 * (one.num_layers + 1) * one.hidden_size for one in models)
    batch = 4 * batch_tokens * (4 * (p + q) + states)
    text = max(sum(len(prompt.encode()) for prompt in prompts) for prompts in parts)
    sums = 2 * 8 * p * (p + q) + KEPT * 4 * (p + q)
    held = sum(t.numel() * t.element_size() for t in weights if not t.is_meta)  # the rest is accelerate's to place
    return PYTHON + held + 2 * sums + batch + BYTE * text
