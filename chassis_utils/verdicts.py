"""Verdicts on the study's experiments, computed from records by a rule that is written beside each."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from .errors import ChassisError
from .records import locked, read_records, replace_text

FILE = "verdicts.json"
HELD_OUT = ("test", "template", "text")


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

    def all(self, metric: str, method: str, **where: object) -> list[float]:
        """Values of a metric for a method, filtered by columns; lists mean any of."""
        rows = self.frame[(self.frame["metric"] == metric) & (self.frame["method"] == method)]
        for name, wanted in where.items():
            rows = rows[rows[name].isin(wanted if isinstance(wanted, list | tuple) else [wanted])]
        if rows.empty:
            said = ", ".join(f"{k} {v}" for k, v in where.items())
            raise LookupError(f"no {metric} of {method} ({said})")
        names = ("metric", "method", "expert", "probes", "split", "layer", "rank", "value")
        for index, row in rows.iterrows():
            self.used[str(index)] = {k: row[k] for k in names if not pd.isna(row[k])}
        return rows["value"].astype(float).tolist()


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
    """Judge every experiment that has records and write `verdicts.json` beside them."""
    folder = Path(run_dir)
    frame = read_records(folder)
    verdicts = [judge(frame, name) for name in RULES if (frame["experiment"] == name).any()]
    with locked(folder / ".results.lock"):
        told = {v.experiment: {k: x for k, x in asdict(v).items() if k != "experiment"} for v in verdicts}
        replace_text(folder / FILE, json.dumps(told, indent=1, default=str) + "\n")
    return verdicts


def _layers(e: Evidence, least: int = 1) -> list[int]:
    """Layers of the study's own method, ascending; LookupError if they are fewer than `least`."""
    layers = sorted(e.frame.loc[e.frame["method"] == "as_reported", "layer"].dropna().unique())
    if len(layers) < least:
        raise LookupError(f"no as_reported at {least} layers or more")
    return layers


@rule(
    "exact_adapter",
    "A low-rank adapter can make the base equal to the expert.",
    "Holds if the exact adapter leaves at most a millionth of the identity KL on every held-out split.",
)
def _(e: Evidence) -> str:
    pairs = [(e.all("kl", "exact", split=s)[0], e.all("kl", "identity", split=s)[0]) for s in HELD_OUT]
    return "holds" if all(kl <= 1e-6 * identity for kl, identity in pairs) else "artefact"


@rule(
    "global_hidden_alignment",
    "One ridge map takes the base's hidden state to the expert's.",
    "Holds if the full map, fitted on templates, recovers at least 0.9 of the identity KL on every held-out split; an "
    "artefact of the probes if it does so on the templates it was fitted on but not elsewhere.",
)
def _(e: Evidence) -> str:
    shares = {s: e.all("recovered", "as_reported", split=s, rank=e.frame["rank"].max())[0] for s in HELD_OUT}
    if min(shares.values()) >= 0.9:
        return "holds"
    return "artefact" if shares["test"] >= 0.9 else "open"


@rule(
    "projected_hidden_alignment",
    "Aligning hidden states in a random projection fails (KL above 10), so a linear map is not enough.",
    "Holds if the map without the projection is worse than no adapter too; an artefact of the projection if the "
    "projected map is worse than no adapter on test while the difference of hidden states, fitted on the same data, "
    "recovers at least 0.9.",
)
def _(e: Evidence) -> str:
    projected = e.all("recovered", "as_reported", split="test")[0]
    full = max(e.all("recovered", "hidden", split="test"))
    if projected < 0 and full >= 0.9:
        return "artefact"
    return "holds" if full < 0 else "open"


@rule(
    "layerwise_tuned_lens",
    "A ridge lens reads the expert's prediction from every layer (KL 0.002 to 0.23 on test).",
    "Holds if on unseen templates and real text each lens stays within five times its KL on the study's own templates; "
    "an artefact of memorised templates if the median layer exceeds that on both.",
)
def _(e: Evidence) -> str:
    kl = {s: [e.all("kl", "as_reported", split=s, layer=layer)[0] for layer in _layers(e)] for s in HELD_OUT}
    ratios = [sorted(x / y for x, y in zip(kl[s], kl["test"], strict=True)) for s in ("template", "text")]
    if all(r[-1] <= 5 for r in ratios):
        return "holds"
    return "artefact" if all(r[len(r) // 2] > 5 for r in ratios) else "open"


@rule(
    "final_adapter_rank_sweep",
    "The final-layer adapter approaches the expert as its rank grows (KL 0.095 to 0.009).",
    "Holds if at its largest rank v1 recovers at least 0.9 of the identity KL on every held-out split; an artefact of "
    "synthetic expert and templates if it recovers less than a tenth on real text or for a real expert while the same "
    "data, fitted on the difference in all columns, recovers more than v1 there.",
)
def _(e: Evidence) -> str:
    top = e.frame.loc[e.frame["method"] == "as_reported", "rank"].max()
    shares = [e.all("recovered", "as_reported", split=s, rank=top)[0] for s in HELD_OUT]
    if min(shares) >= 0.9:
        return "holds"
    worst = min(shares[2], *e.all("recovered", "v1_text", split="text"))
    better = max(e.all("recovered", "rrr_text", split="text"))
    return "artefact" if worst < 0.1 and better > worst else "open"


@rule(
    "multi_layer_rank_sweep",
    "Middle layers hurt: adapters there end at KL above 5.",
    "Holds if a middle layer is worse than no adapter however it is fitted; an artefact if v1 there is worse than no "
    "adapter on test while the difference to the base's own logits, from the same layer and data, is better than none.",
)
def _(e: Evidence) -> str:
    middle = _layers(e, least=2)[:-1]
    v1 = [max(e.all("recovered", "as_reported", split="test", layer=layer)) for layer in middle]
    mended = [max(e.all("recovered", "rrr", split="test", layer=layer)) for layer in middle]
    if max(mended) < 0:
        return "holds"
    return "artefact" if max(v1) < 0 and min(mended) > 0 else "open"
