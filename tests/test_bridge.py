"""Bridges against brute force: every text an expert can write, read by the base's own tokenizer as a whole."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import refused
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bridging import StringBridge
from chassis_utils import LanguageModel, load
from chassis_utils.bridge import CUTS, Bridge, Reader, spelled
from chassis_utils.tokens import token_bytes

KINDS = ("sentencepiece", "no pre-tokenizer", "byte-level", "unigram", "whole words", "wordpiece")
#: What a text is cut by: two expressions in use, and three that cut anew what stands before the end.
SPLITS: dict[str, str | Regex] = {
    "llama 3": Regex([*CUTS][1]),
    "o200k": Regex(next(one for one in CUTS if "Lu" in one)),
    "threes": Regex("[0-9][0-9][0-9]"),
    "unlike": Regex("ab:ba|[ab]+|[^ab]+"),
    "pair": "ab",
}
CHANGES = {"composed": normalizers.NFC(), "small letters": normalizers.Lowercase()}
BYTES = ("byte-level", *SPLITS, *CHANGES)
#: What is written with each of them.
LETTERS = {
    "llama 3": "aB1'ls \n",
    "o200k": "aB1'ls \n",
    "threes": "a12 ",
    "pair": "abc ",
    "unlike": "ab: ",
    "composed": "ae\u0301 ",
}
LETTERS |= {"small letters": "aAb ", "byte-level": "abé '\n"}
TRY = (Phase.explicit, Phase.reuse, Phase.generate)
QUIET = settings(max_examples=25, deadline=None, phases=TRY, suppress_health_check=list(HealthCheck))


def tokenizer(kind: str, seed: int, letters: str = "abé", merges: int = 14) -> tf.PreTrainedTokenizerFast:
    """A tokenizer with random merges, or random scores, over a few letters and the space; "é" may be two bytes."""
    rng = random.Random(seed)
    space = "Ġ" if kind in BYTES else "▁"
    letters += "".join({*LETTERS.get(kind, "")} - {*letters, *" '\ns\u0301"})
    alphabet = [*letters.replace("é", "Ã©" if kind in BYTES else "é"), space]
    alphabet += ["'", "s", "Ċ", *("¡Ìģ" if kind == "composed" else "")] if kind in BYTES else []
    vocab = {name: i for i, name in enumerate(["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    if kind == "sentencepiece":
        alphabet.remove("é")
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(alphabet)}
    pairs, pieces = [], list(alphabet)
    for _ in range(merges):
        pair = rng.choice(pieces), rng.choice(pieces)
        word = "".join(pair)
        if len(word) <= 6 and word not in vocab and (kind == "no pre-tokenizer" or space not in word[1:]):
            pairs.append(pair)
            pieces.append(word)
            vocab[word] = len(vocab)
    if kind == "unigram":
        scores = [(word, -6 * rng.random() if word in pieces else -20.0) for word in vocab]
        built = Tokenizer(models.Unigram(scores, unk_id=1, byte_fallback=True))
    elif kind == "wordpiece":
        names = ["</s>", "<unk>", *(mark + word for word in pieces if space not in word for mark in ("", "##"))]
        built = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    else:
        fallback = kind not in BYTES
        options = {"unk_token": "<unk>", "byte_fallback": fallback, "ignore_merges": kind == "whole words"}
        built = Tokenizer(models.BPE(vocab, pairs, **options))
    if kind in BYTES:
        built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if kind in SPLITS:
            last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(SPLITS[kind], "isolated"), last])
        built.normalizer = CHANGES.get(kind)
    elif kind == "wordpiece":
        built.pre_tokenizer, built.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    else:
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if kind != "no pre-tokenizer":
            built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        built.decoder = decoders.Sequence(steps)
    return tf.PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>", bos_token="</s>", unk_token="<unk>")


def model(own: tf.PreTrainedTokenizerFast, seed: int, end: float = 0.0, context: int = 64) -> LanguageModel:
    """A Phi of one layer with random weights, whose texts end the sooner the larger `end` is."""
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.PhiConfig(vocab_size=len(own) + 3, max_position_embeddings=context, **size)
    made = tf.AutoModelForCausalLM.from_config(config)
    for weight in made.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.6)
    spoken = [i for i, piece in enumerate(token_bytes(own)) if piece]
    # Only a few tokens are likely, so that all texts can be tried.
    with torch.no_grad():
        made.lm_head.bias.fill_(-60.0)
        made.lm_head.bias[random.Random(seed).sample(spoken[-20:], min(6, len(spoken)))] = 0.0
        made.lm_head.bias[own.eos_token_id] = end
    return LanguageModel(f"tiny {seed}", made, own)


def written(own: tf.PreTrainedTokenizerFast, text: str) -> list[int]:
    """What a tokenizer writes for a text."""
    return own(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("number", range(len(CUTS)))
@settings(QUIET, max_examples=60)
@example("中B", "c")
@example("'l", "l")
@given(*[st.text("aBsrlǅʰ中\u03011½'’ \n\r/!ſ", max_size=n) for n in (8, 4)])
def test_what_an_expression_has_cut_stays_cut_before_what_may_be_cut_anew(number: int, text: str, tail: str) -> None:
    expression, late = [*CUTS.items()][number]
    cut = pre_tokenizers.Split(Regex(expression), "isolated")
    edge = re.search(late, text, re.DOTALL).start()
    starts, longer = ([at[0] for _, at in cut.pre_tokenize_str(one)] for one in (text, text + tail))
    settled = [start for start in starts if start <= edge]
    assert [start for start in longer if start <= max(settled, default=0)] == settled or not text
    if edge == len(text):  # then the last word is read too, as one that grows at its end
        assert not [start for start in longer if max(settled, default=0) < start < len(text)]


def test_an_expression_that_is_not_known_settles_nothing_before_the_end() -> None:
    own = tokenizer("unlike", 0, merges=0)
    text = " ab"
    assert written(own, text + ":")[: len(written(own, text))] == written(own, text)
    reader = Reader(type("Named", (), {"tokenizer": own, "vocab_size": len(own), "name": "unlike"}))
    code = reader.root(" ", 0)
    for byte in b"ab:b":
        assert code < 0, "the cut before it can still change"
        code = reader.step(-1 - code, byte)


def place(ids: Sequence[int], want: Sequence[int], size: int) -> int | None:
    """The token at a place, or crossing if others stand before it; None if the text is too short to tell."""
    if list(ids[: len(want)]) != list(want)[: len(ids)]:
        return size
    return ids[len(want)] if len(ids) > len(want) else None


def brute(expert: LanguageModel, base: LanguageModel, prompt: str, heal: int, depth: int) -> tuple[np.ndarray, float]:
    """Every text of at most `depth` tokens: mass by place, and the mass of texts that do not end by then or hardly are.

    Both are shares of what says what was cut, which may be little: then even texts that hardly are count for something.
    """
    size, end = base.vocab_size, expert.tokenizer.eos_token_id
    pieces, want = token_bytes(expert.tokenizer), written(base.tokenizer, prompt)
    want = want[: max(0, len(want) - heal)]
    ids = written(expert.tokenizer, prompt) or [expert.tokenizer.bos_token_id]
    start = len(ids) - heal
    if start < 1:
        ids, start = ([] if ids[0] == end else [end]) + ids, 1
    cut = b"".join(pieces[i] or b"" for i in ids[start:])
    total, texts, least = np.zeros(size + 2), [((), 1.0, b"")], 0.0
    for _ in range(depth):
        if not texts:
            break
        rows = torch.tensor([[*ids[:start], *path] for path, *_ in texts])
        with torch.inference_mode():
            chances = expert.model(rows).logits[:, -1, : expert.vocab_size].double().softmax(-1).numpy()
        longer = []
        for (path, mass, text), row in zip(texts, chances, strict=True):
            least += mass * row[mass * row <= 1e-10].sum()
            for token in np.flatnonzero(mass * row > 1e-10).tolist():
                said, share = text + (pieces[token] or b""), mass * row[token]
                if not (said.startswith(cut) or cut.startswith(said)) or (
                    pieces[token] is None and len(text) < len(cut)
                ):
                    continue
                if token == end:
                    whole = written(base.tokenizer, prompt + said[len(cut) :].decode("utf-8", "replace"))
                    total[place([*whole, base.tokenizer.eos_token_id], want, size)] += share
                elif pieces[token] is None:
                    total[size + 1] += share
                else:
                    longer.append(((*path, token), share, said))
        texts = longer
    rest = sum(mass for _, mass, _ in texts)
    if heal:
        assume(total.sum() + rest > 1e-6)  # Else the expert hardly ever says what was cut.
    return total / (total.sum() + rest), (rest + least) / (total.sum() + rest)


@pytest.mark.parametrize("kind", [*KINDS, *SPLITS, *CHANGES])
@settings(QUIET, max_examples=8)
@given(st.integers(0, 10_000), st.data())
def test_what_is_decided_stays_so_whatever_follows(kind: str, seed: int, data: st.DataObject) -> None:
    letters = LETTERS.get(kind, "abé ")
    own = tokenizer(kind, seed)
    base = type("Named", (), {"tokenizer": own, "vocab_size": len(own), "name": kind})
    reader, heal = Reader(base), data.draw(st.integers(0, 2))
    prompt, more = (data.draw(st.text(letters, min_size=n, max_size=7)) for n in (1, 0))
    want = written(own, prompt)
    want, text = want[: max(0, len(want) - heal)], prompt.encode()
    code = reader.root(prompt, heal)
    for byte in more.encode():
        if code >= 0:
            break
        code, text = reader.step(-1 - code, byte), text + bytes([byte])
    beginning, rest = text.decode("utf-8", "ignore"), len(text.decode("utf-8", "ignore").encode()) < len(text)
    tails = [
        ((prompt + more)[len(beginning)] if rest else "") + "".join(t)
        for n in range(6 if kind == "sentencepiece" else 5)
        for t in itertools.product(letters, repeat=n)
    ]
    labels = {place(written(own, beginning + tail), want, len(own)) for tail in tails}
    if code >= 0:
        assert labels == {code}
    elif kind == "sentencepiece":
        assert None in labels or len(labels) > 1, "everything was known, and nothing was said"


@settings(QUIET, max_examples=15)
@given(st.sampled_from(KINDS[:5]), st.sampled_from(KINDS[:3]), st.integers(0, 10_000), st.data())
def test_exact_is_what_brute_force_finds_and_its_bound_holds(
    base: str, expert: str, seed: int, data: st.DataObject
) -> None:
    ends = data.draw(st.sampled_from([4.0, 6.0]))
    talker, port = model(tokenizer(expert, seed + 1), seed, ends), model(tokenizer(base, seed), seed)
    prompt, heal = data.draw(st.text("ab é", max_size=4)), data.draw(st.integers(0, 1))
    truth, open_ = brute(talker, port, prompt, heal, depth=5)
    large = Bridge(talker, port, budget=300, heal=heal)(None, [prompt])
    assert np.allclose(large.mass.sum(1), 1)
    assert abs(large.mass[0].numpy() - truth).max() <= 1e-6 + open_ + float(large.undecided[0])
    for budget in (0, 1, 3, 20):
        small = Bridge(talker, port, budget=budget, heal=heal)(None, [prompt])
        distance = abs(small.mass[0].numpy() - truth).sum() / 2
        assert distance <= float(small.undecided[0]) + open_ + 1e-6
        assert int(small.passes[0]) <= budget


@pytest.mark.parametrize(("base", "expert"), [*zip(KINDS, KINDS[3:] + KINDS[:3], strict=True)])
def test_exact_equals_brute_force_where_both_see_to_the_end(base: str, expert: str) -> None:
    tight = []
    for seed in range(6):
        talker, port = model(tokenizer(expert, seed + 1), seed, end=9.0), model(tokenizer(base, seed), seed)
        truth, open_ = brute(talker, port, "a b", 0, depth=4)
        found = Bridge(talker, port, budget=600)(None, ["a b"])
        if open_ + float(found.undecided[0]) < 1e-7 and truth.max() < 0.9999:  # else texts go on, or hardly begin
            tight.append(abs(found.mass[0].numpy() - truth).max())
        if len(tight) == 2:
            break
    assert len(tight) == 2 and max(tight) <= 1e-6


@pytest.fixture(scope="module")
def pocket() -> tuple[LanguageModel, LanguageModel]:
    """An expert and a base of different tokenizers."""
    return load("pocket-phi", device="cpu"), load("pocket-base", device="cpu")


PROMPTS = (
    "Question: A baker has 24",
    "She sells the rest at the mark",
    "Answer: 3 * 5 = ",
    "🙂🙂",
    "   ",
    "",
    "The tow",
)


def said(expert: LanguageModel, prompts: Sequence[str]) -> torch.Tensor:
    """What the expert's own forward pass gives behind each prompt."""
    ids = [written(expert.tokenizer, prompt) or [expert.tokenizer.bos_token_id] for prompt in prompts]
    with torch.inference_mode():
        logits = [expert.model(torch.tensor([one])).logits[0, -1, : expert.vocab_size] for one in ids]
    return torch.stack(logits).double().softmax(-1)


