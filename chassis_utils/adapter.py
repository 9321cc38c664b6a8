"""The adapter: a small affine map beside a frozen base, and the closed forms that make one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .activations import Activations
from .errors import ChassisError
from .experts import SyntheticExpert
from .models import LanguageModel, tensor_hash
from .records import replacing
from .solve import Gram, low_rank, ridge

FORMAT = 1
ONTO = ("final", "layer", "normed", "nothing")


@dataclass(frozen=True)
class Adapter:
    """`hidden[layer] @ down @ up + bias`, added to the base's logits or to its head's input.

    One class holds every map of the study: the v1 adapter, lenses, hidden-to-hidden maps and the corrections.
    """

    method: str
    layer: int
    """Layer of the base whose hidden state is read."""
    down: torch.Tensor
    """`(hidden, rank)`."""
    up: torch.Tensor
    """`(rank, m)`: m is the vocabulary, the number of `columns`, or the hidden size."""
    bias: torch.Tensor
    """`(m,)`."""
    base_name: str
    head_hash: str
    """Of the base's readout: the adapter fits no other."""
    space: str = "logits"
    """What is corrected: `logits`, or `hidden` (the head's input)."""
    onto: str = "final"
    """What the correction is added to: the `final` state, the `layer`'s state read without the final norm (as the
    study did), the same `normed`, or `nothing` (a lens)."""
    columns: torch.Tensor | None = None
    """`(m,)` vocabulary ids that are corrected; None is all."""
    values: torch.Tensor | None = None
    """Singular values of the full map, largest first."""
    fitted_on: frozenset[int] = frozenset()
    """Fingerprints of the prompts it was fitted on."""
    info: dict = field(default_factory=dict)
    """Fit settings and statistics, plain numbers and strings."""

    @property
    def rank(self) -> int:
        """Columns of `down`."""
        return self.down.shape[1]

    @property
    def num_parameters(self) -> int:
        """Entries of `down`, `up` and `bias`."""
        return self.down.numel() + self.up.numel() + self.bias.numel()

    def named(self, method: str) -> Adapter:
        """The same adapter under another name, as records and figures will show it."""
        return replace(self, method=method)

    def at_rank(self, rank: int) -> Adapter:
        """The best map of a lower rank in the same metric: the first `rank` factors.

        Raises:
            ChassisError: rank 0 or below, or above what was fitted.
        """
        if not (isinstance(rank, int) and 1 <= rank <= self.rank):
            raise ChassisError(
                f"rank {rank} is outside 1..{self.rank}, what this {self.method} adapter was fitted with"
            )
        return replace(self, down=self.down[:, :rank], up=self.up[:rank])

    def delta(self, state: torch.Tensor) -> torch.Tensor:
        """The correction `(n, m)` for states `(n, hidden)` of its layer."""
        return (state @ self.down) @ self.up + self.bias

    @property
    def revision(self) -> str:
        """Hash of layer and map."""
        return tensor_hash(self.down, self.up, self.bias, torch.tensor(self.layer))

    def logits(self, base: LanguageModel, hidden: dict[int, torch.Tensor]) -> torch.Tensor:
        """Adapted logits `(n, vocab)` from the base's hidden states, layer -> `(n, hidden)`."""
        readout = base.readout
        state = hidden[self.layer]
        correction = self.delta(state)
        if self.onto == "nothing":
            start = None
        elif self.onto == "final":
            start = hidden[base.num_layers]
        else:
            start = base.final_norm(state) if self.onto == "normed" and self.layer != base.num_layers else state
        if self.space == "hidden":
            return readout(correction if start is None else start + correction)
        if start is None:
            return readout.cap(correction)
        logits = readout.linear(start)
        if self.columns is None:
            return readout.cap(logits + correction)
        return readout.cap(logits.index_add(1, self.columns, correction))

    def into_hidden(self, base: LanguageModel, inverse: str = "pseudo") -> Adapter:
        """The change of logits as a change of the head's input.

        Args:
            base: whose head is inverted.
            inverse: `pseudo` (least squares over the corrected columns), or `transpose`, which multiplies by the
                head's rows instead, as experiment 6 did.

        Raises:
            ChassisError: an unknown `inverse`, or an adapter that changes hidden states already.
        """
        if self.space == "hidden" or inverse not in ("pseudo", "transpose"):
            raise ChassisError(f"inverse = '{inverse}' of an adapter in {self.space}: logits by pseudo or transpose")
        rows = base.readout.weight if self.columns is None else base.readout.weight[self.columns]
        back = rows if inverse == "transpose" else torch.linalg.pinv(rows.double().T).to(rows.dtype)
        return replace(self, up=self.up @ back, bias=self.bias @ back, columns=None, space="hidden")

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter on another device."""
        moved = {k: getattr(self, k) for k in ("down", "up", "bias", "columns")}
        return replace(self, **{k: None if t is None else t.to(device) for k, t in moved.items()})

    @classmethod
    def identity(cls, base: LanguageModel, layer: int | None = None, onto: str = "final") -> Adapter:
        """No correction: the unadapted base, or (with another layer and `onto`) the logit lens."""
        layer = base.num_layers if layer is None else layer
        empty = (
            torch.zeros(base.hidden_size, 0, device=base.device),
            torch.zeros(0, base.vocab_size, device=base.device),
        )
        bias = torch.zeros(base.vocab_size, device=base.device)
        return cls("identity", layer, *empty, bias, base.name, base.head_hash, onto=onto)

    @classmethod
    def exact(cls, base: LanguageModel, expert: SyntheticExpert) -> Adapter:
        """The expert's own factors as adapter: the family contains it (experiment 1)."""
        bias = torch.zeros(base.hidden_size, device=base.device)
        return cls("exact", base.num_layers, expert.down, expert.up, bias, base.name, base.head_hash, space="hidden")

    def save(self, folder: str | Path) -> Path:
        """Write `adapter.json` and `adapter.safetensors`; the folder appears complete or not at all.

        Raises:
            ChassisError: the folder exists and is no adapter, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "adapter.json").is_file():
            raise ChassisError(f"{folder} exists and is no adapter folder: choose another name")
        tensors = {k: t for k in ("down", "up", "bias", "columns", "values") if (t := getattr(self, k)) is not None}
        if self.fitted_on:
            tensors["fitted_on"] = torch.tensor(sorted(self.fitted_on))
        plain = {
            k: v for k, v in asdict(replace(self, fitted_on=frozenset())).items() if not isinstance(v, torch.Tensor)
        }
        plain = {"format": FORMAT} | {k: v for k, v in plain.items() if k not in ("columns", "values", "fitted_on")}
        text = json.dumps(plain, indent=1) + "\n"
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary / "adapter.safetensors")
            (temporary / "adapter.json").write_text(text)
        return folder

    @classmethod
    def load(cls, folder: str | Path, base: LanguageModel | None = None) -> Adapter:
        """Read an adapter folder; nothing in it is executed.

        Args:
            folder: what `save` wrote.
            base: refuse the adapter unless it was made for this base's head.

        Raises:
            ChassisError: nothing there, damaged, of an unknown format, or made for another base.
        """
        folder = Path(folder)
        try:
            plain = json.loads((folder / "adapter.json").read_text())
            tensors = load_file(folder / "adapter.safetensors")
            known = plain.pop("format")
            fitted_on = frozenset(tensors.pop("fitted_on", torch.empty(0, dtype=torch.long)).tolist())
            adapter = cls(**plain, **tensors, fitted_on=fitted_on)
            adapter._check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ChassisError(
                f"{folder} is not a readable adapter folder ({type(error).__name__}): save it again"
            ) from error
        if known != FORMAT:
            raise ChassisError(f"{folder} has adapter format {known}, this version reads {FORMAT}: update chassis")
        if base is not None:
            adapter.check_base(base)
        return adapter

    def _check(self) -> None:
        rank, m = self.up.shape
        good = self.down.ndim == 2 and self.down.shape[1] == rank and self.bias.shape == (m,) and self.onto in ONTO
        good = good and isinstance(self.layer, int) and self.layer >= 0
        good = good and (self.columns is None or self.columns.shape == (m,)) and self.space in ("logits", "hidden")
        if not (good and all(torch.isfinite(t).all() for t in (self.down, self.up, self.bias))):
            raise ValueError("shapes or values")

    def check_base(self, base: LanguageModel) -> None:
        """Refuse a base with another head.

        Raises:
            ChassisError: naming both.
        """
        if self.head_hash != base.head_hash:
            raise ChassisError(
                f"this adapter was made for {self.base_name} (head {self.head_hash}), not for {base.name} "
                f"(head {base.head_hash}): fit one for this base"
            )


Method = Callable[..., Adapter]
METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a closed form under the name that `fit` takes."""

    def register(function: Method) -> Method:
        METHODS[name] = function
        return function

    return register


