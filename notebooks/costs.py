"""What a plug costs, counted from a model's config: operations, bytes, hours, money. Nothing is run here.

Shapes are read off the model's own code, built without memory for its weights; what the stages of a fit compute is
counted from the package's code. Seconds are operations over rates, which are measured (`calibration.py`) or a data
sheet's peak times the share of it that was reached on a card that was measured (`benchmarks/gpu.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from chassis_utils import ChassisError
from chassis_utils.distill import LAMS
from chassis_utils.models import POCKET, bundled
from chassis_utils.solve import BLOCK, COLUMNS, ROWS, STRIP
from chassis_utils.statistics import FOLD, KEPT

LENGTH = 256  #: Tokens of a prompt, unless told
BATCH = 4096  #: Tokens whose sums are added at once: `gather`'s own default
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
_MIXTURE = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 163840, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
PASSES = "the same without heads"  #: What `gpu.json` calls passes of both models
#: Name -> where its dimensions are published, and the dimensions: nothing is downloaded.
PRESETS: dict[str, tuple[str, dict]] = {
    "TinyLlama 1.1B": (
        "config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        _LLAMA | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048},
    ),
    "Llama 2 7B": (
        "config.json of meta-llama/Llama-2-7b-hf",
        _LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096},
    ),
    "Llama 3 70B": (
        "config.json of meta-llama/Meta-Llama-3-70B",
        _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    ),
    "Kimi K2 1T": ("config.json of moonshotai/Kimi-K2-Base", _MIXTURE),
}  # fmt: skip


# -------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Block:
    """What is counted of one block."""

    maps: int  #: Weights of linear maps that every token takes
    routed: int  #: Weights of all experts of a mixture
    taken: int  #: Of these, the weights that one token takes
    attention: int  #: Multiply-adds of one token with one other: heads times (size of a query and of a value)
    inputs: int  #: Width of what its maps read, as in the place `block b`


@dataclass(frozen=True)
class Shape:
    """A causal language model by its sizes."""

    name: str
    hidden: int
    vocab: int
    blocks: tuple[Block, ...]
    outer: int  #: Weights of linear maps outside of blocks, the head left out
    parameters: int  #: All of them; tied ones count once
    source: str = ""  #: Where its dimensions are from

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def active(self) -> int:
        """Parameters that take part in one token: all but the experts it does not take."""
        return self.parameters - sum(block.routed - block.taken for block in self.blocks)

    @property
    def edits(self) -> list[int]:
        """Features of v2's edit behind each block: the state before it and the inputs of its maps."""
        return [self.hidden + block.inputs for block in self.blocks]

    def forward(self, tokens: float, length: float = LENGTH, depth: int | None = None) -> float:
        """FLOPs of a pass without the head, no deeper than `depth` blocks.

        Two a weight and token. Attention multiplies a prompt's every token with every other, as the plain kernels do;
        one that skips the masked half saves half of that part. Norms, activations and rotations are not counted.
        """
        blocks = self.blocks[:depth]
        weights = sum(block.maps + block.taken for block in blocks) + (self.outer if depth is None else 0)
        return 2.0 * tokens * (weights + length * sum(block.attention for block in blocks))

    def head(self, tokens: float) -> float:
        """FLOPs of the head alone."""
        return 2.0 * tokens * self.hidden * self.vocab


def shape(model: str | Path | PretrainedConfig) -> Shape:
    """Sizes of a preset, a bundled model, a folder, a hub id, or a config of `transformers`.

    ChassisError: there is no such model or config, or its code counts in a way that is not known here.
    """
    if isinstance(model, PretrainedConfig):
        return _counted(model.model_type, model, "")
    if (name := str(model)) in PRESETS:
        source, sizes = PRESETS[name]
        return _counted(name, AutoConfig.for_model(**sizes), source)
    place = POCKET / name if name in bundled() else Path(name).expanduser()
    if not place.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        known = ", ".join([*PRESETS, *bundled()])
        raise ChassisError(f"no config '{name}': presets and bundled models are {known}; or give a folder or hub id")
    try:
        config = AutoConfig.from_pretrained(str(place) if place.exists() else name)
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:120]
        raise ChassisError(f"{name} has no config that can be read ({why}): give a folder with config.json") from error
    return _counted(name, config, "its config.json")


