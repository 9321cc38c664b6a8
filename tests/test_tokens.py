"""Token bytes of every family of tokenizers, against the texts they encode and their own `decode`."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf
from conftest import WORDS, refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral.tokenizer import MistralConverter

from chassis_utils import load, token_bytes
from chassis_utils.tokens import ids_of, offsets, text_bytes
from pocket_recipe import gpt2_tokenizer

TEXTS = [
    *WORDS,
    "Der Fluß fließt über Kiesel; naïve café, Привет, мир! 你好，世界。 🙂🙂",
    "don't  stop\n\tthe river. It's 12 + 13.",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HARD = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "  two  spaces  ",
    "\0\x01\x7f",
    "line\r\nline\n\n\tend\n",
    "🙂👩‍👩‍👧🇺🇳",
    "e\u0301\u0323 a\u030a",
    "שלום עולם مرحبا \u202eabc\u202c",
    "\u00a0\u2003\u3000\ufeff\ufffd\uffff",
    "12,345.67 don't . , ?",
]


def fast(backend: Tokenizer, **special: str) -> tf.PreTrainedTokenizerFast:
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def bundled(name: str) -> Callable[[], tf.PreTrainedTokenizerBase]:
    return lambda: load(name, device="cpu").tokenizer


def byte_level(prefix: bool = False) -> tf.PreTrainedTokenizerFast:
    """GPT-2's family, with or without a space put before the text."""
    tokenizer = gpt2_tokenizer(TEXTS, 400)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return tokenizer


def ranks() -> list[bytes]:
    """Bytes by rank, as tiktoken's files list them, of the byte-level vocabulary."""
    known = token_bytes(byte_level())
    return sorted((piece for piece in known if piece), key=lambda piece: (len(piece), piece))


def tiktoken(folder: Path) -> tf.PreTrainedTokenizerFast:
    """What `transformers` makes of a tiktoken file; the library that would read the file is not needed for that."""
    file = folder / "ranks.tiktoken"
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(ranks())]
    file.write_text("".join(lines))

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            pairs = (line.split() for line in Path(tiktoken_url).read_text().splitlines())
            return {base64.b64decode(piece): int(rank) for piece, rank in pairs}

    return fast(Converter(str(file), PATTERN, extra_special_tokens=["<|endoftext|>"]).converted())


def tekken(folder: Path) -> tf.PreTrainedTokenizerFast:
    """What `transformers` makes of Mistral's tekken file: special tokens first, a filler among them."""
    vocabulary = [{"rank": n, "token_bytes": base64.b64encode(piece).decode()} for n, piece in enumerate(ranks())]
    special = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]
    config = {"pattern": PATTERN, "default_vocab_size": 3 + len(vocabulary), "default_num_special_tokens": 3}
    file = folder / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special}))
    return fast(MistralConverter(str(file)).converted())


def learned(model: object, trainer: object, splitter: object) -> dict:
    learner = Tokenizer(model)
    learner.normalizer, learner.pre_tokenizer = normalizers.Replace(" ", "▁"), splitter
    learner.train_from_iterator((line for text in TEXTS for line in text.split("\n")), trainer)
    return json.loads(learner.to_str())["model"]


