"""Figures show what their controls claim, in every order of clicks, and refuse what they cannot draw."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

import plots
from chassis_utils.errors import ChassisError
from phase import phase_diagram

IDENTITY = {"text": 2.9, "train": 0.62, "val": 0.66, "template": 1.3, "test": 0.67}
RANKS = (4, 8, 16, 32, 64, 128)
FULL = ("as_reported", "rrr", "projected", "brand_new")


def row(method: str, split: str, kl: float, rank: int | None = None, layer: int | None = None) -> dict[str, Any]:
    return {"base": "b", "expert": "e", "method": method, "rank": rank, "layer": layer, "split": split, "probes": "p",
            "n": 512, "kl": kl, "kl_identity": IDENTITY[split], "recovered": 1 - kl / IDENTITY[split],
            "top1_agreement": 0.8, "bits_per_byte": 1.7 + kl if split == "text" else None}


def grid(methods: tuple[str, ...] = FULL, layers: tuple[int | None, ...] = (2, 4, 6),
         ranks: tuple[int | None, ...] = RANKS) -> pd.DataFrame:
    draw = random.Random(0)
    return pd.DataFrame([row(*key[:2], draw.uniform(0.001, 3), *key[2:])
                         for key in itertools.product(methods, IDENTITY, ranks, layers)]
                        + [row("identity", split, kl) for split, kl in IDENTITY.items()])


REPORTED = pd.DataFrame([{"method": "reported", "layer": layer, "rank": rank, "split": split, "kl": 0.1 / rank}
                         for layer in (10, 15, 22) for rank in RANKS for split in ("val", "test")])


def click(figure: dict[str, Any], button: dict[str, Any]) -> None:
    """Do to the figure's JSON what plotly does on a click: restyle traces, relayout axes."""
    traces, layout = (*button["args"], {})[:2]
    for key, values in traces.items():
        assert len(values) == len(figure["data"])
        for trace, value in zip(figure["data"], values, strict=True):
            trace[key] = value
    for key, value in layout.items():
        axis, *path = key.split(".")
        target = figure["layout"][axis]
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value


def drawn(figure: dict[str, Any]) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if trace.get("visible", True) and trace.get("yaxis", "y") == "y"]


def labels(menu: dict[str, Any]) -> list[str]:
    return [button["label"] for button in menu["buttons"]]


@pytest.mark.parametrize("reported", [None, REPORTED])
@pytest.mark.parametrize("draw, by", [(plots.kl_vs_rank, "layer"), (plots.kl_vs_depth, "rank")])
def test_every_combination_of_the_dropdowns_shows_exactly_what_they_say(draw: Any, by: str, reported: Any) -> None:
    frame = grid(FULL[:2], ranks=(8, 64))
    figure = json.loads(draw(frame, reported).to_json())
    first, second, third = figure["layout"]["updatemenus"]
    x = "rank" if by == "layer" else "layer"
    chosen: list[dict[str, Any]] = [menu["buttons"][menu["active"]] for menu in (first, second, third)]
    walk = random.Random(1)
    for _ in range(150):
        which = walk.randrange(3)
        chosen[which] = walk.choice((first, second, third)[which]["buttons"])
        click(figure, chosen[which])
        place, split, quantity = (button["label"] for button in chosen)
        column = plots.QUANTITIES[quantity][0]
        traces = drawn(figure)
        said = [(trace["text"], trace["y"]) for trace in traces if trace.get("mode") == "text" and trace["y"] != [None]]
        nothing = column == "bits_per_byte" and split != "text"
        assert said == ([([f"not measured on {split}"], [1])] if nothing else [])
        ours = [trace for trace in traces if trace["meta"][0] not in (None, "identity", "reported")]
        assert [trace["meta"][:3] for trace in ours] == [[method, place, split] for method in FULL[:2]]
        wanted = frame[(frame[by] == float(place.split()[1])) & (frame["split"] == split)]
        for trace in ours:
            expected = wanted[wanted["method"] == trace["meta"][0]].sort_values(x)
            assert trace["x"] == expected[x].tolist()
            assert [math.nan if value is None else value for value in trace["y"]] == pytest.approx(
                expected[column].tolist(), rel=1e-3, nan_ok=True)
        (identity,) = [trace for trace in traces if trace["meta"][0] == "identity"]
        level = {"kl": IDENTITY[split], "recovered": 0, "bits_per_byte": 1.7 + 2.9 if split == "text" else None}[column]
        assert identity["y"] == [pytest.approx(level)] * len(identity["x"])
        for trace in traces:
            assert trace["meta"][2] == split and trace["meta"][1] in (None, place)
        assert figure["layout"]["yaxis"]["type"] == plots.QUANTITIES[quantity][1]
        assert figure["layout"]["yaxis"]["title"]["text"] == plots.QUANTITIES[quantity][2]


