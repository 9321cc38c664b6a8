"""How the pocket models are made: corpora, tokenizers, training, model cards.

    python notebooks/pocket_recipe.py --corpora DIR --out DIR

Everything a reader needs to remake (or distrust) the bundled models; appendix A1 shows it in miniature. Text
comes from a folder of public corpora, or from a model hub under the same public names; nothing of it is kept here.

Splits, fixed before any training: documents (Wikipedia articles, presidential addresses, scenes of
Shakespeare, GSM8K problems) are numbered, number 9 of every 20 is `val`, number 19 is `test`. GSM8K has a
test file of its own, used for `test` only. `val` chooses settings; `test` is read once, for the card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as TokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

from chassis_utils import ChassisError
from chassis_utils.files import replacing
from records import replace_text

CONTEXT = 256

_SHAKESPEARE = "karpathy/tiny_shakespeare@refs%2Fconvert%2Fparquet/default/{}/0000.parquet"
#: File in a corpora folder -> the same public text on the hub: parquet files with a column `text` or whole rows.
HUB_SOURCES = {
    "gsm8k_train.jsonl": ["openai/gsm8k/main/train-00000-of-00001.parquet"],
    "gsm8k_test.jsonl": ["openai/gsm8k/main/test-00000-of-00001.parquet"],
    "wikitext2_valid.txt": ["Salesforce/wikitext/wikitext-2-v1/validation-00000-of-00001.parquet"],
    "wikitext2_test.txt": ["Salesforce/wikitext/wikitext-2-v1/test-00000-of-00001.parquet"],
    "tinyshakespeare.txt": [_SHAKESPEARE.format(part) for part in ("train", "validation", "test")],
}
ADDRESSES = "state_of_the_union.txt"


def fetch_corpora(folder: str | Path) -> Path:
    """Download the public sets that are not yet in `folder`, in the shape `read_corpora` reads.

    The presidential addresses are NLTK's `state_union` corpus; the rest comes from the hub by name.

    Raises:
        ChassisError: a set could not be fetched.
    """
    import pandas as pd

    folder = Path(folder)

    def addresses() -> str:
        import nltk

        nltk.download("state_union", quiet=True, raise_on_error=True)
        return "\n".join(nltk.corpus.state_union.raw(name) for name in nltk.corpus.state_union.fileids())

    def hub(paths: list[str]) -> str:
        table = pd.concat(pd.read_parquet(f"hf://datasets/{path}") for path in paths)
        return "".join(table["text"]) if "text" in table else table.to_json(orient="records", lines=True)

    for name in (*HUB_SOURCES, ADDRESSES):
        if (folder / name).exists():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = addresses() if name == ADDRESSES else hub(HUB_SOURCES[name])
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            raise ChassisError(f"could not fetch {name} ({reason}): give a folder that holds the corpora") from error
        replace_text(folder / name, text)
    return folder


def _wiki_articles(text: str) -> list[str]:
    """Undo wikitext's tokenization and cut at article titles (` = Title = `)."""
    undo = ((r" ?<unk>", ""), (r" @([-,.])@ ", r"\1"), (r" ([.,;:!?%)\]'’])", r"\1"), (r"([(\[$£]) ", r"\1"))
    for pattern, instead in (*undo, (r'" ([^"\n]*?) "', r'"\1"'), (r" n't\b", "n't"), (r"[ \t]+", " ")):
        text = re.sub(pattern, instead, text)
    parts = re.split(r"(?m)^ (?== [^=])", text)
    articles = []
    for part in parts:
        part = re.sub(r"(?m)^ ?(?:= )+(.*?)(?: =)+ *$", r"\1", part)
        part = re.sub(r"(?m)^ +| +$", "", part)
        articles.append(re.sub(r"\n{2,}", "\n", part).strip())
    return [a for a in articles if len(a) > 200]


def _addresses(text: str) -> list[str]:
    """Cut the presidential addresses apart and mend what an old encoding did to the quotes."""
    for bad, good in {"¡¦": "'", "¡X": "—", "¡§": '"', "¡¨": '"', "¡K": "..."}.items():
        text = text.replace(bad, good)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"\n\s*\n+", "\n", text)
    return [p.strip() for p in re.split(r"(?m)^ ?(?=PRESIDENT [A-Z .']+'S? )", text) if len(p) > 200]


