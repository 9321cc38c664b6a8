"""Load a base or an expert, by bundled name, folder or hub id, and check that its readout is understood."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import ChassisError

POCKET = Path(__file__).parent / "pocket"

#: Where the final norm lives in the backbones of `transformers`.
_NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm")

#: What `LanguageModel.recast` takes over from a config, where it is there.
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in POCKET.glob("*/config.json"))


@dataclass(frozen=True)
class Readout:
    """From the head's input to logits: `cap(scale * (h @ weight.T + bias))`, over real tokens only.

    Rows of the head beyond the tokenizer (Phi-2 has 900) are left out: they stand for no token.
    """

    weight: torch.Tensor  #: `(vocab, hidden)`, float32, already multiplied by the scale
    bias: torch.Tensor | None = None  #: `(vocab,)`, or None
    softcap: float | None = None  #: Gemma-style cap: logits become `cap * tanh(logits / cap)`

    @property
    def vocab_size(self) -> int:
        """Real tokens."""
        return self.weight.shape[0]

    def linear(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits before the cap, `(n, vocab)`, of hidden states `(n, hidden)`."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """The cap alone, where there is one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(n, vocab)` as the model gives them."""
        return self.cap(self.linear(hidden))


class Edit(Protocol):
    """A change of the residual stream at one layer; an `Adapter` in hidden space is one."""

    layer: int

    @property
    def revision(self) -> str:
        """Hash of what it does."""

    def delta(self, state: torch.Tensor) -> torch.Tensor:
        """What is added to the states `(n, hidden)` of its layer."""


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
    edits: tuple[Edit, ...] = ()  #: Changes on the way through, put there by `edited`

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.backbone = self.model.base_model
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.readout = _readout(self.model, len(self.tokenizer))
        self._check_readout()

    def edited(self, *edits: Edit) -> LanguageModel:
        """The same weights with the residual stream changed on its way: an edit at layer l flows through l+1..L.

        Edits at one layer act in the order given, after those that are there already.

        Raises:
            ChassisError: a layer that does not exist, or blocks that cannot be found in this architecture.
        """
        if any(self.layer_number(edit.layer) < self.num_layers for edit in edits):
            self._blocks()
        return self._with((*self.edits, *edits))

    def recast(self, model_type: str, weights: bool = True, seed: int = 0) -> LanguageModel:
        """A model of another architecture (`mistral`, `gpt2`, ...) with this one's sizes and tokenizer; no edits.

        Weights of the same name and shape are copied; the rest, or without `weights` all, are drawn by `seed`.

        Raises:
            ChassisError: no such architecture, or one that these sizes or this package do not fit.
        """
        own = self.model.config.get_text_config().to_dict()
        config = {name: own[name] for name in _SIZES if own.get(name) is not None}
        try:
            # OPT's names, and the scale of attention that Granite leaves open.
            config |= {"word_embed_proj_dim": self.hidden_size, "ffn_dim": own["intermediate_size"]}
            config |= {"attention_multiplier": (self.hidden_size // own["num_attention_heads"]) ** -0.5}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                other = AutoConfig.for_model(model_type, **config)
                model = AutoModelForCausalLM.from_config(other, dtype=self.model.dtype).to(self.device)
            ours, drawn = self.model.state_dict() if weights else {}, model.state_dict()
            model.load_state_dict(drawn | {k: t for k, t in ours.items() if k in drawn and t.shape == drawn[k].shape})
            return LanguageModel(f"{self.name} as {model_type}{'' if weights else ', random'}", model, self.tokenizer)
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ChassisError(f"{self.name} cannot be recast as '{model_type}': {reason}") from error

    @property
    def bare(self) -> LanguageModel:
        """The model without its edits; itself where there are none."""
        return self._with(()) if self.edits else self

    def _with(self, edits: tuple[Edit, ...]) -> LanguageModel:
        twin = copy.copy(self)
        twin.edits = edits
        twin.__dict__.pop("revision", None)  # kept from the time before, for other edits
        return twin

    def layer_number(self, layer: int) -> int:
        """A layer counted from 0; negative numbers count from the last.

        Raises:
            ChassisError: there is no such layer.
        """
        number = layer + self.num_layers + 1 if layer < 0 else layer
        if not 0 <= number <= self.num_layers:
            there = f"{self.name} has 0 (embedding) to {self.num_layers} (final)"
            raise ChassisError(f"layer {layer} does not exist: {there}")
        return number

    def _blocks(self) -> torch.nn.ModuleList:
        """The blocks in order, wherever the architecture keeps them."""
        for module in self.backbone.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.num_layers:
                return module
        missing = f"no list of {self.num_layers} blocks found in {type(self.backbone).__name__}"
        advice = "nothing can be changed on the way through; tell us with the output of print(model.model)"
        raise ChassisError(f"{self.name}: {missing}, so {advice}")

    @contextmanager
    def _on_the_way(self) -> Iterator[None]:
        """Every edit below the final layer hooked to the block that reads its layer."""

        def change(edit: Edit, _: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # The state is the first argument, by place or by name.
            state = args[0] if args else kwargs["hidden_states"]
            changed = (state.float() + edit.delta(state.float())).to(state.dtype)
            return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

        with ExitStack() as stack:
            for edit in (edit for edit in self.edits if edit.layer < self.num_layers):
                block = self._blocks()[edit.layer]
                stack.callback(block.register_forward_pre_hook(partial(change, edit), with_kwargs=True).remove)
            yield

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """Width of what the head reads."""
        return self.readout.weight.shape[1]

    @property
    def num_layers(self) -> int:
        """Number of blocks; also the number of the final layer."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Tokens that the readout covers."""
        return self.readout.vocab_size

    @property
    def context(self) -> int:
        """Longest prompt, in tokens (2,048 where the config does not say)."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048

    @property
    def keeps_cache(self) -> bool:
        """Whether a beginning can be run once and shared; recurrent models (Mamba) keep a state of another kind."""
        return not getattr(self.model, "_is_stateful", False)

    @cached_property
    def head_hash(self) -> str:
        """Hash of the readout: an adapter belongs to one."""
        return tensor_hash(self.readout.weight, self.readout.bias)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of all that decides a fast tokenizer's ids; of a slow one, the token-to-id table alone."""
        if getattr(self.tokenizer, "is_fast", False):
            # Without what the last call left there, and the way back to text.
            other = ("version", "truncation", "padding", "decoder")
            table = json.loads(self.tokenizer.backend_tokenizer.to_str())
            table = {k: v for k, v in table.items() if k not in other}
            table["split_special_tokens"] = getattr(self.tokenizer, "split_special_tokens", False)
        else:
            table = self.tokenizer.get_vocab()
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def revision(self) -> str:
        """Hash over architecture, name, shape and an even sample of 4,096 entries of every weight, and the edits."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        for key, tensor in self.model.state_dict().items():
            sample = tensor.flatten()[:: max(1, tensor.numel() // 4096)]
            digest.update(f"{key}{tuple(tensor.shape)}".encode() + sample.float().cpu().numpy().tobytes())
        for edit in self.edits:
            digest.update(edit.revision.encode())
        return digest.hexdigest()[:16]

    def states(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        layers: Sequence[int] | None = None,
        prefix: Sequence[int] = (),
        grad: bool = False,
    ) -> dict[int, torch.Tensor]:
        """Hidden states of a padded batch, one forward pass with its edits, without the head.

        Args:
            input_ids: `(batch, length)`.
            mask: `(batch, length)`, 1 at real tokens; padding may be on either side.
            layers: which layers; None is the final one alone.
            prefix: ids that come before every row; run once, for the whole batch.
            grad: keep what a gradient needs.

        Returns:
            layer -> `(batch, length, hidden)`, float32, after the edits of that layer.
        """
        layers = [self.num_layers] if layers is None else list(layers)
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        inner = [layer for layer in layers if layer != self.num_layers]
        whole = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], dim=1)
        options = {"attention_mask": whole, "use_cache": bool(prefix)}
        if self._takes_positions:
            options["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)[:, len(prefix) :]
        with torch.inference_mode(not grad), self._on_the_way():
            if prefix:
                first = torch.tensor([list(prefix)], device=self.device)
                options["past_key_values"] = self.backbone(input_ids=first, use_cache=True).past_key_values
                options["past_key_values"].batch_repeat_interleave(len(input_ids))
            out = self.backbone(input_ids=input_ids, output_hidden_states=bool(inner), **options)
        every = out.hidden_states
        if inner and (every is None or len(every) != self.num_layers + 1):
            raise ChassisError(f"{self.name}: this architecture does not give one hidden state a layer")
        states = {layer: every[layer].float() for layer in inner}
        if self.num_layers in layers:
            states[self.num_layers] = out.last_hidden_state.float()
        # The library notes a state before the hook of the block that reads it.
        for edit in (edit for edit in self.edits if edit.layer in states):
            states[edit.layer] = states[edit.layer] + edit.delta(states[edit.layer])
        return states

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own final norm, `(n, hidden)` to `(n, hidden)`.

        Raises:
            ChassisError: the norm was not found in this architecture.
        """
        for holder in (self.backbone, getattr(self.backbone, "decoder", None)):
            for norm in (getattr(holder, name, None) for name in _NORM_NAMES):
                if isinstance(norm, torch.nn.Module):
                    with torch.inference_mode():
                        return norm(hidden.to(self.device, self.model.dtype)).float().to(hidden.device)
        raise ChassisError(f"{self.name}: no final norm found under any of {', '.join(_NORM_NAMES)}")

    def _check_readout(self) -> None:
        """Compare `readout(final hidden state)` with the model's own logits on a few tokens."""
        ids = torch.arange(3, 11, device=self.device)[None] % self.vocab_size
        mask = torch.ones_like(ids)
        ours = self.readout(self.states(ids, mask)[self.num_layers][0])
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        own = logits[0, :, : self.vocab_size].float()
        if not torch.isfinite(ours).all():
            raise ChassisError(f"{self.name}: NaN or infinity on plain tokens: damaged weights, or try dtype float32")
        gap = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if not gap < (1e-4 if self.model.dtype == torch.float32 else 3e-2):
            wrong = f"head(final hidden state) is not the model's logits (relative gap {gap:.1e})"
            cause = f"{type(self.model).__name__} does something after its head that is not known here"
            raise ChassisError(f"{self.name}: {wrong}; {cause}")


def _readout(model: PreTrainedModel, tokens: int) -> Readout:
    """Head, scale and cap as the config states them; whether that is all is checked afterwards."""
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ChassisError(f"{type(model).__name__} has no linear head to read logits with")
    config = model.config.get_text_config()
    # Cohere multiplies its logits, Granite divides them.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    parts = (head.weight, getattr(head, "bias", None))
    weight, bias = (None if part is None else part[:tokens].detach().float() * scale for part in parts)
    return Readout(weight, bias, getattr(config, "final_logit_softcapping", None))


def tensor_hash(*tensors: torch.Tensor | None) -> str:
    """Hash of the values of several tensors, in float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _source(name: str) -> str:
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
    known = f"bundled are {', '.join(bundled())}; or give a folder or hub id"
    raise ChassisError(f"no model '{name}' and no such folder: {known}")


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer; the same code for bundled, local and hub models.

    Args:
        name: bundled name (`pocket-base`, ...), model folder, or hub id (`org/name`).
        revision: branch, tag or commit of a hub model.
        device: `auto` (a GPU if there is one), or any torch device.
        dtype: of the weights; float32 on CPU and the model's own on a GPU unless given.
        trust_remote_code: run code that comes with the model.

    Returns:
        A frozen `LanguageModel` whose readout has been checked against the model's own logits.

    Raises:
        ChassisError: unknown name, hub out of reach, tokenizer or weights missing, or a head that does
            something after the linear map which is not known here.
    """
    source = _source(str(name))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options |= {"config": config, "dtype": dtype or (torch.float32 if device == "cpu" else "auto")}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"{name}: the folder could not be loaded ({' '.join(str(error).split())[:160]})"
        if not Path(source).is_dir():
            reason = f"{name} is not on this machine and the hub gave nothing ({type(error).__name__}): "
            reason += "check the id and the network, or give a local folder"
        raise ChassisError(reason) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if info["mismatched_keys"]:
        key, *shapes = sorted(info["mismatched_keys"])[0]
        found, wanted = map(tuple, shapes)
        raise ChassisError(f"{name}: {key} has shape {found}, its config says {wanted}: get the whole folder")
    if missing := sorted(info["missing_keys"]):
        count, first = len(missing), missing[0]
        raise ChassisError(f"{name}: {count} weights are missing, the first is {first}: get the whole folder")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        unusable = "the tokenizer has more entries than the embedding; texts that use them fail"
        warnings.warn(f"{name}: {unusable}", stacklevel=2)
    return LanguageModel(str(name), model.to(device), tokenizer)