def test_a_quantity_that_some_entries_lack_is_missed_there_alone() -> None:
    frame = grid(("rrr",))
    frame.loc[(frame["layer"] == 2) & (frame["split"] == "text"), "bits_per_byte"] = None
    figure = json.loads(plots.kl_vs_rank(frame, quantity="bits/byte", split="text").to_json())
    for button in figure["layout"]["updatemenus"][0]["buttons"]:
        click(figure, button)
        words = [trace["text"] for trace in drawn(figure) if trace.get("mode") == "text" and trace["y"] != [None]]
        assert words == ([["not measured on text"]] if button["label"] == "layer 2" else [])


def test_hovering_tells_the_interval_where_there_is_one() -> None:
    frame = grid(("rrr",)).assign(kl_low=0.25, kl_high=0.75)
    for told, span in ((frame, "0.25 to 0.75"), (frame.drop(columns=["kl_low", "kl_high"]), "–")):
        trace = next(t for t in plots.kl_vs_rank(told).data if t.meta[0] == "rrr")
        assert {point[4] for point in trace.customdata} == {span}


def test_what_is_shown_first_agrees_with_the_dropdowns_and_the_ticks_are_the_ranks() -> None:
    figure = json.loads(plots.kl_vs_rank(grid(), split="val", quantity="recovered").to_json())
    menus = figure["layout"]["updatemenus"]
    assert [labels(menu)[menu["active"]] for menu in menus] == ["layer 6", "val", "recovered"]
    assert labels(menus[1]) == list(plots.SPLITS)
    before = json.dumps(figure["data"], sort_keys=True)
    for menu in menus:
        click(figure, menu["buttons"][menu["active"]])
    for trace in json.loads(before):
        assert trace.pop("visible") in (True, False)
    assert before == json.dumps(figure["data"], sort_keys=True)
    assert figure["layout"]["xaxis"]["tickvals"] == list(RANKS)


def test_a_dropdown_with_one_entry_is_left_out_and_full_rank_is_a_flat_line() -> None:
    one = grid(("rrr",), layers=(6,))
    menus = plots.kl_vs_rank(one).to_dict()["layout"]["updatemenus"]
    assert [labels(menu)[0] for menu in menus] == ["train", "KL (log)"]
    both = pd.concat([one, pd.DataFrame([row("rrr", split, 0.5, None, 6) for split in IDENTITY])])
    (flat,) = [trace for trace in drawn(json.loads(plots.kl_vs_rank(both).to_json()))
               if trace["meta"][0] == "rrr" and trace["mode" if "mode" in trace else "name"] == "lines"]
    assert flat["y"] == [0.5] * len(RANKS) and "any rank" in flat["hovertemplate"]


def test_one_legend_entry_a_method_under_every_choice() -> None:
    figure = json.loads(plots.kl_vs_rank(grid(), REPORTED).to_json())
    for button in figure["layout"]["updatemenus"][0]["buttons"]:
        click(figure, button)
        shown = [trace["name"] for trace in figure["data"] if trace["visible"] and trace["showlegend"]]
        assert len(shown) == len(set(shown)) == len(FULL) + 2


def test_the_study_is_drawn_hollow_at_its_own_relative_depth() -> None:
    one_rank = REPORTED.assign(rank=None).drop_duplicates(["layer", "split"])
    figure = plots.kl_vs_depth(grid(("lens",), layers=(0, 3, 6), ranks=(None,)), one_rank)
    theirs = [trace for trace in figure.data if trace.meta[0] == "reported"]
    assert theirs and all(trace.xaxis == "x2" and "open" in trace.marker.symbol for trace in theirs)
    ours, study = figure.layout.xaxis.range, figure.layout.xaxis2.range
    for layer, same in ((6, 22), (0, 0), (3, 11)):
        assert (layer - ours[0]) / (ours[1] - ours[0]) == pytest.approx((same - study[0]) / (study[1] - study[0]))
    by_rank = plots.kl_vs_rank(grid(), REPORTED)
    assert {(trace.meta[1], trace.meta[3]) for trace in by_rank.data if trace.meta[0] == "reported"} == {
        ("layer 2", ", layer 10"), ("layer 4", ", layer 15"), ("layer 6", ", layer 22")}


