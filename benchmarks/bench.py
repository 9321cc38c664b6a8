"""What harvest, fit and sweep cost, as ratios measured within one run; `README.md` defines what is counted."""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))

from chassis_utils import ChassisError, LanguageModel, Probes, evaluate, fit, harvest, load, probe_set  # noqa: E402
from chassis_utils.activations import Expert, batched, tokenize  # noqa: E402
from chassis_utils.files import replacing  # noqa: E402
from chassis_utils.solve import Gram  # noqa: E402
from plugs import SyntheticExpert  # noqa: E402

RANKS = (4, 8, 16, 32, 64, 128)
REPETITIONS = 3
RESULTS = Path(__file__).with_name("results.json")


def probes(n: int) -> list[Probes]:
    """Train (n), val and test (512 each, or n where that is less), mixed templates."""
    return [probe_set("mixed", "train", n), *(probe_set("mixed", split, min(n, 512)) for split in ("val", "test"))]


def forget(*models: Expert) -> None:
    """Drop the hashes that a model keeps once they are computed."""
    for model in models:
        for kept in ("revision", "tokenizer_hash", "head_hash"):
            model.__dict__.pop(kept, None)


def ours(base: LanguageModel, expert: Expert, n: int, layers: list[int], method: str) -> pd.DataFrame:
    """Harvest, fit and sweep `RANKS` on val and test, nothing kept from an earlier repetition."""
    forget(base, expert)
    train, *held_out = probes(n)
    activations = harvest(base, expert, train, layers=layers, progress=False)
    full = [fit(activations, method, layer=layer) for layer in layers]
    return evaluate(base, expert, [one.at_rank(rank) for one in full for rank in RANKS], held_out)


def whole(base: LanguageModel, several: Iterable[Probes]) -> list[dict[str, torch.Tensor]]:
    """Padded ids and masks `(batch, length)` of the prompts, batched by length as in `harvest`, nothing shared."""
    ids = (tokenize(base, given)[0] for given in several)
    padded = ((tokens, mask) for own in ids for _, tokens, mask in batched(own, 4096))
    return [{"input_ids": tokens, "attention_mask": mask} for tokens, mask in padded]


@torch.inference_mode()
def bare(models: list[torch.nn.Module], batches: list[dict[str, torch.Tensor]]) -> None:
    """Every batch once through every model, nothing kept."""
    for model in models:
        for batch in batches:
            model(**batch, use_cache=False)


def naive_ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`W (p, q)`, `b (q,)` from all rows at once, in float32."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    weight = torch.linalg.solve(xc.T @ xc + 1e-3 * torch.eye(x.shape[1]), xc.T @ yc)
    return weight, y.mean(0) - x.mean(0) @ weight


@torch.inference_mode()
def study(base: LanguageModel, expert: SyntheticExpert, n: int, layers: list[int]) -> dict[tuple[int, int, str], float]:
    """The study's protocol; KL by (layer, rank, split)."""
    (train, *held_out), final, head = probes(n), base.num_layers, base.readout.weight.T
    fixed = {"padding": True, "padding_side": "right", "truncation": True, "max_length": 64, "return_tensors": "pt"}

    def passes(given: Probes) -> Iterator[tuple[dict[int, torch.Tensor], torch.Tensor]]:
        """By batch of 32: base states at the last token, layer -> `(32, hidden)`; expert logits `(32, vocab)`."""
        for start in range(0, len(given), 32):
            batch = base.tokenizer(list(given.prompts[start : start + 32]), **fixed)
            last = torch.arange(len(batch["input_ids"])), batch["attention_mask"].sum(1) - 1
            once, again = (base.model(**batch, output_hidden_states=True, use_cache=False) for _ in range(2))
            target = expert.transform(again.hidden_states[final][last]) @ head
            yield {layer: once.hidden_states[layer][last] for layer in layers}, target

    states, targets = zip(*passes(train), strict=True)
    logits, found = torch.cat(targets), {}
    for layer in layers:
        x = torch.cat([by_layer[layer] for by_layer in states])
        lens, lens_bias = naive_ridge(x, logits)
        columns = lens.norm(dim=0).topk(round(base.vocab_size * 2048 / 32000)).indices
        full, shift = naive_ridge(x, x @ lens[:, columns] + lens_bias[columns] - (x @ head)[:, columns])
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        for rank in RANKS:
            for given in held_out:
                total = 0.0
                for by_layer, target in passes(given):
                    h = by_layer[layer]
                    adapted = h @ head
                    adapted[:, columns] += (h @ u[:, :rank] * s[:rank]) @ v[:rank] + shift
                    total += float(kl_div(adapted.log_softmax(-1), target.softmax(-1), reduction="sum"))
                found[layer, rank, given.split] = total / len(given)
    return found


