"""Adapters elsewhere: a card that shows their figures, the hub, `peft`, vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCardData, create_repo, snapshot_download, try_to_load_from_cache, upload_folder
from huggingface_hub.repocard import metadata_load
from safetensors import safe_open
from safetensors.torch import save_file
from yaml import YAMLError

from .activations import Activations
from .adapter import Adapter
from .errors import ChassisError
from .models import LanguageModel, load, located, logit_scale
from .records import replacing
from .solve import Gram

SHOWN = "method rank split probes n kl kl_low kl_high recovered top1_agreement bits_per_byte".split()
MOST_RANK, MOST_ROWS = 512, 258_048  # of vLLM, see `vllm_refuses`


def licence(expert: Any) -> str | None:
    """Licence that the card of an expert names, in its folder or the hub's cache; `unknown`; None if it is no model."""
    model = expert if isinstance(expert, LanguageModel) else getattr(expert, "model", None)
    if not isinstance(model, LanguageModel):
        return None
    with suppress(ChassisError, OSError, ValueError, TypeError, LookupError, YAMLError):
        folder = Path(located(model.name))
        card = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(str(folder), "README.md")
        return str(metadata_load(card)["license"])
    return "unknown"


def _cell(value: Any) -> str:
    """A value as one line of markdown that is only text, whatever is in it."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.5g}"
    return re.sub(r"[^A-Za-z0-9 ]", lambda one: f"&#{ord(one[0])};", " ".join(str(value).split())[:200])


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card(adapter: Adapter, figures: pd.DataFrame | None = None) -> str:
    """The card of an adapter: front matter, settings, and the rows of `evaluate` that are its own or the identity's.

    ChassisError where `figures` holds no row of this adapter.
    """
    told = {k: " ".join(str(adapter.info.get(k) or "").split())[:80] for k in ("licence", "expert")}
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", adapter.base_name, re.ASCII) and not Path(adapter.base_name).exists()
    data = ModelCardData(
        base_model=adapter.base_name if on_hub else None, library_name="chassis-utils", license=told["licence"] or None,
        tags=["chassis", "closed-form", "adapter"],
    )  # fmt: skip
    title = f"# {_cell(adapter.method)}: {_cell(told['expert'] or 'an expert')} on {_cell(adapter.base_name)}"
    use = "```python\nfrom chassis_utils import Adapter, load\n\nadapter = Adapter.load(here, load(base))\n```"
    settings = {"method": adapter.method, "rank": adapter.rank, "numbers": adapter.num_parameters} | adapter.info
    settings |= {"reads": ", ".join(map(str, adapter.reads)), "edits of earlier layers": len(adapter.edits)}
    parts = [title, "A map beside a frozen model, solved in closed form. No code comes with it.", use, "## Fit"]
    parts.append(_table([{"setting": key, "value": value} for key, value in settings.items()]))
    if figures is not None:
        rows = figures[[name for name in SHOWN if name in figures]].to_dict("records")
        own = [row for row in rows if (row["method"], row["rank"]) == (adapter.method, adapter.rank)]
        if not own:
            raise ChassisError(f"figures has no row of {adapter.method} at rank {adapter.rank}: evaluate this adapter")
        parts += ["## Figures", _table([*(row for row in rows if row["method"] == "identity"), *own])]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """Say in one line what the hub did not do."""
    try:
        yield
    except ChassisError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        wrong = f"{name}: the hub gave and took nothing ({type(error).__name__})"
        raise ChassisError(f"{wrong}: check the id, the revision, the network and `hf auth login`") from error


def found(name: str | Path, revision: str | None = None) -> tuple[Path, Path]:
    """A local folder, or a repository's files in the hub's cache; and the folder that they must not leave."""
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        return folder, folder
    with _hub(str(name)):
        files = ["adapter.json", "adapter.safetensors"]
        snapshot = Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    return snapshot, snapshot.parents[1]  # its files are links into the repository's part of the cache


def push(adapter: Adapter, repo_id: str, figures: pd.DataFrame | None, private: bool | None) -> str:
    """See `Adapter.push`."""
    with TemporaryDirectory() as folder, _hub(repo_id):
        adapter.save(Path(folder) / "adapter", figures)
        create_repo(repo_id, private=private, exist_ok=True)
        return upload_folder(repo_id=repo_id, folder_path=Path(folder) / "adapter").oid


def without_intercept(adapter: Adapter, activations: Activations) -> Adapter:
    """See `Adapter.without_intercept`."""
    _check_linear(adapter, activations.base)
    x = activations.hidden[activations.final].cpu()
    gram = Gram.of(x, x[:, :0])
    gram.xx.diagonal().mul_(1 + 1e-9)  # states behind a LayerNorm span one dimension less
    constant = torch.linalg.solve(gram.xx, gram.x).to(adapter.down)
    # First, so that a cut keeps it.
    down, up = torch.cat([constant[:, None], adapter.down], dim=1), torch.cat([adapter.bias[None], adapter.up])
    return replace(adapter, down=down, up=up, bias=torch.zeros_like(adapter.bias), values=None)


def _check_linear(adapter: Adapter, base: LanguageModel) -> None:
    """Refuse what is no affine function of the state that the head of the base reads, and say why."""
    others = sorted({*map(str, adapter.reads), str(adapter.layer)} - {str(base.num_layers)})
    why = [f"{len(adapter.edits)} edits of earlier layers"] * bool(adapter.edits)
    why += [f"an input other than the final state ({', '.join(others)[:80]})"] * bool(others)
    why += ["random features"] * bool(adapter.features and adapter.features.random)
    why += ["a base that is edited itself"] * bool(base.edits)
    if why:
        instead = "fit(activations, 'rrr', metric='kl'), or for a ForeignExpert harvest(..., layers=[-1]), gives one"
        raise ChassisError(f"this {adapter.method} adapter is no map of the head: it has {' and '.join(why)}: {instead}")
    adapter.check_base(base)


def to_peft(adapter: Adapter, folder: str | Path, base: LanguageModel | None) -> Path:
    """See `Adapter.to_peft`."""
    base = load(adapter.base_name) if base is None else base
    _check_linear(adapter, base)
    if Path(folder).exists() and not (Path(folder) / "adapter_config.json").is_file():
        raise ChassisError(f"{folder} exists and is no folder of peft: choose another name")
    readout, head = base.readout, base.model.get_output_embeddings()
    name = next(name for name, module in base.model.named_modules() if module is head)
    weight = readout.weight.cpu().double().T
    down, up, bias = (part.cpu().double() for part in (adapter.down, adapter.up, adapter.bias))
    if adapter.space == "hidden":
        up, bias = up @ weight, bias @ weight
    elif adapter.columns is not None:
        spread = torch.zeros(len(up) + 1, base.vocab_size, dtype=torch.float64)
        up, bias = spread.index_copy_(1, adapter.columns.cpu(), torch.cat([up, bias[None]])).split([len(up), 1])
    if adapter.onto == "nothing":
        # In place of the base's logits is beside them, less them.
        down, up = torch.eye(len(down), dtype=torch.float64), down @ up - weight
        if adapter.space == "logits" and readout.bias is not None:
            bias = bias - readout.bias.cpu()
    rank = max(1, down.shape[1])  # of a bias alone too
    scale, tensors = logit_scale(base.model), {"lora_A.weight": torch.zeros(rank, len(down))}
    tensors |= {"lora_B.weight": torch.zeros(len(head.weight), rank), "lora_B.bias": torch.zeros(len(head.weight))}
    tensors["lora_A.weight"][: down.shape[1]] = down.T
    tensors["lora_B.weight"][: base.vocab_size, : down.shape[1]] = up.T / scale
    tensors["lora_B.bias"][: base.vocab_size] = bias.reshape(-1) / scale
    if not (intercept := bool(bias.any())):
        del tensors["lora_B.bias"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "bias": "none"}
    config |= {"r": rank, "lora_alpha": rank, "target_modules": [name], "lora_bias": intercept, "inference_mode": True}
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file({f"base_model.model.{name}.{k}": t for k, t in tensors.items()}, temporary / "adapter_model.safetensors")
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return Path(folder)


def vllm_refuses(folder: str | Path, max_lora_rank: int = 16) -> list[str]:
    """Why vLLM, started with `--max-lora-rank`, would not serve what `to_peft` wrote; empty if it would.

    Source: its code of 2026: ranks in `vllm/config/lora.py` and `lora/peft_helper.py` (`validate_legal`), names of
    tensors in `lora/utils.py` (`parse_fine_tuned_lora_name` knows no bias), heads as `embedding_modules` of its models
    (`lm_head`), rows of the head in `lora/layers/logits_processor.py`. One model more: the base must be one of its
    `SupportsLoRA` whose head is among those.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        rows = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}
    most, why = max(rows.values()), []
    if config["r"] > max_lora_rank:
        way = f"start it with more, at most {MOST_RANK}" if config["r"] <= MOST_RANK else "cut it with at_rank"
        why.append(f"rank {config['r']} is above max_lora_rank {max_lora_rank}: {way}")
    if any(name.endswith(".bias") for name in rows):
        why.append("it has an intercept, a tensor that vLLM does not know: export adapter.without_intercept(activations)")
    if [name for name in config["target_modules"] if name.split(".")[-1] != "lm_head"]:
        why.append(f"it changes {config['target_modules'][0]}, and vLLM knows a head as lm_head: merge it instead")
    if most > MOST_ROWS:
        why.append(f"the head has {most:,} rows, vLLM adapts at most {MOST_ROWS:,}: merge it instead")
    return why