def sentencepiece(unigram: bool = False, llama: bool = False, fallback: bool = True) -> tf.PreTrainedTokenizerFast:
    """SentencePiece's family: a space put before every text (Llama's way) or where there is none (Metaspace's)."""
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never" if llama else "always")
    special = ["<unk>", "<s>", "</s>"] + BYTE_TOKENS * fallback
    if unigram:
        trainer = trainers.UnigramTrainer(
            vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
        pieces = [piece for piece in learned(models.Unigram(), trainer, spaces)["vocab"] if piece[0] != "<unk>"]
        scores = [(token, 0.0 if n < 3 else -20.0) for n, token in enumerate(special)]
        tokenizer = Tokenizer(models.Unigram([*scores, *map(tuple, pieces)], unk_id=0, byte_fallback=fallback))
    else:
        found = learned(
            models.BPE(), trainers.BpeTrainer(vocab_size=150, limit_alphabet=50, show_progress=False), spaces
        )
        vocabulary = {token: i for i, token in enumerate([*special, *sorted(found["vocab"], key=found["vocab"].get)])}
        merges = [tuple(pair) for pair in found["merges"]]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = spaces
    if llama:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = [*BYTE_DECODER, decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoder) if fallback else decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece(cleanup: bool = True) -> tf.PreTrainedTokenizerFast:
    """BERT's family: lower case, no accents, punctuation alone, `##` within a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return fast(tokenizer, **named)


def written(folder: Path, vocabulary: list[str], merges: str) -> tuple[str, str]:
    """The two files from which Python tokenizers are made."""
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text(merges)
    return str(folder / "vocab.json"), str(folder / "merges.txt")


#: Families that keep every byte of a text.
EXACT: dict[str, Callable] = {
    "pocket-base": bundled("pocket-base"),
    "pocket-phi": bundled("pocket-phi"),
    "byte-level": byte_level,
    "byte-level, space before": lambda: byte_level(prefix=True),
    "tiktoken": tiktoken,
    "tekken": tekken,
    "BPE, Metaspace": sentencepiece,
    "BPE, Llama": lambda: sentencepiece(llama=True),
    "Unigram, Metaspace": lambda: sentencepiece(unigram=True),
    "Unigram, Llama": lambda: sentencepiece(unigram=True, llama=True),
    "ByT5": tf.ByT5Tokenizer,
    "Perceiver": tf.PerceiverTokenizer,
}


@pytest.fixture(scope="module", params=EXACT)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    make = EXACT[request.param]
    tokenizer = make(tmp_path_factory.mktemp("files")) if make in (tiktoken, tekken) else make()
    return tokenizer, token_bytes(tokenizer)


def holds(tokenizer: tf.PreTrainedTokenizerBase, pieces: list[bytes | None], texts: list[str]) -> None:
    """The bytes of the ids are the text's, but for one space before it, and are what `decode` says."""
    if {"▁", "<0x0A>"} <= tokenizer.get_vocab().keys():  # SentencePiece itself cannot tell "▁" from a space.
        texts = [text.replace("▁", "") for text in texts]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        covered, wanted = text_bytes(pieces, ids), text.encode()
        assert covered in (wanted, b" " + wanted)
        ends = offsets(pieces, ids, text)
        assert len(ends) == len(ids) and (ends[1:] >= ends[:-1]).all() and (not text or ends[-1] == len(wanted))
        for start, end, i in zip([0, *ends], ends, ids, strict=False):
            assert pieces[i].endswith(wanted[start:end])
        said = tokenizer.decode(ids).encode()
        assert said in (covered, covered[1:]) and covered[: len(covered) - len(said)] in (b"", b" ")


def names_of_tokens(tokenizer: tf.PreTrainedTokenizerBase, pieces: list[bytes | None]) -> list[str]:
    """What a tokenizer reads as one of its own tokens where it is typed: those without text, and Unigram's bytes."""
    unigram = isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), models.Unigram)
    silent = tokenizer.convert_ids_to_tokens([i for i, piece in enumerate(pieces) if piece is None])
    return silent + BYTE_TOKENS * unigram


def test_every_plane(exact: tuple) -> None:
    """Both sides of every block boundary in all 17 planes (blocks begin at multiples of 16), in runs and alone."""
    scalars = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    edges = [chr(code) for code in scalars if code % 16 in (0, 15)]
    assert len({ord(edge) >> 16 for edge in edges}) == 17
    holds(*exact, ["".join(edges[n : n + 64]) for n in range(0, len(edges), 64)])
    holds(*exact, [chr(code) for code in scalars[::509]])


def test_hard_texts(exact: tuple) -> None:
    holds(*exact, HARD + TEXTS)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.text(" a\n.▂é🙂", max_size=12))
def test_any_text(exact: tuple, text: str) -> None:
    assume(not any(name in text for name in names_of_tokens(*exact)))
    holds(*exact, [text])


def test_a_token_named_in_a_text_is_refused(exact: tuple) -> None:
    tokenizer, pieces = exact
    for name in names_of_tokens(tokenizer, pieces):
        text = f"a {name}"
        with refused("not what its ids stand for"):
            offsets(pieces, tokenizer(text, add_special_tokens=False)["input_ids"], text)


def test_single_bytes(exact: tuple) -> None:
    """A token that is a part of a character keeps its byte, where `decode` can only say U+FFFD."""
    tokenizer, pieces = exact
    known = ids_of(pieces)
    assert all(bytes([byte]) in known for byte in range(256))
    for byte in range(128, 256):
        for i in known[bytes([byte])]:
            assert tokenizer.decode([i]) in ("\ufffd", "")


def test_length_and_special_tokens(exact: tuple) -> None:
    """One entry for each token; those that stand for no text have none."""
    tokenizer, pieces = exact
    assert len(pieces) == len(tokenizer)
    silent = {i for i, piece in enumerate(pieces) if piece is None}
    assert silent == set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    ids = tokenizer("a river")["input_ids"]
    assert text_bytes(pieces, ids).lstrip() == b"a river"


