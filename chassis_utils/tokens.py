"""The bytes that each token id stands for: the one alphabet in which any two tokenizers can be compared.

What a vocabulary's strings mean is asked of the tokenizer's own decoder, not guessed from the names of classes, so that
fast and Python tokenizers, SentencePiece, byte-level BPE, tiktoken and WordPiece take one path, and every answer is
checked against `decode` before it is given.
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
_Decode = Callable[[list[str]], str]

_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SHIFTED = iter(range(256, 324))
#: Ways to write one byte as a token. ByT5: the Latin-1 character. GPT-2 and tiktoken: printable Latin-1 as itself, the
#: other 68 bytes as U+0100 onwards. SentencePiece's byte fallback: `<0x0A>`.
_RAW = {chr(byte): byte for byte in range(256)}
_LEVEL = {chr(byte if byte in _PRINTABLE else next(_SHIFTED)): byte for byte in range(256)}
_FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}
#: Code points so close together that their UTF-8 has every byte that valid UTF-8 can have.
_EVERY_BYTE = "".join(chr(code) for code in range(0, 0x110000, 61) if not 0xD800 <= code < 0xE000)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The bytes each id adds in the *middle* of a text; `None` where an id stands for no text.

    - Byte-level BPE (GPT-2, tiktoken, tekken) and byte tokenizers: the token's bytes, also where they are not UTF-8.
    - SentencePiece (BPE or Unigram): "▁" is a space, `<0x0A>` one byte if the decoder falls back to bytes.
    - WordPiece: `##x` is `x`; any other token is a space and its text, less the spaces that its decoder cleans away
      (" ." is "."). Case, accents and runs of spaces that the normalizer dropped are lost.
    - Words marked at their end (`</w>`, `@@`): the space comes after the word.
    - Special tokens, the model's unknown token, empty tokens and gaps: `None`. An added token that is no special token:
      its text. Spaces that such a token swallows beside it (`lstrip`, `rstrip`) are lost.

    Returns:
        One entry an id, `len(tokenizer)` of them, more if ids have gaps. Rows of a head beyond it stand for no token.

    Raises:
        ChassisError: what the decoder makes of the tokens is not a sequence of bytes, or `decode` says otherwise.
    """
    try:
        return _pieces(tokenizer)
    except Exception as error:  # A Python tokenizer's own code may raise anything.
        why = " ".join(str(error).split())[:120] or type(error).__name__
        name = str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        raise ChassisError(f"{name}: the bytes of its tokens cannot be recovered ({why}): use its fast version") from error


def text_bytes(pieces: Pieces, ids: Sequence[int]) -> bytes:
    """The bytes of `ids` in the middle of a text; at its beginning a tokenizer may have put a space: see `offsets`."""
    return b"".join([pieces[i] or b"" for i in ids])


def offsets(pieces: Pieces, ids: Sequence[int], text: str) -> NDArray[np.int64]:
    """Byte of `text` at which each of its `ids` ends `(n,)`.

    The space that many tokenizers put before a text ("▁a" for "a") or after it (`a</w>`) is no part of the text: a
    token that is nothing else ends where the text begins. Which texts get one is read off the text: Llama prepends to
    every text, Metaspace and GPT-2's `add_prefix_space` only where there is none.

    Raises:
        ChassisError: the bytes of `ids` are not the text's: it was normalized, cut, or holds unknown or special tokens.
    """
    covered, wanted = text_bytes(pieces, ids), text.encode()
    if covered not in (wanted, b" " + wanted, wanted + b" "):
        raise ChassisError(f"{text[:40]!r} is not what its ids stand for: give the text that the tokenizer's decode gives")
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
    """`token_bytes`, errors of any kind."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model, decode = {}, tokenizer.convert_tokens_to_string
        own = {token: i for token, i in vocabulary.items() if i not in added}
    elif backend.decoder is None:
        raise ChassisError("it has no decoder")
    else:
        model, decode = json.loads(backend.to_str())["model"], backend.decoder.decode
        own = backend.get_vocab(with_added_tokens=False)
    silent = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    silent |= {model.get("unk_id"), own.get(model.get("unk_token"))}
    alphabet = next((a for a in (_RAW, _LEVEL, _FALLBACK) if _writes_bytes(decode, a)), {})
    if model.get("byte_fallback") and alphabet is not _FALLBACK and not own.keys().isdisjoint(_FALLBACK):
        raise ChassisError("its decoder does not undo its byte fallback")

    spoken = {token: i for token, i in own.items() if i not in silent}
    if alphabet is _RAW or alphabet is _LEVEL:
        known, checked = {i: _spelled(token, alphabet) for token, i in spoken.items()}, [*spoken.values()]
    else:
        known = {i: bytes([alphabet[token]]) for token, i in spoken.items() if token in alphabet}
        words = [token for token in spoken if token not in alphabet]
        checked = [spoken[token] for token in words]
        known |= zip(checked, map(str.encode, _texts(words, decode)), strict=True)
    # What a decoder makes of an added token is not asked: GPT-2's reads the letters of "café" as bytes, which the
    # encoder, to which they are text, does not.
    known |= {i: token.content.encode() for i, token in added.items() if token.content not in own and i not in silent}
    pieces = [known.get(i) or None for i in range(max(len(tokenizer), 1 + max(vocabulary.values())))]
    _check(tokenizer, pieces, checked, [spoken.get(written) for written in alphabet])
    return pieces


def _writes_bytes(decode: _Decode, alphabet: dict[str, int]) -> bool:
    """Whether the decoder reads tokens as bytes in this alphabet; the second byte of "í" is printed by none."""
    written = [*alphabet]
    return decode([written[byte] for byte in "í".encode()]) == "í"


def _spelled(token: str, alphabet: dict[str, int]) -> bytes:
    """A token's bytes; a token with any character outside the alphabet stands for its own text."""
    try:
        return bytes(map(alphabet.__getitem__, token))
    except KeyError:
        return token.encode()


def _texts(tokens: list[str], decode: _Decode) -> list[str]:
    """What the decoder writes for each token between two marks that no token contains."""
    used = set().union(*tokens)
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    gap = decode([mark, mark]).strip(mark)
    texts = decode([mark] + [part for token in tokens for part in (token, mark)]).split(mark)[1:-1]
    # A decoder that sets words apart does so before the next word (WordPiece) or after the last ("@@").
    if all(text.endswith(gap) for text in texts):
        return [text[: len(text) - len(gap)] for text in texts]
    if all(text.startswith(gap) for text in texts):
        return [text[len(gap) :] for text in texts]
    raise ChassisError("its decoder sets tokens apart in no way known")


def _check(tokenizer: PreTrainedTokenizerBase, pieces: Pieces, ids: list[int], units: list[int | None]) -> None:
    """Compare with `decode`: all `ids` in random order, each twice in a row, and all of UTF-8 where `units` has it."""

    def agree(ids: list[int]) -> bool:
        said = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
        return any(said == text_bytes(pieces, ids).decode("utf-8", e).strip() for e in ("replace", "ignore"))

    order = random.Random(0).sample(ids, len(ids))
    # A decoder treats the first token in its own way (WordPiece leaves "##" there), so one that it leaves alone leads.
    first = next(([i] for i in order if agree([i])), [])
    everything = [units[byte] for byte in _EVERY_BYTE.encode()] if units and None not in units else []
    if not agree(first + [i for i in order for _ in range(2)] + first) or not agree(everything):
        raise ChassisError("its decode says otherwise")
