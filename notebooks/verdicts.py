"""Verdicts on the study's experiments, computed from records by a rule that is told beside each."""

from __future__ import annotations

import html
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path

import pandas as pd

from chassis_utils.errors import ChassisError
from locks import locked
from records import EXPERIMENTS, read_records, replace_text

FILE = "verdicts.json"
HELD_OUT = ("test", "template", "text")


@dataclass(frozen=True)
class Verdict:
    """What the records say of one experiment."""

    experiment: str
    verdict: str  #: `holds`, `artefact` or `open`
    claim: str  #: what the study concluded
    rule: str  #: when the claim holds, and when it is an artefact
    rows: list[dict] = field(default_factory=list)  #: the measurements it rests on

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<li>{html.escape(' '.join(str(v) for k, v in row.items() if k != 'value'))}: {row['value']:.3g}</li>"
            for row in self.rows
        )
        return (
            f'<div class="verdict verdict-{self.verdict}"><p><strong>Verdict: {self.verdict}.</strong> '
            f"<em>Claim:</em> {html.escape(self.claim)} <em>Rule:</em> {html.escape(self.rule)}</p>"
            f"<details><summary>The {len(self.rows)} measurements it rests on</summary><ul>{rows}</ul></details></div>"
        )


class Evidence:
    """Looks up single measurements of one experiment and remembers which were used."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.used: dict[str, dict] = {}

    def all(self, metric: str, method: str, field: str = "value", **where: object) -> list[float]:
        """Values (or interval ends) of a metric for a method, filtered by columns; lists mean any of."""
        rows = self.frame[(self.frame["metric"] == metric) & (self.frame["method"] == method)]
        for name, wanted in where.items():
            rows = rows[rows[name].isin(wanted if isinstance(wanted, list | tuple) else [wanted])]
        if rows.empty:
            said = ", ".join(f"{k} {v}" for k, v in where.items())
            raise LookupError(f"no {metric} of {method} ({said})")
        names = ("metric", "method", "expert", "probes", "split", "layer", "rank", "value")
        for index, row in rows.iterrows():
            self.used[str(index)] = {k: row[k] for k in names if not pd.isna(row[k])}
        return rows[field].astype(float).tolist()

    def each(self, metric: str, method: str, splits: Iterable[str] = HELD_OUT, **where: object) -> list[float]:
        """One value a split."""
        return [self.all(metric, method, split=split, **where)[0] for split in splits]

    def top(self, method: str, *splits: str, **where: object) -> list[float]:
        """Share recovered at the largest rank recorded, one value a split; the held-out ones unless given."""
        of, shares = self.frame[self.frame["method"] == method], []
        for split in splits or HELD_OUT:
            rank = of.loc[of["split"] == split, "rank"].max()
            shares += self.each("recovered", method, [split], rank=rank, **where)
        return shares

    def inner_layers(self) -> list[int]:
        """Layers of the study's own method below the deepest recorded, ascending."""
        layers = sorted(self.frame["layer"].dropna().unique())
        inner = [x for x in layers[:-1] if x in set(self.frame.loc[self.frame["method"] == "as_reported", "layer"])]
        if not inner:
            raise LookupError("no as_reported below the deepest layer")
        return inner


#: Whether the claim holds, and if not, whether it is an artefact.
Decision = tuple[bool, bool]