def test_offsets_at_the_beginning() -> None:
    """A space that the tokenizer put before the text is none of the text's; one that the text has is."""
    for tokenizer, bare, spaced in [
        (sentencepiece(llama=True), [0, 1], [0, 1, 2]),
        (sentencepiece(), [0, 1], [1, 2]),
        (byte_level(prefix=True), [0, 1], [1, 2]),
        (byte_level(), [1], [1, 2]),
    ]:
        pieces = token_bytes(tokenizer)
        for text, ends in [("\x02", bare), (" \x02", spaced)]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert offsets(pieces, ids, text).tolist() == ends
    tokenizer = sentencepiece(llama=True)  # Its first token begins every text and has no bytes.
    assert offsets(token_bytes(tokenizer), tokenizer("\x02")["input_ids"], "\x02").tolist() == [0, 0, 1]


@pytest.mark.parametrize("cleanup", [True, False])
def test_wordpiece(cleanup: bool) -> None:
    """The bytes are those of `decode`; case, accents and runs of spaces are lost as the normalizer loses them."""
    tokenizer = wordpiece(cleanup)
    pieces = token_bytes(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert pieces[vocabulary["river"]] == b" river" and pieces[vocabulary["##s"]] == b"s"
    assert pieces[vocabulary["."]] == (b"." if cleanup else b" .")
    assert {i for i, piece in enumerate(pieces) if piece is None} == {0, 1, 2, 3, 4}
    for text in [*TEXTS, *HARD, "Nine  TOWNS ríver"]:
        ids = tokenizer(text)["input_ids"]
        assert text_bytes(pieces, ids).decode().removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=True)
    text = "nine towns before the river"
    assert offsets(pieces, tokenizer(text)["input_ids"], text)[-1] == len(text)
    with refused("Nine  TOWNS", "not what its ids stand for"):
        offsets(pieces, tokenizer("Nine  TOWNS")["input_ids"], "Nine  TOWNS")


def test_words_marked_at_their_end(tmp_path: Path) -> None:
    """Python tokenizers with `@@` and fast ones with `</w>`: the space comes after the word."""
    merges = "#version\nh e\nl o</w>\n"
    python = tf.CTRLTokenizer(*written(tmp_path, ["<unk>", "he@@", "lo", "l@@", "a"], merges))
    assert token_bytes(python) == [None, b"he", b"lo ", b"l", b"a "]
    suffixed = Tokenizer(models.BPE({"he": 0, "lo</w>": 1}, [], end_of_word_suffix="</w>"))
    suffixed.decoder = decoders.BPEDecoder("</w>")
    pieces = token_bytes(fast(suffixed))
    assert pieces == [b"he", b"lo "]
    assert offsets(pieces, [0, 1, 0, 1], "helo helo").tolist() == [2, 5, 7, 9]


def test_added_tokens() -> None:
    """A plain added token has its text's bytes, whatever a decoder makes of its letters; a special one has none."""
    for make in (byte_level, sentencepiece, wordpiece, tf.ByT5Tokenizer):
        tokenizer = make()
        tokenizer.add_tokens(["<tool>", "café", AddedToken("<|turn|>", special=True)])
        pieces, vocabulary = token_bytes(tokenizer), tokenizer.get_vocab()
        assert pieces[vocabulary["<tool>"]] == b"<tool>" and pieces[vocabulary["<|turn|>"]] is None
        if "café" in tokenizer.added_tokens_encoder:
            assert pieces[vocabulary["café"]] == "café".encode()
        assert len(pieces) == len(tokenizer)
    tokenizer = byte_level()
    tokenizer.add_tokens(["café"])
    ids = tokenizer("un café noir")["input_ids"]
    assert vocabulary_id(tokenizer, "café") in ids
    assert text_bytes(token_bytes(tokenizer), ids) == "un café noir".encode()


def vocabulary_id(tokenizer: tf.PreTrainedTokenizerBase, token: str) -> int:
    return tokenizer.get_vocab()[token]


def test_added_token_of_the_vocabulary() -> None:
    """Gemma declares runs of "▁" as added tokens; they still are the spaces that the model means."""
    backend = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "▁▁": 2, "a": 3}, [("▁", "▁")], unk_token="<unk>"))
    backend.normalizer, backend.decoder = normalizers.Replace(" ", "▁"), decoders.Sequence([decoders.Replace("▁", " ")])
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    assert token_bytes(fast(backend)) == [None, b" ", b"  ", b"a"]