def colours(figure: go.Figure) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for trace in (one for one in figure.data if one.meta[0]):
        found.setdefault(trace.meta[0], set()).add(trace.marker.color if trace.type == "bar" else trace.line.color)
    assert all(len(values) == 1 for values in found.values())
    return {method: values.pop() for method, values in found.items()}


def test_a_method_keeps_its_colour_in_every_figure() -> None:
    frame = grid()
    figures = [plots.kl_vs_rank(frame, REPORTED), plots.kl_vs_depth(frame), plots.bars(frame),
               plots.kl_vs_rank(frame[frame["method"].isin(["brand_new", "identity"])])]
    seen: dict[str, str] = {}
    for figure in figures:
        for method, colour in colours(figure).items():
            assert seen.setdefault(method, colour) == colour
    assert set(seen) == {*FULL, "identity", "reported"}
    assert seen["identity"] == plots.GREY and seen["brand_new"] not in plots.PALETTE


@pytest.mark.parametrize("colour", sorted({*plots.PALETTE, *plots.SPARE, plots.GREY, plots.template.layout.font.color,
                                           *(colour for _, colour, _, _ in plots.METHODS.values())}))
def test_every_colour_stands_out_on_white_and_on_black(colour: str) -> None:
    linear = [((part / 255 + 0.055) / 1.055) ** 2.4 for part in bytes.fromhex(colour[1:])]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / 0.056 >= 3


TOGETHER = [
    "identity reported as_reported v1 v1_normed v1_text v1_template ridge ridge_text rrr rrr_text rrr_template hidden "
    "aligned projected lens lens_text logit_lens exact",
    "as_reported without_middle pseudo_inverse identity", "rrr descent_rrr identity",
    "as_reported v1 hidden rrr rrr_hidden matched identity", "as_reported adam bohning accelerated lbfgs identity",
    "v2 v1 ridge rrr last_block layers inner relu fourier square rrr_limit last_block_limit v2_limit identity",
    "v2 rrr lora_4 lora_16 lora_64 lora_head head_only tuned_lens tuned_lens_adam tuned_lens_muon weight_svd "
    "weight_svd_blocks weight_svd_data weight_svd_data_blocks proxy identity",
    "v2 rrr lora_4 lora_16 lora_64 head_only tuned_lens tuned_lens_adam weight_svd_4 weight_svd_16 weight_svd_64 "
    "weight_svd_data_4 weight_svd_data_16 weight_svd_data_64 rrr_limit last_block_limit v2_limit identity"]


@pytest.mark.parametrize("figure", TOGETHER)
def test_methods_of_a_figure_differ_by_colour_and_what_they_were_fitted_on_by_dash(figure: str) -> None:
    together = {name: plots.METHODS[name] for name in figure.split()}
    for method, (label, colour, marker, dash) in together.items():
        assert "_" not in label
        for other, (words, shade, shape, line) in together.items():
            kin = method.split("_")[0] == other.split("_")[0] or {method, other} == {"reported", "as_reported"}
            assert method == other or (words != label and (marker, dash) != (shape, line))
            assert (colour == shade) == kin
    assert plots.style("rrr_text")[0] == "reduced rank, fitted on text"


# What red, green and blue (linear) become to a reader who lacks one kind of cone, at full severity: Machado, Oliveira
# and Fernandes (2009).
SEEN = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
WHITE = 0.95047, 1.0, 1.08883


def lab(colour: str, vision: str) -> list[float]:
    """CIE L*a*b* of a colour as a reader of that vision sees it: distances of 2 are just seen side by side."""
    linear = [((part / 255 + 0.055) / 1.055) ** 2.4 for part in bytes.fromhex(colour[1:])]
    for matrix in (SEEN[vision], XYZ):
        linear = [min(1.2, max(0.0, sum(map(math.prod, zip(row, linear, strict=True))))) for row in matrix]
    x, y, z = (math.cbrt(part / white) for part, white in zip(linear, WHITE, strict=True))
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def test_the_lack_of_a_cone_is_simulated_as_it_is_known() -> None:
    assert lab("#FFFFFF", "all cones") == pytest.approx([100, 0, 0], abs=0.1)
    assert lab("#FF0000", "all cones") == pytest.approx([53.2, 80.1, 67.2], abs=1)
    # Red and green of one lightness are the classic pair, blue and green of one lightness that of tritanopia.
    assert math.dist(lab("#C4554D", "deuteranopia"), lab("#8F7A5E", "deuteranopia")) < 13
    assert math.dist(lab("#C4554D", "all cones"), lab("#8F7A5E", "all cones")) > 35


