"""Run both models over the probes once and keep their hidden states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Protocol

import torch
import transformers
from tokenizers.decoders import ByteLevel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .errors import ChassisError
from .files import made, read_tensors, write_tensors
from .foreign import ForeignExpert
from .models import LanguageModel, Place, Readout
from .probes import Probes

SHARD = 1024  # prompts a shard: what a kill can cost


class HiddenExpert(Protocol):
    """Any expert that is a function of the base's final state: `harvest`, `gather` and `fit` ask no more of one."""

    name: str  #: As records show it
    revision: str  #: Hash of all that decides what it says
    readout: Readout  #: The base's own head, with another bias, or with more columns for what `transform` adds

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the readout reads `(n, width)`, from the base's final states `(n, hidden)`."""


Expert = LanguageModel | HiddenExpert | ForeignExpert


@dataclass
class Activations:
    """Hidden states of base and expert at the same positions; row order is prompt, then position."""

    base: LanguageModel
    expert: Expert
    probes: Probes
    positions: str  #: `last` (one row a prompt) or `all` (one row a token)
    hidden: dict[Place, torch.Tensor]  #: place -> `(n, size)` of the base, float32; the final layer is always there
    expert_hidden: torch.Tensor  #: `(n, expert hidden)`: what the expert's head reads
    prompt: torch.Tensor  #: `(n,)`: number of the prompt a row belongs to
    next_token: torch.Tensor  #: `(n,)`: id of the token that follows, -1 where none does
    num_bytes: int  #: UTF-8 bytes of the tokens that `next_token` names, for bits per byte

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def layers(self) -> list[Place]:
        """Harvested layers, then blocks."""
        return [*self.hidden]

    @property
    def final(self) -> int:
        """Number of the final layer."""
        return self.base.num_layers

    def layer(self, layer: Place) -> torch.Tensor:
        """What one place holds, `(n, size)`, negative layers from the last. ChassisError if it was not harvested."""
        number = layer + self.final + 1 if isinstance(layer, int) and layer < 0 else layer
        if number not in self.hidden:
            have = f"{', '.join(map(str, self.layers))} of {self.base.name} (0..{self.final})"
            raise ChassisError(f"layer {layer} is not among the harvested layers {have}")
        return self.hidden[number]

    def against(self, expert: HiddenExpert) -> Activations:
        """The same states beside another expert that is a function of them: no forward pass."""
        _same_base(self.base, expert)
        theirs = expert.transform(self.hidden[self.final].to(self.base.device)).cpu()
        return replace(self, expert=expert, expert_hidden=theirs)

    def on(self, base: LanguageModel, layers: Sequence[Place] = (-1,)) -> Activations:
        """The same rows with other edits or places of the base, by a pass of it alone; ChassisError: another base."""
        if base.bare is not self.base.bare:
            raise ChassisError(f"{base.name} is another base than {self.base.name}: harvest anew")
        again = harvest(base, base, self.probes, self.positions, layers, progress=False)
        return replace(self, base=base, hidden=again.hidden)


def _same_base(base: LanguageModel, expert: HiddenExpert) -> None:
    own, theirs = base.readout.weight, expert.readout.weight
    if theirs is not own and not torch.equal(theirs[:, : own.shape[1]], own):  # a gate is a column more
        raise ChassisError(f"{expert.name} was drawn for another base than {base.name}: draw one with from_base")


