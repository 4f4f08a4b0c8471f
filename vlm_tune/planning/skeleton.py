"""A model of the true shapes whose weights hold no numbers: made of config.json alone, on torch's fake tensors."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, model_kind, read_json, read_parts
from vlm_tune.model.layouts.internvl import internvit, official_config
from vlm_tune.model.layouts.llava.facts import read_hub, read_original, tower_config, vision_folder
from vlm_tune.model.layouts.llava.original import text_config as llava_text_config
from vlm_tune.model.layouts.pretrained import make_empty, read_settings
from vlm_tune.model.parts.llm import guard_4bit, quantization
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.quantize import use_quantized_layers
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions
from vlm_tune.model.vlm import View, VisionLanguageModel

CONTEXT_ID = 1  # of the image token, in a model that reads no text


def make_skeleton(model: ModelConfig, num_tokens: int, dtype: torch.dtype, quantize: Quantize) -> VisionLanguageModel:
    """Make the model that `load_weights` would load, on the meta device; its table has `num_tokens` rows at least."""
    tower, text, keeps_class = read_shapes(model)
    text.vocab_size = max(text.vocab_size, num_tokens)
    with torch.device("meta"):
        if not isinstance(tower, nn.Module):
            tower = make_empty(AutoModel, tower, attn_implementation=attention.NAME)
        llm = make_empty(AutoModelForCausalLM, text, attn_implementation=attention.NAME)
    llm.config.use_cache = False
    cast(tower, dtype)
    resample_positions(tower, model.tiles.size)
    vision = VisionEncoder(tower, model.vision.select_layer, keeps_class)
    with torch.device("meta"):
        projector = Projector(model.projector, vision.width, text.hidden_size)
    cast(llm, dtype)
    if quantize is not Quantize.none:
        with torch.device("meta"):
            use_quantized_layers(llm, quantization(quantize, dtype))
    if is_official(model):
        vision.unused = {}  # this layout does not read them
        cast(projector, dtype)
    vlm = VisionLanguageModel(vision, projector, llm, CONTEXT_ID, View(model.tiles.size, model.vision.normalize))
    guard_4bit(llm)
    return vlm


def cast(part: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the type that they are loaded in; buffers, rotary frequencies above all, keep theirs."""
    for weight in part.parameters():
        weight.data = weight.data.to(dtype)


def is_official(model: ModelConfig) -> bool:
    """Tell whether a model comes from a folder of InternVL's own layout."""
    return model.path is not None and model_kind(Path(model.path)) == official_config.KIND


def read_shapes(model: ModelConfig) -> tuple[Any, Any, bool]:
    """Read the encoder (a configuration, or a network of timm), the language model's configuration, the class token.

    Sets the model's projector and selected layer by what its folder says, as loading does.
    """
    if model.path is None:
        return read_tower(Path(str(model.vision.path))), read_text(Path(str(model.llm.path))), False
    folder = Path(model.path)
    kind, config = model_kind(folder), read_json(folder)
    if kind == "parts":
        keeps_class = read_parts(folder, model)
        return read_tower(folder / "vision"), read_text(folder / "llm"), keeps_class
    if kind == official_config.KIND:
        model.vision.select_layer = config.get("select_layer", -1)
        model.projector = official_config.projector_config(config)
        return official_config.vision_config(config), official_config.text_config(config, folder), False
    if kind == LLAVA_ORIGINAL:
        facts = read_original(folder, model)
        return tower_config(vision_folder(folder, config, model, with_weights=False)), read_text(folder), facts[1]
    native = read_settings(AutoConfig, folder)
    native.text_config.tie_word_embeddings = native.tie_word_embeddings
    if kind in ("llava", "llava_next"):
        return native.vision_config, native.text_config, read_hub(folder, model).keeps_class
    if kind == "internvl":
        layer = native.vision_feature_layer
        model.vision.select_layer = layer if isinstance(layer, int) else -1
        model.projector.kind, model.projector.shuffle = "mlp", round(1 / native.downsample_ratio)
        return native.vision_config, native.text_config, False
    raise ConfigError(f"model.path={folder}: a folder of type {kind}, which is not read")


def read_tower(folder: Path) -> Any:
    """Read an encoder's folder alone."""
    config = read_json(folder)
    if "architecture" in config:
        import timm

        with torch.device("meta"):
            return timm.create_model(config["architecture"], pretrained=False, num_classes=0)
    if config.get("model_type") == internvit.KIND:
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
