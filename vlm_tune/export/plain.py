"""Models as plain transformers and peft load them: read from a folder, given an adapter, asked the same prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlm_tune.data.pictures.anyres import Spread
from vlm_tune.data.tiles import normalize
from vlm_tune.errors import CheckpointError
from vlm_tune.export.parity import NEW_TOKENS, Parity, precisely
from vlm_tune.export.peft_folder import PREFIX
from vlm_tune.model.build import Model
from vlm_tune.model.generate import Prompt, answering, embed_prompts, settings_of
from vlm_tune.model.kernels.lora import ADAPTER
from vlm_tune.model.layouts.pretrained import load_pretrained, read_settings
from vlm_tune.model.layouts.weights import listed


def read(folder: Path) -> PreTrainedModel:
    """Load a causal LM or a vision-language model in float32, whichever the folder declares."""
    has_pictures = hasattr(read_settings(AutoConfig, folder), "vision_config")
    kind = AutoModelForImageTextToText if has_pictures else AutoModelForCausalLM
    model: PreTrainedModel = load_pretrained(kind, folder, part="the model", dtype=torch.float32)
    return model.eval()


def wrap(model: nn.Module, config: PeftConfig, weights: dict[str, Tensor], folder: Path) -> PeftModel:
    """Add an adapter to a model, strictly; `weights` have the names of modules, without peft's prefix.

    Raises CheckpointError with peft's full reason if it does not fit, and with a list of weights that match nothing
    or are missing.
    """
    config.inference_mode = True
    problems: list[str] = []
    try:
        wrapped = PeftModel(model, config)  # type: ignore[arg-type]
        found = set_peft_model_state_dict(wrapped, {PREFIX + name: weight for name, weight in weights.items()})
    except KeyError as error:  # of a module to save
        problems = [f"{error.args[0]}: missing in the adapter"]
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"adapter={folder}: it does not fit this base ({error}). Name the base it was made for"
        ) from error
    else:
        places = {stored_name(name): each for name, each in wrapped.named_parameters(remove_duplicate=False)}
        strange = {stored_name(name) for name in found.unexpected_keys}
        lacking = {stored_name(name) for name in found.missing_keys if f".{ADAPTER}" in name}
        # a weight that two modules share is loaded once, for both
        shared = {n for n in strange & lacking if places[n].equal(weights[n.removeprefix(PREFIX)].to(places[n].dtype))}
        problems = [f"{name}: matches nothing in the base" for name in sorted(strange - shared)]
        problems += [f"{name}: missing in the adapter" for name in sorted(lacking - shared)]
    if problems:
        raise CheckpointError(
            f"adapter={folder}: it does not fit this base\n  {listed(problems)}\n  Name the base it was made for"
        )
    return wrapped.eval()


def stored_name(name: str) -> str:
    """Return a weight's name in peft's files, for a model that has an adapter."""
    return name.replace(f".{ADAPTER}", "")


@torch.no_grad()
def measure(plain: Any, model: Model, prompts: list[Prompt]) -> Parity:
    """Ask a plain model the prompts: logits at every position, in float64 as `Parity.measure` does, and the answers.

    A language model alone is given the embeddings that `model` computes for the pictures.
    """
    has_pictures = hasattr(plain.config, "vision_config")
    logits, answers = [], []
    with precisely(plain), precisely(plain if has_pictures else model.vlm):  # who embeds the pictures
        for prompt in prompts:
            inputs = picture_inputs(prompt, model, plain.dtype) if has_pictures else embedded(prompt, model)
            logits.append(plain(**inputs, use_cache=False).logits[0].float().cpu())  # (L, V)
    for prompt in prompts:
        inputs = picture_inputs(prompt, model, plain.dtype) if has_pictures else embedded(prompt, model)
        ids = plain.generate(**inputs, generation_config=settings_of(model, [prompt], NEW_TOKENS))[0]
        answers.append(ids[inputs["input_ids"].shape[1] if has_pictures else 0 :].tolist())
    return Parity(logits, answers)


def embedded(prompt: Prompt, model: Model) -> dict[str, Tensor]:
    """Embed a prompt with the trained encoder and projector."""
    with answering(model):
        embeddings, mask = embed_prompts(model, [prompt])
    return {"inputs_embeds": embeddings, "attention_mask": mask}


def picture_inputs(prompt: Prompt, model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a prompt's tokens and tiles as transformers' processors name them."""
    ids = torch.from_numpy(prompt.example.input_ids.astype(np.int64)).unsqueeze(0)  # (1, L)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not len(prompt.tiles):
        return inputs
    pixels = normalize(torch.from_numpy(prompt.tiles), model.vlm.normalization, dtype)  # (T, 3, H, W)
    if model.vlm.projector.newline is None:
        return inputs | {"pixel_values": pixels}
    return inputs | stack_pictures(pixels, prompt.example.spreads)


def stack_pictures(pixels: Tensor, spreads: Any) -> dict[str, Tensor]:
    """Give each any-resolution picture a row of its own: (T, 3, H, W) -> (_, _, 3, H, W), padded with zeros."""
    counts = [Spread(*spread).num_tiles for spread in spreads]
    rows = torch.nn.utils.rnn.pad_sequence(list(pixels.split(counts)), batch_first=True)
    sizes = torch.tensor([[spread.height, spread.width] for spread in spreads])
    return {"pixel_values": rows, "image_sizes": sizes}
