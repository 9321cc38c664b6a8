"""What pages 15 to 18 ask of an expert with another tokenizer: its texts, its targets, adapters to them, figures."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from pandas.io.formats.style import Styler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chassis_utils import (
    Activations,
    Adapter,
    Bridge,
    ChassisError,
    Gram,
    LanguageModel,
    Probes,
    evaluate,
    fit,
    probe_set,
    ridge,
    token_bytes,
)
from chassis_utils.activations import batched
from chassis_utils.adapter import assembled, method
from chassis_utils.bridge import spelled
from chassis_utils.metrics import kl, ratio_bounds
from chassis_utils.solve import low_rank
from chassis_utils.tokens import ids_of, offsets
from plots import GREY, STYLES, _dropdowns, _figures, _finish, _numbers, _owned, shares
from pocket_recipe import gpt2_tokenizer, llama_tokenizer
from study import reported

LAMS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
COLOURS = STYLES["colours"]
BATCH = 32  # prompts a batch, as in the study
LEAST = 48  # bytes before a cut: passages begin alike, and a text that was fitted on must not be judged on
TINY = 1e-30  # a target's zeros, for the logarithm: their share of a KL is below any rounding


class StringBridge(Bridge):
    """Stages A and B as the study had them: by strings, with all its faults (rows 14 and 15).

    Tokens are decoded one by one, the last of equal strings has them all, and of what the expert says its 256 likeliest
    tokens count; two base tokens that spell a word have ids below 4,096, and the word at most 10 letters.
    """

    def _homes(self) -> list[list[int]]:
        if self.stage not in ("A", "B"):
            raise ChassisError(f"the study compared no strings in stage {self.stage}: take Bridge")
        models = self.expert, self.base
        expert, base = (model.tokenizer.batch_decode([[i] for i in range(model.vocab_size)]) for model in models)
        few = [*enumerate(base)][:4096] if self.stage == "B" else []
        ids, first = {text: [i] for i, text in enumerate(base)}, {text: i for i, text in reversed(few)}
        return [ids.get(text) or (spelled(text, first) if len(text) <= 10 else []) for text in expert]

    def _placed(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return super()._placed(kept(torch.from_numpy(rows), min(256, rows.shape[1])).numpy())


# ------------------------------------------------------------------------------------- what models write and read


def _ids(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text; ChassisError where a model cannot read one."""
    ids = model.tokenizer(list(texts), verbose=False)["input_ids"]
    for i, own in enumerate(ids):
        if not 1 <= len(own) <= model.context:
            raise ChassisError(f"text {i} has {len(own)} tokens, {model.name} reads 1 to {model.context}: change it")
    return ids


