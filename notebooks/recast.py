"""A base's weights in the code of another architecture: does a result hang on the one it was found on?"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chassis_utils import ChassisError, LanguageModel

#: What `recast` takes over from a config, where it is there.
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()


def recast(base: LanguageModel, model_type: str, weights: bool = True, seed: int = 0) -> LanguageModel:
    """A model of another architecture (`mistral`, `gpt2`, ...) with a base's sizes and tokenizer; no edits.

    Weights of the same name and shape are copied; the rest, or without `weights` all, are drawn by `seed`.

    Raises:
        ChassisError: no such architecture, or one that these sizes or this package do not fit.
    """
    own = base.model.config.get_text_config().to_dict()
    config = {name: own[name] for name in _SIZES if own.get(name) is not None}
    try:
        # OPT's names, and the scale of attention that Granite leaves open.
        config |= {"word_embed_proj_dim": base.hidden_size, "ffn_dim": own["intermediate_size"]}
        config |= {"attention_multiplier": (base.hidden_size // own["num_attention_heads"]) ** -0.5}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            other = AutoConfig.for_model(model_type, **config)
            model = AutoModelForCausalLM.from_config(other, dtype=base.model.dtype).to(base.device)
        ours, drawn = base.model.state_dict() if weights else {}, model.state_dict()
        model.load_state_dict(drawn | {k: t for k, t in ours.items() if k in drawn and t.shape == drawn[k].shape})
        return LanguageModel(f"{base.name} as {model_type}{'' if weights else ', random'}", model, base.tokenizer)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ChassisError(f"{base.name} cannot be recast as '{model_type}': {reason}") from error
