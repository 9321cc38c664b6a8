"""The bytes that each token id stands for: the one alphabet in which any two tokenizers can be compared.

What a vocabulary's strings mean is asked of the tokenizer's own decoder, not told by names of classes, so that fast and
Python tokenizers of every family take one path, and the answer is checked against `decode` before it is given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .errors import ChassisError

Pieces = list[bytes | None]
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SHIFTED = iter(range(256, 324))
#: Ways to write one byte as a token. ByT5: the Latin-1 character. GPT-2 and tiktoken: printable Latin-1 as itself, the
#: other 68 bytes as U+0100 onwards. SentencePiece's byte fallback: `<0x0A>`.
_RAW = {chr(byte): byte for byte in range(256)}
_LEVEL = {chr(byte if byte in _PRINTABLE else next(_SHIFTED)): byte for byte in range(256)}
_FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}
#: Code points so close together that their UTF-8 has every byte that valid UTF-8 can have.
_EVERY_BYTE = "".join(chr(code) for code in range(0, 0x110000, 61) if not 0xD800 <= code < 0xE000).encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The bytes each id adds in the *middle* of a text; `None` where an id stands for no text.

    - Byte-level BPE (GPT-2, tiktoken, tekken) and byte tokenizers: the token's bytes, UTF-8 or not.
    - SentencePiece (BPE or Unigram): "▁" is a space, `<0x0A>` one byte if the decoder falls back to bytes.
    - WordPiece: `##x` is `x`; any other token is a space and its text, less the spaces that its decoder cleans away
      (" ." is "."). Case, accents and runs of spaces that the normalizer dropped are lost.
    - Words marked at their end (`</w>`, `@@`): the space comes after the word.
    - Special tokens, the model's unknown token, empty tokens and gaps: `None`. Any other added token: its own text;
      spaces that it swallows beside it (`lstrip`, `rstrip`) are lost.

    There are `len(tokenizer)` entries, more if ids have gaps. Rows of a head beyond them stand for no token.
    ChassisError: what the decoder makes of the tokens is not a sequence of bytes, or `decode` says otherwise.
    """
    try:
        return _pieces(tokenizer)
    except Exception as error:  # A Python tokenizer's own code may raise anything.
        name, why = tokenizer.name_or_path or type(tokenizer).__name__, " ".join(str(error).split())[:120]
        how = "take a tokenizer whose decode joins the texts of its tokens"
        raise ChassisError(f"{name}: the bytes of its tokens cannot be recovered ({why}): {how}") from error


def text_bytes(pieces: Pieces, ids: Sequence[int]) -> bytes:
    """The bytes of `ids` in the middle of a text; at its beginning a tokenizer may have put a space: see `offsets`."""
    return b"".join([pieces[i] or b"" for i in ids])


def offsets(pieces: Pieces, ids: Sequence[int], text: str) -> NDArray[np.int64]:
    """Byte of `text` at which each of its `ids` ends `(n,)`.

    The space that many tokenizers put before a text ("▁a" for "a") or after it (`a</w>`) is no part of the text. Which
    texts get one is read off the text: Llama's get one always, Metaspace's and `add_prefix_space`'s only if they have
    none. A token that is only this space ends at 0. ChassisError: the bytes of `ids` are not the text's: it was
    normalized, cut, or holds unknown or special tokens.
    """
    covered, wanted = text_bytes(pieces, ids), text.encode(errors="surrogatepass")
    if covered not in (wanted, b" " + wanted, wanted + b" "):
        raise ChassisError(f"{text[:40]!r} is not what its ids stand for: give the text as its tokenizer decodes it")
    ends = np.cumsum([len(pieces[i] or b"") for i in ids], dtype=np.int64)
    return np.clip(ends - (covered == b" " + wanted), 0, len(wanted))


