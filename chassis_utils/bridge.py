"""Bridges from an expert with another tokenizer: what it says next, told in the base's tokens."""

from __future__ import annotations

import codecs
import copy
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import ChassisError
from .models import LanguageModel
from .tokens import Pieces, ids_of, token_bytes

STAGES = ("A", "B", "C", "exact")
#: Expression that a tokenizer cuts by (GPT-2's, Llama 3's, Qwen's, o200k's, ...) -> what of a text's end it cuts anew.
CUTS = json.loads(Path(__file__).with_name("cuts.json").read_text())
WIDTH = 8  # continuations that share one forward pass of the expert in stage `exact`


@dataclass(frozen=True)
class Bridged:
    """An expert's next-token distributions in the base's vocabulary; every row of `mass` sums to 1.

    Its last two columns hold what has no place there: `crossing`, texts for which the base's tokenizer writes other
    tokens of the prompt (a token across its end), and what stands for no base token.
    """

    mass: torch.Tensor  #: `(n, vocab + 2)`, float64
    undecided: torch.Tensor  #: `(n,)`, the total variation between `mass` and the truth is at most this; 1: no bound
    passes: torch.Tensor  #: `(n,)`, continuations followed up, a pass each behind the cached prompt

    @property
    def probabilities(self) -> torch.Tensor:
        """What was placed `(n, vocab)`; a row sums to 1 less `unplaced`."""
        return self.mass[:, :-2]

    @property
    def unplaced(self) -> torch.Tensor:
        """What has no place in the base's vocabulary `(n,)`, crossing included."""
        return self.mass[:, -2:].sum(1)

    @property
    def crossing(self) -> torch.Tensor:
        """What changes the base's tokens of the prompt `(n,)`; a bridge with `heal` places it."""
        return self.mass[:, -2]