def fit(
    activations: Activations,
    method: str = "rrr",
    rank: int | None = None,
    *,
    layer: int = -1,
    lam: float = 1e-3,
    **options,
) -> Adapter:
    """Solve for an adapter in closed form.

    Args:
        activations: of base and expert on the training probes.
        method: `v1` (the study's), `ridge` and `rrr` (difference to base logits, all columns; cut by SVD or in the
            data's metric), `hidden` (difference of hidden states), `aligned` and `projected` (experiment 2), `lens`.
        rank: of the map; None keeps all, to be cut later by `Adapter.at_rank`.
        layer: of the base, negative from the last.
        lam: ridge penalty on the sum of squares.
        **options: of the method; `fit` names those that a method does not know.

    Raises:
        ChassisError: unknown method or option, layer not harvested, rank 0 or above the dimension, K above the
            vocabulary, a singular system, or a map that is not finite.
    """
    if not isinstance(activations, Activations):
        raise ChassisError(f"activations is a {type(activations).__name__}: give what harvest returns")
    if not isinstance(method, str) or method not in METHODS:
        raise ChassisError(f"no method '{method}': choose from {', '.join(sorted(METHODS))}")
    function = METHODS[method]
    known = function.__code__.co_varnames[3 : function.__code__.co_argcount + function.__code__.co_kwonlyargcount]
    if unknown := set(options) - set(known):
        raise ChassisError(
            f"method {method} has no option {', '.join(sorted(unknown))}; it takes {', '.join(known) or 'none'}"
        )
    base, expert = activations.base, activations.expert
    if expert.readout.softcap != base.readout.softcap:
        raise ChassisError(f"{base.name} and {expert.name} cap their logits differently: no linear map joins them")
    activations.layer(layer)
    adapter = function(activations, layer % (base.num_layers + 1), lam, **options)
    info = adapter.info | {
        "n": len(activations),
        "lam": lam,
        "probes": activations.probes.name,
        "positions": activations.positions,
        "base_revision": base.revision,
        "expert": expert.name,
        "expert_revision": expert.revision,
    }
    adapter = replace(adapter, method=method, info=info, fitted_on=activations.probes.fingerprints).to(base.device)
    try:
        adapter._check()
    except ValueError as error:
        raise ChassisError(f"method {method} gives NaN or infinity at layer {layer}: try a larger lam") from error
    return adapter if rank is None else adapter.at_rank(rank)