def harvest(
    base: LanguageModel, expert: Expert, probes: Probes,
    positions: str = "last", layers: Sequence[Place] | None = None, *,
    batch_tokens: int = 4096, padding: str = "right", out_dir: str | Path | None = None, progress: bool = True,
) -> Activations:  # fmt: skip
    """One forward pass per model and prompt, every layer from the same pass, no logits.

    Prompts are batched by length; what many begin with is run once where only the last token is asked for. With
    `out_dir`, each shard of 1,024 prompts is written as it is done: a second call goes on from there, and shards are
    shared by every expert and notebook that asks for the same base, probes, layers and positions. The expert is a model
    with the base's tokenizer, a function of the base's hidden state, or a `ForeignExpert`. `positions` is the `last`
    token of each prompt, or `all`; `layers` are places of the base, negative ones from the last, None for every layer;
    `batch_tokens` counts padded tokens; `padding`, `right` or `left`, changes nothing but rounding. ChassisError:
    unknown places or options, a prompt that is too long, tokenizers that differ, NaN or infinity.
    """
    final = base.num_layers
    numbers = {final, *map(base.layer_number, range(final) if layers is None else layers)}
    wanted = sorted(numbers, key=lambda place: (isinstance(place, str), place))
    for name, value, known in (("positions", positions, ("last", "all")), ("padding", padding, ("left", "right"))):
        if value not in known:
            raise ChassisError(f"{name} = '{value}': choose {' or '.join(known)}")
    ids, num_bytes = checked_ids(base, expert, probes)
    last, folder, batches = positions == "last", out_dir and made(out_dir), (batch_tokens, padding)
    collect = partial(_collect, probes, last=last, batches=batches, folder=folder, progress=progress)
    part = collect(ids, base, wanted)
    states = {layer: part[f"hidden.{layer}"] for layer in wanted}
    if isinstance(expert, LanguageModel):
        deep = expert.num_layers
        theirs = states[final] if expert is base else collect(ids, expert, [deep])[f"hidden.{deep}"]
    else:
        bare = states[final] if base.bare is base else collect(ids, base.bare, wanted)[f"hidden.{final}"]
        if isinstance(expert, ForeignExpert):
            model, (their_ids, _) = expert.model, tokenize(expert.model, probes)
            told = collect(their_ids, model, [model.num_layers])[f"hidden.{model.num_layers}"]
            theirs = expert.rows((bare, told), (ids, their_ids), probes.prompts, positions)
        else:
            theirs = expert.transform(bare.to(base.device)).cpu()
    return Activations(base, expert, probes, positions, states, theirs, part["prompt"], part["next_token"], num_bytes)


def checked_ids(base: LanguageModel, expert: Expert, probes: Probes) -> tuple[list[list[int]], int]:
    """What `tokenize` gives, once it is sure that both models read the same ids; ChassisError if they do not."""
    ids, num_bytes = tokenize(base, probes)
    if isinstance(expert, ForeignExpert):
        if expert.bridge.base.head_hash != base.head_hash or expert.bridge.base.tokenizer_hash != base.tokenizer_hash:
            raise ChassisError(f"{expert.name} leads to {expert.bridge.base.name}: build a bridge to {base.name}")
    elif not isinstance(expert, LanguageModel):
        _same_base(base, expert)
    elif getattr(base.tokenizer, "is_fast", False) and expert.tokenizer_hash == base.tokenizer_hash:
        _check_ids(expert, probes, ids)
    # Two versions of a library may write one tokenizer in two ways: then the table and these ids must agree.
    elif expert.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ChassisError(f"{expert.name} and {base.name} have different tokenizers: take a ForeignExpert")
    elif tokenize(expert, probes)[0] != ids:
        raise ChassisError(f"{expert.name} and {base.name} cut prompts into other tokens: check the first token")
    return ids, num_bytes


