"""Bridges from an expert with another tokenizer: what it says next, told in the base's tokens."""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
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
#: Expansions that share one forward pass of the expert in stage `exact`.
WIDTH = 8

_Want = tuple[int, ...]


@dataclass(frozen=True)
class Bridged:
    """An expert's next-token distributions in the base's vocabulary: every row of `mass` sums to 1.

    The last two columns hold what has no place there: `crossing`, texts at which the base's tokenizer writes a token
    over the prompt's end (or changes tokens before it), and mass that stands for no base token at all.
    """

    mass: torch.Tensor  #: `(n, vocab + 2)`, float64
    undecided: torch.Tensor  #: `(n,)` at most this is the total variation between `mass` and the truth; 1 is no bound
    passes: torch.Tensor  #: `(n,)` passes of the expert beyond the prompt's own

    @property
    def probabilities(self) -> torch.Tensor:
        """Mass placed `(n, vocab)`; a row sums to 1 less what was not placed."""
        return self.mass[:, :-2]

    @property
    def unplaced(self) -> torch.Tensor:
        """Mass that has no place in the base's vocabulary `(n,)`."""
        return self.mass[:, -2:].sum(1)

    @property
    def crossing(self) -> torch.Tensor:
        """The part of `unplaced` whose text changes the base's tokens before the place `(n,)`; see `heal`."""
        return self.mass[:, -2]

    @property
    def normalized(self) -> torch.Tensor:
        """What was placed, made to sum to one `(n, vocab)`; a row without any mass stays zero."""
        return self.probabilities / self.probabilities.sum(1, keepdim=True).clamp(min=1e-300)


