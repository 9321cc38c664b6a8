"""Trained rivals of the closed forms: LoRA, a trained head, trained lenses; and two that need no training either.

    contest = Contest(base, expert, prompts, held, seconds=60)
    pd.concat([lora(contest, rank=16), head_only(contest), weight_svd(contest, ranks=(4, 16, 64)), proxy(contest)])

Everyone gets the same expert, the same prompts and the same wall time on the same machine, and is judged on the same
held-out text: KL(expert || model) at every position.

What the clock counts: cutting the prompts into tokens, wrapping the model, and every pass of base and expert over the
prompts, each run when a batch is first seen and its states then kept, so nobody pays for text that is never used. What
it does not count: loading base and expert, which a closed form has to do as well; measuring; and the search for a
step size (`choose_lr`), which reports its own time. That last one favours what is trained: a closed form has none.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from chassis_utils import Activations, Adapter, ChassisError, LanguageModel, Probes, evaluate
from chassis_utils.activations import _batches, batched, padded, tokenize
from chassis_utils.models import _NORM_NAMES, Place, Readout
from chassis_utils.solve import Gram, low_rank
from pocket_recipe import Muon

#: Where a course is measured unless told otherwise; also before the first step and after the last.
POINTS = tuple(2.0**-k for k in range(5, 0, -1))
#: Step sizes that `choose_lr` tries unless told otherwise.
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BLOCK = 4096  # rows of logits at a time

#: What is measured.
COLUMNS = "kl kl_low kl_high recovered recovered_low recovered_high top1_agreement bits_per_byte".split()

Batch = list[int]  # prompt numbers


# ------------------------------------------------------------------------------------------ the contest


@dataclass
class Contest:
    """What is the same for everyone.

    Training ends with the budget or after `steps`, whichever comes first; step sizes decay towards that end. With
    `steps` alone a run depends on the seed and on nothing else.
    """

    base: LanguageModel
    expert: LanguageModel
    prompts: Probes  #: What is trained on
    held: Activations  #: Of base and expert on held-out text, at every position: what is judged on
    seconds: float = math.inf  #: Wall time to train in
    steps: int | None = None  #: Optimiser steps at most
    seed: int = 0  #: Of batches and first values
    #: Of both on text that no choice is made on: what a course ends at is measured there too, as `test_kl` and so on
    test: Activations | None = None
    points: Sequence[float] = POINTS  #: Where a course is measured, as shares of its budget
    #: What counts the seconds. On a machine shared with others `time.process_time`, with one thread, is fairer.
    timer: Callable[[], float] = time.perf_counter
    identity: dict[str, float] = field(init=False)  #: kl, top-1 agreement and bits per byte of the unadapted base

    def __post_init__(self) -> None:
        base, expert = self.base, self.expert
        for role, model in (("base", base), ("expert", expert)):
            if not isinstance(model, LanguageModel):
                raise ChassisError(f"{role} is a {type(model).__name__}: only a model with weights is trained against")
            if model.edits:
                raise ChassisError(f"{model.name} is edited on the way through: give the bare model")
        if base.tokenizer_hash != expert.tokenizer_hash:
            raise ChassisError(f"{expert.name} and {base.name} have different tokenizers: no position has two answers")
        for held in (self.held, *([] if self.test is None else [self.test])):
            if held.base is not base or held.expert is not expert or held.positions != "all":
                pair = f"{held.base.name} and {held.expert.name} at positions '{held.positions}'"
                raise ChassisError(f"the held-out activations are of {pair}: harvest this pair at positions='all'")
            seen = self.prompts.fingerprints & held.probes.fingerprints
            if seen and held.probes.split != "train":
                raise ChassisError(f"{len(seen)} of the prompts are held out as well: choose others for one of the two")
        if self.steps is None and not 0 < self.seconds < math.inf:
            raise ChassisError(f"seconds = {self.seconds} and no steps: training would never begin or never end")
        if self.steps is not None and self.steps < 0:
            raise ChassisError(f"steps = {self.steps}: give zero or more")
        row = evaluate(base, expert, [], self.held).iloc[0]
        self.identity = {name: float(row[name]) for name in ("kl", "top1_agreement", "bits_per_byte")}
        if self.identity["kl"] < 1e-12:
            raise ChassisError(f"{expert.name} answers as {base.name} does on the held-out text: nothing to recover")

    def measure(
        self, port: LanguageModel, states: torch.Tensor | None = None, held: Activations | None = None
    ) -> dict[str, float]:
        """`kl` (nats) and `recovered`, each with its 95% interval, `top1_agreement` and `bits_per_byte`, held out.

        `states (n, hidden)` are what the port's head reads, if no pass is to be made; `held` is the contest's own
        unless given.
        """
        held = self.held if held is None else held
        states = _pass(port, tokenize(self.base, held.probes)[0], port.num_layers) if states is None else states
        given = replace(held, hidden=held.hidden | {held.final + 1: states})
        other = replace(_Port.identity(self.base, held.final + 1), readout=port.readout)
        row = evaluate(self.base, self.expert, other, given).iloc[1]
        return {name: float(row[name]) for name in COLUMNS}

    def finish(self, measure: Callable[[Activations], dict[str, float]]) -> dict[str, float]:
        """What is measured on the test text, under names that begin with `test_`; nothing where there is none."""
        return {} if self.test is None else {f"test_{name}": value for name, value in measure(self.test).items()}


@dataclass(frozen=True)
class _Port(Adapter):
    """Another model in the place of an adapter: its own head, on its own states given as one layer more."""

    readout: Readout | None = None

    def logits(
        self, base: LanguageModel, hidden: Mapping[Place, torch.Tensor], plain: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.readout(hidden[self.layer])


class _Clock:
    """Seconds of a contest, without those spent on measuring."""

    def __init__(self, contest: Contest) -> None:
        self._now = contest.timer
        self._start = self._now()

    @property
    def seconds(self) -> float:
        return self._now() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        before = self._now()
        yield
        self._start += self._now() - before


class _Text:
    """The prompts in batches, and the states of frozen models on them, made when first asked for."""

    def __init__(self, contest: Contest) -> None:
        self.ids = tokenize(contest.base, contest.prompts)[0]
        self.lengths = np.array([len(own) for own in self.ids])
        self.seed = contest.seed
        self._kept: dict[tuple[int, int, int], torch.Tensor] = {}

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        """Endless batches of at most about `batch_tokens` tokens; a function of the seed alone.

        Prompts of like length go together, so that little is padded, with lengths blurred anew in every epoch, so that
        the same ones do not always meet.
        """
        rng = np.random.default_rng(self.seed)
        while True:
            blurred = self.lengths * rng.uniform(0.8, 1.25, len(self.lengths))
            epoch = _batches(dict(enumerate(blurred.tolist())), batch_tokens)
            rng.shuffle(epoch)
            yield from epoch

    def states(self, model: LanguageModel, layer: int, batch: Batch) -> torch.Tensor:
        """`(n, hidden)` of one layer, the prompts of the batch one after another."""
        missing = [i for i in batch if (id(model), layer, i) not in self._kept]
        if missing:
            made = _pass(model, [self.ids[i] for i in missing], layer).split(self.lengths[missing].tolist())
            self._kept |= {(id(model), layer, i): state for i, state in zip(missing, made, strict=True)}
        return torch.cat([self._kept[id(model), layer, i] for i in batch])


def _pass(model: LanguageModel, ids: list[list[int]], layer: int) -> torch.Tensor:
    """States of one layer at every position, `(n, hidden)`, prompts in order."""
    rows: dict[int, torch.Tensor] = {}
    for batch, tokens, mask in batched(ids, BLOCK):
        states = model.states(tokens, mask, [layer])[layer]
        # Copied, since what is made without gradients on may not take part in what has them.
        rows |= {i: state[: len(ids[i])].clone() for i, state in zip(batch, states, strict=True)}
    return torch.cat([rows[i] for i in range(len(ids))])


def multiply_adds(model: LanguageModel, blocks: int | None = None, head: bool = True) -> int:
    """Multiply-adds a token in the matrices of the first `blocks` blocks (all unless given) and of the head.

    What attention adds by comparing positions is left out: it depends on the length and is the same for everyone.
    """
    matrices = (p for block in model._blocks()[:blocks] for p in block.parameters() if p.ndim == 2)
    return sum(p.numel() for p in matrices) + (model.readout.weight.numel() if head else 0)


# ------------------------------------------------------------------------------------------ training


Optimizers = list[torch.optim.Optimizer]


def _cosine(step: int, progress: float) -> float:
    """Warm-up over ten steps, then down a cosine to nothing at the end."""
    return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _linear(step: int, progress: float) -> float:
    """No warm-up, and a straight line to nothing at the end."""
    return 1 - min(1.0, progress)


@dataclass
class _Trainee:
    """What the loop below needs to know of a method."""

    method: dict[str, object]  #: Columns that name it
    parameters: list[torch.nn.Parameter]
    macs: int
    backward: Callable[[Batch], None]  #: Adds the gradient of the mean loss over a batch
    measure: Callable[[Activations], dict[str, float]]  #: On held-out text
    optimizers: Optimizers
    rate: Callable[[int, float], float] = _cosine
    steps: int | None = None  #: A recipe's own number, where the contest sets none


def _train(contest: Contest, clock: _Clock, text: _Text, trainee: _Trainee, batch_tokens: int) -> pd.DataFrame:
    """Descend until the budget ends; one row a point of the contest's."""
    rows: list[dict[str, object]] = []
    step = tokens = 0
    steps = trainee.steps if contest.steps is None else contest.steps
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainee.optimizers]
    fixed = trainee.method | {"parameters": sum(p.numel() for p in trainee.parameters), "macs": trainee.macs}

    def progress() -> float:
        by_steps = 0.0 if steps is None else step / steps if steps else 1.0
        return max(by_steps, clock.seconds / contest.seconds)

    def measured(held: Activations) -> dict[str, float]:
        finite = all(p.isfinite().all() for p in trainee.parameters)
        # A step size may be far too large: that is a result, and a search for one goes on.
        return trainee.measure(held) if finite else dict.fromkeys(COLUMNS, math.nan) | {"kl": math.inf}

    def note() -> None:
        seconds = clock.seconds
        with clock.stopped():
            here = measured(contest.held)
        rows.append(fixed | {"step": step, "tokens": tokens, "seconds": seconds} | here)

    note()
    points, batches = [point for point in contest.points if point > progress()], text.batches(batch_tokens)
    while (now := progress()) < 1:
        if points and now >= points[0]:
            points = [point for point in points if point > now]
            note()
        batch = next(batches)
        trainee.backward(batch)
        torch.nn.utils.clip_grad_norm_(trainee.parameters, 1.0)
        for optimizer, peak in zip(trainee.optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * trainee.rate(step, now)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int(text.lengths[batch].sum())
    if step:
        note()
    rows[-1] |= contest.finish(measured)
    return pd.DataFrame(rows)


def _distil(contest: Contest, text: _Text, batch: Batch, logits: Callable[[slice], torch.Tensor]) -> None:
    """Gradient of the mean cross-entropy to the expert, by blocks of rows: the KL's own, whose other part is fixed."""
    expert = contest.expert
    target = text.states(expert, expert.num_layers, batch)
    for start in range(0, len(target), BLOCK):
        rows = slice(start, start + BLOCK)
        loss = cross_entropy(logits(rows), expert.readout(target[rows]).softmax(-1), reduction="sum") / len(target)
        loss.backward()


def _check_lr(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ChassisError(f"lr = {lr}: give a positive step size, or ask choose_lr for one")


def _check_rank(rank: int) -> None:
    if not (isinstance(rank, int) and rank >= 1):
        raise ChassisError(f"rank {rank}: give a whole number of at least 1")


def lora(
    contest: Contest, rank: int = 16, *, lr: float = 3e-3, head: bool = False, batch_tokens: int = 512
) -> pd.DataFrame:
    """LoRA by `peft` on every linear map of the blocks, and with `head` on the head too; Adam, cosine decay.

    The scale is 1 (`lora_alpha = rank`): with Adam it does little that the step size does not do.
    `macs` are of the adapter kept apart, as where several share a base; merged into the weights they are the base's.

    Source: :cite:`hu2021lora`; distillation in place of labels, as for everyone here.

    Returns:
        One row a point of the course: `method, rank, lr, parameters, macs` (multiply-adds a token), `step, tokens`
        (trained on so far), `seconds`, and on the held-out text `kl` (nats), `recovered`, `top1_agreement`,
        `bits_per_byte`.

    Raises:
        ChassisError: rank 0 or below, a step size that is no positive number, or a head tied to the embedding.
    """
    _check_rank(rank)
    _check_lr(lr)
    base, clock = contest.base, _Clock(contest)
    if head and base.model.config.get_text_config().tie_word_embeddings:
        raise ChassisError(f"the head of {base.name} is its embedding: a LoRA on it would change both; leave head out")
    text, model = _Text(contest), copy.deepcopy(base.model)
    output = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    chosen = {name: m.weight.shape for name, m in linear.items() if head or m is not output}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers for something under a name that is going out of use.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(contest.seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=[*chosen]))
    weights = [p for p in adapted.parameters() if p.requires_grad]

    def backward(batch: Batch) -> None:
        tokens, mask = (t.to(base.device) for t in padded([text.ids[i] for i in batch]))
        # No token looks ahead, so padding on the right needs no mask; without one, attention is faster.
        out = adapted(input_ids=tokens, use_cache=False).logits
        ours = out[mask.bool()][:, : base.vocab_size].float()
        # One block: the forward pass already holds every row.
        target = contest.expert.readout(text.states(contest.expert, contest.expert.num_layers, batch))
        cross_entropy(ours, target.softmax(-1)).backward()

    def measure(held: Activations) -> dict[str, float]:
        merged = copy.deepcopy(adapted).merge_and_unload()
        return contest.measure(LanguageModel(f"{base.name} with LoRA {rank}", merged, base.tokenizer), None, held)

    name = {"method": "lora_head" if head else "lora", "rank": rank, "lr": lr}
    extra = sum(rank * sum(shape) for shape in chosen.values())
    adam = torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99))
    trainee = _Trainee(name, weights, multiply_adds(base) + extra, backward, measure, [adam])
    return _train(contest, clock, text, trainee, batch_tokens)