def _counted(name: str, config: PretrainedConfig, source: str) -> Shape:
    """Count the modules of the model that the config makes, on the device that holds no values."""
    config = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads, attention = config.num_attention_heads, _attention(config)
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
        if any(count < 1 for count in (heads, attention, len(blocks), config.vocab_size)):
            raise ValueError("a size below 1")
        inputs = _inputs(model, blocks)
    except (AttributeError, ValueError, TypeError, RuntimeError, StopIteration, ZeroDivisionError) as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise ChassisError(
            f"{name}: its blocks cannot be counted ({why}): give a causal transformer's config"
        ) from error
    share = (getattr(config, "num_experts_per_tok", None) or 0) / max(1, _experts(config))
    found = []
    for block, width in zip(blocks, inputs, strict=True):
        routed = sum(weight.numel() for weight in block.parameters() if weight.ndim == 3)
        maps = sum(weight.numel() for weight in block.parameters() if weight.ndim == 2)
        found.append(Block(maps, routed, round(routed * share), attention, width))
    inside = {id(part) for part in blocks.modules()} | {id(model.get_output_embeddings())}
    outer = sum(p.weight.numel() for p in model.modules() if isinstance(p, nn.Linear) and id(p) not in inside)
    head = model.get_output_embeddings().weight
    return Shape(name, head.shape[1], config.vocab_size, tuple(found), outer, model.num_parameters(), source)


def _experts(config: PretrainedConfig) -> int:
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    return next((n for one in names if (n := getattr(config, one, None))), 0)


def _attention(config: PretrainedConfig) -> int:
    """Multiply-adds of one token with one other, in one block."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # queries and keys are wider than values there
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 2 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _inputs(model: nn.Module, blocks: nn.ModuleList) -> list[int]:
    """Width of what the linear maps of each block read, told by a pass without values; as `block b` is read."""
    widths, known = [0] * len(blocks), []

    def note(number: int, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        # What several maps read counts once; and it must be there for every token.
        if args[0].shape[:-1] in ((1, 4), (4,)) and not any(args[0] is one for one in known):
            known.append(args[0])
            widths[number] += args[0].shape[-1]

    for part in model.modules():
        if any(weight.ndim == 3 for weight in part.parameters(recurse=False)):
            part.forward = lambda states, *_, **__: states  # which expert a token takes cannot be told without values
    for number, block in enumerate(blocks):
        for part in block.modules():
            if isinstance(part, nn.Linear | Conv1D):
                part.register_forward_pre_hook(lambda part, args, n=number: note(n, part, args))
    with torch.device("meta"), torch.inference_mode():
        ids = torch.zeros(1, 4, dtype=torch.long)
        # A mask that is whole already is asked nothing; some models read positions off one by token.
        for mask in (torch.zeros(1, 1, 4, 4), torch.ones(1, 4)):
            widths[:], known[:] = [0] * len(blocks), []
            with suppress(ValueError):
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                return widths
    raise ValueError("its pass wants more than ids and a mask")


# -------------------------------------------------------------------------------------------- stages

#: What work is counted in; all but `forward`, `readout` (float32) and `stream` is in float64.
KINDS = {
    "forward": "FLOPs of passes", "readout": "FLOPs of products with a head or an edit", "product": "FLOPs of products",
    "cholesky": "FLOPs of Cholesky factors and their solves", "eigen": "cubes of the sizes of eigenproblems",
    "compare": "logits compared", "test": "numbers looked through for NaN", "turn": "numbers turned to rows",
    "stream": "bytes read and written",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """An amount of one kind, on matrices of about one size."""

    kind: str
    amount: float
    #: What the rate depends on: the hidden size of a pass, the smaller side of a product, the numbers moved or compared
    size: float


@dataclass(frozen=True)
class Stage:
    """One part of what a plug takes."""

    name: str
    work: tuple[Work, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations; an eigenproblem's by the usual nine cubes."""
        counted = {"forward": 1.0, "readout": 1.0, "product": 1.0, "cholesky": 1.0, "eigen": 9.0}
        return sum(one.amount * counted.get(one.kind, 0.0) for one in self.work)


