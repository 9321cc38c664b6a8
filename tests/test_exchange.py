"""Adapters elsewhere: the card, the hub, and the same logits in `peft`; what cannot leave says why."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from conftest import ARCHITECTURES, make, refused
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import alignment  # noqa: F401  registers hidden, aligned and projected
from chassis_utils import Activations, Adapter, Features, LanguageModel, Probes, evaluate, fit, harvest, load, probe_set
from chassis_utils.exchange import licence
from plugs import exact_adapter
from serving import vllm_refuses

TEXT = "The river rises in year 7, and 3 towns"
KINDS = ("rrr", "ridge", "v1", "lens", "hidden", "aligned")

# ------------------------------------------------------------------------------------------ peft


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prompts: Probes) -> Activations:
    """Activations of two models of an architecture."""
    root = tmp_path_factory.mktemp(request.param)
    models = [load(str(make(root / str(seed), request.param, seed)), device="cpu") for seed in (0, 1)]
    return harvest(*models, prompts, "all", progress=False)


def fresh(base: LanguageModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float32).eval()


def logits(model: torch.nn.Module, base: LanguageModel) -> torch.Tensor:
    """Of a model of transformers or peft, at every token of a text, `(n, vocab)`."""
    ids = base.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model(ids).logits[0, :, : base.vocab_size].float()


def ours(base: LanguageModel, adapter: Adapter) -> torch.Tensor:
    ids = base.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    states = base.states(ids, torch.ones_like(ids), [base.num_layers])
    return adapter.logits(base, {base.num_layers: states[base.num_layers][0]})


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits_on_a_base_loaded_anew(pair: Activations, tmp_path: Path, kind: str) -> None:
    base, adapter = pair.base, fit(pair, kind)
    for name, one in (("whole", adapter), ("bare", adapter.without_intercept(pair)), ("cut", adapter.at_rank(3))):
        folder = one.to_peft(tmp_path / name, base)
        close(logits(PeftModel.from_pretrained(fresh(base), folder), base), ours(base, one))
        assert (ours(base, one) - ours(base, Adapter.identity(base))).abs().max() > 0.1, "it does something"
        config = json.loads((folder / "adapter_config.json").read_text())
        # A lens stands in place of the head and its bias, so that its map is as wide as the state.
        assert config["lora_bias"] == (name != "bare" or (kind == "lens" and base.readout.bias is not None))
        assert config["r"] == (base.hidden_size if kind in ("lens", "aligned") else one.rank)


def test_merged_it_is_a_model_like_any_other(pair: Activations, tmp_path: Path) -> None:
    base, adapter = pair.base, fit(pair, "rrr", 5).without_intercept(pair)
    model = fresh(base)
    if model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    merged = PeftModel.from_pretrained(model, adapter.to_peft(tmp_path / "lora", base)).merge_and_unload()
    close(logits(merged, base), ours(base, adapter))
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(logits(again, base), ours(base, adapter))


def test_a_head_with_a_bias_takes_the_intercept_too(prompts: Probes, tmp_path: Path) -> None:
    base, expert = (load(str(make(tmp_path / str(seed), "Phi", seed)), device="cpu") for seed in (0, 1))
    adapter = fit(harvest(base, expert, prompts, "all", progress=False), "rrr", 5)
    merged = PeftModel.from_pretrained(fresh(base), adapter.to_peft(tmp_path / "lora", base)).merge_and_unload()
    close(logits(merged, base), ours(base, adapter))


@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_peft_swaps_and_mixes_them(base: LanguageModel, activations: Activations, tmp_path: Path) -> None:
    plain = Adapter.identity(base)
    whole = [fit(activations, kind, rank) for kind, rank in (("rrr", 4), ("v1", 4), ("hidden", 7))]
    bare = [one.without_intercept(activations) for one in whole]
    folders = [one.to_peft(tmp_path / str(i), base) for i, one in enumerate((*bare, *whole))]
    model = PeftModel.from_pretrained(fresh(base), folders[0], adapter_name="0").eval()
    for i in range(1, 6):
        model.load_adapter(folders[i], adapter_name=str(i))
    for i, one in enumerate((*bare, *whole)):
        model.set_adapter(str(i))
        close(logits(model, base), ours(base, one))
    with model.disable_adapter():
        close(logits(model, base), ours(base, plain))
    # Logits before a cap are linear in the adapter: a mixture is the mixture of what they add.
    weights = [0.5, -0.25, 1.0]
    for way in ("cat", "svd"):
        model.add_weighted_adapter(["0", "1", "2"], weights, way, combination_type=way, svd_rank=20)
        model.set_adapter(way)
        start = ours(base, plain)
        mixed = start + sum(w * (ours(base, one) - start) for w, one in zip(weights, bare, strict=True))
        close(logits(model, base), mixed)
    swapped = PeftModel.from_pretrained(fresh(base), folders[0]).eval()
    for i in (1, 2, 0):
        hotswap_adapter(swapped, folders[i], "default")
        close(logits(swapped, base), ours(base, bare[i]))
    biased = PeftModel.from_pretrained(fresh(base), folders[3]).eval()
    hotswap_adapter(biased, folders[4], "default")
    close(logits(biased, base), ours(base, whole[1]))


def test_behind_a_layernorm_the_intercept_costs_nothing(tmp_path: Path, prompts: Probes, unseen: Probes) -> None:
    base, expert = (load(str(make(tmp_path / str(seed), "Phi", seed)), device="cpu") for seed in (0, 1))
    a = harvest(base, expert, prompts, "all", progress=False)
    adapter = fit(a, "rrr", 6)
    table = evaluate(base, expert, [adapter, adapter.without_intercept(a)], unseen)
    assert table.kl[1] == pytest.approx(table.kl[2], rel=1e-4)


def test_without_intercept_is_least_squares_without_one(activations: Activations) -> None:
    a, x = activations, activations.hidden[3].double()
    full = fit(a, "ridge", lam=1e-6)
    bare = full.without_intercept(a)
    change = a.expert.readout(a.expert_hidden).double() - a.base.readout(a.hidden[3]).double()
    change -= change.mean(1, keepdim=True)  # a constant over the vocabulary changes no probability
    best = torch.linalg.lstsq(x, change, driver="gelsd").solution
    torch.testing.assert_close(bare.correction(a.hidden).double(), x @ best, atol=1e-2, rtol=1e-3)
    assert not bare.bias.any() and bare.rank == full.rank + 1
    assert torch.equal(bare.at_rank(3).up[0], full.bias), "a cut keeps the intercept"


def test_on_real_text_the_intercept_is_worth_keeping() -> None:
    base, expert = load("pocket-base", device="cpu"), load("pocket-math", device="cpu")
    a = harvest(base, expert, probe_set("math-text", "train", 24), "all", [-1], progress=False)
    adapter = fit(a, "rrr", 64, metric="kl")
    bare, dropped = adapter.without_intercept(a), replace(adapter, bias=torch.zeros_like(adapter.bias))
    table = evaluate(base, expert, [adapter, bare, dropped], probe_set("math-text", "test", 6))
    whole, folded, lost = table.recovered[1:]
    assert abs(whole - folded) < 0.02 < whole - lost


def test_a_bias_alone_has_a_rank_for_peft(base: LanguageModel, activations: Activations, tmp_path: Path) -> None:
    alone = replace(Adapter.identity(base), bias=torch.randn(base.vocab_size))
    with pytest.warns(UserWarning, match="lora_bias"):
        model = PeftModel.from_pretrained(fresh(base), alone.to_peft(tmp_path / "lora", base))
    close(logits(model, base), ours(base, alone))
    bare = alone.without_intercept(activations)
    close(logits(PeftModel.from_pretrained(fresh(base), bare.to_peft(tmp_path / "bare", base)), base), ours(base, bare))
    assert bare.rank == 1


def test_the_base_is_loaded_by_its_name(activations: Activations, tmp_path: Path) -> None:
    adapter = fit(activations, "rrr", 2)
    folders = [adapter.to_peft(tmp_path / "named"), adapter.to_peft(tmp_path / "given", activations.base)]
    named, given = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert named == given


def test_what_is_no_map_of_the_head_says_why(activations: Activations, base: LanguageModel, tmp_path: Path) -> None:
    final, whole = fit(activations, "rrr", 2), Features((3, 1))
    edit = replace(fit(activations, "hidden", 1), layer=1, onto="layer")
    wrong = {
        "earlier layers": replace(final, edits=(edit,)),
        "(1)": fit(activations, "rrr", 2, layer=1),
        "random features": fit(activations, "rrr", 2, features=Features((3,), random=5)),
        "beside the final state": fit(activations, "rrr", 2, features=whole),
    }
    for words, adapter in wrong.items():
        with refused(words, "rrr", "harvest"):
            adapter.to_peft(tmp_path / "lora", base)
        with refused(words):
            adapter.without_intercept(activations)
    with refused("edited itself"):
        final.to_peft(tmp_path / "lora", base.edited(edit))
    assert not list(tmp_path.iterdir())
    reads_it_in_words = fit(activations, "rrr", 2, features=Features((3,)))
    close(ours(base, reads_it_in_words), ours(base, final))
    reads_it_in_words.to_peft(tmp_path / "lora", base)


def test_folders_are_replaced_and_what_else_lies_there_is_not(activations: Activations, tmp_path: Path) -> None:
    adapter = fit(activations, "rrr", 2)
    ways = {"peft": lambda one, name: one.to_peft(name, activations.base), "own": lambda one, name: one.save(name)}
    for kind, write in ways.items():
        for rank in (1, 2):
            folder = write(adapter.at_rank(rank), tmp_path / kind)
        told = json.loads((folder / ("adapter_config.json" if kind == "peft" else "adapter.json")).read_text())
        assert told["r" if kind == "peft" else "rank"] == 2
        (folder / ".git").mkdir()  # a clone of a hub's repository
        (folder / "notes.txt").write_text("mine")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with refused(".git, notes.txt", "would be lost"):
            write(adapter, folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        (tmp_path / f"{kind} file").write_text("mine")
        for odd, words in ((tmp_path / f"{kind} file", "cannot write"), ("a\0b", "no name"), (None, "no name")):
            with refused(words):
                write(adapter, odd)
        with refused("cannot write"):
            write(adapter, "x" * 5000)
        assert not list(tmp_path.glob(".*"))


def test_what_is_no_adapter_or_base_is_refused_in_a_line(activations: Activations, tmp_path: Path) -> None:
    adapter = fit(activations, "rrr", 2)
    folder = adapter.save(tmp_path / "own")
    for odd in (None, 3, "x" * 5000, "a\0b"):
        with refused("adapter" if isinstance(odd, str) and len(odd) < 9 else "no name"):
            Adapter.load(odd)
    with refused("base is a str", "load it first"):
        Adapter.load(folder, "pocket-base")
    with refused("base is a str", "load it first"):
        adapter.to_peft(tmp_path / "lora", "pocket-base")
    with refused("figures is a int", "evaluate"):
        adapter.save(tmp_path / "other", figures=3)


def test_a_terminal_is_told_nothing_that_it_obeys(activations: Activations, tmp_path: Path) -> None:
    """Whatever words a folder holds, at whatever depth, `report` would print them."""
    adapter = fit(activations, "rrr", 2)
    file = adapter.save(tmp_path / "odd") / "adapter.json"
    plain = json.loads(file.read_text())
    assert Adapter.load(tmp_path / "odd").info == adapter.info
    for odd in ("\x1b[2J", "a\nb", ["\x1b[2J"], {"a": "\x1b[2J"}, {"a": {"b": "\u202e"}}):
        file.write_text(json.dumps(plain | {"info": plain["info"] | {"expert": odd}}))
        with refused("not a readable adapter folder"):
            Adapter.load(tmp_path / "odd")


def test_an_export_to_another_base_is_refused(activations: Activations, expert: LanguageModel, tmp_path: Path) -> None:
    with refused(activations.base.name, expert.name):
        fit(activations, "rrr", 2, layer=-1).to_peft(tmp_path / "lora", expert)


# ------------------------------------------------------------------------------------------ vLLM


def test_vllm_is_told_what_it_would_refuse(activations: Activations, tmp_path: Path) -> None:
    base, adapter = activations.base, fit(activations, "rrr")
    bare = adapter.without_intercept(activations)
    assert vllm_refuses(bare.at_rank(16).to_peft(tmp_path / "small", base)) == []
    [rank] = vllm_refuses(bare.at_rank(17).to_peft(tmp_path / "large", base))
    assert "rank 17" in rank and rank.endswith("--max-lora-rank 32")
    assert vllm_refuses(tmp_path / "large", max_lora_rank=32) == []
    [bias] = vllm_refuses(adapter.at_rank(16).to_peft(tmp_path / "biased", base))
    assert "without_intercept" in bias
    # Heads under another name, and the largest vocabularies, are written by hand: no small model has them.
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    (tmp_path / "small" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["embed_out"]}))
    [head] = vllm_refuses(tmp_path / "small")
    assert "embed_out" in head and "lm_head" in head
    tensors = {"base_model.model.lm_head.lora_B.weight": torch.zeros(258_049, 1)}
    save_file(tensors, tmp_path / "large" / "adapter_model.safetensors")
    [rows] = vllm_refuses(tmp_path / "large", max_lora_rank=32)
    assert "258,049 rows" in rows


# ------------------------------------------------------------------------------------------ cards

HOSTILE = "mit\n---\n# Owned\n| a | b |\n<script>alert(1)</script> [x](javascript:y) `~~~` www.evil.test @everyone : {}"


def test_a_card_shows_settings_and_figures(activations: Activations, unseen: Probes, tmp_path: Path) -> None:
    adapters = [fit(activations, "rrr", 2), fit(activations, "v1", 5)]
    table = evaluate(activations.base, activations.expert, adapters, unseen)
    card = ModelCard.load(adapters[0].save(tmp_path / "a", table) / "README.md")
    assert card.data.license == "unknown" and card.data.library_name == "chassis-utils"
    shown = [line for line in card.text.splitlines() if line.startswith("| identity") or line.startswith("| rrr")]
    assert len(shown) == 2 and f"{table.kl[0]:.5g}" in shown[0] and f"{table.kl[1]:.5g}" in shown[1]
    assert "| v1 |" not in card.text and f"{adapters[0].info['lam']:.5g}" in card.text and "| rank | 2 |" in card.text
    with refused("rrr", "rank 3", "evaluate"):
        fit(activations, "rrr", 3).save(tmp_path / "b", table)


def test_no_text_breaks_out_of_a_card(activations: Activations, tmp_path: Path) -> None:
    good = fit(activations, "rrr", 2)
    info = good.info | dict.fromkeys(("licence", "expert", "probes", HOSTILE), HOSTILE)
    odd = replace(good, method=HOSTILE, base_name=HOSTILE, info=info)
    text = (odd.save(tmp_path / "odd") / "README.md").read_text()
    _, front, body = text.split("\n---\n", 2) if text.startswith("\n") else ("", *text[4:].split("\n---\n", 1))
    assert set(yaml.safe_load(front)) == {"license", "library_name", "tags"}
    assert not any(mark in body for mark in ("<script", "](", "www.", "@everyone", "javascript:", "\n---", "Owned\n"))
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3} and body.count("\n# ") + body.startswith("# ") == 1
    # A name that only looks like one of the hub is none, if it leads to a folder.
    assert "base_model" not in (good.save(tmp_path / "good") / "README.md").read_text()
    hub = replace(good, base_name="org/model").save(tmp_path / "hub")
    assert ModelCard.load(hub / "README.md").data.base_model == "org/model"


def test_the_licence_is_the_one_on_the_experts_card(folders: dict[str, Path], tmp_path: Path) -> None:
    math = load("pocket-math", device="cpu")
    assert licence(math) == "cc-by-sa-4.0"
    assert licence(load(str(folders["expert"]), device="cpu")) == "unknown"
    folder = make(tmp_path / "own")
    for front, wanted in (("license: mit", "mit"), ("license: [", "unknown"), ("other: 1", "unknown"), ("", "unknown")):
        (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
        assert licence(load(str(folder), device="cpu")) == wanted
    assert licence(object()) == "unknown"


def test_the_licence_of_a_synthetic_expert_is_unknown(base: LanguageModel, synthetic: object, prompts: Probes) -> None:
    adapter = fit(harvest(base, synthetic, prompts, progress=False), "rrr", 2)
    assert adapter.info["licence"] == "unknown" and adapter.info["tokenizer_hash"] == base.tokenizer_hash
    assert exact_adapter(base, synthetic).info == {}


# ------------------------------------------------------------------------------------------ hub


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def client(address: str, cache: Path, code: str, token: str = "hf_right") -> str:
    """What a process prints whose hub is at this address."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    start = "import torch\nfrom pathlib import Path\nfrom chassis_utils import Adapter, ChassisError, load\n"
    done = subprocess.run([sys.executable, "-c", start + code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    return done.stdout


def test_an_adapter_goes_to_the_hub_and_comes_back(hub: str, activations: Activations, tmp_path: Path) -> None:
    first, second = (fit(activations, "rrr", rank).save(tmp_path / str(rank)) for rank in (2, 3))
    code = f"""
from huggingface_hub import create_repo, upload_folder
create_repo("org/adapter", exist_ok=True)
commits = [upload_folder(repo_id="org/adapter", folder_path=one).oid for one in ({str(first)!r}, {str(second)!r})]
base = load({activations.base.name!r}, device="cpu")
for revision in (commits[0], None):
    back = Adapter.load("org/adapter", base, revision)
    print(back.rank, back.revision)
cached = next(Path({str(tmp_path / "cache")!r}).rglob("snapshots")).glob("*/*")
print(*sorted({{path.name for path in cached}}))
"""
    told = client(hub, tmp_path / "cache", code).splitlines()
    wanted = [Adapter.load(folder) for folder in (first, second)]
    assert told[:2] == [f"{one.rank} {one.revision}" for one in wanted]
    assert told[2] == "adapter.json adapter.safetensors", "the card is not asked for"
    assert httpx.get(f"{hub}/seen", trust_env=False).json()


def test_what_the_hub_refuses_is_one_line(hub: str, activations: Activations, tmp_path: Path) -> None:
    folder = fit(activations, "rrr", 2).save(tmp_path / "a")
    code = """
import traceback
for name, revision in (("org/nothing", None), ("org/there", "v9")):
    try:
        Adapter.load(name, revision=revision)
        print("done")
    except ChassisError as error:
        assert "hf_wrong" not in traceback.format_exc()
        print(str(error).count("\\n"), error)
"""
    there = f"upload_folder(repo_id='org/there', folder_path={str(folder)!r})"
    client(hub, tmp_path / "right", f"from huggingface_hub import *\ncreate_repo('org/there')\n{there}")
    told = client(hub, tmp_path / "cache", code, token="hf_wrong").splitlines()
    for line, words in zip(told, ("org/nothing", "org/there"), strict=True):
        assert line.startswith("0 ") and words in line and "check the id" in line


def test_a_hub_that_is_away_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        code = "try:\n    Adapter.load('org/adapter')\nexcept ChassisError as error:\n    print(error)\n"
        told = client(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path / "cache", code)
    assert told.startswith("org/adapter is no folder, and the hub gave nothing (") and told.count("\n") == 1
