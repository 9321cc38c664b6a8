"""What pages 15 to 18 ask of an expert with another tokenizer: its texts, its targets, adapters to them, figures."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chassis_utils import Activations, Adapter, Bridge, Bridged, ChassisError, Gram, LanguageModel, Probes, evaluate
from chassis_utils import probe_set, ridge
from chassis_utils.activations import batched
from chassis_utils.metrics import kl
from chassis_utils.solve import low_rank
from chassis_utils.tokens import ids_of, offsets, token_bytes
from plots import GREY, STYLES, _dropdowns, _finish, _numbers, _owned, shares
from pocket_recipe import gpt2_tokenizer, llama_tokenizer

LAMS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
COLOURS = STYLES["colours"]
BATCH = 32  # prompts a batch, as in the study
LEAST = 48  # bytes before a cut: passages begin alike, and a text that was fitted on must not be judged on
TINY = 1e-30  # a target's zeros, for the logarithm: their share of a KL is below any rounding


def greedy(model: LanguageModel, prompts: Sequence[str], tokens: int = 32) -> list[str]:
    """Each prompt with what the model writes behind it, always its likeliest token (as the study did)."""
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for i, own in enumerate(ids):
        by_length.setdefault(len(own), []).append(i)
    found, options = list(prompts), {"max_new_tokens": tokens, "do_sample": False}
    options["pad_token_id"] = model.tokenizer.eos_token_id
    for some in by_length.values():
        batch = torch.tensor([ids[i] for i in some], device=model.device)
        with torch.inference_mode():
            rows = model.model.generate(batch, attention_mask=torch.ones_like(batch), **options)
        texts = model.tokenizer.batch_decode(rows[:, batch.shape[1] :], skip_special_tokens=True)
        for i, text in zip(some, texts, strict=True):
            found[i] += text
    return found


def last_states(model: LanguageModel, prompts: Sequence[str], misread: bool = False) -> torch.Tensor:
    """Final states `(n, hidden)` at the last token of each prompt.

    With `misread` as the study's bridges did: padded on the left in batches of 32, then read at `mask.sum() - 1`, where
    the last token would be had the padding been on the right.

    Raises:
        ChassisError: a prompt without a token, or one that is longer than the model.
    """
    ids = model.tokenizer(list(prompts), verbose=False)["input_ids"]
    for i, own in enumerate(ids):
        if not 1 <= len(own) <= model.context:
            raise ChassisError(f"prompt {i} has {len(own)} tokens, {model.name} takes 1 to {model.context}: change it")
    states = torch.zeros(len(ids), model.hidden_size)
    groups = [range(n, min(n + BATCH, len(ids))) for n in range(0, len(ids), BATCH)] if misread else [None]
    for group in groups:
        for batch, tokens, mask in batched(ids, BATCH * model.context if misread else 4096, "left", group):
            places = mask.sum(1) - 1 if misread else torch.full((len(batch),), mask.shape[1] - 1)
            states[batch] = model.states(tokens, mask)[model.num_layers].cpu()[range(len(batch)), places]
    return states


def _states(model: LanguageModel, ids: list[list[int]]) -> list[torch.Tensor]:
    """Final states `(length, hidden)` of each text."""
    found = [torch.empty(0)] * len(ids)
    for batch, tokens, mask in batched(ids, 4096):
        whole = model.states(tokens, mask)[model.num_layers].cpu()
        for i, own in zip(batch, whole, strict=True):
            found[i] = own[: len(ids[i])].clone()
    return found


def logits(model: LanguageModel, states: torch.Tensor) -> torch.Tensor:
    """A model's logits `(n, vocab)` of final states `(n, hidden)`, on the CPU."""
    return model.readout(states.to(model.device)).cpu()


