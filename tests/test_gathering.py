"""Sums gathered in shards are those of one process, whoever adds them up, whatever is killed or damaged on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_edits import Push

import engines
import gathering
from chassis_utils import (
    Adapter,
    ChassisError,
    Features,
    LanguageModel,
    Probes,
    Statistics,
    fit,
    gather,
    harvest,
    load,
    probe_set,
    statistics,
)
from gathering import Gathering, cuts, summed
from plugs import SyntheticExpert

ROOT = Path(__file__).parents[1]
TEXT = probe_set("math-text", n=44)  # in shards of eight, the last one has twelve
STARTS = [*range(0, 40, 8)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads in this process as in every worker: sums are then rounded alike."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exact(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, LanguageModel]:
    """Models in float64, whose states, rounded to float32, do not depend on batches."""
    other = make(tmp_path_factory.mktemp("exact") / "expert", seed=2, num_hidden_layers=3)
    return tuple(load(str(one), device="cpu", dtype=torch.float64) for one in (folders["base"], other))


@pytest.fixture(scope="module")
def pocket() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-base", device="cpu"), load("pocket-math", device="cpu")


def final(base: LanguageModel) -> Features:
    return Features((base.num_layers,))


def tensors(sums: Statistics) -> list[torch.Tensor]:
    grams = [getattr(gram, name) for gram in (sums.train, sums.held) for name in ("n", "x", "y", "xx", "xy")]
    return [torch.as_tensor(part) for part in (*grams, *sums.kept)]


def same(a: Statistics, b: Statistics) -> bool:
    """Whether two are equal to the bit."""
    return all(torch.equal(one, other) for one, other in zip(tensors(a), tensors(b), strict=True))


def tried(out: Path) -> list[str]:
    """Numbers of the shards that were begun, of all passes."""
    return [line.split()[0] for path in sorted(out.glob("*/tries.txt")) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------- equal sums


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 90), shard=st.integers(1, 6), batch=st.sampled_from([1, 100, 4096]), random=st.randoms())
def test_any_shards_in_any_order_have_the_sums_of_one_process(
    exact: tuple[LanguageModel, LanguageModel], prompts: Probes, n: int, shard: int, batch: int, random: Any
) -> None:
    base, expert = exact
    some = replace(prompts, prompts=prompts.prompts[:n])
    run = {"features": Features((2, 3)), "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "KEPT", 40)
        whole = gather(base, expert, some, **run)
        ends = cuts(n, 8 * shard)
        parts = [replace(some, prompts=some.prompts[start:end]) for start, end in ends]
        parts = [gather(base, expert, one, batch_tokens=batch, **run) for one in parts]
        random.shuffle(parts)
        if len({*some.prompts}) < n:  # the same prompt may be in two shards
            parts = [replace(one, probes=()) for one in parts]
        for total in (summed(iter(parts)), reduce(add, parts)):
            assert len(total) == len(whole) and len(total.kept[0]) == min(40, whole.held.n)
            for one, other in zip(tensors(total), tensors(whole), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-10)
            assert all(torch.equal(one, other) for one, other in zip(total.kept, whole.kept, strict=True))


def test_the_rows_that_are_kept_are_those_of_least_key(exact: tuple[LanguageModel, LanguageModel]) -> None:
    base, expert = exact
    a = harvest(base, expert, TEXT, "all", progress=False)
    sums = gather(base, expert, TEXT, final(base), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "KEPT", 100)
        few = gather(base, expert, TEXT, final(base), progress=False)
    held = a.hidden[base.num_layers][a.prompt % 8 == 7]
    assert len(held) == sums.held.n > 300
    keys = sums.kept[2]
    assert keys.tolist() == sorted({*keys.tolist()}) and torch.equal(few.kept[2], keys[:100])
    # They come from all of the prompts and all of their lengths, as a draw would.
    assert {*map(tuple, sums.kept[0].tolist())} == {*map(tuple, held.tolist())}
    where = [held.eq(row).all(1).nonzero()[0, 0] for row in few.kept[0]]
    numbers = a.prompt[a.prompt % 8 == 7][torch.stack(where)]
    assert {*numbers.tolist()} == {7, 15, 23, 31, 39}
    assert 0.35 < float(torch.stack(where).double().mean()) / len(held) < 0.65


@given(st.integers(1, 5000), st.integers(1, 20))
def test_shards_hold_every_prompt_once_and_hold_out_the_same_ones(n: int, eighths: int) -> None:
    ends = cuts(n, 8 * eighths)
    assert [i for start, end in ends for i in range(start, end)] == [*range(n)]
    fold = min(8, n)
    held = [
        start + i
        for start, end in ends
        for i in range(end - start)
        if i % min(8, end - start) == min(8, end - start) - 1
    ]
    assert held == [i for i in range(n) if i % fold == fold - 1]


@given(st.integers(1, 200))
def test_a_sum_in_pairs_holds_few_parts_at_a_time(n: int) -> None:
    alive = most = 0

    class Part:
        def __init__(self, shards: tuple[int, ...]) -> None:
            nonlocal alive, most
            self.shards, alive = shards, alive + 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

        def __add__(self, other: Part) -> Part:
            return Part(self.shards + other.shards)

    assert summed(Part((i,)) for i in range(n)).shards == (*range(n),)
    assert most <= n.bit_length() + 2


def far(one: Adapter, other: Adapter) -> float:
    """Relative gap between two maps."""
    maps = [torch.cat([adapter.down.double() @ adapter.up.double(), adapter.bias[None]]) for adapter in (one, other)]
    return float((maps[0] - maps[1]).norm() / maps[0].norm())


def test_fits_to_shards_are_those_of_one_process(exact: tuple[LanguageModel, LanguageModel], prompts: Probes,
                                                 tmp_path: Path) -> None:  # fmt: skip
    base, expert = exact
    read = Features((3, 2, "block 2"))
    one, a = gather(base, expert, prompts, read, progress=False), harvest(base, expert, prompts, "all", progress=False)
    with Gathering(tmp_path / "sums", shard=24) as several:
        sums = several(base, expert, prompts, read, progress=False)
        for method in ("ridge", "rrr", "v2"):
            assert far(fit(one, method, lam=1e-2), fit(sums, method, lam=1e-2)) < 1e-6
        alone, spread, again = fit(a), fit(a, gather=several), fit(sums, gather=several)
    assert len(alone.edits) == len(spread.edits) == 3 and again.revision == spread.revision
    assert far(alone.edits[0], spread.edits[0]) < 1e-6
    # What edits change is added in float32, where rounding is of a batch.
    assert all(
        far(one, other) < 1e-4 for one, other in zip((alone, *alone.edits), (spread, *spread.edits), strict=True)
    )
    assert alone.info["held_out_kl"] == pytest.approx(spread.info["held_out_kl"], rel=1e-4)


# ------------------------------------------------------------------------------------------------ killed, damaged


SCRIPT = """
from chassis_utils import Features, load
from gathering import Gathering
from test_gathering import TEXT
base, expert = load("pocket-base", device="cpu"), load("pocket-math", device="cpu")
with Gathering("sums", shard=8) as gather:
    gather(base, expert, TEXT, Features((base.num_layers,)), progress=False)