def test_a_and_b_by_string_are_the_search_of_the_study(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    expert, base = pocket
    words, own = ([m.tokenizer.decode([i]) for i in range(m.vocab_size)] for m in pocket)
    rows = said(expert, PROMPTS[:2])
    for stage in "AB":
        naive = torch.zeros(2, base.vocab_size).double()
        for row, out in zip(rows, naive, strict=True):
            for token in row.topk(256).indices.tolist():
                homes = [i for i, text in enumerate(own) if text == words[token]][-1:]
                if not homes and stage == "B" and len(words[token]) <= 10:
                    begin = [
                        (i, words[token][len(a) :])
                        for i, a in enumerate(own[:4096])
                        if a and words[token].startswith(a)
                    ]
                    homes = [i for i, rest in begin if rest in own[:4096]][:1]
                for home in homes:
                    out[home] += row[token]
        found = StringBridge(expert, base, stage)(rows)
        assert torch.allclose(found.probabilities, naive, atol=1e-12)
        assert torch.allclose(found.probabilities.sum(1) + found.unplaced, torch.ones(2).double())


def test_a_b_and_c_in_bytes_are_naive_loops(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    expert, base = pocket
    pieces, own = (token_bytes(m.tokenizer) for m in pocket)
    rows, end = said(expert, PROMPTS[:1])[0], expert.tokenizer.eos_token_id
    middle = written(base.tokenizer, "1")  # After a digit, a text is written as in the middle of a text.
    naive = {stage: torch.zeros(base.vocab_size).double() for stage in "ABC"}
    for token, piece in enumerate(pieces):
        same = [i for i, other in enumerate(own) if piece is not None and other == piece]
        text = (piece or b"").decode("utf-8", "ignore")
        whole = written(base.tokenizer, "1" + text)[len(middle) :] if piece == text.encode() else []
        same = whole if len(whole) == 1 and whole[0] in same else same
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece or b""))]
        pair = [own.index(a) for a, b in cuts if not same and a in own and b in own]
        homes = {
            "A": same,
            "B": same or sorted(pair)[:1],
            "C": (whole[:1] if len(whole) <= 3 else []) if whole else same,
        }
        for stage, ids in homes.items():
            for i in [base.tokenizer.eos_token_id] if token == end else ids:
                naive[stage][i] += rows[token] / (1 if token == end else len(ids))
    for stage, wanted in naive.items():
        found = Bridge(expert, base, stage, length=3)(rows[None])
        assert torch.allclose(found.probabilities[0], wanted, atol=1e-12), stage
        assert torch.allclose(found.mass.sum(1), torch.ones(1).double())


