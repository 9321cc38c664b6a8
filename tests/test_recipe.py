"""The recipe of the pocket models, on a made-up corpus; and the bundled models, where they are there."""

from __future__ import annotations

import json
import math
import random
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import pocket_recipe as recipe
from chassis_utils import ChassisError, bundled, load
from chassis_utils.models import POCKET
from pocket_recipe import Plan, bits_per_byte, gpt2_tokenizer, llama_tokenizer, publish, read_corpora, train

FILES = [*recipe.HUB_SOURCES, recipe.ADDRESSES]
NOUNS = "river hill town bridge harbour orchard lantern winter letter garden mill tower".split()
VERBS = "passes holds finds leaves carries follows remembers keeps".split()
TINY = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "intermediate_size": 24,
}
TINY_PHI = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BASE = Plan("pocket-base", {"prose": 1.0, "math": 0.5}, steps=20, vocab_size=400, shape=TINY, batch=2)
MICRO = {
    "pocket-base": BASE,
    "pocket-math": replace(BASE, name="pocket-math", mixture={"math": 1.0}, start="pocket-base"),
    "pocket-shakespeare": replace(BASE, name="pocket-shakespeare", mixture={"verse": 1.0}, start="pocket-base"),
    "pocket-phi": replace(BASE, name="pocket-phi", mixture={"math": 1.0}, family="phi", shape=TINY_PHI),
}
AWKWARD = ["naïve café", "日本 ok", "a🙂b 👩\u200d🚀", "two  spaces", "tail ", "a\n\nb\n c", "\ttab", "7 < 12345", ""]


