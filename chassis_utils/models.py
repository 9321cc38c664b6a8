"""Load a base or an expert, by bundled name, folder or hub id, and check that its readout is understood."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from .errors import ChassisError

if TYPE_CHECKING:
    from .adapter import Adapter

POCKET = Path(__file__).parent / "pocket"
#: Where the final norm lives in the backbones of `transformers`.
_NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm")


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in POCKET.glob("*/config.json"))


#: Where a model is read: a layer by its number; `block b`, the inputs of every linear map of block b side by side; or
#: `stream`, the residual stream behind the last block, which the final norm reads.
Place = int | str


@dataclass(frozen=True)
class Readout:
    """From the head's input to logits: `cap(scale * (h @ weight.T + bias))`, over real tokens only.

    Rows of the head beyond the tokenizer (Phi-2 has 900) are left out: they stand for no token.
    """

    weight: torch.Tensor  #: `(vocab, hidden)`, float32, already multiplied by the scale
    bias: torch.Tensor | None = None  #: `(vocab,)`, or None
    softcap: float | None = None  #: Gemma-style cap: logits become `cap * tanh(logits / cap)`
    scale: float = 1.0  #: In weight and bias already: what the model multiplies its head's own output with

    @property
    def shift(self) -> torch.Tensor:
        """The bias `(vocab,)` on the CPU, zero where there is none."""
        return torch.zeros(len(self.weight)) if self.bias is None else self.bias.cpu()

    def linear(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits before the cap, `(n, vocab)`, of hidden states `(n, hidden)`."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """The cap alone, where there is one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(n, vocab)` as the model gives them."""
        return self.cap(self.linear(hidden))


class _Arrived(Exception):
    """The pass has come as deep as it was asked to."""


@dataclass
class LanguageModel:
    """A causal language model whose hidden states can be read at every layer.

    Layer 0 is the embedding, layer `num_layers` the input of the head (after the final norm), the ones between are the
    residual stream after that many blocks (before any norm).
    """

    name: str  #: Bundled name, folder or hub id it was loaded from
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    readout: Readout = field(init=False, repr=False)
    num_layers: int = field(init=False)  #: Number of blocks; also the number of the final layer
    context: int = field(init=False)  #: Longest prompt, in tokens (2,048 where the config does not say)
    #: Whether a beginning can be run once and shared; recurrent models (Mamba) keep a state of another kind
    keeps_cache: bool = field(init=False)
    edits: tuple[Adapter, ...] = field(default=(), init=False)  #: Changes on the way through, put there by `edited`

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.backbone = self.model.base_model
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.readout = _readout(self.model, len(self.tokenizer), self.device)
        config = self.model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.context = getattr(config, "max_position_embeddings", None) or 2048
        self.keeps_cache = not getattr(self.model, "_is_stateful", False)
        self._check_readout()

    def edited(self, *edits: Adapter) -> LanguageModel:
        """The same weights with the residual stream changed on its way: an edit at layer l flows through l+1..L.

        Edits at one layer act in the order given, after those that are there already. ChassisError for a layer that
        does not exist, or blocks that cannot be found in this architecture.
        """
        if any(self.layer_number(edit.layer) < self.num_layers for edit in edits):
            self._blocks()
        twin = copy.copy(self)
        twin.edits, twin._bare = (*self.edits, *edits), self.bare
        twin.__dict__.pop("revision", None)  # kept from the time before, for other edits
        return twin

    @property
    def bare(self) -> LanguageModel:
        """The model without its edits; itself where there are none."""
        return getattr(self, "_bare", self)

    def layer_number(self, layer: Place) -> Place:
        """A layer counted from 0, negative ones from the last; another place as it is. ChassisError: there is none."""
        final = self.num_layers
        number = layer + final + 1 if not isinstance(layer, str) and layer < 0 else layer
        if number not in (*range(final + 1), *(f"block {block}" for block in range(final)), "stream"):
            there = f"0 (embedding) to {final} (final), block 0 to block {final - 1}, and stream"
            raise ChassisError(f"layer {layer} does not exist: {self.name} has {there}")
        return number

    def _blocks(self) -> torch.nn.ModuleList:
        """The blocks in order, wherever the architecture keeps them."""
        for module in self.backbone.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.num_layers:
                return module
        missing = f"{self.name}: no list of {self.num_layers} blocks found in {type(self.backbone).__name__}"
        raise ChassisError(f"{missing}: nothing can be changed on its way; tell us, with print(model.model)")

    @contextmanager
    def on_the_way(self, wanted: Sequence[Place], depth: int) -> Iterator[dict[Place, torch.Tensor]]:
        """The pass with its edits, up to block `depth`; gives the dictionary that places are noted in on its way.

        Every edit below the final layer is hooked to the block that reads its layer, after what it reads is known.
        """
        seen: dict[Place, torch.Tensor] = {}
        inputs: dict[int, list[torch.Tensor]] = {}
        places = {*wanted, *(place for edit in self.edits for place in (edit.changes, *edit.reads)), depth}

        def enter(number: Place, _: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # The state is the first argument, by place or by name.
            state = args[0] if args else kwargs["hidden_states"]
            seen[number], inputs[number] = state.float().to(self.device), []  # a pass may have been broken off
            here = [edit for edit in self.edits if edit.changes == number]
            for edit in here:
                seen[number] = seen[number] + edit.correction(seen)
            if number == depth:
                raise _Arrived
            changed = seen[number].to(state) if here else state
            return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

        def linear(number: int, _: torch.nn.Module, args: tuple) -> None:
            # Maps that read the same tensor (queries, keys, values) count once; experts that see a part of the tokens
            # (mixtures), or maps of what a cache holds, not at all. Some blocks lay all tokens in one row.
            given, known, size = args[0], inputs[number], seen[number].shape[:2]
            if given.shape[:-1] in (size, (size.numel(),)) and not any(given is one for one in known):
                known.append(given)

        def leave(number: int, *_: object) -> None:
            parts = [one.to(seen[number]).reshape(*seen[number].shape[:2], -1) for one in inputs.pop(number)]
            seen[f"block {number}"] = torch.cat(parts, dim=-1)
        blocks = {int(place.split()[1]) for place in places if isinstance(place, str) and place != "stream"}
        layers = {place for place in places if isinstance(place, int) and place < self.num_layers}
        with ExitStack() as stack:
            for number in (*sorted(layers | blocks), *places & {"stream"}):
                block = self._norm() if number == "stream" else self._blocks()[number]
                stack.enter_context(block.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
                if number in blocks:
                    for part in block.modules():
                        if isinstance(part, torch.nn.Linear | Conv1D):
                            stack.enter_context(part.register_forward_pre_hook(partial(linear, number)))
                    stack.enter_context(block.register_forward_hook(partial(leave, number)))
            yield seen

    @property
    def device(self) -> torch.device:
        """Where the weights are, the first of them if they are spread; states and readout are gathered there."""
        own = self.model.device
        return torch.device("cpu") if own.type == "meta" else own  # meta stands for memory and disk

    @property
    def hidden_size(self) -> int:
        """Width of what the head reads."""
        return self.readout.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Tokens that the readout covers."""
        return self.readout.weight.shape[0]

    def prompt_ids(self, prompt: str, which: str = "the prompt") -> list[int]:
        """Tokens of a prompt; of an empty one the beginning-of-text token. ChassisError: one that it cannot read."""
        if not isinstance(prompt, str) or any(0xD800 <= ord(letter) < 0xE000 for letter in prompt):
            raise ChassisError(f"{which} is no Unicode text: give a string, without lone surrogates")
        ids, start = list(self.tokenizer(prompt, verbose=False)["input_ids"]), self.tokenizer.bos_token_id
        if len(ids) > self.context or max(ids, default=0) >= self.vocab_size:
            size = f"{len(ids)} tokens, {self.name} takes {self.context} of {self.vocab_size} kinds"
            raise ChassisError(f"{which} has {size}: shorten it")
        if not ids and start is None:
            raise ChassisError(f"{which} is empty and {self.name} has no token to begin with: write one")
        return ids or [start]

    @cached_property
    def head_hash(self) -> str:
        """Hash of the readout: an adapter belongs to one."""
        return tensor_hash(self.readout.weight, self.readout.bias)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of all that decides a fast tokenizer's ids; of a slow one, the token-to-id table alone."""
        table = self.tokenizer.get_vocab()
        if getattr(self.tokenizer, "is_fast", False):
            # Without what the last call left there, and the way back to text.
            left = dict.fromkeys(("version", "truncation", "padding", "decoder"))
            table = json.loads(self.tokenizer.backend_tokenizer.to_str()) | left
            table["split_special_tokens"] = getattr(self.tokenizer, "split_special_tokens", False)
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def revision(self) -> str:
        """Hash over architecture, name, shape and an even sample of 4,096 entries of every weight, and the edits."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        for key, tensor in self.model.state_dict().items():
            holder, _, name = key.rpartition(".")
            with _present(module := self.model.get_submodule(holder)):
                tensor = getattr(module, name) if tensor.is_meta else tensor
                sample = tensor.flatten()[:: max(1, tensor.numel() // 4096)]
            digest.update(f"{key}{tuple(tensor.shape)}".encode() + sample.float().cpu().numpy().tobytes())
        digest.update("".join(edit.revision for edit in self.edits).encode())
        return digest.hexdigest()[:16]

    def states(
        self, input_ids: torch.Tensor, mask: torch.Tensor,
        layers: Sequence[Place] | None = None, prefix: Sequence[int] = (), grad: bool = False,
    ) -> dict[Place, torch.Tensor]:  # fmt: skip
        """Hidden states of a padded batch, one forward pass with its edits, without the head, no deeper than asked for.

        `input_ids` and `mask`, 1 at real tokens, are `(batch, length)`, padded on either side; `layers` any places, or
        None, the final; the ids of `prefix` come before every row and are run once; `grad` keeps what a gradient needs.
        Returns place -> `(batch, length, size)`, float32, after the edits there. Rows for which memory does not suffice
        go by halves, which is said; ChassisError where it does not for one.
        """
        try:
            return self._states(input_ids, mask, layers, prefix, grad)
        except (MemoryError, RuntimeError) as error:  # which a GPU's own is too
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            size = f"{self.name}: memory does not suffice for {len(input_ids)} rows of {input_ids.shape[1]} tokens"
            if len(input_ids) == 1:
                raise ChassisError(f"{size}: shorten the prompt, or free memory") from error
        warnings.warn(f"{size} at once; half of them at a time", stacklevel=2)
        halves = zip(input_ids.tensor_split(2), mask.tensor_split(2), strict=True)
        found = [self.states(*half, layers, prefix, grad) for half in halves]
        return {place: torch.cat([half[place] for half in found]) for place in found[0]}

    def _states(
        self, input_ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[Place] | None, prefix: Sequence[int],
        grad: bool,
    ) -> dict[Place, torch.Tensor]:  # fmt: skip
        layers = [self.num_layers] if layers is None else list(layers)
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        # A block's inputs are known when the next block begins. What begins all rows is run to its end.
        whole_way = prefix or "stream" in layers
        depth = self.num_layers if whole_way else max(p if isinstance(p, int) else int(p[6:]) + 1 for p in layers)
        whole = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], dim=1)
        options = {"attention_mask": whole, "use_cache": bool(prefix)}
        if self._takes_positions:
            options["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)[:, len(prefix) :]
        hooked = self.edits or depth < self.num_layers or any(isinstance(place, str) for place in layers)
        notes = self.on_the_way(layers, depth) if hooked else nullcontext({})
        plain = not hooked and {*layers} != {self.num_layers}
        with torch.inference_mode(not grad), notes as seen:
            if prefix:
                first = torch.tensor([list(prefix)], device=self.device)
                options["past_key_values"] = self.backbone(input_ids=first, use_cache=True).past_key_values
                options["past_key_values"].batch_repeat_interleave(len(input_ids))
            try:
                out = self.backbone(input_ids=input_ids, output_hidden_states=plain, **options)
            except _Arrived:
                return {place: seen[place] for place in layers}
            seen[self.num_layers] = out.last_hidden_state.float().to(self.device)
            for edit in (edit for edit in self.edits if edit.changes == self.num_layers):
                seen[edit.layer] = seen[edit.layer] + edit.correction(seen)
        if plain and len(out.hidden_states or ()) != self.num_layers + 1:
            raise ChassisError(f"{self.name}: this architecture does not give one hidden state a layer")
        seen = {place: out.hidden_states[place].float().to(self.device) for place in layers if place not in seen} | seen
        return {place: seen[place] for place in layers}

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own final norm, `(n, hidden)` to `(n, hidden)`; ChassisError where none is found."""
        with torch.inference_mode():
            return self._norm()(hidden.to(self.device, self.model.dtype)).float().to(hidden.device)

    def _norm(self) -> torch.nn.Module:
        for name in (f"{holder}{name}" for holder in ("", "decoder.") for name in _NORM_NAMES):
            with suppress(AttributeError):
                return self.backbone.get_submodule(name)
        raise ChassisError(f"{self.name}: no final norm found under any of {', '.join(_NORM_NAMES)}")

    def _check_readout(self) -> None:
        """Compare `readout(final hidden state)` with the model's own logits on a few tokens."""
        ids = torch.arange(3, 11, device=self.device)[None] % self.vocab_size
        mask = torch.ones_like(ids)
        ours = self.readout(self.states(ids, mask)[self.num_layers][0])
        with torch.inference_mode():
            own = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :, : ours.shape[1]].float()
        if not torch.isfinite(ours).all():
            raise ChassisError(f"{self.name}: NaN or infinity on plain tokens: damaged weights, or try dtype float32")
        gap = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if not gap < (1e-4 if self.model.dtype == torch.float32 else 3e-2):
            wrong = f"{self.name}: head(final hidden state) is not the model's logits (relative gap {gap:.1e})"
            raise ChassisError(f"{wrong}; {type(self.model).__name__} does more after its head than is known here")


def _readout(model: PreTrainedModel, tokens: int, device: torch.device) -> Readout:
    """Head, scale and cap as the config states them; whether that is all is checked afterwards."""
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ChassisError(f"{type(model).__name__} has no linear head to read logits with")
    config = model.config.get_text_config()
    # Cohere multiplies its logits, Granite divides them.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    with _present(head):
        parts = (head.weight, getattr(head, "bias", None))
        weight, bias = (None if part is None else part[:tokens].detach().to(device).float() * scale for part in parts)
    return Readout(weight, bias, getattr(config, "final_logit_softcapping", None), scale)


def _present(module: torch.nn.Module) -> AbstractContextManager[None]:
    """Lets the weights of a module be read that `accelerate` keeps in memory or on disk."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def tensor_hash(*tensors: torch.Tensor | None) -> str:
    """Hash of the values of several tensors, in float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def located(name: str) -> str:
    """Folder or hub id of a name, or one clear line."""
    if name in bundled():
        return str(POCKET / name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ChassisError(f"{name} has no config.json: it is not a model folder")
        if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
            raise ChassisError(f"{name} has no tokenizer files: save the tokenizer beside the model")
        return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ChassisError(f"no model or folder '{name}': bundled are {', '.join(bundled())}; or give a folder or hub id")


def load(
    name: str, *, revision: str | None = None, device: str = "auto", dtype: torch.dtype | None = None,
    trust_remote_code: bool = False, device_map: str | Mapping[str, Any] | None = None, **placed: Any,
) -> LanguageModel:  # fmt: skip
    """Load a model and its tokenizer, frozen, its readout checked against the model's own logits.

    `name` is a bundled name (`pocket-base`, ...), a model folder, or a hub id (`org/name`), of which `revision` is a
    branch, tag or commit. `device` is `auto` (a GPU if there is one) or any of torch's; `dtype`, of the weights, is
    float32 on CPU and the model's own on a GPU unless given. `trust_remote_code` runs code that comes with the model.
    A model that no one device holds is spread over several, memory and disk by `accelerate`, as `device_map` says
    (`auto`, or module -> device), with its `max_memory` and `offload_folder`, and `device` says nothing.
    ChassisError: unknown name, hub out of reach, tokenizer or weights missing, or a head that is not understood.
    """
    source = located(str(name))
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ChassisError(f"device '{device}' is not to be had here: choose cpu, cuda or auto") from error
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    verbosity = transformers_logging.get_verbosity()
    try:
        # What transformers would warn about (missing weights, wrong sizes) is raised below; the rest is noise here.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options |= {"dtype": dtype or (torch.float32 if device == "cpu" else "auto")}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **placed, "device_map": device_map}
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        if Path(source).is_dir():
            why = " ".join(str(error).split())[:160]
            raise ChassisError(f"{name}: the folder could not be loaded ({why})") from error
        missing = f"{name} is not on this machine and the hub gave nothing ({type(error).__name__})"
        raise ChassisError(f"{missing}: check the id and the network, or give a local folder") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if odd := sorted(info["mismatched_keys"]):
        key, found, wanted = odd[0][0], *map(tuple, odd[0][1:])
        raise ChassisError(f"{name}: {key} has shape {found}, its config says {wanted}: get the whole folder")
    if lost := sorted(info["missing_keys"]):
        raise ChassisError(f"{name}: {len(lost)} weights are missing, the first is {lost[0]}: get the whole folder")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        warnings.warn(f"{name}: the tokenizer has more entries than the embedding; texts with them fail", stacklevel=2)
    return LanguageModel(str(name), model if device_map else model.to(device), tokenizer)
