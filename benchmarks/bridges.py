"""What bridges cost, as ratios within one run; `README.md` defines what is counted."""

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from bench import REPETITIONS, command, quotients, reached, setting, show, timed, write
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chassis_utils import Bridge, ChassisError, LanguageModel, load, probe_set
from chassis_utils.bridge import spelled as cut

RESULTS = Path(__file__).parents[1] / "notebooks" / "bridges.json"
SEARCHED, CUT = 3, 400  #: Words that the search over pairs is timed on, and those that are cut


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def rounds(above: Callable[[], object], below: Callable[[], object]) -> list[float]:
    """Quotients of the two, in CPU time."""
    return quotients(timed({"above": above, "below": below}, time.process_time), "above", ["below"])["above / below"]


def passes(model: LanguageModel, prompts: list[str]) -> torch.Tensor:
    """Distributions `(n, vocab)` behind the prompts, each read by itself."""
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
            logits = model.model(input_ids=ids, use_cache=False).logits[0, -1, : model.vocab_size]
            rows.append(logits.double().softmax(-1))
    return torch.stack(rows)


def made_up(kind: str, size: int, seed: int) -> LanguageModel:
    """A BPE tokenizer of random merges, in SentencePiece's alphabet or GPT-2's, beside a model of one tiny block."""
    whole = kind == "sentencepiece"
    rng, space = random.Random(seed), "▁" if whole else "Ġ"
    names = [f"<0x{byte:02X}>" for byte in range(256)] if whole else pre_tokenizers.ByteLevel.alphabet()
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *sorted(names)])}
    for letter in [space, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"]:
        vocab.setdefault(letter, len(vocab))
    letters, pairs = [space, *"etaoinshrdlucmfwypvbgk"], []
    pieces = [*letters]
    while len(vocab) < size:
        # Late merges join early pieces, as in trained vocabularies.
        pair = tuple(pieces[int(len(pieces) * rng.random() ** 3)] for _ in range(2))
        word = "".join(pair)
        if len(word) <= 16 and space not in word[1:] and word not in vocab:
            pairs.append(pair)
            pieces.append(word)
            vocab[word] = len(vocab)
    built = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=whole))
    if whole:
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return LanguageModel(kind, LlamaForCausalLM(LlamaConfig(vocab_size=size, **config)), tokenizer)


def search(word: str, own: list[str]) -> tuple[int, int] | None:
    """The study's: every pair of ids in their order, until one spells the word."""
    for i, first in enumerate(own):
        for j, second in enumerate(own):
            if first + second == word:
                return i, j
    return None


def against_search(base: LanguageModel, expert: LanguageModel) -> tuple[list[float], int]:
    """Seconds a word of the search over those of the cut, on expert tokens that no base token is; how many agree."""
    own, words = ([m.tokenizer.decode([i]) for i in range(m.vocab_size)] for m in (base, expert))
    own, known, first = own[:4096], set(own), {}
    for i, text in enumerate(own):
        first.setdefault(text, i)
    some = random.Random(0).sample([word for word in words if word not in known and 1 < len(word) <= 10], CUT)
    pairs = [search(word, own) for word in some[:SEARCHED]]
    agree = sum((min(cut(w, first), default=None) == (p and p[0])) for w, p in zip(some, pairs, strict=False))
    found = rounds(lambda: [search(word, own) for word in some[:SEARCHED]], lambda: [cut(word, first) for word in some])
    return [ratio * CUT / SEARCHED for ratio in found], agree


def measure(
    base: LanguageModel, expert: LanguageModel, prompts: list[str], large: tuple[int, int]
) -> dict[str, list[float]]:
    """Quotients of all parts."""
    found: dict[str, list[float]] = {}
    said, below = passes(expert, prompts), lambda: passes(expert, prompts)
    for stage in "ABC":
        bridge = Bridge(expert, base, stage)
        spent = seconds(lambda bridge=bridge: bridge(said, prompts))  # What melts into a prompt's last token is kept.
        found[f"stage {stage}, last tokens seen for the first time"] = [spent / seconds(below)]
        run = lambda bridge=bridge: [bridge(said, prompts) for _ in range(20)]  # noqa: E731
        found[f"stage {stage} / expert's forward"] = [ratio / 20 for ratio in rounds(run, below)]
    plain, few = LanguageModel(expert.name, expert.model, expert.tokenizer), prompts[:4]
    plain.keeps_cache = False
    bridges = [Bridge(one, base, budget=128) for one in (expert, plain)]
    masses = [bridge(None, few).mass for bridge in bridges]  # States are kept: from here on only passes count.
    if not torch.allclose(*masses, atol=1e-6):
        raise ChassisError("passes with and without a cache differ: mend the bridge before it is timed")
    found["a pass, no cache / with one"] = rounds(lambda: bridges[1](None, few), lambda: bridges[0](None, few))
    each = rounds(lambda: bridges[0](None, few), lambda: passes(expert, few))
    found["a pass with a cache / expert's forward"] = [ratio / 128 for ratio in each]
    fresh = rounds(lambda: Bridge(expert, base, budget=128)(None, few), lambda: passes(expert, few))
    found["a pass with a cache, all states new / forward"] = [ratio / 128 for ratio in fresh]
    ours, theirs = made_up("sentencepiece", large[0], 0), made_up("byte-level", large[1], 1)
    for stage in "ABC":
        found[f"table {stage}, {large[0]} x {large[1]}, CPU seconds"] = [
            seconds(lambda stage=stage: Bridge(theirs, ours, stage)) for _ in range(REPETITIONS)
        ]
    return found


def main() -> bool:
    """Run everything, print the table, write `notebooks/bridges.json`; False if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="pocket-base")
    parser.add_argument("--expert", default="pocket-phi")
    parser.add_argument("--n", type=int, default=64, help="prompts")
    parser.add_argument("--large", type=int, nargs=2, default=(32_000, 51_200), help="tokens, made up")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base, expert = load(args.base, device="cpu"), load(args.expert, device="cpu")
    texts = probe_set("math-text", "val").prompts
    prompts = [text[: 200 + 40 * n] for n, text in enumerate((*texts, *texts, *texts)[: args.n])]
    prompts = [prompt[: prompt.rindex(" ")][:900] for prompt in prompts]
    found = measure(base, expert, prompts, tuple(args.large))
    found["search over pairs / cut"], agree = against_search(base, expert)
    settings = vars(args) | setting()
    show(settings, found)
    print(f"search and cut agree on {agree} of {SEARCHED} words; the search was timed on those, the cut on {CUT}")
    stages = max(statistics.median(found[f"stage {stage} / expert's forward"]) for stage in "ABC")
    tables = max(statistics.median(runs) for name, runs in found.items() if name.startswith("table"))
    gain = statistics.median(found["search over pairs / cut"])
    sizes = " x ".join(f"{size:,}" for size in args.large)
    aims = [
        ("stages A to C over the expert's forward, the dearest", "at most", 0.05, stages),
        (f"table of {sizes} tokens, the dearest, CPU seconds", "at most", 3, tables),
        ("the study's search over pairs, over the cut of the same strings", "at least", 1000, gain),
    ]
    met = {
        f"{what}: {one:.3g}, {bound} {aim}": one <= aim if bound == "at most" else one >= aim
        for what, bound, aim, one in aims
    } | {"search and cut agree": agree == SEARCHED}
    told = [{"quantity": what, "bound": bound, "aim": aim, "low": one, "high": one} for what, bound, aim, one in aims]
    write(RESULTS, settings | {"ratios": found, "targets": met, "aims": told})
    return reached(met)


if __name__ == "__main__":
    command(main)