def head_only(contest: Contest, *, lr: float = 3e-3, batch_tokens: int = 1024) -> pd.DataFrame:
    """Only the head's matrix, no bias, on the base's own final states; Adam, cosine decay.

    Returns:
        A course as `lora` does, without a rank.

    Raises:
        ChassisError: a step size that is no positive number.
    """
    _check_lr(lr)
    base, clock = contest.base, _Clock(contest)
    text = _Text(contest)
    weight = torch.nn.Parameter(base.readout.weight.clone())

    def reading(matrix: torch.Tensor) -> Readout:
        return replace(base.readout, weight=matrix)

    def backward(batch: Batch) -> None:
        states = text.states(base, base.num_layers, batch)
        _distil(contest, text, batch, lambda rows: reading(weight)(states[rows]))

    def measure(held: Activations) -> dict[str, float]:
        own = reading(weight.detach().clone())
        return contest.measure(_reader(base, own), held.layer(-1), held)

    adam = torch.optim.Adam([weight], lr=lr, betas=(0.9, 0.99))
    trainee = _Trainee({"method": "head_only", "lr": lr}, [weight], multiply_adds(base), backward, measure, [adam])
    return _train(contest, clock, text, trainee, batch_tokens)


def _reader(model: LanguageModel, readout: Readout) -> LanguageModel:
    """The same model with another readout, for measuring states that are there already."""
    twin = copy.copy(model)
    twin.readout = readout
    twin.__dict__.pop("head_hash", None)
    return twin