def stages(
    base: Shape, expert: Shape, tokens: int, family: str = "final layer", length: float = LENGTH, padding: float = 1.0,
    held: float | None = None,
) -> list[Stage]:  # fmt: skip
    """Everything between prompts and an adapter, for so many tokens; passes also see `padding` times as many.

    `held` are the rows of every eighth prompt, an eighth of the tokens unless told.

    `final layer` is `gather` of the final states and `fit` on what it returns; `v2` is `fit` with edits of all blocks,
    for an expert of the base's own shape. ChassisError: another family, an expert no edit leads to, too few tokens.
    """
    if not isinstance(tokens, int | float) or not 2 <= tokens < math.inf or tokens % 1 or not 1 <= length <= tokens:
        raise ChassisError(f"{tokens} tokens in prompts of {length}: give two whole prompts or more")
    if family not in FAMILIES:
        raise ChassisError(f"no family '{family}': choose from {', '.join(FAMILIES)}")
    if base.vocab < 1 or family == "v2" and (base.hidden, base.layers) != (expert.hidden, expert.layers):
        raise ChassisError(f"v2 edits blocks where {expert.name} has those of {base.name}: take the final layer")
    found: dict[str, list[Work]] = {}
    kept = min(KEPT, held or tokens / FOLD)
    for name, *work in FAMILIES[family](base, expert, tokens, tokens * padding, length, kept):
        found.setdefault(name, []).extend(work)
    return [Stage(name, _merged(work)) for name, work in found.items()]


def _merged(work: Sequence[Work]) -> tuple[Work, ...]:
    """The same amounts with equal kinds and sizes added up."""
    sums: dict[tuple[str, float], float] = {}
    for one in work:
        sums[one.kind, one.size] = sums.get((one.kind, one.size), 0.0) + one.amount
    return tuple(Work(kind, amount, size) for (kind, size), amount in sums.items())


def _final(base: Shape, expert: Shape, tokens: float, padded: float, length: float, kept: float) -> Iterator[tuple]:
    """`gather(base, expert, probes, Features((final,)))` and `fit(statistics)`."""
    p, q = base.hidden, base.hidden + expert.hidden
    yield "forward, base", Work("forward", base.forward(padded, length), base.hidden)
    yield "forward, expert", Work("forward", expert.forward(padded, length), expert.hidden)
    yield ("rows", *_rows(p, q, tokens))
    yield ("sums", *_sums(p, q, tokens))
    yield from _read_out(base, expert, [p], p, kept)


def _v2(base: Shape, expert: Shape, tokens: float, padded: float, length: float, kept: float) -> Iterator[tuple]:
    """`fit(activations)`: a pass to choose without edits, one for every edit, one to read out."""
    depth, h, edits = base.layers, base.hidden, base.edits
    # Blocks 1, 2, ... up to the layer edited, all for the stream, all twice to read out.
    depths = [*range(1, depth), depth, depth, depth]
    for name, model in (("forward, base", base), ("forward, expert", expert)):
        flops = sum(model.forward(padded, length, number) for number in depths)
        yield name, Work("forward", flops, h)
    there = [2.0 * padded * h * (p + h) for p in edits]  # edits run along on the way
    before = [0.0, *accumulate(there)]
    # Their maps are in float32, whatever the model is in.
    yield "forward, base", Work("readout", sum(before[n] for n in range(depth)) + before[depth], h)
    for p in edits:
        yield ("rows", *_rows(p, h, tokens))
        yield ("sums", *_sums(p, h, tokens))
        yield from (("ridge", *_ridge(p, h)) for _ in LAMS)
        yield "ridge", Work("product", 2.0 * len(LAMS) * p * p * h, h)  # squares on held-out rows
        yield ("cut", *_cut(p, h))
    near = 2 * h + base.blocks[-1].inputs
    for _ in range(2):
        yield ("rows", *_rows(near, 2 * h, tokens))
        yield ("sums", *_sums(near, 2 * h, tokens))
        yield from _read_out(base, expert, [h, near], near, kept)


FAMILIES = {"final layer": _final, "v2": _v2}


def _rows(p: int, q: int, tokens: float) -> Iterator[Work]:
    """What `gather` does with the states: picked out of the padding, joined, looked through, split in two."""
    # Three copies, two of them by a mask: these take as long as 110 bytes that are copied plainly.
    yield Work("stream", 110.0 * tokens * (p + q), float(BLOCK) * max(p, q))
    yield Work("test", tokens * (p + q), p)


def _sums(p: int, q: int, tokens: float) -> Iterator[Work]:
    """`Gram.update` of all rows: the upper half of x'x strip by strip, x'y, rows in float64 and looked through."""
    strips = range(0, p, STRIP)
    square = sum(2.0 * min(STRIP, p - left) * (p - left) for left in strips)
    yield Work("product", tokens * (square + 2.0 * p * q), p)
    yield Work("stream", 20.0 * tokens * (p + q), float(BLOCK) * max(p, q))
    yield Work("test", tokens * (p + q), p)
    # The mirrored half, at every call; held-out rows are added at a call of their own.
    yield Work("stream", 16.0 * math.ceil(tokens / BATCH) * p * p, p * p)


