"""Adapters elsewhere: the card that shows their figures, the hub, `peft`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError
from safetensors.torch import save_file
from yaml import YAMLError

from .errors import ChassisError
from .files import replaceable, replacing
from .models import LanguageModel, load, located
from .solve import Gram

if TYPE_CHECKING:
    from .activations import Activations
    from .adapter import Adapter

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
SHOWN = "method rank split probes n kl kl_low kl_high recovered top1_agreement bits_per_byte".split()


class Exchange:
    """What leads an `Adapter` to other tools."""

    def without_intercept(self: Adapter, activations: Activations) -> Adapter:
        """The same map, its bias behind one more factor of the final state, nearest to 1 on these activations.

        By least squares: the best such map, if no rank was cut. Behind a LayerNorm with bias the factor is exact,
        behind an RMSNorm `evaluate` tells what it costs. ChassisError where `to_peft` has one.
        """
        _check_linear(self, activations.base)
        x = activations.hidden[activations.final].cpu()
        gram = Gram.of(x, x[:, :0])
        gram.xx.diagonal().mul_(1 + 1e-9).add_(1e-30)  # states behind a LayerNorm span one dimension less
        constant = torch.linalg.solve(gram.xx, gram.x).to(self.down)
        # First, so that a cut keeps it.
        down, up = torch.cat([constant[:, None], self.down], dim=1), torch.cat([self.bias[None], self.up])
        return replace(self, down=down, up=up, bias=torch.zeros_like(self.bias), values=None)

    def to_peft(self: Adapter, folder: str | Path, base: LanguageModel | None = None) -> Path:
        """Write the same map as a LoRA (:cite:`hu2021lora`) of the base's head; the base is loaded unless given.

        Any adapter that is affine in the final state has one. Its intercept becomes `lora_bias`, with which `peft`
        merges only where the head has a bias, and which it drops from `add_weighted_adapter`; vLLM refuses it. For
        these, export it `without_intercept`. A head that is tied to the embedding must be untied before a merge.
        ChassisError for any other adapter, naming what it has that a LoRA of the head has not.
        """
        base = load(self.base_name) if base is None else base
        _check_linear(self, base)
        folder = replaceable(folder, ("adapter_config.json", "adapter_model.safetensors"))
        head, readout = base.model.get_output_embeddings(), base.readout
        name = next(name for name, module in base.model.named_modules() if module is head)
        weight, down = readout.weight.cpu().double().T, self.down.cpu().double()
        both = torch.cat([self.up, self.bias[None]]).cpu().double()
        if self.space == "hidden":
            both = both @ weight
        elif self.columns is not None:
            both = both.new_zeros(len(both), base.vocab_size).index_copy_(1, self.columns.cpu(), both)
        if self.onto == "nothing":  # in place of the base's logits is beside them, less them
            if self.space == "logits" and readout.bias is not None:
                both[-1] -= readout.bias.cpu()
            down, both = torch.eye(len(down)).double(), torch.cat([down @ both[:-1] - weight, both[-1:]])
        if not down.shape[1]:  # a bias alone: peft knows no rank of zero
            down, both = down.new_zeros(len(down), 1), torch.cat([torch.zeros_like(both), both])
        rows = torch.zeros(len(head.weight), len(both))
        rows[: base.vocab_size] = both.T / readout.scale
        tensors = {"lora_A.weight": down.T.float().contiguous(), "lora_B.weight": rows[:, :-1].contiguous()}
        tensors |= {"lora_B.bias": rows[:, -1].clone()} if rows[:, -1].any() else {}
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "bias": "none"}
        config |= {"r": down.shape[1], "lora_alpha": down.shape[1], "target_modules": [name], "inference_mode": True}
        config["lora_bias"] = "lora_B.bias" in tensors
        with replacing(folder) as new:
            new.mkdir(parents=True)
            tensors = {f"base_model.model.{name}.{part}": tensor for part, tensor in tensors.items()}
            save_file(tensors, new / "adapter_model.safetensors")
            (new / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        return folder


def _check_linear(adapter: Adapter, base: LanguageModel) -> None:
    """Refuse what is no affine function of the state that the base's head reads, and say why."""
    adapter.check_base(base)
    others = ", ".join(sorted({*map(str, adapter.reads), str(adapter.layer)} - {str(base.num_layers)}))
    why = {f"{len(adapter.edits)} edits of earlier layers": adapter.edits, "a base that is edited itself": base.edits}
    why |= {f"inputs beside the final state ({others:.80})": others}
    why |= {"random features": adapter.features and adapter.features.random}
    if has := " and ".join(reason for reason, there in why.items() if there):
        instead = "fit(activations, 'rrr', metric='kl'), or for a ForeignExpert harvest(..., layers=[-1]), gives one"
        raise ChassisError(f"this {adapter.method} adapter is no map of the head, it has {has}: {instead}")


