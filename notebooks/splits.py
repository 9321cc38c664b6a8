"""Everything a notebook judges by, harvested in one call."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from chassis_utils import Activations, LanguageModel, harvest, probe_set
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
        passages of `text`: `text_train`, `text_val`, `text`.
    """
    held = max(1, n_train // 8)
    sets = {"train": ("mixed", "train", n_train), "val": ("mixed", "val", held), "test": ("mixed", "test", held)}
    sets |= {"template": ("unseen", "test", held), "single": ("single", "test")}
    texts = {"text_train": (text, "train"), "text_val": (text, "val"), "text": (text, "test")}
    go = partial(harvest, base, expert, out_dir=out_dir, progress=progress)
    last = {k: go(probe_set(*named), "last") for k, named in sets.items()}
    return last | {k: go(probe_set(*named), "all") for k, named in texts.items()}
