"""Verdicts on the study's experiments, computed from records by a rule that is written beside each."""

from __future__ import annotations

import html
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from .errors import ChassisError
from .records import locked, read_records, replace_text

FILE = "verdicts.json"
HELD_OUT = ("test", "template", "text")
KINDS = ("as_reported", "mended")


@dataclass(frozen=True)
class Verdict:
    """What the records say of one experiment."""

    experiment: str
    verdict: str
    """`holds`, `artefact` or `open`."""
    claim: str
    """What the study concluded."""
    rule: str
    """When the claim holds, and when it is an artefact."""
    rows: list[dict] = field(default_factory=list)
    """The measurements it rests on."""

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


Decide = Callable[[Evidence], str]
RULES: dict[str, tuple[str, str, Decide]] = {}


def rule(experiment: str, claim: str, text: str) -> Callable[[Decide], Decide]:
    """Register the rule that decides an experiment."""

    def register(decide: Decide) -> Decide:
        RULES[experiment] = (claim, text, decide)
        return decide

    return register


def judge(records: str | Path | pd.DataFrame, experiment: str) -> Verdict:
    """Apply an experiment's rule to the records of a run; `open` if they lack what the rule needs.

    Args:
        records: run folder, records file, or the frame of `read_records`.
        experiment: a name in `RULES`.

    Raises:
        ChassisError: there is no rule of that name, or the records cannot be read.
    """
    if experiment not in RULES:
        raise ChassisError(f"no rule decides '{experiment}': there are rules for {', '.join(RULES)}")
    frame = records if isinstance(records, pd.DataFrame) else read_records(records)
    claim, text, decide = RULES[experiment]
    evidence = Evidence(frame[frame["experiment"] == experiment])
    try:
        verdict = decide(evidence)
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


def _top(e: Evidence, method: str, split: str, **where: object) -> float:
    """Recovered share of a method at the largest rank it was recorded with."""
    rows = e.frame[(e.frame["method"] == method) & (e.frame["split"] == split)]
    return e.all("recovered", method, split=split, rank=rows["rank"].max(), **where)[0]


def _inner_layers(e: Evidence) -> list[int]:
    """Layers of the study's own method below the deepest recorded, ascending; LookupError if there are none."""
    layers = sorted(e.frame["layer"].dropna().unique())
    inner = [x for x in layers[:-1] if x in set(e.frame.loc[e.frame["method"] == "as_reported", "layer"])]
    if not inner:
        raise LookupError("no as_reported below the deepest layer")
    return inner


@rule(
    "exact_adapter",
    "A low-rank adapter can make the base equal to the expert.",
    "Holds if on every held-out split both the expert's own factors and the adapter solved at their rank leave at "
    "most a millionth of the identity KL; an artefact if the factors leave more than half of it on one; otherwise "
    "open.",
)
def _(e: Evidence) -> str:
    rank = e.frame.loc[e.frame["method"] == "exact", "rank"].max()
    splits = ("val", *HELD_OUT)
    identity = {s: e.all("kl", "identity", split=s)[0] for s in splits}
    given, solved = ([e.all("kl", m, split=s, rank=rank)[0] / identity[s] for s in splits] for m in ("exact", "hidden"))
    if max(given + solved) <= 1e-6:
        return "holds"
    return "artefact" if max(given) > 0.5 else "open"


@rule(
    "global_hidden_alignment",
    "One ridge map takes the base's hidden state to the expert's (the study gave no figure).",
    "Holds if the map of largest rank, fitted on templates, recovers at least 0.9 of the identity KL on every held- "
    "out split; an artefact of the templates if it does so on test but not on the others; otherwise open.",
)
def _(e: Evidence) -> str:
    shares = [_top(e, "as_reported", s) for s in HELD_OUT]
    if min(shares) >= 0.9:
        return "holds"
    return "artefact" if shares[0] >= 0.9 else "open"


