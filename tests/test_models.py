"""Loading: what is read out is the model's own, and whatever cannot be loaded is refused in one line."""

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers as tf
from conftest import VOCAB, WORDS, make, refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from chassis_utils import Adapter, Features, LanguageModel, Port, evaluate, fit, gather, harvest, load, probe_set
from pocket_recipe import gpt2_tokenizer, llama_tokenizer
from recast import recast

IDS = torch.tensor([[1, 260, 270, 280, 290]])


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a good model folder, to be damaged."""
    return shutil.copytree(folders["base"], tmp_path / "broken")


def own(folder: Path) -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase]:
    return tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)


def test_rows_of_the_head_beyond_the_tokenizer_are_left_out(base: LanguageModel) -> None:
    assert base.model.lm_head.weight.shape[0] == len(base.tokenizer) + 16
    assert base.vocab_size == len(base.tokenizer)
    assert base.readout(torch.zeros(2, base.hidden_size)).shape == (2, len(base.tokenizer))


def test_the_final_norm_leads_from_the_last_block_to_the_head(base: LanguageModel) -> None:
    blocks = []
    hook = base.backbone.layers[-1].register_forward_hook(lambda _m, _i, out: blocks.append(out))
    final = base.states(IDS, torch.ones_like(IDS))[base.num_layers]
    hook.remove()
    raw = blocks[0] if isinstance(blocks[0], torch.Tensor) else blocks[0][0]
    torch.testing.assert_close(base.final_norm(raw), final)
    assert not torch.allclose(raw, final, atol=0.1)


def test_layers_are_the_embedding_the_residual_stream_and_the_input_of_the_head(base: LanguageModel) -> None:
    states = base.states(IDS, torch.ones_like(IDS), range(base.num_layers + 1))
    torch.testing.assert_close(states[0], base.model.get_input_embeddings()(IDS))
    after = base.backbone.layers[0](
        states[0],
        position_embeddings=base.backbone.rotary_emb(states[0], torch.arange(5)[None]),
        attention_mask=torch.full((5, 5), -torch.inf).triu(1)[None, None],
    )
    torch.testing.assert_close(states[1], after if isinstance(after, torch.Tensor) else after[0], atol=1e-5, rtol=1e-5)


def test_half_precision_is_read_in_float32(folders: dict[str, Path]) -> None:
    model = load(str(folders["base"]), device="cpu", dtype=torch.bfloat16)
    assert model.model.dtype == torch.bfloat16
    assert model.readout.weight.dtype == model.states(IDS, torch.ones_like(IDS))[3].dtype == torch.float32


def test_hashes_tell_heads_tokenizers_and_weights_apart(
    folders: dict[str, Path], base: LanguageModel, expert: LanguageModel, fresh: LanguageModel
) -> None:
    assert (fresh.head_hash, fresh.revision) == (base.head_hash, base.revision)
    assert expert.head_hash != base.head_hash and expert.revision != base.revision
    assert expert.tokenizer_hash == base.tokenizer_hash
    body = load(str(folders["base"]), device="cpu")
    body.model.model.layers[0].mlp.up_proj.weight.add_(1)
    assert body.head_hash == base.head_hash and body.revision != base.revision


def retokenized(model: LanguageModel, /, **changes: object) -> LanguageModel:
    """The model with parts of its tokenizer's file changed."""
    told = json.loads(model.tokenizer.backend_tokenizer.to_str()) | changes
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))
    return LanguageModel("changed", model.model, tokenizer)


def test_tokenizer_hash_is_of_what_decides_ids(base: LanguageModel, fresh: LanguageModel) -> None:
    told = json.loads(base.tokenizer.backend_tokenizer.to_str())
    for name, value in {
        "post_processor": None,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": None,
        "added_tokens": told["added_tokens"][:-1],
        "model": told["model"] | {"merges": told["model"]["merges"][:-1]},
    }.items():
        changed = retokenized(base, **{name: value})
        assert len(changed.tokenizer) == len(base.tokenizer) and changed.tokenizer_hash != base.tokenizer_hash, name
    assert retokenized(base, decoder=None).tokenizer_hash == base.tokenizer_hash
    # What one call asks for is no part of a tokenizer, though it stays in the file.
    fresh.tokenizer("The river", truncation=True, max_length=2, padding="max_length")
    assert json.loads(fresh.tokenizer.backend_tokenizer.to_str())["truncation"]["max_length"] == 2
    assert fresh.tokenizer_hash == base.tokenizer_hash


