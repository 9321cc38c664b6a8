"""The adapter: a small affine map beside a frozen base, and the closed forms that make one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .activations import Activations
from .errors import ChassisError
from .exchange import Exchange, card, found, licence, refusing
from .features import Features
from .files import replaceable, replacing
from .foreign import ForeignExpert
from .models import LanguageModel, Place, tensor_hash
from .solve import ROWS, Gram, Heads, low_rank, ridge
from .statistics import Statistics, room

FORMAT = 3  # 2 knew neither tokenizer nor licence
MOST_JSON, MOST_BYTES = 2**20, 2**35  #: No settings of an adapter are longer, no map to a vocabulary larger
#: What its JSON holds beside the format, and how its tensors are named.
_KINDS = dict.fromkeys(("method", "base_name", "head_hash", "space", "onto"), str) | {"layer": int, "rank": int}
_KINDS |= {"features": dict | NoneType, "edits": list, "info": dict}
_NAME = re.compile(r"(?:edits\.(0|[1-9][0-9]{0,3})\.)?(down|up|bias|columns|values|fitted_on)")
ONTO = ("final", "layer", "normed", "stream", "nothing")


@dataclass(frozen=True)
class Adapter(Exchange):
    """`hidden[layer] @ down @ up + bias`, added to the base's logits or to its head's input: every map of the study."""

    method: str
    layer: int  #: Layer of the base whose hidden state is read
    down: torch.Tensor  #: `(p, rank)`: p is the hidden size, or the number of `features`
    up: torch.Tensor  #: `(rank, m)`: m is the vocabulary, the number of `columns`, or the hidden size
    bias: torch.Tensor  #: `(m,)`
    base_name: str
    head_hash: str  #: Of the base's readout: the adapter fits no other
    space: str = "logits"  #: What is corrected: `logits`, or `hidden` (the head's input)
    #: What the correction is added to: the `final` state, the `layer`'s state read without the final norm (as the
    #: study did), the same `normed`, or `nothing` (a lens); an edit may also change the `stream` before the final norm.
    onto: str = "final"
    columns: torch.Tensor | None = None  #: `(m,)` vocabulary ids that are corrected; None is all
    features: Features | None = None  #: What is read, where it is not the state of `layer` alone
    edits: tuple[Adapter, ...] = ()  #: Changes of earlier layers that are in place when this one reads
    values: torch.Tensor | None = None  #: Singular values of the full map, largest first
    fitted_on: frozenset[int] = frozenset()  #: Fingerprints of the prompts it was fitted on
    info: dict = field(default_factory=dict)  #: Fit settings and statistics, plain numbers and strings

    @property
    def rank(self) -> int:
        """Columns of `down`."""
        return self.down.shape[1]

    @property
    def num_parameters(self) -> int:
        """Entries of `down`, `up` and `bias`, of the edits too; random features are drawn anew, not stored."""
        return sum(t.numel() for t in (self.down, self.up, self.bias)) + sum(x.num_parameters for x in self.edits)

    @property
    def reads(self) -> tuple[Place, ...]:
        """Where in the base it reads."""
        return (self.layer,) if self.features is None else self.features.places

    @property
    def changes(self) -> Place:
        """What an edit changes, never before what it reads: the state of `layer`, or the stream."""
        return "stream" if self.onto == "stream" else self.layer

    def inputs(self, hidden: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        """What `down` is multiplied with, `(..., p)`."""
        return hidden[self.layer] if self.features is None else self.features(hidden)

    def correction(self, hidden: Mapping[Place, torch.Tensor]) -> torch.Tensor:
        """What it adds, `(..., m)`, from what is found at the places it reads."""
        return (self.inputs(hidden) @ self.down) @ self.up + self.bias

    def named(self, method: str) -> Adapter:
        """The same adapter under another name, as records and figures will show it."""
        return replace(self, method=method)

    def at_rank(self, rank: int) -> Adapter:
        """The best map of a lower rank in the same metric: the first `rank` factors. ChassisError outside 1..rank."""
        if not (isinstance(rank, int) and 1 <= rank <= self.rank):
            raise ChassisError(f"rank {rank} is outside 1..{self.rank}, the fitted rank of this {self.method} adapter")
        return replace(self, down=self.down[:, :rank], up=self.up[:rank])

    @property
    def revision(self) -> str:
        """Hash of what is read, the map, what it changes, and the edits before it."""
        own = tensor_hash(self.down, self.up, self.bias, torch.tensor(self.layer), self.columns)
        parts = [own, self.space, self.onto, repr(self.features), *(edit.revision for edit in self.edits)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def logits(
        self, base: LanguageModel, hidden: Mapping[Place, torch.Tensor], plain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adapted logits `(n, vocab)` from the base's hidden states, layer -> `(n, hidden)`, after its edits.

        `plain` saves a product where several adapters are compared: the linear logits of the final states among them.
        """
        readout, correction = base.readout, self.correction(hidden)
        if self.onto == "nothing":
            return readout(correction) if self.space == "hidden" else readout.cap(correction)
        last = self.onto == "final" or self.layer == base.num_layers
        start = hidden[base.num_layers if last else self.layer]
        if self.onto == "normed" and not last:
            start = base.final_norm(start)
        if self.space == "hidden":
            return readout(start + correction)
        own = plain if plain is not None and last else readout.linear(start)
        return readout.cap(own + correction if self.columns is None else own.index_add(1, self.columns, correction))

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter on another device."""
        moved = {k: t.to(device) for k, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved, edits=tuple(edit.to(device) for edit in self.edits))

    @classmethod
    def identity(cls, base: LanguageModel, layer: int | None = None, onto: str = "final") -> Adapter:
        """The bare base, or (with another layer and `onto`) the logit lens (:cite:`nostalgebraist2020logit`)."""
        layer, h, m = base.num_layers if layer is None else layer, base.hidden_size, base.vocab_size
        maps = (torch.zeros(shape, device=base.device) for shape in ((h, 0), (0, m), (m,)))
        return cls("identity", layer, *maps, base.name, base.head_hash, onto=onto)

    def save(self, folder: str | Path, figures: pd.DataFrame | None = None) -> Path:
        """Write its folder: JSON, safetensors, and a card that shows its settings and, of `evaluate`, its `figures`.

        It is there complete or not at all; ChassisError where that cannot be, or other files are there.
        """
        folder = replaceable(folder, ("adapter.json", "adapter.safetensors", "README.md"))
        (tensors, plain), told = self._written(), card(self, figures)
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / "adapter.safetensors")
            with refusing("this adapter's settings cannot be written", "keep info to short words and finite numbers"):
                text = json.dumps({"format": FORMAT} | plain, indent=1, allow_nan=False)
            (temporary / "adapter.json").write_text(text + "\n")
            (temporary / "README.md").write_text(told, encoding="utf-8")
        return folder

    def _written(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and plain values, those of edit number i under `edits.i.`."""
        tensors = {k: t.cpu().contiguous() for k, t in vars(self).items() if isinstance(t, torch.Tensor)}
        if self.fitted_on:
            tensors["fitted_on"] = torch.tensor(sorted(self.fitted_on))
        edits = [edit._written() for edit in self.edits]
        tensors |= {f"edits.{i}.{k}": t for i, (theirs, _) in enumerate(edits) for k, t in theirs.items()}
        plain = {k: v for k, v in vars(self).items() if isinstance(v, int | str | dict)} | {"rank": self.rank}
        plain |= {"features": self.features and asdict(self.features), "edits": [values for _, values in edits]}
        return tensors, plain

    @classmethod
    def load(cls, folder: str | Path, base: LanguageModel | None = None, revision: str | None = None) -> Adapter:
        """Read the folder that `save` wrote, or a repository of the hub (`org/name`, at a `revision`).

        Nothing in it is executed, and no tensor is read before names, types and shapes are those of an adapter, and of
        the base if given. ChassisError: nothing is there, or what is damaged, of another format, or for another base.
        """
        told = f"{folder} is not a readable adapter folder", "save it, or fit it again"
        here, root = found(folder, revision)
        with refusing(*told):
            plain, path = _settings(here, root)
            shell = cls._read(plain, path, shapes=True)
        if base is not None:
            shell.check_base(base)._check_sizes(base)
        with refusing(*told):
            adapter = cls._read(plain, path)
        return adapter if base is None else adapter.check_base(base).to(base.device)

    @classmethod
    def _read(cls, plain: dict, path: Path, shapes: bool = False) -> Adapter:
        """The way back, also with `shapes` that hold no values; raises on whatever `_written` does not write."""
        parts: list[dict[str, Any]] = [{}, *({} for _ in plain["edits"])]
        with safe_open(path, "pt") as file:
            for name in file.keys():
                known, part = _NAME.fullmatch(name), file.get_slice(name)
                if not known or part.get_dtype() != ("I64" if known[2] in ("columns", "fitted_on") else "F32"):
                    raise ChassisError(f"a tensor {name!a:.60} of type {part.get_dtype()}, which no adapter has")
                tensor = torch.empty(part.get_shape(), device="meta") if shapes else file.get_tensor(name)
                parts[int(known[1] or -1) + 1][known[2]] = tensor
        for tensors, own in zip(parts, (plain, *plain["edits"]), strict=True):
            good = own.keys() == _KINDS.keys() and all(isinstance(own[k], kind) for k, kind in _KINDS.items())
            words = [*own.values(), *own["info"].values()] if good else []
            good = good and all(str(v).isprintable() and (not isinstance(v, str) or len(v) < 999) for v in words)
            good = good and not any(isinstance(v, dict | list) for v in own["info"].values())
            if not good or tensors["down"].shape[-1] != own["rank"] or (own is not plain and own["edits"]):
                raise ChassisError("settings missing, unknown or of another kind")
            fitted = tensors.pop("fitted_on", torch.empty(0))
            tensors |= {k: v for k, v in own.items() if k not in ("rank", "edits")}
            tensors["features"] = own["features"] and Features(**own["features"])
            tensors["fitted_on"] = frozenset() if shapes else frozenset(fitted.tolist())
        first, *edits = (cls(**part)._checked("shapes or values that do not fit one another") for part in parts)
        return replace(first, edits=tuple(edits))

    def _checked(self, wrong: str) -> Adapter:
        (p, rank), (rows, m), columns, features = self.down.shape, self.up.shape, self.columns, self.features
        good = rank == rows and self.bias.shape == (m,) and self.onto in ONTO and self.space in ("logits", "hidden")
        good = good and (columns is None or columns.shape == (m,)) and type(self.layer) is int and self.layer >= 0
        # No map needs more factors; random features are drawn, as many as a file says: no more than it has numbers for.
        good = good and rank <= p + 1 and (features is None or features.random < min(p, p * rank + 1))
        if good and not self.down.is_meta:
            numbers = [t for t in (self.down, self.up, self.bias, self.values) if t is not None]
            good = all(torch.isfinite(t).all() for t in numbers)
            good = good and (columns is None or (bool((columns >= 0).all()) and len(columns.unique()) == m))
        if not good:
            raise ChassisError(wrong)
        return self

    def _check_sizes(self, base: LanguageModel) -> None:
        """Refuse shapes that the base does not have, found by a pass over one token."""
        parts = self, *self.edits
        places = tuple(dict.fromkeys(place for one in parts for place in (*one.reads, one.changes)))
        widths = dict(zip(places, Features(places).sizes(base), strict=True))
        for one in parts:
            p = sum(widths[place] for place in one.reads) + (one.features.random if one.features else 0)
            head = base.hidden_size if one.space == "hidden" else base.vocab_size
            m = widths[one.changes] if one is not self else head if one.columns is None else min(head, len(one.bias))
            if (there := [len(one.down), len(one.bias)]) != [p, m]:
                raise ChassisError(f"a map of sizes {there}, where {base.name} has {[p, m]}: fit one for this base")

    def check_base(self, base: LanguageModel) -> Adapter:
        """Itself, if made for this base: head and, where known, tokenizer and body; else ChassisError, naming both."""
        if not isinstance(base, LanguageModel):
            raise ChassisError(f"base is a {type(base).__name__}, not a model: load it first")
        here = {"head": [base.head_hash], "tokenizer": [base.tokenizer_hash]}
        here["body"] = [base.bare.revision, base.revision]  # edits may have come later
        made = {"tokenizer": self.info.get("tokenizer_hash"), "body": self.info.get("base_revision")}
        for part, ours in ({"head": self.head_hash} | made).items():
            if ours is not None and ours not in here[part]:
                both = f"{self.base_name} ({part} {ours!a:.32}), not for {base.name} ({part} {here[part][-1]})"
                raise ChassisError(f"this adapter was made for {both}: fit one for this base")
        if self.columns is not None and not self.columns.is_meta and (self.columns >= base.vocab_size).any():
            raise ChassisError(f"this adapter corrects tokens that {base.name} has not: fit one for this base")
        return self