@dataclass
class Bridge:
    r"""From an expert's tokens to a base's, by stage (rows 14 to 16 of the study).

    - `A`: to the base token with the same bytes; of several, to the one that its tokenizer writes (`,` and never
      `<0x2C>`), in equal shares if it writes none.
    - `B`: as A, else to the first of two base tokens that spell it, lowest first.
    - `C`: to the first of what the base's tokenizer writes for these bytes, at most `length` tokens; tokens of 1e-6 and
      more which it would not write behind the prompt's last one are crossing.
    - `exact`: q(t) = P(the base's tokens of prompt + continuation are those of the prompt, then t), continuations
      sampled from the expert; one that leaves t open is followed up, the likeliest first. Mass is *decided* only where
      no further text can change t: in a word before the last; and in the last, of BPE or Unigram, if its beginnings
      after which a boundary can stay agree on t (all of it; and where the rest begins longer tokens that can follow,
      with each of these). Words wait for the next one if their model is another, an unknown normalizer made them, or a
      regular expression may cut them anew (`CUTS`: mostly trailing whitespace, an apostrophe among the last two
      characters); an unknown one leaves nothing certain but the end of a text. The rest, *undecided*, goes to what the
      base would write if the text ended there. Added tokens spelled out in a continuation are plain text, bytes that
      are no UTF-8 U+FFFD, and the expert's end of text is the base's. Float rounding aside, nothing is approximate.

    The prompt's tokens are given, for either model. With `heal`, where it may end inside a token, each takes back its
    last `heal` ones: the expert's continuation must begin with the bytes it lost, and the place moves back as many base
    tokens (covers, :cite:`phan2024exact,hayase2025sampling`).
    """

    expert: LanguageModel  #: Its tokenizer, and its passes where distributions are not given
    base: LanguageModel  #: Whose vocabulary is wanted; its tokenizer is a fast one
    stage: str = "exact"  #: `A`, `B`, `C` or `exact`
    length: int = 4  #: Base tokens to an expert token at most, in stage C
    budget: int = 32  #: Continuations followed up for a prompt, in stage exact
    heal: int = 0  #: Last tokens of the prompt that are decided again, in stage exact

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ChassisError(f"no stage '{self.stage}' of a bridge: choose from {', '.join(STAGES)}")
        if min(self.length, self.budget + 1, self.heal + 1) < 1:
            raise ChassisError(f"length {self.length}, budget {self.budget}, heal {self.heal}: give at least 1, 0, 0")
        if self.expert.edits:
            raise ChassisError(f"{self.expert.name} has edits, which the passes of a bridge leave out: give it bare")
        #: Bytes of each expert token
        self.pieces, self._reader = token_bytes(self.expert.tokenizer)[: self.expert.vocab_size], Reader(self.base)
        self._end, none = self.expert.tokenizer.eos_token_id, self.base.vocab_size + 1
        if self.stage == "exact":
            spoken = sorted((piece, i) for i, piece in enumerate(self.pieces) if piece)
            self._sorted, self._order = [piece for piece, _ in spoken], np.array([i for _, i in spoken], dtype=int)
            self._tables: dict[tuple[int, int, int, int], NDArray[np.int64]] = {}
            return
        homes = self._homes()
        if not any(home for i, home in enumerate(homes) if i != self._end):
            raise ChassisError(f"{self.expert.name} and {self.base.name} share no token: try a later stage")
        pairs = [(i, t, 1 / len(ids)) for i, home in enumerate(homes) for ids in [home or [none]] for t in ids]
        rows, columns, weights = zip(*pairs, strict=True)
        #: `(vocab_expert, vocab_base + 2)`, where each expert token goes
        self.table = scipy.sparse.csr_matrix((weights, (rows, columns)), (len(homes), none + 1))

    def _homes(self) -> list[list[int]]:
        """The base tokens that share what each expert token gets."""
        return self._reader.homes(self.pieces, self._end, self.stage, self.length)

    def _placed(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.ascontiguousarray((self.table.T @ rows.T).T)

    def __call__(self, probabilities: torch.Tensor | None = None, prompts: Sequence[str] | None = None) -> Bridged:
        """Expert distributions in the base's vocabulary.

        `probabilities`, `(n, vocab_expert)`, are what the expert says behind each prompt; it is asked unless they are
        given. Of n `prompts` `exact` has need; C without them takes what is said to stand in the middle of a text.
        ChassisError: nothing to go by, numbers that differ, no distributions, a prompt that no model can read.
        """
        exact, given = self.stage == "exact", probabilities is not None
        if isinstance(prompts, str) or (prompts is None and (exact or not given)):
            raise ChassisError(f"stage {self.stage} has no prompts to go by: give a list of strings")
        if exact and self.heal and given:
            raise ChassisError("with heal the expert begins before the distributions given: leave them out")
        rows = _checked(probabilities, self.expert.vocab_size, prompts) if given else None
        named = [(prompt, f"prompt {i}") for i, prompt in enumerate(prompts or ())]
        ids = [self.expert.prompt_ids(*one) for one in named] if exact or not given else []
        for prompt, which in named:
            self.base.prompt_ids(prompt or "a", which)  # it must be able to read it too
        if exact:
            found = [self._exact(*one) for one in zip(prompts, ids, rows if given else [None] * len(ids), strict=True)]
            mass = np.array([one for one, *_ in found]).reshape(-1, self.base.vocab_size + 2)
            undecided, passes = np.array([rest for _, *rest in found]).reshape(-1, 2).T
            return Bridged(torch.from_numpy(mass), torch.tensor(undecided), torch.tensor(passes).long())
        if not given:
            rows = np.array([self._said([one])[0][0] for one in ids]).reshape(-1, self.expert.vocab_size)
        return self._reader.told(self._placed(rows), prompts if self.stage == "C" else None)

    def _exact(self, prompt: str, ids: list[int], first: NDArray | None) -> tuple[NDArray, float, int]:
        """Best-first look-ahead: mass `(vocab + 2,)`, how much of it is undecided, continuations followed up."""
        reader, size = self._reader, self.base.vocab_size + 3
        start, begin = len(ids) - self.heal, self.expert.tokenizer.bos_token_id
        if start < 1:
            ids, start = ([] if begin in (None, ids[0]) else [begin]) + ids, 1
        root = reader.root(prompt, self.heal, b"".join(self.pieces[i] or b"" for i in ids[start:]))
        if root >= 0:
            return np.eye(1, size - 1, root)[0], 0.0, 0
        rows, cache = self._said([ids[:start]])
        rows, decided = rows if first is None else [first], np.zeros(size)
        # An open continuation: its mass, the number of the path before it, its token, the state it leads to.
        now, waiting, left, paths = np.array([[1.0, 0, 0, -1 - root]]), np.zeros((0, 4)), [], [()]
        while len(now):
            for number, (row, (weight, *_, to)) in enumerate(zip(rows, now, strict=True), len(paths) - len(now)):
                state, mass, end = int(to), weight * row[self._order], 0.0 if self._end is None else row[self._end]
                codes = self._table(state, 0, len(mass), 0)
                decided += np.bincount(codes[codes >= 0], mass[codes >= 0], size)
                # Of no text nothing is written, not even what begins every text.
                last = reader.label(state, True) if prompt or number else reader.end
                decided[last] += weight * end
                decided[max(last, size - 2)] += max(0.0, weight * (1 - end) - mass.sum())
                new = np.stack([mass, np.full(len(mass), number), self._order, -1 - codes], axis=1)
                waiting = np.concatenate([waiting, new[codes < 0]])
            # What is lighter than as many others as can still be followed up never will be.
            room = self.budget + 1 - len(paths) if start + max(map(len, paths)) < self.expert.context else 0
            waiting = waiting[np.argsort(-waiting[:, 0], kind="stable")]
            left.append(waiting[room:])
            now, waiting = waiting[: min(room, WIDTH)], waiting[min(room, WIDTH) : room]
            paths += (more := [(*paths[int(before)], int(token)) for _, before, token, _ in now])
            rows = self._said([[*(() if cache else ids[:start]), *path] for path in more], cache)[0] if more else []
        rest, decided = np.concatenate(left), decided[:-1]
        shared = np.bincount(np.vectorize(reader.label, otypes=[int])(rest[:, 3].astype(int)), rest[:, 0], size - 1)
        if not (whole := decided.sum() + shared.sum()):  # The expert never says what was cut.
            shared[-1] = whole = 1.0
        return (decided + shared) / whole, float(shared.sum() / whole), len(paths) - 1

    def _said(self, rows: list[list[int]], cache: Any = None) -> tuple[NDArray[np.float64], Any]:
        """What the expert says behind each row of tokens `(n, vocab)`, all behind what its cache holds; the cache."""
        ends, keep = [len(row) - 1 for row in rows], self.expert.keeps_cache
        if cache:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(rows))
        # Nothing sees what stands behind it, so shorter rows need no mask.
        ids = torch.tensor([row + [0] * (max(ends) + 1 - len(row)) for row in rows], device=self.expert.device)
        with torch.inference_mode():
            out = self.expert.backbone(input_ids=ids, past_key_values=cache, use_cache=keep)
            logits = self.expert.readout(out.last_hidden_state[range(len(rows)), ends].float()).double()
        return logits.softmax(-1).cpu().numpy(), out.past_key_values if keep else None

    def _table(self, state: int, low: int, high: int, depth: int) -> NDArray[np.int64]:
        """Code of where each token of a range that shares `depth` bytes leads from a state that has read them."""
        if (codes := self._tables.get((state, low, high, depth))) is None:
            codes = self._tables[state, low, high, depth] = np.full(high - low, -1 - state)
            at = low if low == high else bisect_right(self._sorted, self._sorted[low][:depth], low, high)
            while at < high:
                byte, begin = self._sorted[at][depth], at
                at = bisect_right(self._sorted, byte, at, high, key=lambda piece: piece[depth])
                code = self._reader.step(state, byte)
                codes[begin - low : at - low] = code if code >= 0 else self._table(-1 - code, begin, at, depth + 1)
        return codes


