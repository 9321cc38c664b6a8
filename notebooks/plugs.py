"""The experts that a page's parameter `expert` names; some are the base's logits and a bias, or that behind a gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from chassis_utils import Adapter, ChassisError, LanguageModel, harvest, load, probe_set, token_bytes
from chassis_utils.models import Readout, tensor_hash
from chassis_utils.solve import Gram, scaled_ridge

DIGITS, OPERATORS = "0123456789", "+-*/=<>"  # these and words as these: the study's whole list is not recorded
REASONING = "Therefore therefore Thus thus Hence hence Proof proof Step step So so Because because Since since".split()
# Unless told: the study's, where it has one.
STRENGTHS = {"synthetic": 1.0, "bias": 4.0, "safety": 12.0, "style": 1.0}


@dataclass(frozen=True)
class SyntheticExpert:
    """`h + (h U) V'` in front of the base's own head: an expert whose exact adapter is known.

    Source: the study's synthetic expert (rank 64, scale 0.01, seed 0 at hidden size 2,048).
    """

    name: str
    down: torch.Tensor  #: `U (hidden, rank)`
    up: torch.Tensor  #: `V' (rank, hidden)`
    readout: Readout

    @classmethod
    def from_base(cls, base: LanguageModel, rank: int | None = None, strength: float = 1.0, seed: int = 0) -> Self:
        """Draw one for a base of any size.

        Args:
            base: the model whose hidden states it changes.
            rank: rank of the change; hidden / 32 unless given, as 64 is to 2,048. ChassisError outside 1..hidden.
            strength: 1.0 changes `h` by the same relative amount as the study's 0.01 did at hidden 2,048 and rank 64:
                entries have size `0.01 sqrt(strength) (2048 / hidden)^(1/2)`.
            seed: of the draw.
        """
        hidden = base.hidden_size
        rank = max(1, hidden // 32) if rank is None else rank
        if not 1 <= rank <= hidden:
            raise ChassisError(f"expert rank {rank} is outside 1..{hidden}, the hidden size of {base.name}")
        generator = torch.Generator().manual_seed(seed)
        size = 0.01 * math.sqrt(strength * 2048 / hidden)
        u, v = (size * torch.randn(hidden, rank, generator=generator) for _ in "uv")
        name = f"synthetic(rank={rank}, strength={strength:g}, seed={seed})"
        return cls(name, u.to(base.device), v.T.contiguous().to(base.device), base.readout)

    @property
    def revision(self) -> str:
        """Hash of both factors."""
        return tensor_hash(self.down, self.up)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """The expert's head input `(n, hidden)` from the base's."""
        return hidden + (hidden @ self.down) @ self.up


@dataclass(frozen=True)
class BiasExpert:
    """The study's logit-bias expert: base logits (before any cap) plus a bias, in full or as far as a gate is open."""

    name: str
    readout: Readout  #: The base's with another bias, or with one more column of weight for the gate
    gate: torch.Tensor  #: `(hidden + 1, gates)`: a direction, and below it the threshold; no column is no gate
    revision: str  #: Hash of the bias and the gate

    @classmethod
    def from_base(cls, base: LanguageModel, name: str, bias: torch.Tensor, gate: torch.Tensor | None = None) -> Self:
        """Add `bias (vocab,)`, where `gate (hidden + 1, 1)` is open if there is one; ChassisError if it cannot be."""
        own, rows, size = base.readout, base.hidden_size + 1, base.vocab_size
        bias, gates = bias.to(own.weight), own.weight.new_zeros(rows, 0) if gate is None else gate.to(own.weight)
        if bias.shape != (size,) or len(gates) != rows or not bias.isfinite().all():
            raise ChassisError(f"{name} does not fit {base.name}: give {size} finite biases, gates of {rows}")
        if gate is None:
            parts = {"bias": bias if own.bias is None else own.bias + bias}
        else:
            parts = {"weight": torch.cat([own.weight, bias[:, None]], 1)}
        return cls(name, replace(own, **parts), gates, tensor_hash(bias, gates))

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """The expert's head input `(n, hidden + gates)`: the base's, and how far each gate is open, 0 to 1."""
        return torch.cat([hidden, torch.sigmoid(hidden @ self.gate[:-1] + self.gate[-1])], dim=-1)


