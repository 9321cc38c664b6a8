"""Experts behind an API: a real server process on loopback, with a real model behind it and faults on demand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from chassis_utils import Bridge, LanguageModel, load
from chassis_utils.tokens import token_bytes
from completions import ApiExpert, _read, placed
from locks import locked

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-a-very-secret-key-0123456789"
PROMPTS = [
    "Question: A baker has 24",
    "She sells the rest at the mark",
    "Answer: 3 * 5 =",
    "🙂🙂",
    "The tow",
    "Question: A farmer plants 12 rows of",
    "There were 90 - 54",
]


@contextmanager
def serving() -> Iterator[str]:
    """A server process of one's own; its address."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("completions_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between here and loopback, and no key of the user's."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def faults(server: str, **some: object) -> ApiExpert:
    """Set the faults of a server, and connect to it."""
    body = json.dumps(some)  # which writes NaN as servers do
    httpx.post(f"{server}/faults", content=body).raise_for_status()
    return ApiExpert(f"{server}/v1", "pocket-phi", patience=20.0)


def seen(server: str) -> dict:
    return httpx.get(f"{server}/seen").json()


@pytest.fixture(scope="module")
def pocket() -> tuple[LanguageModel, LanguageModel]:
    return load("pocket-phi", device="cpu"), load("pocket-base", device="cpu")