def _collect(
    probes: Probes, ids: list[list[int]], model: LanguageModel, layers: list[Place],
    last: bool, batches: tuple[int, str], folder: Path | None, progress: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`hidden.<layer> (n, hidden)` of one model, `prompt (n,)` and `next_token (n,)`, shard by shard."""
    key = {"probes": probes.digest, "positions": "last" if last else "all", "layers": layers, "shard": SHARD}
    key |= {"model": model.name, "edits": [edit.revision for edit in model.edits]}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    # What makes a shard of the same name another one: not part of the name, so that it can be said.
    key |= {"weights": model.revision, "tokenizer": model.tokenizer_hash}
    key |= {"dtype": str(model.model.dtype), "torch": torch.__version__, "transformers": transformers.__version__}
    parts, name = [], f"{model.name} / {probes.name}"
    bar = tqdm(total=len(ids), desc=name, unit=" prompts", disable=not progress, leave=False)
    for first in range(0, len(ids), SHARD):
        path = folder and folder / f"{digest}-{first // SHARD:05d}.safetensors"
        if isinstance(part := read_tensors(path, key) if path else "", str):
            if part:
                tqdm.write(f"{path.name} {part} and is made again")
            part = _shard(probes, ids[first : first + SHARD], model, layers, last, batches, first)
            if path:
                write_tensors(path, part, key)
        parts.append(part)
        bar.update(len(ids[first : first + SHARD]))
    bar.close()
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _shard(
    probes: Probes, ids: list[list[int]], model: LanguageModel, layers: list[Place],
    last: bool, batches: tuple[int, str], first: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    rows: dict[int, dict[Place, torch.Tensor]] = {i: {} for i in range(len(ids))}
    for cut, some in _shared(ids) if last and model.keeps_cache else [(0, list(rows))]:
        for batch, tokens, mask in batched(ids, *batches, some, cut):
            for layer, states in model.states(tokens, mask, layers, ids[batch[0]][:cut]).items():
                for i, state, own in zip(batch, states.cpu(), mask.bool(), strict=True):
                    rows[i][layer] = state[own][-1 if last else 0 :].clone()
                    if not torch.isfinite(rows[i][layer]).all():
                        what = f"NaN or infinity at layer {layer} on prompt {first + i} of '{probes.name}'"
                        raise ChassisError(f"{model.name} gives {what}: try dtype float32, or leave that prompt out")
    part = {f"hidden.{layer}": torch.cat([row[layer] for row in rows.values()]) for layer in layers}
    part["prompt"] = torch.tensor([first + n for n, i in enumerate(ids) for _ in (i[-1:] if last else i)])
    part["next_token"] = torch.tensor([token for i in ids for token in ([] if last else i[1:]) + [-1]])
    return part


def tokenize(model: LanguageModel, probes: Probes) -> tuple[list[list[int]], int]:
    """Ids of every prompt, and the bytes of all tokens that have one before them.

    With a beginning-of-text token that is the whole prompt; without one the first token is not predicted. ChassisError
    for a prompt that is longer than the model, or has an id outside its embedding.
    """
    fast, found, num_bytes = getattr(model.tokenizer, "is_fast", False), [], 0
    byte_level = isinstance(getattr(getattr(model.tokenizer, "backend_tokenizer", None), "decoder", None), ByteLevel)
    # Beside the ids a tokenizer tells much of every token: not of all prompts at once.
    for some in (probes.prompts[i : i + SHARD] for i in range(0, len(probes), SHARD)):
        encoded = model.tokenizer(list(some), return_offsets_mapping=fast, verbose=False)
        _check_ids(model, probes, encoded["input_ids"], len(found))
        for n, (ids, prompt) in enumerate(zip(encoded["input_ids"], some, strict=True)):
            start = missing = 0
            if ids[0] not in model.tokenizer.all_special_ids:
                if not fast:
                    raise ChassisError(f"{model.name}: its slow tokenizer begins no text and gives no byte counts")
                start, first = encoded["offset_mapping"][n][0][1], model.tokenizer.convert_ids_to_tokens(ids[0])
                # Offsets count characters; a byte-level token may be a part of one, and has one letter a byte.
                missing = len(prompt[:start].encode()) - len(first) if byte_level else 0
            num_bytes += len(prompt[start:].encode()) + missing
        found += encoded["input_ids"]
    return found, num_bytes


def _shared(ids: list[list[int]], least: int = 3, crowd: int = 16) -> list[tuple[int, list[int]]]:
    """Groups of prompts, each with the number of tokens that all of it begins with; the last one shares nothing.

    Templates are the same words over and over: what `crowd` prompts share, `least` tokens or more, is run once.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(ids):
        groups.setdefault(tuple(one[:least]), []).append(i)
    rest, shared = [], []
    for group in groups.values():
        several = [ids[i] for i in group]
        # A prompt must keep a token of its own, where its state is read.
        cut = min(len(commonprefix(several)), min(map(len, several)) - 1)
        if len(group) < crowd or cut < least:
            rest += group
        else:
            shared.append((cut, group))
    return [*shared, (0, rest)] if rest else shared


def _check_ids(model: LanguageModel, probes: Probes, encoded: list[list[int]], first: int = 0) -> None:
    rows = model.model.get_input_embeddings().weight.shape[0]
    for n, ids in enumerate(encoded, first):
        here = f"prompt {n} of '{probes.name}' has"
        if len(ids) > model.context:
            raise ChassisError(f"{here} {len(ids)} tokens, {model.name} takes {model.context}: shorten it")
        if not ids or max(ids) >= rows:
            raise ChassisError(f"{here} no token, or one that {model.name} does not have")


def batched(
    ids: Sequence[list[int]], batch_tokens: int, side: str = "right", some: Sequence[int] | None = None, cut: int = 0
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Prompt numbers, padded ids and mask `(batch, length)`, of all or `some` prompts, less their first `cut` ids."""
    for batch in _batches({i: len(ids[i]) - cut for i in (range(len(ids)) if some is None else some)}, batch_tokens):
        yield batch, *padded([ids[i][cut:] for i in batch], side)


def _batches(lengths: dict[int, int], batch_tokens: int) -> list[list[int]]:
    """Prompt numbers in batches of like length, at most `batch_tokens` padded tokens each."""
    batches: list[list[int]] = [[]]
    for i in sorted(lengths, key=lambda i: (lengths[i], i)):
        if batches[-1] and lengths[i] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(ids: Sequence[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `(batch, length)` each."""
    rows = [torch.tensor(own) for own in ids]
    return pad_sequence(rows, True, 0, side), pad_sequence([*map(torch.ones_like, rows)], True, 0, side)