def _settings(folder: Path, root: Path) -> tuple[dict, Path]:
    """The JSON of a folder whose files lie in `root`, and where its tensors are; raises on what `save` never writes."""
    paths = [(folder / name).resolve(strict=True) for name in ("adapter.json", "adapter.safetensors")]
    for path, most in zip(paths, (MOST_JSON, MOST_BYTES), strict=True):
        if not (path.is_file() and path.is_relative_to(root.resolve()) and path.stat().st_size <= most):
            raise ChassisError(f"a file that is none, lies elsewhere, or has more than {most:,} bytes")
    plain = json.loads(paths[0].read_bytes())
    json.dumps(plain, allow_nan=False)  # raises on NaN and infinity, however they were written
    if (known := plain.pop("format")) != FORMAT:
        raise ChassisError(f"adapter format {known!a:.32}, this version reads {FORMAT}")
    with paths[1].open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MOST_JSON:
            raise ChassisError(f"tensors with no header, or one of more than {MOST_JSON:,} bytes")
    return plain, paths[1]


METHODS: dict[str, Callable[..., Adapter]] = {}


def method(name: str) -> Callable[[Callable[..., Adapter]], Callable[..., Adapter]]:
    """Register a closed form under the name that `fit` takes."""
    return lambda function: METHODS.setdefault(name, function)


