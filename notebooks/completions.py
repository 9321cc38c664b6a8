"""Experts behind an API: a server tells the likeliest next tokens of a prompt, and nothing of their tokenizer."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
import numpy as np
import tenacity
from tqdm.auto import tqdm

from chassis_utils import Bridged, ChassisError, LanguageModel
from chassis_utils.bridge import Reader
from locks import locked

Said = dict[bytes | None, float]  #: Likeliest next tokens and their probabilities; `None` is the end of the text
_HINTS = {200: "that has no JSON, no logprobs, or no tokens that decode", 401: "set the right one", 403: "set another"}
_HINTS |= {400: "shorten the prompt, or ask for fewer logprobs", 404: "check model and base_url"}


def placed(base: LanguageModel, rows: Sequence[Said], prompts: Sequence[str] | None = None, length: int = 4) -> Bridged:
    """What was said behind n prompts in a base's tokens, by stage C of `Bridge`; what was not said is unplaced."""
    reader, pieces = Reader(base), [*dict.fromkeys([None, *(piece for row in rows for piece in row)])]
    homes = dict(zip(pieces, reader.homes(pieces, 0, "C", length), strict=True))
    mass = np.zeros((len(rows), base.vocab_size + 2))
    for i, piece, p in ((i, *one) for i, row in enumerate(rows) for one in row.items()):
        for home in homes[piece]:
            mass[i, home] += p / len(homes[piece])
    return reader.told(mass, prompts)