@rule(
    "projected_hidden_alignment",
    "Aligning hidden states inside a random projection fails (KL above 10).",
    "Holds, as a failure of linear alignment, if the same ridge without the projection is worse than no adapter on "
    "test; an artefact of the projection if the projected map is worse than no adapter on every held-out split "
    "while the ridge without it, of largest rank, recovers at least 0.9 on each; otherwise open.",
)
def _(e: Evidence) -> str:
    projected, whole = ([_top(e, m, s) for s in HELD_OUT] for m in ("as_reported", "aligned"))
    if whole[0] < 0:
        return "holds"
    return "artefact" if max(projected) < 0 and min(whole) >= 0.9 else "open"


@rule(
    "layerwise_tuned_lens",
    "A ridge lens reads the expert's prediction from every layer (KL 0.002 to 0.23 on test).",
    "Judged below the last layer, where a synthetic expert is a linear image of the state and any lens is exact. "
    "Holds if on unseen templates and on real text every lens stays within five times its KL on test; an artefact "
    "of memorised templates if the median lens exceeds that on both; otherwise open.",
)
def _(e: Evidence) -> str:
    kl = {s: [e.all("kl", "as_reported", split=s, layer=layer)[0] for layer in _inner_layers(e)] for s in HELD_OUT}
    ratios = [sorted(x / y for x, y in zip(kl[s], kl["test"], strict=True)) for s in ("template", "text")]
    if all(r[-1] <= 5 for r in ratios):
        return "holds"
    return "artefact" if all(r[len(r) // 2] > 5 for r in ratios) else "open"


@rule(
    "final_adapter_rank_sweep",
    "The final-layer adapter v1 approaches the expert as its rank grows (KL 0.095 to 0.009).",
    "All at the largest rank. Holds if v1 recovers at least 0.9 of the identity KL on every held-out split. An "
    "artefact, of the columns it keeps, if v1 recovers less than a tenth both of the synthetic expert on test and, "
    "fitted on real text, of a real expert on other real text, while the difference in all columns, fitted on the "
    "same data, recovers more in both places. Otherwise open.",
)
def _(e: Evidence) -> str:
    if min(_top(e, "as_reported", s) for s in HELD_OUT) >= 0.9:
        return "holds"
    v1 = _top(e, "as_reported", "test"), _top(e, "v1_text", "text")
    mended = _top(e, "rrr", "test"), _top(e, "rrr_text", "text")
    return "artefact" if max(v1) < 0.1 and all(b > a for a, b in zip(v1, mended, strict=True)) else "open"


@rule(
    "multi_layer_rank_sweep",
    "Middle layers hurt: adapters there end at KL above 5.",
    "All at the largest rank, at every middle layer. Holds if the difference to the base's own logits, fitted on "
    "real text, is worse than no adapter on other real text. An artefact if v1 is worse than no adapter on every "
    "held-out split while that difference is better than none on test (fitted on the same prompts as v1) and on "
    "real text (fitted on other real text). Otherwise open.",
)
def _(e: Evidence) -> str:
    layers = _inner_layers(e)
    v1 = [_top(e, "as_reported", s, layer=layer) for s in HELD_OUT for layer in layers]
    test = [_top(e, "rrr", "test", layer=layer) for layer in layers]
    text = [_top(e, "rrr_text", "text", layer=layer) for layer in layers]
    if max(text) < 0:
        return "holds"
    return "artefact" if max(v1) < 0 and min(test + text) > 0 else "open"


@rule(
    "stacked_adapters",
    "Adapters at several layers in one pass end far from the expert (KL 41): middle layers hurt.",
    "By what edits at several layers, flowing through the later ones, add to the last adapter for a real expert on "
    "held-out text, paired by passage. Holds if the interval of that gain lies at zero or below. An artefact if it "
    "lies above, if in the study's way leaving the middle layers out changes no KL by a billionth, and if a "
    "pseudo-inverse in place of the head's transpose recovers more on test. Otherwise open.",
)
def _(e: Evidence) -> str:
    real = [x for x in e.frame["expert"].dropna().unique() if not x.startswith("synthetic")]
    where = {"expert": real, "split": "text"}
    low, high = (e.all("recovered", "gain_stack", field=end, **where)[0] for end in ("low", "high"))
    pairs = [[e.all("kl", m, split=s)[0] for m in ("as_reported", "without_middle")] for s in HELD_OUT]
    transposed, inverted = (e.all("recovered", m, split="test")[0] for m in ("as_reported", "pseudo_inverse"))
    if high <= 0:
        return "holds"
    idle = all(abs(x - y) <= 1e-9 * x for x, y in pairs)
    return "artefact" if low > 0 and idle and inverted > transposed else "open"


@rule(
    "hidden_to_hidden",
    "A regression from hidden state to hidden state fails (KL above 1).",
    "Holds if the difference of hidden states, fitted at the expert's rank, leaves half of the identity KL on test. An "
    "artefact, of adding the state twice, if on every held-out split it leaves at most a millionth, while the study's "
    "full map is worse than no adapter on test and the same map without the second state recovers at least 0.9 there. "
    "Otherwise open. On the synthetic expert.",
)
def _(e: Evidence) -> str:
    e.all("kl", "exact", split="test")
    own = e.frame[e.frame["method"] == "exact"].iloc[0]
    where = {"expert": own["expert"]}
    left = [1 - e.all("recovered", "hidden", split=s, rank=own["rank"], **where)[0] for s in HELD_OUT]
    doubled, once = (_top(e, m, "test", **where) for m in ("as_reported", "aligned"))
    if left[0] > 0.5:
        return "holds"
    return "artefact" if max(left) <= 1e-6 and doubled < 0 and once >= 0.9 else "open"


@rule(
    "gradient_refinement",
    "Refining the closed form by gradients destroys it (KL 8.98 on test after 50 epochs).",
    "On the training prompts, in shares of the identity KL. Holds if Adam, from a closed form that has lost less than "
    "a ten-thousandth, loses more than a hundredth in its first epoch even at the smallest step size that was tried. "
    "An artefact of the step if it does so at the study's step size only and no step of Böhning's, from v1, raises "
    "the KL. Otherwise open.",
)
def _(e: Evidence) -> str:
    names = ("rrr", "closed_adam_1e-06_first", "closed_adam_1e-02_first")
    begin, gentle, studys = (1 - e.all("recovered", m, split="train")[0] for m in names)
    rise = e.all("ratio", "bohning", split="train")[0]
    if begin > 1e-4:
        return "open"
    if gentle > 0.01:
        return "holds"
    return "artefact" if studys > 0.01 and rise <= 1 else "open"


@rule(
    "comparison",
    "Of the three, v1 is best: hidden-space regression fails and refinement destroys.",
    "By share of the identity KL recovered on test. Holds if v1 (a) recovers more than hidden-space regression (b) and "
    "refinement (c), both as reported and, by more than a tenth, with the fault of each taken away. An artefact of the "
    "faults if mended it is not ahead by a tenth of either. Otherwise open.",
)
def _(e: Evidence) -> str:
    faulty, mended = ([e.all("recovered", f"{kind}_{m}", split="test")[0] for m in "abc"] for kind in KINDS)
    if mended[0] - max(mended[1:]) > 0.1:
        return "holds" if faulty[0] > max(faulty[1:]) else "open"
    return "artefact" if mended[0] - min(mended[1:]) <= 0.1 else "open"


@rule(
    "stress_test",
    "v1 is robust over expert ranks and distributions (KL 0.0001 to 0.0100).",
    "On disjoint prompts, for every expert and distribution at the study's rank. Holds if v1 recovers at least 0.9 of "
    "the identity KL on test in each; an artefact of the baseline left out if it recovers less than a tenth in each, "
    "while the difference in all columns, fitted on the same prompts, recovers at least half in each; otherwise open.",
)
def _(e: Evidence) -> str:
    table = e.frame[e.frame["method"] == "as_reported"]
    where = {"split": "test", "rank": table["rank"].max()} | {k: [*set(table[k])] for k in ("base", "expert")}
    e.all("kl", "as_reported", **where)
    v1, mended = (e.all("recovered", method, **where) for method in ("v1", "rrr"))
    if min(v1) >= 0.9:
        return "holds"
    return "artefact" if max(v1) < 0.1 and min(mended) >= 0.5 and len(v1) == len(mended) else "open"
