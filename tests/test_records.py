"""Records: what goes in comes out, whoever else writes, or one clear line."""

import json
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import same

from chassis_utils import LanguageModel, Probes, evaluate
from chassis_utils.errors import ChassisError
from plugs import SyntheticExpert, exact_adapter
from records import FIELDS, Records, forget, read_records, replace_text
from study import reported
from tables import TABLE, results_table, write_table


def sweep(
    folder: Path, experiment: str = "final_adapter_rank_sweep", notebook: str = "04", value: object = 0.5
) -> Records:
    records = Records(folder, experiment=experiment, notebook=notebook, base="pocket-base", expert="synthetic", seed=0)
    for rank in (1, 2):
        records.add(metric="kl", value=value, method="as_reported", split="test", rank=rank, layer=6, n=512)
    return records


def test_a_row_comes_back_as_it_went_in(tmp_path: Path) -> None:
    records = Records(
        tmp_path, experiment="port", notebook="x", base="b", expert="e", seed=np.int64(3), revision={"base": "a1"}
    )
    records.add(
        metric="kl",
        value=np.float64(0.1),
        method="ridge",
        split="val",
        rank=np.int32(4),
        n=torch.tensor(7),
        probes="mixed",
    )
    records.add(metric="seconds", value=torch.tensor(2.5), method="ridge", reported=1.5)
    returned = records.save()
    back = read_records(tmp_path)
    pd.testing.assert_frame_equal(returned, back)
    assert tuple(back.columns) == FIELDS
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert {k: line[k] for k in ("value", "rank", "n", "seed", "layer", "reported", "probes")} == {
        **{"value": 0.1, "rank": 4, "n": 7, "seed": 3, "layer": None, "reported": None, "probes": "mixed"}
    }
    assert type(line["rank"]) is type(line["n"]) is type(line["seed"]) is int
    assert line["revision"] == {"base": "a1"}
    assert set(line["versions"]) == {"python", "torch", "transformers", "chassis_utils"}
    assert line["time"].endswith("+00:00")


def test_the_frame_of_evaluate_becomes_one_row_a_figure(tmp_path: Path) -> None:
    nan = float("nan")
    frame = pd.DataFrame(
        {
            **{"base": "b", "expert": "e", "method": ["identity", "v1"], "rank": [nan, 4.0], "layer": [nan, 6.0]},
            **{"split": "test", "probes": "mixed", "n": 512, "kl": [0.4, 0.1], "kl_identity": 0.4},
            **{"recovered": [nan, 0.75], "top1_agreement": [0.5, 0.9], "bits_per_byte": nan},
        }
    )
    records = Records(tmp_path, experiment="final_adapter_rank_sweep", notebook="04", seed=0)
    records.add_frame(frame, reported=lambda row: 0.0948 if row["rank"] == 4 else None)
    saved = records.save()
    assert list(zip(saved["method"], saved["metric"], strict=True)) == [
        *[("identity", "kl"), ("identity", "top1_agreement")],
        *[("v1", "kl"), ("v1", "recovered"), ("v1", "top1_agreement")],
    ]
    kl = saved[saved["metric"] == "kl"].set_index("method")
    assert kl.loc["v1", "reported"] == 0.0948 and pd.isna(kl.loc["identity", "reported"])
    assert kl.loc["v1", "rank"] == 4 and pd.isna(kl.loc["identity", "rank"])
    assert saved[saved["metric"] != "kl"]["reported"].isna().all()


def test_saving_replaces_only_its_own_rows_and_sorts_by_the_book(tmp_path: Path) -> None:
    sweep(tmp_path, "zebra").save()
    sweep(tmp_path, "final_adapter_rank_sweep", "05").save()
    sweep(tmp_path).save()
    sweep(tmp_path, "exact_adapter", "01").save()
    before = (tmp_path / "results.jsonl").read_text().splitlines()
    sweep(tmp_path, value=0.25).save()
    rows = read_records(tmp_path)
    assert list(rows[["experiment", "notebook"]].drop_duplicates().itertuples(index=False, name=None)) == [
        *[("exact_adapter", "01"), ("final_adapter_rank_sweep", "04")],
        *[("final_adapter_rank_sweep", "05"), ("zebra", "04")],
    ]
    after = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False, True, True, True, True]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_two_equal_runs_give_equal_records_and_a_difference_is_named(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.5), ("c", 0.6)):
        records = sweep(tmp_path / name, value=value)
        records.add(metric="seconds", value=value * ord(name), method="as_reported")
        records.save()
        records.save()
    a, b, c = (read_records(tmp_path / name) for name in "abc")
    assert same(a, b) == []
    assert len(same(a, c)) == 2 and all("0.5 against 0.6" in line for line in same(a, c))
    assert same(a, a.iloc[1:])[0].startswith("only in the first: experiment=final_adapter_rank_sweep")
    assert same(a.iloc[1:], a)[0].startswith("only in the second")