def test_equal_bytes() -> None:
    """Every id of the same bytes is listed: a byte token and its letter, an added token and a word."""
    tokenizer = sentencepiece()
    same = ids_of(token_bytes(tokenizer))[b"a"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in same] == ["<0x61>", "a"]
    tokenizer = byte_level()
    tokenizer.add_tokens([" the"])
    pieces = token_bytes(tokenizer)
    same = ids_of(pieces)[b" the"]
    assert {tokenizer.convert_ids_to_tokens(i) for i in same} == {"Ġthe", " the"}
    assert sorted(i for ids in ids_of(pieces).values() for i in ids) == [i for i, piece in enumerate(pieces) if piece]


def test_byte_tokens_only_where_the_decoder_knows_them() -> None:
    """In a vocabulary without byte fallback `<0x0A>` is six characters."""
    level = byte_level().backend_tokenizer
    table = json.loads(level.to_str())
    table["model"]["vocab"]["<0x0A>"] = len(table["model"]["vocab"])
    tokenizer = fast(Tokenizer.from_str(json.dumps(table)))
    assert token_bytes(tokenizer)[vocabulary_id(tokenizer, "<0x0A>")] == b"<0x0A>"
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("<0x0A>", -1.0), ("▁a", -1.0)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    assert token_bytes(fast(backend)) == [None, b"<0x0A>", b" a"]


def test_unknown_token_without_a_name() -> None:
    """A model's unknown token stands for no text even where `transformers` was not told of it."""
    for tokenizer in (sentencepiece(fallback=False), sentencepiece(unigram=True, fallback=False)):
        assert token_bytes(fast(tokenizer.backend_tokenizer))[0] is None
        ids = tokenizer("a 𐍈 b", add_special_tokens=False)["input_ids"]
        with refused("not what its ids stand for"):
            offsets(token_bytes(tokenizer), ids, "a 𐍈 b")


def test_gaps_and_empty_tokens() -> None:
    """Ids that no token has, and tokens without text, have no bytes; the index stays the id."""
    backend = Tokenizer(models.BPE({"a": 0, "Ġb": 5, "": 3}, []))
    backend.decoder = decoders.ByteLevel()
    assert token_bytes(fast(backend)) == [b"a", None, None, None, None, b" b"]


def test_padded_head() -> None:
    """Rows of a head beyond the tokenizer are beyond the list."""
    phi = load("pocket-phi", device="cpu")
    rows = phi.model.get_output_embeddings().weight.shape[0]
    assert len(token_bytes(phi.tokenizer)) == phi.vocab_size < rows


def test_bytes_that_cannot_be_recovered(tmp_path: Path) -> None:
    """A decoder that does more than join its tokens, or less, is refused in one line."""
    letters = {"a": 0, "b": 1, "ab": 2, "|": 3}
    backend = Tokenizer(models.BPE(letters, []))
    with refused("cannot be recovered", "no decoder"):
        token_bytes(fast(backend))
    backend.decoder = decoders.CTC(pad_token="b")
    with refused("cannot be recovered", "decode"):
        token_bytes(fast(backend))
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    with refused("does not undo"):
        token_bytes(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([*BYTE_DECODER, decoders.Replace("ϐ", "b")])
    with refused("says otherwise"):  # Only bytes write this letter, and it is among those tried.
        token_bytes(tokenizer)
    with refused("does not undo"):  # Its encode writes bytes, its decode reads letters.
        token_bytes(tf.DiaTokenizer())
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab</w>"]
    with refused("cannot be recovered"):  # Its `decode` differs from its backend's.
        token_bytes(tf.CLIPTokenizer(*written(tmp_path, vocabulary, "#version\na b</w>\n")))
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b"]
    with refused("Wav2Vec2CTCTokenizer"):
        token_bytes(tf.Wav2Vec2CTCTokenizer(written(tmp_path, vocabulary, "")[0]))


def test_offsets_of_another_text() -> None:
    tokenizer = byte_level()
    with refused("another", "not what its ids stand for"):
        offsets(token_bytes(tokenizer), tokenizer("a text")["input_ids"], "another")
    with refused("not what its ids stand for"):  # Half of a surrogate pair is no text in UTF-8.
        offsets(token_bytes(tokenizer), tokenizer("a")["input_ids"], "a\ud800")


def test_speed() -> None:
    """A vocabulary of 32,000 takes less than a second."""
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 31_700)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁", *BYTE_TOKENS, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(BYTE_DECODER)
    tokenizer = fast(backend)
    start = time.process_time()
    assert len(token_bytes(tokenizer)) == len(vocabulary)
    assert time.process_time() - start < 1
