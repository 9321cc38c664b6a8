"""Prompts to run both models on: the study's templates, unseen templates, passages of real text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .errors import ChassisError
from .models import LanguageModel
from .records import SPLITS

TEXTS = Path(__file__).parent / "texts"

#: First number of each split of the numbered templates (the study's own).
STARTS = {"train": 0, "val": 5000, "test": 8000}

#: name -> templates, used in turn: prompt number i takes template i % len.
TEMPLATES: dict[str, tuple[Callable[[int], str], ...]] = {
    "mixed": (
        lambda i: f"What is {i} + {i + 1}?",
        lambda i: f"Explain entropy in one sentence. #{i}",
        lambda i: f"In physics, force equals mass times acceleration. Comment #{i}.",
    ),
    "math": (lambda i: f"What is {i} + {i + 3}?",),
    "physics": (lambda i: f"In physics, force equals mass times acceleration. Comment #{i}.",),
    "reasoning": (
        lambda i: f"Explain step by step how to solve {i} + {i + 7}.",
        lambda i: f"Why is the sky blue? Give a detailed reasoning. #{i}",
        lambda i: f"In physics, derive F = m a with a simple example. #{i}",
    ),
    "unseen": (
        lambda i: f"Describe the town that stands {i} miles from the sea.",
        lambda i: f"Who wrote the {i}th letter to the council, and why?",
        lambda i: f"A farmer sells {i} apples on Monday. How many",
        lambda i: f"The committee met on day {i} of the session and",
    ),
    "numerals": (
        lambda i: f"{i} {i + 2} {i + 4} {i + 6}",
        lambda i: f"On {i % 28 + 1}/{i % 12 + 1}/{i} at {i % 24:02}:{i % 60:02}, no. {i}",
    ),
    "languages": (
        lambda i: f"Der Zug Nummer {i} fährt heute über die Brücke nach",
        lambda i: f"¿Cuántas páginas tiene el libro número {i}? 📚🙂",
        lambda i: f"第{i}頁：今天天氣很好 ☀️，我們",
    ),
    "single": (lambda i: "Explain entropy in simple words.",),
}


@dataclass(frozen=True)
class Probes:
    """Named prompts of one split."""

    name: str  #: Name of the set, as in the records' `probes` column
    split: str  #: `train`, `val`, `test`, `template` (a template never fitted on) or `text` (held-out real text)
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ChassisError(f"no split '{self.split}': choose from {', '.join(SPLITS)}")
        if isinstance(self.prompts, str):
            raise ChassisError(f"the prompts of '{self.name}' are one string: give a tuple of strings")
        if not self.prompts:
            raise ChassisError(f"probe set '{self.name}' ({self.split}) is empty: give at least one prompt")
        if empty := [i for i, prompt in enumerate(self.prompts) if not prompt.strip()]:
            raise ChassisError(f"prompt {empty[0]} of probe set '{self.name}' is empty: remove it or write something")

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def digest(self) -> str:
        """Hash of the prompts in order."""
        return hashlib.sha256(repr(self.prompts).encode()).hexdigest()[:16]

    @cached_property
    def fingerprints(self) -> frozenset[int]:
        """One 63-bit number a prompt, to notice a prompt that was already fitted on."""
        hashes = (hashlib.sha256(prompt.encode()).digest() for prompt in self.prompts)
        return frozenset(int.from_bytes(hashed[:8], "big") >> 1 for hashed in hashes)


def probe_set(name: str, split: str = "train", n: int | None = None) -> Probes:
    """A probe set by name.

    It is a template set (`mixed`, `reasoning` or another of `TEMPLATES`) or a bundled text (`prose`, `math-text`,
    `verse`). In the splits `train`, `val` and `test` templates are numbered from 0, 5,000 and
    8,000 as in the study; of the passages of a text, number 3 of every 5 is `val`, number 4 is `test`. Unless n says
    how many, there are 4,096 (train) or 512 of a template set, and all of a text.

    Raises:
        ChassisError: unknown name or split, or n outside what the split holds.
    """
    if split not in STARTS:
        raise ChassisError(f"no split '{split}': choose train, val or test")
    if name in TEMPLATES:
        templates, start = TEMPLATES[name], STARTS[split]
        end = min((s for s in STARTS.values() if s > start), default=None)
        n = (1 if name == "single" else 4096 if split == "train" else 512) if n is None else n
        if n < 1 or (end is not None and start + n > end):
            holds = end - start if end else "any"
            raise ChassisError(f"n = {n} does not fit split {split} of '{name}': it holds {holds}")
        label = "template" if name in ("unseen", "numerals", "languages", "single") else split
        return Probes(name, label, tuple(templates[i % len(templates)](i) for i in range(start, start + n)))
    file = TEXTS / f"{name.removesuffix('-text')}.txt"
    if not file.is_file():
        texts = sorted("math-text" if p.stem == "math" else p.stem for p in TEXTS.glob("*.txt"))
        raise ChassisError(f"no probe set '{name}': choose from {', '.join([*TEMPLATES, *texts])}")
    return passages(name, file.read_text(encoding="utf-8").split("\n%%\n"), split, n)


def passages(name: str, texts: Sequence[str], split: str, n: int | None = None) -> Probes:
    """Passages of real text as probes, to be harvested at every position; splits as in `probe_set`.

    Raises:
        ChassisError: the split holds fewer than n passages, or none.
    """
    chosen = [t.strip() for i, t in enumerate(texts) if {3: "val", 4: "test"}.get(i % 5, "train") == split]
    if n is not None and not 1 <= n <= len(chosen):
        raise ChassisError(f"n = {n} does not fit split {split} of '{name}': it holds {len(chosen)} passages")
    return Probes(name, "text" if split == "test" else split, tuple(chosen[:n]))


def written(expert: LanguageModel, n: int, split: str = "train", length: int = 256, seed: int = 0) -> Probes:
    """Passages (n) that the expert writes itself, of at most `length` tokens, sampled at temperature 1 from nothing.

    Where there is no corpus of its domain, this is one: the tokens on which its own distribution counts. The same seed
    gives the same passages on the same machine; another split draws others.

    Raises:
        ChassisError: n or length below 1, an unknown split, or a tokenizer without a beginning-of-text token.
    """
    start, context = expert.tokenizer.bos_token_id, expert.context
    if n < 1 or not 2 <= length <= context or split not in STARTS:
        known = f"n >= 1, length 2..{context}, split {', '.join(STARTS)}"
        raise ChassisError(f"nothing can be written with n = {n}, length = {length}, split '{split}': give {known}")
    if start is None:
        raise ChassisError(f"{expert.name} has no beginning-of-text token to start from: bring your own passages")
    texts: list[str] = []
    tokenizer, model, begin = expert.tokenizer, copy(expert.model), torch.full((min(256, n), 1), start)
    # What a call leaves open is taken from the model's own settings (top_k, penalties): they are put aside.
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id or start}
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1, **ends)
    with torch.random.fork_rng(devices=[expert.device] if expert.device.type == "cuda" else []):
        torch.manual_seed(seed + STARTS[split])
        while len(texts) < n:
            ids = model.generate(begin.to(expert.device), attention_mask=torch.ones_like(begin).to(expert.device))
            # Rows of the head beyond the tokenizer stand for no token.
            kept = [[i for i in row if i < expert.vocab_size] for row in ids.tolist()]
            several = tokenizer.batch_decode(kept, skip_special_tokens=True)
            texts += [text for one in several if (text := _cut(tokenizer, one.strip(), length))]
    return Probes(f"written by {expert.name}", "text" if split == "test" else split, tuple(texts[:n]))


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> str:
    """As much of a text as is at most `length` tokens when it is read again: it may be cut in another way then."""
    ids, keep = tokenizer(text, verbose=False)["input_ids"], length
    while len(tokenizer(text, verbose=False)["input_ids"]) > length:
        text, keep = tokenizer.decode(ids[:keep], skip_special_tokens=True).strip(), keep - 1
    return text