def tuned_lens(
    contest: Contest,
    layer: int = -2,
    *,
    optimizer: str = "sgd",
    lr: float | None = None,
    batch_tokens: int | None = None,
) -> pd.DataFrame:
    """A lens trained after the tuned-lens recipe, from a layer of the base to the expert's logits.

    A translator `h + A h + b`, at first the identity, is followed by the final norm and the head of the model whose
    distribution is the target: there the model itself, here the expert, as in our closed-form `lens`. The final layer's
    state has been through a norm already and gets no second one; the recipe has no translator there.

    With `sgd`, all else is the recipe's: Nesterov momentum 0.9, step size 1.0 (which PyTorch's momentum wants
    multiplied by 1 - 0.9), weight decay 1e-3, gradient norm cut at 1, no warm-up, linear decay over 250 steps (or to
    the end of the budget, where that comes first) of 2^18 tokens, or of all the text where that is less. With `adam`
    or `muon` (the matrix by Muon, the bias by Adam): small batches, warm-up, cosine decay, and steps until the end.

    Source: :cite:`belrose2023eliciting` and the training scripts published with it.

    Args:
        contest: models, text and budget.
        layer: of the base, negative from the last.
        optimizer: `sgd`, `adam` or `muon`.
        lr: step size; 1.0 for `sgd`, 1e-3 for `adam` and 0.01 for `muon` unless given.
        batch_tokens: tokens a step; the recipe's 2^18 for `sgd`, 1,024 for the others unless given.

    Returns:
        A course as `lora` does, with `layer` in place of a rank.

    Raises:
        ChassisError: no such layer or optimiser, or a step size that is no positive number.
    """
    known = {"sgd": (1.0, 2**18), "adam": (1e-3, 1024), "muon": (1e-2, 1024)}
    if optimizer not in known:
        raise ChassisError(f"optimizer = '{optimizer}': choose {', '.join(known)}")
    lr = known[optimizer][0] if lr is None else lr
    batch_tokens = known[optimizer][1] if batch_tokens is None else batch_tokens
    _check_lr(lr)
    base, expert, clock = contest.base, contest.expert, _Clock(contest)
    layer, recipe = base.layer_number(layer), optimizer == "sgd"
    norm = torch.nn.Identity() if layer == base.num_layers else _final_norm(expert)
    if base.hidden_size != expert.hidden_size:
        raise ChassisError(f"states of {base.name} and {expert.name} differ in size: a translator keeps it")
    text = _Text(contest)
    translator = torch.nn.Linear(base.hidden_size, base.hidden_size, device=base.device)
    torch.nn.init.zeros_(translator.weight)
    torch.nn.init.zeros_(translator.bias)

    def translated(states: torch.Tensor) -> torch.Tensor:
        return norm((states + translator(states)).to(expert.model.dtype)).float()

    def backward(batch: Batch) -> None:
        states = text.states(base, layer, batch)
        _distil(contest, text, batch, lambda rows: expert.readout(translated(states[rows])))

    def measure(held: Activations) -> dict[str, float]:
        if held.probes not in read:
            known = held.hidden.get(layer)
            read[held.probes] = _pass(base, tokenize(base, held.probes)[0], layer) if known is None else known
        states = read[held.probes]
        with torch.no_grad():
            return contest.measure(expert, translated(states.to(base.device)), held)

    read: dict[Probes, torch.Tensor] = {}
    weights = [translator.weight, translator.bias]
    if recipe:
        nesterov = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
        optimizers: Optimizers = [torch.optim.SGD(weights, lr=lr * (1 - 0.9), **nesterov)]
    elif optimizer == "muon":
        optimizers = [Muon([translator.weight], lr=lr, weight_decay=0.0), torch.optim.Adam([translator.bias], lr=lr)]
    else:
        optimizers = [torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99))]
    name = {"method": "tuned_lens" if recipe else f"tuned_lens_{optimizer}", "layer": layer, "lr": lr}
    macs = multiply_adds(base, layer, head=False) + translator.weight.numel() + expert.readout.weight.numel()
    schedule = (_linear, 250) if recipe else (_cosine, None)
    trainee = _Trainee(name, weights, macs, backward, measure, optimizers, *schedule)
    return _train(contest, clock, text, trainee, batch_tokens)