@pytest.mark.parametrize("vision", SEEN)
@pytest.mark.parametrize("figure", [*TOGETHER, "palette"])
def test_colours_of_a_figure_can_be_told_apart_with_any_kind_of_colour_vision(figure: str, vision: str) -> None:
    shades = {plots.METHODS[name][1] for name in figure.split() if figure != "palette"}
    shades = shades or {*plots.PALETTE[:6], plots.GREY}
    least = min(math.dist(lab(a, vision), lab(b, vision)) for a, b in itertools.combinations(shades, 2))
    assert least > (20 if vision == "all cones" else 10)


@pytest.mark.parametrize("ranks", [(1, 2, 3, 6, 12, 24, 48, 96, 192), (24, 48, 96, 144, 173, 192), range(1, 193), (5,)])
def test_labels_of_ranks_have_room_on_a_telephone(ranks: Any) -> None:
    axis = plots.kl_vs_rank(grid(("rrr",), layers=(6,), ranks=tuple(ranks)), REPORTED.query("rank == 128")).layout.xaxis
    ticks = axis.tickvals
    assert max(ranks) in ticks and list(axis.ticktext) == [f"{tick:g}" for tick in ticks]
    width = 300 / math.log(max(*ranks, 128) / min(ranks))
    assert all(math.log(b / a) * width >= 24.9 for a, b in itertools.pairwise(ticks))


def test_bars_of_one_colour_differ_by_pattern() -> None:
    bars = plots.bars(grid(("rrr", "rrr_text", "rrr_template"), layers=(6,), ranks=(8,))).data
    assert len({bar.marker.color for bar in bars}) == 1 and len({bar.marker.pattern.shape for bar in bars}) == 3


def test_bars_tell_the_true_share_of_a_bar_that_is_cut_and_choose_on_val() -> None:
    frame = pd.DataFrame([row("rrr", "val", 0.1, 4), row("rrr", "test", 40.0, 4), row("rrr", "val", 0.2, 8),
                          row("rrr", "test", 0.001, 8)])
    bar = plots.bars(frame).data[0]
    assert bar.x[1] == -1 and bar.text[1] == "-5,870%" and bar.customdata[1][0] == 40
    assert plots.bars(frame, rank=8).data[0].customdata[1][0] == 0.001
    assert plots.bars(frame).layout.shapes[0].x0 == 0


def test_the_table_holds_the_study_the_reproduction_the_correction_and_the_identity() -> None:
    frame = pd.concat([grid(("as_reported",)), grid(("rrr",)).query("method == 'rrr'").assign(kl=0.00123456)])
    table = plots.comparison_table(frame, REPORTED, rank=8, layer=4)
    assert list(table.frame.columns) == ["reported", "reproduced", "corrected", "identity", "recovered, reproduced",
                                         "recovered, corrected", "n"]
    assert table.frame.index.tolist() == list(plots.SPLITS)
    cells = table._repr_html_()
    assert ">0.00123<" in cells and ">0.67<" in cells and "–" in cells and "rank 8, layer 4" in cells
    wanted = frame.query("method == 'as_reported' and rank == 8 and layer == 4 and split == 'test'")["kl"].item()
    assert table.frame.loc["test", "reproduced"] == wanted
    bounds = frame.assign(recovered=0.25, recovered_low=0.125, recovered_high=0.375)
    assert set(plots.comparison_table(bounds, rank=8, layer=4).frame["recovered, reproduced"]) == {
        "25% (12.5% to 37.5%)"}
    evil = plots.comparison_table(grid(("<b>x</b>",)))._repr_html_()
    assert "<b>" not in evil and "overflow-x:auto" in evil
    with pytest.raises(ChassisError, match="no row of method 'nope'"):
        plots.comparison_table(frame, corrected="nope")


def test_the_largest_figure_of_the_book_stays_light_and_carries_its_alternative_text() -> None:
    figure = plots.kl_vs_rank(grid(), REPORTED, title="A title long enough to need a second line on a telephone")
    assert len(figure.to_json()) < 60_000
    assert "NaN" not in figure.to_json() and "bdata" not in figure.to_json()
    assert "identity is at 0.67 nats" in figure.layout.meta["alt"]
    assert max(map(len, figure.layout.title.text.split("<br>"))) <= 42
    assert plots.bars(grid(), alt="what you see").layout.meta["alt"] == "what you see"