def test_c_and_exact_agree_on_what_melts_into_the_prompt(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    expert, base = pocket
    prompts = [p for p in PROMPTS if p]
    table = Bridge(expert, base, "C")(None, prompts)
    exact = Bridge(expert, base, budget=64)(None, prompts)
    assert ((table.crossing - exact.crossing).abs() <= exact.undecided + 1e-3).all()
    assert exact.crossing.max() > 0.01, "nothing melted, so nothing was tried"
    healed = Bridge(expert, base, budget=64, heal=4)(None, prompts)
    assert (healed.crossing <= healed.undecided + 1e-9).all()


def test_prompts_do_not_change_one_another(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    for stage in ("A", "C", "exact"):
        bridge = Bridge(*pocket, stage, budget=16)
        together = bridge(None, PROMPTS)
        alone = torch.cat([bridge(None, [prompt]).mass for prompt in reversed(PROMPTS)]).flip(0)
        assert torch.allclose(together.mass, alone, atol=1e-9)
        assert torch.allclose(Bridge(*pocket, stage, budget=16)(None, PROMPTS[::-1]).mass.flip(0), alone, atol=1e-9)
        assert torch.allclose(bridge(said(pocket[0], PROMPTS), PROMPTS).mass, together.mass, atol=1e-5)
        assert bridge(None, []).mass.shape == (0, pocket[1].vocab_size + 2)


def test_more_passes_decide_more(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    found = [Bridge(*pocket, budget=n)(None, PROMPTS[:3]) for n in (0, 8, 64)]
    bounds, masses = [one.undecided for one in found], [one.mass for one in found]
    assert (bounds[0] >= bounds[1]).all() and (bounds[1] >= bounds[2]).all()
    for bound, mass in zip(bounds, masses, strict=True):
        assert ((mass - masses[-1]).abs().sum(1) / 2 <= bound + bounds[-1] + 1e-9).all()


def test_duplicate_bytes_share_and_nothing_is_lost() -> None:
    own = tokenizer("sentencepiece", 3)
    twins = {piece: i for i, piece in enumerate(token_bytes(own)) if piece in (b"a", b"b")}
    pair = model(own, 1), model(tokenizer("byte-level", 4), 2)
    table = Bridge(*pair, "A").table
    assert np.allclose(table.sum(1), 1)
    other = token_bytes(pair[1].tokenizer)
    for piece, i in twins.items():
        assert [other[j] for j in table[i].indices] == [piece]
    # "<0x61>" and "a" of the other side are the same bytes; only "a" is ever written.
    back = Bridge(pair[1], pair[0], "A").table
    written_a = own.convert_tokens_to_ids("a")
    assert back[other.index(b"a")].indices.tolist() == [written_a]


def test_segmenting_is_a_thousand_times_faster_than_the_search(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    own = [pocket[1].tokenizer.decode([i]) for i in range(4096)]
    word, first = own[400] + own[2000], {}
    for i, text in enumerate(own):
        first.setdefault(text, i)
    start = time.perf_counter()
    searched = min(i for i, a in enumerate(own[:401]) for b in own if a + b == word)
    slow = (time.perf_counter() - start) * len(own) / 401
    start = time.perf_counter()
    for _ in range(100):
        spelled(word, first)
    assert slow > 1000 * (time.perf_counter() - start) / 100
    assert spelled(word, first) == [searched]


def test_bad_input_is_refused_in_one_line(pocket: tuple[LanguageModel, LanguageModel]) -> None:
    expert, base = pocket
    with refused("D", "A, B, C, exact"):
        Bridge(expert, base, "D")
    with refused("no strings in stage C"):
        StringBridge(expert, base, "C")
    with refused("budget -1"):
        Bridge(expert, base, budget=-1)
    bridge = Bridge(expert, base, "A")
    rows = said(expert, PROMPTS[:2])
    with refused("sum 0.5", "softmax"):
        bridge(rows * 0.5)
    with refused("no distribution"):
        bridge(rows * float("nan"))
    assert torch.allclose(bridge(rows * 1.0005).mass, bridge(rows).mass)
    with refused("shape", str(expert.vocab_size)):
        bridge(rows[:, :-1])
    with refused("shape", "(1, "):
        bridge(rows, ["one"])
    with refused("prompts"):
        bridge()
    with refused("list of strings"):
        Bridge(expert, base)(None, "one string")
    with refused("prompt 1", "512", "shorten"):
        Bridge(expert, base)(None, ["fine", "word " * 600])
    for stage in ("C", "exact"):
        spaces = [" " * 562]  # 70 tokens of the expert's
        with refused("prompt 0", "512", base.name, "shorten"):
            Bridge(expert, base, stage)(None, spaces)
    with refused("prompt 0", "surrogate"):
        Bridge(expert, base)(None, ["a\udce2"])
    with refused("heal"):
        Bridge(expert, base, heal=1)(rows, PROMPTS[:2])
    with refused("share no token"):
        Bridge(expert, model(tokenizer("wordpiece", 0, letters="ఇఈ"), 0), "A")
    with refused("special or added token"):
        Bridge(expert, base)(None, ["</s>"])
