"""What every stage costs at the width of real models: measured up to TinyLlama's, carried on to a 70B Llama's.

python benchmarks/scale.py [--sizes 512 768 1024 1536 2048] [--wide 4096]; `README.md` says what is measured and how.
"""

import argparse
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench import RANKS, alone, bare, command, keep, setting, whole
from scipy.stats import t
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chassis_utils import Adapter, ChassisError, Features, LanguageModel, Probes, evaluate, fit, gather, harvest
from chassis_utils.adapter import heads
from chassis_utils.metrics import block_rows, kl
from chassis_utils.models import Readout
from chassis_utils.solve import ROWS as SOME
from chassis_utils.solve import Gram, low_rank, scaled_ridge
from chassis_utils.statistics import KEPT

RESULTS = Path(__file__).parents[1] / "notebooks" / "scale.json"
LENGTH = 128  # tokens a prompt
ROWS = 1024  # tokens of a forward pass
BATCH = 4096  # tokens whose sums are added at once, one in eight to the held-out ones, as `gather` does
JUDGED = 256  # tokens of the table
LAMS = 6  # that v2 tries
PARTS = ("depth", "vocabulary", "ladder")
VOCABULARIES = (32_000, 64_000, 128_000, 256_000)
EIGH = 9.0  # n^3 multiply-adds and more that a symmetric eigenproblem with vectors is said to take


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    vocab: int
    layers: int
    heads: int
    groups: int  #: Heads of keys and values

    @property
    def block(self) -> int:
        """Weights of a block's linear maps."""
        return 2 * self.hidden**2 * (1 + self.groups / self.heads) + 3 * self.hidden * self.inner

    @property
    def inputs(self) -> int:
        """What a block's linear maps read: normed states twice, what attention gathered, the MLP's inner values."""
        return 3 * self.hidden + self.inner

    @property
    def edit(self) -> int:
        """Features of one of v2's edits: a state and a block's inputs."""
        return self.hidden + self.inputs


TINYLLAMA = Shape(2048, 5632, 32000, 22, 32, 4)
SHAPES = {"TinyLlama": TINYLLAMA, "Llama 70B": Shape(8192, 28672, 128000, 80, 64, 8)}