class _Rules(Evidence):
    """What decides an experiment, under its name: the rule that `experiments.json` tells."""

    def exact_adapter(self) -> Decision:
        splits, rank = ("val", *HELD_OUT), self.frame.loc[self.frame["method"] == "exact", "rank"].max()
        identity = self.each("kl", "identity", splits)
        both = [self.each("kl", method, splits, rank=rank) for method in ("exact", "hidden")]
        given, solved = ([x / y for x, y in zip(kl, identity, strict=True)] for kl in both)
        return max(given + solved) <= 1e-6, max(given) > 0.5

    def global_hidden_alignment(self) -> Decision:
        shares = self.top("as_reported")
        return min(shares) >= 0.9, shares[0] >= 0.9

    def projected_hidden_alignment(self) -> Decision:
        projected, whole = self.top("as_reported"), self.top("aligned")
        return whole[0] < 0, max(projected) < 0 and min(whole) >= 0.9

    def layerwise_tuned_lens(self) -> Decision:
        layers = self.inner_layers()
        test, *others = ([self.all("kl", "as_reported", split=s, layer=layer)[0] for layer in layers] for s in HELD_OUT)
        ratios = [sorted(x / y for x, y in zip(kl, test, strict=True)) for kl in others]
        return all(r[-1] <= 5 for r in ratios), all(r[len(r) // 2] > 5 for r in ratios)

    def final_adapter_rank_sweep(self) -> Decision:
        if min(self.top("as_reported")) >= 0.9:
            return True, False
        v1 = self.top("as_reported", "test") + self.top("v1_text", "text")
        mended = self.top("rrr", "test") + self.top("rrr_text", "text")
        return False, max(v1) < 0.1 and all(b > a for a, b in zip(v1, mended, strict=True))

    def multi_layer_rank_sweep(self) -> Decision:
        layers = self.inner_layers()
        v1 = [share for layer in layers for share in self.top("as_reported", layer=layer)]
        test = [self.top("rrr", "test", layer=layer)[0] for layer in layers]
        text = [self.top("rrr_text", "text", layer=layer)[0] for layer in layers]
        return max(text) < 0, max(v1) < 0 and min(test + text) > 0

    def stacked_adapters(self) -> Decision:
        real = [x for x in self.frame["expert"].dropna().unique() if not x.startswith("synthetic")]
        low, high = (self.all("recovered", "gain_stack", end, expert=real, split="text")[0] for end in ("low", "high"))
        whole, without = (self.each("kl", method) for method in ("as_reported", "without_middle"))
        idle = all(abs(x - y) <= 1e-9 * x for x, y in zip(whole, without, strict=True))
        transposed, inverted = (self.all("recovered", m, split="test")[0] for m in ("as_reported", "pseudo_inverse"))
        return high <= 0, low > 0 and idle and inverted > transposed

    def hidden_to_hidden(self) -> Decision:
        self.all("kl", "exact", split="test")
        own = self.frame[self.frame["method"] == "exact"].iloc[0]
        left = [1 - share for share in self.each("recovered", "hidden", rank=own["rank"], expert=own["expert"])]
        doubled, once = (self.top(method, "test", expert=own["expert"])[0] for method in ("as_reported", "aligned"))
        return left[0] > 0.5, max(left) <= 1e-6 and doubled < 0 and once >= 0.9

    def gradient_refinement(self) -> Decision:
        names = ("rrr", "closed_adam_1e-06_first", "closed_adam_1e-02_first")
        begin, gentle, studys = (1 - self.all("recovered", m, split="train")[0] for m in names)
        rise = self.all("ratio", "bohning", split="train")[0]
        return begin <= 1e-4 and gentle > 0.01, begin <= 1e-4 and studys > 0.01 and rise <= 1

    def comparison(self) -> Decision:
        kinds = ("as_reported", "mended")
        faulty, mended = ([self.all("recovered", f"{kind}_{m}", split="test")[0] for m in "abc"] for kind in kinds)
        ahead = mended[0] - max(mended[1:]) > 0.1
        return ahead and faulty[0] > max(faulty[1:]), mended[0] - min(mended[1:]) <= 0.1

    def stress_test(self) -> Decision:
        table = self.frame[self.frame["method"] == "as_reported"]
        where = {"split": "test", "rank": table["rank"].max()} | {k: [*set(table[k])] for k in ("base", "expert")}
        self.all("kl", "as_reported", **where)
        v1, mended = (self.all("recovered", method, **where) for method in ("v1", "rrr"))
        return min(v1) >= 0.9, max(v1) < 0.1 and min(mended) >= 0.5 and len(v1) == len(mended)

    def logit_bias_expert(self) -> Decision:
        others = ("safety", "style")  # on the same page, of another kind
        where = {"expert": [x for x in set(self.frame["expert"]) if not x.startswith(others)]}
        ranks = {"v1": self.frame.loc[self.frame["method"] == "v1", "rank"].max(), "bias_only": 0}
        v1, whole, alone = (
            [x for s in HELD_OUT for x in self.all("recovered", m, split=s, rank=ranks.get(m, ranks["v1"]), **where)]
            for m in ("v1", "v1_all_columns", "bias_only")
        )
        return min(v1) >= 0.9, max(v1) < 0.5 and min(whole) >= 0.9 and min(alone) >= 1 - 1e-6

    def same_tokenizer_expert(self) -> Decision:
        nearest, leaked = [], []
        for expert in self.frame["expert"].unique():
            highs: list[float] = []
            for name in ("v1", "rrr", "v2"):
                of = self.frame[(self.frame["method"] == name) & (self.frame["expert"] == expert)]
                highs += self.all("kl", name, "high", expert=expert, split="text", rank=of["rank"].max())
            nearest.append(min(highs))
            leaked += self.all("kl", "as_reported", expert=expert, split="test")
        return max(nearest) <= 0.01, max(leaked) <= 0.01

    def generate_and_rescore(self) -> Decision:
        (low,), (high,) = (self.all("recovered", "ridge", end, split="text") for end in ("low", "high"))
        (v1,), (own,) = self.all("recovered", "v1", split="test"), self.all("ratio", "own_text", split="test")
        return high <= 0, own >= 0.5 and v1 < 0 < low

    def vocab_bridge_stage_a(self) -> Decision:
        strings, placed = (self.all("coverage", kind, split="text")[0] for kind in ("string", "bytes"))
        (low,), (high,) = (self.all("recovered", "ridge", end, split="text") for end in ("low", "high"))
        (v1,) = self.all("recovered", "v1", split="test")
        return placed < 0.5 or high <= 0, placed >= 2 * strings and v1 < 0 < low

    def vocab_bridge_stage_b(self) -> Decision:
        names = ("string_a", "string", "bytes_a", "bytes")
        before, after, alone, pairs = (self.all("coverage", kind, split="text")[0] for kind in names)
        far, near = (self.all("total_variation", kind, split="text")[0] for kind in ("bytes_a", "bytes"))
        return near >= far, pairs - alone >= 5 * (after - before)

    def vocab_bridge_stage_c(self) -> Decision:
        (placed,) = self.all("coverage", "segments", split="text")
        ours, layer = (self.all("total_variation", kind, split="text")[0] for kind in ("segments", "layer"))
        (undecided,) = self.all("undecided", "exact", split="text")  # what the look-ahead itself may be off by
        return placed >= 0.95 and ours + undecided <= 0.05 and ours <= layer, False

    def vocab_bridge_exact(self) -> Decision:
        (off,) = self.all("total_variation", "exact_32", split="text")
        few, many = (self.all("undecided", f"exact_{n}", split="text")[0] for n in (32, 1000))
        return off <= 0.005 and few <= 0.05 and many <= 0.001, False

    def semantic_bridges(self) -> Decision:
        long = {"split": "text", "probes": "math corpus"}
        (rival,), (most,) = (self.all("recovered", "hidden_to_hidden", end, **long) for end in ("value", "high"))
        ours = {method: self.all("recovered", method, **long)[0] for method in ("v2", "natural", "natural_v2")}
        best = max(ours, key=ours.__getitem__)
        (low,), (bits,) = self.all("recovered", best, "low", **long), self.all("bits_per_byte", best, **long)
        (bare,) = self.all("bits_per_byte", "identity", **long)
        return ours[best] >= 1.5 * rival and low > most and bits < bare, False

    def best_adapter(self) -> Decision:
        of = self.frame[(self.frame["method"] == "v2") & (self.frame["metric"] == "recovered")]
        lows: list[float] = []
        if of.empty:
            raise LookupError("no recovered of v2")
        for expert, rank in of.groupby("expert")["rank"].max().items():
            lows += self.all("recovered", "v2", "low", expert=expert, rank=rank, split="text")
        return min(lows) >= 0.75, False

    def against_training(self) -> Decision:
        ours = self.all("kl", "v2", split="text")
        rivals = [m for m in dict.fromkeys(self.frame["method"]) if m.startswith("lora")]
        if not rivals:
            raise LookupError("no kl of lora")
        theirs, times = ([x for m in rivals for x in self.all(of, m, split="text")] for of in ("kl", "ratio"))
        return min(times) >= 1 and max(ours) <= min(theirs), False

    def api_expert(self) -> Decision:
        return min(self.all("recovered", "top_20", "low", split="text")) >= 0.9, False

    def port(self) -> Decision:
        right = self.all("ratio", "router", split="text")
        rivals = ("identity", "fixed_plug", "fixed_mixture")
        most = [high for rival in rivals for high in self.all("ratio", f"filtered_over_{rival}", "high", split="text")]
        return min(right) >= 0.95 and max(most) < 1, False

    def cost(self) -> Decision:
        there = [m for m in dict.fromkeys(self.frame["method"]) if m.startswith("predicted_")]
        stages = dict.fromkeys(["predicted_whole", "predicted_forward", *there])
        near = []
        for method in stages:
            shares = self.all("ratio", method.replace("predicted", "share"))
            near += [x for x, share in zip(self.all("ratio", method), shares, strict=True) if share >= 0.01]
        curves = ("law_final_layer", "law_last_block")
        lows, highs = ([x for m in curves for x in self.all("ratio", m, end)] for end in ("low", "high"))
        return min(near) >= 0.8 and max(near) <= 1.2 and max(lows) <= 1 <= min(highs), False


RULES = {name: decide for name, decide in vars(_Rules).items() if name in EXPERIMENTS}


def judge(records: str | Path | pd.DataFrame, experiment: str) -> Verdict:
    """Apply an experiment's rule to the records of a run; `open` if they lack what the rule needs.

    Args:
        records: run folder, records file, or the frame of `read_records`.
        experiment: a name in `RULES`.

    Raises:
        ChassisError: there is no rule of that name, or the records cannot be read.
    """
    if experiment not in RULES:
        nearest = ", ".join(get_close_matches(experiment, RULES, 3, 0))
        raise ChassisError(
            f"no rule decides '{experiment}': there are rules for {nearest} and {len(RULES) - 3} others; "
            "a new one is told in experiments.json and decided in verdicts.py, under the same name"
        )
    frame = records if isinstance(records, pd.DataFrame) else read_records(records)
    claim, text = (EXPERIMENTS[experiment][part] for part in ("claim", "rule"))
    evidence = _Rules(frame[frame["experiment"] == experiment])
    try:
        holds, artefact = RULES[experiment](evidence)
        verdict = "holds" if holds else "artefact" if artefact else "open"
    except LookupError as missing:
        verdict, text = "open", f"{text} Not decided: {missing} was recorded."
    return Verdict(experiment, verdict, claim, text, list(evidence.used.values()))


def write(run_dir: str | Path) -> list[Verdict]:
    """Judge every experiment that has records and write `verdicts.json` beside them; warn of a mixture of runs."""
    folder = Path(run_dir)
    frame = read_records(folder)
    if len({str(v) for v in frame["versions"]}) > 1:
        warnings.warn(f"{folder} holds records of other library versions too: run all notebooks again", stacklevel=2)
    verdicts = [judge(frame, name) for name in RULES if (frame["experiment"] == name).any()]
    with locked(folder / ".results.lock"):
        told = {v.experiment: {k: x for k, x in asdict(v).items() if k != "experiment"} for v in verdicts}
        replace_text(folder / FILE, json.dumps(told, indent=1, default=str) + "\n")
    return verdicts