def _ridge(p: int, q: int) -> Iterator[Work]:
    """One lam: both sums centred, the factor, and its solve."""
    yield Work("cholesky", p**3 / 3 + 2.0 * p * p * q, p)
    yield Work("stream", 48.0 * p * (p + q), p * max(p, q))


def _cut(p: int, k: int, vocab: int = 0) -> Iterator[Work]:
    """`low_rank` in the data's metric, through a basis `(k, vocab)` if there is one."""
    m = min(p, k)
    if vocab:
        yield Work("eigen", float(k) ** 3, k)
        yield Work("product", 2.0 * k * k * vocab + 2.0 * p * k * k + 2.0 * m * k * (k + vocab), k)
        # Strips of the heads are made twice: in float64, one negated, joined, centred; once they are weighted.
        strip = k * min(vocab, COLUMNS)
        yield Work("turn", 2.0 * k * vocab, strip)
        yield Work("stream", (2 * 36.0 + 24.0) * k * vocab + 20.0 * m * vocab, strip)
    if p > k:
        yield Work("eigen", float(k) ** 3, k)
        yield Work("product", 2.0 * p * p * k + 4.0 * p * k * k, k)
    else:
        yield Work("eigen", 2.0 * p**3, p)
        yield Work("product", 4.0 * p**3 + 2.0 * p * p * k + 4.0 * p * p * k, p)


def _read_out(base: Shape, expert: Shape, choices: Sequence[int], best: int, kept: float) -> Iterator[tuple]:
    """Every choice of features and lam judged by KL on the rows kept, the best solved on all and cut."""
    q, v = base.hidden + expert.hidden, base.vocab
    yield "judging", Work("readout", 2.0 * kept * q * v, q)
    for p in choices:
        yield "judging", Work("stream", 16.0 * p * (p + q), p * max(p, q))
        for _ in LAMS:
            yield ("ridge", *_ridge(p, q))
            yield "judging", Work("product", 2.0 * kept * p * q, p)
            yield "judging", Work("readout", 2.0 * kept * q * v, q)
            yield "judging", Work("stream", 24.0 * kept * v, min(kept, ROWS) * v)
            yield "judging", Work("compare", kept * v, kept * v)
    yield "judging", Work("stream", 40.0 * best * (best + q), best * max(best, q))
    yield ("ridge", *_ridge(best, q))
    yield ("cut", *_cut(best, q, v))
    yield "cut", Work("readout", 2.0 * kept * expert.hidden * v, q)  # weights of the columns
    yield "cut", Work("stream", 70.0 * kept * v, kept * v)


# --------------------------------------------------------------------------------------------- bytes


def sizes(
    base: Shape, expert: Shape, tokens: int, rank: int, family: str = "final layer", width: int = 4,
    length: int = LENGTH,
) -> dict[str, float]:  # fmt: skip
    """Bytes: weights (at `width` a number), sums, what a fit needs at its peak, shards, the adapter.

    `shards` are what `harvest` writes of every token where a folder is given (the final layer of both); `gather` writes
    none. The adapter is the last map cut to `rank`, edits in full, without header and JSON.
    """
    h, q, v = base.hidden, base.hidden + expert.hidden, base.vocab
    p = h if family == "final layer" else 2 * h + base.blocks[-1].inputs
    if not 1 <= rank <= min(p, q):
        raise ChassisError(f"rank {rank} is outside 1..{min(p, q)}, what a map of {p} features has")
    widest = max([p * (p + q), *(one * (one + h) for one in base.edits)]) if family == "v2" else p * (p + q)
    edits = [(one, h, h) for one in base.edits] if family == "v2" else []
    return {
        "weights": float(width * (base.parameters + expert.parameters)),
        "sums": 2 * 8.0 * widest,
        "peak of the fit": 8.0 * (5 * widest + 2 * KEPT * (p + q)) + 4.0 * v * (2 * q + 6 * ROWS),
        "shards": tokens * (4.0 * q + 2 * 16),
        "adapter": adapter_bytes([(p, rank, v), *edits], min(p, q), math.ceil(tokens / length)),
    }


def adapter_bytes(maps: Sequence[tuple[int, int, int]], values: int, prompts: int) -> float:
    """Bytes of an adapter's tensors: maps `(features, rank, outputs)`, the last one's first, and fingerprints."""
    (_, _, _), *edits = maps
    numbers = sum(p * rank + rank * m + m for p, rank, m in maps) + values + sum(min(p, m) for p, _, m in edits)
    return 4.0 * numbers + 8.0 * prompts


