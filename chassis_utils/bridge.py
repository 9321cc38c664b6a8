"""Bridges from an expert with another tokenizer: what it says next, told in the base's tokens."""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import ChassisError
from .models import LanguageModel
from .tokens import Pieces, ids_of, token_bytes

STAGES = ("A", "B", "C", "exact")
#: Continuations that share one forward pass of the expert in stage `exact`.
WIDTH = 8

#: Options with which a model writes the end of a word, or a whole word, otherwise than its beginnings.
_UNEVEN = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")

_Want = tuple[int, ...]
_Node = tuple[int, int, int]


@dataclass(frozen=True)
class Bridged:
    """An expert's next-token distributions in the base's vocabulary; every row of `mass` sums to 1.

    Its last two columns hold what has no place there: `crossing`, texts for which the base's tokenizer writes other
    tokens of the prompt (a token across its end), and what stands for no base token.
    """

    mass: torch.Tensor  #: `(n, vocab + 2)`, float64
    undecided: torch.Tensor  #: `(n,)`, the total variation between `mass` and the truth is at most this; 1: no bound
    passes: torch.Tensor  #: `(n,)`, continuations followed up, a pass of one token each

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
    r"""From an expert's tokens to a base's, by stage.

    - `A`: to the base token with the same bytes; of several, to the one that its tokenizer writes (`,` and never
      `<0x2C>`), in equal shares if it writes none. By `string` with the faults of the study: tokens decoded one by one,
      the last of equal strings has them all, the expert's 256 likeliest tokens only.
    - `B`: as A, else to the first of two base tokens that spell it, the pair which a search in the order of ids meets
      first; by `string` ids below 4,096 and 10 characters at most, as in the study.
    - `C`: to the first of what the base's tokenizer writes for these bytes, at most `length` tokens; tokens of 1e-6 and
      more which it would not write behind the prompt's last one are crossing.
    - `exact`: q(t) = P(the base's tokens of prompt + continuation are those of the prompt, then t), continuations
      sampled from the expert; one that leaves t open is followed up, the likeliest first.

    What is exact there. The base's tokens are what its normalizer, pre-tokenizer and model write for the whole text.
    Added tokens spelled out in a continuation are plain text, bytes that are no UTF-8 are U+FFFD, and the expert's end
    of text is the base's. Mass counts as *decided* only where no further text can change t. All words before the last
    are settled. In the last one, of BPE or Unigram, whatever follows, there is a last boundary at or before its present
    end, up to which the tokens are those of that beginning alone; so t is decided if all beginnings that leave a proper
    prefix of a token which can indeed follow agree on it. Words wait for the next one if their model is another, if an
    unknown normalizer made them, or if a regular expression may cut them anew (trailing whitespace, an apostrophe
    among the last two characters); an expression with other look-around than `(?!\S)` is certain at the end of a text
    only. So decided mass is right, and `undecided` bounds the error made by giving the rest to what the base would
    write if the text ended there. Float rounding aside, nothing else is approximate.

    The tokens of the prompt are given, for either model. With `heal`, where a prompt may end inside a token, each takes
    back its last `heal` ones: the expert's continuation must begin with the bytes it lost, and the place moves back as
    many base tokens (covers, as in arXiv 2410.09303 and 2506.14123).

    Source: rows 14 to 16 of the study.
    """

    expert: LanguageModel  #: Its tokenizer, and its passes where distributions are not given
    base: LanguageModel  #: Whose vocabulary is wanted
    stage: str = "exact"  #: `A`, `B`, `C` or `exact`
    match: str = "bytes"  #: Or `string`, for A and B
    length: int = 4  #: Base tokens to an expert token at most, in stage C
    budget: int = 32  #: Continuations followed up for a prompt, in stage exact
    heal: int = 0  #: Last tokens of the prompt that are decided again, in stage exact

    def __post_init__(self) -> None:
        if self.stage not in STAGES or self.match not in ("bytes", "string")[: 2 if self.stage in "AB" else 1]:
            raise ChassisError(f"no bridge '{self.stage}' by '{self.match}': {', '.join(STAGES)}; string for A and B")
        if min(self.length, self.budget + 1, self.heal + 1) < 1:
            given = f"length {self.length}, budget {self.budget}, heal {self.heal}"
            raise ChassisError(f"no bridge with {given}: give at least 1, 0 and 0")
        if self.expert.edits:
            raise ChassisError(f"{self.expert.name} has edits, which the passes of a bridge leave out: give it bare")
        self._reader, self._pieces = _Reader(self.base), _pieces(self.expert)
        self._end, none = self.expert.tokenizer.eos_token_id, self.base.vocab_size + 1
        if self.stage == "exact":
            spoken = sorted((piece, i) for i, piece in enumerate(self._pieces) if piece)
            self._sorted, self._order = [piece for piece, _ in spoken], np.array([i for _, i in spoken], dtype=int)
            self._silent = [i for i, piece in enumerate(self._pieces) if not piece and i != self._end]
            self._branches: dict[_Node, tuple[int, dict[int, _Node]]] = {}
            self._tables: dict[tuple[int, _Node], NDArray[np.int64]] = {}
            return
        given = self._pieces, self._end, self.stage, self.length
        homes = self._by_string() if self.match == "string" else self._reader.homes(*given)
        if not any(home for i, home in enumerate(homes) if i != self._end):
            raise ChassisError(f"{self.expert.name} and {self.base.name} share no token: try a later stage")
        pairs = [(i, t, 1 / len(ids)) for i, home in enumerate(homes) for ids in [home or [none]] for t in ids]
        rows, columns, weights = zip(*pairs, strict=True)
        #: `(vocab_expert, vocab_base + 2)`, where each expert token goes
        self.table = scipy.sparse.csr_matrix((weights, (rows, columns)), (len(homes), none + 1))

    def _by_string(self) -> list[list[int]]:
        models = (self.expert, self.base)
        expert, base = (model.tokenizer.batch_decode([[i] for i in range(model.vocab_size)]) for model in models)
        ids, first = {text: [i] for i, text in enumerate(base)}, {}
        for i, text in enumerate(base[:4096] if self.stage == "B" else ()):
            first.setdefault(text, i)
        return [ids.get(text) or (_spelled(text, first) if len(text) <= 10 else []) for text in expert]

    def __call__(self, probabilities: torch.Tensor | None = None, prompts: Sequence[str] | None = None) -> Bridged:
        """Expert distributions in the base's vocabulary.

        Args:
            probabilities: `(n, vocab_expert)`, what the expert says behind each prompt; asked of it unless given.
            prompts: n texts. A and B need none where there are `probabilities`; C takes what is said to stand in the
                middle of a text without them; `exact` always needs them.

        Raises:
            ChassisError: nothing to go by, numbers that differ, rows that are no distributions, a prompt that is longer
                than a model or cannot be read.
        """
        exact, given = self.stage == "exact", probabilities is not None
        if isinstance(prompts, str) or (prompts is None and (exact or not given)):
            raise ChassisError(f"stage {self.stage} has no prompts to go by: give a list of strings")
        if exact and self.heal and given:
            raise ChassisError("with heal the expert begins before the distributions given: leave them out")
        ids = [self._ids(i, prompt) for i, prompt in enumerate(prompts)] if exact or not given else None
        rows = _checked(probabilities, self.expert.vocab_size, prompts) if given else [None] * len(ids)
        if exact:
            found = [self._exact(*one) for one in zip(prompts, ids, rows, strict=True)]
            mass = np.array([one for one, *_ in found]).reshape(len(found), self.base.vocab_size + 2)
            undecided = torch.tensor([one for _, one, _ in found], dtype=torch.float64)
            return Bridged(torch.from_numpy(mass), undecided, torch.tensor([one for *_, one in found]).long())
        if not given:
            rows = np.array([_Passes(self.expert, one).first for one in ids]).reshape(-1, self.expert.vocab_size)
        if self.match == "string":
            rest = np.argsort(-rows, axis=1, kind="stable")[:, 256:]
            np.put_along_axis(rows, rest, 0.0, axis=1)
        mass = np.ascontiguousarray((self.table.T @ rows.T).T)
        return self._reader.told(mass, prompts if self.stage == "C" else None)

    def _ids(self, number: int, prompt: str) -> list[int]:
        """The expert's tokens of a prompt; of an empty one its beginning-of-text token."""
        if any(0xD800 <= ord(letter) < 0xE000 for letter in prompt):
            raise ChassisError(f"prompt {number} is no Unicode text (a lone surrogate): mend how it was read")
        for model in (self.base, self.expert):
            ids = list(model.tokenizer(prompt, verbose=False)["input_ids"])
            if len(ids) > model.context or max(ids, default=0) >= model.vocab_size:
                size = f"{len(ids)} tokens, {model.name} takes {model.context} of {model.vocab_size} kinds"
                raise ChassisError(f"prompt {number} has {size}: shorten it")
        if not ids and (start := self.expert.tokenizer.bos_token_id) is None:
            raise ChassisError(f"prompt {number} is empty and {self.expert.name} has no token to begin with: write one")
        return ids or [start]

    def _exact(self, prompt: str, ids: list[int], first: NDArray | None) -> tuple[NDArray, float, int]:
        """Best-first look-ahead: mass `(vocab + 2,)`, how much of it is undecided, continuations followed up."""
        reader, size = self._reader, self.base.vocab_size + 2
        if (root := reader.root(prompt, self.heal)) >= 0:
            return np.eye(1, size, root)[0], 0.0, 0
        start, begin = len(ids) - self.heal, self.expert.tokenizer.bos_token_id
        if start < 1:
            ids, start = ([] if begin in (None, ids[0]) else [begin]) + ids, 1
        cut = b"".join(self._pieces[i] or b"" for i in ids[start:])
        passes = _Passes(self.expert, ids[:start], first)
        # A row is a continuation that is open: its mass, the number of the path before it, its token, the state it
        # leads to, how many bytes of `cut` are still due.
        waiting, left, paths, done, decided = np.zeros((0, 5)), [], [], 0, np.zeros(size)
        batch = [((), 1.0, -1 - root, len(cut), passes.first)]
        while batch:
            for path, weight, state, due, row in batch:
                tokens, codes, dues = self._next(state, cut[len(cut) - due :])
                mass, placed = weight * row[tokens], codes >= 0
                decided += np.bincount(codes[placed], mass[placed], size)
                if not due:
                    decided[-1] += weight * row[self._silent].sum()
                    if self._end is not None:
                        # Nothing is written for no text, not even the space that begins one.
                        said = prompt or path or reader.end is None
                        decided[reader.ends[state] if said else reader.end] += weight * row[self._end]
                new = np.stack([mass, np.full(len(tokens), len(paths)), tokens, -1 - codes, dues], axis=1)[~placed]
                waiting = np.concatenate([waiting, new])
                paths.append(path)
            # What is lighter than as many others as can still be followed up never will be.
            room = self.budget - done if start + len(max(paths, key=len)) < self.expert.context else 0
            waiting = waiting[np.argsort(-waiting[:, 0], kind="stable")]
            left.append(waiting[room:])
            now, waiting = waiting[: min(room, WIDTH)], waiting[min(room, WIDTH) : room]
            several = [(*paths[int(before)], int(token)) for _, before, token, _, _ in now]
            rows, done = passes(several) if several else (), done + len(now)
            batch = [(p, w[0], int(w[3]), int(w[4]), r) for p, w, r in zip(several, now, rows, strict=True)]
        rest = np.concatenate(left)
        shared = np.bincount(np.array(reader.likely)[rest[:, 3].astype(int)], rest[:, 0], size)
        if not (whole := decided.sum() + shared.sum()):  # The expert never says what was cut.
            shared[-1] = whole = 1.0
        return (decided + shared) / whole, float(shared.sum() / whole), done

    def _next(self, state: int, due: bytes) -> tuple[NDArray, NDArray, NDArray]:
        """Tokens that can come, the code of where each leads, and the bytes that are due after it."""
        node, early = (0, len(self._sorted), 0), []
        for n, byte in enumerate(due):
            ends, below = self._branch(node)
            early += [(i, -1 - state, len(due) - n) for i in self._order[node[0] : ends]]
            node = below.get(byte, (0, 0, 0))
        tokens = self._order[node[0] : node[1]]
        some = np.stack([tokens, self._table(state, node), np.zeros(len(tokens), dtype=int)])
        return tuple(np.concatenate([some, np.array(early, dtype=int).reshape(-1, 3).T], axis=1))

    def _table(self, state: int, node: _Node) -> NDArray[np.int64]:
        """Code of where each expert token below a node leads from a state."""
        if (codes := self._tables.get((state, node))) is None:
            codes = np.full(node[1] - node[0], -1 - state)
            for byte, child in self._branch(node)[1].items() if len(codes) else ():
                code = self._reader.step(state, byte)
                below = code if code >= 0 else self._table(-1 - code, child)
                codes[child[0] - node[0] : child[1] - node[0]] = below
            self._tables[state, node] = codes
        return codes

    def _branch(self, node: _Node) -> tuple[int, dict[int, _Node]]:
        """A node of the trie is a range of sorted tokens that share `depth` bytes: where those end that have no more,
        and the nodes below by their next byte.
        """  # noqa: D205
        if node not in self._branches:
            at, high, depth = node
            while at < high and len(self._sorted[at]) == depth:
                at += 1
            ends, below = at, {}
            while at < high:
                byte, low = self._sorted[at][depth], at
                at = bisect_right(self._sorted, byte, low, high, key=lambda piece: piece[depth])
                below[byte] = (low, at, depth + 1)
            self._branches[node] = ends, below
        return self._branches[node]