def fit(
    activations: Activations | Statistics, method: str = "v2", rank: int | None = None, *,
    layer: int = -1, lam: float | None = None, **options: Any,
) -> Adapter:  # fmt: skip
    """Solve for an adapter in closed form.

    Args:
        activations: of base and expert on the training probes; or what `gather` returns, for `ridge`, `rrr` and `v2`.
        method: `v2` (the strongest from states and head; `distill._v2`), `v1` (the study's), `ridge`, `rrr` (difference
            to base logits, all columns; cut by SVD or in the data's metric), `lens`, or one registered by `@method`.
        rank: of the map; None keeps all, to be cut later by `Adapter.at_rank`.
        layer: of the base, negative from the last.
        lam: ridge penalty on the sum of squares, 1e-3 unless given; `v2` chooses its own, as a share of the rows.
        **options: of the method; `fit` names those that a method does not know.

    ChassisError: an unknown method, option, layer or rank, more than memory holds, or a singular system.
    """
    from . import distill  # noqa: F401  it registers v2, and needs this module

    sums = isinstance(activations, Statistics)
    if not sums and not isinstance(activations, Activations):
        raise ChassisError(f"activations is a {type(activations).__name__}: give what harvest or gather returns")
    if not isinstance(method, str) or method not in METHODS:
        raise ChassisError(f"no method '{method}': choose from {', '.join(sorted(METHODS))}")
    if sums and method not in ("ridge", "rrr", "v2"):
        raise ChassisError(f"method {method} needs every row: give what harvest returns")
    base, expert, foreign = activations.base, activations.expert, isinstance(activations.expert, ForeignExpert)
    function = METHODS["near" if foreign and method == "v2" else method]
    known = function.__code__.co_varnames[3 : function.__code__.co_argcount + function.__code__.co_kwonlyargcount]
    if unknown := ", ".join(sorted({*options} - {*known})):
        raise ChassisError(f"method {method} has no option {unknown}; it takes {', '.join(known) or 'none'}")
    if foreign and method not in ("v2", "near"):
        raise ChassisError(f"no linear map leads to what {expert.name} says: take method v2")
    if not foreign and expert.readout.softcap != base.readout.softcap:
        raise ChassisError(f"{base.name} and {expert.name} cap their logits differently: no linear map joins them")
    if not sums:
        activations.layer(layer)
    elif options.get("features") or {layer % (base.num_layers + 1), activations.layer} != {base.num_layers}:
        raise ChassisError("statistics hold what is read, and need the final state: tell gather the features, not fit")
    lam = 1e-3 if lam is None and method not in ("v2", "near") else lam
    adapter = function(activations, layer % (base.num_layers + 1), lam, **options)
    probes = activations.probes if sums else (activations.probes,)
    info = {"n": len(activations), "lam": lam, "probes": " + ".join(one.name for one in probes)} | adapter.info
    info |= {"positions": activations.positions, "expert": expert.name, "expert_revision": expert.revision}
    info |= {"base_revision": base.revision, "tokenizer_hash": base.tokenizer_hash, "licence": licence(expert)}
    whole = *probes, *filter(None, [getattr(expert, "text", None)])  # what a rule was counted on is fitted on
    seen = frozenset().union(*(one.fingerprints for one in whole))
    adapter = replace(adapter, method=method, info=info, fitted_on=seen).to(base.device)
    adapter._checked(f"method {method} gives NaN or infinity at layer {layer}: try a larger lam")
    return adapter if rank is None else adapter.at_rank(rank)