def _problems(text: str) -> list[str]:
    """GSM8K problems as plain text, without the calculator's `<<...>>` marks."""
    rows = (json.loads(line) for line in text.splitlines() if line.strip())
    return [re.sub(r"<<.*?>>", "", f"Question: {r['question']}\nAnswer: {r['answer']}") for r in rows]


def _scenes(text: str) -> list[str]:
    """Shakespeare in runs of about 2,000 bytes that end between speeches."""
    scenes, current = [], ""
    for speech in text.split("\n\n"):
        current += speech + "\n\n"
        if len(current) > 2000:
            scenes.append(current.strip())
            current = ""
    return scenes


def _split(documents: list[str], wanted: str) -> list[str]:
    held = {9: "val", 19: "test"}
    return [d for i, d in enumerate(documents) if held.get(i % 20, "train") == wanted]


def read_corpora(folder: str | Path, split: str) -> dict[str, list[str]]:
    """Documents of one split by domain: `prose`, `math`, `verse`.

    Raises:
        ChassisError: the folder lacks one of the files (all missing ones are named).
    """
    folder = Path(folder)
    names = [*HUB_SOURCES, ADDRESSES]
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ChassisError(f"{folder} lacks {', '.join(missing)}: point to a corpora folder, or fetch one")
    raw = {n: (folder / n).read_text(encoding="utf-8") for n in names}
    wiki = _wiki_articles(raw["wikitext2_valid.txt"]) + _wiki_articles(raw["wikitext2_test.txt"])
    if split == "test":
        math_documents = _problems(raw["gsm8k_test.jsonl"])
    else:
        # Number 19 of every 20 is left out here too, so that one rule holds for every domain.
        math_documents = _split(_problems(raw["gsm8k_train.jsonl"]), split)
    return {
        "prose": _split(wiki, split) + _split(_addresses(raw[ADDRESSES]), split),
        "math": math_documents,
        "verse": _split(_scenes(raw["tinyshakespeare.txt"]), split),
    }


# ---------------------------------------------------------------------------------------- tokenizers


def llama_tokenizer(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """SentencePiece-style BPE: "▁" for a space, `<0xNN>` byte fallback, single digits, as TinyLlama's.

    Newlines are kept out of the training text, so they fall back to `<0x0A>` as they do in Llama.
    """
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    # Prepended always: Metaspace's own "first" drops the leading space of a text that has one.
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    splitter = pre_tokenizers.Sequence([spaces, pre_tokenizers.Digits(individual_digits=True)])
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    size = vocab_size - len(special) - len(byte_tokens)
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=110, show_progress=False)
    learner.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {token: i for i, token in enumerate([*special, *byte_tokens, *pieces])}
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    opening = {"single": "<s> $A", "pair": "<s> $A <s> $B"}
    tokenizer.post_processor = processors.TemplateProcessing(**opening, special_tokens=[("<s>", vocab["<s>"])])
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def gpt2_tokenizer(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """GPT-2's byte-level BPE with one special token and no pad token, as Phi-2's."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, bos_token=end, eos_token=end, unk_token=end)


def _wrap(tokenizer: Tokenizer, **special: str) -> FastTokenizer:
    limits = {"model_max_length": 2 * CONTEXT, "clean_up_tokenization_spaces": False}
    return FastTokenizer(tokenizer_object=tokenizer, **limits, **special)


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Plan:
    """One pocket model: what it is, what it reads, how long it trains."""

    name: str
    """Folder name of the model."""
    mixture: dict[str, float]
    """Domain -> share of that domain's training documents that are read."""
    steps: int
    """Optimiser steps."""
    start: str | None = None
    """Name of the model whose weights are fine-tuned; None trains from scratch."""
    family: str = "llama"
    """`llama` or `phi`: architecture and tokenizer."""
    vocab_size: int = 4096
    """Entries of the tokenizer."""
    shape: dict = field(default_factory=dict)
    """Arguments of the model's config."""
    batch: int = 8
    """Windows of 256 tokens a step."""
    lr: float = 3e-3
    """Peak step size of Muon (matrices); embeddings, head and norms use AdamW at the same value."""
    seed: int = 0


_LLAMA = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512}
_LLAMA |= {"num_key_value_heads": 2}
_PHI = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768}