class Bridge:
    """From an expert's tokens to a base's, by stage.

    - `A`: an expert token goes to the base token with the same bytes.
    - `B`: as A, and where there is none to the first of two base tokens that spell it together.
    - `C`: to the first token of what the base's own tokenizer writes for these bytes, of `length` tokens at most. Given
      prompts, mass of tokens that the base would melt into the prompt's last token is `crossing`.
    - `exact`: q(t) = P(base tokens of prompt + continuation, at the place behind the prompt, are t), with the
      continuation sampled from the expert. An expert token that leaves t open is followed up by another pass.

    What is exact there. The base's tokens are those its normalizer, pre-tokenizer and model write for the *whole* text,
    prompt and continuation; texts that spell a special token stand for themselves, and bytes that are no UTF-8 for
    U+FFFD, as in `decode`. A continuation's t is *decided* only if no further text can change it. Text before the last
    word is settled: the next word cannot reach it. Within a word of BPE or Unigram, any longer text has a last
    boundary at or before the word's present end, and its tokens up to there are those of that beginning alone (merges
    that never cross a boundary are the same on both sides of it); so t is decided if all beginnings that leave a proper
    prefix of some token agree on t, where that token can follow in fact. Other models (WordPiece), and words that an
    unknown normalizer or a regular expression may still cut otherwise (runs of whitespace, an apostrophe two characters
    back), wait for the next word; an expression that looks around wherever it likes is never certain before the end of
    the text. So mass counted as decided is right, and `undecided` bounds the error of the rest, which is shared out by
    what the base would write if the text ended there.

    Where a prompt ends inside a token of either model, `heal` says how many of their last tokens are decided again: the
    place moves back by that many base tokens, the expert begins that many of its own tokens earlier, and its
    continuation must begin with the bytes that were cut. With `heal=0` both models' tokens of the prompt stay as they
    are, and texts at which the base's would not are told as `crossing`.

    Source: rows 14 to 16 of the study; token healing and covers as in arXiv 2410.09303 and 2506.14123.
    """

    def __init__(
        self,
        expert: LanguageModel,
        base: LanguageModel,
        stage: str = "exact",
        *,
        match: str = "bytes",
        length: int = 4,
        budget: int = 32,
        heal: int = 0,
    ) -> None:
        """Prepare the tables of a stage.

        Args:
            expert: its tokenizer, and in stage `exact` its passes.
            base: whose vocabulary is wanted.
            stage: `A`, `B`, `C` or `exact`.
            match: `bytes`; or `string` (A and B), with the faults of the study: tokens are decoded one by one, of equal
                strings the last id has them all, only the expert's 256 likeliest tokens count; pairs are of ids below
                4,096 and of 10 characters at most.
            length: of stage C, base tokens to an expert token.
            budget: of stage `exact`, passes beyond the prompt's own.
            heal: of stage `exact`, last tokens of the prompt to decide again.

        Raises:
            ChassisError: an unknown stage or option, vocabularies that share nothing, a tokenizer whose bytes or rules
                cannot be read, an expert with edits.
        """
        if stage not in STAGES or match not in ("bytes", "string") or (match == "string" and stage in ("C", "exact")):
            raise ChassisError(
                f"no bridge '{stage}' by '{match}': choose {', '.join(STAGES)} by bytes, or A, B by string"
            )
        if min(length, budget + 1, heal + 1) < 1:
            raise ChassisError(f"length {length}, budget {budget}, heal {heal}: give at least 1, 0 and 0")
        if expert.edits:
            raise ChassisError(f"{expert.name} has edits, which a bridge's passes leave out: give it bare")
        self.expert, self.base, self.stage, self.match = expert, base, stage, match
        self.length, self.budget, self.heal, self._end = length, budget, heal, expert.tokenizer.eos_token_id
        if match == "string":
            homes = _by_string(*(_strings(model) for model in (expert, base)), pairs=stage == "B")
        else:
            self._reader, self._pieces = _Reader(base), _pieces(expert)
            if stage == "exact":
                self._trie = _Trie(self._pieces)
                self._tables: dict[tuple[int, int], NDArray[np.int64]] = {}
                self._silent = [i for i, p in enumerate(self._pieces) if p is None and i != self._end]
                return
            homes = self._reader.homes(self._pieces, stage, length)
            if self._end is not None and self._reader.end is not None:
                homes[self._end] = [self._reader.end]
        pairs = [(i, t, 1 / len(ids)) for i, ids in homes.items() for t in ids]
        if not pairs:
            raise ChassisError(f"{expert.name} and {base.name} share no token in stage {stage}: try a later stage")
        pairs += [(i, base.vocab_size + 1, 1.0) for i in range(expert.vocab_size) if not homes.get(i)]
        rows, columns, weights = zip(*pairs, strict=True)
        shape = (expert.vocab_size, base.vocab_size + 2)
        self.table = scipy.sparse.csr_matrix((weights, (rows, columns)), shape)  #: `(vocab_expert, vocab_base + 2)`

    def __call__(self, probabilities: torch.Tensor | None = None, prompts: Sequence[str] | None = None) -> Bridged:
        """Expert distributions in the base's vocabulary.

        Args:
            probabilities: `(n, vocab_expert)`, one row a prompt; the expert's own unless given.
            prompts: n texts; stages A and B need none where there are `probabilities`, C then takes tokens as they are
                in the middle of a text, and `exact` always needs them.

        Raises:
            ChassisError: neither is given, numbers that differ, rows that are no distributions, a prompt that is longer
                than a model or that a model cannot read.
        """
        if isinstance(prompts, str) or (prompts is None and (probabilities is None or self.stage == "exact")):
            raise ChassisError(f"stage {self.stage} has no prompts to go by: give a list of strings")
        ids = None if prompts is None else [self._ids(i, prompt) for i, prompt in enumerate(prompts)]
        if probabilities is not None:
            probabilities = _checked(probabilities, self.expert.vocab_size, ids)
        if self.stage == "exact":
            return self._look_ahead(prompts, ids, probabilities)
        if probabilities is None:
            rows = [_Passes(self.expert, one).first for one in ids]
            probabilities = np.stack(rows) if rows else np.zeros((0, self.expert.vocab_size))
        if self.match == "string":
            rest = np.argsort(-probabilities, axis=1, kind="stable")[:, 256:]
            np.put_along_axis(probabilities, rest, 0.0, axis=1)
        mass = np.ascontiguousarray((self.table.T @ probabilities.T).T)
        mass[:, -1] += 1 - mass.sum(1)
        if self.stage == "C":
            for row, prompt in zip(mass, prompts or (), strict=prompts is not None):
                lost = row[:-2] * ~self._reader.follows(prompt)
                row[:-2] -= lost
                row[-2] += lost.sum()
        return Bridged(torch.from_numpy(mass), torch.ones(len(mass)).double(), torch.zeros(len(mass), dtype=torch.long))

    def _ids(self, number: int, prompt: str) -> list[int]:
        """The expert's tokens of a prompt; of an empty one its beginning-of-text token."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ChassisError(
                f"prompt {number} is no Unicode text (a lone surrogate): mend how it was read"
            ) from error
        start = self.expert.tokenizer.bos_token_id
        ids = list(self.expert.tokenizer(prompt, verbose=False)["input_ids"]) or [i for i in (start,) if i is not None]
        if not ids:
            raise ChassisError(f"prompt {number} is empty and {self.expert.name} has no token to begin with: write one")
        for model, there in ((self.expert, ids), (self.base, self.base.tokenizer(prompt, verbose=False)["input_ids"])):
            if len(there) > model.context:
                long = f"prompt {number} has {len(there)} tokens, {model.name} takes {model.context}"
                raise ChassisError(f"{long}: shorten it")
            if max(there, default=0) >= model.vocab_size:
                raise ChassisError(f"prompt {number} has a token that {model.name} does not have: leave it out")
        return ids

    # ------------------------------------------------------------------------------------------ stage exact

    def _look_ahead(self, prompts: Sequence[str], ids: list[list[int]], given: NDArray | None) -> Bridged:
        if self.heal and given is not None:
            raise ChassisError("with heal the expert begins before the distributions given: leave them out")
        rows = [None] * len(ids) if given is None else given
        found = [self._exact(*one) for one in zip(prompts, ids, rows, strict=True)]
        mass = np.stack([one[0] for one in found]) if found else np.zeros((0, self.base.vocab_size + 2))
        undecided = torch.tensor([one[1] for one in found], dtype=torch.float64)
        return Bridged(torch.from_numpy(mass), undecided, torch.tensor([one[2] for one in found], dtype=torch.long))

    def _exact(self, prompt: str, ids: list[int], first: NDArray | None) -> tuple[NDArray, float, int]:
        """Best-first from one prompt: mass `(vocab + 2,)`, what of it is undecided, passes."""
        reader, size = self._reader, self.base.vocab_size + 2
        root, decided, shared, done = reader.root(prompt, self.heal), np.zeros(size), np.zeros(size), 0
        if root >= 0:
            decided[root] = 1.0
            return decided, 0.0, 0
        start = len(ids) - self.heal
        if start < 1:
            begin = self.expert.tokenizer.bos_token_id
            ids, start = (ids, 1) if begin in (None, ids[0]) else ([begin, *ids], 1)
        cut = b"".join(self._pieces[i] or b"" for i in ids[start:])
        passes = _Passes(self.expert, ids[:start], first)
        # Continuations still open, a row each: mass, number of the path before, token, state, bytes of `cut` still due.
        paths: list[tuple[int, ...]] = []
        waiting = np.zeros((0, 5))
        batch = [((), 1.0, -1 - root, len(cut), passes.first)]
        while batch:
            for path, weight, state, due, row in batch:
                tokens, codes, dues = self._codes(state, cut[len(cut) - due :])
                mass, placed = weight * row[tokens], codes >= 0
                decided += np.bincount(codes[placed], mass[placed], size)
                if not due:
                    decided[-1] += weight * row[self._silent].sum()
                    if self._end is not None:
                        decided[reader.ends[state]] += weight * row[self._end]
                new = np.stack([mass, np.full(len(tokens), len(paths)), tokens, -1 - codes, dues], axis=1)[~placed]
                paths.append(path)
                waiting = np.concatenate([waiting, new])
            # No more than the passes that are left can ever be followed up; what is lighter is shared out now.
            room = self.budget - done if len(batch[0][0]) + start < self.expert.context else 0
            waiting = waiting[np.argsort(-waiting[:, 0], kind="stable")]
            rest, waiting = waiting[room:], waiting[:room]
            shared += np.bincount(reader.likely[rest[:, 3].astype(int)], rest[:, 0], size)
            now, waiting = waiting[:WIDTH], waiting[WIDTH:]
            done += len(now)
            several = [(*paths[int(before)], int(token)) for _, before, token, _, _ in now]
            rows = passes(several) if several else ()
            batch = [(p, w[0], int(w[3]), int(w[4]), r) for p, w, r in zip(several, now, rows, strict=True)]
        whole = decided.sum() + shared.sum()
        return (decided + shared) / whole, float(shared.sum() / whole), done

    def _codes(self, state: int, due: bytes) -> tuple[NDArray, NDArray, NDArray]:
        """Tokens that can come next, where each leads (a label, or -1 - state), and the bytes then still due."""
        trie, node = self._trie, 0
        early: list[tuple[int, int, int]] = []
        for n, byte in enumerate(due):
            if n:
                early += [(int(i), -1 - state, len(due) - n) for i in trie.order[trie.low[node] : trie.ends[node]]]
            node = trie.children[node].get(byte, -1)
            if node < 0:
                break
        tokens, codes = np.zeros(0, dtype=int), np.zeros(0, dtype=int)
        if node >= 0:
            tokens, codes = trie.order[trie.low[node] : trie.high[node]], self._table(state, node)
        more = np.array(early, dtype=int).reshape(-1, 3)
        dues = np.r_[np.zeros(len(tokens), dtype=int), more[:, 2]]
        return np.r_[tokens, more[:, 0]], np.r_[codes, more[:, 1]], dues

    def _table(self, state: int, node: int) -> NDArray[np.int64]:
        """Where every expert token below a node of the trie leads from a state of the reader."""
        if (known := self._tables.get((state, node))) is not None:
            return known
        trie = self._trie
        low = trie.low[node]
        codes = np.full(trie.high[node] - low, -1 - state)
        for byte, child in trie.children[node].items():
            code = self._reader.step(state, byte)
            below = slice(trie.low[child] - low, trie.high[child] - low)
            codes[below] = code if code >= 0 else self._table(-1 - code, child)
        if len(codes) > 32:
            self._tables[state, node] = codes
        return codes


class _Passes:
    """The expert's next-token distributions behind a prompt, which is run once."""

    def __init__(self, expert: LanguageModel, ids: list[int], first: NDArray | None = None) -> None:
        self.expert, self.ids, self.cache = expert, ids, None
        out = self._run([ids])
        self.first = self._read(out, [len(ids)])[0] if first is None else first
        if expert.keeps_cache:
            self.cache = out.past_key_values
            self.cache.batch_repeat_interleave(WIDTH)

    def __call__(self, paths: list[tuple[int, ...]]) -> NDArray[np.float64]:
        """Distributions `(len(paths), vocab)` after each path of tokens."""
        before = [] if self.cache else self.ids
        rows = [[*before, *path] for path in paths]
        most = max(map(len, rows))
        # The cache has a fixed number of rows; what stands behind a path's end is not seen from there.
        full = [row + [0] * (most - len(row)) for row in rows] + [[0] * most] * (WIDTH - len(rows))
        out = self._run(full)
        if self.cache:
            self.cache.crop(-most)
        return self._read(out, list(map(len, rows)))

    def _run(self, rows: list[list[int]]):
        with torch.inference_mode():
            ids = torch.tensor(rows, device=self.expert.device)
            return self.expert.backbone(input_ids=ids, past_key_values=self.cache, use_cache=self.expert.keeps_cache)

    def _read(self, out, lengths: list[int]) -> NDArray[np.float64]:
        last = out.last_hidden_state[range(len(lengths)), [n - 1 for n in lengths]].float()
        return self.expert.readout(last).double().softmax(-1).cpu().numpy()