def assembled(
    a: Activations | Statistics, layer: int, factors: tuple[torch.Tensor, ...], bias: torch.Tensor, **kind
) -> Adapter:
    """What a closed form returns: the factors of `low_rank` and a bias `(m,)`, as an adapter that reads `layer`."""
    down, up, values, bias = (t.float() for t in (*factors, bias))
    if isinstance(a, Statistics):
        kind["features"] = kind.get("features") or a.features
    return Adapter("", layer, down, up, bias, a.base.name, a.base.head_hash, values=values, **kind)


def heads(a: Activations | Statistics, device: torch.device | str = "cpu") -> tuple[Heads, torch.Tensor]:
    """`J (expert hidden + hidden, vocab)` and `j (vocab,)`: expert minus base logits, before any cap, are `y J + j`.

    y is the expert's and the base's final state side by side. Both parts are centred over the vocabulary.
    """
    theirs, own = a.expert.readout, a.base.readout
    both = Heads(((1.0, theirs.weight), (-1.0, own.weight)), device=device)
    shift = (theirs.shift.double() - own.shift.double()).to(device)
    # Under a cap a constant over the vocabulary counts; elsewhere it would only cost rank.
    return (both.centred(), shift - shift.mean()) if own.softcap is None else (both, shift)


def difference(
    a: Activations | Statistics, layer: int, lam: float, features: Features | None = None
) -> tuple[torch.Tensor, torch.Tensor, Gram]:
    """Ridge from a layer's state, or features, to the final states of expert and base side by side.

    Both logits are linear in these, so one fit to hidden states serves all columns of the vocabulary (see `heads`).
    Returns `W (p, expert hidden + hidden)`, its bias, and the statistics used.
    """
    if isinstance(a, Statistics):
        return *ridge(gram := a.train + a.held, lam), gram
    features, y = features or Features((layer,)), torch.cat([a.expert_hidden, a.hidden[a.final]], dim=1)
    found = {place: a.layer(place) for place in features.places}
    p = sum(part.shape[1] for part in found.values()) + features.random
    device = room(a.base, p, y.shape[1], a.base.vocab_size, len(a))  # before features of all rows are made
    gram = Gram.of(features(found), y, device)
    return *ridge(gram, lam), gram