def timed(
    parts: dict[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each part, `REPETITIONS` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(REPETITIONS):
        # Forth, then back: a machine that slows down or speeds up favours none.
        for name in tqdm(list(reversed(parts) if repetition % 2 else parts), desc=f"round {repetition}", leave=False):
            start = clock()
            parts[name]()
            seconds[name].append(clock() - start)
    return seconds


def quotients(seconds: dict[str, list[float]], over: str, below: Iterable[str]) -> dict[str, list[float]]:
    """`over` divided by each part below the line, repetition by repetition."""
    return {f"{over} / {name}": [a / b for a, b in zip(seconds[over], seconds[name], strict=True)] for name in below}


def ratios(over: str, parts: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Time the parts in turn and divide `over` by each other part."""
    return quotients(timed(parts), over, [name for name in parts if name != over])


def command(main: Callable[[], bool | None]) -> None:
    """Run a script's `main` and end: with 1 where it missed a target, at bad input with a line that names it."""
    try:
        sys.exit(main() is False)
    except ChassisError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def alone(function: Callable[..., Any], several: Iterable[tuple]) -> list[Any]:
    """What the function gives for each set of arguments, each in a new process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(function, arguments) for arguments in several]


def peak() -> int:
    """Peak memory of this process so far, bytes."""
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def harvested(name: str, n: int) -> int:
    """Peak memory of this process after harvest and statistics of n prompts, every layer."""
    base = load(name, device="cpu")
    activations = harvest(base, SyntheticExpert.from_base(base), probe_set("mixed", "train", n), progress=False)
    Gram.of(activations.layer(-1), activations.expert_hidden)
    return peak()


def show(settings: dict[str, Any], found: dict[str, list[float]]) -> None:
    """Print what was asked for, and of every part the median quotient between the least and the greatest."""
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    for name, runs in found.items():
        print(f"{name:<52}{statistics.median(runs):12.4f}   ({min(runs):.4f} to {max(runs):.4f})")


def reached(targets: dict[str, bool]) -> bool:
    """Print which targets are met, and say whether all are."""
    print(", ".join(f"{target}: {'met' if good else 'MISSED'}" for target, good in targets.items()))
    return all(targets.values())


def setting() -> dict[str, Any]:
    """What figures depend on besides the code."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "processors": os.cpu_count()}


def write(path: Path, data: object) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")


def keep(path: Path, **parts: object) -> dict[str, Any]:
    """Put parts among the figures kept in a file, which are returned.

    Raises:
        ChassisError: what is there holds no figures.
    """
    try:
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept |= parts
    except (ValueError, TypeError) as error:
        raise ChassisError(f"{path} holds no figures ({type(error).__name__}): move it away") from error
    write(path, kept)
    return kept


def measure(base: LanguageModel, expert: LanguageModel, n: int) -> dict[str, list[float]]:
    """All ratios of time by name; of KL too, to show that both ways find the same adapters."""
    final, synthetic, batches = base.num_layers, SyntheticExpert.from_base(base), whole(base, probes(n))
    parts, kept = {"ours": lambda: ours(base, expert, n, [final], "rrr")}, {}
    parts["bare passes"] = lambda: bare([base.model, expert.model], batches)
    parts["bare passes without heads"] = lambda: bare([base.backbone, expert.backbone], batches)
    found = ratios("ours", parts)
    for what, layers in {"final layer": [final], "three layers": [round(final * k / 22) for k in (10, 15, 22)]}.items():
        parts = {f"study, {what}": lambda layers=layers: kept.update(study=study(base, synthetic, n, layers))}
        parts["ours"] = lambda layers=layers: kept.update(ours=ours(base, synthetic, n, layers, "v1"))
        found |= ratios(f"study, {what}", parts)
        table = kept["ours"].dropna(subset="rank").set_index(["layer", "rank", "split"])["kl"]
        found[f"largest KL ratio, study / ours, {what}"] = [max(kept["study"][key] / v for key, v in table.items())]
    return found


def main() -> bool:
    """Run everything, print the table, write `results.json`; False if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket-base")
    parser.add_argument("--expert", default="pocket-math")
    parser.add_argument("--n", type=int, default=4096, help="training prompts; the targets are for 4096")
    args = parser.parse_args()
    # First, as a new process starts from the peak of the one that makes it.
    small, large = alone(harvested, [(args.base, args.n // 4), (args.base, args.n)])
    found = measure(load(args.base, device="cpu"), load(args.expert, device="cpu"), args.n)
    found["peak memory, n / (n / 4) prompts"] = [large / small]
    settings = vars(args) | {"ranks": RANKS} | setting()
    show(settings, found)
    cost, gain = (statistics.median(found[name]) for name in ("ours / bare passes", "study, final layer / ours"))
    met = {f"cost {cost:.2f} at most 1.25": cost <= 1.25, f"gain {gain:.1f} at least 10": gain >= 10}
    write(RESULTS, settings | {"ratios": found, "targets": met})
    return reached(met)


if __name__ == "__main__":
    command(main)