class Reader:
    """How a base's tokenizer reads a text that still grows.

    A *state* is the text from the last settled place on and the base tokens that must come first. A *label* is the base
    token behind those, `vocab` if others come (crossing), `vocab + 1` if none does, `vocab + 2` if the text is not what
    is due after the prompt. A *code* is a label where no further text can change it, else -1 - the number of the state.
    """

    def __init__(self, base: LanguageModel) -> None:
        if not getattr(base.tokenizer, "is_fast", False):
            raise ChassisError(f"{base.name} has a slow tokenizer, whose rules cannot be read: use its fast version")
        self.name, self.size, self.tokenizer = base.name, base.vocab_size, base.tokenizer
        end, self.pieces = base.tokenizer.eos_token_id, token_bytes(base.tokenizer)[: base.vocab_size]
        self.end = base.vocab_size + 1 if end is None else end
        table, self._added = json.loads(base.tokenizer.backend_tokenizer.to_str()), base.tokenizer.added_tokens_decoder
        # This reads the middle of a text: what is added at the beginning of one is left out.
        changes = [rule for rule in _rules(table["normalizer"]) if rule["type"] != "Prepend"]
        splits, model = _rules(table["pre_tokenizer"]), table["model"]
        middle = {"add_prefix_space": False, "prepend_scheme": "never"}
        splits = [{key: middle.get(key, value) for key, value in rule.items()} for rule in splits]
        table |= {"normalizer": {"type": "Sequence", "normalizers": changes}, "truncation": None, "padding": None}
        table |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}, "added_tokens": []}
        self._middle = Tokenizer.from_str(json.dumps(table | {"post_processor": None}))
        # Letters exchanged one for one: such a text may be cut and joined anywhere.
        exchanged = [(rule.get("pattern", {}).get("String", ""), rule.get("content", "")) for rule in changes]
        self._plain = all(len(old) == len(new) == 1 for old, new in exchanged)
        late = [next(iter(CUTS.values()))] * any(x["type"] == "ByteLevel" and x["use_regex"] for x in splits) + [r"\Z"]
        for cut in (rule["pattern"] for rule in splits if rule["type"] == "Split"):
            late.append(CUTS.get(cut.get("Regex"), r"\Z" if len(cut.get("String", "")) == 1 else r"\A"))
        self._late = re.compile("|".join(late), re.DOTALL)
        # These write the end of a word, or a whole word, otherwise than its beginnings.
        uneven = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
        self._grows = self._plain and model["type"] in ("BPE", "Unigram") and not any(map(model.get, uneven))
        # Elsewhere a word's letters are others than the text's, the rest may be read otherwise, unknown letters melt.
        kinds, bpe = {rule["type"] for rule in splits}, model["type"] == "BPE"
        self._cuts = self._grows and bpe and model["byte_fallback"] and kinds <= {"Metaspace", "Digits"}
        names = ("".join(pair) for pair in model["merges"]) if bpe else (piece for piece, *_ in model["vocab"])
        self._written = sorted(set(names)) if self._grows else []
        self._begins = {piece[:n] for piece in self._written for n in range(1, len(piece))}
        self._pairs = {piece[n : n + 2] for piece in self.pieces if piece for n in range(len(piece) - 1)}
        self._states, self._numbers, self._follow = [], {}, {}
        # A cache that goes when the reader does.
        self._tokens, self._changes, self.label = map(cached, (self._tokens, self._changes, self.label))

    def written(self, pieces: Sequence[bytes | None]) -> list[list[int]]:
        """Base tokens of each of these in the middle of a text; none for part of a character."""
        texts = [(piece or b"").decode("utf-8", "replace") for piece in pieces]
        found = zip(self._middle.encode_batch_fast(texts), texts, pieces, strict=True)
        return [one.ids if text.encode() == piece else [] for one, text, piece in found]

    def homes(self, pieces: Pieces, end: int | None, stage: str = "C", length: int = 4) -> list[list[int]]:
        """Base tokens that each of these goes to by a stage's rule, see `Bridge`; number `end` is the end of text."""
        own = ids_of(self.pieces)
        first, homes = {piece: ids[0] for piece, ids in own.items()}, []
        for piece, ids in zip(pieces, self.written(pieces), strict=True):
            same = own.get(piece) or (spelled(piece or b"", first) if stage == "B" else [])
            homes.append(ids if len(ids) == 1 and ids[0] in same else same)
            if stage == "C" and ids:
                homes[-1] = ids[:1] if len(ids) <= length else []
        if end is not None:
            homes[end] = [self.end]
        return homes

    def told(self, mass: NDArray[np.float64], prompts: Sequence[str] | None) -> Bridged:
        """What was placed by a table `(n, vocab + 2)`; behind prompts less what melts into their last token."""
        mass[:, -1] += 1 - mass.sum(1)
        for row, prompt in zip(mass, prompts or (), strict=False):
            some = np.flatnonzero(row[:-2] >= 1e-6)
            melted = some[~self.follow(prompt, some)]
            row[-2], row[melted] = row[-2] + row[melted].sum(), 0.0
        return Bridged(torch.from_numpy(mass), torch.ones(len(mass)).double(), torch.zeros(len(mass)).long())

    def follow(self, prompt: str, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these base tokens can stand behind the prompt's last one, as far as whole characters go."""
        last = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"][-1:]
        before = (self.pieces[last[0]] if last else None) or b""
        if not before or self.written([before]) != [last]:
            return np.ones(len(tokens), dtype=bool)
        known = self._follow.setdefault(last[0], np.full(self.size, -1))
        new = tokens[known[tokens] < 0]
        known[new] = 1  # Where no token has the two bytes of the boundary side by side, both stay.
        near = [i for i in new if not self._cuts or before[-1:] + (self.pieces[i] or b"")[:1] in self._pairs]
        for i, ids in zip(near, self.written([before + (self.pieces[i] or b"") for i in near]), strict=True):
            known[i] = [self.pieces[j] for j in ids] in ([], [before], [before, self.pieces[i]])
        return known[tokens] > 0

    def root(self, prompt: str, heal: int, due: bytes = b"") -> int:
        """Code of a prompt, whose last `heal` tokens are open again and behind which its last bytes are due again."""
        own = self.tokenizer(prompt or "a", add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        whole, ends = own["input_ids"], [0, *(end for _, end in own["offset_mapping"])]
        # What stands behind the last added token is read for itself.
        tail = 1 + max([n for n, i in enumerate(whole) if i in self._added], default=-1)
        rest, whole = (prompt or "a")[ends[tail] :], whole[tail:]
        lead = next((lead for lead in ("", " ") if self._middle.encode(lead + rest).ids == whole), None)
        if lead is None or (tail and len(whole) < max(1, heal)):
            raise ChassisError(f"{self.name}: {prompt[-20:]!r} ends in a special or added token: end it in text")
        if not prompt:  # What begins every text is not yet written.
            return self._state(lead.encode(), (), due)
        if not self._plain:
            return self._code((lead + rest).encode(), tuple(whole[: max(0, len(whole) - heal)]), due)
        text, words = self._words(lead + rest)
        start = self._open(text, words)[1]
        while len(ids := self._middle.encode(text[start:]).ids) < heal and start:
            start = max([place for _, place in words if place < start], default=0)
        return self._code(text[start:].encode(), tuple(ids[: max(0, len(ids) - heal)]), due)

    def step(self, state: int, byte: int) -> int:
        """Code of a state's text and one byte more."""
        raw, want, due = self._states[state]
        unlike = due and due[0] != byte
        return self.size + 2 if unlike else self._code(raw if due else raw + bytes([byte]), want, due[1:])

    def label(self, state: int, ended: bool = False) -> int:
        """Label of a state if nothing followed, or if the expert ended its text."""
        raw, want, due = self._states[state]
        ids = self._middle.encode(raw.decode("utf-8", "replace")).ids
        label = self.size + 2 if due and ended else _label(ids + [self.end] * ended, want, self.size)[0]
        return self.size + 1 if label is None else label

    def _code(self, raw: bytes, want: tuple[int, ...], due: bytes) -> int:
        text, used = codecs.utf_8_decode(raw, "replace")
        text, words = self._words(text)
        settled, start, beginnings = self._open(text, words)
        code, left = _label(settled, want, self.size)
        if code is None and beginnings:
            *labels, code = (_label(self._tokens(begin), left, self.size)[0] for begin, _ in beginnings)
            others = [one for one, label in zip(beginnings, labels, strict=False) if label != code]
            code = None if code is None or any(self._changes(*one, left, code) for one in others) else code
        if code is None and self._plain and not due:
            raw, want = text[start:].encode() + raw[used:], left
        return self._state(raw, want, due) if code is None else code

    def _state(self, *state: Any) -> int:
        """Code of an open state, entered if it is new."""
        number = self._numbers.setdefault(state, len(self._states))
        self._states += [state] * (number == len(self._states))
        return -1 - number

    def _changes(self, left: str, right: str, want: tuple[int, ...], code: int) -> bool:
        """Whether a token that is longer than `right` and begins with it can follow `left` and change a label."""
        low, high = bisect_right(self._written, right), bisect_left(self._written, right + chr(0x10FFFF))
        known, several = self._tokens(left), (self._tokens(left + piece) for piece in self._written[low:high])
        longer = (_label(ids, want, self.size)[0] for ids in several if ids[:-1] == known != ids)
        return high > low + 256 or any(label != code for label in longer)

    def _words(self, text: str) -> tuple[str, list[tuple[str, int]]]:
        """The normalized text, and its words in the model's letters with the place where each begins."""
        text = self._middle.normalizer.normalize_str(text)
        words = [(word, at[0]) for word, at in self._middle.pre_tokenizer.pre_tokenize_str(text) if word]
        return text, words or [("", 0)]

    def _open(self, text: str, words: list[tuple[str, int]]) -> tuple[list[int], int, list[tuple[str, str]]]:
        """Tokens that are settled, where the rest begins, and its beginnings that may stay, each with what is left."""
        edge = self._late.search(text).start()
        n = max(0, bisect_right(words, edge, key=lambda word: word[1]) - 1)
        word, start = words[n][0], words[n][1] if n else 0
        ends = [n for n in range(len(word)) if word[n:] in self._begins] + [len(word)]
        # After the shortest of its beginnings is a boundary if the others go on from it.
        first = self._tokens(word[: ends[0]])
        cut = ends[0] if self._cuts and all(self._tokens(word[:n])[: len(first)] == first for n in ends) else 0
        settled = [i for one in [*(one for one, _ in words[:n]), word[:cut]] for i in self._tokens(one)]
        beginnings = [(word[cut:n], word[n:]) for n in ends] if self._grows and edge == len(text) else []
        return settled, start + cut, beginnings

    def _tokens(self, word: str) -> list[int]:
        return [token.id for token in self._middle.model.tokenize(word)] if word else []


def _label(ids: Sequence[int], want: tuple[int, ...], size: int) -> tuple[int | None, tuple[int, ...]]:
    """Label of a text with these tokens, none if they are too few, and what must still come before it."""
    n = min(len(ids), len(want))
    return (size, ()) if tuple(ids[:n]) != want[:n] else ((ids[n] if len(ids) > n else None), want[n:])


def spelled(word: str | bytes, ids: dict) -> list[int]:
    """First token of the pair that spells a word: found by cutting it, where the study tried all pairs."""
    firsts = [ids[word[:n]] for n in range(1, len(word)) if word[:n] in ids and word[n:] in ids]
    return [min(firsts)] if firsts else []


def _rules(step: dict | None) -> list[dict]:
    """A normalizer or a pre-tokenizer without what holds its steps together."""
    steps = (step or {}).get("normalizers", (step or {}).get("pretokenizers"))
    return [step] if step and steps is None else [rule for one in steps or () for rule in _rules(one)]


def _checked(probabilities: torch.Tensor, size: int, prompts: Sequence[str] | None) -> NDArray[np.float64]:
    """Distributions in float64, made to sum to one exactly."""
    rows = torch.as_tensor(probabilities).detach().cpu().double().numpy()
    if rows.ndim != 2 or rows.shape[1] != size or (prompts is not None and len(rows) != len(prompts)):
        wanted = ("n" if prompts is None else len(prompts), size)
        raise ChassisError(f"the distributions have shape {rows.shape}: give {wanted}, no padded rows of a head")
    sums = rows.sum(1, keepdims=True)
    if len(wrong := sums[~((abs(sums[:, 0] - 1) <= 1e-3) & (rows.min(1) >= 0))]):
        raise ChassisError(f"a row is no distribution (sum {wrong[0, 0]:.4g}): give probabilities, softmax of logits")
    return rows / sums
