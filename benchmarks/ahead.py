"""What the page on one's own GPU tells ahead: what one card took, and bytes and times by the model of cost.

Nothing is measured or downloaded: `notebooks/gpu.json` holds the card, `notebooks/costs.py` the model. Written to
`book/ahead.md`, which the page includes. python benchmarks/ahead.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

# Before this folder, where another file is called `costs`.
sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
from costpage import size, span
from costs import PASSES, Device, Rates, Shape, bill, mixed, reached, shape, sizes, today

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book" / "ahead.md"
TOKENS, RANK, THREADS = 100_000, 64, 8
PHI = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
PHI |= {"num_key_value_heads": 32, "vocab_size": 51200, "max_position_embeddings": 2048, "partial_rotary_factor": 0.4}
ADA, AMPERE = "NVIDIA's whitepaper {cite}`nvidia2022ada`", "NVIDIA's whitepaper {cite}`nvidia2020ampere`"
#: Dense peaks: half precision with sums in single, single, double precision, bandwidth, memory.
CARDS = (
    Device("RTX 4070 Ti 12 GB", 80.2e12, 40.1e12, 0.627e12, 504e9, 12e9, ADA),
    Device("RTX 3090 24 GB", 71e12, 35.6e12, 0.556e12, 936e9, 24e9, AMPERE),
    Device("RTX 4090 24 GB", 165.2e12, 82.6e12, 1.29e12, 1008e9, 24e9, ADA),
)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as markdown, the first one the head."""
    head, *rest = rows
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told() -> str:
    """What is measured, both tables of what is predicted, and what these assume."""
    tiny = shape("TinyLlama 1.1B")
    phi = shape(AutoConfig.for_model("phi", **PHI))
    kept, gpu = (json.loads((ROOT / "notebooks" / f"{n}.json").read_text(encoding="utf-8")) for n in ("costs", "gpu"))
    host = Rates("one thread", kept["rates"])
    return "\n\n".join([_measured(gpu), _bytes(tiny, phi), _times(tiny, phi, host, gpu), _assumed(gpu)]) + "\n"


def _measured(gpu: dict) -> str:
    """Seconds and bytes of one card, at TinyLlama's dimensions and at the width of a 70B Llama."""
    setting, (edited,) = gpu["setting"], gpu["v2"]
    rows = [[f"measured on one {setting['device']}", "tokens", "seconds", "memory of the GPU"]]
    few = gpu["tinyllama"][0]["tokens"]
    heads = ("TinyLlama", gpu["tinyllama"]), ("two blocks of a 70B Llama", gpu["wide"])
    for name, part in heads:
        for row in (one for one in part if one["stage"] != PASSES and (part is gpu["wide"] or one["tokens"] == few)):
            host = row["stage"].endswith("processor")
            stage = row["stage"].replace("the processor", f"{setting['threads']} threads of its host")
            held = "" if host else size(row["held_bytes"] + row["peak_bytes"])
            rows.append([f"{name}: {stage}", f"{row['tokens']:,}", f"{row['seconds']:.2f}", held])
    held = size(edited["held_bytes"] + edited["peak_bytes"])
    rows.insert(
        1 + sum(row[0].startswith("TinyLlama") for row in rows),
        ["TinyLlama: v2", f"{edited['tokens']:,}", f"{edited['seconds']:.0f}", held],
    )
    return table(rows)


def _bytes(tiny: Shape, phi: Shape) -> str:
    rows = [["", "TinyLlama and its relative", "TinyLlama and Phi-2"]]
    both = [(tiny, family) for family in ("final layer", "v2")]
    weights = [size(2.0 * (tiny.parameters + expert.parameters)) for expert in (tiny, phi)]
    rows.append(["weights, two bytes a number: to download, and on the GPU, heads twice as large once more", *weights])
    peaks = [sizes(tiny, expert, TOKENS, RANK, family)["peak of the fit"] for expert, family in both]
    far = sizes(tiny, phi, TOKENS, RANK)["shards"]
    rows.append(["a fit of the final layer, on the GPU where it has room", size(peaks[0]), "not counted"])
    rows.append(["v2, likewise", size(peaks[1]), "has none"])
    shards = sizes(tiny, tiny, TOKENS, RANK)["shards"]
    rows.append([f"disk, states of {TOKENS:,} tokens that `harvest` keeps", size(shards), size(far)])
    return table(rows)


def _times(tiny: Shape, phi: Shape, host: Rates, gpu: dict) -> str:
    rows = [[f"{TOKENS:,} tokens, predicted", *(card.name for card in CARDS)]]
    device, shares = reached(gpu)
    own = [card.rates(shares, device) for card in CARDS]
    for family in ("final layer", "v2"):
        name = f"TinyLlama and its relative, {family}"
        both = {"the GPU": own, f"{THREADS} threads": [mixed(rates, host, THREADS) for rates in own]}
        for where, ways in both.items():
            bills = [bill(tiny, tiny, TOKENS, way, family=family) for way in ways]
            rows.append([f"{name}, sums on {where}", *(span(sum(one.seconds)) for one in bills)])
        there = (
            today(card, rates, host, THREADS, tiny, tiny, TOKENS, family)
            for card, rates in zip(CARDS, own, strict=True)
        )
        rows.append(["where they are", *("GPU" if a is b else "threads" for a, b in zip(there, own, strict=True))])
    flops, (_, share) = tiny.forward(TOKENS) + phi.forward(TOKENS), shares["forward"][0]
    rows.append(["TinyLlama and Phi-2, passes of both", *(span(flops / (share * card.half)) for card in CARDS)])
    return table(rows)


def _assumed(gpu: dict) -> str:
    device, shares = reached(gpu)
    passes, products = shares["forward"][0][1], shares["product"][-1][1]
    cards = "\n".join(
        f"- {card.name}: {card.half / 1e12:g} TFLOP/s in half precision, {card.double / 1e12:.2g} in double "
        f"({card.source})"
        for card in CARDS
    )
    return (
        f"Assumed: prompts of 256 tokens; of their peaks the cards reach what the {device.name} did, {passes:.2f} in "
        f"passes and {products:.2f} in large products; Cholesky and eigenproblems reach that too, or go as fast as on "
        f"the {device.name}, whichever is slower; each of {THREADS} threads is as fast as the one that page 23 was "
        f"measured with, and none hinders another. Peaks:\n\n{cards}"
    )


if __name__ == "__main__":
    PAGE.write_text(told(), encoding="utf-8")
    print(told())