def _final_norm(model: LanguageModel) -> torch.nn.Module:
    """The final norm itself, to differentiate through; `LanguageModel.final_norm` keeps no gradients."""
    for holder in (model.backbone, getattr(model.backbone, "decoder", None)):
        for norm in (getattr(holder, name, None) for name in _NORM_NAMES):
            if isinstance(norm, torch.nn.Module):
                return norm
    raise ChassisError(f"{model.name}: no final norm found under any of {', '.join(_NORM_NAMES)}")


def choose_lr(
    method: Callable[..., pd.DataFrame], contest: Contest, lrs: Sequence[float] = LRS, **options: object
) -> tuple[float, pd.DataFrame]:
    """The step size of the lowest final KL on the contest's held-out text, each tried for the whole budget.

    Give it a contest whose `held` is of the split `val` and judge elsewhere. Its time is that of all courses, which
    the one chosen afterwards is not charged with.

    Returns:
        Step size, and the courses of all; the last `seconds` of each add up to what the search took.
    """
    courses = [method(contest, lr=lr, **options) for lr in lrs]
    finals = [course["kl"].iloc[-1] for course in courses]
    best = min(range(len(lrs)), key=lambda i: (math.isnan(finals[i]), finals[i]))
    return lrs[best], pd.concat(courses, ignore_index=True)