def _adapter(a: Activations, layer: int, factors: tuple[torch.Tensor, ...], bias: torch.Tensor, **kind) -> Adapter:
    down, up, values = factors
    return Adapter(
        "", layer, down.float(), up.float(), bias.float(), a.base.name, a.base.head_hash, values=values.float(), **kind
    )


def _readouts(a: Activations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`J_e (expert hidden, vocab)`, `J (hidden, vocab)` and expert bias minus base bias `(vocab,)`, float64 on CPU."""
    expert, base = a.expert.readout, a.base.readout
    zero = torch.zeros(base.vocab_size, dtype=torch.float64)
    bias = sum(((s * r.bias.cpu().double()) for s, r in ((1, expert), (-1, base)) if r.bias is not None), zero)
    return expert.weight.T.cpu().double(), base.weight.T.cpu().double(), bias


def difference(a: Activations, layer: int, lam: float) -> tuple[torch.Tensor, torch.Tensor, Gram]:
    """Ridge from a layer's state to expert logits minus base logits (before any cap), centred over the vocabulary.

    Both logits are linear in hidden states, so one fit to the hidden states serves all columns.

    Returns:
        `B (hidden, vocab)`, `d (vocab,)`, and the statistics used.
    """
    expert_head, base_head, head_bias = _readouts(a)
    gram = Gram.of(a.layer(layer), torch.cat([a.expert_hidden, a.hidden[a.final]], dim=1))
    weight, bias = ridge(gram, lam)
    cut = a.expert_hidden.shape[1]
    full = weight[:, :cut] @ expert_head - weight[:, cut:] @ base_head
    shift = bias[:cut] @ expert_head - bias[cut:] @ base_head + head_bias
    if a.base.readout.softcap is None:
        # A constant over the vocabulary changes no probability (unless a cap follows): it would only cost rank.
        full, shift = full - full.mean(1, keepdim=True), shift - shift.mean()
    return full, shift, gram


@method("ridge")
def _ridge(a: Activations, layer: int, lam: float) -> Adapter:
    """Difference to base logits, all columns; lower ranks by plain SVD."""
    full, shift, _ = difference(a, layer, lam)
    return _adapter(a, layer, low_rank(full), shift)


@method("rrr")
def _rrr(a: Activations, layer: int, lam: float) -> Adapter:
    """Difference to base logits, all columns; lower ranks optimal for the fitted error."""
    full, shift, gram = difference(a, layer, lam)
    return _adapter(a, layer, low_rank(full, gram.covariance), shift)


@method("lens")
def _lens(a: Activations, layer: int, lam: float) -> Adapter:
    """A layer's state straight to the expert's logits, all columns (experiment 3)."""
    expert_head, _, _ = _readouts(a)
    weight, bias = ridge(Gram.of(a.layer(layer), a.expert_hidden), lam)
    shift = bias @ expert_head
    if a.expert.readout.bias is not None:
        shift = shift + a.expert.readout.bias.cpu().double()
    return _adapter(a, layer, low_rank(weight @ expert_head), shift, onto="nothing")


@method("v1")
def _v1(a: Activations, layer: int, lam: float, top_k: int | None = None, normed: bool = False) -> Adapter:
    """The study's adapter: the K columns of largest lens norm, difference to the layer's own readout, SVD.

    Source: experiments 4 and 5. `top_k` is 2,048 of 32,000 there and the same share here; `normed` reads the
    layer through the final norm, which the study left out.
    """
    base, x = a.base, a.layer(layer)
    vocab = base.vocab_size
    top_k = max(1, round(vocab * 2048 / 32000)) if top_k is None else top_k
    if not 1 <= top_k <= vocab:
        raise ChassisError(f"top_k = {top_k} is outside 1..{vocab}, the vocabulary of {base.name}")
    lens = _lens(a, layer, lam)
    columns = (lens.down @ lens.up).norm(dim=0).topk(top_k).indices.sort().values
    if x.shape[1] != base.hidden_size:
        raise ChassisError(
            f"layer {layer} of {base.name} has size {x.shape[1]}, its head reads {base.hidden_size}: use rrr"
        )
    onto = "normed" if normed and layer != a.final else "layer"
    own = base.final_norm(x) if onto == "normed" else x
    head = base.readout.weight.T.cpu().double()[:, columns]
    head_bias = 0 if base.readout.bias is None else base.readout.bias.cpu().double()[columns]
    # D = X W_K + b_K - (X J)_K is linear in X (and in its norm), so statistics of hidden states suffice.
    gram = Gram.of(x, torch.cat([x, own], dim=1))
    weight, bias = ridge(gram, lam)
    h = x.shape[1]
    lens_map, lens_up = lens.down.double(), lens.up.double()[:, columns]
    full = weight[:, :h] @ lens_map @ lens_up - weight[:, h:] @ head
    shift = bias[:h] @ lens_map @ lens_up + lens.bias.double()[columns] - bias[h:] @ head - head_bias
    return _adapter(a, layer, low_rank(full), shift, onto=onto, columns=columns, info={"top_k": top_k})


@method("hidden")
def _hidden(a: Activations, layer: int, lam: float) -> Adapter:
    """Difference of the hidden states themselves, read by the base's head; lower ranks in the data's metric."""
    _same_size(a)
    gram = Gram.of(a.layer(layer), a.expert_hidden - a.hidden[a.final])
    weight, bias = ridge(gram, lam)
    return _adapter(a, layer, low_rank(weight, gram.covariance), bias, space="hidden")


@method("aligned")
def _aligned(a: Activations, layer: int, lam: float) -> Adapter:
    """Ridge from base to expert hidden state, in place of the base's own (experiment 2); lower ranks by SVD."""
    _same_size(a)
    weight, bias = ridge(Gram.of(a.layer(layer), a.expert_hidden), lam)
    return _adapter(a, layer, low_rank(weight), bias, space="hidden", onto="nothing")


@method("projected")
def _projected(a: Activations, layer: int, lam: float, dim: int | None = None, seed: int = 0) -> Adapter:
    """Both sides projected at random to `dim`, ridge there, lifted back by the transpose (experiment 2).

    `dim` is 256 of 2,048 in the study and the same share here.
    """
    _same_size(a)
    hidden = a.base.hidden_size
    dim = max(1, hidden // 8) if dim is None else dim
    if not 1 <= dim <= hidden:
        raise ChassisError(f"dim = {dim} is outside 1..{hidden}, the hidden size of {a.base.name}")
    draw = torch.randn(hidden, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projection = torch.linalg.qr(draw).Q
    weight, bias = ridge(Gram.of(a.layer(layer).double() @ projection, a.expert_hidden.double() @ projection), lam)
    factors = low_rank(weight)
    lifted = (projection @ factors[0], factors[1] @ projection.T, factors[2])
    return _adapter(a, layer, lifted, bias @ projection.T, space="hidden", onto="nothing", info={"dim": dim})


@method("descent")
def _descent(a: Activations, layer: int, lam: float, after: Adapter | None = None, step: float = 0.1) -> Adapter:
    """A step down the final KL as a map of one layer's state, to be put in place by `LanguageModel.edited`.

    The target is minus the gradient of the KL at the end with respect to the state here, `after` being in place
    there (boosting by functional gradients, Friedman 2001); the change is `step` times as long as the state, on the
    average.
    """
    x = a.layer(layer)
    gram = Gram.of(x, -a.gradient(layer, after))
    weight, bias = ridge(gram, lam)
    change = x.double() @ weight + bias
    scale = step * float(x.double().norm(dim=1).mean() / change.norm(dim=1).mean().clamp(min=1e-30))
    factors = low_rank(weight * scale, gram.covariance)
    return _adapter(a, layer, factors, bias * scale, space="hidden", onto="layer", info={"step": step})


def _same_size(a: Activations) -> None:
    ours, theirs = a.base.hidden_size, a.expert_hidden.shape[1]
    if ours != theirs:
        raise ChassisError(
            f"{a.base.name} has hidden size {ours}, {a.expert.name} {theirs}: use a method on logits, as rrr"
        )