class _Passes:
    """An expert behind one prompt, which it reads once."""

    def __init__(self, expert: LanguageModel, ids: list[int], first: NDArray | None = None) -> None:
        self.expert, self.ids, self.cache = expert, ids, None
        rows, cache = self._run([ids])
        self.first = rows[0] if first is None else first
        if expert.keeps_cache:
            cache.batch_repeat_interleave(WIDTH)
            self.cache = cache

    def __call__(self, paths: list[tuple[int, ...]]) -> NDArray[np.float64]:
        """Distributions `(len(paths), vocab)` behind each path of tokens."""
        rows = [[*([] if self.cache else self.ids), *path] for path in paths]
        # The cache holds as many rows as fit in a pass.
        found, _ = self._run(rows + rows[:1] * (WIDTH - len(rows)))
        if self.cache:
            self.cache.crop(-max(map(len, rows)))
        return found[: len(paths)]

    def _run(self, rows: list[list[int]]) -> tuple[NDArray[np.float64], object]:
        most = max(map(len, rows))
        # Nothing sees what stands behind it, so shorter rows need no mask.
        ids = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=self.expert.device)
        with torch.inference_mode():
            keep = self.expert.keeps_cache
            out = self.expert.backbone(input_ids=ids, past_key_values=self.cache, use_cache=keep)
            last = out.last_hidden_state[range(len(rows)), [len(row) - 1 for row in rows]].float()
            logits = self.expert.readout(last).double()
        return logits.softmax(-1).cpu().numpy(), out.past_key_values if keep else None