def sentences(rng: random.Random, count: int) -> str:
    """Made-up sentences in plain spelling."""
    said = (f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the old {rng.choice(NOUNS)} again." for _ in range(count))
    return " ".join(said)


def article(rng: random.Random, number: int) -> str:
    """One article as wikitext lays it out: words and marks apart, rare words gone, hyphens between at-signs."""
    body = sentences(rng, 8).replace(".", " .")
    return (
        f" \n = Article {number} = \n \n It is a well @-@ known <unk> , built for $ 12 @,@ 500 ( 3 @.@ 5 times more ) ."
        f" They did n't call it \" the lantern \" ; its keeper 's house fell . {body} \n"
        f" \n = = History = = \n \n {body} \n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpora folder with 42 articles, 41 addresses, 45 and 6 problems, 41 scenes."""
    root, rng = tmp_path_factory.mktemp("corpora"), random.Random(0)
    for name, numbers in (("wikitext2_valid.txt", range(22)), ("wikitext2_test.txt", range(22, 42))):
        (root / name).write_text("".join(article(rng, n) for n in numbers), encoding="utf-8")
    for name, numbers in (("gsm8k_train.jsonl", range(45)), ("gsm8k_test.jsonl", range(900, 906))):
        rows = [
            {
                "question": f"Problem {n}: a mill has {n} bags and buys {n % 7}. How many?",
                "answer": f"It has {n}+{n % 7} = <<{n}+{n % 7}={n + n % 7}>>{n + n % 7} bags.\n#### {n + n % 7}",
            }
            for n in numbers
        ]
        (root / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    speeches = [
        f"PRESIDENT A. B. CEDAR'S ADDRESS TO THE CONGRESS\n \nNumber {n}\n\nIt¡¦s the  people. {sentences(rng, 10)}\n"
        for n in range(41)
    ]
    (root / recipe.ADDRESSES).write_text("\n".join(speeches), encoding="utf-8")
    # Two speeches of more than half a scene each: scene n holds speeches 2n and 2n + 1.
    lines = [f"KEEPER:\nSpeech {n} of mine.\n" + sentences(rng, 26) for n in range(82)]
    (root / "tinyshakespeare.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def corpora(folder: Path) -> dict[str, dict[str, list[str]]]:
    return {split: read_corpora(folder, split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def trained(corpora: dict[str, dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All four micro models."""
    out = tmp_path_factory.mktemp("trained")
    for plan in MICRO.values():
        train(plan, corpora, out, every=10)
    yield out
    torch.set_flush_denormal(False)  # training turns it on for the whole process


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def report(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


# ------------------------------------------------------------------------------------------- corpora


def test_splits_are_disjoint_and_follow_the_rule(corpora: dict[str, dict[str, list[str]]]) -> None:
    marks = {
        "prose": [f"Article {n}\n" for n in range(42)] + [f"Number {n}\n" for n in range(41)],
        "math": [f"Problem {n}:" for n in range(45)],
        "verse": [f"Speech {2 * n} of mine." for n in range(41)],
    }
    homes = {9: "val", 19: "test"}
    for domain, openings in marks.items():
        for i, mark in enumerate(openings):
            number = i - 42 if domain == "prose" and i >= 42 else i
            wanted = homes.get(number % 20, "train")
            found = [s for s in ("train", "val", "test") for text in corpora[s][domain] if mark in text]
            # The last ones of GSM8K's training file that the rule would test on are read by no one.
            assert found == ([] if domain == "math" and wanted == "test" else [wanted]), (domain, mark)
        texts = [text for split in ("train", "val", "test") for text in corpora[split][domain]]
        assert len(set(texts)) == len(texts)
    assert [text.split(":")[1] for text in corpora["test"]["math"]] == [f" Problem {n}" for n in range(900, 906)]
    # A scene ends between speeches.
    assert all(text.startswith("KEEPER:") and text.endswith("again.") for text in corpora["train"]["verse"])


def test_marks_and_tokenization_are_undone(corpora: dict[str, dict[str, list[str]]]) -> None:
    wiki = next(text for text in corpora["train"]["prose"] if text.startswith("Article 0\n"))
    opening = (
        "It is a well-known, built for $12,500 (3.5 times more). They didn't call it \"the lantern\"; its keeper's "
    )
    assert wiki.splitlines()[1].startswith(opening + "house fell. The ")
    assert wiki.splitlines()[2] == "History" and wiki.endswith("again.")
    assert wiki.count("\n") == 3, "paragraphs are one line each"
    for texts in (texts for split in corpora.values() for texts in split.values()):
        for text in texts:
            assert text == text.strip()
            assert not re.search(r"[@<>¡]|^ ?= | [.,;]|  |\n\n\n", text, re.MULTILINE)
    address = next(text for text in corpora["train"]["prose"] if "Number 1\n" in text)
    assert address.splitlines()[2].startswith("It's the people. The ")
    assert (
        "Question: Problem 3: a mill has 3 bags and buys 3. How many?\nAnswer: It has 3+3 = 6 bags.\n#### 6"
        in (corpora["train"]["math"])
    )


def test_every_missing_file_is_named_at_once(folder: Path, tmp_path: Path) -> None:
    with refused(str(tmp_path), *FILES):
        read_corpora(tmp_path, "train")
    (tmp_path / FILES[0]).write_bytes((folder / FILES[0]).read_bytes())
    with pytest.raises(ChassisError) as caught:
        read_corpora(tmp_path, "train")
    assert [name for name in FILES if name in str(caught.value)] == FILES[1:]


def test_fetching_without_a_network_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unplugged(*_: object, **__: object) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unplugged)
    monkeypatch.setattr(socket, "getaddrinfo", unplugged)
    with refused("could not fetch", FILES[0], "give a folder"):
        recipe.fetch_corpora(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    for name in FILES[:2]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with refused("could not fetch", FILES[2]):
        recipe.fetch_corpora(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(FILES[:2])
    # A folder that has everything needs no network.
    assert read_corpora(recipe.fetch_corpora(folder), "val")


# ---------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def llama(corpora: dict[str, dict[str, list[str]]]) -> PreTrainedTokenizerFast:
    return llama_tokenizer(corpora["train"]["prose"], 400)


@pytest.fixture(scope="module")
def gpt2(corpora: dict[str, dict[str, list[str]]]) -> PreTrainedTokenizerFast:
    return gpt2_tokenizer(corpora["train"]["prose"], 400)


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    ids = tokenizer(text)["input_ids"]
    assert all(0 <= i < len(tokenizer) for i in ids)
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_llama_tokenizer_is_like_llamas(llama: PreTrainedTokenizerFast) -> None:
    assert len(llama) == 400
    assert llama.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert llama("the town")["input_ids"][0] == llama.bos_token_id == 1
    assert llama.convert_ids_to_tokens(llama("a\nb")["input_ids"]).count("<0x0A>") == 1
    assert llama.tokenize("town 2048")[-4:] == ["2", "0", "4", "8"]
    assert llama.tokenize("the town")[-1] == "▁town", "a common word is one token"
    assert llama.pad_token == "</s>"


@pytest.mark.parametrize("text", AWKWARD)
def test_tokenizers_keep_text(llama: PreTrainedTokenizerFast, gpt2: PreTrainedTokenizerFast, text: str) -> None:
    assert round_trip(llama, text) == text
    assert round_trip(gpt2, text) == text


@pytest.mark.parametrize("text", [" leading", "  two leading", "   ", " \n x"])
def test_tokenizers_keep_leading_spaces(
    llama: PreTrainedTokenizerFast, gpt2: PreTrainedTokenizerFast, text: str
) -> None:
    assert round_trip(llama, text) == text
    assert round_trip(gpt2, text) == text


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_tokenizers_keep_any_text(llama: PreTrainedTokenizerFast, gpt2: PreTrainedTokenizerFast, text: str) -> None:
    plain = text.replace("▁", "_")  # SentencePiece's own sign for a space is the one thing it cannot tell apart
    assert round_trip(llama, "x" + plain) == "x" + plain
    assert round_trip(gpt2, plain) == plain


def test_gpt2_tokenizer_is_like_phis(gpt2: PreTrainedTokenizerFast) -> None:
    assert len(gpt2) == 400
    assert gpt2.pad_token is None
    assert gpt2.bos_token == gpt2.eos_token == "<|endoftext|>"
    assert gpt2.bos_token_id not in gpt2("the town")["input_ids"], "Phi-2 puts nothing before a text"
    assert set("Ġ") < set("".join(gpt2.get_vocab()))


# ------------------------------------------------------------------------------------------ training


def test_a_trained_model_is_an_ordinary_folder(trained: Path) -> None:
    folder = trained / "pocket-base"
    assert {t.dtype for t in weights(folder).values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = load(str(folder), device="cpu")
    assert (model.vocab_size, model.hidden_size, model.num_layers) == (400, 16, 1)
    assert model.readout.weight.shape == (400, 16)
    told = report(folder)
    assert told["plan"] == asdict(BASE)
    assert told["tokens"] == 20 * 2 * recipe.CONTEXT
    assert told["seconds"] > 0
    assert not (trained / ".pocket-base.work").exists()


@pytest.mark.parametrize("name", MICRO)
def test_loss_falls(trained: Path, name: str) -> None:
    history = report(trained / name)["history"]
    assert [row["step"] for row in history] == [10, 20]
    figures = [key for key in history[0] if key != "step"]
    assert set(figures) == {"train_nats_per_token"} | {f"val_{domain}" for domain in MICRO[name].mixture}
    for key in figures:
        assert history[1][key] < history[0][key], key
    if MICRO[name].start is None:
        assert history[1]["train_nats_per_token"] < math.log(400)


def test_phi_has_the_traps_of_phi_2(trained: Path) -> None:
    model = load(str(trained / "pocket-phi"), device="cpu")
    head = model.model.get_output_embeddings().weight
    assert type(model.model).__name__ == "PhiForCausalLM"
    assert head.shape[0] == model.model.config.vocab_size > len(model.tokenizer) == model.vocab_size
    assert head.shape[0] % 128 == 0
    assert model.tokenizer.pad_token is None
    assert model.readout.bias is not None


def test_a_fine_tune_starts_from_its_model(
    trained: Path, corpora: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    base = load(str(trained / "pocket-base"), device="cpu")
    verses = corpora["val"]["verse"]
    before = bits_per_byte(base.model, base.tokenizer, verses)
    for name in ("pocket-math", "pocket-shakespeare"):
        tuned = load(str(trained / name), device="cpu")
        assert tuned.tokenizer_hash == base.tokenizer_hash
        assert tuned.head_hash != base.head_hash
    assert bits_per_byte(tuned.model, tuned.tokenizer, verses) < before
    # With steps of size zero it remains what it started from.
    still = replace(MICRO["pocket-math"], lr=0.0, steps=2)
    (tmp_path / "pocket-base").symlink_to(trained / "pocket-base")
    unmoved, started = weights(train(still, corpora, tmp_path)), weights(trained / "pocket-base")
    assert unmoved.keys() == started.keys()
    assert all(torch.equal(unmoved[name], started[name]) for name in started)


def test_a_fine_tune_without_its_start_is_refused(corpora: dict[str, dict[str, list[str]]], tmp_path: Path) -> None:
    with refused("pocket-math", "pocket-base", "train that first", str(tmp_path)):
        train(MICRO["pocket-math"], corpora, tmp_path)
    assert not (tmp_path / "pocket-math").exists()


def test_too_little_text_is_refused(corpora: dict[str, dict[str, list[str]]], tmp_path: Path) -> None:
    few = corpora | {"train": {domain: texts[:1] for domain, texts in corpora["train"].items()}}
    with refused("pocket-base", "shorter than one batch"):
        train(replace(BASE, batch=500), few, tmp_path)
    assert not (tmp_path / "pocket-base").exists()


def test_an_interrupted_run_resumes_to_the_same_model(
    trained: Path, corpora: dict[str, dict[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = recipe.Muon.step, 0

    def interrupted(self: recipe.Muon) -> None:
        nonlocal calls
        calls += 1
        if calls == 14:  # past the checkpoint at 10
            raise KeyboardInterrupt
        whole(self)

    monkeypatch.setattr(recipe.Muon, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(BASE, corpora, tmp_path, every=10)
    assert not (tmp_path / "pocket-base").exists(), "an unfinished model is not shown"
    train(BASE, corpora, tmp_path, every=10)
    assert calls == 14 + 10, "the first ten steps were not taken again"
    resumed, straight = weights(tmp_path / "pocket-base"), weights(trained / "pocket-base")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert report(tmp_path / "pocket-base")["history"] == report(trained / "pocket-base")["history"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pocket-base"]


def test_a_finished_model_is_not_trained_again(trained: Path, corpora: dict[str, dict[str, list[str]]]) -> None:
    files = sorted((trained / "pocket-base").iterdir())
    before = [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    assert train(replace(BASE, steps=1000), corpora, trained) == trained / "pocket-base"
    files = sorted((trained / "pocket-base").iterdir())
    assert [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16), (1, 8)])
def test_muon_makes_singular_values_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    # Singular values spread over two orders of magnitude; a random square matrix has one that is almost zero.
    left, _, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    spread = torch.logspace(-1, 1, min(shape))
    matrices = left @ torch.diag(spread) @ right
    after = recipe._orthogonalise(matrices)
    assert after.shape == matrices.shape
    values = torch.linalg.svdvals(after)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    # The singular vectors stay: in their basis the result is diagonal.
    inside = left.mT @ after @ right.mT
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(recipe._orthogonalise(matrices[1:2])[0], after[1])


def test_bits_per_byte_is_the_chain_rule(trained: Path, corpora: dict[str, dict[str, list[str]]]) -> None:
    model = LlamaForCausalLM.from_pretrained(trained / "pocket-base", dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "pocket-base")
    # One text shorter than a window and one of several windows: a token sees all before it in its window, and
    # windows advance by half their length.
    short, long = "The river née 1999 🙂.", " ".join(corpora["val"]["prose"])[:1300]
    bits = 0.0
    for text in (short, long):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        for t in range(1, ids.shape[1]):
            seen = 0 if t <= recipe.CONTEXT else (t - 1) // 128 * 128 - 128
            with torch.inference_mode():
                said = model(input_ids=ids[:, seen:t]).logits[0, -1].double().log_softmax(-1)
            bits -= float(said[ids[0, t]]) / math.log(2)
    assert ids.shape[1] > recipe.CONTEXT + 128, "three windows"
    wanted = bits / (len(short.encode()) + len(long.encode()))
    assert bits_per_byte(model, tokenizer, [short, long]) == pytest.approx(wanted, rel=1e-5)


# ----------------------------------------------------------------------------------------- publishing


def test_cards_say_what_the_training_reports_say(
    trained: Path, corpora: dict[str, dict[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "PLANS", MICRO)
    (tmp_path / "pocket-base").mkdir()
    (tmp_path / "pocket-base" / "stale.txt").write_text("from an earlier release")
    figures = publish(trained, corpora["test"], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(MICRO)
    assert not (tmp_path / "pocket-base" / "stale.txt").exists()
    for name, plan in MICRO.items():
        told, card = report(tmp_path / name), (tmp_path / name / "README.md").read_text()
        assert told["test"] == figures[name]
        assert {k: v for k, v in told.items() if k != "test"} == report(trained / name)
        table = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")][2:]
        assert [row[0] for row in table] == ["prose", "math", "verse"]
        for domain, own, base in table:
            assert float(own) == pytest.approx(told["test"][domain], abs=6e-4)
            assert float(base) == pytest.approx(figures["pocket-base"][domain], abs=6e-4)
        assert f"# {name}\n" in card and f"{told['tokens']:,} tokens" in card and f"{plan.steps} steps" in card
        assert card.startswith("---\nlicense:")
        # What was measured is what was copied.
        model = load(str(tmp_path / name), device="cpu")
        again = bits_per_byte(model.model, model.tokenizer, corpora["test"]["math"])
        assert again == pytest.approx(told["test"]["math"], abs=6e-5)


def test_publishing_needs_every_model(
    trained: Path, corpora: dict[str, dict[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "PLANS", MICRO)
    (tmp_path / "out").mkdir()
    for name in list(MICRO)[:3]:
        (tmp_path / "out" / name).symlink_to(trained / name)
    with refused("pocket-phi", "train pocket-phi first"):
        publish(tmp_path / "out", corpora["test"], tmp_path / "package")
    assert not (tmp_path / "package").exists()


# ------------------------------------------------------------------------------- the command line


def test_the_command_trains_and_publishes(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "PLANS", MICRO)
    monkeypatch.setattr("shutil.which", lambda _: None)  # compiling takes longer than these models train
    for name in list(MICRO)[:3]:
        (tmp_path / name).symlink_to(trained / name)
    command = ["--corpora", str(folder), "--out", str(tmp_path)]
    assert recipe.main([*command, "--only", "pocket-phi"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'pocket-phi'}\n"
    assert not (tmp_path / "published").exists(), "one model alone is not published"
    assert recipe.main(command) == 0
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == sorted(MICRO)
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(tmp_path / "published"))


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--only", "pocket-rock"], "unknown pocket model 'pocket-rock'"), ([], "nowhere lacks ")],
)
def test_bad_input_of_the_command_is_one_line(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe.main(["--corpora", "nowhere", "--out", "models", *more]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and message in told.err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- the bundled models

complete = pytest.mark.skipif(
    bundled() != sorted(recipe.PLANS), reason=f"not all pocket models are bundled here, only {bundled()}"
)


@complete
def test_bundled_folders_are_complete_and_small() -> None:
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) <= 40e6
    for name, plan in recipe.PLANS.items():
        names = {path.name for path in (POCKET / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training.json"} <= names
        assert {t.dtype for t in weights(POCKET / name).values()} == {torch.float16}
        told = report(POCKET / name)
        assert told["plan"] == asdict(plan), "the bundled model was made by another plan"
        assert set(told["test"]) == {"prose", "math", "verse"}


@complete
def test_bundled_experts_are_experts() -> None:
    test = {name: report(POCKET / name)["test"] for name in recipe.PLANS}
    assert test["pocket-base"]["prose"] <= 1.75
    for name, domain in (("pocket-math", "math"), ("pocket-shakespeare", "verse"), ("pocket-phi", "math")):
        assert test[name][domain] <= test["pocket-base"][domain] - 0.10, name


@complete
def test_bundled_models_have_the_promised_shapes() -> None:
    models = {name: load(name, device="cpu") for name in recipe.PLANS}
    base, phi = models["pocket-base"], models["pocket-phi"]
    config = base.model.config
    assert config.model_type == "llama" and not config.tie_word_embeddings
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 6 and config.hidden_size >= 192
    assert len(base.tokenizer) == config.vocab_size == 4096
    assert {f"<0x{b:02X}>" for b in range(256)} <= set(base.tokenizer.get_vocab())
    assert base.tokenizer.convert_ids_to_tokens(base.tokenizer("\n")["input_ids"])[-1] == "<0x0A>"
    assert phi.model.config.model_type == "phi"
    assert len(phi.tokenizer) == 6144 < phi.model.get_output_embeddings().weight.shape[0]
    assert phi.tokenizer.pad_token is None
    for name in ("pocket-math", "pocket-shakespeare"):
        assert models[name].tokenizer_hash == base.tokenizer_hash != phi.tokenizer_hash
        assert models[name].revision != base.revision