# ------------------------------------------------------------------------------------- without training


def weight_svd(
    contest: Contest, ranks: Sequence[int] = (4, 16, 64), *, embeddings: bool = True, data: bool = False
) -> pd.DataFrame:
    """The best approximation of every weight's difference, expert minus base, at each rank.

    By itself it is what mergekit extracts (:cite:`goddard2024mergekit`), and no text is read: truncated SVD of each
    matrix, with `embeddings` of embedding and head too, and vectors whole. With `data` the cut is the best for what
    each matrix makes of its inputs in the expert on the prompts: reduced rank in the metric of their second moments, as
    in SVD-LLM (:cite:`wang2024svdllm`) and QERA (:cite:`zhang2024qera`). `macs` as for `lora`: of factors kept apart.

    Returns:
        One row a rank, columns as `lora` has them; `seconds` are of passes and decompositions, which all ranks share.

    Raises:
        ChassisError: a rank of 0 or below, or weights of other names or shapes.
    """
    for rank in ranks:
        _check_rank(rank)
    base, expert, clock = contest.base, contest.expert, _Clock(contest)
    ours, theirs = base.model.state_dict(), expert.model.state_dict()
    if other := sorted(k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs):
        raise ChassisError(f"{expert.name} and {base.name} have other weights, first {other[0]}: nothing to subtract")
    if other := sorted(k for k in ours if ours[k].shape != theirs[k].shape):
        shapes = f"{other[0]} is {tuple(theirs[other[0]].shape)} in {expert.name}, {tuple(ours[other[0]].shape)}"
        raise ChassisError(f"{shapes} in {base.name}: no difference of weights")
    table, output = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    outer = {id(module.weight) for module in (table, output)}
    outer_names = {name for name, p in base.model.named_parameters(remove_duplicate=False) if id(p) in outer}
    looked_up = {name for name, p in base.model.named_parameters() if p is table.weight and p is not output.weight}
    moments = second_moments(expert, contest.prompts) if data else {}
    factors, vectors, size = {}, {}, 0
    for name, _ in base.model.named_parameters():
        difference = theirs[name].float() - ours[name].float()
        if difference.ndim != 2:
            vectors[name], size = theirs[name], size + difference.numel()
        elif embeddings or name not in outer_names:
            factors[name] = _cut(difference, *moments.get(name, (None, False)))
    common, rows = clock.seconds, []
    for rank in ranks:
        begin = clock.seconds
        model, parameters, macs = copy.deepcopy(base.model), size, multiply_adds(base)
        state = {name: tensor.to(ours[name]) for name, tensor in vectors.items()}
        for name, (left, right) in factors.items():
            kept = min(rank, len(right))
            state[name] = (ours[name].float() + left[:, :kept] @ right[:kept]).to(ours[name])
            parameters += kept * (len(left) + right.shape[1])
            # A row of an embedding is looked up; only the way from the rank to the hidden size is multiplied.
            macs += kept * (right.shape[1] if name in looked_up else len(left) + right.shape[1])
        model.load_state_dict(state, strict=False)
        seconds = common + clock.seconds - begin
        port = LanguageModel(f"{base.name} with weight SVD {rank}", model, base.tokenizer)

        def measure(held: Activations, port: LanguageModel = port) -> dict[str, float]:
            return contest.measure(port, None, held)

        row = {"method": "weight_svd" + ("_data" if data else "") + ("" if embeddings else "_blocks")}
        row |= {"rank": rank, "parameters": parameters, "macs": macs, "step": 0, "tokens": 0, "seconds": seconds}
        rows.append(row | measure(contest.held) | contest.finish(measure))
    return pd.DataFrame(rows)


