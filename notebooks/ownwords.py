"""Passages that an expert writes itself, where there is no corpus of its domain."""

from __future__ import annotations

from copy import copy

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from chassis_utils import ChassisError, LanguageModel, Probes
from chassis_utils.probes import NUMBERS


def written(expert: LanguageModel, n: int, split: str = "train", length: int = 256, seed: int = 0) -> Probes:
    """Passages (n) that the expert writes itself, of at most `length` tokens, sampled at temperature 1 from nothing.

    Where there is no corpus of its domain, this is one: the tokens on which its own distribution counts. The same seed
    gives the same passages on the same machine; another split draws others. ChassisError for n below 1, a length that
    does not fit, an unknown split, or a tokenizer without a beginning-of-text token.
    """
    start, context = expert.tokenizer.bos_token_id, expert.context
    if n < 1 or not 2 <= length <= context or split not in NUMBERS:
        known = f"n >= 1, length 2..{context}, split {', '.join(NUMBERS)}"
        raise ChassisError(f"nothing can be written with n = {n}, length = {length}, split '{split}': give {known}")
    if start is None:
        raise ChassisError(f"{expert.name} has no beginning-of-text token to start from: bring your own passages")
    texts: list[str] = []
    tokenizer, model, begin = expert.tokenizer, copy(expert.model), torch.full((min(256, n), 1), start)
    # What a call leaves open is taken from the model's own settings (top_k, penalties): they are put aside.
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id or start}
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1, **ends)
    with torch.random.fork_rng(devices=[expert.device] if expert.device.type == "cuda" else []):
        torch.manual_seed(seed + NUMBERS[split].start)
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