def test_an_exact_adapter_stays_on_the_log_axis_and_hover_tells_its_true_kl() -> None:
    frame = pd.DataFrame([row("exact", "test", kl, rank) for kl, rank in ((0.0, 4), (-1e-12, 8), (0.5, 16))])
    trace = plots.kl_vs_rank(frame).data[-1]
    assert min(trace.y) == plots.KL_FLOOR and [point[0] for point in trace.customdata] == [0, -1e-12, 0.5]


def test_the_first_dropdown_offers_any_column_of_numbers() -> None:
    sizes = (48, 192, 768)
    one = grid(("v2", "rrr"), layers=(6,), ranks=(*RANKS, None))
    frame = pd.concat([one.assign(n_train=n, kl=one["kl"] / n) for n in sizes])
    figure = json.loads(plots.kl_vs_rank(frame, REPORTED.query("layer == 22"), by="n_train").to_json())
    menu = figure["layout"]["updatemenus"][0]
    assert labels(menu) == [f"n_train {n}" for n in sizes] and menu["active"] == 2
    for button, n in zip(menu["buttons"], sizes, strict=True):
        click(figure, button)
        shown = [trace for trace in drawn(figure) if trace["y"] != [None]]
        assert [(trace["meta"][0], "mode" in trace) for trace in shown] == [
            ("identity", True), ("rrr", False), ("rrr", True), ("v2", False), ("v2", True), ("reported", False)]
        for trace in shown[1:5]:
            wanted = frame[(frame["method"] == trace["meta"][0]) & (frame["split"] == "test") & (frame["n_train"] == n)]
            flat = "mode" in trace
            wanted = wanted[wanted["rank"].isna()] if flat else wanted.dropna(subset="rank")
            assert trace["y"] == pytest.approx(wanted["kl"].tolist() * (len(RANKS) if flat else 1), rel=1e-3)
            assert trace["line"]["dash"] == ("dot" if flat else "solid")
    with pytest.raises(ChassisError, match="two rows measure .*'layer'"):
        plots.kl_vs_rank(frame)
    with pytest.raises(ChassisError, match="lacks the columns seeds"):
        plots.kl_vs_rank(frame, by="seeds")


def test_a_course_is_drawn_over_steps_or_seconds_and_one_point_alone_is_seen() -> None:
    steps = [{"method": "lora_16", "step": i, "kl": 0.5 / (i + 1), "seconds": 2.0 * i} for i in range(5)]
    courses = pd.DataFrame([*steps, {"method": "v2", "step": 0, "kl": 0.01, "seconds": 0.5},
                            {"method": "rrr", "step": 0, "kl": 0.02, "seconds": 0.0}])
    for log, first in ((False, 0), (True, 0.5)):
        figure = json.loads(plots.kl_vs_step(courses, 0.7, x="seconds", log_seconds=log).to_json())
        (menu,) = figure["layout"]["updatemenus"]
        assert labels(menu) == ["step", "seconds"] and menu["active"] == 1
        assert "KL against seconds" in figure["layout"]["meta"]["alt"]
        for word in ("seconds", "step", "seconds"):
            trained, v2, rrr = figure["data"]
            axis = figure["layout"]["xaxis"]
            assert (axis["title"]["text"], axis["type"]) == (word, "log" if log and word == "seconds" else "linear")
            assert trained["x"] == ([first, 2, 4, 6, 8] if word == "seconds" else [0, 1, 2, 3, 4])
            # What took no time stays on a log axis, and hovering tells the truth.
            assert (v2["x"], rrr["x"]) == (([0.5], [first]) if word == "seconds" else ([0], [0]))
            assert rrr["customdata"] == [[0, 0]] and v2["customdata"] == [[0, 0.5]]
            assert v2["marker"]["size"] == rrr["marker"]["size"] > 1.5 * trained["marker"]["size"]
            assert all("markers" in trace["mode"] for trace in figure["data"])
            click(figure, menu["buttons"][word == "step"])
    with pytest.raises(ChassisError, match="'epoch': choose one of step, seconds"):
        plots.kl_vs_step(courses, 0.7, x="epoch")


PHASE = pd.concat([grid(("rrr", "v1"), layers=(6,)).assign(
    expert_rank=expert, n_train=n, recovered_low=-0.1, recovered_high=0.9,
    recovered=lambda frame, shift=0.1 * expert + n / 1000: frame["recovered"] - shift)
    for expert in (2, 12) for n in (48, 192, 768)])