Moments = dict[str, tuple[torch.Tensor, bool]]


def second_moments(model: LanguageModel, prompts: Probes) -> Moments:
    """What every matrix of the model is multiplied with on these prompts: the mean of `x x'` over all positions.

    Returns:
        Name of a matrix -> its moments, float64, `(p, p)`, or `(p,)` where x is a token, and whether p is the second
        side of the matrix. A share of 1e-6 of their mean is added to the diagonal, so that no direction is lost; to a
        token that does not occur goes as much as if it occurred once.
    """
    modules = dict(model.model.named_modules())
    table, output = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    linear = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output}
    sums: dict[str, Gram] = {}
    same: dict[str, str] = {}  # maps that read what another one reads
    real, last = torch.empty(0), ("", torch.empty(0))

    def add(name: str, x: torch.Tensor) -> None:
        nonlocal last
        if x is last[1]:
            same[name] = last[0]
        if name not in same:
            last, rows = (name, x), x[real]
            sums.setdefault(name, Gram.zeros(rows.shape[1], 0)).update(rows.cpu(), rows.cpu()[:, :0])

    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: add(n, args[0])) for n, m in linear.items()]
    ids = tokenize(model, prompts)[0]
    try:
        for _, tokens, mask in batched(ids, BLOCK):
            real, last = mask.bool().to(model.device), ("", torch.empty(0))
            add("", model.states(tokens, mask)[model.num_layers])
    finally:
        for hook in hooks:
            hook.remove()
    counts = torch.bincount(torch.tensor([i for own in ids for i in own]), minlength=len(table.weight)).double()
    found: Moments = {}
    for name, module in modules.items():
        # A matrix that is both embedding and head counts as what the head reads.
        if module is output or module in linear.values() or (module is table and table.weight is output.weight):
            gram = sums[same.get(name, name) if name in linear else ""]
            moment = gram.xx / gram.n
            moment.diagonal().add_(1e-6 * moment.diagonal().mean())
            found[f"{name}.weight"] = (moment, not isinstance(module, Conv1D))
        elif module is table:
            found[f"{name}.weight"] = (counts + 1, False)
    return found


