"""Prompts to run both models on: the study's templates, unseen templates, passages of real text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .errors import ChassisError

TEXTS = Path(__file__).parent / "texts"
SPLITS = ("train", "val", "test", "template", "text")
#: Numbers of each split of the numbered templates: they begin where the study's do, and `test` has no end.
NUMBERS = {"train": range(5000), "val": range(5000, 8000), "test": range(8000, 10**9)}
#: name -> templates, used in turn: prompt number i takes template i % len. `{0}` is i, `{3}` is i + 3; see `_filled`.
TEMPLATES: dict[str, list[str]] = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))


def _filled(template: str, i: int) -> str:
    """A template with its numbers; those of `{any[0]}` have one to five digits, short ones in every split."""
    numbers = range(i, i + 8)
    several = [k * 7919 % 99991 for k in numbers]
    return template.format(*numbers, any=several, day=i % 28 + 1, month=i % 12 + 1, hour=i % 24, minute=i % 60)


@dataclass(frozen=True)
class Probes:
    """Named prompts of one split."""

    name: str  #: Name of the set, as in the records' `probes` column
    split: str  #: `train`, `val`, `test`, `template` (a template never fitted on) or `text` (held-out real text)
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ChassisError(f"no split '{self.split}': choose from {', '.join(SPLITS)}")
        if isinstance(self.prompts, str) or not self.prompts:
            raise ChassisError(f"probe set '{self.name}' ({self.split}) is empty or one string: give several strings")
        if odd := [i for i, prompt in enumerate(self.prompts) if not isinstance(prompt, str) or not prompt.strip()]:
            raise ChassisError(f"prompt {odd[0]} of probe set '{self.name}' is empty or no text: write something")

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def digest(self) -> str:
        """Hash of the prompts in order."""
        return hashlib.sha256(repr(self.prompts).encode()).hexdigest()[:16]

    @cached_property
    def hashes(self) -> tuple[int, ...]:
        """One 63-bit number a prompt, in order."""
        return tuple(int.from_bytes(hashlib.sha256(one.encode()).digest()[:8], "big") >> 1 for one in self.prompts)

    @cached_property
    def fingerprints(self) -> frozenset[int]:
        """The same without order, to notice a prompt that was already fitted on."""
        return frozenset(self.hashes)


def probe_set(name: str, split: str = "train", n: int | None = None) -> Probes:
    """A probe set by name.

    It is one of `TEMPLATES` or a bundled text (`prose`, `math-text`, `verse`). In the splits `train`, `val` and `test`
    templates are numbered from 0, 5,000 and 8,000 as in the study; of the passages of a text, number 3 of every 5 is
    `val`, number 4 is `test`. Unless n says how many, there are 4,096 (train) or 512 of a template set, and all of a
    text. ChassisError for an unknown name or split, or n outside what the split holds.
    """
    if split not in NUMBERS:
        raise ChassisError(f"no split '{split}': choose train, val or test")
    if name in TEMPLATES:
        templates, numbers = TEMPLATES[name], NUMBERS[split]
        n = (1 if name == "single" else 4096 if split == "train" else 512) if n is None else n
        if not 1 <= n <= len(numbers):
            raise ChassisError(f"n = {n} does not fit split {split} of '{name}': it holds {len(numbers)}")
        label = "template" if name in ("unseen", "numerals", "languages", "single") else split
        return Probes(name, label, tuple(_filled(templates[i % len(templates)], i) for i in numbers[:n]))
    file = TEXTS / f"{name.removesuffix('-text')}.txt"
    if not file.is_file():
        texts = sorted("math-text" if p.stem == "math" else p.stem for p in TEXTS.glob("*.txt"))
        raise ChassisError(f"no probe set '{name}': choose from {', '.join([*TEMPLATES, *texts])}")
    return passages(name, file.read_text(encoding="utf-8").split("\n%%\n"), split, n)


def passages(name: str, texts: Sequence[str], split: str, n: int | None = None) -> Probes:
    """Passages of real text as probes, to be harvested at every position; splits and ChassisError as in `probe_set`."""
    chosen = [t.strip() for i, t in enumerate(texts) if {3: "val", 4: "test"}.get(i % 5, "train") == split]
    if n is not None and not 1 <= n <= len(chosen):
        raise ChassisError(f"n = {n} does not fit split {split} of '{name}': it holds {len(chosen)} passages")
    return Probes(name, "text" if split == "test" else split, tuple(chosen[:n]))