@dataclass(frozen=True)
class ApiExpert:
    r"""A model behind an OpenAI-compatible completions endpoint, asked for the likeliest tokens behind a prompt.

    They are taken for the bytes that the server says: its `bytes` where there are any, else its text, `bytes:\xe2` for
    part of a character. U+FFFD cannot be read and is left out; a space that the server drops ("▁the") is not noticed.
    """

    base_url: str  #: Such as `http://127.0.0.1:8000/v1`
    model: str  #: Its name there
    key_from: str = "OPENAI_API_KEY"  #: Environment variable of the key, which is sent if it is set, and never kept
    logprobs: int = 20  #: Likeliest tokens to ask for
    timeout: float = 60.0  #: Seconds of silence after which a request is tried again
    patience: float = 300.0  #: Seconds after which a prompt is given up
    cache: str | Path | None = None  #: JSONL file of answers: a later call asks only what is missing
    ends: tuple[str, ...] = ("<|endoftext|>", "</s>", "<|end_of_text|>")  #: Tokens that end a text

    def bridged(self, base: LanguageModel, prompts: Sequence[str], progress: bool = True) -> Bridged:
        """Its distributions in a base's vocabulary, see `placed`; errors are those of a call."""
        return placed(base, self(prompts, progress), prompts)

    def __call__(self, prompts: Sequence[str], progress: bool = True) -> list[Said]:
        """What it says behind each of n prompts, equal ones asked once; warns of fewer tokens than asked for.

        ChassisError: no list of texts, an empty one, an address with a password or none, a key that no header holds; a
        server that gives no answer in time, refuses, or answers with no probabilities.
        """
        odd = [i for i, x in enumerate(prompts) if not isinstance(x, str) or not re.fullmatch("[^\ud800-\udfff]+", x)]
        if odd or isinstance(prompts, str):
            raise ChassisError(f"prompt {odd[0] if odd else 0} is empty or no text: give a list of texts")
        key, address = os.environ.get(self.key_from, ""), r"https?://[^\s/?#@]+(/[^\s?#@]*)?"
        if not re.fullmatch(address, self.base_url) or not re.fullmatch("[!-~]*", key):
            raise ChassisError(f"give http(s)://host/path, no password, and in {self.key_from} a key of plain letters")
        names = [sha256(repr((self.model, self.logprobs, self.ends, one)).encode()).hexdigest() for one in prompts]
        path, headers = self.cache and Path(self.cache), {"Authorization": f"Bearer {key}"} if key else {}
        lock = locked(path, f"{path} is in use: wait for the other process") if path else nullcontext()
        with lock as file, httpx.Client(base_url=self.base_url, headers=headers, timeout=self.timeout) as client:
            said = _kept(path) if path else {}
            todo = {name: i for i, name in enumerate(names) if name not in said}
            for name, i in tqdm(todo.items(), self.model, disable=not progress, leave=False):
                said[name] = self._ask(client, key, prompts[i], f"prompt {i}, {self.model} at {self.base_url}")
                row = json.dumps({name: [(piece and piece.hex(), p) for piece, p in said[name].items()]})
                if path:  # The break comes first, as an earlier process may have left a line half-written.
                    os.write(file, f"\n{row}".encode())
        if (fewest := min((len(said[name]) for name in names), default=self.logprobs)) < self.logprobs:
            warnings.warn(f"{self.model} gave only {fewest} tokens that can be read of {self.logprobs}", stacklevel=2)
        return [said[name] for name in names]

    def _ask(self, client: httpx.Client, key: str, prompt: str, where: str) -> Said:
        """The answer to one prompt, tried until it comes or patience ends."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": self.logprobs}
        passing = tenacity.retry_if_exception_type(httpx.TransportError)
        passing |= tenacity.retry_if_result(lambda answer: answer.status_code == 429 or answer.status_code >= 500)
        limits, found = {"stop": tenacity.stop_before_delay(self.patience), "wait": _wait, "retry": passing}, {}
        tries = tenacity.Retrying(**limits, retry_error_callback=lambda state: state.outcome.result())
        try:
            answer = tries(client.post, "completions", json=body)
            status, text = answer.status_code, answer.text
        except httpx.HTTPError as error:
            status, text = type(error).__name__, f"{error}"
        if status != 200 or not (found := _read(text, self.ends)):
            # What a server says of a key may show part of it.
            text = f"for the key in {self.key_from}" if status in (401, 403) else text.replace(key or "\0", "***")
            hint = _HINTS.get(status, f"no other answer for {self.patience:g} s, try again when it is up")
            raise ChassisError(f"{where}: {status} {' '.join(text.split())[:150]}: {hint}")
        if not (whole := math.fsum(found.values())) <= 1 + 1e-3:
            raise ChassisError(f"{where}: probabilities sum to {whole:.4g}: it gave no logprobs of one token")
        return {piece: p / max(1.0, whole) for piece, p in found.items()}


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds to the next try: they double, and are never fewer than the server asks for."""
    asked = "" if state.outcome.failed else state.outcome.result().headers.get("Retry-After", "")
    return max(tenacity.wait_exponential(0.25, max=30)(state), float(asked) if asked.isdecimal() else 0.0)


def _kept(path: Path) -> dict[str, Said]:
    """Answers in a cache; a line that is half-written is left out."""
    found = {}
    for line in path.read_bytes().splitlines():
        with suppress(AttributeError, TypeError, ValueError):
            several = json.loads(line).items()
            found |= {name: {piece and bytes.fromhex(piece): p for piece, p in said} for name, said in several}
    return found


def _read(text: str, ends: Sequence[str]) -> Said:
    """Tokens of an answer that can be read; none if it is no completion with logprobs."""
    found: Said = {}
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        told = json.loads(text)["choices"][0]["logprobs"]
        several = [{"token": t, "logprob": x} for t, x in ((told.get("top_logprobs") or [{}])[0]).items()]
        for one in several or told["content"][0]["top_logprobs"]:
            token, raw = one["token"], one.get("bytes")
            if raw is None and re.match(r"bytes:.*\\x", token):
                raw = token[6:].encode("latin-1").decode("unicode_escape").encode("latin-1")
            elif raw is None and not re.search("[\ud800-\udfff\ufffd]", token):
                raw = token.encode()
            if (piece := None if token in ends else bytes(raw or ())) != b"":
                found[piece] = found.get(piece, 0.0) + math.exp(min(one["logprob"], 1.0))
        return found
    return {}