def test_the_phase_diagram_shows_one_map_and_the_right_one_under_every_choice() -> None:
    figure = json.loads(phase_diagram(PHASE, split="text").to_json())
    controls = [*(menu["buttons"] for menu in figure["layout"]["updatemenus"]), figure["layout"]["sliders"][0]["steps"]]
    chosen = [menu["buttons"][menu["active"]] for menu in figure["layout"]["updatemenus"]]
    chosen.append(controls[2][figure["layout"]["sliders"][0]["active"]])
    assert [one["label"] for one in chosen] == ["rrr", "text", "768"]
    walk = random.Random(2)
    for _ in range(60):
        (shown,) = [trace for trace in drawn(figure) if trace["xaxis"] == "x"]
        method, split, n = (one["label"] for one in chosen)
        rows = PHASE[(PHASE["method"] == method) & (PHASE["split"] == split) & (PHASE["n_train"] == int(n))]
        for y, expert in enumerate(figure["layout"]["yaxis"]["ticktext"]):
            for x, rank in enumerate(figure["layout"]["xaxis"]["ticktext"]):
                cell = rows[(rows["expert_rank"] == expert) & (rows["rank"] == rank)].iloc[0]
                assert shown["z"][y][x] == pytest.approx(cell["recovered"], rel=1e-3)
                told = [cell["kl"], cell["kl_identity"], cell["recovered"], 512, -0.1, 0.9, expert, rank]
                assert shown["customdata"][y][x] == pytest.approx(told, rel=1e-3)
        which = walk.randrange(3)
        chosen[which] = walk.choice(controls[which])
        click(figure, chosen[which])


def test_a_place_of_the_phase_diagram_that_was_not_measured_stays_empty_and_bad_frames_are_refused() -> None:
    part = PHASE[(PHASE["expert_rank"] == 2) | (PHASE["rank"] == 8)]
    figure = phase_diagram(part)
    assert figure.data[0].z[1].count(None) == len(RANKS) - 1 and figure.data[0].z[0].count(None) == 0
    assert "NaN" not in figure.to_json() and "no adapter" not in figure.layout.meta["alt"]
    assert "on test, fitted on 768 prompts" in figure.layout.meta["alt"]
    for frame, options, message in ((pd.concat([PHASE, PHASE]), {}, "two for one place"), (PHASE[:0], {}, "no share"),
                                    (PHASE.drop(columns="n_train"), {}, "lacks the columns n_train"),
                                    (PHASE, {"method": "lora"}, "no method 'lora'"),
                                    (PHASE, {"split": "dev"}, "no split")):
        with pytest.raises(ChassisError, match=message):
            phase_diagram(frame, **options)


@pytest.mark.parametrize("change, message", [
    (lambda frame: frame.iloc[:0], "no KL to draw"),
    (lambda frame: frame.assign(kl=math.nan), "no KL to draw"),
    (lambda frame: frame.drop(columns=["kl_identity", "n"]), "lacks the columns n, kl_identity"),
    (lambda frame: pd.concat([frame, frame]), "two rows measure"),
    (lambda frame: frame.assign(kl_identity=range(len(frame))), "more than one identity KL"),
])
@pytest.mark.parametrize("draw", [plots.kl_vs_rank, plots.kl_vs_depth, plots.bars, plots.comparison_table])
def test_a_frame_that_cannot_be_drawn_is_refused_in_one_line(draw: Any, change: Any, message: str) -> None:
    with pytest.raises(ChassisError, match=message) as error:
        draw(change(grid(("rrr",))))
    assert "\n" not in str(error.value)


def test_choices_that_were_not_measured_are_refused() -> None:
    frame = grid(("rrr",))
    for call, message in (
            (lambda: plots.kl_vs_rank(frame, quantity="speed"), "no quantity 'speed'"),
            (lambda: plots.kl_vs_rank(frame.assign(bits_per_byte=None), quantity="bits/byte"), "no quantity"),
            (lambda: plots.kl_vs_rank(frame, split="dev"), "no split 'dev'"),
            (lambda: plots.kl_vs_rank(frame.query("rank == 4").assign(rank=None)), "no row has a rank"),
            (lambda: plots.kl_vs_rank(frame[frame["method"] == "identity"]), "no row has a rank"),
            (lambda: plots.kl_vs_rank(frame, REPORTED.drop(columns="kl")), "lacks the columns kl"),
            (lambda: plots.bars(frame, rank=5), "no row of method 'rrr' at rank 5")):
        with pytest.raises(ChassisError, match=message):
            call()