def whole(expert: LanguageModel, prompts: list[str]) -> torch.Tensor:
    """What the local model says of all its tokens."""
    with torch.inference_mode():
        ids = [expert.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
        rows = [expert.model(one).logits[0, -1, : expert.vocab_size] for one in ids]
    return torch.stack(rows).double().softmax(-1)


@pytest.mark.parametrize("form", ["openai", "content"])
def test_it_says_what_the_model_itself_says_cut_to_the_likeliest(
    server: str, pocket: tuple[LanguageModel, LanguageModel], form: str
) -> None:
    expert, base = pocket
    pieces, full = token_bytes(expert.tokenizer), whole(expert, PROMPTS)
    api = faults(server, form=form)
    top = full.topk(20)
    for said, p, ids in zip(api(PROMPTS, progress=False), top.values, top.indices, strict=True):
        assert said == pytest.approx({pieces[i]: x for i, x in zip(ids.tolist(), p.tolist(), strict=True)}, abs=1e-9)
    # A bridge wants distributions: the cut ones are scaled up to 1, and what comes out is scaled down again.
    cut = torch.zeros_like(full).scatter(1, top.indices, top.values)
    kept = cut.sum(1, keepdim=True)
    wanted, found = Bridge(expert, base, "C")(cut / kept, PROMPTS), api.bridged(base, PROMPTS, progress=False)
    assert torch.allclose(found.mass[:, :-1], wanted.mass[:, :-1] * kept, atol=2e-6)
    assert torch.allclose(found.mass.sum(1), torch.ones(len(PROMPTS)).double())
    tail = 1 - kept[:, 0]
    assert (found.unplaced >= tail - 1e-9).all() and (tail > 1e-3).any()
    assert found.probabilities.sum(1).max() > 0.5 and found.crossing.max() > 1e-3


def test_more_logprobs_place_more_and_the_distance_to_all_is_at_most_the_tail(
    server: str, pocket: tuple[LanguageModel, LanguageModel]
) -> None:
    expert, base = pocket
    full, api, before = whole(expert, PROMPTS), faults(server, most=10**6), 1.0
    everything = Bridge(expert, base, "C")(full, PROMPTS).mass
    for k in (1, 5, 20, 100, expert.vocab_size):
        found = replace(api, logprobs=k).bridged(base, PROMPTS, progress=False)
        tail = 1 - full.topk(k).values.sum(1)
        distance = (found.mass - everything).abs().sum(1) / 2
        assert (distance <= tail + 1e-6).all(), k
        assert found.unplaced.mean() <= before + 1e-9
        before = float(found.unplaced.mean())
    assert distance.max() < 1e-9, "with every logprob nothing is lost"


def test_order_and_repetition_change_nothing_and_equal_prompts_are_asked_once(
    server: str, pocket: tuple[LanguageModel, LanguageModel]
) -> None:
    api, base = faults(server), pocket[1]
    once = api.bridged(base, PROMPTS, progress=False).mass
    assert seen(server)["answered"] == PROMPTS
    order = [3, 0, 0, 6, 2, 3, 1, 5, 4]
    again = api.bridged(base, [PROMPTS[i] for i in order], progress=False).mass
    assert torch.allclose(again, once[order], atol=1e-12)
    assert seen(server)["asked"] == 2 * len(PROMPTS)
    assert api([]) == [] and api.bridged(base, []).mass.shape == (0, base.vocab_size + 2)


def test_after_the_server_died_only_what_is_missing_is_asked(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "answers" / "phi.jsonl"
    plain = faults(server)(PROMPTS, progress=False)
    with serving() as other:
        api = replace(faults(other, die_after=3), cache=cache, patience=0.5)
        with refused("prompt 3", "pocket-phi", "try again"):
            api(PROMPTS, progress=False)
    whole_lines = cache.read_bytes()
    assert len(whole_lines.split()) > 3
    # The process that wrote it was cut off in the middle of a line, anywhere.
    for end in (1, 30, 90):
        cache.write_bytes(whole_lines + b"\n" + whole_lines.splitlines()[-1][:end])
        faults(server)
        api = ApiExpert(f"{server}/v1", "pocket-phi", cache=str(cache))
        assert api(PROMPTS, progress=False) == plain
        assert seen(server)["answered"] == PROMPTS[3:]
    # Everything is there: no server is needed.
    assert replace(api, base_url="http://127.0.0.1:9/v1")(PROMPTS[::-1], progress=False) == plain[::-1]
    # Another number of logprobs is another question.
    assert len(replace(api, logprobs=5)(PROMPTS[:2], progress=False)[0]) == 5
    assert seen(server)["answered"] == PROMPTS[3:] + PROMPTS[:2]


def test_the_key_is_sent_and_found_nowhere_else(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = replace(faults(server, key=KEY), cache=tmp_path / "answers.jsonl", key_from="MY_KEY")
    with refused("401", "key", "MY_KEY"):
        api(PROMPTS[:1], progress=False)
    monkeypatch.setenv("MY_KEY", KEY)
    said = [repr(api), str(api(PROMPTS, progress=False))]
    for change, prompt in (({"model": "another"}, "a"), ({}, "word " * 600)):
        with pytest.raises(Exception) as caught:
            replace(api, **change)([prompt], progress=False)
        said += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    monkeypatch.setenv("MY_KEY", KEY + "x")
    with pytest.raises(Exception) as caught:
        api(["something new"], progress=False)
    said.append(str(caught.value))
    said += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(said) == 10 and "401" in said[-2]
    assert not any(KEY in one or KEY[3:20] in one for one in said)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again_and_no_sooner_than_asked(server: str, status: int) -> None:
    api = faults(server, busy=3, status=status, after="0")
    assert len(api(PROMPTS[:1], progress=False)[0]) == 20
    assert seen(server)["asked"] == 4
    api, start = faults(server, busy=1, status=status, after="1"), time.perf_counter()
    api(PROMPTS[:1], progress=False)
    assert 1 <= time.perf_counter() - start < 5
    assert seen(server)["asked"] == 2


def test_a_server_that_comes_back_is_asked_again(server: str) -> None:
    api = replace(faults(server, slow=0.6), timeout=0.3, patience=0.5)
    with refused("Timeout", "0.5 s"):
        api(PROMPTS[:1], progress=False)
    assert len(replace(api, timeout=5.0)(PROMPTS[:1], progress=False)[0]) == 20


def test_fewer_logprobs_than_asked_are_told_once(server: str, pocket: tuple[LanguageModel, LanguageModel]) -> None:
    api, base = faults(server, most=4), pocket[1]
    with pytest.warns(UserWarning, match="only 4 tokens .* of 20") as caught:
        found = api(PROMPTS, progress=False)
    assert len(caught) == 1 and {len(said) for said in found} == {4}
    cut = placed(base, found, PROMPTS)
    assert torch.allclose(cut.mass, replace(api, logprobs=4).bridged(base, PROMPTS, progress=False).mass)


def told(**logprobs: float) -> dict:
    """Logprobs of one place, as a server writes them."""
    return {"top_logprobs": [logprobs]}


def test_tokens_that_do_not_decode_stay_unplaced(server: str, pocket: tuple[LanguageModel, LanguageModel]) -> None:
    base = pocket[1]
    api = replace(faults(server, logprobs=told(**{"\ufffd": math.log(0.5), " 3": math.log(0.25)})), logprobs=2)
    with pytest.warns(UserWarning, match="only 1 tokens that can be read of 2"):
        found = api.bridged(base, ["Answer: 3 *"], progress=False)
    assert float(found.unplaced[0]) == pytest.approx(0.75)
    faults(server, logprobs=told(**{"\ufffd": -0.5}))
    with refused("prompt 0", "decode"):
        api(["a"], progress=False)


def test_the_end_of_text_is_the_bases_own(server: str, pocket: tuple[LanguageModel, LanguageModel]) -> None:
    base = pocket[1]
    for name in ("<|endoftext|>", "</s>"):
        api = faults(server, logprobs=told(**{name: math.log(0.75), " the": math.log(0.125)}))
        found = replace(api, logprobs=2).bridged(base, ["She sells"], progress=False)
        assert float(found.mass[0, base.tokenizer.eos_token_id]) == pytest.approx(0.75)
        assert float(found.unplaced[0]) == pytest.approx(0.125)


@given(st.binary(min_size=1, max_size=6))
def test_any_bytes_are_read_however_they_are_written(raw: bytes) -> None:
    shown = "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in raw)
    row = {"token": raw.decode(errors="replace"), "bytes": [*raw], "logprob": 0.0}
    forms = [{"content": [{"top_logprobs": [row]}]}]
    if "\\x" in shown:
        forms.append(told(**{f"bytes:{shown}": 0.0}))
    text = raw.decode(errors="ignore")
    if text.encode() == raw:
        forms.append(told(**{text: 0.0}))
    for logprobs in forms:
        assert _read(json.dumps({"choices": [{"logprobs": logprobs}]}), ()) == {raw: 1.0}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"busy": -1}, ["429", "0.6 s", "try again"]),
        ({"busy": -1, "status": 500}, ["500", "try again"]),
        ({"busy": -1, "status": 302}, ["302"]),
        ({"busy": -1, "after": "3600"}, ["429", "try again"]),
        ({"slow": 1.0}, ["Timeout", "try again"]),
        ({"key": KEY}, ["401 for the key in OPENAI_API_KEY", "set the right one"]),
        ({"body": "<html>\n\nsorry"}, ["200", "<html> sorry", "no JSON"]),
        ({"body": "[1, 2]"}, ["[1, 2]", "no logprobs"]),
        ({"body": {"choices": []}}, ["no logprobs"]),
        ({"logprobs": {}}, ["no logprobs"]),
        ({"logprobs": {"top_logprobs": []}}, ["no logprobs"]),
        ({"logprobs": {"top_logprobs": [None]}}, ["no logprobs"]),
        ({"logprobs": told()}, ["no logprobs"]),
        ({"logprobs": told(a=None, b=-1.0)}, ["no logprobs"]),
        ({"logprobs": told(a="-1")}, ["no logprobs"]),
        ({"logprobs": told(a=math.nan)}, ["sum to nan"]),
        ({"logprobs": told(a=-0.1, b=-0.1)}, ["sum to 1.81"]),
        ({"logprobs": told(a=3000.0)}, ["sum to"]),
    ],
)
def test_a_server_that_fails_is_told_in_one_line(server: str, tmp_path: Path, fault: dict, words: list[str]) -> None:
    api = replace(faults(server, **fault), timeout=0.5, patience=0.6, cache=tmp_path / "answers.jsonl")
    start = time.perf_counter()
    with refused("prompt 0", "pocket-phi", *words):
        api(["The river", "The town"], progress=False)
    assert time.perf_counter() - start < 5
    assert not api.cache.read_text().strip(), "a wrong answer was kept"
    if "busy" not in fault and "slow" not in fault:
        assert seen(server)["asked"] == 1, "what does not pass was tried again"