def test_a_tokenizer_without_pad_token_loads(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer(WORDS, 300)
    assert tokenizer.pad_token is None
    model = load(str(make(tmp_path / "phi", "Phi", tokenizer=tokenizer)), device="cpu")
    assert model.vocab_size == len(tokenizer)


def test_more_tokens_than_embeddings_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="more entries than the embedding"):
        model = load(str(make(tmp_path / "short", vocab_size=VOCAB - 50)), device="cpu")
    assert model.vocab_size == VOCAB - 50


class Louder(tf.LlamaForCausalLM):
    """A head that does something after its linear map which no config mentions."""

    def forward(self, **inputs: object) -> object:
        out = super().forward(**inputs)
        out.logits = out.logits * 1.5
        return out


def test_a_head_that_does_more_than_is_known_is_refused(folders: dict[str, Path]) -> None:
    model = Louder.from_pretrained(folders["base"])
    with refused("louder", "Louder", "logits"):
        LanguageModel("louder", model, tf.AutoTokenizer.from_pretrained(folders["base"]))


@pytest.mark.parametrize("change", [lambda x: x + x.new_ones(()).cumsum(0), lambda x: x.clamp(max=1.0), torch.sigmoid])
def test_whatever_the_head_does_is_noticed(folders: dict[str, Path], change: Callable) -> None:
    model, tokenizer = own(folders["base"])
    plain = model.lm_head.forward
    model.lm_head.forward = types.MethodType(lambda _self, hidden: change(plain(hidden)), model.lm_head)
    with refused("patched", "logits"):
        LanguageModel("patched", model, tokenizer)


def test_a_model_without_a_linear_head_is_refused(folders: dict[str, Path]) -> None:
    bare = tf.AutoModel.from_pretrained(folders["base"])
    with refused("LlamaModel", "head"):
        LanguageModel("bare", bare, tf.AutoTokenizer.from_pretrained(folders["base"]))


def test_weights_that_are_not_finite_are_called_that(folders: dict[str, Path]) -> None:
    model, tokenizer = own(folders["base"])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with refused("spoilt", "NaN"):
        LanguageModel("spoilt", model, tokenizer)


def test_unknown_names_and_folders_are_refused(tmp_path: Path) -> None:
    with refused("pocket-bsae", "bundled"):
        load("pocket-bsae")
    with refused(str(tmp_path / "nowhere")):
        load(str(tmp_path / "nowhere"))
    with refused(str(tmp_path), "config.json"):
        load(str(tmp_path))


def test_a_hub_id_without_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused("some-org/some-model", "network"):
        load("some-org/some-model")


def test_an_unknown_device_is_refused(folders: dict[str, Path]) -> None:
    with refused("abacus"):
        load(str(folders["base"]), device="abacus")


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _lose_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def _unknown_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_no_tokenizer, "tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (_lose_one_weight, "model.layers.1.mlp.up_proj.weight"),
        (_wrong_shape, "model.norm.weight"),
        (_cut("model.safetensors"), "loaded"),
        (_cut("tokenizer.json"), "loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "loaded"),
        (_unknown_kind, "abacus"),
    ],
    ids=["no tokenizer", "no weights", "a weight lost", "shape", "weights cut", "tokenizer cut", "config", "kind"],
)
def test_a_damaged_folder_is_refused(broken: Path, damage: Callable[[Path], None], word: str) -> None:
    damage(broken)
    with refused(str(broken), word):
        load(str(broken), device="cpu")


def test_the_shared_tokenizer_keeps_every_text(base: LanguageModel) -> None:
    """The tests below rest on a tokenizer that loses nothing, byte fallback included."""
    tokenizer = llama_tokenizer(WORDS, VOCAB)
    for text in (*WORDS, "naïve café — 東京\n\ttab"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and max(ids) < base.vocab_size


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "granite"])
def test_weights_carried_to_code_of_the_same_function_give_the_same_logits(base: LanguageModel, kind: str) -> None:
    twin = recast(base, kind)
    assert twin.model.config.model_type == kind and twin.tokenizer is base.tokenizer
    for model in (base, twin):
        assert model.num_layers == 3
    with torch.inference_mode():
        torch.testing.assert_close(twin.model(input_ids=IDS).logits, base.model(input_ids=IDS).logits)
    # Shards of activations are found by revision: the same weights in other code must not share theirs.
    assert twin.revision != base.revision


