"""Run both models over the probes once and keep their hidden states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers.decoders import ByteLevel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .errors import ChassisError
from .experts import BiasExpert, SyntheticExpert
from .models import LanguageModel, Place
from .probes import Probes, probe_set
from .records import replacing

HiddenExpert = SyntheticExpert | BiasExpert  # functions of the base's final state
Expert = LanguageModel | HiddenExpert

SHARD = 1024  # prompts a shard: what a kill can cost
_BESIDE = ("expert_hidden", "prompt", "next_token")  # what `Activations` holds a row of beside `hidden`


@dataclass
class Activations:
    """Hidden states of base and expert at the same positions; row order is prompt, then position."""

    base: LanguageModel
    expert: Expert
    probes: Probes
    positions: str  #: `last` (one row a prompt) or `all` (one row a token)
    hidden: dict[
        Place, torch.Tensor
    ]  #: layer or `block b` -> `(n, size)` of the base, float32. The final layer is always there
    expert_hidden: torch.Tensor  #: `(n, expert hidden)`: what the expert's head reads
    prompt: torch.Tensor  #: `(n,)`: number of the prompt a row belongs to
    next_token: torch.Tensor  #: `(n,)`: id of the token that follows, -1 where none does
    num_bytes: int  #: UTF-8 bytes of the tokens that `next_token` names, for bits per byte

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def layers(self) -> list[Place]:
        """Harvested layers, then blocks."""
        return sorted(self.hidden, key=_order)

    @property
    def final(self) -> int:
        """Number of the final layer."""
        return self.base.num_layers

    def layer(self, layer: Place) -> torch.Tensor:
        """Hidden states `(n, hidden)` of one layer, negative numbers from the last; or what `block b` reads.

        Raises:
            ChassisError: the layer does not exist or was not harvested.
        """
        number = layer + self.final + 1 if isinstance(layer, int) and layer < 0 else layer
        if number not in self.hidden:
            have = f"{', '.join(map(str, self.layers))} of {self.base.name} (0..{self.final})"
            raise ChassisError(f"layer {layer} is not among the harvested layers {have}")
        return self.hidden[number]

    def subset(self, n: int, first: int = 0) -> Activations:
        """Only n of the prompts, from number `first` on.

        Raises:
            ChassisError: there are not that many.
        """
        if not (0 <= first and 1 <= n <= len(self.probes) - first):
            held = f"1..{len(self.probes)}, the prompts of '{self.probes.name}'"
            raise ChassisError(f"n = {n} from {first}: outside {held}")
        if self.positions == "all":
            raise ChassisError("a part of the prompts has other bytes: harvest that part instead")
        part = slice(first, first + n)
        probes = Probes(self.probes.name, self.probes.split, self.probes.prompts[part])
        rows = {k: getattr(self, k)[part] for k in _BESIDE}
        return replace(self, probes=probes, hidden={layer: h[part] for layer, h in self.hidden.items()}, **rows)

    def against(self, expert: HiddenExpert) -> Activations:
        """The same states beside another expert that is a function of them: no forward pass."""
        _same_base(self.base, expert)
        theirs = expert.transform(self.hidden[self.final].to(self.base.device)).cpu()
        return replace(self, expert=expert, expert_hidden=theirs)


def _order(place: Place) -> tuple[bool, int]:
    """Layers by number, then blocks by number, then the stream."""
    return (
        (False, place) if isinstance(place, int) else (True, int(place.removeprefix("block ").replace("stream", "-1")))
    )


def _same_base(base: LanguageModel, expert: HiddenExpert) -> None:
    own, theirs = base.readout.weight, expert.readout.weight
    if theirs is not own and not torch.equal(theirs[:, : own.shape[1]], own):  # a gate is a column more
        raise ChassisError(f"{expert.name} was drawn for another base than {base.name}: draw one with from_base")


def harvest(
    base: LanguageModel,
    expert: Expert,
    probes: Probes,
    positions: str = "last",
    layers: Sequence[Place] | None = None,
    *,
    batch_tokens: int = 4096,
    padding: str = "right",
    out_dir: str | Path | None = None,
    progress: bool = True,
) -> Activations:
    """One forward pass per model and prompt, every layer from the same pass, no logits.

    Prompts are batched by length; what many begin with is run once where only the last token is asked for. With
    `out_dir`, each shard of 1,024 prompts is written as it is done: a second call goes on from there, and shards are
    shared by every expert and notebook that asks for the same base, probes, layers and positions.

    The expert is a model with the base's tokenizer, or a function of the base's hidden state. `positions` is the `last`
    token of each prompt, or `all`; `layers` are the base's, 0..num_layers, negative from the last, None for every one,
    `block b` for what the linear maps of block b read;
    `batch_tokens` counts padded tokens a batch; `padding`, `right` or `left`, changes nothing but rounding.

    Raises:
        ChassisError: layer out of range, an unknown `positions` or `padding`, a prompt longer than a model,
            tokenizers that differ, or activations that are not finite (prompt and layer are named).
    """
    final = base.num_layers
    wanted = sorted({final, *map(base.layer_number, range(final) if layers is None else layers)}, key=_order)
    for name, value, known in (("positions", positions, ("last", "all")), ("padding", padding, ("left", "right"))):
        if value not in known:
            raise ChassisError(f"{name} = '{value}': choose {' or '.join(known)}")
    ids, num_bytes = checked_ids(base, expert, probes)
    run = _Run(probes, ids, positions, batch_tokens, padding, None if out_dir is None else _make(out_dir), progress)
    part = run.collect(base, wanted)
    states = {layer: part[f"hidden.{layer}"] for layer in wanted}
    if isinstance(expert, LanguageModel):
        theirs = run.collect(expert, [expert.num_layers])[f"hidden.{expert.num_layers}"]
    else:
        bare = states[final] if base.bare is base else run.collect(base.bare, wanted)[f"hidden.{final}"]
        theirs = expert.transform(bare.to(base.device)).cpu()
    return Activations(base, expert, probes, positions, states, theirs, part["prompt"], part["next_token"], num_bytes)


def checked_ids(base: LanguageModel, expert: Expert, probes: Probes) -> tuple[list[list[int]], int]:
    """What `tokenize` gives, once it is sure that both models read the same ids.

    Raises:
        ChassisError: tokenizers that differ, or an expert drawn for another base.
    """
    ids, num_bytes = tokenize(base, probes)
    if isinstance(expert, LanguageModel):
        if getattr(base.tokenizer, "is_fast", False) and expert.tokenizer_hash == base.tokenizer_hash:
            _check_ids(expert, probes, ids)
        # Two versions of a library may write one tokenizer in two ways: then the table and these ids must agree.
        elif expert.tokenizer.get_vocab() != base.tokenizer.get_vocab():
            raise ChassisError(f"{expert.name} and {base.name} have different tokenizers: that takes a bridge")
        elif tokenize(expert, probes)[0] != ids:
            raise ChassisError(f"{expert.name} and {base.name} cut prompts into other tokens: check the first token")
    else:
        _same_base(base, expert)
    return ids, num_bytes


def harvest_splits(
    base: LanguageModel,
    expert: Expert,
    n_train: int = 4096,
    *,
    text: str = "prose",
    out_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Activations]:
    """Everything a notebook judges by, every layer, harvested once.

    Returns:
        The study's prompts, at their last token, as `train` (n_train), `val` and `test` (an eighth each); `template`,
        as many prompts of templates never fitted on; `single`, the study's one free prompt; and at every position the
        passages of `text`: `text_train`, `text_val`, `text`.
    """
    held = max(1, n_train // 8)
    sets = {"train": ("mixed", "train", n_train), "val": ("mixed", "val", held), "test": ("mixed", "test", held)}
    sets |= {"template": ("unseen", "test", held), "single": ("single", "test")}
    texts = {"text_train": (text, "train"), "text_val": (text, "val"), "text": (text, "test")}
    go = partial(harvest, base, expert, out_dir=out_dir, progress=progress)
    last = {k: go(probe_set(*named), "last") for k, named in sets.items()}
    return last | {k: go(probe_set(*named), "all") for k, named in texts.items()}


@dataclass
class _Run:
    """What stays the same between the base's pass and the expert's."""

    probes: Probes
    ids: list[list[int]]
    positions: str
    batch_tokens: int
    padding: str
    out_dir: Path | None
    progress: bool

    def collect(self, model: LanguageModel, layers: list[Place]) -> dict[str, torch.Tensor]:
        """`hidden.<layer> (n, hidden)` of one model, `prompt (n,)` and `next_token (n,)`."""
        key = {"probes": self.probes.digest, "positions": self.positions, "layers": layers, "shard": SHARD}
        key |= {"model": model.name, "edits": [edit.revision for edit in model.edits]}
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        # What makes a shard of the same name another one: not part of the name, so that it can be said.
        key |= {"weights": model.revision, "tokenizer": model.tokenizer_hash}
        key |= {"dtype": str(model.model.dtype), "torch": torch.__version__, "transformers": transformers.__version__}
        parts: list[dict[str, torch.Tensor]] = []
        name, n = f"{model.name} / {self.probes.name}", len(self.ids)
        bar = tqdm(total=n, desc=name, disable=not self.progress, leave=False)
        for first in range(0, n, SHARD):
            path = None if self.out_dir is None else self.out_dir / f"{digest}-{first // SHARD:05d}.safetensors"
            part = None
            if path and path.exists():
                try:
                    part, meta = _read(path)
                    made = json.loads(meta.get("key", "{}"))
                    if other := [name for name in key if made.get(name) != key[name]]:
                        part = tqdm.write(f"{path.name} is of other {', '.join(other)} and is made again")
                except ChassisError:
                    tqdm.write(f"{path.name} is damaged and is made again")
            if part is None:
                part = self._shard(model, layers, self.ids[first : first + SHARD], first)
                if path:
                    _write(part, path, {"key": json.dumps(key)})
            parts.append(part)
            bar.update(min(SHARD, n - first))
        bar.close()
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _shard(self, model: LanguageModel, layers: list[Place], ids: list[list[int]], first: int) -> dict:
        rows: dict[int, dict[Place, torch.Tensor]] = {i: {} for i in range(len(ids))}
        last = self.positions == "last"
        for cut, some in _shared(ids) if last and model.keeps_cache else [(0, list(rows))]:
            for batch, tokens, mask in batched(ids, self.batch_tokens, self.padding, some, cut):
                for layer, states in model.states(tokens, mask, layers, ids[batch[0]][:cut]).items():
                    for i, state, own in zip(batch, states.cpu(), mask.bool(), strict=True):
                        rows[i][layer] = state[own][-1 if last else 0 :].clone()
                        if not torch.isfinite(rows[i][layer]).all():
                            where = f"layer {layer} on prompt {first + i} of '{self.probes.name}'"
                            advice = "try dtype float32, or leave that prompt out"
                            raise ChassisError(f"{model.name} gives NaN or infinity at {where}: {advice}")
        part = {f"hidden.{layer}": torch.cat([row[layer] for row in rows.values()]) for layer in layers}
        part["prompt"] = torch.tensor([first + n for n, i in enumerate(ids) for _ in (i[-1:] if last else i)])
        part["next_token"] = torch.tensor([token for i in ids for token in ([] if last else i[1:]) + [-1]])
        return part


def tokenize(model: LanguageModel, probes: Probes) -> tuple[list[list[int]], int]:
    """Ids of every prompt, and the bytes of all tokens that have one before them.

    With a beginning-of-text token that is the whole prompt; without one the first token is not predicted.

    Raises:
        ChassisError: a prompt is longer than the model, or has an id outside its embedding.
    """
    fast = getattr(model.tokenizer, "is_fast", False)
    encoded = model.tokenizer(list(probes.prompts), return_offsets_mapping=fast, verbose=False)
    _check_ids(model, probes, encoded["input_ids"])
    byte_level = isinstance(getattr(getattr(model.tokenizer, "backend_tokenizer", None), "decoder", None), ByteLevel)
    num_bytes = 0
    for n, (ids, prompt) in enumerate(zip(encoded["input_ids"], probes.prompts, strict=True)):
        start = missing = 0
        if ids[0] not in model.tokenizer.all_special_ids:
            if not fast:
                raise ChassisError(f"{model.name}: its slow tokenizer begins no text and gives no byte counts")
            start, first = encoded["offset_mapping"][n][0][1], model.tokenizer.convert_ids_to_tokens(ids[0])
            # Offsets count characters; a byte-level token may be a part of one, and has one letter a byte.
            missing = len(prompt[:start].encode()) - len(first) if byte_level else 0
        num_bytes += len(prompt[start:].encode()) + missing
    return encoded["input_ids"], num_bytes


def _shared(ids: list[list[int]], least: int = 3, crowd: int = 16) -> list[tuple[int, list[int]]]:
    """Prompt numbers grouped by what they begin with, each group with the number of tokens all of it shares.

    Templates are mostly the same words over and over: what a group of `crowd` or more shares, `least` tokens at the
    least, is run once. All other prompts are one group that shares nothing.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(ids):
        groups.setdefault(tuple(one[:least]), []).append(i)
    rest, shared = [], []
    for group in groups.values():
        low, high = (choose(ids[i] for i in group) for choose in (min, max))
        cut = next((n for n, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
        # A prompt must keep a token of its own, where its state is read.
        cut = min(cut, len(low) - 1, min(len(ids[i]) for i in group) - 1)
        if len(group) < crowd or cut < least:
            rest += group
        else:
            shared.append((cut, group))
    return [*shared, (0, rest)] if rest else shared


def _check_ids(model: LanguageModel, probes: Probes, encoded: list[list[int]]) -> None:
    rows = model.model.get_input_embeddings().weight.shape[0]
    for n, ids in enumerate(encoded):
        here = f"prompt {n} of '{probes.name}' has"
        if len(ids) > model.context:
            raise ChassisError(f"{here} {len(ids)} tokens, {model.name} takes {model.context}: shorten it")
        if not ids or max(ids) >= rows:
            raise ChassisError(f"{here} no token, or one that {model.name} does not have")


def batched(
    ids: Sequence[list[int]], batch_tokens: int, side: str = "right", some: Sequence[int] | None = None, cut: int = 0
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Prompt numbers, padded ids and mask `(batch, length)`, of all or `some` prompts, less their first `cut` ids."""
    some = range(len(ids)) if some is None else some
    for batch in _batches({i: len(ids[i]) - cut for i in some}, batch_tokens):
        yield batch, *_padded([ids[i][cut:] for i in batch], side)


def _batches(lengths: dict[int, int], batch_tokens: int) -> list[list[int]]:
    """Prompt numbers in batches of like length, at most `batch_tokens` padded tokens each."""
    batches: list[list[int]] = [[]]
    for i in sorted(lengths, key=lambda i: (lengths[i], i)):
        if batches[-1] and lengths[i] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def _padded(ids: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `(batch, length)` each."""
    rows = [torch.tensor(own) for own in ids]
    ones = [torch.ones_like(own) for own in rows]
    return pad_sequence(rows, True, 0, side), pad_sequence(ones, True, 0, side)


def _make(folder: str | Path) -> Path:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ChassisError(f"cannot write to {folder} ({error.strerror}): choose another folder") from error
    return folder


def _write(tensors: dict[str, torch.Tensor], path: Path, meta: dict[str, str]) -> Path:
    with replacing(path) as temporary:
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata=meta)
    return path


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ChassisError(f"{path} is missing or damaged ({type(error).__name__}): make it again") from error
