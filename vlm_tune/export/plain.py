"""Models as plain transformers and peft load them: read from a folder, put under an adapter, asked the same prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlm_tune.data.anyres import Spread
from vlm_tune.data.tiles import normalize
from vlm_tune.errors import CheckpointError
from vlm_tune.export.parity import NEW_TOKENS, Parity, precisely
from vlm_tune.model.build import Model
from vlm_tune.model.generate import Prompt, answering, embed_prompts, greedy


def read(folder: Path, config: Any) -> PreTrainedModel:
    """Load a causal LM or a vision-language model in float32, whichever the folder says it is."""
    has_pictures = hasattr(config, "vision_config")
    kind = AutoModelForImageTextToText if has_pictures else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """Put an adapter beside its layers; raise CheckpointError for weights that match nothing, or that are missing."""
    try:
        wrapped = PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0][:300]
        raise CheckpointError(
            f"adapter={folder}: it does not fit this base ({reason}). Name the base it was made for"
        ) from error
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"adapter={folder}: there is no adapter_model.safetensors in it. Save it as safetensors")
    stored, wanted = set(load_file(file)), set(get_peft_model_state_dict(wrapped))
    problems = [f"{name}: matches nothing in the base" for name in sorted(stored - wanted)]
    problems += [f"{name}: missing in the adapter" for name in sorted(wanted - stored)]
    if problems:
        listed = "\n  ".join(problems[:10]) + (f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(
            f"adapter={folder}: it does not fit this base\n  {listed}\n  Name the base it was made for"
        )
    return wrapped


@torch.no_grad()
def measure(plain: Any, model: Model, prompts: list[Prompt]) -> Parity:
    """Ask a plain model the prompts: logits at every position, in float64 as `Parity.measure` does, and the answers.

    A language model alone is given the embeddings that `model` makes of the pictures.
    """
    has_pictures = hasattr(plain.config, "vision_config")
    logits, answers = [], []
    with precisely(plain), precisely(plain if has_pictures else model.vlm):  # who embeds the pictures
        for prompt in prompts:
            inputs = picture_inputs(prompt, model, plain.dtype) if has_pictures else embedded(prompt, model)
            logits.append(plain(**inputs, use_cache=False).logits[0].float().cpu())  # (L, V)
    for prompt in prompts:
        inputs = picture_inputs(prompt, model, plain.dtype) if has_pictures else embedded(prompt, model)
        ids = plain.generate(**inputs, generation_config=greedy(model, [prompt], NEW_TOKENS))[0]
        answers.append(ids[inputs["input_ids"].shape[1] if has_pictures else 0 :].tolist())
    return Parity(logits, answers)


def embedded(prompt: Prompt, model: Model) -> dict[str, Tensor]:
    """Embed a prompt with the trained encoder and projector."""
    with answering(model):
        embeddings, mask = embed_prompts(model, [prompt])
    return {"inputs_embeds": embeddings, "attention_mask": mask}


def picture_inputs(prompt: Prompt, model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name a prompt's tokens and tiles as the processors of transformers do."""
    ids = torch.from_numpy(prompt.example.input_ids.astype(np.int64)).unsqueeze(0)  # (1, L)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not len(prompt.tiles):
        return inputs
    pixels = normalize(torch.from_numpy(prompt.tiles), model.vlm.normalization, dtype)  # (T, 3, H, W)
    if model.vlm.projector.newline is None:
        return inputs | {"pixel_values": pixels}
    return inputs | stack_pictures(pixels, prompt.example.spreads)


def stack_pictures(pixels: Tensor, spreads: Any) -> dict[str, Tensor]:
    """Give each any-resolution picture a row of its own: (T, 3, H, W) -> (_, _, 3, H, W), filled up with zeros."""
    counts = [Spread(*spread).num_tiles for spread in spreads]
    rows = torch.nn.utils.rnn.pad_sequence(list(pixels.split(counts)), batch_first=True)
    sizes = torch.tensor([[spread.height, spread.width] for spread in spreads])
    return {"pixel_values": rows, "image_sizes": sizes}