def _cut(difference: torch.Tensor, moment: torch.Tensor | None, second: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`left (rows, m)`, `right (m, columns)`, whose first r are the best approximation at every rank r."""
    if moment is None:
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        return left * values, right
    if moment.ndim == 1:
        # Turned, so that what is decomposed has the hidden size and not the vocabulary's.
        down, up, _ = low_rank(difference.T * moment.sqrt())
        return (up.T / moment[:, None].sqrt()).float(), down.T.float()
    down, up, _ = low_rank(difference.T if second else difference, moment)
    return (up.T.float(), down.T.float()) if second else (down.float(), up.float())


def proxy(contest: Contest, small: LanguageModel | None = None, anti: LanguageModel | None = None) -> pd.DataFrame:
    """Proxy tuning: `base + (small - anti)` in logits, at run time, with nothing trained or stored.

    It is meant for a small expert and its untuned twin beside a large base. With the expert itself and the base, which
    is what is taken unless others are given, the base cancels: what is left is the expert, KL 0, at the price of the
    expert's own pass, and says nothing but that price. `parameters` are the weights of the models that must be there
    beside the base, `macs` those of every different model that runs: three, two where the anti-expert is the base.

    Source: :cite:`liu2024tuning`.

    Returns:
        One row, columns as `lora` has them; no step and no seconds are spent.

    Raises:
        ChassisError: another tokenizer, or logits that are capped.
    """
    base, small, anti = contest.base, small or contest.expert, anti or contest.base
    for model in (small, anti):
        if model.tokenizer_hash != base.tokenizer_hash:
            raise ChassisError(f"{model.name} and {base.name} have different tokenizers: logits cannot be added")
    readouts = [model.readout for model in (base, small, anti)]
    if any(readout.softcap is not None for readout in readouts):
        raise ChassisError(f"{base.name} or its proxies cap their logits: they are not added here")
    # Sums of logits are logits of the states side by side.
    signs = (1, 1, -1)
    weight = torch.cat([sign * readout.weight for sign, readout in zip(signs, readouts, strict=True)], dim=1)
    biases = [sign * readout.bias for sign, readout in zip(signs, readouts, strict=True) if readout.bias is not None]
    ids = tokenize(base, contest.held.probes)[0]
    own = [_pass(model, ids, model.num_layers) for model in (base, small, anti)]
    measured = contest.measure(_reader(base, Readout(weight, sum(biases) if biases else None)), torch.cat(own, dim=1))
    running = {id(model): model for model in (base, small, anti)}
    beside = sum(model.model.num_parameters() for key, model in running.items() if key != id(base))
    row = {"method": "proxy", "parameters": beside, "macs": sum(multiply_adds(model) for model in running.values())}
    return pd.DataFrame([row | {"step": 0, "tokens": 0, "seconds": 0.0} | measured])