PLANS = {
    plan.name: plan
    for plan in (
        Plan("pocket-base", {"prose": 1.0, "math": 0.1}, steps=3000, shape=_LLAMA),
        Plan("pocket-math", {"math": 1.0}, steps=700, start="pocket-base", lr=1e-3),
        Plan("pocket-shakespeare", {"verse": 1.0}, steps=300, start="pocket-base", lr=1e-3),
        Plan("pocket-phi", {"prose": 0.35, "math": 1.0}, steps=1000, family="phi", vocab_size=6144, shape=_PHI),
    )
}


def documents(corpora: dict[str, list[str]], mixture: dict[str, float]) -> list[str]:
    """The documents a mixture reads: the evenly spaced share of each domain."""
    chosen = []
    for domain, share in mixture.items():
        texts = corpora[domain]
        count = round(share * len(texts))
        chosen += [texts[i * len(texts) // count] for i in range(count)]
    return chosen


def _build(plan: Plan, tokenizer: TokenizerBase) -> PreTrainedModel:
    torch.manual_seed(plan.seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {"max_position_embeddings": 2 * CONTEXT, "tie_word_embeddings": False} | ids | plan.shape
    if plan.family == "phi":
        # Rows beyond the tokenizer and a head with a bias are Phi-2's own habits, kept as traps on purpose.
        padded = math.ceil((len(tokenizer) + 1) / 128) * 128
        return PhiForCausalLM(PhiConfig(vocab_size=padded, **options))
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options))


def _stream(tokenizer: TokenizerBase, texts: list[str]) -> torch.Tensor:
    """All documents as one row of ids, each opened by the beginning-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids)


def _windows(stream: torch.Tensor, plan: Plan) -> Iterator[torch.Tensor]:
    """Batches `(batch, CONTEXT + 1)`, a function of seed and step alone, so a resumed run sees the same ones."""
    epoch = 0
    while True:
        order = np.random.default_rng([plan.seed, epoch])
        offset = int(order.integers(CONTEXT))
        starts = order.permutation(np.arange(offset, len(stream) - CONTEXT - 1, CONTEXT))
        for i in range(0, len(starts) - plan.batch + 1, plan.batch):
            yield torch.stack([stream[s : s + CONTEXT + 1] for s in starts[i : i + plan.batch]])
        if len(starts) < plan.batch:
            raise ChassisError(f"{plan.name}: the corpora are shorter than one batch of {plan.batch} windows")
        epoch += 1


class Muon(torch.optim.Optimizer):
    """Muon (:cite:`jordan2024muon`) in float32, equal shapes orthogonalised as one batch.

    `torch.optim.Muon` computes in bfloat16, which processors without it emulate at a twentieth of the speed.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter along its orthogonalised momentum."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                updates = []
                for p in same:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                for p, update in zip(same, _orthogonalise(torch.stack(updates)), strict=True):
                    # 0.2 sqrt(max(shape)) gives the update the size AdamW's has (:cite:`liu2025muon`).
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def _orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of `(batch, rows, cols)` by five Newton-Schulz steps."""
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if flip else x


def _optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices, AdamW (:cite:`loshchilov2017decoupled`) on everything else."""
    head = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in head]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in head]
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    return [Muon(matrices, lr=lr), adam]


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps (a tenth of a short run), flat to the middle, then linear to zero."""
    warm, half = min(100, max(1, steps // 10)), steps // 2
    if step < warm:
        return (step + 1) / warm
    return 1.0 if step < half else (steps - step) / (steps - half)


def bits_per_byte(model: PreTrainedModel, tokenizer: TokenizerBase, texts: list[str]) -> float:
    """Bits per byte of whole documents, windows of 256 tokens, each token with at least 128 before it.

    The first window of a document starts at its beginning, so its early tokens have less.
    """
    total_bits = 0.0
    total_bytes = sum(len(t.encode()) for t in texts)
    rows: list[tuple[list[int], int]] = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        done = 0
        while done < len(ids) - 1:
            start = max(0, done - CONTEXT // 2)
            window = ids[start : start + CONTEXT + 1]
            rows.append((window, done - start))
            done = start + len(window) - 1
    rows.sort(key=lambda row: len(row[0]))
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(rows), 32):
            batch = rows[i : i + 32]
            width = max(len(w) for w, _ in batch)
            ids = torch.tensor([w + [0] * (width - len(w)) for w, _ in batch])
            keep = torch.tensor([[skip <= j < len(w) - 1 for j in range(width - 1)] for w, skip in batch])
            logits = model(input_ids=ids[:, :-1]).logits.float()
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total_bits += float(nats[keep.flatten()].double().sum()) / math.log(2)
    return total_bits / total_bytes


def train(
    plan: Plan,
    corpora: dict[str, dict[str, list[str]]],
    out_dir: str | Path,
    *,
    every: int = 500,
    compiled: bool = False,
) -> Path:
    """Train one pocket model and write it as an ordinary model folder.

    Resumes from the last checkpoint in `out_dir` if one is there; a resumed run equals an uninterrupted one.

    Args:
        plan: what to train.
        corpora: split -> domain -> documents, from `read_corpora`.
        out_dir: folder that holds one folder a model.
        every: steps between checkpoints and validation figures.
        compiled: run through `torch.compile` (twice the speed on CPU; needs a C++ compiler).

    Returns:
        The finished model folder.

    Raises:
        ChassisError: the starting model is not there, or the corpora are too short.
    """
    out = Path(out_dir)
    torch.set_flush_denormal(True)  # tiny gradients are many times slower on a CPU
    final, work = out / plan.name, out / f".{plan.name}.work"
    if (final / "training.json").exists():
        return final
    if final.exists():
        raise ChassisError(f"{final} exists and was not finished by this recipe: move it away")
    work.mkdir(parents=True, exist_ok=True)
    texts = documents(corpora["train"], plan.mixture)
    if plan.start is not None:
        source = out / plan.start
        if not (source / "config.json").exists():
            raise ChassisError(f"{plan.name} starts from {plan.start}: train that first (looked in {out})")
        tokenizer = FastTokenizer.from_pretrained(source)
        model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        build = gpt2_tokenizer if plan.family == "phi" else llama_tokenizer
        tokenizer = build(texts, plan.vocab_size)
        model = _build(plan, tokenizer)

    optimizers = _optimizers(model, plan.lr)
    start, history, seconds = 0, [], 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["plan"] != asdict(plan):
            raise ChassisError(f"{work} holds the checkpoint of another plan for {plan.name}: delete it to start anew")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, history, seconds = saved["step"], saved["history"], saved["seconds"]

    def loss_of(window: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if compiled else loss_of
    stream = _stream(tokenizer, texts)
    held_out = {d: corpora["val"][d][:40] for d in plan.mixture if corpora["val"][d]}
    batches = _windows(stream, plan)
    for _ in range(start):
        next(batches)
    running: list[float] = []
    clock = time.monotonic()
    for step in tqdm(range(start, plan.steps), initial=start, total=plan.steps, desc=plan.name, mininterval=10):
        model.train()
        loss = step_loss(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * _rate(step, plan.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            figures = {f"val_{d}": bits_per_byte(model, tokenizer, t) for d, t in held_out.items()}
            history.append({"step": step + 1, "train_nats_per_token": float(np.mean(running)), **figures})
            running = []
            seconds += time.monotonic() - clock
            clock = time.monotonic()
            state = {"plan": asdict(plan), "step": step + 1, "history": history, "seconds": seconds}
            state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(state, work / "checkpoint.tmp")
            os.replace(work / "checkpoint.tmp", checkpoint)
            tqdm.write(json.dumps(history[-1]), file=sys.stderr)

    finished = work / "model"
    model.half().save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    report = {"plan": asdict(plan), "tokens": plan.steps * plan.batch * CONTEXT, "seconds": seconds, "history": history}
    (finished / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(finished, final)
    shutil.rmtree(work)
    return final


def publish(out_dir: str | Path, corpora: dict[str, list[str]], package: str | Path) -> dict[str, dict[str, float]]:
    """Measure finished models on the test split, write their cards, and copy them out.

    Args:
        out_dir: where `train` put them.
        corpora: domain -> documents of the test split; this is the one place that reads it.
        package: folder for the finished model folders.

    Returns:
        model -> domain -> bits per byte, also written into each model's `training.json` as `test`.

    Raises:
        ChassisError: a model is not there.
    """
    figures: dict[str, dict[str, float]] = {}
    for name in PLANS:
        folder = Path(out_dir) / name
        if not (folder / "training.json").is_file():
            raise ChassisError(f"{folder} is not a finished model: train {name} first")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = FastTokenizer.from_pretrained(folder)
        figures[name] = {domain: round(bits_per_byte(model, tokenizer, texts), 4) for domain, texts in corpora.items()}
    for name, plan in PLANS.items():
        report = json.loads((Path(out_dir) / name / "training.json").read_text()) | {"test": figures[name]}
        with replacing(Path(package) / name) as temporary:
            shutil.copytree(Path(out_dir) / name, temporary)
            (temporary / "training.json").write_text(json.dumps(report, indent=1) + "\n")
            (temporary / "README.md").write_text(_card(plan, report, figures["pocket-base"]))
    return figures


def _card(plan: Plan, report: dict, base: dict[str, float]) -> str:
    """A model card whose every figure comes from the training report."""
    read = ", ".join(f"{share:.0%} of the {domain} documents" for domain, share in plan.mixture.items())
    kind = f"`{plan.start}` fine-tuned" if plan.start else f"{plan.family.capitalize()} architecture, from scratch"
    rows = "\n".join(f"| {domain} | {value:.3f} | {base[domain]:.3f} |" for domain, value in report["test"].items())
    return f"""---
