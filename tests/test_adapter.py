"""Adapters: the closed forms against a literal reading of the study, cuts, folders, refusals."""

import errno
import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import alignment  # noqa: F401  registers hidden, aligned and projected
from chassis_utils import Activations, Adapter, Features, LanguageModel, Probes, evaluate, fit, harvest, load
from chassis_utils.adapter import METHODS
from plugs import SyntheticExpert, exact_adapter

R = 4
# `descent`, `near` and `v2` have tests of their own, and are there only where their modules were imported.
HERE = sorted({*METHODS} - {"descent", "near", "told", "told_v1", "v2"})


@pytest.fixture(scope="module")
def exact(base: LanguageModel, synthetic: SyntheticExpert, prompts: Probes) -> Activations:
    """Activations of the rank-4 synthetic expert."""
    return harvest(base, synthetic, prompts, "all", progress=False)


@pytest.fixture(scope="module", params=["Llama", "Phi", "Granite"])
def other_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prompts: Probes
) -> Activations:
    """A head without bias, with bias, and with a scale."""
    root = tmp_path_factory.mktemp(request.param)
    models = [load(str(make(root / str(seed), request.param, seed)), device="cpu") for seed in (0, 1)]
    return harvest(*models, prompts, progress=False)


# ------------------------------------------------------------------------------------- closed forms


