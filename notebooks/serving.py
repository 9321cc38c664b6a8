"""What vLLM would say to an adapter in the format of `peft`, read off its own documents and code."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ROWS = 258_048


def vllm_refuses(folder: str | Path, max_lora_rank: int = 16) -> list[str]:
    """Why vLLM, started with this `--max-lora-rank`, would not serve what `to_peft` wrote; empty if nothing is known.

    Source: vLLM's repository. Ranks that `--max-lora-rank` takes, 16 unless given: `vllm/config/lora.py`
    (`MaxLoRARanks`). A rank above it, `bias`, `modules_to_save` and DoRA are refused: `vllm/lora/peft_helper.py`
    (`validate_legal`). Tensors are `lora_A.weight` and `lora_B.weight` and nothing else: `vllm/lora/utils.py`
    (`parse_fine_tuned_lora_name`); the option that once let a bias through is gone. Of modules outside the linear maps
    of blocks, those that a model declares in `embedding_modules`, as most declare `lm_head`: the same file
    (`get_supported_lora_modules`). Rows of the head: `vllm/lora/layers/logits_processor.py`. Whether the base is one of
    the models that support LoRA, and declares its `lm_head`, is in vLLM's list of supported models, not in the folder.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        rows = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}
    rank, module, why = config["r"], config["target_modules"][0], []
    if rank > max_lora_rank:
        enough = next((str(one) for one in RANKS if one >= rank), None)
        way = f"start it with --max-lora-rank {enough}" if enough else f"cut it to {RANKS[-1]} with at_rank"
        why.append(f"rank {rank} is above max_lora_rank = {max_lora_rank}: {way}")
    if any(name.endswith(".bias") for name in rows):
        why.append("it has a bias, a tensor that vLLM does not read: export without_intercept(activations)")
    if module.split(".")[-1] != "lm_head":
        why.append(f"it changes {module}, and vLLM's models that support LoRA call their head lm_head: merge it")
    if max(rows.values()) > ROWS:
        why.append(f"the head has {max(rows.values()):,} rows, and vLLM adapts at most {ROWS:,}: merge it")
    return why
