"""Everything a notebook judges by, harvested in one call, and parts of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from chassis_utils import Activations, ChassisError, LanguageModel, Probes, harvest, probe_set
from plugs import SyntheticExpert


def harvest_splits(
    base: LanguageModel,
    expert: LanguageModel | SyntheticExpert,
    n_train: int = 4096,
    *,
    text: str = "prose",
    out_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Activations]:
    """Everything a notebook judges by, every layer, harvested once.

    Returns:
        The study's prompts, at their last token, as `train` (n_train), `val` and `test` (an eighth each); `template`,
        as many prompts of templates never fitted on; `single`, the study's one free prompt; and at every position the
        passages of `text`: `text_train`, `text_val`, `text`, of each one passage to 32 prompts if there are so many.
    """
    held = max(1, n_train // 8)
    sets = {"train": ("mixed", "train", n_train), "val": ("mixed", "val", held), "test": ("mixed", "test", held)}
    sets |= {"template": ("unseen", "test", held), "single": ("single", "test")}
    texts = {"text_train": "train", "text_val": "val", "text": "test"}

    def first(split: str) -> Probes:
        whole = probe_set(text, split)
        return replace(whole, prompts=whole.prompts[: max(2, n_train // 32)])

    go = partial(harvest, base, expert, out_dir=out_dir, progress=progress)
    last = {k: go(probe_set(*named), "last") for k, named in sets.items()}
    return last | {k: go(first(split), "all") for k, split in texts.items()}


def subset(a: Activations, n: int, first: int = 0) -> Activations:
    """Only n of the prompts, from number `first` on. ChassisError if there are fewer, or more rows than prompts."""
    if not (0 <= first and 1 <= n <= len(a.probes) - first):
        raise ChassisError(f"n = {n} from {first}: outside 1..{len(a.probes)}, prompts of '{a.probes.name}'")
    if a.positions == "all":
        raise ChassisError("a part of the prompts has other bytes: harvest that part instead")
    part = slice(first, first + n)
    rows = {k: getattr(a, k)[part] for k in ("expert_hidden", "prompt", "next_token")}
    rows["hidden"] = {place: states[part] for place, states in a.hidden.items()}
    return replace(a, probes=replace(a.probes, prompts=a.probes.prompts[part]), **rows)