def overhead(base: Shape, rank: int, family: str = "final layer", edit_rank: int | None = None) -> dict[str, float]:
    """What a plug adds to a token, over the base alone: FLOPs, and numbers read from memory.

    A token written one at a time waits for weights: `numbers` then counts; in a batch, `flops`.
    """
    h, v = base.hidden, base.vocab
    p = h if family == "final layer" else 2 * h + base.blocks[-1].inputs
    maps = [(p, rank, v)] + ([(one, min(h, edit_rank or h), h) for one in base.edits] if family == "v2" else [])
    own = sum((one + m) * r for one, r, m in maps)
    return {"flops": 2 * own / (base.forward(1, 1) + base.head(1)), "numbers": own / (base.active - h * v)}


# ------------------------------------------------------------------------------------ hours and money


@dataclass(frozen=True)
class Rates:
    """How fast each kind of work goes: measured at some sizes, in between on a line in logs, outside as at the end."""

    name: str
    measured: Mapping[str, Sequence[tuple[float, float]]]  #: kind -> (size, amount a second), sizes ascending

    def __post_init__(self) -> None:
        if bad := [kind for kind in KINDS if not self.measured.get(kind)]:
            raise ChassisError(f"{self.name} has no rate for {', '.join(bad)}: measure all of {', '.join(KINDS)}")
        if any(not 0 < rate < math.inf for rows in self.measured.values() for _, rate in rows):
            raise ChassisError(f"{self.name} has a rate that is not above zero: measure again")

    def __call__(self, work: Work) -> float:
        """Amount a second of this kind at this size."""
        rows = self.measured[work.kind]
        if work.size <= rows[0][0]:
            return rows[0][1]
        for (small, slow), (large, fast) in zip(rows, rows[1:], strict=False):
            if work.size <= large:
                share = math.log(work.size / small) / math.log(large / small)
                return slow ** (1 - share) * fast**share
        return rows[-1][1]

    def seconds(self, stage: Stage) -> float:
        """Seconds of a stage."""
        return sum(one.amount / self(one) for one in stage.work)


@dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet: dense peaks, no sparsity."""

    name: str
    half: float  #: FLOP/s in bfloat16
    single: float  #: FLOP/s in float32, as `torch` has it: no shorter numbers inside
    double: float  #: FLOP/s in float64
    bandwidth: float  #: Bytes a second
    memory: float  #: Bytes
    source: str

    @property
    def peaks(self) -> dict[str, float]:
        """The most of each kind of work in a second; the maps of heads and edits are in float32."""
        found = {"forward": self.half, "readout": self.single, "stream": self.bandwidth, "eigen": self.double / 9}
        found |= dict.fromkeys(("product", "cholesky"), self.double)
        # Ten numbers of eight bytes move for a logit, two for one that is looked at or turned.
        return found | {"compare": self.bandwidth / 80} | dict.fromkeys(("test", "turn"), self.bandwidth / 16)

    def rates(self, shares: Mapping[str, Sequence[tuple[float, float]]], of: Device | None = None) -> Rates:
        """Its peaks times shares of them `(size, share)`, by kind of work; ChassisError: not above 0, or above 1.

        `of` is the card that reached them, if it was another. Where Cholesky and eigenproblems kept that one waiting,
        they do not keep a weaker one: it goes as fast as the other did, or reaches the share of its largest products.
        """
        if odd := [share for rows in shares.values() for _, share in rows if not 0 < share <= 1]:
            raise ChassisError(f"a share of {odd[0]:g} of a peak: give shares above 0, at most 1")
        peaks, other, top = self.peaks, (of or self).peaks, max(share for _, share in shares["product"])
        found = {kind: [(n, peaks[kind] * one) for n, one in rows] for kind, rows in shares.items()}
        for kind in ("cholesky", "eigen"):
            found[kind] = [(n, min(other[kind] * one, peaks[kind] * max(one, top))) for n, one in shares[kind]]
        return Rates(self.name, found)


DEVICES = {
    one.name: one
    for one in (
        Device("A100 80 GB", 312e12, 19.5e12, 19.5e12, 2.039e12, 80e9, "NVIDIA A100 data sheet, SXM, dense"),
        Device("H100 80 GB", 989e12, 67e12, 67e12, 3.35e12, 80e9, "NVIDIA H100 data sheet, SXM, dense"),
        Device("H200 141 GB", 989e12, 67e12, 67e12, 4.8e12, 141e9, "NVIDIA H200 data sheet, SXM, dense"),
    )
}
_MEASURED = {
    "product, float32": "readout", "product, float64": "product", "Cholesky, float64": "cholesky",
    "eigenproblem, float64 (cubes)": "eigen", "bytes copied": "stream",
}  # fmt: skip


def reached(told: Mapping[str, Any]) -> tuple[Device, dict[str, list[tuple[float, float]]]]:
    """The card that `gpu.json` was measured on, and the shares of its peaks that it reached, by kind of work and size.

    Passes are those of both models at TinyLlama's dimensions. What was not measured is taken to reach what is like it:
    float32 products what float64 ones do, and all that moves numbers what a copy does. ChassisError: an unknown card.
    """
    words = told["setting"]["device"].split()
    if (device := next((one for one in DEVICES.values() if one.name.split()[0] in words), None)) is None:
        known = ", ".join(DEVICES)
        raise ChassisError(f"{' '.join(words)} has no data sheet here (known: {known}): add it to DEVICES in costs.py")
    found: dict[str, list[tuple[float, float]]] = {}
    for row in told["rates"]:
        if kind := _MEASURED.get(row["what"]):
            found.setdefault(kind, []).append((float(row["size"]), row["rate"] / device.peaks[kind]))
    one, row = shape("TinyLlama 1.1B"), next(row for row in told["tinyllama"] if row["stage"] == PASSES)
    passed = 2 * one.forward(row["tokens"] * (1 + told["setting"]["judged"]), told["setting"]["length"])
    found["forward"] = [(float(one.hidden), passed / row["seconds"] / device.half)]
    found.setdefault("readout", found["product"])
    return device, found | dict.fromkeys(("compare", "test", "turn"), found["stream"])


def mixed(device: Rates, host: Rates, threads: int = 1) -> Rates:
    """Passes and what judges them on the device, sums and solves on the host's threads: where the device lacks room."""
    if threads < 1:
        raise ChassisError(f"{threads} threads: give one or more")
    own = {kind: [(size, rate * threads) for size, rate in rows] for kind, rows in host.measured.items()}
    there = {kind: device.measured[kind] for kind in ("forward", "readout", "compare")}
    return Rates(f"{device.name}, sums on {threads} threads", own | there)