@contextmanager
def refusing(wrong: str, advice: str) -> Iterator[None]:
    """Say in one line that something from outside cannot be used."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ChassisError(f"{wrong} ({type(error).__name__}): {advice}") from error
    except ChassisError as error:
        raise ChassisError(f"{wrong} ({error!s:.200}): {advice}") from error


def found(name: str | Path, revision: str | None = None) -> tuple[Path, Path]:
    """A local folder, or a repository's files in the hub's cache; and the folder that they must not leave."""
    with refusing(f"{name!r:.80} is no name of a folder", "give one, or an id of the hub"):
        folder = Path(name)
        if folder.exists() or not re.fullmatch(_REPOSITORY, str(name)):
            return folder, folder
    with refusing(f"{name} is no folder, and the hub gave nothing", "check the id, the revision and the network"):
        files = ["adapter.json", "adapter.safetensors"]
        snapshot = Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    return snapshot, snapshot.parents[1]  # its files are links into the repository's part of the cache


def licence(expert: Any) -> str:
    """Licence that the card in an expert's own folder names, or `unknown`."""
    with suppress(ChassisError, OSError, ValueError, TypeError, LookupError, AttributeError, YAMLError):
        own = expert.bridge.expert if hasattr(expert, "bridge") else expert
        return " ".join(str(metadata_load(Path(located(own.name)) / "README.md")["license"]).split())[:80]
    return "unknown"


def card(adapter: Adapter, figures: pd.DataFrame | None = None) -> str:
    """Front matter, settings, and of `evaluate` the adapter's and the identity's rows; ChassisError: there are none."""
    name, told = adapter.base_name, str(adapter.info.get("licence") or "unknown")
    on_hub = re.fullmatch(_REPOSITORY, name) and not Path(name).exists()
    data = {"library_name": "chassis-utils", "tags": ["closed-form", "adapter"], "license": told}
    front = ModelCardData(base_model=name if on_hub else None, **data).to_yaml()
    settings = {"method": adapter.method, "rank": adapter.rank, "numbers": adapter.num_parameters, "base": name}
    settings |= {"reads": ", ".join(map(str, adapter.reads)), "edits": len(adapter.edits)} | adapter.info
    parts = {"method": _cell(adapter.method), "base": _cell(name), "front": front}
    parts |= {"settings": _table([{"setting": k, "value": v} for k, v in settings.items()]), "figures": "None yet."}
    if not isinstance(figures, pd.DataFrame | None):
        raise ChassisError(f"figures is a {type(figures).__name__}: give the table that evaluate returns")
    if figures is not None:
        rows = figures[[k for k in SHOWN if k in figures]].to_dict("records")
        if not (own := [row for row in rows if (row["method"], row["rank"]) == (adapter.method, adapter.rank)]):
            raise ChassisError(f"figures has no row of {adapter.method} at rank {adapter.rank}: evaluate this adapter")
        parts["figures"] = _table([*(row for row in rows if row["method"] == "identity"), *own])
    return Path(__file__).with_name("card.md").read_text(encoding="utf-8").format(**parts)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """A value as one line of markdown that is text and nothing else, whatever is in it."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.5g}"
    return re.sub(r"[^A-Za-z0-9 ]", lambda one: f"&#{ord(one[0])};", " ".join(str(value).split())[:200])