def column_weights(a: Activations | Statistics) -> torch.Tensor:
    """Mean of `p (1 - p)` over some 2,048 rows of the expert, `(vocab,)`: how much each logit counts in the KL.

    A token that never occurs keeps a millionth of the mean, so that no direction is lost.
    """
    head = a.expert.readout
    some = a.kept[1][:, : head.weight.shape[1]] if isinstance(a, Statistics) else a.expert_hidden[:: len(a) // 2048 + 1]
    each = (head(part.to(head.weight.device)).softmax(-1).double() for part in some.split(ROWS))
    weights = sum((p * (1 - p)).sum(0) for p in each) / len(some)
    return weights.clamp(min=1e-6 * float(weights.mean()))


@method("ridge")
def _ridge(a: Activations, layer: int, lam: float, features: Features | None = None) -> Adapter:
    """Difference to base logits, all columns; lower ranks by plain SVD."""
    weight, bias, _ = difference(a, layer, lam, features)
    both, shift = heads(a, bias.device)
    return assembled(a, layer, low_rank(weight, None, both), bias @ both + shift, features=features)


@method("rrr")
def _rrr(a: Activations, layer: int, lam: float, features: Features | None = None, metric: str = "data") -> Adapter:
    """Difference to base logits, all columns; lower ranks optimal for the fitted error, or for `kl` about so."""
    if metric not in ("data", "kl"):
        raise ChassisError(f"metric = '{metric}': choose data or kl")
    weight, bias, gram = difference(a, layer, lam, features)
    columns, (both, shift) = column_weights(a) if metric == "kl" else None, heads(a, bias.device)
    factors = low_rank(weight, gram.xx, both, columns)
    return assembled(a, layer, factors, bias @ both + shift, info={"metric": metric}, features=features)


@method("lens")
def _lens(a: Activations, layer: int, lam: float) -> Adapter:
    """A layer's state straight to the expert's logits, all columns (experiment 3)."""
    head = Heads(((1.0, a.expert.readout.weight),))
    weight, bias = ridge(Gram.of(a.layer(layer), a.expert_hidden), lam)
    return assembled(a, layer, low_rank(weight, None, head), bias @ head + a.expert.readout.shift, onto="nothing")


@method("v1")
def _v1(a: Activations, layer: int, lam: float, top_k: int | None = None, normed: bool = False) -> Adapter:
    """The study's adapter: the K columns of largest lens norm, difference to the layer's own readout, SVD.

    Source: experiments 4 and 5. `top_k` is 2,048 of 32,000 there and the same share here; `normed` reads the
    layer through the final norm, which the study left out.
    """
    base, x, vocab = a.base, a.layer(layer), a.base.vocab_size
    top_k = max(1, round(vocab * 2048 / 32000)) if top_k is None else top_k
    if not 1 <= top_k <= vocab:
        raise ChassisError(f"top_k = {top_k} is outside 1..{vocab}, the vocabulary of {base.name}")
    if (h := x.shape[1]) != base.hidden_size:
        raise ChassisError(f"layer {layer} of {base.name} has size {h}, its head reads {base.hidden_size}: use rrr")
    lens = _lens(a, layer, lam)
    columns = (lens.down @ lens.up).norm(dim=0).topk(top_k).indices.sort().values
    onto = "normed" if normed and layer != a.final else "layer"
    own = base.final_norm(x) if onto == "normed" else x
    head, head_bias = base.readout.weight[columns].T.cpu().double(), base.readout.shift[columns].double()
    # D = X W_K + b_K - (X J)_K is linear in X (and in its norm), so statistics of hidden states suffice.
    weight, bias = ridge(Gram.of(x, torch.cat([x, own], dim=1)), lam)
    lens_map = lens.down.double() @ lens.up.double()[:, columns]
    full = weight[:, :h] @ lens_map - weight[:, h:] @ head
    shift = bias[:h] @ lens_map + lens.bias.double()[columns] - bias[h:] @ head - head_bias
    return assembled(a, layer, low_rank(full), shift, onto=onto, columns=columns, info={"top_k": top_k})