def test_random_weights_are_drawn_by_seed_and_leave_the_generator_alone(base: LanguageModel) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (recast(base, "gpt2", weights=False, seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(torch.rand(3), wanted)
    assert one.revision == again.revision != other.revision
    assert (one.hidden_size, one.num_layers, one.vocab_size) == (base.hidden_size, 3, base.vocab_size)
    copied, drawn = (recast(base, "mistral", weights).model.lm_head.weight for weights in (True, False))
    assert torch.equal(copied, base.model.lm_head.weight) and not torch.equal(drawn, copied)


def test_an_architecture_that_does_not_exist_or_fit_is_refused(base: LanguageModel) -> None:
    with refused("abacus", base.name):
        recast(base, "abacus")
    with refused("t5", base.name):  # an encoder and decoder: no causal model
        recast(base, "t5")


PLACES = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "layers.2": "disk", "norm": "cpu"}
PLACES = {f"model.{part}": place for part, place in (PLACES | {"rotary_emb": "cpu"}).items()}


@pytest.mark.parametrize("head", ["cpu", "disk"])
@pytest.mark.parametrize("begin", ["cpu", "disk"])
def test_a_model_spread_over_memory_and_disk_is_the_same_model(
    folders: dict[str, Path], base: LanguageModel, expert: LanguageModel, tmp_path: Path, head: str, begin: str
) -> None:  # fmt: skip
    where = PLACES | {"lm_head": head, "model.embed_tokens": begin}
    spread = load(str(folders["base"]), device_map=where, offload_folder=str(tmp_path / "offload"))
    away = [name for name, tensor in spread.model.state_dict().items() if tensor.is_meta]
    assert len(away) > 15 and spread.device == torch.device("cpu")
    assert (spread.revision, spread.head_hash) == (base.revision, base.head_hash)
    features, some = Features((3, 1, "block 2")), probe_set("math-text", n=16)
    one, other = (fit(gather(model, expert, some, features, progress=False), "ridge") for model in (base, spread))
    assert torch.equal(one.down @ one.up, other.down @ other.up)
    # With edits on the way, and at work in the port, which shares what is in memory and reads the rest from disk.
    shape = ((base.hidden_size, 0), (0, base.hidden_size), (base.hidden_size,))
    maps = (torch.full(size, 0.1) for size in shape)
    shift = Adapter("shift", 1, *maps, base.name, base.head_hash, space="hidden", onto="layer")
    v2 = replace(fit(harvest(spread, expert, some, "all", progress=False)), edits=(shift,))
    assert v2.revision == replace(fit(harvest(base, expert, some, "all", progress=False)), edits=(shift,)).revision
    tables = [evaluate(model, expert, v2, some, positions="all", allow_overlap=True) for model in (base, spread)]
    assert tables[0]["kl"].tolist() == tables[1]["kl"].tolist()
    written = []
    for model in (base, spread):
        port = Port(model)
        port.plug("v2", v2)
        port.use("v2")
        written.append(port.generate("The river", max_new_tokens=6))
    assert written[0] == written[1]


def test_a_map_of_devices_that_cannot_be_is_refused(folders: dict[str, Path]) -> None:
    with refused(str(folders["base"]), "loaded"):
        load(str(folders["base"]), device_map="everywhere")


SHORT = """
import resource, warnings
import torch
from chassis_utils import ChassisError, load
base = load("pocket-base", device="cpu")
ids = torch.randint(base.vocab_size, (32, 128), generator=torch.Generator().manual_seed(0))
def states():
    return torch.cat([state.flatten() for state in base.states(ids, torch.ones_like(ids)).values()])
whole = states()
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
for step in range(32):  # less room each time, until the whole batch has none
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_AS, (held + int(2 ** (28 - step / 4)), -1))
        try:
            found = states()
        except (ChassisError, RuntimeError):  # no room for one row, or for what is kept of all
            break
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if any("half of them at a time" in str(one.message) for one in caught):
        print(torch.allclose(found, whole, rtol=1e-4, atol=1e-5))
        break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_a_batch_that_memory_does_not_hold_goes_by_halves() -> None:
    # What is freed goes back at once, so that room is what is held and no more, however the heap has grown.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", SHORT], env=env, capture_output=True, text=True, check=False)
    assert (said.stdout.split(), said.returncode) == (["True"], 0), said.stderr[-800:]


def test_a_row_that_memory_does_not_hold_is_refused(base: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(base.backbone, "forward", full)
    with pytest.warns(UserWarning, match="half of them"), refused("memory does not suffice", "shorten the prompt"):
        base.states(IDS.expand(4, -1), torch.ones_like(IDS).expand(4, -1))
