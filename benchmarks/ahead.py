"""What the page on one's own GPU tells ahead: bytes and times by the model of cost (`notebooks/costs.py`).

Nothing is measured or downloaded; written to `book/ahead.md`, which the page includes. python benchmarks/ahead.py
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
from costs import Device, Rates, Shape, bill, reached, shape, sizes, today

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
    heads = ("TinyLlama", gpu["tinyllama"]), ("two blocks of Llama 3 70B", gpu["wide"])
    for name, part in heads:
        for row in part:
            host = row["stage"].endswith("processor")
            stage = row["stage"].replace("the processor", f"{setting['threads']} threads of its host")
            held = "" if host else size(row["held_bytes"] + row["peak_bytes"])
            rows.append([f"{name}: {stage}", f"{row['tokens']:,}", f"{row['seconds']:.2f}", held])
    held = size(edited["held_bytes"] + edited["peak_bytes"])
    rows.insert(1 + len(gpu["tinyllama"]), ["TinyLlama: v2", f"{edited['tokens']:,}", f"{edited['seconds']:.0f}", held])
    return table(rows)


def _bytes(tiny: Shape, phi: Shape) -> str:
    rows = [["", "TinyLlama and its relative", "TinyLlama and Phi-2"]]
    both = [(tiny, family) for family in ("final layer", "v2")]
    weights = [size(2.0 * (tiny.parameters + expert.parameters)) for expert in (tiny, phi)]
    rows.append(["weights, two bytes a number: to download, and on the GPU", *weights])
    peaks = [sizes(tiny, expert, TOKENS, RANK, family)["peak of the fit"] for expert, family in both]
    far = sizes(tiny, phi, TOKENS, RANK)["shards"]
    rows.append(["memory of the machine, fit of the final layer", size(peaks[0]), "not counted"])
    rows.append(["memory of the machine, v2", size(peaks[1]), "has none"])
    shards = sizes(tiny, tiny, TOKENS, RANK)["shards"]
    rows.append([f"disk, states of {TOKENS:,} tokens that `harvest` keeps", size(shards), size(far)])
    return table(rows)


def _times(tiny: Shape, phi: Shape, host: Rates, gpu: dict) -> str:
    rows = [[f"{TOKENS:,} tokens, predicted", *(card.name for card in CARDS)]]
    _, shares = reached(gpu)
    for family in ("final layer", "v2"):
        own = [card.rates(shares) for card in CARDS]
        ways = [
            today(card, rates, host, THREADS, tiny, tiny, TOKENS, family)
            for card, rates in zip(CARDS, own, strict=True)
        ]
        bills = [bill(tiny, tiny, TOKENS, way, family=family) for way in ways]
        rows.append([f"TinyLlama and its relative, {family}", *(span(sum(one.seconds)) for one in bills)])
        places = ("GPU" if way is rates else "host" for way, rates in zip(ways, own, strict=True))
        rows.append(["its sums are added up on", *places])
    flops, (_, share) = tiny.forward(TOKENS) + phi.forward(TOKENS), shares["forward"][0]
    rows.append(["TinyLlama and Phi-2, passes of both", *(span(flops / (share * card.half)) for card in CARDS)])
    return table(rows)


def _assumed(gpu: dict) -> str:
    device, shares = reached(gpu)
    cards = "; ".join(f"{card.name}, {card.half / 1e12:g} TFLOP/s ({card.source})" for card in CARDS)
    return (
        f"Assumed: each card reaches the share of its peaks that the {device.name} did: {shares['forward'][0][1]:.2f} "
        f"of {cards} in passes, {shares['product'][-1][1]:.2f} of its peak in double precision in large products; "
        f"prompts of 256 tokens; where the GPU has no room, sums and solves on {THREADS} threads of the machine, each "
        "as fast as the one that page 23 was measured with."
    )


if __name__ == "__main__":
    PAGE.write_text(told(), encoding="utf-8")
    print(told())