def today(
    device: Device, rates: Rates, host: Rates, threads: int, base: Shape, expert: Shape, tokens: int, family: str
) -> Rates:
    """As the package has it: sums and solves on the device if it has room for them beside the models, or `mixed`.

    Weights are in bfloat16, the heads once more in float32, as are v2's edits. Of a device that cannot hold the weights
    several share them, and none is left with room.
    """
    edits = [4.0 * (one + base.hidden) * base.hidden for one in base.edits] if family == "v2" else []
    heads = 4.0 * (base.hidden * base.vocab + expert.hidden * expert.vocab)
    free = device.memory - 2.0 * (base.parameters + expert.parameters) - heads - sum(edits)
    wanted = sizes(base, expert, tokens, 1, family)["peak of the fit"]
    return rates if wanted < 0.8 * free else mixed(rates, host, threads)


@dataclass(frozen=True)
class Bill:
    """What a plug takes, stage by stage."""

    stages: tuple[Stage, ...]
    seconds: tuple[float, ...]
    devices: int  #: That hold the weights at once
    rate: float  #: Money a device and hour

    @property
    def hours(self) -> float:
        """Device-hours: hours of one device, or of several together."""
        return sum(self.seconds) / 3600

    @property
    def money(self) -> float:
        """In the currency that `rate` is in."""
        return self.hours * self.rate


def bill(
    base: Shape, expert: Shape, tokens: int, rates: Rates, rate: float = 1.0, family: str = "final layer",
    length: int = LENGTH, device: Device | None = None,
) -> Bill:  # fmt: skip
    """Seconds of every stage at these rates, and money at a rate a device and hour, which is the reader's to give.

    With a `device`, as many of it count as hold both models' weights in bfloat16 and a tenth more; hours are of one
    device that does it all: spread over several without loss, it takes hours / devices.
    """
    if not 0 <= rate < math.inf:
        raise ChassisError(f"rate {rate}: give the money that a device costs an hour, zero or more")
    found = tuple(stages(base, expert, tokens, family, length))
    weights = 1.1 * 2 * (base.parameters + expert.parameters)
    many = 1 if device is None else math.ceil(weights / device.memory)
    return Bill(found, tuple(map(rates.seconds, found)), many, rate)