def tokens_of(base: LanguageModel, characters: str, words: Sequence[str] = ()) -> torch.Tensor:
    """1 at tokens whose bytes, less spaces, are ASCII `characters` alone or a word, else 0; ChassisError if none is."""
    texts, wanted = [(piece or b"").strip(b" ") for piece in token_bytes(base.tokenizer)], {*map(str.encode, words)}
    found = [len(text) and float(text in wanted or not text.strip(characters.encode())) for text in texts]
    if not any(found):
        raise ChassisError(f"{base.name} has no token of '{characters}' and no word of {list(words)}: give others")
    return torch.tensor(found[: base.vocab_size])


def log_ratio(base: LanguageModel, of: str, against: str) -> torch.Tensor:
    """Log ratio of each token's frequencies in two bundled texts `(vocab,)`, nats, counts plus one."""
    both = [base.tokenizer(list(probe_set(k).prompts), add_special_tokens=False)["input_ids"] for k in (of, against)]
    counts = [1 + torch.tensor(sum(ids, [])).bincount(minlength=base.vocab_size)[: base.vocab_size] for ids in both]
    return (counts[0] / counts[0].sum()).log() - (counts[1] / counts[1].sum()).log()


def personal_gate(base: LanguageModel) -> torch.Tensor:
    """A gate open where a personal number would follow, by ridge to +-1 against other numbers and all of some texts."""
    plain = BiasExpert.from_base(base, "plain", torch.zeros(base.vocab_size))
    sets = [("personal", 192, "last"), ("numbers", 192, "last"), ("math-text", 8, "all"), ("prose", 8, "all")]
    sets = [harvest(base.bare, plain, probe_set(k, n=n), at, [-1], progress=False).layer(-1) for k, n, at in sets]
    rows = [some.repeat(round(max(map(len, sets)) / len(some)), 1) for some in sets]  # each set counts alike
    sign = torch.cat([torch.full((len(some), 1), 1.0 if some is rows[0] else -1.0) for some in rows])
    weight, shift = scaled_ridge(Gram.of(torch.cat(rows), sign), 1e-2)
    return 8 * torch.cat([weight, shift[None]])


def exact_adapter(base: LanguageModel, expert: SyntheticExpert) -> Adapter:
    """The expert's own factors as adapter: the family contains it (experiment 1)."""
    bias, own = torch.zeros(base.hidden_size, device=base.device), (base.name, base.head_hash)
    return Adapter("exact", base.num_layers, expert.down, expert.up, bias, *own, space="hidden")


def load_expert(spec: str, base: LanguageModel, seed: int = 0) -> LanguageModel | SyntheticExpert | BiasExpert:
    """The expert that a notebook's `expert` parameter names, beside its base.

    `spec` is a model as for `load`, or one of `STRENGTHS`, with another strength as `synthetic:8`: `synthetic` (drawn
    by `seed`), `bias` (digits, operators and words of reasoning favoured), `safety` (no digits where a personal number
    would follow), `style` (verse against prose). ChassisError where the strength is no positive number, or the model
    cannot be loaded.
    """
    kind, _, strength = spec.partition(":")
    if kind not in STRENGTHS:
        try:
            return load(spec, device=str(base.device))
        except ChassisError as error:
            if strength and not Path(spec).exists():  # no hub id holds a colon
                raise ChassisError(f"no expert '{kind}' has a strength: {', '.join(STRENGTHS)} have one") from error
            raise
    try:
        value = float(strength or STRENGTHS[kind])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ChassisError(f"expert '{spec}': after '{kind}:' give a positive strength, as in {kind}:8")
    if kind == "synthetic":
        return SyntheticExpert.from_base(base, strength=value, seed=seed)
    gate = personal_gate(base) if kind == "safety" else None
    bias = -tokens_of(base, DIGITS) if gate is not None else log_ratio(base, "verse", "prose")
    bias = tokens_of(base, DIGITS + OPERATORS, REASONING) if kind == "bias" else bias
    return BiasExpert.from_base(base, f"{kind}(strength={value:g})", value * bias, gate)