class _Trie:
    """Expert tokens in the order of their bytes; a node is a range of them with a common beginning."""

    def __init__(self, pieces: Pieces) -> None:
        spoken = sorted((piece, i) for i, piece in enumerate(pieces) if piece)
        self.order = np.array([i for _, i in spoken], dtype=int)
        self.low, self.ends, self.high, self.children = [], [], [], []  #: `ends`: those up to it are the node itself
        words = [piece for piece, _ in spoken]

        def grow(low: int, high: int, depth: int) -> int:
            node, ends = len(self.low), low
            while ends < high and len(words[ends]) == depth:
                ends += 1
            self.low.append(low), self.ends.append(ends), self.high.append(high), self.children.append({})
            at = ends
            while at < high:
                byte = words[at][depth]
                beyond = bisect_right(words, byte, at, high, key=lambda word: word[depth])
                self.children[node][byte] = grow(at, beyond, depth + 1)
                at = beyond
            return node

        grow(0, len(words), 0)


class _Reader:
    """How a base's tokenizer reads a text that is still growing.

    A *state* is the text from the last settled place on and the base tokens that must come first; a *label* is the base
    token behind those, `vocab` if others come instead (crossing), `vocab + 1` if none does. A *code* is a label, or
    -1 - state while it is open.
    """

    def __init__(self, base: LanguageModel) -> None:
        tokenizer, self.size = base.tokenizer, base.vocab_size
        if not getattr(tokenizer, "is_fast", False):
            raise ChassisError(f"{base.name} has a slow tokenizer, whose rules cannot be read: use its fast version")
        self.pieces, self.end, self.name = _pieces(base), tokenizer.eos_token_id, base.name
        table = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self._whole = Tokenizer.from_str(json.dumps(table))
        changes = [r for r in _rules(table["normalizer"], "normalizers") if r["type"] != "Prepend"]
        splits, model = _rules(table["pre_tokenizer"], "pretokenizers"), table["model"]
        for rule in splits:
            rule |= {"prepend_scheme": "never"} if rule["type"] == "Metaspace" else {}
            rule |= {"add_prefix_space": False} if rule["type"] == "ByteLevel" else {}
        table["normalizer"] = {"type": "Sequence", "normalizers": changes} if changes else None
        table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splits} if splits else None
        table |= {"added_tokens": [], "post_processor": None}
        self.inner = Tokenizer.from_str(json.dumps(table))
        self._model = self.inner.model
        # Letters that are exchanged one for one: a text may be cut anywhere before or after.
        letter = [
            r["type"] == "Replace" and len(r["pattern"].get("String", "")) == len(r["content"]) == 1 for r in changes
        ]
        self._plain = all(letter)
        patterns = [str(r["pattern"].get("Regex", "")) for r in splits if r["type"] == "Split"]
        self._searches = bool(patterns) or any(r["type"] == "ByteLevel" and r["use_regex"] for r in splits)
        self._certain = not any(re.search(r"\(\?(?:[=<]|!(?!\\S\)))", pattern) for pattern in patterns)
        marks = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"))
        self._grows = self._plain and model["type"] in ("BPE", "Unigram") and not marks
        lone = model["vocab"] if self._grows else ()
        written = (
            [p for p, *_ in lone] if model["type"] == "Unigram" else model.get("merges", ()) if self._grows else ()
        )
        # Llama 3 writes a whole word that it has at once, whatever its merges say; beginnings are left to the merges.
        self._at_once = set(lone) if model.get("ignore_merges") else set()
        if self._at_once:
            self._model = Tokenizer.from_str(json.dumps(table | {"model": model | {"ignore_merges": False}})).model
        self._written = sorted({"".join(piece) for piece in written} | self._at_once)
        self._beginnings = {piece[:n] for piece in self._written for n in range(1, len(piece))}
        self._longest = max(map(len, self._written), default=1)
        byte_level = any(rule["type"] == "ByteLevel" for rule in splits)
        self._pairs = None if byte_level else {p[n : n + 2] for p in self._written for n in range(len(p) - 1)}
        self._letters = set().union(*self._written)
        self._known: dict[str, list[int]] = {}
        self._seen: dict[tuple[bytes, _Want], int] = {}
        self._follows: dict[str, NDArray[np.bool_]] = {}
        self._witnesses: dict[tuple[str, str], bool] = {}
        self._states: list[tuple[bytes, _Want]] = []
        self._likely: list[int] = []
        self.ends: list[int] = []  #: Label of a state, if the expert ends its text there

    @property
    def likely(self) -> NDArray[np.int64]:
        """Label of every state, if nothing that follows changed it."""
        return np.array(self._likely, dtype=int)

    def homes(self, pieces: Pieces, stage: str, length: int) -> dict[int, list[int]]:
        """Base tokens for every expert token by its bytes."""
        own, written = ids_of(self.pieces), self._write([p for p in pieces if p is not None])
        if stage == "B":
            pairs = _Splits({piece: ids[0] for piece, ids in own.items()})
        homes: dict[int, list[int]] = {}
        for i, piece in enumerate(pieces):
            if piece is None:
                continue
            ids, same = written.get(piece, []), own.get(piece, [])
            # Of several tokens with these bytes the tokenizer may write but one (`,`, never `<0x2C>`).
            homes[i] = ids if len(ids) == 1 and ids[0] in same else same
            if stage == "C" and ids:
                homes[i] = ids[:1] if len(ids) <= length else []
            if stage == "B" and not homes[i]:
                homes[i] = pairs.first(piece)
        return homes

    def _write(self, pieces: Sequence[bytes]) -> dict[bytes, list[int]]:
        """What is written for each of these in the middle of a text; nothing for a part of a character."""
        texts = {}
        for piece in pieces:
            with suppress(UnicodeDecodeError):
                texts[piece] = piece.decode()
        found = self.inner.encode_batch_fast(list(texts.values()), add_special_tokens=False)
        return {piece: one.ids for piece, one in zip(texts, found, strict=True)}

    def follows(self, prompt: str) -> NDArray[np.bool_]:
        """Whether each base token can stand behind the prompt's own, `(vocab,)`, as far as whole characters go."""
        raw, want = self._tail(prompt, 0)
        before = raw if self._searches or not want else self.pieces[want[-1]] or b""
        if before not in self._follows:
            can, ids = np.ones(self.size, dtype=bool), self._write([before]).get(before)
            several = self._write([before + piece for piece in self.pieces if piece is not None]) if ids else {}
            for i, piece in enumerate(self.pieces):
                together = several.get(before + (piece or b""), ()) if piece else ()
                can[i] = not together or (together[:-1] == ids and self.pieces[together[-1]] == piece)
            self._follows[before] = can
        return self._follows[before]

    def root(self, prompt: str, heal: int) -> int:
        """Code of a prompt whose last `heal` tokens are open again."""
        return self._code(*self._tail(prompt, heal))

    def step(self, state: int, byte: int) -> int:
        """Code of a state's text with one more byte."""
        raw, want = self._states[state]
        return self._code(raw + bytes([byte]), want)

    def _tail(self, prompt: str, heal: int) -> tuple[bytes, _Want]:
        """The prompt from its last settled place on, and its tokens from there less `heal`."""
        whole = self._whole.encode(prompt or "a", add_special_tokens=False).ids
        for lead in ("", " "):
            text, words = self._words(lead + (prompt or "a"))
            starts = [0, *(place for _, place in words)]
            start = self._open(text, words)[1]
            while len(ids := self._ids(text[start:])) < heal and start:
                start = max(place for place in starts if place < start)
            if whole[len(whole) - len(ids) :] == ids:
                if not prompt:
                    return self._words(lead)[0].encode(), ()
                return (text[start:] if self._plain else lead + prompt).encode(), tuple(ids[: max(0, len(ids) - heal)])
        raise ChassisError(f"{self.name}: its tokenizer ends {prompt[-20:]!r} by other rules than text: end it in text")

    def _code(self, raw: bytes, want: _Want) -> int:
        """Where a text leads: its label once no continuation can change it, else -1 - its state."""
        if (found := self._seen.get((raw, want))) is not None:
            return found
        text, late = _decoded(raw)
        text, words = self._words(text) if self._plain else (text, self._words(text)[1])
        closed, start, growing = self._open(text, words)
        label, left = self._match([i for word in closed for i in self._tokens(word)], want)
        if label is None and growing:
            label = self._settled(growing, left)
        if label is None:
            state = (text[start:].encode() + late, left) if self._plain else (raw, want)
            if state not in self._seen:
                self._seen[state] = -1 - len(self._states)
                self._states.append(state)
                rest = self._ids(state[0].decode("utf-8", "replace"))
                ends = [] if self.end is None else [self.end]
                for labels, ids in ((self._likely, rest), (self.ends, rest + ends)):
                    found = self._match(ids, state[1])[0]
                    labels.append(self.size + 1 if found is None else found)
            label = self._seen[state]
        self._seen[raw, want] = label
        return label

    def _match(self, ids: Sequence[int], want: _Want) -> tuple[int | None, _Want]:
        """Label of a text with these tokens, if there are enough of them, and what must still come."""
        n = min(len(ids), len(want))
        if tuple(ids[:n]) != want[:n]:
            return self.size, ()
        return (ids[n] if len(ids) > n else None), want[n:]

    def _settled(self, word: str, want: _Want) -> int | None:
        """Label of an unfinished word, if all its continuations have it; see `Bridge`."""
        label = self._match(self._tokens(word), want)[0]
        if label is None or (word in self._at_once):
            return None
        for n in range(max(0, len(word) - self._longest), len(word)):
            if word[n:] in self._beginnings and self._match(self._tokens(word[:n]), want)[0] != label:
                if self._continues(word[:n], word[n:]):
                    return None
        return label

    def _continues(self, left: str, right: str) -> bool:
        """Whether some token that is longer than `right` and begins with it can follow `left`."""
        if (left, right) not in self._witnesses:
            first = bisect_right(self._written, right)
            several = self._written[first : first + 200]
            longer = [piece for piece in several if piece.startswith(right)]
            known = self._tokens(left)
            self._witnesses[left, right] = len(longer) == 200 or any(
                (ids := self._tokens(left + piece))[:-1] == known and len(ids) == len(known) + 1 for piece in longer
            )
        return self._witnesses[left, right]

    def _open(self, text: str, words: list[tuple[str, int]]) -> tuple[list[str], int, str | None]:
        """Words that are settled, where the rest begins, and the word it is, if all that it can do is grow."""
        if not words or not self._certain:
            return [], 0, None
        if not self._searches:
            (word, start), cut = words[-1], 0
            if self._grows and self._pairs is not None:
                # No token holds these two letters side by side, so there is a boundary between them.
                ends = (n for n in range(len(word) - 1, 0, -1) if word[n - 1 : n + 1] not in self._pairs)
                cut = next((n for n in ends if {*word[n - 1 : n + 1]} <= self._letters), 0)
            closed = [one for one, _ in words[:-1]] + ([word[:cut]] if cut else [])
            return closed, start + cut, word[cut:] if self._grows else None
        edge = len(text.rstrip())
        calm = edge == len(text)
        if (mark := text.rfind("'", max(0, len(text) - 2))) >= 0:
            edge, calm = min(edge, mark - 1), False
        bounds = [start for _, start in words[1:]] + [len(text)]
        first = min(next((n for n, end in enumerate(bounds) if end > edge), len(words)), len(words) - 1)
        growing = words[-1][0] if self._grows and calm and first == len(words) - 1 else None
        return [one for one, _ in words[:first]], words[first][1], growing

    def _words(self, text: str) -> tuple[str, list[tuple[str, int]]]:
        """The normalized text; its words in the model's letters, each with the place where it begins."""
        normalizer, split = self.inner.normalizer, self.inner.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        if split is None:
            return text, [(text, 0)] if text else []
        return text, [(word, place[0]) for word, place in split.pre_tokenize_str(text)]

    def _tokens(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [token.id for token in self._model.tokenize(word)] if word else []
        return self._known[word]

    def _ids(self, text: str) -> list[int]:
        return [i for word, _ in self._words(text)[1] for i in self._tokens(word)]


class _Splits:
    """Words that two of a vocabulary spell: found by cutting the word, not by trying all pairs."""

    def __init__(self, ids: dict, limit: int | None = None) -> None:
        self.ids = {piece: i for piece, i in ids.items() if limit is None or i < limit}

    def first(self, word: bytes | str) -> list[int]:
        """Of the pairs that spell the word, the first that a search in the order of ids meets: its first token."""
        cuts = (self.ids[word[:n]] for n in range(1, len(word)) if word[:n] in self.ids and word[n:] in self.ids)
        return [best] if (best := min(cuts, default=None)) is not None else []


def _by_string(expert: list[str], base: list[str], pairs: bool) -> dict[int, list[int]]:
    """Stages A and B as the study had them; of equal strings the last id has them all."""
    ids = {text: i for i, text in enumerate(base)}
    homes = {i: [ids[text]] for i, text in enumerate(expert) if text in ids}
    if pairs:
        # The search tries every pair of ids, also of equal strings: of those the first is met.
        splits = _Splits({text: i for i, text in reversed([*enumerate(base[:4096])])})
        homes |= {i: splits.first(text) for i, text in enumerate(expert) if i not in homes and len(text) <= 10}
    return homes


def _strings(model: LanguageModel) -> list[str]:
    """Every token decoded alone."""
    return model.tokenizer.batch_decode([[i] for i in range(model.vocab_size)])


def _pieces(model: LanguageModel) -> Pieces:
    """Bytes of every row of the head."""
    pieces = token_bytes(model.tokenizer)[: model.vocab_size]
    return pieces + [None] * (model.vocab_size - len(pieces))


def _rules(table: dict | None, parts: str) -> list[dict]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if table is None:
        return []
    return [rule for one in table[parts] for rule in _rules(one, parts)] if table["type"] == "Sequence" else [table]


def _decoded(raw: bytes) -> tuple[str, bytes]:
    """Text, and bytes at its end that are the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(raw), decoder.getstate()[0]


def _checked(probabilities: torch.Tensor, size: int, prompts: list | None) -> NDArray[np.float64]:
    """Distributions as float64 that sum to one."""
    rows = torch.as_tensor(probabilities).detach().cpu().double().numpy()
    if rows.ndim != 2 or rows.shape[1] != size or (prompts is not None and len(rows) != len(prompts)):
        wanted = f"({'n' if prompts is None else len(prompts)}, {size})"
        raise ChassisError(f"the distributions have shape {rows.shape}: give {wanted}, no padded rows of the head")
    sums = rows.sum(1, keepdims=True)
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (abs(sums - 1) <= 1e-3).all()):
        worst = sums.flatten()[np.argmax(abs(sums - 1))] if len(sums) else 1.0
        raise ChassisError(f"a row is no distribution (sum {worst:.4g}): give probabilities, softmax of logits")
    return rows / sums