def drift(model: LanguageModel, prompts: Sequence[str], texts: Sequence[str], most: int = 32) -> NDArray[np.float64]:
    """KL of what a model says k of its tokens into each text from what it says at the prompt, `(n, most + 1)`, nats.

    NaN behind the end of a text.
    """
    found = np.full((len(prompts), most + 1), np.nan)
    heads, whole = (model.tokenizer(list(some))["input_ids"] for some in (prompts, texts))
    before, states = logits(model, last_states(model, prompts)), _states(model, whole)
    for row, head, ids, state, own in zip(found, heads, whole, states, before, strict=True):
        same = next((n for n, pair in enumerate(zip(head, ids, strict=False)) if pair[0] != pair[1]), len(head))
        after = logits(model, state[same : same + most])
        row[0], row[1 : 1 + len(after)] = 0.0, kl(after, own.expand_as(after)).numpy()
    return found


class _AsTheyStand:
    """The readout of logits that are given."""

    softcap = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@dataclass(frozen=True)
class Target:
    """Logits in the base's vocabulary that someone calls the expert."""

    name: str  #: As the records' `expert` column shows it
    revision: str  #: Of the expert they were made from
    readout: _AsTheyStand = _AsTheyStand()


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

    @classmethod
    def of(cls, base: LanguageModel, expert: LanguageModel, probes: Probes, misread: bool = False) -> Places:
        """The ends of prompts; `misread` is the expert's alone, see `last_states`."""
        states = last_states(base, probes.prompts), last_states(expert, probes.prompts, misread)
        return cls(probes, base, expert, *states, torch.arange(len(probes)))

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
        found, models, texts = [], (base, expert), probes.prompts
        ids = [model.tokenizer(list(texts))["input_ids"] for model in models]
        pieces = [token_bytes(model.tokenizer) for model in models]
        states = [_states(model, own) for model, own in zip(models, ids, strict=True)]
        for number, text in enumerate(texts):
            raw, ends = text.encode(), []
            for piece, own in zip(pieces, ids, strict=True):
                ends.append({int(end): i for i, end in enumerate(offsets(piece, own[number], text))})
            for cut in sorted(ends[0].keys() & ends[1].keys()):
                if cut >= LEAST and raw[cut : cut + 1] == b" ":
                    here = (own[number][end[cut]] for own, end in zip(states, ends, strict=True))
                    found.append((raw[:cut].decode(), *here, number))
        n = len(found) if n is None else n
        if not 1 <= n <= len(found):
            held = f"'{probes.name}' ({probes.split}) holds {len(found)}"
            raise ChassisError(f"{n} places before a space are wanted: {held}: ask for fewer")
        chosen = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), n))]
        texts, ours, theirs, passage = zip(*chosen, strict=True)
        probes = Probes(probes.name, probes.split, texts)
        return cls(probes, base, expert, torch.stack(ours), torch.stack(theirs), torch.tensor(passage))

    def first(self, n: int, name: str | None = None, split: str | None = None) -> Places:
        """The first n places, under another name or split if one is given."""
        probes = Probes(name or self.probes.name, split or self.probes.split, self.probes.prompts[:n])
        return replace(self, probes=probes, **{k: getattr(self, k)[:n] for k in ("hidden", "expert_hidden", "passage")})

    def some(self, numbers: Sequence[int]) -> Places:
        """Only the places of these numbers."""
        numbers = [*numbers]
        probes = replace(self.probes, prompts=tuple(self.probes.prompts[i] for i in numbers))
        rows = {k: getattr(self, k)[numbers] for k in ("hidden", "expert_hidden", "passage")}
        return replace(self, probes=probes, **rows)

    def bridged(self, bridge: Bridge) -> Bridged:
        """What the expert says next, in the base's tokens."""
        return bridge(self.said, self.probes.prompts)

    def beside(self, target: Target, logits: torch.Tensor) -> Activations:
        """The base's states beside a target's logits `(n, vocab)`, as `evaluate` takes them."""
        hidden, none = {self.base.num_layers: self.hidden}, torch.full((len(self),), -1)
        return Activations(self.base, target, self.probes, "last", hidden, logits.float(), self.passage, none, 0)


def target_logits(placed: torch.Tensor, floor: float = TINY) -> torch.Tensor:
    """What was placed `(n, vocab)`, made to sum to 1, as logits; the study's floor is 1e-8 for all tokens."""
    return (spread(placed) + floor).log()


