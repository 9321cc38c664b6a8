"""Small real models, made from configs with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as tf

from chassis_utils import Activations, ChassisError, LanguageModel, Probes, harvest, load
from plugs import SyntheticExpert
from pocket_recipe import llama_tokenizer
from records import _NAMES, _missing

VOCAB = 400
WORDS = [
    "The river rises in the hills and runs past nine towns before it meets the sea at last.",
    "What is 12 + 13? Explain entropy in one sentence. #7 In physics, force equals mass times acceleration.",
    "Question: A baker has 24 rolls and sells 9. How many are left? Answer: 24 - 9 = 15 rolls are left.",
]

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

#: Architecture -> arguments of its config; together they cover every habit of the readout that is known.
ARCHITECTURES: dict[str, dict] = {
    "Llama": _SMALL | {"num_key_value_heads": 2},
    "Mistral": _SMALL | {"num_key_value_heads": 2},
    "Qwen2": _SMALL | {"num_key_value_heads": 2},
    "Qwen3": _SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "Phi": _SMALL,
    "Phi3": _SMALL | {"num_key_value_heads": 2, "pad_token_id": 0},
    "GPT2": _GPT,
    "GPTNeoX": _SMALL,
    "GPTJ": _GPT | {"rotary_dim": 4},
    "OPT": {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
    },
    "Falcon": _SMALL,
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Gemma2": _SMALL | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "Olmo2": _SMALL,
    "Cohere": _SMALL | {"logit_scale": 0.25},
    "StableLm": _SMALL | {"num_key_value_heads": 4},
    "Granite": _SMALL | {"logits_scaling": 4.0, "num_key_value_heads": 2},
    "Starcoder2": _SMALL | {"num_key_value_heads": 2},
    "Mixtral": _SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": _SMALL
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
    | {"n_group": 1, "topk_group": 1, "bos_token_id": 1, "eos_token_id": 2},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: files that run side by side then end together."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def make(
    folder: Path,
    architecture: str = "Llama",
    seed: int = 0,
    tokenizer: tf.PreTrainedTokenizerBase | None = None,
    **changes: object,
) -> Path:
    """A model folder with random weights and, unless another is given, the shared tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or llama_tokenizer(WORDS, VOCAB)
    options = ARCHITECTURES[architecture] | {"vocab_size": len(tokenizer) + 16} | changes
    config = getattr(tf, f"{architecture}Config")(**options)
    model = tf.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        # Default initial weights are so small that every model says the same at every position.
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Bad input: one line that names every one of `words`."""
    with pytest.raises(ChassisError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "base": make(root / "base", num_hidden_layers=3),
        "expert": make(root / "expert", seed=1, num_hidden_layers=2),
    }


@pytest.fixture(scope="session")
def base(folders: dict[str, Path]) -> LanguageModel:
    return load(str(folders["base"]), device="cpu")


@pytest.fixture(scope="session")
def expert(folders: dict[str, Path]) -> LanguageModel:
    return load(str(folders["expert"]), device="cpu")


@pytest.fixture(scope="session")
def prompts() -> Probes:
    """Prompts of very different lengths."""
    texts = [f"The {'river ' * (i % 7)}rises in year {i}, and {i % 3} towns" for i in range(90)]
    return Probes("rivers", "train", tuple(texts))


@pytest.fixture(scope="session")
def unseen() -> Probes:
    """Prompts that are not among `prompts`."""
    texts = [f"In {i} the {'old ' * (i % 5)}council met, force equals mass times {i}" for i in range(40)]
    return Probes("council", "test", tuple(texts))


@pytest.fixture(scope="session")
def activations(base: LanguageModel, expert: LanguageModel, prompts: Probes) -> Activations:
    """Every layer of `base` and a real expert, last positions."""
    return harvest(base, expert, prompts, progress=False)


@pytest.fixture(scope="session")
def synthetic(base: LanguageModel) -> SyntheticExpert:
    return SyntheticExpert.from_base(base, rank=4, strength=2.0)


@pytest.fixture
def fresh(folders: dict[str, Path]) -> LanguageModel:
    """A copy of `base` that a test may damage."""
    return load(str(folders["base"]), device="cpu")


def walk(browser: Any, site: Path, pages: dict[str, int], *widths: int) -> Iterator[tuple[str, int, str, Any]]:
    """Open each page from disk at the first width, go on to the others, and show it in either theme.

    It must draw this number of plots, fit the window, fail nowhere, complain nowhere and stay offline.
    """
    context = browser.new_context(viewport={"width": widths[0], "height": 844})
    context.set_default_timeout(60_000)
    faults: list[str] = []
    for name, plots in pages.items():
        page = context.new_page()
        page.on("pageerror", lambda error, name=name: faults.append(f"{name}: {error}"))
        page.on("console", lambda said, name=name: said.type == "error" and faults.append(f"{name}: {said.text}"))
        page.on("requestfailed", lambda request, name=name: faults.append(f"{name}: not found: {request.url}"))
        page.on("request", lambda request: request.url.startswith("http") and faults.append(request.url))
        page.goto((site / f"{name}.html").as_uri())
        page.add_style_tag(content="* { transition: none !important }")  # no colour is judged on its way to another
        page.wait_for_function(f"document.querySelectorAll('.chassis-plot[data-drawn]').length === {plots}")
        page.wait_for_function("!document.querySelector('.math') || document.querySelector('mjx-container')")
        for width, theme in product(widths, ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=theme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} scrolls sideways at {width}: {wide}"
            # The plots must fit as well as the page, and captions into the frames of tables that do not.
            boxes = page.locator(".main-svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
            assert all(box <= width for box in boxes), f"a plot of {name} is wider than {width}"
            wider = "one.offsetWidth > one.closest('.table-scroll, .text_html').clientWidth"
            told = f"all => all.filter(one => {wider}).map(one => one.textContent)"
            cut = page.locator(".cell_output caption").evaluate_all(told)
            assert not cut, f"captions of {name} are cut at {width}: {cut}"
            yield name, width, theme, page
        page.close()
    context.close()
    assert not faults


def same(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """Differences between two sets of records, one line each; none if equal.

    `time` and `git` may differ, and so may the values of `seconds` and `ratio`.
    """

    def rows(frame: pd.DataFrame) -> dict[str, dict[str, object]]:
        found = {}
        for row in frame.to_dict("records"):
            timing = row["metric"] in ("seconds", "ratio")
            names = ("value", "reported", "versions", "revision")[timing:]
            label = " ".join(f"{name}={row[name]}" for name in _NAMES if not _missing(row[name]))
            found[label] = {name: None if _missing(row[name]) else row[name] for name in names}
        return found

    left, right = rows(a), rows(b)
    found = [f"only in the first: {k}" for k in left if k not in right]
    found += [f"only in the second: {k}" for k in right if k not in left]
    both = [(k, name, one, right[k][name]) for k in left if k in right for name, one in left[k].items()]
    return found + [f"{k}: {name} {one} against {two}" for k, name, one, two in both if one != two]