def greedy(model: LanguageModel, prompts: Sequence[str], tokens: int = 32) -> list[str]:
    """Each prompt with what the model writes behind it, always its likeliest token (as the study did)."""
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": model.tokenizer.eos_token_id}
    found = list(prompts)
    for batch, given, mask in batched(_ids(model, prompts), 4096, "left"):
        with torch.inference_mode():
            rows = model.model.generate(given.to(model.device), attention_mask=mask.to(model.device), **options)
        texts = model.tokenizer.batch_decode(rows[:, given.shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            found[i] += text
    return found


def states(model: LanguageModel, texts: Sequence[str]) -> list[torch.Tensor]:
    """Final states `(length, hidden)` of each text, float32, on the CPU.

    Raises:
        ChassisError: a text without a token, or one that is longer than the model.
    """
    ids, found = _ids(model, texts), {}
    for batch, given, mask in batched(ids, 4096):
        whole = model.states(given, mask)[model.num_layers].cpu()
        found |= {i: own[: len(ids[i])].clone() for i, own in zip(batch, whole, strict=True)}
    return [found[i] for i in range(len(ids))]


def last_states(model: LanguageModel, prompts: Sequence[str], misread: bool = False) -> torch.Tensor:
    """Final states `(n, hidden)` at the last token of each prompt; errors are those of `states`.

    With `misread` as the study's bridges did: padded on the left in batches of 32, then read at `mask.sum() - 1`, where
    the last token would be had the padding been on the right.
    """
    if not misread:
        return torch.stack([own[-1] for own in states(model, prompts)])
    ids, found = _ids(model, prompts), torch.zeros(len(prompts), model.hidden_size)
    for n in range(0, len(ids), BATCH):
        for batch, given, mask in batched(ids, BATCH * model.context, "left", range(n, min(n + BATCH, len(ids)))):
            found[batch] = model.states(given, mask)[model.num_layers].cpu()[range(len(batch)), mask.sum(1) - 1]
    return found


def logits(model: LanguageModel, states: torch.Tensor) -> torch.Tensor:
    """A model's logits `(n, vocab)` of final states `(n, hidden)`, on the CPU."""
    return model.readout(states.to(model.device)).cpu()


def drift(model: LanguageModel, prompts: Sequence[str], texts: Sequence[str], most: int = 32) -> pd.DataFrame:
    """KL of what a model says some of its tokens into each text from what it says at the prompt.

    Returns:
        Columns `number` (of the prompt), `tokens read`, `KL` (nats), from 0 tokens to `most` or the end of the text.
    """
    heads, whole, rows = _ids(model, prompts), _ids(model, texts), []
    before, behind = logits(model, last_states(model, prompts)), states(model, texts)
    for number, (head, ids, state, own) in enumerate(zip(heads, whole, behind, before, strict=True)):
        same = next((n for n, pair in enumerate(zip(head, ids, strict=False)) if pair[0] != pair[1]), len(head))
        after = logits(model, state[same : same + most])
        nats = [0.0, *kl(after, own.expand_as(after)).tolist()]
        rows += [(number, read, value) for read, value in enumerate(nats)]
    return pd.DataFrame(rows, columns=["number", "tokens read", "KL"])


# ------------------------------------------------------------------------------------- targets, and fits to them


@dataclass(frozen=True)
class Target:
    """Logits in the base's vocabulary that someone calls the expert."""

    name: str  #: As the records' `expert` column shows it
    revision: str  #: Of the expert they were made from
    softcap = None  # as of a readout

    @property
    def readout(self) -> Target:
        """Logits are read as they stand."""
        return self

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits themselves."""
        return logits


def _drawn(probes: Probes, held: int, n: int, seed: int) -> list[int]:
    """Numbers of n random places of those that probes hold, in order."""
    if not 1 <= n <= held:
        told = f"'{probes.name}' ({probes.split}) holds {held}"
        raise ChassisError(f"{n} places before a space are wanted: {told}: ask for fewer")
    return sorted(random.Random(seed).sample(range(held), n))


@dataclass(frozen=True)
class Places:
    """Ends of texts that both models have read, and what their heads read there."""

    probes: Probes  #: The texts up to each place
    base: LanguageModel
    expert: LanguageModel
    hidden: torch.Tensor  #: `(n, hidden)`, the base's final states
    expert_hidden: torch.Tensor  #: `(n, expert hidden)`
    passage: torch.Tensor  #: `(n,)`, passage that a place lies in: places of one are no independent sample

    def __len__(self) -> int:
        return len(self.passage)

    @property
    def said(self) -> torch.Tensor:
        """What the expert says next, over its own tokens `(n, vocab_expert)`, float64."""
        return logits(self.expert, self.expert_hidden).double().softmax(-1)

    @property
    def own(self) -> torch.Tensor:
        """The base's logits `(n, vocab)`."""
        return logits(self.base, self.hidden)

    @classmethod
    def of(cls, base: LanguageModel, expert: LanguageModel, probes: Probes, misread: bool = False) -> Places:
        """The ends of prompts; `misread` is the expert's alone, see `last_states`."""
        both = last_states(base, probes.prompts), last_states(expert, probes.prompts, misread)
        return cls(probes, base, expert, *both, torch.arange(len(probes)))

    @classmethod
    def before_spaces(
        cls, base: LanguageModel, expert: LanguageModel, probes: Probes, n: int | None = None, seed: int = 0
    ) -> Places:
        """Passages cut before a space, at n random ones of those where both tokenizers have a boundary.

        Each model reads a passage once: what stands behind a boundary changes neither the tokens before it nor what a
        causal model makes of them.

        Raises:
            ChassisError: there are fewer than n.
        """
        found, texts, read = [], probes.prompts, []
        for model in (base, expert):
            pieces, ids = token_bytes(model.tokenizer), _ids(model, texts)
            ends = (offsets(pieces, own, text).tolist() for own, text in zip(ids, texts, strict=True))
            at = [{end: i for i, end in enumerate(one)} for one in ends]
            read.append([*zip(at, states(model, texts), strict=True)])
        for number, (text, *both) in enumerate(zip(texts, *read, strict=True)):
            raw = text.encode()
            for cut in sorted(both[0][0].keys() & both[1][0].keys()):
                if cut >= LEAST and raw[cut : cut + 1] == b" ":
                    found.append((raw[:cut].decode(), *(own[ends[cut]] for ends, own in both), number))
        chosen = [found[i] for i in _drawn(probes, len(found), len(found) if n is None else n, seed)]
        prompts, ours, theirs, passage = zip(*chosen, strict=True)
        probes = Probes(probes.name, probes.split, prompts)
        return cls(probes, base, expert, torch.stack(ours), torch.stack(theirs), torch.tensor(passage))

    def drawn(self, n: int, seed: int = 0) -> Places:
        """So many of them, at random; ChassisError: there are fewer."""
        return self.some(_drawn(self.probes, len(self), n, seed))

    def some(self, numbers: Iterable[int], name: str | None = None, split: str | None = None) -> Places:
        """Only the places of these numbers, under another name or split if one is given."""
        rows = [*numbers]
        prompts = tuple(self.probes.prompts[i] for i in rows)
        probes = Probes(name or self.probes.name, split or self.probes.split, prompts)
        parts = {part: getattr(self, part)[rows] for part in ("hidden", "expert_hidden", "passage")}
        return replace(self, probes=probes, **parts)

    def placed(self, bridge: Bridge) -> torch.Tensor:
        """What the expert says next, in the base's tokens as far as a bridge places it `(n, vocab)`."""
        return bridge(self.said, self.probes.prompts).probabilities

    def beside(self, target: Target, logits: torch.Tensor) -> Activations:
        """The base's states beside a target's logits `(n, vocab)`, as `fit` and `evaluate` take them."""
        hidden, none = {self.base.num_layers: self.hidden}, torch.full((len(self),), -1)
        return Activations(self.base, target, self.probes, "last", hidden, logits.float(), self.passage, none, 0)


def spread(placed: torch.Tensor) -> torch.Tensor:
    """What was placed `(n, vocab)`, made to sum to 1."""
    return placed / placed.sum(1, keepdim=True).clamp(min=TINY)


def target_logits(placed: torch.Tensor, floor: float = TINY) -> torch.Tensor:
    """What was placed `(n, vocab)`, made to sum to 1, as logits; the study's floor is 1e-8 for all tokens."""
    return (spread(placed) + floor).log()


def softened(placed: torch.Tensor, own: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """What was placed `(n, vocab)`, made to sum to 1, with a share of the base's own distribution, as logits.

    Where nothing was placed the base's logit `own` is lowered by one constant: a floor that is the same for all tokens
    would *raise* the unlikely ones.
    """
    return ((1 - share) * spread(placed) + share * own.double().softmax(-1)).log()


def bounds(passage: torch.Tensor, nats: torch.Tensor, of: torch.Tensor | None = None) -> tuple[float, float]:
    """95% of the mean of `nats (n,)`, or of their share of others, over passages `(n,)`: each is one sample."""
    return ratio_bounds(*by_passage(passage, nats, torch.ones_like(nats) if of is None else of))


def by_passage(passage: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
    """Values of each row, `(n,)`, summed up by passage `(n,)`: `(values, passages)`, in the order of their numbers."""
    _, number = passage.unique(return_inverse=True)
    rows = torch.stack(values)
    return rows.new_zeros(len(rows), int(number.max()) + 1).index_add_(1, number, rows)


def variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Total variation of each row, `(n, m)` and `(n, m)` to `(n,)`."""
    return (p - q).abs().sum(1) / 2


def coverage(placed: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Mass of what was placed `(n, vocab)`, `placed`; and its total variation to `right`, `off`, sums made 1."""
    return {"placed": float(placed.sum(1).mean()), "off": float(variation(spread(placed), spread(right)).mean())}


@method("told")
def _told(a: Activations, layer: int, lam: float) -> Adapter:
    """Ridge from a layer's state to given logits less the base's, all columns."""
    weight, bias = ridge(Gram.of(a.layer(layer), a.expert_hidden - logits(a.base, a.layer(-1))), lam)
    return assembled(a, layer, low_rank(weight), bias)


@method("told_v1")
def _told_v1(a: Activations, layer: int, lam: float) -> Adapter:
    """The study's adapter to logits that have no head: `v1` is for experts that have one."""
    base, x = a.base, a.layer(layer)
    lens, bias = ridge(Gram.of(x, a.expert_hidden), lam)
    columns = lens.norm(dim=0).topk(max(1, round(base.vocab_size * 2048 / 32000))).indices.sort().values
    wanted = x.double() @ lens[:, columns] + bias[columns] - logits(base, x)[:, columns]
    weight, shift = ridge(Gram.of(x, wanted), lam)
    return assembled(a, layer, low_rank(weight), shift, columns=columns)


def studys_rank(base: LanguageModel) -> int:
    """The study's rank, 128 of 2,048 dimensions, at the same share of this base's."""
    return max(1, round(128 / 2048 * base.hidden_size))


def study_of(bridge: Bridge, target: Target, n: int, single: str) -> tuple[Adapter, pd.DataFrame]:
    """The study's adapter to what a bridge places, with all its faults, and `evaluate` of it as it was judged.

    n prompts of the kind "reasoning", the expert misread on them (see `last_states`), what was placed made to sum to 1,
    `log(q + 1e-8)`, v1 at the study's share of rank; judged on the first half of the prompts it was fitted on, as both
    val and test, and on one prompt of its own.
    """
    base, expert = bridge.base, bridge.expert
    prompts = probe_set("reasoning", "train", n), Probes("27 * 42", "template", (single,))
    train, one = (Places.of(base, expert, given, misread=True) for given in prompts)
    leaked = [train.some(range(max(1, n // 2)), "reasoning (leaked)", split) for split in ("val", "test")]
    fitted, *judged = (x.beside(target, target_logits(x.placed(bridge), 1e-8)) for x in (train, *leaked, one))
    adapter = fit(fitted, "told_v1", studys_rank(base)).named("as_reported")
    return adapter, evaluate(base, target, adapter, judged, allow_overlap=True)


def quoted(experiment: str) -> Callable[[pd.Series], float | None]:
    """From a row of a frame of `evaluate` to the KL that the study reports for it, if it is of the reproduction."""
    study = reported(experiment)
    kls = study["kl"] | {"template": study["single_kl"]}
    return lambda row: kls[row["split"]] if row["method"] == "as_reported" else None


def chosen(train: Activations, val: Activations, lams: Iterable[float] = LAMS) -> Adapter:
    """Ridge to a target's logits with the penalty that is best on `val`."""
    tried = [fit(train, "told", lam=lam).named("ridge") for lam in lams]
    own = logits(val.base, val.layer(-1))
    return min(tried, key=lambda one: float(kl(val.expert_hidden, own + one.correction(val.hidden)).mean()))


# ------------------------------------------------------------------------------------- where tokens go


def homes(bridge: Bridge) -> NDArray[np.int64]:
    """The base token that each expert token's mass goes to, -1 where it has none (of several, the first)."""
    found = np.asarray(bridge.table.argmax(axis=1)).ravel()
    return np.where(found < bridge.base.vocab_size, found, -1)


def all_tokens(bridge: Bridge, said: torch.Tensor) -> torch.Tensor:
    """What a bridge places of all tokens `(n, vocab)`; by string it keeps the 256 likeliest, as the study did."""
    mass = bridge.table.T @ said.numpy().T
    return torch.from_numpy(np.ascontiguousarray(mass.T))[:, : bridge.base.vocab_size]


def firsts_of_pairs(bridge: Bridge) -> dict[int, list[int]]:
    """For each expert token without a base token of its bytes: the first of every pair that spells it, by length."""
    own = {piece: ids[0] for piece, ids in ids_of(token_bytes(bridge.base.tokenizer)).items()}
    spelled = {
        i: [own[piece[:n]] for n in range(1, len(piece)) if piece[:n] in own and piece[n:] in own]
        for i, piece in enumerate(bridge.pieces) if piece and piece not in own
    }  # fmt: skip
    return {i: firsts for i, firsts in spelled.items() if firsts}


def with_firsts(alone: Bridge, firsts: dict[int, int], said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a bridge places `(n, vocab)` when these expert tokens go to these base tokens, and what that added."""
    added = torch.zeros(len(said), alone.base.vocab_size, dtype=said.dtype)
    added.index_add_(1, torch.tensor([*firsts.values()]), said[:, [*firsts]])
    return all_tokens(alone, said) + added, added


def kept(said: torch.Tensor, k: int) -> torch.Tensor:
    """Only the k likeliest of each row, the others zero."""
    return torch.zeros_like(said).scatter(1, (top := said.topk(k)).indices, top.values)


def written_alike(model: LanguageModel, i: int) -> str:
    """A token as its vocabulary writes it, with a visible space."""
    return str(model.tokenizer.convert_ids_to_tokens(int(i))).replace("Ġ", "▁").replace("Ċ", "⏎")


def likeliest(places: Places, name: Callable[[int], tuple[str, str]], top: int = 12) -> pd.DataFrame:
    """The expert's likeliest tokens at each place and what becomes of them.

    Args:
        places: one prompt each.
        name: from token id to its fate and to a note for the reader.
        top: how many tokens.

    Returns:
        Columns `prompt, token, p, fate, note`.
    """
    rows = []
    for prompt, said in zip(places.probes.prompts, places.said, strict=True):
        for p, i in zip(*(part.tolist() for part in said.topk(top)), strict=True):
            rows.append((prompt, written_alike(places.expert, i), p, *name(i)))
    return pd.DataFrame(rows, columns=["prompt", "token", "p", "fate", "note"])


# ------------------------------------------------------------------------------------- pairs of tokenizers


def families(texts: Sequence[str], vocab_size: int = 2000) -> dict[str, LanguageModel]:
    """A tokenizer of each family, trained on the texts in a second or two, in a model of random weights.

    A bridge of stage A, B or C asks such a model for its tokenizer only.
    """
    lines, special = [line for text in texts for line in text.split("\n")], ["<unk>", "<s>", "</s>"]
    options = {"vocab_size": vocab_size, "show_progress": False, "special_tokens": special}
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    unigram.train_from_iterator(lines, trainers.UnigramTrainer(unk_token="<unk>", **options))
    learned = [tuple(one) for one in json.loads(unigram.to_str())["model"]["vocab"]]
    # Sums of threads differ in their last digits; letters not learned come last, in any order, which their scores tell.
    least = round(min(score for _, score in learned), 6)
    level = [(piece, least if score < least + 0.01 else round(score, 6)) for piece, score in learned[len(special) :]]
    learned[len(special) :] = sorted(level, key=lambda one: (-one[1], one[0]))
    learned += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    unigram.model = models.Unigram(learned, unk_id=0, byte_fallback=True)
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    unigram.decoder = decoders.Sequence([*steps])
    words = pre_tokenizers.BertPreTokenizer()
    wordpiece = Tokenizer(models.WordPiece(unk_token="<unk>"))
    wordpiece.pre_tokenizer, wordpiece.decoder = words, decoders.WordPiece(cleanup=False)
    # The trainer numbers letters inside words as it meets them, in any order, and numbers decide between equal pairs.
    inner = sorted({letter for line in lines for word, _ in words.pre_tokenize_str(line) for letter in word[1:]})
    known = special + [f"##{letter}" for letter in inner]
    wordpiece.train_from_iterator(lines, trainers.WordPieceTrainer(**options | {"special_tokens": known}))
    wordpiece = Tokenizer.from_str(json.dumps(json.loads(wordpiece.to_str()) | {"added_tokens": []}))
    wordpiece.add_special_tokens(special)
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = {
        "BPE": llama_tokenizer(texts, vocab_size),
        "byte-level BPE": gpt2_tokenizer(texts, vocab_size),
        "Unigram": PreTrainedTokenizerFast(tokenizer_object=unigram, **ends),
        "WordPiece": PreTrainedTokenizerFast(tokenizer_object=wordpiece, **ends),
        "bytes": gpt2_tokenizer(texts, 257),
    }
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return {
        name: LanguageModel(name, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)), tokenizer)
        for name, tokenizer in made.items()
    }


def compare(models: Sequence[LanguageModel], texts: Sequence[str]) -> pd.DataFrame:
    """Every ordered pair of tokenizers on the same texts.

    Returns:
        Columns `expert, base`; `byte overlap`, the share of the expert's vocabulary (less what stands for no text) that
        the base has as a token too; `exact match`, the share of words that both cut at the same places; `A`, `B`, `C`:
        the mass each stage places, taking the expert's tokens of the texts, as often as they occur, as what it says.
    """
    pieces = {m.name: {piece for piece in token_bytes(m.tokenizer) if piece} for m in models}
    cuts = {m.name: [c for text in texts for c in _cuts(m, text)] for m in models}
    rows = []
    for expert in models:
        ids = [i for text in texts for i in expert.tokenizer(text, add_special_tokens=False)["input_ids"]]
        said = torch.bincount(torch.tensor(ids), minlength=expert.vocab_size).double()[None] / len(ids)
        for base in models:
            if base is not expert:
                alike = [a == b for a, b in zip(cuts[expert.name], cuts[base.name], strict=True)]
                row = {"expert": expert.name, "base": base.name}
                row["byte overlap"] = len(pieces[expert.name] & pieces[base.name]) / len(pieces[expert.name])
                row["exact match"] = sum(alike) / len(alike)
                rows.append(row | {s: float(Bridge(expert, base, s)(said).probabilities.sum()) for s in "ABC"})
    return pd.DataFrame(rows)


def _cuts(model: LanguageModel, text: str) -> list[frozenset[int]]:
    """For each word of a text, the places inside it where a token ends, in characters from its beginning."""
    spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = {end for _, end in spans}
    words = [match.span() for match in re.finditer(r"\S+", text)]
    return [frozenset(i - start for i in range(start + 1, stop) if i in ends) for start, stop in words]


# ------------------------------------------------------------------------------------- figures


def _shown(figure: go.Figure, title: str, alt: str, caption: str, *controls: tuple, **layout: object) -> go.Figure:
    """The figure with its title, its caption, a legend, and a dropdown for each of the controls."""
    menus = _dropdowns(figure, 8, *controls)
    return _finish(figure, title, alt, caption, above=38 if menus else 0, updatemenus=menus, showlegend=True, **layout)


def lines(
    frame: pd.DataFrame, x: str, quantities: dict[str, tuple[str, str]], looks: dict[str, tuple[str, ...]], title: str,
    alt: str, caption: str, by: str = "probes", **axis: object,
) -> go.Figure:  # fmt: skip
    """Lines over column `x`, one a `method`, with a menu for column `by` and one for the quantity.

    `quantities` is column -> (title, tick format), the first shown first; `looks` is method -> (colour, marker, dash);
    `axis` is of x.
    """
    figure, entries = go.Figure(), [*frame[by].unique()]
    groups = frame.groupby([by, "method"], sort=False)
    for (entry, name), rows in groups:
        colour, marker, dash = looks[name]
        figure.add_scatter(
            x=_numbers(rows[x]), name=name, mode="lines+markers", line={"color": COLOURS[colour], "dash": dash},
            meta=[entry], marker={"symbol": marker, "size": 7},
            hovertemplate=f"<b>{name}</b><br>{x} %{{x}}<br>%{{y}}<extra></extra>",
        )  # fmt: skip
    changes = {
        word: [{"y": [_numbers(rows[column]) for _, rows in groups]},
               {"yaxis.title.text": word, "yaxis.tickformat": digits}]
        for column, (word, digits) in quantities.items()
    }  # fmt: skip
    controls = (entries[0], _owned(figure, 0, entries, "visible", True, False)), (next(iter(changes)), changes)
    return _shown(
        figure, title, alt, caption, *controls, xaxis={"title_text": x} | axis, yaxis_rangemode="tozero", height=470
    )


def summary(
    frame: pd.DataFrame, labels: dict[str, str], said: Callable[[pd.Series], float | None] = lambda row: None
) -> Styler:
    """What was reported, reproduced and corrected beside its own target's identity, one row a measurement.

    `labels` is method -> how to call it, in the order shown; `said` is what `quoted` returns, if the study said any.
    """
    shown = frame[frame["method"].isin(labels)]
    shown = shown.sort_values("method", key=lambda names: names.map([*labels].index), kind="stable")
    table = {"what": shown["method"].map(labels), "target": shown["expert"].str.split(n=1).str[-1]}
    table |= {"on": shown["probes"] + ", " + shown["split"], "reported": shown.apply(said, axis=1).astype(float)}
    table |= {"KL": shown["kl"], "identity": shown["kl_identity"], "recovered": shares(shown), "n": shown["n"]}
    style = pd.DataFrame(table).style.format(precision=3, na_rep="–").hide()
    return style.set_caption("KL in nats to the target named; share of its identity KL recovered, 95% over passages")


def dumbbells(frame: pd.DataFrame, title: str, see: str, least: float = 1e-2) -> go.Figure:
    """KL of the bare base and of an adapter for each row, columns `label, identity, kl`; below `least` drawn there.

    `see` is what to look for, said below the figure before how to read it.
    """
    figure, order, ends = go.Figure(), frame["label"].tolist(), frame[["identity", "kl"]].clip(lower=least)
    for label, *both in ends.assign(label=order)[["label", "identity", "kl"]].itertuples(index=False):
        figure.add_scatter(
            x=_numbers(both), y=[label] * 2, mode="lines", line={"color": GREY, "width": 2}, showlegend=False,
            hoverinfo="skip",
        )  # fmt: skip
    for column, name, colour, symbol in (
        ("identity", "no adapter", GREY, "line-ns"), ("kl", "adapter", COLOURS["vermilion"], "diamond")
    ):  # fmt: skip
        figure.add_scatter(
            x=_numbers(ends[column]), y=order, mode="markers", name=name, customdata=_numbers(frame[column]),
            marker={"color": colour, "symbol": symbol, "size": 12, "line": {"width": 2, "color": colour}},
            hovertemplate=f"<b>%{{y}}</b><br>{name}: KL %{{customdata}}<extra></extra>",
        )  # fmt: skip
    said = [f"{row.label}: {_figures(row.identity)} and {_figures(row.kl)}" for row in frame.itertuples()]
    return _shown(
        figure, title, f"KL of the bare base and of the adapter. {'; '.join(said)}.",
        f"{see} Grey is the base without an adapter: an adapter to the left of it has come nearer to its target, one "
        "to the right is worse than none. Where grey itself moves, the target or the prompts are others.",
        columns={"y": "row", "hover": ["KL"]}, height=150 + 34 * len(order),
        xaxis={"type": "log", "title_text": "KL (nats)"},
        yaxis={"autorange": "reversed", "categoryorder": "array", "categoryarray": order, "showgrid": False},
    )  # fmt: skip


def fates(frame: pd.DataFrame, colours: dict[str, str], title: str) -> go.Figure:
    """For a prompt of one's choice the expert's likeliest tokens, coloured by what becomes of them.

    `frame` is what `likeliest` returned; `colours` is fate -> name of a colour, in the order of the legend.
    """
    figure, labels = go.Figure(), {prompt: short(n, prompt) for n, prompt in enumerate(frame["prompt"].unique())}
    for prompt, rows in frame.groupby("prompt", sort=False):
        order = [f"{n}  {token}" for n, token in enumerate(rows["token"], 1)]
        for fate, colour in colours.items():
            here = rows["fate"] == fate
            figure.add_bar(
                x=_numbers(rows["p"].where(here)), y=order, orientation="h", name=fate, meta=[labels[prompt]],
                marker_color=COLOURS[colour], customdata=rows["note"].tolist(), legendgroup=fate,
                text=rows["note"].where(here, "").tolist(), textposition="outside", cliponaxis=False, textfont_size=10,
                hovertemplate="<b>%{y}</b>, probability %{x:.3f}<br>%{customdata}<extra></extra>",
            )  # fmt: skip
    names = [*labels.values()]
    entries = _owned(figure, 0, names, "visible", True, False)
    for name, most in zip(names, frame.groupby("prompt", sort=False)["p"].max(), strict=True):
        entries[name].append({"xaxis.range": [0, 2.4 * most]})  # the longest bar has its note beside it
    of = frame.groupby("fate")["p"].sum().reindex([*colours], fill_value=0) / frame["p"].sum()
    said = "; ".join(f"{fate}: {share:.0%}" for fate, share in of.items())
    return _shown(
        figure, title, f"The expert's likeliest tokens at {len(names)} prompts, by what becomes of their mass. {said}.",
        "The longest bars count most: the colour tells what becomes of each of the expert's likeliest tokens, the "
        "words beside it what the base has there. Go through the prompts: see whether one fate takes most of the mass "
        "everywhere, or another at every prompt.",
        (names[0], entries), columns={"y": "token", "hover": ["beside it"]},
        barmode="overlay", height=520, margin_b=110,
        xaxis_title_text="probability the expert gives",
        yaxis={"autorange": "reversed", "showgrid": False, "type": "category"},
    )  # fmt: skip


def short(n: int, prompt: str) -> str:
    """A prompt as an entry of a menu on a telephone."""
    return f"{n + 1}: …{prompt[-26:]}".replace("\n", "⏎")


def pairs_map(frame: pd.DataFrame, first: str = "C") -> go.Figure:
    """What `compare` returned as a map, the expert across and the base up, with a menu for the quantity."""
    known = [first, *(name for name in frame if name not in ("expert", "base", first))]
    names = {name: f"{name}: mass placed" if len(name) == 1 else name for name in known}
    figure = go.Figure(layout=STYLES["layouts"]["phase"])
    scale = {"cmin": 0, "cmax": 1, "colorscale": [[0, "#F3F1EC"], [1, "#0072B2"]], "colorbar_tickvals": [0, 0.5, 1]}
    for name in known:
        table = frame.pivot(index="base", columns="expert", values=name)
        figure.add_heatmap(
            z=[_numbers(row) for row in table.to_numpy()], x=[*table], y=[*table.index], coloraxis="coloraxis", xgap=2,
            ygap=2, meta=[names[name]], texttemplate="%{z:.0%}", hoverongaps=False,
            hovertemplate="expert %{x}, base %{y}<br>" + names[name] + " %{z:.1%}<extra></extra>",
        )  # fmt: skip
    worst, best = (getattr(frame[first], end)() for end in ("min", "max"))
    return _shown(
        figure, "Between any two tokenizers",
        f"{names[first]} for every pair of tokenizers, from {worst:.0%} to {best:.0%}.",
        "Down a column the expert stays, along a row the base. Look for pale cells, the pairs for which the stage "
        "finds little; then go through the menu, and see whether pairs that share few tokens are also those that lose "
        "most, and which stage makes up for it.",
        (names[first], _owned(figure, 0, [*names.values()], "visible", True, False)),
        columns={"z": "share"}, coloraxis=scale, margin_b=96,
        xaxis_title_text="expert", yaxis_title_text="base",
    )  # fmt: skip