"""


@pytest.fixture(scope="module")
def whole(pocket: tuple[LanguageModel, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """What nobody has killed."""
    with Gathering(tmp_path_factory.mktemp("whole") / "sums", shard=8) as several:
        return several(*pocket, TEXT, final(pocket[0]), progress=False)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process left that was killed at its fourth shard."""
    root = tmp_path_factory.mktemp("killed")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "notebooks", ROOT / "tests")))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=root, env=env)
    until(lambda: tried(root / "sums")[-1:] == ["00003"], process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return root / "sums"


def until(condition: Callable[[], Any], process: subprocess.Popen[Any] | None = None) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert (process is None or process.poll() is None) and time.monotonic() < limit
        time.sleep(0.01)


def test_a_killed_run_goes_on_to_the_same_bits(
    left: Path, whole: Statistics, pocket: tuple[LanguageModel, LanguageModel], tmp_path: Path
) -> None:
    out = shutil.copytree(left, tmp_path / "sums")
    begun = tried(out)
    with Gathering(out, shard=8) as several:
        assert same(several(*pocket, TEXT, final(pocket[0]), progress=False), whole)
        assert tried(out)[: len(begun)] == begun and len(tried(out)) <= len(STARTS) + 1
        assert sorted({*tried(out)}) == [f"{i:05d}" for i in range(len(STARTS))]
        before = tried(out)
        assert same(several(*pocket, TEXT, final(pocket[0]), progress=False), whole) and tried(out) == before
    [folder] = [path for path in out.iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["sum.safetensors", "tries.txt"]


def flip(path: Path) -> None:
    """Turn one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def other_torch(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(torch.__version__.encode()) == 1
    path.write_bytes(content.replace(torch.__version__.encode(), b"0" * len(torch.__version__)))


@pytest.mark.parametrize(
    "damage, said", [(flip, "is damaged"), (cut, "is damaged"), (other_torch, "is of other torch")]
)
def test_a_broken_shard_is_made_again_and_said(
    left: Path, whole: Statistics, pocket: tuple[LanguageModel, LanguageModel], tmp_path: Path,
    damage: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = shutil.copytree(left, tmp_path / "sums")
    [shard] = out.glob("*/00001.safetensors")
    damage(shard)
    with Gathering(out, shard=8) as several:
        assert same(several(*pocket, TEXT, final(pocket[0]), progress=False), whole)
    told = capsys.readouterr().out
    assert told == f"{shard.parent.name}/00001.safetensors (math-text[8:16]) {said} and is made again\n"
    assert tried(out).count("00001") == 2 and tried(out).count("00000") == 1


def test_a_broken_sum_is_made_again_and_said(
    exact: tuple[LanguageModel, LanguageModel], prompts: Probes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = (*exact, prompts, Features((1,)))
    with Gathering(tmp_path / "sums", shard=32) as several:
        one = several(*run, layer=2, progress=False)
        flip(next(tmp_path.glob("sums/*/sum.safetensors")))
        assert same(several(*run, layer=2, progress=False), one)
    assert "sum.safetensors (rivers) is damaged and is made again" in capsys.readouterr().out
    assert len(tried(tmp_path / "sums")) == 6


# ------------------------------------------------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def scheduler() -> Iterator[SimpleNamespace]:
    """A scheduler on loopback with two worker processes of 1.5 GiB each."""
    from distributed import LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1536MiB", "preload": [engines.QUIET]}
    with LocalCluster(host="127.0.0.1", dashboard_address="127.0.0.1:0", **options) as cluster:
        yield SimpleNamespace(address=cluster.scheduler_address)


def test_a_killed_worker_costs_one_shard(
    whole: Statistics, pocket: tuple[LanguageModel, LanguageModel], scheduler: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "sums"

    def kill() -> None:
        until(lambda: len(tried(out)) >= 3)
        os.kill(int(next(out.glob("*/tries.txt")).read_text().splitlines()[-1].split()[2]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with Gathering(out, shard=8, scheduler=scheduler.address) as several:
        assert same(several(*pocket, TEXT, final(pocket[0]), progress=False), whole)
    killer.join()
    assert len(STARTS) <= len(tried(out)) <= len(STARTS) + 1


def test_workers_fit_what_one_process_fits_to_the_bit(
    exact: tuple[LanguageModel, LanguageModel], prompts: Probes, scheduler: SimpleNamespace, tmp_path: Path
) -> None:
    base, expert = exact
    synthetic = SyntheticExpert.from_base(base, rank=4, strength=2.0)
    for number, one in enumerate((expert, synthetic)):
        found: list[Adapter] = []
        for where in ({}, {"scheduler": scheduler.address}):
            with Gathering(tmp_path / f"{number}{len(where)}", shard=24, **where) as several:
                sums = several(base, one, prompts, Features((3, 2, "block 2")), progress=False)
                found.append(fit(sums, gather=several))
        assert found[0].revision == found[1].revision
        assert bool(found[0].edits) == (one is expert)


def test_workers_spread_a_base_as_they_are_told(
    folders: dict[str, Path], prompts: Probes, tmp_path: Path
) -> None:
    where = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": str(tmp_path / "offload")}
    base = load(str(folders["base"]), **where)
    sums = gather(base, base, prompts, final(base), progress=False, batch_tokens=64)
    with Gathering(tmp_path / "sums", shard=24, workers=1, **where) as several:
        found = several(base, base, prompts, final(base), progress=False, batch_tokens=64)
    # States are float32, and those of a shard lie in other batches: on some processors their last bits differ.
    torch.testing.assert_close(found.train.xx, sums.train.xx, rtol=3e-5, atol=1e-4)


def test_a_try_that_fails_is_told_and_made_again(base: LanguageModel, prompts: Probes, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    plain = SyntheticExpert.from_base(base, rank=2)
    flaky = Flaky(plain.name, plain.revision, base.readout, fails=[3])
    with Gathering(tmp_path / "flaky", shard=32) as several:
        sums = several(base, flaky, prompts, final(base), progress=False)
    assert len(sums) == len(gather(base, plain, prompts, final(base), progress=False))
    assert "rivers[32:64]: try 1 of 3 failed, 0.0 s: OSError: the disk was away" in capsys.readouterr().out
    flaky = replace(flaky, fails=[*range(3, 9)], calls=[])
    with (
        Gathering(tmp_path / "never", shard=32) as several,
        refused("rivers[32:64]: 3 tries failed", "OSError: the disk"),
    ):
        several(base, flaky, prompts, final(base), progress=False)


@dataclass(frozen=True)
class Flaky:
    """Cannot be asked at some calls."""

    name: str
    revision: str
    readout: Any
    fails: list[int]
    calls: list[Any] = field(default_factory=list)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        if len(self.calls) in self.fails:
            raise OSError("the disk was away")
        return hidden


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shard": 4}, ("shard = 4", "multiple of 8")),
        ({"shard": 12}, ("shard = 12", "multiple of 8")),
        ({"shard": 8.0}, ("shard = 8.0", "multiple of 8")),
        ({"workers": -1}, ("workers = -1", "whole number")),
        ({"retries": None}, ("retries = None", "whole number")),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with refused(*words):
        Gathering(tmp_path / "sums", **options)
    assert not (tmp_path / "sums").exists()


def test_two_gatherings_do_not_mix(
    base: LanguageModel,
    expert: LanguageModel,
    synthetic: SyntheticExpert,
    prompts: Probes,
    unseen: Probes,
    tmp_path: Path,
) -> None:
    out, read = tmp_path / "sums", final(base)
    with Gathering(out, shard=32) as several:
        several(base, expert, prompts, read, progress=False)
        with refused(str(out), "another gathering is writing", "wait"), Gathering(out, shard=32):
            pass
        with refused(str(out), "holds probes rivers (90 prompts", "not council (40 prompts", "another folder"):
            several(base, expert, unseen, read, progress=False)
        with refused("holds expert", f"not {synthetic.name}", "another folder"):
            several(base, synthetic, prompts, read, progress=False)
    with refused("inside `with"):
        several(base, expert, prompts, read, progress=False)
    with Gathering(out, shard=40) as several, refused("holds shard 32 and not 40"):
        several(base, expert, prompts, read, progress=False)
    (out / gathering.MARK).write_text("{")
    with Gathering(out, shard=32) as several, refused("gathering.json that cannot be read"):
        several(base, expert, prompts, read, progress=False)
    (tmp_path / "notes.txt").touch()
    with Gathering(tmp_path, shard=32) as several, refused("holds notes.txt, which is of no gathering"):
        several(base, expert, prompts, read, progress=False)


def test_what_cannot_be_gathered_is_refused_before_anything_runs(
    base: LanguageModel, expert: LanguageModel, prompts: Probes, tmp_path: Path
) -> None:
    out = tmp_path / "sums"
    with Gathering(out, shard=32, scheduler="tcp://127.0.0.1:1") as several:
        for words, options in (
            (("layer 7", "does not exist"), {"layer": 7}),
            (("positions", "last or all"), {"positions": "first"}),
            (("no scheduler answers at tcp://127.0.0.1:1", "start one"), {}),
        ):
            with refused(*words):
                several(base, expert, prompts, final(base), progress=False, **options)
        with refused("one prompt"):
            several(base, expert, replace(prompts, prompts=prompts.prompts[:1]), final(base), progress=False)
        pushed = base.edited(Push(1, torch.ones(base.hidden_size)))
        with refused(base.name, "edit that is no adapter (Push)"):
            several(pushed, expert, prompts, final(base), progress=False)
    assert not tried(out)


def test_a_prompt_that_no_model_takes_ends_the_run_at_once(
    base: LanguageModel, expert: LanguageModel, prompts: Probes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = replace(prompts, prompts=(*prompts.prompts[:60], "river " * 3000, *prompts.prompts[60:]))
    with Gathering(tmp_path / "sums", shard=32) as several, refused("prompt 28 of 'rivers[32:64]'", "shorten"):
        several(base, expert, long, final(base), progress=False)
    assert tried(tmp_path / "sums") == ["00000", "00001"] and not capsys.readouterr().out


def test_what_workers_cannot_have_is_said_in_one_line(
    base: LanguageModel,
    expert: LanguageModel,
    prompts: Probes,
    scheduler: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    plain = SyntheticExpert.from_base(base, rank=2)
    local = Flaky(plain.name, plain.revision, base.readout, [])
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere := ModuleType("elsewhere"))
    elsewhere.Flaky = type("Flaky", (Flaky,), {"__module__": "elsewhere"})
    other_file = elsewhere.Flaky(plain.name, plain.revision, base.readout, [])
    nameless = LanguageModel("made here", base.model, base.tokenizer)
    page = "river " * 15_000
    vast = Probes("vast", "train", (*prompts.prompts, *[page] * 1024))
    for number, (one, other, probes, words) in enumerate((
        (base, expert, vast, ("a worker has 1.5 of the", "prompts need", "smaller shard")),
        (base, replace(local, calls=[lambda: 1]), prompts, (local.name, "cannot be sent to workers")),
        (base, other_file, prompts, ("a worker cannot load", "ModuleNotFoundError", "a module that workers import")),
        (nameless, expert, prompts, ("no model or folder 'made here'",)),
    )):  # fmt: skip
        with Gathering(tmp_path / f"{number}", 1024, scheduler=scheduler.address) as several, refused(*words):
            several(one, other, probes, final(base), progress=False)
        assert not [*tmp_path.glob(f"{number}/*/sum.safetensors")]


def test_a_worker_with_other_weights_is_refused(folders: dict[str, Path], prompts: Probes, scheduler: SimpleNamespace,
                                                tmp_path: Path) -> None:  # fmt: skip
    folder = shutil.copytree(folders["base"], tmp_path / "model")
    base, expert = load(str(folder), device="cpu"), load(str(folders["expert"]), device="cpu")
    shutil.rmtree(folder)
    make(folder, num_hidden_layers=3, seed=5)
    with Gathering(tmp_path / "sums", 32, scheduler=scheduler.address) as several, refused("model is another on"):
        several(base, expert, prompts, final(base), progress=False)
    assert json.loads((tmp_path / "sums" / gathering.MARK).read_text())["shard"] == 32


def test_an_edit_that_was_damaged_is_written_again(
    base: LanguageModel, expert: LanguageModel, prompts: Probes, tmp_path: Path
) -> None:
    a = harvest(base, expert, prompts, "all", [-1], progress=False)
    zero = replace(Adapter.identity(base, 1), space="hidden", onto="layer", bias=torch.ones(base.hidden_size))
    edit = replace(zero, up=torch.zeros(0, base.hidden_size))
    port = base.edited(edit)
    wanted = gather(port, expert, a.probes, final(base), progress=False)
    for _ in range(2):
        with Gathering(tmp_path / "sums", shard=32) as several:
            found = several(port, expert, a.probes, final(base), progress=False)
        torch.testing.assert_close(found.train.xx, wanted.train.xx, rtol=1e-5, atol=1e-3)
        (tmp_path / "sums" / "edits" / edit.revision / "adapter.json").write_text("{}")
        shutil.rmtree(next(tmp_path.glob("sums/*/tries.txt")).parent)
    with pytest.raises(ChassisError):
        Adapter.load(tmp_path / "sums" / "edits" / edit.revision)


@dataclass
class Ran:
    """Makes a file when it is unpickled."""

    mark: Path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.mark,)


def test_an_expert_that_somebody_else_put_there_is_never_run(base: LanguageModel, tmp_path: Path) -> None:
    """A pickle runs code: a worker takes only the one it was told the hash of."""
    plain = SyntheticExpert.from_base(base, rank=2)
    with Gathering(tmp_path / "sums", 32, workers=1) as several:
        way = several._way(plain, torch.device("cpu"))
    assert gathering._loaded(way, {"device": "cpu"}).revision == plain.revision
    mark = tmp_path / "ran"
    torch.save(Ran(mark), way["file"])
    with refused("is not what was written there"):
        gathering._loaded(way, {"device": "cpu"})
    assert not mark.exists()
    torch.load(way["file"], weights_only=False)
    assert mark.exists(), "it would have run"
