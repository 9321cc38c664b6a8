"""Probes: the study's prompts, splits that share none, and refusals."""

import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis_utils import Probes, passages, probe_set
from chassis_utils.probes import TEMPLATES

SPLITS = ("train", "val", "test")

few = settings(max_examples=20, deadline=None)
texts_of = st.text("aé# \n", min_size=1, max_size=6).filter(str.strip)


def test_the_mixed_prompts_are_the_studys() -> None:
    train, val, test = (probe_set("mixed", split) for split in SPLITS)
    assert (len(train), len(val), len(test)) == (4096, 512, 512)
    assert train.prompts[:3] == (
        "What is 0 + 1?",
        "Explain entropy in one sentence. #1",
        "In physics, force equals mass times acceleration. Comment #2.",
    )
    assert val.prompts[:2] == (
        "In physics, force equals mass times acceleration. Comment #5000.",
        "What is 5001 + 5002?",
    )
    assert test.prompts[-2:] == (
        "In physics, force equals mass times acceleration. Comment #8510.",
        "What is 8511 + 8512?",
    )
    assert probe_set("math", n=5).prompts[4] == "What is 4 + 7?"


@pytest.mark.parametrize("name", [*(n for n in TEMPLATES if n != "single"), "prose", "math-text", "verse"])
def test_splits_share_no_prompt(name: str) -> None:
    seen = [probe_set(name, split).fingerprints for split in SPLITS]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert all(len(s) == len(probe_set(name, split)) for s, split in zip(seen, SPLITS, strict=True))


def test_unseen_templates_and_real_text_are_labelled() -> None:
    foreign = ("unseen", "numerals", "languages", "single")
    assert {probe_set(name, split).split for name in foreign for split in SPLITS} == {"template"}
    assert [probe_set("prose", split).split for split in SPLITS] == ["train", "val", "text"]
    fitted = probe_set("mixed").fingerprints
    assert not any(fitted & probe_set(name).fingerprints for name in foreign)


def test_numerals_are_mostly_digits_and_languages_leave_latin_letters() -> None:
    digits = [sum(c.isdigit() for c in p) / len(p.replace(" ", "")) for p in probe_set("numerals", n=40).prompts]
    assert min(digits) > 0.4
    assert all(not p.isascii() for p in probe_set("languages", n=40).prompts)
    assert any(ord(c) > 0x1F000 for p in probe_set("languages", n=9).prompts for c in p)


@few
@given(st.lists(texts_of, min_size=5, max_size=20))
def test_the_splits_of_passages_hold_every_passage_once(texts: list[str]) -> None:
    parts = [p for split in SPLITS for p in passages("x", texts, split).prompts]
    assert sorted(parts) == sorted(t.strip() for t in texts)


@few
@given(st.lists(texts_of, min_size=1, max_size=6), st.randoms())
def test_the_digest_knows_order_and_fingerprints_do_not(texts: list[str], random: object) -> None:
    mixed = list(texts)
    random.shuffle(mixed)
    one, other = Probes("x", "train", tuple(texts)), Probes("x", "train", tuple(mixed))
    assert one.fingerprints == other.fingerprints and len(one.fingerprints) == len(set(texts))
    assert (one.digest == other.digest) == (texts == mixed)


def test_prompts_that_join_to_the_same_string_have_their_own_digest() -> None:
    assert Probes("x", "train", ("a\0b",)).digest != Probes("x", "train", ("a", "b")).digest


def test_bad_probes_are_refused() -> None:
    with refused("rivers", "empty"):
        Probes("rivers", "train", ())
    for blank in ("", "  \n"):
        with refused("prompt 1", "rivers", "empty"):
            Probes("rivers", "train", ("The sea", blank))
    with refused("rivers"):  # a bare string is a sequence of letters, surely not what was meant
        Probes("rivers", "train", "Sea")
    with refused("abacus", "mixed", "math-text"):
        probe_set("abacus")
    with refused("middle", "train, val or test"):
        probe_set("mixed", "middle")
    with refused("middle"):
        passages("rivers", ["a"] * 10, "middle")


@pytest.mark.parametrize(
    ("name", "split", "n"), [("mixed", "train", 0), ("mixed", "train", 5001), ("mixed", "val", 3001)]
)
def test_a_split_is_never_left(name: str, split: str, n: int) -> None:
    with refused(f"n = {n}", split, name):
        probe_set(name, split, n)


def test_more_passages_than_there_are_is_refused() -> None:
    held = len(probe_set("prose", "test"))
    for n in (0, held + 1):
        with refused(f"n = {n}", str(held)):
            probe_set("prose", "test", n)
    with refused("rivers"):
        passages("rivers", ["a", "b"], "test")
