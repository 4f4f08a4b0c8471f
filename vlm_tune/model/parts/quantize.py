"""Storage of a frozen language model in 4 or 8 bits by bitsandbytes, weight by weight as they are read."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_tune.config.schema import Quantize
from vlm_tune.model.parts.llm import quantization, refuse_experts


def use_quantized_layers(llm: PreTrainedModel, dtype: torch.dtype, quantize: Quantize) -> None:
    """Replace the linear layers of a model without weights by bitsandbytes', if asked for; the head stays as it is."""
    if quantize is Quantize.none:
        return
    refuse_experts(llm, quantize)
    from transformers.integrations import replace_with_bnb_linear  # late: it takes seconds, and few ask for it

    config = quantization(quantize, dtype)
    replace_with_bnb_linear(llm, ["lm_head"], config)
    marked: Any = llm  # what from_pretrained leaves on a model, and peft and Lightning ask for
    marked.is_quantized = True
    marked.quantization_method = config.quant_method
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
    llm.config.quantization_config = config


def storage_device() -> torch.device:
    """Return where quantized weights are made: the current GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quantized_weight(old: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """Make the parameter that holds a weight: quantized where `use_quantized_layers` left such a one in its place."""
    if type(old) is nn.Parameter:
        return nn.Parameter(weight)
    settings = {name: value for name, value in old.__dict__.items() if name != "SCB"}
    packed: Any = type(old)(weight, requires_grad=False, **settings)
    return packed.to(storage_device())  # type: ignore[no-any-return]