class _Reader:
    """How a base's tokenizer reads a text that still grows.

    A *state* is the text from the last settled place on and the base tokens that must come first. A *label* is the base
    token behind those, `vocab` if others come (crossing), `vocab + 1` if none does. A *code* is a label where no
    further text can change it, else -1 - the number of the state.
    """

    def __init__(self, base: LanguageModel) -> None:
        if not getattr(base.tokenizer, "is_fast", False):
            raise ChassisError(f"{base.name} has a slow tokenizer, whose rules cannot be read: use its fast version")
        self.name, self.size, self.pieces, self.end = (
            base.name, base.vocab_size, _pieces(base), base.tokenizer.eos_token_id,
        )  # fmt: skip
        table = json.loads(base.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self._whole = Tokenizer.from_str(json.dumps(table))
        # The same without what is added at the beginning of a text.
        changes = [r for r in _rules(table["normalizer"], "normalizers") if r["type"] != "Prepend"]
        splits, model = _rules(table["pre_tokenizer"], "pretokenizers"), table["model"]
        for rule in splits:
            rule |= {
                key: value for key, value in (("prepend_scheme", "never"), ("add_prefix_space", False)) if key in rule
            }
        table |= {"normalizer": {"type": "Sequence", "normalizers": changes} if changes else None, "added_tokens": []}
        table |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None}
        self._middle = Tokenizer.from_str(json.dumps(table | {"post_processor": None}))
        self._model = self._middle.model
        # Letters exchanged one for one: such a text may be cut and joined anywhere.
        self._plain = all(
            len(r.get("pattern", {}).get("String", "")) == len(r.get("content", "")) == 1 for r in changes
        )
        patterns = [str(r["pattern"].get("Regex", "")) for r in splits if r["type"] == "Split"]
        self._searches = bool(patterns) or any(r["type"] == "ByteLevel" and r["use_regex"] for r in splits)
        self._certain = not any(re.search(r"\(\?(?:[=<]|!(?!\\S\)))", pattern) for pattern in patterns)
        marks = any(model.get(key) for key in _UNEVEN)
        self._bpe = model["type"] == "BPE"
        self._grows = self._plain and not marks and model["type"] in ("BPE", "Unigram")
        vocab = model["vocab"] if self._grows else ()
        written = {"".join(pair) for pair in model["merges"]} if self._bpe and vocab else {piece for piece, *_ in vocab}
        self._written = sorted(written)
        self._begins = {piece[:n] for piece in self._written for n in range(1, len(piece))}
        self._longest, self._letters = max(map(len, self._written), default=1), set().union(*self._written)
        self._pairs = {piece[n : n + 2] for piece in self._written for n in range(len(piece) - 1)}
        # Letters of a byte-level word are no letters of the text: it is not cut where no token holds two side by side.
        self._cuts = self._grows and self._bpe and not any(rule["type"] == "ByteLevel" for rule in splits)
        self._names = base.tokenizer.convert_ids_to_tokens(list(range(self.size)))
        self._heads = np.array([(name or "")[:1] for name in self._names])
        self._known: dict[str, list[int]] = {}
        self._codes: dict[tuple[bytes, _Want], int] = {}
        self._longer: dict[tuple[_Want, str], bool] = {}
        self._follow: dict[int, NDArray[np.int64]] = {}
        self.states: list[tuple[bytes, _Want]] = []
        self.likely: list[int] = []  #: Label of each state if nothing followed
        self.ends: list[int] = []  #: And if the expert ended its text

    def written(self, pieces: Sequence[bytes | None]) -> list[list[int]]:
        """Base tokens of each of these in the middle of a text; none for part of a character."""
        texts = {i: _decoded(piece)[0] for i, piece in enumerate(pieces) if piece}
        whole = [i for i, text in texts.items() if text.encode() == pieces[i]]
        found = self._middle.encode_batch_fast([texts[i] for i in whole], add_special_tokens=False)
        ids = dict(zip(whole, (one.ids for one in found), strict=True))
        return [ids.get(i, []) for i in range(len(pieces))]

    def homes(self, pieces: Pieces, end: int | None, stage: str = "C", length: int = 4) -> list[list[int]]:
        """Base tokens that each of these goes to by a stage's rule, see `Bridge`; number `end` is the end of text."""
        own = ids_of(self.pieces)
        first, homes = {piece: ids[0] for piece, ids in own.items()}, []
        for piece, ids in zip(pieces, self.written(pieces), strict=True):
            homes.append(ids if len(ids) == 1 and ids[0] in own.get(piece, ()) else own.get(piece, []))
            if stage == "C" and ids:
                homes[-1] = ids[:1] if len(ids) <= length else []
            elif stage == "B" and piece and not homes[-1]:
                homes[-1] = _spelled(piece, first)
        if end is not None and self.end is not None:
            homes[end] = [self.end]
        return homes

    def told(self, mass: NDArray[np.float64], prompts: Sequence[str] | None) -> Bridged:
        """What was placed by a table `(n, vocab + 2)`; behind prompts less what melts into their last token."""
        mass[:, -1] += 1 - mass.sum(1)
        for row, prompt in zip(mass, prompts or (), strict=False):
            some = np.flatnonzero(row[:-2] >= 1e-6)
            melted = some[~self.follow(prompt, some)]
            row[-2] += row[melted].sum()
            row[melted] = 0.0
        return Bridged(torch.from_numpy(mass), torch.ones(len(mass)).double(), torch.zeros(len(mass)).long())

    def follow(self, prompt: str, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these base tokens can stand behind the prompt's last one, as far as whole characters go."""
        last = self._whole.encode(prompt, add_special_tokens=False).ids[-1:]
        before = (self.pieces[last[0]] if last else None) or b""
        if not before or self.written([before]) != [last]:
            return np.ones(len(tokens), dtype=bool)
        if last[0] not in self._follow:
            # No token has these letters side by side, the last of this one and the first of those.
            end = self._names[last[0]][-1:]
            apart = self._cuts * ~np.isin(self._heads, [pair[1] for pair in self._pairs if pair[0] == end])
            self._follow[last[0]] = np.where(apart, 1, -1)
        known = self._follow[last[0]]
        new = tokens[known[tokens] < 0]
        together = self.written([before + (self.pieces[i] or b"") for i in new])
        pieces = [[self.pieces[i] for i in ids] for ids in together]
        known[new] = [not p or p == [before, self.pieces[i] or b""][: len(p)] for p, i in zip(pieces, new, strict=True)]
        return known[tokens] > 0

    def root(self, prompt: str, heal: int) -> int:
        """Code of a prompt, whose last `heal` tokens are open again."""
        whole = self._whole.encode(prompt or "a", add_special_tokens=False).ids
        for lead in ("", " "):
            text, words = self._words(lead + (prompt or "a"))
            start = self._open(text, words)[1]
            while len(ids := self._ids(text[start:])) < heal and start:
                start = max(place for place in (0, *(place for _, place in words)) if place < start)
            if whole[len(whole) - len(ids) :] == ids and (start or len(ids) == len(whole)):
                if not prompt:  # What begins every text is not yet written.
                    return self._state((lead.encode(), ()))
                raw = text[start:] if self._plain else lead + prompt
                return self._code(raw.encode(), tuple(ids[: max(0, len(ids) - heal)]))
        raise ChassisError(f"{self.name}: {prompt[-20:]!r} ends in a special or added token: end the prompt in text")

    def step(self, state: int, byte: int) -> int:
        """Code of a state's text and one byte more."""
        raw, want = self.states[state]
        return self._code(raw + bytes([byte]), want)

    def _code(self, raw: bytes, want: _Want) -> int:
        if (code := self._codes.get((raw, want))) is None:
            text, late = _decoded(raw)
            text, words = self._words(text)
            closed, start, growing = self._open(text, words)
            code, left = _label([i for word in closed for i in self._tokens(word)], want, self.size)
            if code is None and growing:
                code = self._settled(growing, left)
            if code is None:
                code = self._state((text[start:].encode() + late, left) if self._plain else (raw, want))
            self._codes[raw, want] = code
        return code

    def _state(self, state: tuple[bytes, _Want]) -> int:
        """Code of an open state, entered if it is new."""
        code = self._codes.setdefault(state, -1 - len(self.states))
        if -1 - code == len(self.states):
            ids = self._ids(state[0].decode("utf-8", "replace"))
            for labels, end in ((self.likely, []), (self.ends, [] if self.end is None else [self.end])):
                label = _label(ids + end, state[1], self.size)[0]
                labels.append(self.size + 1 if label is None else label)
            self.states.append(state)
        return code

    def _settled(self, word: str, want: _Want) -> int | None:
        """Label of a word that can only grow, if it has it whatever follows; see `Bridge`."""
        label = _label(self._tokens(word), want, self.size)[0]
        if label is None:
            return None
        for n in range(max(0, len(word) - self._longest), len(word)):
            if word[n:] in self._begins and _label(self._tokens(word[:n]), want, self.size)[0] != label:
                if self._has_longer(word[:n], word[n:]):
                    return None
        return label

    def _has_longer(self, left: str, right: str) -> bool:
        """Whether a token that is longer than `right` and begins with it can follow `left`."""
        known = self._tokens(left)
        # In BPE a boundary depends on the two tokens beside it only.
        key = (tuple(known[-1:] if self._bpe else known), right)
        if key not in self._longer:
            low, high = bisect_right(self._written, right), bisect_left(self._written, right + chr(0x10FFFF))
            several = (self._tokens(left + piece) for piece in self._written[low : min(high, low + 256)])
            self._longer[key] = high > low + 256 or any(ids[:-1] == known and ids != known for ids in several)
        return self._longer[key]

    def _open(self, text: str, words: list[tuple[str, int]]) -> tuple[list[str], int, str | None]:
        """Words that are settled, where the rest begins, and the rest where it is one word that can only grow."""
        if not words or not self._certain:
            return [], 0, None
        n, growing = len(words) - 1, self._grows
        if self._searches:
            edge = len(text.rstrip())
            if (mark := text.find("'", max(0, len(text) - 2))) >= 0:
                edge = min(edge, mark - 1)
            ends = [*(start for _, start in words[1:]), len(text)]
            n = min(n, bisect_right(ends, edge))
            growing = growing and edge == len(text)
        word, start = words[n]
        closed = [one for one, _ in words[:n]]
        if self._cuts:
            # No token holds these two letters side by side: between them is a boundary.
            at = (i for i in range(len(word) - 1, 0, -1) if word[i - 1 : i + 1] not in self._pairs)
            cut = next((i for i in at if {word[i - 1], word[i]} <= self._letters), 0)
            closed, start, word = [*closed, word[:cut]], start + cut, word[cut:]
        return closed, start, word if growing else None

    def _words(self, text: str) -> tuple[str, list[tuple[str, int]]]:
        """The normalized text, and its words in the model's letters with the place where each begins."""
        normalizer, splitter = self._middle.normalizer, self._middle.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        whole = [(text, (0, len(text)))] if text else []
        return text, [(word, at[0]) for word, at in (splitter.pre_tokenize_str(text) if splitter else whole)]

    def _tokens(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [token.id for token in self._model.tokenize(word)] if word else []
        return self._known[word]

    def _ids(self, text: str) -> list[int]:
        return [i for word, _ in self._words(text)[1] for i in self._tokens(word)]


def _label(ids: Sequence[int], want: _Want, size: int) -> tuple[int | None, _Want]:
    """Label of a text with these tokens, none if they are too few, and what must still come before it."""
    n = min(len(ids), len(want))
    if tuple(ids[:n]) != want[:n]:
        return size, ()
    return (ids[n] if len(ids) > n else None), want[n:]


def _spelled(word: str | bytes, ids: dict) -> list[int]:
    """First token of the pair that spells a word: found by cutting it, where the study tried all pairs."""
    firsts = [ids[word[:n]] for n in range(1, len(word)) if word[:n] in ids and word[n:] in ids]
    return [min(firsts)] if firsts else []


def _pieces(model: LanguageModel) -> Pieces:
    """Bytes of every row of the head."""
    pieces = token_bytes(model.tokenizer)[: model.vocab_size]
    return pieces + [None] * (model.vocab_size - len(pieces))


def _rules(table: dict | None, parts: str) -> list[dict]:
    """The steps of a normalizer or a pre-tokenizer."""
    if table is None or table["type"] != "Sequence":
        return [table] if table else []
    return [rule for one in table[parts] for rule in _rules(one, parts)]


def _decoded(raw: bytes) -> tuple[str, bytes]:
    """Text, and the bytes at its end that begin a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(raw), decoder.getstate()[0]


def _checked(probabilities: torch.Tensor, size: int, prompts: Sequence[str] | None) -> NDArray[np.float64]:
    """Distributions in float64, made to sum to one exactly."""
    rows = torch.as_tensor(probabilities).detach().cpu().double().numpy()
    if rows.ndim != 2 or rows.shape[1] != size or (prompts is not None and len(rows) != len(prompts)):
        wanted = f"({'n' if prompts is None else len(prompts)}, {size})"
        raise ChassisError(f"the distributions have shape {rows.shape}: give {wanted}, no padded rows of a head")
    sums = rows.sum(1, keepdims=True)
    if wrong := [s for s, row in zip(sums[:, 0], rows, strict=True) if not (abs(s - 1) <= 1e-3 and row.min() >= 0)]:
        raise ChassisError(f"a row is no distribution (sum {wrong[0]:.4g}): give probabilities, softmax of logits")
    return rows / sums