def study_ridge(x: torch.Tensor, y: torch.Tensor, lam: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """The study's, word for word."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    w = torch.linalg.solve(xc.T @ xc + lam * torch.eye(x.shape[1], dtype=x.dtype), xc.T @ yc)
    return w, y.mean(0) - x.mean(0) @ w


@pytest.mark.parametrize("layer", [1, 2])
def test_v1_is_the_studys_adapter(other_pair: Activations, layer: int) -> None:
    a, top_k = other_pair, 40
    head, head_bias = a.base.readout.weight.T.double(), a.base.readout.bias
    x = a.hidden[layer].double()
    expert_logits = a.expert.readout(a.expert_hidden).double()
    base_logits = x @ head + (0 if head_bias is None else head_bias.double())

    w, b = study_ridge(x, expert_logits)
    columns = w.norm(dim=0).topk(top_k).indices
    full, d = study_ridge(x, x @ w[:, columns] + b[columns] - base_logits[:, columns])
    u, s, v = torch.linalg.svd(full, full_matrices=False)

    for rank in (1, 5, 32):
        wanted = base_logits.clone()
        wanted[:, columns] += ((x @ u[:, :rank]) * s[:rank]) @ v[:rank] + d
        adapter = fit(a, "v1", rank, layer=layer, top_k=top_k)
        torch.testing.assert_close(adapter.logits(a.base, a.hidden).double(), wanted, atol=2e-3, rtol=1e-4)
        assert adapter.columns.tolist() == sorted(columns.tolist())
    torch.testing.assert_close(adapter.values.double(), s, rtol=1e-3, atol=1e-4)


def test_v1_takes_the_studys_share_of_the_vocabulary(activations: Activations) -> None:
    vocab = activations.base.vocab_size
    assert len(fit(activations, "v1").columns) == round(vocab * 2048 / 32000)
    assert len(fit(activations, "v1", top_k=vocab).columns) == vocab


def test_v1_can_read_a_middle_layer_through_the_norm(activations: Activations) -> None:
    base, x = activations.base, activations.hidden[1]
    plain, normed = (fit(activations, "v1", layer=1, normed=normed) for normed in (False, True))
    free = torch.ones(base.vocab_size, dtype=torch.bool)
    for adapter, state in ((plain, x), (normed, base.final_norm(x))):
        got, wanted = adapter.logits(base, activations.hidden), base.readout(state)
        kept = free.index_fill(0, adapter.columns, False)
        torch.testing.assert_close(got[:, kept], wanted[:, kept])


def test_the_lens_is_ridge_to_the_experts_logits(other_pair: Activations) -> None:
    for layer in other_pair.layers:
        x = other_pair.hidden[layer].double()
        w, b = study_ridge(x, other_pair.expert.readout(other_pair.expert_hidden).double())
        got = fit(other_pair, "lens", layer=layer).logits(other_pair.base, other_pair.hidden)
        torch.testing.assert_close(got.double(), x @ w + b, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["ridge", "rrr"])
def test_full_maps_are_ridge_to_the_difference_of_logits(other_pair: Activations, method: str) -> None:
    a = other_pair
    base_logits = a.base.readout(a.hidden[a.final]).double()
    for layer in a.layers:
        x = a.hidden[layer].double()
        w, b = study_ridge(x, a.expert.readout(a.expert_hidden).double() - base_logits)
        got = fit(a, method, layer=layer).logits(a.base, a.hidden).double().log_softmax(-1)
        torch.testing.assert_close(got, (base_logits + x @ w + b).log_softmax(-1), atol=2e-3, rtol=1e-4)


def test_aligned_is_ridge_between_hidden_states(activations: Activations) -> None:
    a = activations
    w, b = study_ridge(a.hidden[3].double(), a.expert_hidden.double())
    got = fit(a, "aligned").logits(a.base, a.hidden).double()
    wanted = a.base.readout((a.hidden[3].double() @ w + b).float())
    torch.testing.assert_close(got, wanted.double(), atol=2e-3, rtol=1e-4)


def test_projected_in_all_dimensions_is_aligned(activations: Activations) -> None:
    full, aligned = fit(activations, "projected", dim=32), fit(activations, "aligned")
    both = [x.logits(activations.base, activations.hidden) for x in (full, aligned)]
    torch.testing.assert_close(*both, atol=2e-3, rtol=1e-4)
    small = fit(activations, "projected", dim=5)
    assert small.rank == 5 and torch.linalg.matrix_rank(small.down @ small.up, rtol=1e-5) == 5


# ---------------------------------------------------------------------------------- exact recovery


@pytest.mark.parametrize("method", ["rrr", "hidden"])
def test_a_rank_r_expert_is_recovered_at_rank_r_and_not_below(exact: Activations, unseen: Probes, method: str) -> None:
    adapter = fit(exact, method)
    table = evaluate(exact.base, exact.expert, [adapter.at_rank(R), adapter.at_rank(R - 1)], [exact, unseen])
    kl = table.set_index(["split", "rank"]).kl
    for split in ("train", "test"):
        assert kl[split, R] <= 1e-6 < 1e-4 < kl[split, R - 1]
    assert table.kl_identity.min() > 1e-3


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rank=st.integers(1, 12), strength=st.floats(0.5, 20), seed=st.integers(0, 1000))
def test_any_synthetic_expert_has_its_exact_adapter(
    base: LanguageModel, unseen: Probes, rank: int, strength: float, seed: int
) -> None:
    expert = SyntheticExpert.from_base(base, rank, strength, seed)
    a = harvest(base, expert, unseen, "all", layers=[], progress=False)
    adapter = exact_adapter(base, expert)
    table = evaluate(base, expert, [adapter, fit(a, "rrr", rank)], a, allow_overlap=True)
    assert adapter.rank == rank
    assert abs(table.kl[1]) <= 1e-9 and table.kl[2] <= 1e-6 < table.kl[0]


def test_the_identity_is_the_bare_base(base: LanguageModel, activations: Activations) -> None:
    bare = base.readout(activations.hidden[3])
    assert torch.equal(Adapter.identity(base).logits(base, activations.hidden), bare)
    lens = Adapter.identity(base, layer=1, onto="normed")
    wanted = base.readout(base.final_norm(activations.hidden[1]))
    assert torch.equal(lens.logits(base, activations.hidden), wanted)


# ------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("method", HERE)
def test_lower_ranks_are_nested(activations: Activations, method: str) -> None:
    full = fit(activations, method)
    for rank in range(1, full.rank + 1):
        cut = full.at_rank(rank)
        assert cut.rank == rank and cut.up.shape[0] == rank
        assert torch.equal(cut.down, full.down[:, :rank]) and torch.equal(cut.up, full.up[:rank])
        assert cut.num_parameters == rank * (32 + cut.up.shape[1]) + cut.up.shape[1]
    two = full.at_rank(min(9, full.rank)).at_rank(2)
    assert torch.equal(two.up, fit(activations, method, rank=2).up)


@pytest.mark.parametrize("method", ["v1", "ridge", "lens", "aligned", "projected"])
def test_a_cut_is_the_best_map_of_its_rank(activations: Activations, method: str) -> None:
    full = fit(activations, method)
    whole = (full.down @ full.up).double()
    values = torch.linalg.svdvals(whole)
    for rank in (1, 3, full.rank - 1):
        cut = full.at_rank(rank)
        lost = float((whole - (cut.down @ cut.up).double()).norm())
        assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-3)


def test_reduced_rank_beats_the_plain_cut_in_fitted_error(activations: Activations) -> None:
    x = activations.hidden[3].double()
    target = x @ (full := fit(activations, "ridge")).down.double() @ full.up.double()

    def lost(method: str, rank: int) -> float:
        cut = fit(activations, method, rank)
        error = target - x @ cut.down.double() @ cut.up.double()  # either keeps the intercept of the full map
        return float(error.square().sum())

    values = torch.linalg.svdvals(target)
    for rank in (1, 4, 16):
        assert lost("rrr", rank) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
        assert lost("rrr", rank) < lost("ridge", rank)


@pytest.mark.parametrize("rank", [-1, 0, 33])
def test_ranks_that_do_not_exist_are_refused(activations: Activations, rank: int) -> None:
    for method in HERE:
        with refused(f"rank {rank} ", method):
            fit(activations, method, rank=rank)


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("method", [*HERE, "identity", "exact"])
def test_an_adapter_comes_back_equal(
    activations: Activations, synthetic: SyntheticExpert, tmp_path: Path, method: str
) -> None:
    base = activations.base
    if method in METHODS:
        adapter = fit(activations, method, layer=1 if method == "v1" else -1)
        adapter = adapter.at_rank(min(3, adapter.rank))
    else:
        adapter = Adapter.identity(base) if method == "identity" else exact_adapter(base, synthetic)
    folder = adapter.save(tmp_path / "deep" / "adapter")
    back = Adapter.load(folder, base)
    for name, value in vars(adapter).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(back, name), value) and getattr(back, name).dtype == value.dtype
        else:
            assert getattr(back, name) == value
    assert torch.equal(back.logits(base, activations.hidden), adapter.logits(base, activations.hidden))
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


@pytest.fixture
def saved(activations: Activations, tmp_path: Path) -> Path:
    return fit(activations, "rrr", rank=2).save(tmp_path / "adapter")


def test_an_adapter_folder_is_replaced_whole(activations: Activations, saved: Path) -> None:
    fit(activations, "v1", rank=5).save(saved)
    assert Adapter.load(saved).method == "v1" and Adapter.load(saved).rank == 5


def test_whatever_changes_what_an_adapter_does_changes_its_revision(activations: Activations) -> None:
    one = fit(activations, "v1", 2)
    others = [
        replace(one, onto="normed"),
        replace(one, onto="final"),
        replace(one, space="hidden"),
        replace(one, columns=one.columns.flip(0)),
        replace(one, columns=None),
        replace(one, layer=1),
        replace(one, bias=one.bias + 1),
        replace(one, edits=(replace(one, space="hidden"),)),
    ]
    assert len({adapter.revision for adapter in (one, *others)}) == 1 + len(others)
    assert replace(one, info={"n": 1}, fitted_on=frozenset()).revision == one.revision


def test_a_folder_that_is_no_adapter_is_never_overwritten(activations: Activations, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("in the way")
    adapter = fit(activations, "rrr", rank=2)
    for name in ("thesis", "file", "file/below"):
        with refused(str(tmp_path / name), "choose another"):
            adapter.save(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis"]


def test_what_cannot_be_written_leaves_nothing_behind(activations: Activations, saved: Path) -> None:
    odd = replace(fit(activations, "rrr", rank=3), info={"when": object()})
    with refused("settings cannot be written"):
        odd.save(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"] and Adapter.load(saved).rank == 2


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    activations: Activations, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, rename = fit(activations, "v1", rank=5), os.replace

    def stopped(source: Path, target: Path) -> None:
        if ".tmp" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopped)
        patched.setattr("chassis_utils.files._exchanged", lambda *_: False)
        with refused(str(saved), "cannot write", "Input/output error"):
            other.save(saved)
    assert Adapter.load(saved).method == "rrr" and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    # A disk that is full fails inside safetensors.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with refused(str(saved), "cannot write"):
            other.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Adapter.load(saved).method == "rrr" and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    # Where two folders cannot be exchanged in one step, two renames do it.
    with monkeypatch.context() as patched:
        patched.setattr("chassis_utils.files._exchanged", lambda *_: False)
        other.save(saved)
    assert Adapter.load(saved).method == "v1" and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    replace(other, method="again").save(saved)
    assert Adapter.load(saved).method == "again" and [p.name for p in saved.parent.iterdir()] == ["adapter"]
    # Through a link, the folder that it leads to.
    (saved.parent / "link").symlink_to(saved)
    other.save(saved.parent / "link")
    assert Adapter.load(saved).method == "v1" and (saved.parent / "link").is_symlink()


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(
    activations: Activations, saved: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    left, living, elsewhere, odd = (
        saved.with_name(f".adapter.{word}.tmp")
        for word in (f"{host}.{ended.pid}", f"{host}.{os.getppid()}", f"not-{host}.{ended.pid}", f"{host}.x")
    )
    for folder in (left, living, elsewhere, odd):
        folder.mkdir()
    fit(activations, "v1", rank=5).save(saved)
    assert Adapter.load(saved).method == "v1"
    assert {*saved.parent.iterdir()} == {saved, living, elsewhere, odd}


def _json(change: dict) -> object:
    def damage(folder: Path) -> None:
        plain = json.loads((folder / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps(plain | change))

    return damage


DAMAGE = {
    "no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "no json": lambda folder: (folder / "adapter.json").unlink(),
    "no tensors": lambda folder: (folder / "adapter.safetensors").unlink(),
    "broken json": lambda folder: (folder / "adapter.json").write_text('{"format": 1,'),
    "other json": lambda folder: (folder / "adapter.json").write_text("[1]"),
    "bytes": lambda folder: (folder / "adapter.json").write_bytes(b"\xff\xfe\x00"),
    "cut tensors": lambda folder: (folder / "adapter.safetensors").write_bytes(
        (folder / "adapter.safetensors").read_bytes()[:-50]
    ),
    "empty tensors": lambda folder: (folder / "adapter.safetensors").write_bytes(b""),
    "unknown field": _json({"colour": "red"}),
    "space": _json({"space": "outer"}),
    "onto": _json({"onto": "everything"}),
    "layer": _json({"layer": "last"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused(saved: Path, damage: str) -> None:
    DAMAGE[damage](saved)
    with refused(str(saved), "not a readable adapter folder"):
        Adapter.load(saved)


@pytest.mark.parametrize("name", ["down", "up", "bias"])
@pytest.mark.parametrize("kind", ["shape", "nan"])
def test_damaged_values_are_refused(activations: Activations, tmp_path: Path, name: str, kind: str) -> None:
    good = fit(activations, "rrr", rank=2)
    tensor = getattr(good, name)
    bad = tensor * torch.nan if kind == "nan" else tensor[..., :-1] if name != "up" else tensor[:-1]
    replace(good, **{name: bad}).save(tmp_path / "adapter")
    with refused("adapter"):
        Adapter.load(tmp_path / "adapter")


# ------------------------------------------------------------------------------------------ attacks


def _tensors(**change: torch.Tensor | None) -> object:
    """Other tensors in the file, None for one that is left out."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors") | change
        save_file({k: t for k, t in tensors.items() if t is not None}, folder / "adapter.safetensors")

    return damage


