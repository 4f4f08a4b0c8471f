"""A model of the true shapes whose weights hold no numbers: made of config.json alone, on torch's fake tensors."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.model.encoder import look_up
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, model_kind, read_json
from vlm_tune.model.layouts.found import tower_config
from vlm_tune.model.layouts.found import vision_folder as find_tower
from vlm_tune.model.layouts.internvl import official_config
from vlm_tune.model.layouts.llava.original import text_config as llava_text_config
from vlm_tune.model.layouts.pretrained import make_empty, read_settings
from vlm_tune.model.parts.llm import guard_4bit
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.quantize import use_quantized_layers
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions
from vlm_tune.model.vlm import View, VisionLanguageModel

CONTEXT_ID = 1  # of the image token, in a model that reads no text


def make_skeleton(model: ModelConfig, num_tokens: int, dtype: torch.dtype, quantize: Quantize) -> VisionLanguageModel:
    """Make the model that `load_weights` would load, on the meta device; its table has `num_tokens` rows at least."""
    (vision_folder, llm_folder), found = look_up(model)
    tower, text = read_shapes(model, vision_folder, llm_folder)
    text.vocab_size = max(text.vocab_size, num_tokens)
    with torch.device("meta"):
        if not isinstance(tower, nn.Module):
            tower = make_empty(AutoModel, tower)
        llm = make_empty(AutoModelForCausalLM, text)
    llm.config.use_cache = False
    cast(tower, dtype)
    resample_positions(tower, model.tiles.size)
    vision = VisionEncoder(tower, found.select_layer, found.keeps_class)
    with torch.device("meta"):
        projector = Projector(found.projector, vision.width, text.hidden_size)
    cast(llm, dtype)
    with torch.device("meta"):
        use_quantized_layers(llm, dtype, quantize)
    if is_official(model):
        vision.unused = {}  # this layout does not read them
        cast(projector, dtype)
    vlm = VisionLanguageModel(vision, projector, llm, CONTEXT_ID, View(model.tiles.size, found.normalize))
    guard_4bit(llm)
    return vlm


def cast(part: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the type that they are loaded in; buffers, rotary frequencies above all, keep theirs."""
    for weight in part.parameters():
        weight.data = weight.data.to(dtype)


def is_official(model: ModelConfig) -> bool:
    """Tell whether a model comes from a folder of InternVL's own layout."""
    return model.path is not None and model_kind(Path(model.path)) == official_config.KIND


def read_shapes(model: ModelConfig, vision_folder: Path, llm_folder: Path) -> tuple[Any, Any]:
    """Read the encoder (a configuration, or a network of timm) and the language model's configuration."""
    if vision_folder != llm_folder:
        return read_tower(vision_folder), read_text(llm_folder)
    folder = vision_folder
    kind, config = model_kind(folder), read_json(folder)
    if kind == official_config.KIND:
        return official_config.vision_config(config), official_config.text_config(config, folder)
    if kind == LLAVA_ORIGINAL:
        return tower_config(find_tower(folder, config, model, with_weights=False)), read_text(folder)
    native = read_settings(AutoConfig, folder)
    native.text_config.tie_word_embeddings = native.tie_word_embeddings
    return native.vision_config, native.text_config


def read_tower(folder: Path) -> Any:
    """Read an encoder's folder alone."""
    config = read_json(folder)
    if "architecture" in config:
        import timm

        with torch.device("meta"):
            return timm.create_model(config["architecture"], pretrained=False, num_classes=0)
    if config.get("model_type") == "intern_vit_6b":
        return official_config.vision_config({"vision_config": config})
    return tower_config(folder)


def read_text(folder: Path) -> Any:
    """Read a language model's folder alone, or the text part of LLaVA's own layout."""
    kind = model_kind(folder)
    if kind == LLAVA_ORIGINAL:
        return llava_text_config(read_json(folder), folder)
    if kind == "internlm2":
        return official_config.text_config({"llm_config": read_json(folder)}, folder)
    return read_settings(AutoConfig, folder)


def give_fakes(model: nn.Module, fakes: FakeTensorMode) -> None:
    """Put fake tensors in the places of weights and buffers; what is packed is packed, what is shared stays shared."""
    made: dict[int, tuple[Any, nn.Parameter]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:  # the old weight is kept beside, or its id would be given anew
                    made[id(weight)] = weight, _fake_weight(weight, fakes)
                module._parameters[name] = made[id(weight)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake_like(buffer, fakes)


def fake_like(tensor: torch.Tensor, fakes: FakeTensorMode) -> torch.Tensor:
    """Make a fake tensor of a tensor's shape and type."""
    with fakes:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _fake_weight(old: Any, fakes: FakeTensorMode) -> nn.Parameter:
    """Make a weight of no numbers; one of bitsandbytes' kinds is packed by that library's own functions."""
    fake = fake_like(old, fakes)
    if type(old) is nn.Parameter:
        return nn.Parameter(fake, requires_grad=old.requires_grad)
    import bitsandbytes.functional as bnb  # late: it takes seconds to import

    bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())  # of real numbers, and the same for all
    made: Any
    with fakes:
        if hasattr(old, "quant_type"):
            settings = {key: getattr(old, key) for key in ("blocksize", "compress_statistics", "quant_type")}
            codes, state = bnb.quantize_4bit(fake, quant_storage=old.quant_storage, **settings)
            made = nn.Parameter(codes, requires_grad=False)
            made.quant_state, made.bnb_quantized = state, True
        else:
            codes, scales, _ = bnb.int8_vectorwise_quant(fake.to(torch.float16))
            made = nn.Parameter(codes, requires_grad=False)
            made.CB, made.SCB = made.data, scales
    return made  # type: ignore[no-any-return]