def test_a_row_added_again_replaces_the_first(tmp_path: Path) -> None:
    records = sweep(tmp_path)
    records.add(metric="kl", value=9.0, method="as_reported", split="test", rank=1, layer=6, n=512)
    assert records.save()["value"].tolist() == [9.0, 0.5]


def _save_one(job: tuple[str, int]) -> None:
    sweep(Path(job[0]), f"experiment_{job[1]}").save()


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_save_one, [(str(tmp_path), i) for i in range(24)]))
    assert sorted(read_records(tmp_path)["experiment"].unique()) == sorted(f"experiment_{i}" for i in range(24))


def test_forget_removes_one_notebook(tmp_path: Path) -> None:
    forget(tmp_path, "04")
    sweep(tmp_path).save()
    sweep(tmp_path, notebook="05").save()
    forget(tmp_path, "04")
    assert set(read_records(tmp_path)["notebook"]) == {"05"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": float("nan")}, "value is not a finite number .nan.: .*method=v1 rank=4.*metric=kl"),
        ({"value": np.float32("inf")}, "not a finite number"),
        ({"value": torch.ones(2)}, "not a finite number"),
        ({"value": "much"}, "not a finite number"),
        ({"value": None}, "value is not a finite number"),
        ({"rank": 2.5}, "rank is not a whole number"),
        ({"reported": float("inf")}, "reported is not a finite number"),
        ({"metric": "kll"}, "unknown metric 'kll': choose from kl,"),
        ({"split": "dev"}, "unknown split 'dev': choose from train,"),
        ({"colour": "red"}, "unknown record field colour"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    records = Records(tmp_path, experiment="port", notebook="x")
    with pytest.raises(ChassisError, match=message) as caught:
        records.add(**{"metric": "kl", "value": 0.5, "method": "v1", "rank": 4} | fields)
    assert "\n" not in str(caught.value)
    assert records.save().empty


def test_a_wrong_default_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChassisError, match="unknown record field sed"):
        Records(tmp_path, experiment="port", notebook="x", sed=1).add(metric="kl", value=0.5, method="v1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-9], "half-written"),
        (lambda text: text.replace('"metric"', '"measure"'), "by another version"),
        (lambda text: "[]\n" + text, "by another version"),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, damage: object, message: str) -> None:
    sweep(tmp_path).save()
    path = tmp_path / "results.jsonl"
    path.write_text(damage(path.read_text()))
    damaged = path.read_text()
    with pytest.raises(ChassisError, match=message) as caught:
        read_records(tmp_path)
    assert "chassis run" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ChassisError, match=message):
        sweep(tmp_path).save()
    assert path.read_text() == damaged


def test_missing_records_and_an_unwritable_folder(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "results.jsonl", tmp_path / "nowhere"):
        with pytest.raises(ChassisError, match="no records at .*results.jsonl: run `chassis run` first"):
            read_records(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(ChassisError, match="cannot write .*: choose another folder"):
        sweep(tmp_path / "file").save()


def test_a_file_that_finds_no_room_leaves_the_old_one(tmp_path: Path) -> None:
    whole = sweep(tmp_path).save()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk would, at its 100th byte
    try:
        with pytest.raises(ChassisError, match="cannot write .*results.jsonl .*: choose another folder, or make room"):
            sweep(tmp_path, value=0.25).save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(read_records(tmp_path), whole) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".results.lock", "results.jsonl"]
    # A folder of that name is never taken for an older file.
    (tmp_path / "other" / "results.jsonl").mkdir(parents=True)
    with pytest.raises(ChassisError, match="cannot write"):
        replace_text(tmp_path / "other" / "results.jsonl", "text")
    assert [path.is_dir() for path in (tmp_path / "other").iterdir()] == [True]


def test_the_study_is_quoted_by_name() -> None:
    sweep_11 = reported("final_adapter_rank_sweep")
    assert dict(zip(sweep_11["ranks"], sweep_11["kl"]["test"], strict=True))[128] == 0.0093
    with pytest.raises(ChassisError, match="reports nothing as 'final': it has projected_hidden_alignment, "):
        reported("final")
    with pytest.raises(ChassisError, match="reports nothing as 'source'"):
        reported("source")