def v1(a: Activations, lam: float = 1e-3) -> Adapter:
    """The study's adapter to logits that have no head: see `fit`'s own `v1`, whose experts have one."""
    base, x, y = a.base, a.layer(-1), a.expert_hidden
    lens, bias = ridge(Gram.of(x, y), lam)
    columns = lens.norm(dim=0).topk(max(1, round(base.vocab_size * 2048 / 32000))).indices.sort().values
    wanted = x.double() @ lens[:, columns] + bias[columns] - logits(base, x)[:, columns]
    weight, shift = ridge(Gram.of(x, wanted), lam)
    return _adapter(a, "v1", *low_rank(weight), shift, columns=columns)


def study_of(
    bridge: Bridge, target: Target, n: int, single: str
) -> tuple[Adapter, pd.DataFrame]:
    """The study's adapter to what a bridge places, with all its faults, and what `evaluate` says of it as it was judged.

    n prompts of the kind "reasoning", the expert misread on them (see `last_states`), what was placed made to sum to 1,
    `log(q + 1e-8)`, v1 at the study's share of rank; judged on the first half of the prompts it was fitted on, as both
    val and test, and on one prompt of its own.
    """
    base, expert = bridge.base, bridge.expert
    prompts = {"reasoning": probe_set("reasoning", "train", n), "single": Probes("27 * 42", "template", (single,))}
    train, one = (Places.of(base, expert, p, misread=True) for p in prompts.values())
    leaked = [train.first(max(1, n // 2), "reasoning (leaked)", split) for split in ("val", "test")]
    fitted, *judged = (
        places.beside(target, target_logits(bridge(places.said).probabilities, 1e-8)) for places in (train, *leaked, one)
    )
    adapter = v1(fitted).at_rank(max(1, round(128 / 2048 * base.hidden_size))).named("as_reported")
    return adapter, evaluate(base, target, adapter, judged, allow_overlap=True)


def softened(placed: torch.Tensor, own: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """What was placed `(n, vocab)`, made to sum to 1, with a share of the base's own distribution, as logits.

    Where nothing was placed the base's logit `own` is lowered by one constant: a floor that is the same for all tokens
    would *raise* the unlikely ones.
    """
    return mixed_with(placed, own, share).log()


def ridged(a: Activations, lam: float = 1e-3) -> Adapter:
    """Ridge from the final state to a target's logits less the base's, all columns."""
    x = a.layer(-1)
    weight, bias = ridge(Gram.of(x, a.expert_hidden - logits(a.base, x)), lam)
    eye = torch.eye(len(weight), dtype=weight.dtype)
    return _adapter(a, "ridge", eye, weight, eye, bias)


def chosen(train: Activations, val: Activations, lams: Iterable[float] = LAMS) -> tuple[Adapter, pd.DataFrame]:
    """`ridged` with the penalty that is best on `val`, and the KL there, in nats, for each: columns `lam, kl`."""
    tried = [(lam, adapter, _kl(val, adapter)) for lam in lams for adapter in [ridged(train, lam)]]
    best = min(tried, key=lambda one: one[2])[1]
    return best, pd.DataFrame([(lam, value) for lam, _, value in tried], columns=["lam", "kl"])


def _kl(a: Activations, adapter: Adapter) -> float:
    own = logits(a.base, a.layer(-1))
    return float(kl(a.expert_hidden, own + adapter.delta(a.layer(-1))).mean())


def _adapter(
    a: Activations, method: str, down: torch.Tensor, up: torch.Tensor, _: torch.Tensor, bias: torch.Tensor, **kind
) -> Adapter:
    maps = (part.float() for part in (down, up, bias))
    return Adapter(method, a.final, *maps, a.base.name, a.base.head_hash, fitted_on=a.probes.fingerprints, **kind)


def spread(placed: torch.Tensor) -> torch.Tensor:
    """What was placed `(n, vocab)`, made to sum to 1."""
    return placed / placed.sum(1, keepdim=True).clamp(min=TINY)


def mixed_with(placed: torch.Tensor, own: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """The same with a share of the distribution of the base's logits `own`, sums still 1."""
    return (1 - share) * spread(placed) + share * own.double().softmax(-1)


def layer(said: torch.Tensor, wanted: torch.Tensor, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The study's planned distillation layer: ridge from probabilities of some expert tokens to those of the base's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more tokens than places: the penalty is chosen on others
        return ridge(Gram.of(said, wanted), lam)


def variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Total variation of each row, `(n, m)` and `(n, m)` to `(n,)`."""
    return (p - q).abs().sum(1) / 2


# ------------------------------------------------------------------------------------- where tokens go


def homes(bridge: Bridge) -> NDArray[np.int64]:
    """The base token that each expert token's mass goes to, -1 where it has none (of several, the first)."""
    table = bridge.table.tocsr()
    found = np.asarray(table.argmax(axis=1)).ravel()
    return np.where(found < bridge.base.vocab_size, found, -1)


def all_tokens(bridge: Bridge, said: torch.Tensor) -> torch.Tensor:
    """What a bridge places of all tokens `(n, vocab)`; by string it keeps the 256 likeliest, as the study did."""
    mass = bridge.table.T @ said.numpy().T
    return torch.from_numpy(np.ascontiguousarray(mass.T))[:, : bridge.base.vocab_size]


def firsts_of_pairs(bridge: Bridge) -> dict[int, list[int]]:
    """For each expert token without a base token of its bytes: the first of every pair that spells it, by length."""
    own = {piece: ids[0] for piece, ids in ids_of(token_bytes(bridge.base.tokenizer)).items()}
    found = {}
    for i, piece in enumerate(token_bytes(bridge.expert.tokenizer)[: bridge.expert.vocab_size]):
        if piece and piece not in own:
            cuts = [own[piece[:n]] for n in range(1, len(piece)) if piece[:n] in own and piece[n:] in own]
            if cuts:
                found[i] = cuts
    return found


def with_firsts(
    alone: Bridge, firsts: dict[int, int], said: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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

    Returns:
        Columns `prompt, token, p, fate, note`.
    """
    rows = []
    for prompt, said in zip(places.probes.prompts, places.said, strict=True):
        for p, i in zip(*(part.tolist() for part in said.topk(top)), strict=True):
            fate, note = name(i)
            rows.append((prompt, written_alike(places.expert, i), p, fate, note))
    return pd.DataFrame(rows, columns=["prompt", "token", "p", "fate", "note"])


# ------------------------------------------------------------------------------------- pairs of tokenizers


def stand_in(name: str, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """A model of one tiny block with random weights, where a bridge asks for its tokenizer only."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return LanguageModel(name, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)), tokenizer)


def families(texts: Sequence[str], vocab_size: int = 2000) -> dict[str, LanguageModel]:
    """A tokenizer of each family, trained on the texts in a second or two."""
    lines, special = [line for text in texts for line in text.split("\n")], ["<unk>", "<s>", "</s>"]
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    options = {"vocab_size": vocab_size, "show_progress": False, "unk_token": "<unk>"}
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = spaces, decoders.Metaspace()
    unigram.train_from_iterator(lines, trainers.UnigramTrainer(special_tokens=special, **options))
    learned = json.loads(unigram.to_str())["model"]["vocab"]
    scores = [*map(tuple, learned), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    unigram.model = models.Unigram(scores, unk_id=0, byte_fallback=True)
    unigram.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wordpiece = Tokenizer(models.WordPiece(unk_token="<unk>"))
    wordpiece.pre_tokenizer, wordpiece.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    options.pop("unk_token")
    wordpiece.train_from_iterator(lines, trainers.WordPieceTrainer(special_tokens=special, **options))
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = {
        "BPE": llama_tokenizer(texts, vocab_size),
        "byte-level BPE": gpt2_tokenizer(texts, vocab_size),
        "Unigram": PreTrainedTokenizerFast(tokenizer_object=unigram, **ends),
        "WordPiece": PreTrainedTokenizerFast(tokenizer_object=wordpiece, **ends),
        "bytes": gpt2_tokenizer(texts, 257),
    }
    return {name: stand_in(name, tokenizer) for name, tokenizer in made.items()}


def compare(models: Sequence[LanguageModel], texts: Sequence[str]) -> pd.DataFrame:
    """Every ordered pair of tokenizers on the same texts.

    Returns:
        Columns `expert, base`; `shared bytes`, the share of the expert's vocabulary (less what stands for no text) that
        the base has as a token too; `words cut alike`, the share of words that both cut at the same places;
        `boundaries shared`, of all places inside words where either cuts; `A`, `B`, `C`: the mass each stage places,
        taking the expert's tokens of the texts, as often as they occur, as what it says.
    """
    pieces = {m.name: {piece for piece in token_bytes(m.tokenizer) if piece} for m in models}
    cuts = {m.name: [c for text in texts for c in _cuts(m, text)] for m in models}
    rows = []
    for expert in models:
        ids = [i for text in texts for i in expert.tokenizer(text, add_special_tokens=False)["input_ids"]]
        counts = torch.bincount(torch.tensor(ids), minlength=expert.vocab_size).double()[None]
        for base in models:
            if base is expert:
                continue
            both = list(zip(cuts[expert.name], cuts[base.name], strict=True))
            row = {"expert": expert.name, "base": base.name}
            row["shared bytes"] = len(pieces[expert.name] & pieces[base.name]) / len(pieces[expert.name])
            row["words cut alike"] = sum(a == b for a, b in both) / len(both)
            row["boundaries shared"] = sum(len(a & b) for a, b in both) / max(1, sum(len(a | b) for a, b in both))
            for stage in "ABC":
                row[stage] = float(Bridge(expert, base, stage)(counts / counts.sum()).probabilities.sum())
            rows.append(row)
    return pd.DataFrame(rows)


def _cuts(model: LanguageModel, text: str) -> list[frozenset[int]]:
    """For each word of a text, the places inside it where a token ends, in characters from its beginning."""
    spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = {end for _, end in spans}
    words = [(m.start(), m.end()) for m in re.finditer(r"\S+", text)]
    return [frozenset(i - start for i in range(start + 1, stop) if i in ends) for start, stop in words]


# ------------------------------------------------------------------------------------- figures


def lines(
    frame: pd.DataFrame, x: str, quantities: dict[str, tuple[str, str]], title: str, alt: str, by: str = "probes",
    log: bool = False,
) -> go.Figure:
    """Lines over column `x`, one a `method`, with a menu for column `by` and one for the quantity.

    `quantities` is label -> (column, tick format); `label` and `colour` columns of the frame name the lines.
    """
    figure, groups = go.Figure(), []
    entries = [*frame[by].unique()]
    for (entry, method), rows in frame.groupby([by, "method"], sort=False):
        groups.append(rows)
        figure.add_scatter(
            x=_numbers(rows[x]), name=method, mode="lines+markers", line_color=COLOURS[rows["colour"].iloc[0]],
            meta=[entry], showlegend=True, marker_symbol=rows.get("symbol", pd.Series(["circle"])).iloc[0],
            line_dash=rows.get("dash", pd.Series(["solid"])).iloc[0],
            hovertemplate=f"<b>{method}</b><br>{x} %{{x}}<br>%{{y}}<extra></extra>",
        )  # fmt: skip
    first = next(iter(quantities))
    menus = _dropdowns(
        figure, 8, (entries[0], _owned(figure, 0, entries, "visible", True, False)),
        (first, {name: [{"y": [_numbers(rows[column]) for rows in groups]},
                        {"yaxis.title.text": name, "yaxis.tickformat": digits}]
                 for name, (column, digits) in quantities.items()}))  # fmt: skip
    figure.update_layout(xaxis={"type": "log" if log else "linear", "title_text": x}, showlegend=True)
    return _finish(figure, title, alt, above=38 if menus else 0, updatemenus=menus)


def summary(frame: pd.DataFrame, labels: dict[str, str]) -> pd.io.formats.style.Styler:
    """What was reported, reproduced and corrected beside its own target's identity, one row a measurement.

    `labels` is method -> how to call it, in the order shown; the frame's `reported` may be empty.
    """
    shown = frame[frame["method"].isin(labels)]
    order = shown["method"].map([*labels].index).sort_values(kind="stable").index
    shown = shown.loc[order].reset_index(drop=True)
    table = pd.DataFrame({"what": shown["method"].map(labels), "target": shown["expert"], "prompts": shown["probes"]})
    table["split"], table["reported"] = shown["split"], shown["reported"]
    table["KL"], table["identity"], table["recovered"], table["n"] = shown["kl"], shown["kl_identity"], "", shown["n"]
    table["recovered"] = shares(shown)
    style = table.style.format(precision=3, na_rep="–").hide()
    return style.set_caption("KL in nats to the target named; share of that target's identity KL with 95% over passages")


def dumbbells(frame: pd.DataFrame, title: str, alt: str, least: float = 1e-2) -> go.Figure:
    """KL of the bare base and of an adapter for each row, columns `label, identity, kl`; below `least` drawn there."""
    figure, order = go.Figure(), frame["label"].tolist()
    for row in frame.itertuples():
        ends = [max(row.identity, least), max(row.kl, least)]
        figure.add_scatter(x=_numbers(ends), y=[row.label] * 2, mode="lines", line={"color": GREY, "width": 2},
                           showlegend=False, hoverinfo="skip")  # fmt: skip
    for column, name, colour, symbol in (("identity", "no adapter", "grey", "line-ns"), ("kl", "adapter", "vermilion", "diamond")):
        figure.add_scatter(
            x=_numbers(frame[column].clip(lower=least)), y=order, mode="markers", name=name, showlegend=True,
            marker={"color": COLOURS[colour], "symbol": symbol, "size": 12, "line": {"width": 2, "color": COLOURS[colour]}},
            customdata=_numbers(frame[column]), hovertemplate=f"<b>%{{y}}</b><br>{name}: KL %{{customdata}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        height=150 + 34 * len(order), showlegend=True,
        xaxis={"type": "log", "title_text": "KL (nats)"},
        yaxis={"autorange": "reversed", "categoryorder": "array", "categoryarray": order, "showgrid": False},
    )  # fmt: skip
    return _finish(figure, title, alt)


def fates(frame: pd.DataFrame, colours: dict[str, str], title: str) -> go.Figure:
    """For a prompt of one's choice the expert's likeliest tokens, coloured by what becomes of them.

    `frame` is what `likeliest` returned; `colours` is fate -> name of a colour, in the order of the legend.
    """
    figure, prompts = go.Figure(), [*frame["prompt"].unique()]
    labels = {prompt: _short(n, prompt) for n, prompt in enumerate(prompts)}
    for prompt, rows in frame.groupby("prompt", sort=False):
        order = [f"{n}  {token}" for n, token in enumerate(rows["token"], 1)]
        for fate, colour in colours.items():
            here = (rows["fate"] == fate).to_numpy()
            figure.add_bar(
                x=_numbers(rows["p"].where(here, 0.0)), y=order, orientation="h", name=fate, meta=[labels[prompt]],
                marker_color=COLOURS[colour], customdata=rows["note"].tolist(), showlegend=True, legendgroup=fate,
                text=[note if mine else "" for note, mine in zip(rows["note"], here, strict=True)],
                textposition="outside", cliponaxis=False, textfont_size=10,
                hovertemplate="<b>%{y}</b>, probability %{x:.3f}<br>%{customdata}<extra></extra>",
            )  # fmt: skip
    names = [*labels.values()]
    menus = _dropdowns(figure, 8, (names[0], _owned(figure, 0, names, "visible", True, False)))
    most = frame["p"].max()
    shares_of = frame.groupby("fate")["p"].sum() / frame["p"].sum()
    said = "; ".join(f"{fate}: {shares_of.get(fate, 0):.0%}" for fate in colours)
    alt = f"The expert's likeliest tokens at {len(prompts)} prompts, by what becomes of their mass. {said}."
    figure.update_layout(
        barmode="overlay", showlegend=True, height=520, margin_b=110, updatemenus=menus,
        xaxis={"title_text": "probability the expert gives", "range": [0, 1.45 * most]},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "category"},
    )  # fmt: skip
    return _finish(figure, title, alt, above=38)


def drift_figure(ways: dict[str, NDArray[np.float64]], prompts: Sequence[str], title: str) -> go.Figure:
    """What `drift` found against tokens read, one line an author, with a menu for the mean and each of the prompts."""
    figure, colours = go.Figure(), ("vermilion", "blue", "green")
    entries = {"mean of all prompts": None} | {_short(n, prompt): n for n, prompt in enumerate(prompts)}
    for entry, number in entries.items():
        for (author, values), colour, symbol in zip(ways.items(), colours, ("diamond", "circle", "square"), strict=True):
            course = np.nanmean(values, axis=0) if number is None else values[number]
            figure.add_scatter(
                y=_numbers(course), name=author, meta=[entry], mode="lines+markers", showlegend=True,
                line_color=COLOURS[colour], marker={"symbol": symbol, "size": 6},
                hovertemplate=f"<b>{author}</b><br>%{{x}} tokens read<br>KL %{{y}}<extra></extra>",
            )  # fmt: skip
    menus = _dropdowns(figure, 8, (next(iter(entries)), _owned(figure, 0, entries, "visible", True, False)))
    figure.update_layout(
        showlegend=True, xaxis_title_text="tokens read behind the prompt", updatemenus=menus, height=460,
        yaxis={"title_text": "KL to the prompt's own (nats)", "rangemode": "tozero"},
    )  # fmt: skip
    said = "; ".join(f"{author}: {np.nanmean(values, axis=0)[-1]:.3g} at the last" for author, values in ways.items())
    return _finish(figure, title, f"KL against tokens read, mean of prompts. {said}.", above=38)


def _short(n: int, prompt: str) -> str:
    """A prompt as an entry of a menu on a telephone."""
    return f"{n + 1}: …{prompt[-26:]}".replace("\n", "⏎")


def pairs_map(frame: pd.DataFrame, first: str = "C") -> go.Figure:
    """What `compare` returned as a map, the expert across and the base up, with a menu for the quantity."""
    known = [first, *(name for name in frame if name not in ("expert", "base", first))]
    tables = {name: frame.pivot(index="base", columns="expert", values=name) for name in known}
    names = {name: f"{name}: mass placed" if len(name) == 1 else name for name in known}
    figure = go.Figure(layout=STYLES["layouts"]["phase"])
    figure.layout.coloraxis.update(cmin=0, cmax=1, colorscale=[[0, "#F3F1EC"], [1, "#0072B2"]])
    figure.layout.coloraxis.colorbar.tickvals = [0, 0.5, 1]
    for name, table in tables.items():
        figure.add_heatmap(
            z=[_numbers(row) for row in table.to_numpy()], x=[*table], y=[*table.index], coloraxis="coloraxis", xgap=2,
            ygap=2, meta=[names[name]], texttemplate="%{z:.0%}", hoverongaps=False,
            hovertemplate="expert %{x}, base %{y}<br>" + names[name] + " %{z:.1%}<extra></extra>",
        )  # fmt: skip
    entries = [*names.values()]
    menus = _dropdowns(figure, 8, (entries[0], _owned(figure, 0, entries, "visible", True, False)))
    worst, best = (getattr(frame[first], end)() for end in ("min", "max"))
    figure.update_layout(updatemenus=menus, xaxis_title_text="expert", yaxis_title_text="base", margin_b=96)
    alt = f"{names[first]} for every pair of tokenizers, from {worst:.0%} to {best:.0%}."
    return _finish(figure, "Between any two tokenizers", alt, above=38)