def _written(header: object, body: int, raw: bytes | None = None) -> object:
    """A safetensors file by hand, its body a hole of so many bytes."""

    def damage(folder: Path) -> None:
        text = json.dumps(header).encode() if raw is None else raw
        with (folder / "adapter.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + body)

    return damage


def _text(change: str) -> object:
    """JSON in which the first number of `lam` is written otherwise."""

    def damage(folder: Path) -> None:
        path = folder / "adapter.json"
        path.write_text(path.read_text().replace('"lam": 0.001', f'"lam": {change}'))
        assert change in path.read_text()

    return damage


def _outside(name: str) -> object:
    """A file that is a link to its copy somewhere else."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


class Payload:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


def _large(elements: int) -> dict:
    shapes = {"down": [32, 2], "up": [2, elements], "bias": [elements]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header


def _features(**change: object) -> dict:
    return {"places": [3], "random": 0, "kind": "relu", "width": 1.0, "seed": 0} | change


NOT_JSON = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000)
EDIT = {"method": "x", "layer": 1, "rank": 1, "base_name": "", "head_hash": "", "space": "hidden", "onto": "layer"}
EDIT |= {"features": None, "edits": [], "info": {}}
ATTACKS = {
    "a pickle": lambda folder: (folder / "adapter.safetensors").write_bytes(pickle.dumps(Payload())),
    "a pickle by torch": lambda folder: torch.save({"down": Payload()}, folder / "adapter.safetensors"),
    "deep json": lambda folder: (folder / "adapter.json").write_text("[" * 10**6),
    "deep json of the right size": lambda folder: (folder / "adapter.json").write_text("[" * 10**5 + "]" * 10**5),
    "large json": lambda folder: (folder / "adapter.json").write_text(" " * 2**20 + "{}"),
    "a header that claims": _written(_large(10**12), 100),
    "a header longer than the file": lambda folder: (folder / "adapter.safetensors").write_bytes(b"\xff" * 7 + b"\x0f"),
    "a header of two megabytes": _written(None, 0, b"{" + b" " * 2**21 + b"}"),
    "a file with a hole": _written(_large(2**34), 8 * 32 + 12 * 2**34),
    "a header that is no object": _written([1], 0),
    "a path in a name": _tensors(**{"../../owned": torch.zeros(1)}),
    "an absolute name": _tensors(**{"/owned": torch.zeros(1)}),
    "an edit before the first": _tensors(**{"edits.-1.down": torch.zeros(1, 1)}),
    "an edit that is not there": _tensors(**{"edits.7.down": torch.zeros(1, 1)}),
    "a name more": _tensors(gate=torch.zeros(1)),
    "a tensor less": _tensors(bias=None),
    "a tensor of whole numbers": _tensors(bias=torch.zeros(VOCAB, dtype=torch.long)),
    "a tensor of halves": _tensors(bias=torch.zeros(VOCAB, dtype=torch.float16)),
    "a bias of another length": _tensors(bias=torch.zeros(3)),
    "a bias in two dimensions": _tensors(bias=torch.zeros(1, VOCAB)),
    "infinity": _tensors(bias=torch.full((VOCAB,), torch.inf)),
    "values that are none": _tensors(values=torch.full((3,), torch.nan)),
    "columns before the first": _tensors(columns=torch.arange(VOCAB) - 1),
    "a name of two lines": _json({"base_name": "pocket\nbase"}),
    "a name that colours the terminal": _json({"base_name": "\x1b[31mbase"}),
    "a name without end": _json({"base_name": "x" * 10**5}),
    "a format of two lines": _json({"format": "3\n3"}),
    "rank": _json({"rank": 3}),
    "layer": _json({"layer": -1}),
    "a tensor in the json": _json({"down": [1]}),
    "info": _json({"info": []}),
    "edits": _json({"edits": {"a": 1}}),
    "an edit of nothing": _json({"edits": [None]}),
    "an edit without tensors": _json({"edits": [EDIT]}),
    "more random features than numbers": _json({"features": _features(random=10**9)}),
    "random features that are no number": _json({"features": _features(random="9")}),
    "half a random feature": _json({"features": _features(random=0.5)}),
    "a seed that is no number": _json({"features": _features(seed="0")}),
    "a width without end": _json({"features": _features(width=10**400)}),
    "a feature more": _json({"features": _features(code="import os")}),
    "no place": _json({"features": _features(places=[])}),
    "a place that is none": _json({"features": _features(places=[[3]])}),
    "tensors elsewhere": _outside("adapter.safetensors"),
    "json elsewhere": _outside("adapter.json"),
    "a pipe": lambda folder: ((folder / "adapter.json").unlink(), os.mkfifo(folder / "adapter.json")),
    "a folder for a file": lambda folder: ((folder / "adapter.json").unlink(), (folder / "adapter.json").mkdir()),
    "a link to the folder": lambda f: ((f / "adapter.json").unlink(), (f / "adapter.json").symlink_to(".")),
} | {f"{text[:9]} in json": _text(text) for text in NOT_JSON}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_folder_does_nothing_but_be_refused(
    saved: Path, base: LanguageModel, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ATTACKS[attack](saved)
    monkeypatch.chdir(saved.parent)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for port in (None, base):
        with refused(str(saved), "not a readable adapter folder"):
            Adapter.load(saved, port)
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
    assert not (saved.parent / "owned").exists()


HUGE = {
    "a map to more tokens than there are": _written(_large(2**28), 8 * 32 + 12 * 2**28),
    "rank without end": _written(
        {
            "down": {"dtype": "F32", "shape": [2**28, 2], "data_offsets": [0, 2**31]},
            "up": {"dtype": "F32", "shape": [2, 400], "data_offsets": [2**31, 2**31 + 3200]},
            "bias": {"dtype": "F32", "shape": [400], "data_offsets": [2**31 + 3200, 2**31 + 4800]},
        },
        2**31 + 4800,
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_the_base_does_not_have_is_not_read(saved: Path, base: LanguageModel, name: str) -> None:
    HUGE[name](saved)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(base.name, "sizes", "fit one for this base"):
        Adapter.load(saved, base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_random_features_need_their_own_numbers_in_the_file(saved: Path, base: LanguageModel) -> None:
    # As many as the map has rows beyond the state's own; the base says how wide the state is.
    for rows, random in ((32, 1), (40, 9), (40, 7), (31, 0)):
        _tensors(down=torch.zeros(rows, 2))(saved)
        _json({"features": _features(random=random)})(saved)
        with refused("sizes", base.name):
            Adapter.load(saved, base)
    # A map of no rank has no numbers, however many rows it says.
    _tensors(down=torch.zeros(10**9, 0), up=torch.zeros(0, VOCAB))(saved)
    _json({"features": _features(random=10**9 - 1), "rank": 0})(saved)
    with refused("not a readable adapter folder"):
        Adapter.load(saved)
    _tensors(down=torch.zeros(40, 2), up=torch.zeros(2, VOCAB))(saved)
    _json({"features": _features(random=8), "rank": 2})(saved)
    assert Adapter.load(saved, base).features.random == 8


def test_places_and_columns_are_those_of_the_base(saved: Path, base: LanguageModel) -> None:
    for change in ({"layer": 99}, {"features": _features(places=["block 99"])}, {"features": _features(places=["x"])}):
        good = (saved / "adapter.json").read_text()
        _json(change)(saved)
        with refused("does not exist", base.name):
            Adapter.load(saved, base)
        (saved / "adapter.json").write_text(good)
    columns = torch.arange(4)
    columns[-1] = base.vocab_size
    _tensors(columns=columns, up=torch.zeros(2, 4), bias=torch.zeros(4))(saved)
    with refused("tokens", base.name):
        Adapter.load(saved, base)


def test_a_folder_may_be_a_link(saved: Path, base: LanguageModel) -> None:
    (saved.parent / "link").symlink_to(saved)
    assert Adapter.load(saved.parent / "link", base).rank == 2
    # And its files may be links to one another's place.
    (saved / "adapter.json").rename(saved / "real.json")
    (saved / "adapter.json").symlink_to("real.json")
    assert Adapter.load(saved.parent / "link", base).rank == 2


def test_nothing_that_is_not_finite_is_written(activations: Activations, tmp_path: Path) -> None:
    for odd in (float("nan"), {1, 2}):
        with refused("settings cannot be written", "finite numbers"):
            replace(fit(activations, "rrr", 2), info={"lam": odd}).save(tmp_path / "a")
        assert not list(tmp_path.iterdir())


def test_another_format_is_refused(saved: Path) -> None:
    _json({"format": 99})(saved)
    with refused("99", "fit it again"):
        Adapter.load(saved)


def test_the_json_says_what_an_adapter_is_of(saved: Path, activations: Activations) -> None:
    base, expert, plain = activations.base, activations.expert, json.loads((saved / "adapter.json").read_text())
    known = {"format": 3, "method": "rrr", "rank": 2, "features": None, "base_name": base.name}
    assert known.items() <= plain.items() and plain["head_hash"] == base.head_hash
    told = {"expert": expert.name, "expert_revision": expert.revision, "base_revision": base.revision}
    told |= {"tokenizer_hash": base.tokenizer_hash, "licence": "unknown", "n": 90, "lam": 1e-3, "positions": "last"}
    assert told.items() <= plain["info"].items()


def test_another_tokenizer_or_body_is_refused(
    activations: Activations, fresh: LanguageModel, base: LanguageModel, tmp_path: Path
) -> None:
    adapter = fit(activations, "rrr", 2)
    assert adapter.check_base(fresh) is adapter
    with torch.no_grad():
        fresh.model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    fresh.__dict__.pop("revision", None)
    with refused("body", adapter.info["base_revision"], fresh.revision, base.name):
        adapter.check_base(fresh)
    words = make(tmp_path / "words", num_hidden_layers=3)
    path = words / "tokenizer.json"
    plain = json.loads(path.read_text())
    ids = plain["model"]["vocab"]
    ids["▁runs"], ids["▁rolls"] = ids["▁rolls"], ids["▁runs"]
    path.write_text(json.dumps(plain))
    other = load(str(words), device="cpu")
    assert other.head_hash == base.head_hash and other.revision == base.revision
    with refused("tokenizer", base.tokenizer_hash, other.tokenizer_hash, other.name):
        adapter.check_base(other)
    # What does not say is held to its head alone; edits of the base may come after the fit.
    assert replace(adapter, info={}).check_base(fresh)
    edit = replace(fit(activations, "hidden", 1), layer=1, onto="layer")
    assert adapter.check_base(base.edited(edit))


def test_an_adapter_of_another_base_is_refused(saved: Path, expert: LanguageModel, base: LanguageModel) -> None:
    assert Adapter.load(saved, base).rank == 2
    with refused(base.name, expert.name):
        Adapter.load(saved, expert)


# -------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("abacus", {}, ("abacus", "rrr", "v1")),
        (["rrr"], {}, ("['rrr']", "rrr", "v1")),
        (None, {}, ("None", "rrr", "v1")),
        ("rrr", {"top_k": 5}, ("rrr", "top_k")),
        ("v1", {"topk": 5}, ("v1", "topk", "top_k")),
        ("v1", {"top_k": 0}, ("top_k = 0",)),
        ("v1", {"top_k": 100_000}, ("top_k = 100000", "vocabulary")),
        ("projected", {"dim": 33}, ("dim = 33", "1..32")),
        ("rrr", {"layer": 4}, ("layer 4", "0..3")),
        ("rrr", {"layer": -5}, ("layer -5",)),
        ("rrr", {"lam": -1}, ("lam = -1",)),
    ],
)
def test_wrong_fits_are_refused(
    activations: Activations, method: object, options: dict, words: tuple[str, ...]
) -> None:
    with refused(*words):
        fit(activations, method, **options)


@pytest.mark.parametrize("wrong", ["pocket-base", None, 3])
def test_what_is_no_activations_is_refused(wrong: object) -> None:
    with refused("activations", type(wrong).__name__, "harvest"):
        fit(wrong, "rrr")


def test_a_map_that_is_not_finite_is_refused(activations: Activations) -> None:
    with refused("rrr", "infinity", "layer -1"):
        fit(replace(activations, expert_hidden=activations.expert_hidden * 1e38), "rrr")


def few(activations: Activations, n: int) -> Activations:
    """The first n rows."""
    hidden = {layer: h[:n] for layer, h in activations.hidden.items()}
    rest = {k: getattr(activations, k)[:n] for k in ("expert_hidden", "prompt", "next_token")}
    probes = replace(activations.probes, prompts=activations.probes.prompts[:n])
    return replace(activations, probes=probes, hidden=hidden, **rest)


@pytest.mark.parametrize("method", HERE)
def test_fewer_rows_than_dimensions_are_warned_about(activations: Activations, method: str) -> None:
    options = {"dim": 32} if method == "projected" else {}
    with pytest.warns(UserWarning, match=r"20 rows for 32 dimensions \(effective rank \d+\.\d\)"):
        fit(few(activations, 20), method, **options)


@pytest.mark.filterwarnings("ignore:.*interpolates")
def test_a_singular_system_is_refused(activations: Activations) -> None:
    with refused("singular", "lam = 0", "20 rows"):
        fit(few(activations, 20), "rrr", lam=0)


def test_hidden_sizes_may_differ_only_for_maps_to_logits(base: LanguageModel, prompts: Probes, tmp_path: Path) -> None:
    wide = load(str(make(tmp_path / "wide", hidden_size=48)), device="cpu")
    a = harvest(base, wide, prompts, progress=False)
    for method in ("hidden", "aligned", "projected"):
        with refused("32", "48", "rrr"):
            fit(a, method)
    table = evaluate(base, wide, [fit(a, method) for method in ("v1", "ridge", "rrr", "lens")], a)
    assert (table.kl[2:] < 0.5 * table.kl[0]).all()


def test_heads_that_cap_differently_are_refused(base: LanguageModel, prompts: Probes, tmp_path: Path) -> None:
    capped = load(str(make(tmp_path / "capped", "Gemma2")), device="cpu")
    for pair in ((base, capped), (capped, base)):
        with refused("cap", base.name, capped.name):
            fit(harvest(*pair, prompts, progress=False))


def test_more_factors_than_any_map_needs_are_refused(base: LanguageModel, tmp_path: Path) -> None:
    h, m = base.hidden_size, base.vocab_size
    for rank in (h + 1, h + 2):
        maps = (torch.zeros(shape) for shape in ((h, rank), (rank, m), (m,)))
        folder = Adapter("x", base.num_layers, *maps, base.name, base.head_hash).save(tmp_path / str(rank))
        if rank == h + 1:  # as behind without_intercept
            assert Adapter.load(folder, base).rank == rank
        else:
            with refused("not a readable adapter folder"):
                Adapter.load(folder, base)


def test_rows_of_features_that_memory_cannot_hold_are_refused_before_they_are_made(
    activations: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Features, "__call__", lambda *_: pytest.fail("features were made"))
    with refused("features need", "GiB", "fewer random features"):
        fit(activations, "rrr", features=Features((activations.final,), random=10**7))