license: cc-by-sa-4.0
library_name: transformers
pipeline_tag: text-generation
---
# {plan.name}

A toy language model for trying CHASSIS without a network: {kind}, {report["tokens"]:,} tokens in {plan.steps:,} steps
({report["seconds"] / 60:.0f} minutes on a CPU), read from {read}. It writes fluent nonsense; use it for nothing else.

| held-out text | bits per byte | pocket-base |
|---|---|---|
{rows}

Held-out: documents that no model was trained on (Wikipedia articles of WikiText-2 and presidential addresses; the
GSM8K test problems; scenes of Shakespeare), windows of {CONTEXT} tokens. Rare words are missing from WikiText-2 and so
from these figures.

Training text: WikiText-2 (CC BY-SA), State of the Union addresses (public domain), GSM8K (MIT), Tiny Shakespeare
(public domain). Made by `notebooks/pocket_recipe.py`; settings and course in `training.json`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the models, or one of them; once all are there, measure them and write their cards.

    Returns:
        0 if all went well, 1 for bad input, 130 if interrupted. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="pocket_recipe", description="Train the bundled models again.")
    parser.add_argument("--corpora", required=True, metavar="DIR", help="folder of corpora")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the models")
    parser.add_argument("--only", metavar="NAME", help="one model, such as pocket-math")
    parser.add_argument("--fetch", action="store_true", help="download the corpora first, where they are missing")
    options = parser.parse_args(argv)
    try:
        if options.only and options.only not in PLANS:
            raise ChassisError(f"unknown pocket model {options.only!r}: choose from {', '.join(PLANS)}")
        if options.fetch:
            fetch_corpora(options.corpora)
        corpora = {split: read_corpora(options.corpora, split) for split in ("train", "val")}
        for name in [options.only] if options.only else PLANS:
            print(train(PLANS[name], corpora, options.out, compiled=shutil.which("c++") is not None))
        if not options.only:
            finished = Path(options.out) / "published"
            publish(options.out, read_corpora(options.corpora, "test"), finished)
            print(f"with cards and test figures: {finished}")
    except ChassisError as error:
        print(f"pocket_recipe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pocket_recipe: interrupted, the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