def test_the_table_gives_back_what_evaluate_measured(
    tmp_path: Path, base: LanguageModel, synthetic: SyntheticExpert, unseen: Probes
) -> None:
    exact = exact_adapter(base, synthetic)
    probes = [unseen, Probes("late", "val", unseen.prompts[:9])]
    frame = evaluate(base, synthetic, [exact.at_rank(r).named("exact") for r in (1, 4)], probes, positions="all")
    records = Records(tmp_path, experiment="exact_adapter", notebook="01", seed=3)
    records.add_frame(frame, reported=lambda row: 0.25 if row["method"] == "exact" and row["rank"] == 4 else None)
    records.save()
    table = results_table(tmp_path)
    pd.testing.assert_frame_equal(table, results_table(read_records(tmp_path / "results.jsonl")))
    assert tuple(table.columns) == TABLE and len(table) == len(frame) == 6
    renamed = frame.rename(columns={"kl_identity": "identity"}).reset_index(drop=True)
    figures = ["kl", "kl_low", "kl_high", "identity", "recovered", "recovered_low", "recovered_high"]
    names = ["method", "split", "probes", "n", "rank", "layer", "top1_agreement", "bits_per_byte"]
    pd.testing.assert_frame_equal(table[figures + names], renamed[figures + names], check_dtype=False)
    assert table.loc[table["rank"] == 4, "reported"].tolist() == [0.25, 0.25]
    assert table.loc[table["rank"].isna() | (table["rank"] == 1), "reported"].isna().all()


def test_each_row_of_the_table_has_the_identity_of_its_own_probes(tmp_path: Path) -> None:
    wanted = {}
    for i, experiment in enumerate(("exact_adapter", "stress_test")):
        records = Records(tmp_path, experiment=experiment, notebook=experiment, base="b", n=8)
        for j, expert in enumerate(("synthetic", "pocket-math")):
            for k, (split, probes) in enumerate((("test", "mixed"), ("test", "math"), ("text", "mixed"))):
                names = {"expert": expert, "split": split, "probes": probes}
                wanted[experiment, expert, split, probes] = bare = 1 + i / 10 + j / 100 + k / 1000
                records.add(metric="kl", value=0.5, method="v1", rank=2, low=0.4, high=0.6, **names)
                records.add(metric="kl", value=bare, method="identity", **names)
                records.add(metric="coverage", value=0.1, method="v1", **names)
        records.add(metric="kl", value=0.7, method="v1", rank=2, expert="no baseline", split="test", probes="mixed")
        records.save()
    table = results_table(tmp_path)
    assert len(table) == 2 * (6 * 2 + 1), "coverage is no row of its own"
    lone = table["expert"] == "no baseline"
    assert table.loc[lone, "identity"].isna().all() and lone.sum() == 2
    for row in table[~lone].itertuples():
        assert row.identity == wanted[row.experiment, row.expert, row.split, row.probes]
    assert set(table.loc[table["method"].eq("v1") & ~lone, "kl_low"]) == {0.4}


def test_the_table_is_written_as_csv_and_latex(tmp_path: Path) -> None:
    records = sweep(tmp_path, value=1 / 3)
    records.add(metric="kl", value=1e-17, method="50% & more_of #1", split="test", rank=1, layer=6, n=512)
    records.add(metric="kl", value=0.5, method="identity", split="test", n=512)
    records.save()
    table = write_table(tmp_path)
    back = pd.read_csv(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(back.astype(table.dtypes.to_dict()), table, check_exact=True)
    latex = (tmp_path / "results.tex").read_text()
    lines = [line for line in latex.splitlines() if line.startswith("final\\_adapter\\_rank\\_sweep & pocket-base &")]
    assert len(lines) == len(table) == 4
    assert all(line.count(" & ") == len(TABLE) - 1 and line.endswith(r"\\") for line in lines)
    assert r"50\% \& more\_of \#1" in latex and r"top1\_agreement" in latex and "nan" not in latex.lower()
    assert latex.startswith(r"\begin{longtable}") and r"\toprule" in latex and r"\bottomrule" in latex
    assert not list(tmp_path.glob(".*.tmp"))


def test_no_table_is_written_of_damaged_records(tmp_path: Path) -> None:
    sweep(tmp_path).save()
    write_table(tmp_path)
    before = (tmp_path / "results.csv").read_text()
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ChassisError, match="half-written"):
        write_table(tmp_path)
    assert (tmp_path / "results.csv").read_text() == before
    with pytest.raises(ChassisError, match="no records at"):
        results_table(tmp_path / "nowhere")