def ids_of(pieces: Pieces) -> dict[bytes, list[int]]:
    """Bytes -> every id that stands for them, ascending: several may (`<0x61>` and `a`, an added token and a word)."""
    found: dict[bytes, list[int]] = {}
    for i, piece in enumerate(pieces):
        if piece is not None:
            found.setdefault(piece, []).append(i)
    return found


def _pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """`token_bytes`, with errors of any kind."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        model, decode = {}, tokenizer.convert_tokens_to_string
        own = {token: i for token, i in vocabulary.items() if i not in added}
    elif backend.decoder is None:
        raise ChassisError("it has no decoder")
    else:
        model, decode = json.loads(backend.to_str())["model"], backend.decoder.decode
        own = backend.get_vocab(with_added_tokens=False)
    silent = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    silent |= {model.get("unk_id"), own.get(model.get("unk_token"))}
    spoken = {token: i for token, i in own.items() if i not in silent}
    # The second byte of "í" is written differently in each alphabet.
    readings = ((a, decode([[*a][byte] for byte in "í".encode()])) for a in (_RAW, _LEVEL, _FALLBACK))
    alphabet = next((a for a, said in readings if said == "í"), {})
    whole = alphabet is _FALLBACK  # Its bytes are tokens, those of the other alphabets characters of tokens.
    spelled = {t: [t] if whole else t for t in spoken if alphabet.keys() >= ({t} if whole else {*t})}
    known = {spoken[token]: bytes(map(alphabet.__getitem__, units)) for token, units in spelled.items()}
    if words := [token for token in spoken if token not in spelled]:
        known |= {spoken[token]: text.encode() for token, text in zip(words, _texts(words, decode), strict=True)}
    # What a decoder makes of an added token is not asked: GPT-2's reads the letters of "café" as bytes, which the
    # encoder, to which they are text, does not.
    known |= {i: token.content.encode() for i, token in added.items() if token.content not in own and i not in silent}
    pieces = [known.get(i) or None for i in range(max(len(tokenizer), 1 + max(vocabulary.values())))]
    # A decoder replaces every byte of a run that is not UTF-8, so byte tokens are checked in runs that are.
    _check(tokenizer, pieces, [spoken[t] for t in (words if whole else spoken)], [spoken.get(u) for u in alphabet])
    return pieces


def _texts(tokens: list[str], decode: Callable[[list[str]], str]) -> list[str]:
    """What the decoder writes for each token between two marks that no token contains."""
    used = set().union(*tokens)
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    gap = decode([mark, mark]).strip(mark)
    texts = decode([mark] + [part for token in tokens for part in (token, mark)]).split(mark)[1:-1]
    # A decoder that sets words apart does so before the next word (WordPiece) or after the last one ("@@").
    cut = str.removesuffix if all(text.endswith(gap) for text in texts) else str.removeprefix
    return [cut(text, gap) for text in texts]


def _check(tokenizer: PreTrainedTokenizerBase, pieces: Pieces, ids: list[int], units: list[int | None]) -> None:
    """Compare with `decode`: all `ids` in random order, each twice in a row, and all of UTF-8 where `units` has it."""

    def agree(ids: list[int]) -> bool:
        said = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
        return any(said == text_bytes(pieces, ids).decode("utf-8", e).strip() for e in ("replace", "ignore"))
    order = random.Random(0).sample(ids, len(ids))
    # Decoders treat the first and the last token in ways of their own: one that is left alone goes there.
    end = next(([i] for i in order if agree([i])), [])
    everything = [units[byte] for byte in _EVERY_BYTE] if units and None not in units else []
    if not agree(end + [i for i in order for _ in range(2)] + end) or not agree(everything):
        raise ChassisError("its decode says otherwise")
    rare = tokenizer.encode("𐍈", add_special_tokens=False)
    if None not in [pieces[i] for i in rare] and text_bytes(pieces, rare).strip() not in (b"", "𐍈".encode()):
        raise ChassisError("its decode does not undo its encode")
