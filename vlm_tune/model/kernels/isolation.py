"""Refuse a language model for which packing, or a loss from its head alone, would be silently wrong."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_tune.config.schema import Config
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels.attention import Segments

# Tested against plain transformers (tests/model/test_language_models.py); any other kind proves itself when it loads.
TESTED = ("llama", "internlm3", "qwen2", "qwen3", "qwen3_moe", "phi3", "mistral", "gemma", "gemma3_text", "smollm3")
# What a layer or the head does besides a product with its weights; each is off if it is None, 0 or 1.
UNKNOWN_TO_US = {
    "attn_logit_softcapping": "caps its attention scores",
    "final_logit_softcapping": "caps its logits",
    "logits_scaling": "scales its logits",
    "logit_scale": "scales its logits",
}
LENGTHS = (5, 8)  # tokens of the two samples of the proof
TOLERANCE = 0.1  # of the spread of what is compared: rounding is far below it, another sample's words far above


def check_language_model(llm: PreTrainedModel) -> None:
    """Raise ConfigError for a model whose packed samples would not have the logits that each has alone."""
    kind = llm.config.model_type
    for key, reason in UNKNOWN_TO_US.items():
        if getattr(llm.config, key, None) not in (None, 0, 1):
            raise ConfigError(
                f"model.llm: {kind} {reason} ({key}={getattr(llm.config, key)} in its config.json), which packed "
                f"attention and the loss do not: its logits would be wrong. Choose one of {', '.join(TESTED)}"
            )
    if any(name.endswith(".sinks") for name, _ in llm.named_parameters()):
        raise ConfigError(
            f"model.llm: {kind} attends to sinks beside its tokens, which packed attention does not: its logits would "
            f"be wrong. Choose one of {', '.join(TESTED)}"
        )
    if kind not in TESTED and not is_isolating(llm):
        raise ConfigError(
            f"model.llm: a language model of type {kind} does not keep packed samples apart, or its head does more "
            f"than a product: its logits would be wrong. Choose one of {', '.join(TESTED)}"
        )


@torch.no_grad()
def is_isolating(llm: PreTrainedModel) -> bool:
    """Run two short samples packed and alone: do the head's logits of the pack equal the model's own?"""
    mode, device = llm.training, llm.get_input_embeddings().weight.device
    llm.eval()
    ids = torch.arange(1, 1 + sum(LENGTHS), device=device).unsqueeze(0)
    embeddings = llm.get_input_embeddings()(ids)
    positions = torch.cat([torch.arange(length, device=device) for length in LENGTHS]).unsqueeze(0)
    segments = Segments(list(LENGTHS))
    packed = llm.get_decoder()(
        inputs_embeds=embeddings, position_ids=positions, segments=segments, use_cache=False
    ).last_hidden_state
    found: Tensor = llm.get_output_embeddings()(packed).float()
    alone = [llm(input_ids=sample, use_cache=False).logits for sample in ids.split(LENGTHS, dim=1)]
    wanted = torch.cat(alone, dim=1).float()
    llm.train(mode)
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.std())


def check_rope(llm: PreTrainedModel, config: Config) -> None:
    """Raise ConfigError where one long sample of a batch would change the rotary frequencies of its neighbours.

    "longrope" (Phi-3 128k) and "dynamic" (InternLM2) choose them by the longest sample that they see.
    """
    limit, stage = frequency_limit(llm.config), config.stage
    several = stage.pack_length if stage.packing else config.data.max_length * (config.trainer.micro_batch > 1)
    longest = min(several, config.data.max_length)
    if limit is not None and longest > limit:
        smaller = f"stage.pack_length={limit}" if stage.packing else "trainer.micro_batch=1"
        raise ConfigError(
            f"samples of up to {longest} tokens share a batch, but beyond {limit} tokens this language model changes "
            f"its rotary frequencies for the whole batch: set {smaller} or data.max_length={limit}"
        )


def frequency_limit(config: Any) -> int | None:
    """Return the length up to which the rotary frequencies stay as they are; None where they always do."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return int(config.max_position_embeddings) if kind == "dynamic" else None