def like_tinyllama(hidden: int) -> Shape:
    """TinyLlama's proportions at another width, two blocks."""
    return Shape(hidden, hidden * 11 // 4, hidden * 125 // 8, 2, hidden // 64, max(1, hidden // 512))


# ------------------------------------------------------------------------------------------- models


def random_model(shape: Shape) -> LanguageModel:
    """A Llama with random weights whose tokens are the words w0, w1, ..."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        vocab_size=shape.vocab,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=2048,
    )
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    return LanguageModel(f"random {shape.hidden}", LlamaForCausalLM(config), tokenizer)


def turned(base: LanguageModel) -> LanguageModel:
    """An expert of the base's shape: its blocks in reverse order and another head, so that memory holds them once."""
    with torch.device("meta"):
        model = LlamaForCausalLM(base.model.config)
    own = base.model.model
    model.model.layers = torch.nn.ModuleList(reversed(own.layers))
    model.model.embed_tokens, model.model.norm, model.model.rotary_emb = own.embed_tokens, own.norm, own.rotary_emb
    model.lm_head = torch.nn.Linear(base.hidden_size, base.vocab_size, bias=False)
    return LanguageModel(f"{base.name}, turned", model, base.tokenizer)


def words(shape: Shape, tokens: int, seed: int) -> Probes:
    """Prompts of random words."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab, (tokens // LENGTH, LENGTH), generator=draw).tolist()
    return Probes("random words", "train", tuple(" ".join(f"w{i}" for i in row) for row in ids))


# ----------------------------------------------------------------------------------------- measuring


def memory(name: str) -> int | None:
    """`VmRSS` or `VmHWM` of this process in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def measured(call: Callable[[], object], least: float = 0.5) -> tuple[float, int | None]:
    """CPU seconds of one call, the fastest of as many as fill `least` seconds; bytes it needs beyond what is held."""
    times: list[float] = []
    try:
        # What was freed goes back, and the peak starts again from what is held now.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
    except (OSError, AttributeError):
        before = None
    while not times or (sum(times) < least and len(times) < 5):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    peak = memory("VmHWM")
    return min(times), None if before is None or peak is None else max(0, peak - before)


Stage = tuple[str, float, float, Callable[[], object]]  # name, operations, bytes that memory is counted in, the call


def stages(shape: Shape, final_only: bool) -> Iterator[Stage]:
    """Every stage on random values; what one needs is made just before and dropped after."""
    yield from _passing(shape)
    yield from _solving(" (final layer)", shape.hidden, 2 * shape.hidden)
    if not final_only:
        yield from _solving(" (edit)", shape.edit, shape.hidden)
        yield from _reading(shape)


def _passing(shape: Shape) -> Iterator[Stage]:
    """What runs the models or multiplies by their heads."""
    h, v, base = shape.hidden, shape.vocab, random_model(shape)
    batch = whole(base, [words(shape, ROWS, 0)])
    yield "forward pass", passes(shape, ROWS) * shape.layers, 4.0 * ROWS * h, lambda: bare([base.backbone], batch)
    x = torch.randn(ROWS, h)
    yield "head", 2.0 * ROWS * h * v, 4.0 * ROWS * v, lambda: base.readout(x)
    rank = min(64, h)
    maps = torch.randn(h, rank), torch.randn(rank, v) * 1e-3, torch.zeros(v)
    adapter = Adapter("random", shape.layers, *maps, base.name, base.head_hash)
    judged = harvest(base, turned(base), words(shape, JUDGED, 1), "all", [-1], progress=False)
    work = 2.0 * JUDGED * (3 * h * v + rank * (h + v))
    yield "table", work, 8.0 * block_rows(v, base.device) * v, lambda: evaluate(base, judged.expert, adapter, judged)


def _reading(shape: Shape) -> Iterator[Stage]:
    """What v2's last map takes that has the size of the vocabulary."""
    h, v, q = shape.hidden, shape.vocab, 2 * shape.hidden
    models = [SimpleNamespace(readout=Readout(torch.randn(v, h))) for _ in range(2)]
    pair = SimpleNamespace(base=models[0], expert=models[1])
    x, start = torch.randn(KEPT, h), torch.randn(SOME, v)
    weight, bias = torch.randn(h, q, dtype=torch.float64), torch.zeros(q)

    def judge() -> None:
        """As v2 judges one choice."""
        for said in (x.double() @ weight + bias).float().split(SOME):
            theirs, own = said.split(h, dim=1)
            kl(start, start + models[0].readout.linear(theirs) - models[1].readout.linear(own))

    yield "judging", 2.0 * KEPT * q * (h + v), 4.0 * SOME * v, judge
    squares, columns = x.double().T @ x.double(), torch.rand(v).double()
    work, unit = cut(h, q, v), 4.0 * q * v
    yield "cut (vocabulary)", work, unit, lambda: low_rank(weight, squares, heads(pair)[0], columns)


def _solving(name: str, p: int, q: int) -> Iterator[Stage]:
    """Sums of a batch, and what is solved from them."""
    sums, held = (Gram.zeros(p, q) for _ in range(2))
    x, y = torch.randn(BATCH, p), torch.randn(BATCH, q)
    unit, some = 8.0 * p * (p + q), BATCH // 8
    add = BATCH * (p * p + 2.0 * p * q)
    yield f"sums{name}", add, unit, lambda: (sums.update(x[some:], y[some:]), held.update(x[:some], y[:some]))
    found: dict[str, Any] = {}
    yield f"ridge{name}", ridge(p, q), unit, lambda: found.update(map=scaled_ridge(sums, 0.1))
    yield f"held-out squares{name}", 2.0 * p * p * q, unit, lambda: held.error(*found["map"])
    if q < p:
        yield f"cut{name}", cut(p, q), unit, lambda: low_rank(found["map"][0], sums.xx)


def passes(shape: Shape, tokens: int) -> float:
    """Operations of one block: two a weight and token, and attention within prompts of `LENGTH`."""
    return 2.0 * tokens * (shape.block + 2 * LENGTH * shape.hidden)


def ridge(p: int, q: int) -> float:
    """Operations of Cholesky and of its solve."""
    return p**3 / 3 + 2.0 * p * p * q


def cut(p: int, k: int, vocab: int = 0) -> float:
    """Operations of `low_rank` in the data's metric, with a basis over the vocabulary or none."""
    m = min(p, k)
    basis = 2.0 * k * k * vocab + EIGH * k**3 + 2.0 * p * k * k + 2.0 * m * k * (k + vocab) if vocab else 0.0
    if p > k:
        return basis + 2.0 * p * p * k + 4.0 * p * k * k + EIGH * k**3
    return basis + 2 * EIGH * p**3 + 4.0 * p**3 + 2.0 * p * p * k + 4.0 * p * p * k


def ladder(shape: Shape, final_only: bool) -> list[dict[str, Any]]:
    """Rows of every stage at one size, in a process of its own."""
    torch.set_num_threads(1)
    rows = []
    for name, work, unit, call in stages(shape, final_only):
        seconds, peak = measured(call)
        row = {"stage": name, "hidden": shape.hidden, "seconds": seconds, "operations": work, "unit_bytes": unit}
        rows.append(row | {"gflops": work / seconds / 1e9, "peak_bytes": peak})
        tqdm.write(f"{shape.hidden:>6} {name:<28}{seconds:9.2f} s {row['operations'] / seconds / 1e9:7.1f} GFLOP/s")
    return rows


def whole_width(shape: Shape, tokens: int) -> list[dict[str, Any]]:
    """The final-layer family through the public calls, all layers there, in a process of its own."""
    torch.set_num_threads(1)
    base = random_model(shape)
    expert, train, held_out = turned(base), words(shape, tokens, 2), words(shape, JUDGED, 3)
    batches, kept = whole(base, [train]), {}
    models, features = [base.backbone, expert.backbone], Features((shape.layers,))
    steps: list[tuple[str, int, Callable[[], object]]] = [
        ("bare passes, both models", tokens, lambda: bare(models, batches)),
        ("gather", tokens, lambda: kept.update(s=gather(base, expert, train, features, progress=False))),
        ("fit on the statistics, one lam", 0, lambda: kept.update(a=fit(kept["s"], lam=0.1))),
        (
            "harvest of held-out text",
            JUDGED,
            lambda: kept.update(h=harvest(base, expert, held_out, "all", [-1], progress=False)),
        ),
        (
            f"table of {len(RANKS)} ranks",
            JUDGED,
            lambda: evaluate(base, expert, [kept["a"].at_rank(r) for r in RANKS], kept["h"]),
        ),
    ]
    rows, held = [], memory("VmRSS")
    for name, count, call in steps:
        seconds, peak = measured(call, 0.0)
        rows.append({"stage": name, "tokens": count, "seconds": seconds, "held_bytes": held, "peak_bytes": peak})
        tqdm.write(f"{shape.layers} layers: {name:<34}{seconds:9.2f} s")
        held = memory("VmRSS")
    return rows


def edited(shape: Shape, tokens: int) -> list[dict[str, Any]]:
    """`gather` for v2's edits at layers 1 and 2 of a shallow model of the same width, in a process of its own."""
    torch.set_num_threads(1)
    base = random_model(shape)
    expert, train, rows = turned(base), words(shape, tokens, 4), []
    h, p = shape.hidden, shape.edit
    maps = torch.randn(p, h) * 1e-3, torch.randn(h, h) * 1e-3, torch.zeros(h)
    kind = {"features": Features((0, "block 0")), "space": "hidden", "onto": "layer"}
    edit = Adapter("imitation", 1, *maps, base.name, base.head_hash, **kind)
    for layer, port in ((1, base), (2, base.edited(edit))):
        features = Features((layer - 1, f"block {layer - 1}"))
        before = memory("VmRSS")
        seconds, peak = measured(lambda: gather(port, expert, train, features, layer=layer, progress=False), 0.0)  # noqa: B023
        row = {"stage": f"gather for the edit of layer {layer}", "tokens": tokens, "seconds": seconds}
        rows.append(row | {"held_bytes": before, "peak_bytes": peak})
        tqdm.write(f"{shape.hidden:>6} {row['stage']:<28}{seconds:9.2f} s")
    return rows


# ------------------------------------------------------------------------------------ carrying it on


def power(work: Sequence[float], seconds: Sequence[float], at: float) -> tuple[float, float, float, float]:
    """Exponent of `seconds = c work^e` by least squares in logs, and its value at `at` with a 95% interval for one."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (work, seconds))
    centred, n = x - x.mean(), len(x)
    exponent = float((centred * (y - y.mean())).sum() / centred.square().sum())
    middle = float(y.mean()) + exponent * (math.log(at) - float(x.mean()))
    spread = float((y - y.mean() - exponent * centred).square().sum()) / (n - 2)
    further = 1 + 1 / n + (math.log(at) - float(x.mean())) ** 2 / float(centred.square().sum())
    reach = float(t.ppf(0.975, n - 2)) * math.sqrt(spread * further)
    return exponent, *(math.exp(middle + part) for part in (0, -reach, reach))


def count(shape: Shape, tokens: int) -> dict[str, list[tuple[str, float, float]]]:
    """Family -> how often each stage of the ladder is needed, and the operations of one: counted from the code.

    Of v2: one `gather` to choose without edits, one an edit and one to read out; an edit's layer is as deep as its
    passes go. The edits that are in place run along.
    """
    h, v, q, p, depth = shape.hidden, shape.vocab, 2 * shape.hidden, shape.edit, shape.layers
    near, lams, one = 2 * h + shape.inputs, float(LAMS), passes(shape, tokens)
    held, judge = tokens / BATCH, 2.0 * KEPT * q
    sums = BATCH * (p * p + 2.0 * p * h)
    final = [
        ("forward pass", 2.0, depth * one),
        ("sums (final layer)", held, BATCH * (h * h + 2.0 * h * q)),
        ("ridge (final layer)", lams + 1, ridge(h, q)),
        ("judging", lams, judge * (h + v)),
        ("cut (vocabulary)", 1.0, cut(h, q, v)),
    ]
    # Blocks passed: 1 + 2 + ... + (depth - 1) to the edits' layers, all for the stream, all twice for reading out.
    blocks = depth * (depth - 1) / 2 + 3 * depth
    before = (depth - 1) * (depth - 2) / 2 + (depth - 1) + depth
    v2 = [
        ("forward pass", 2.0 * blocks, one),
        ("forward pass", before, 2.0 * tokens * h * (p + h)),
        ("sums (edit)", depth * held, sums),
        ("sums (edit)", 2 * held, BATCH * (near * near + 2.0 * near * q)),
        ("ridge (edit)", depth * lams, ridge(p, h)),
        ("held-out squares (edit)", depth * lams, 2.0 * p * p * h),
        ("cut (edit)", float(depth), cut(p, h)),
        ("ridge (final layer)", 2 * lams, ridge(h, q)),
        ("ridge (edit)", 2 * (lams + 1), ridge(near, q)),
        ("judging", 2 * lams, judge * (h + v)),
        ("judging", 2 * lams, judge * (near + v)),
        ("cut (vocabulary)", 2.0, cut(near, q, v)),
    ]
    return {"final layer": final, "v2": v2}


def carried(rows: list[dict], shape: Shape, tokens: int) -> dict[str, dict[str, Any]]:
    """Seconds of each family at a shape, stage by stage; intervals add up as if all stages erred alike."""
    found: dict[str, dict[str, Any]] = {}
    for family, needed in count(shape, tokens).items():
        parts: dict[str, dict[str, float]] = {}
        for name, times, work in needed:
            own = [row for row in rows if row["stage"] == name]
            _, *bounds = power([r["operations"] for r in own], [r["seconds"] for r in own], work)
            part = parts.setdefault(
                name, dict.fromkeys(("times", "operations", "seconds", "low", "high", "at_rate"), 0.0)
            )
            for key, value in zip(("seconds", "low", "high"), bounds, strict=True):
                part[key] += times * value
            part["times"] += times
            part["operations"] += times * work
            part["at_rate"] += times * work / own[-1]["gflops"] / 1e9
        total = {
            key: sum(part[key] for part in parts.values())
            for key in ("operations", "seconds", "low", "high", "at_rate")
        }
        found[family] = {"stages": parts, "total": total}
    return found


def checked(rows: list[dict]) -> list[dict[str, Any]]:
    """For each stage, the largest size predicted from the smaller ones, and the exponents."""
    found = []
    for name in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == name]
        work, seconds = ([row[key] for row in own] for key in ("operations", "seconds"))
        _, middle, low, high = power(work[:-1], seconds[:-1], work[-1])
        row = {"stage": name, "largest": own[-1]["hidden"], "exponent": power(work, seconds, work[-1])[0]}
        row["exponent_of_hidden"] = power([r["hidden"] for r in own], seconds, own[-1]["hidden"])[0]
        row |= {"gflops": own[-1]["gflops"], "predicted": middle, "low": low, "high": high, "seconds": seconds[-1]}
        units = [r["peak_bytes"] / r["unit_bytes"] for r in own if r["peak_bytes"] is not None]
        found.append(row | {"peak_in_units": units, "unit_bytes": own[-1]["unit_bytes"]})
    return found


def show(figures: dict[str, Any]) -> None:
    """Print what is kept."""
    for row in figures.get("checks", []):
        bounds = f"{row['predicted']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        rate = f"exponent {row['exponent']:.2f}, {row['gflops']:5.1f} GFLOP/s"
        print(f"{row['stage']:<32} {rate}; at {row['largest']} predicted {bounds}, measured {row['seconds']:.2f} s")
    for row in (*figures.get("depth", []), *figures.get("vocabulary", [])):
        held, beyond = ("?" if row[key] is None else f"{row[key] / 2**30:.2f}" for key in ("held_bytes", "peak_bytes"))
        stage = f"V = {row['vocab']:,}: {row['stage']}" if "vocab" in row else row["stage"]
        size = f"{row['tokens']} tokens, {held} GiB held, {beyond} more at the peak"
        print(f"{stage:<46}{row['seconds']:9.2f} s, {size}")
    for name, families in figures.get("carried", {}).items():
        for family, found in families.items():
            total = {key: value / 3600 for key, value in found["total"].items()}
            bounds = f"{total['seconds']:.3g} hours ({total['low']:.3g} to {total['high']:.3g}) of one thread"
            print(f"{name}, {family}: {found['total']['operations']:.3g} operations, {bounds}")


def main() -> None:
    """Measure, carry on, print, put the figures into `notebooks/scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024, 1536, 2048], help="hidden sizes")
    parser.add_argument("--wide", type=int, nargs="*", default=[4096], help="sizes at which only the final layer fits")
    parser.add_argument("--tokens", type=int, default=1024, help="of the passes at full depth")
    parser.add_argument("--total", type=int, default=100_000, help="tokens that totals are stated for")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="to measure; others stay as kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sorted((size, size in args.wide) for size in {*args.sizes, *args.wide})
    if len(args.sizes) < 4 or any(size < 128 or size % 128 for size, _ in sizes):
        raise ChassisError(
            f"sizes {args.sizes} and {args.wide}: give at least four that are not wide, multiples of 128"
        )
    if args.tokens < 8 * LENGTH:
        raise ChassisError(f"tokens = {args.tokens}: give at least {8 * LENGTH}, eight prompts")
    about = setting() | {"rows": ROWS, "batch": BATCH, "kept": KEPT, "length": LENGTH, "total": args.total}
    if "depth" in args.parts:
        shallow = Shape(**asdict(TINYLLAMA) | {"layers": 3})
        runs = [alone(whole_width, [(TINYLLAMA, args.tokens)]), alone(edited, [(shallow, args.tokens)])]
        keep(args.out, depth=[row for (rows,) in runs for row in rows])
    if "vocabulary" in args.parts:
        several = [(Shape(1024, 2816, size, 2, 16, 2), args.tokens) for size in VOCABULARIES]
        runs = zip(VOCABULARIES, alone(whole_width, several), strict=True)
        keep(args.out, vocabulary=[{"vocab": size} | row for size, rows in runs for row in rows])
    if "ladder" in args.parts:
        several = [(like_tinyllama(size), wide) for size, wide in sizes]
        keep(args.out, ladder=[row for part in alone(ladder, tqdm(several, desc="sizes")) for row in part])
    figures = keep(args.out, setting=about)
    if rows := figures.get("ladder"):
        onward = {name: carried(rows, shape, args.total) for name, shape in SHAPES.items()}
        figures = keep(args.out, checks=checked(rows), carried=onward)
    show(figures)


if __name__ == "__main__":
    command(main)