def test_bad_input_is_refused_in_one_line(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = faults(server)
    with refused("404", "check model"):
        replace(api, model="pocket-psi")(["a"], progress=False)
    with refused("404", "base_url"):
        replace(api, base_url=server)(["a"], progress=False)
    with refused("prompt 1", "400", "512", "shorten"):
        api(["fine", "word " * 600], progress=False)
    with refused("prompt 0", "ConnectError", "try again"):
        replace(api, base_url="http://127.0.0.1:9/v1", patience=0.3)(["a"], progress=False)
    for prompts in (["a", ""], "one string", ["a", "b\udce2"], ["a", 5], [None]):
        with refused("prompt", "list of texts"):
            api(prompts, progress=False)
    for address in ("127.0.0.1/v1", "ftp://host/v1", "http://user:word@host/v1", "https://host/v1?key=word", "http://"):
        with refused("no password"):
            replace(api, base_url=address)(["a"], progress=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nline more")
    with refused("OPENAI_API_KEY", "plain letters"):
        api(["a"], progress=False)
    monkeypatch.delenv("OPENAI_API_KEY")
    with locked(tmp_path / "busy.jsonl"), refused("busy.jsonl", "in use"):
        replace(api, cache=tmp_path / "busy.jsonl")(["a"], progress=False)
    with refused("cannot write"):
        replace(api, cache=tmp_path)(["a"], progress=False)
    # Sums within rounding of 1 are no fault, and nothing is left that is negative.
    faults(server, logprobs=told(a=math.log(0.5), b=math.log(0.5004)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(replace(api, logprobs=2)(["a"], progress=False)[0].values()) == pytest.approx(1, abs=1e-12)
