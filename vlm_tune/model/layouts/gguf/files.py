"""Two files for llama.cpp-based engines: model.gguf holds the language model, mmproj.gguf encoder and projector."""

from copy import deepcopy
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerBase

from vlm_tune.config.schema import ModelConfig
from vlm_tune.data.encode import Encoder
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.gguf.text import write_text_model
from vlm_tune.model.layouts.gguf.vision import check_vision, vision_tensors, write_vision_model
from vlm_tune.model.layouts.internvl.processor import jinja_template
from vlm_tune.model.layouts.pretrained import load_pretrained
from vlm_tune.model.vlm import VisionLanguageModel

TEXT, VISION = "model.gguf", "mmproj.gguf"
# llama.cpp hands over a message as one text, with a mark <__media..__> for a picture; a line break follows a picture
CONTENT = "{{ message['content'] | replace('__>', '__>\\n') }}"


def save(
    vlm: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    target: tuple[ModelConfig, Path, str],
) -> None:
    """Write a merged model; `target` is its configuration, the folder, and the dtype (fp32, fp16 or q8_0)."""
    model, folder, dtype = target
    check_vision(vlm, model)
    if "{pictures}" in encoder.template.user:
        raise ConfigError(f"layout=gguf: model.template={encoder.template.name} shows no question. Use layout=parts")
    template = jinja_template(encoder.template, tokenizer, model.system, CONTENT)
    write_text_model(vlm.llm, tokenizer, list(encoder.stop_ids), template, (folder / TEXT, dtype))
    write_vision_model(vlm, model, folder / VISION, dtype)


def load_back(folder: Path, vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Read both files into the shape of the model that they were written from: text by transformers' own reader."""
    llm = load_pretrained(
        AutoModelForCausalLM,
        folder,
        part="the language model",
        gguf_file=TEXT,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation=attention.NAME,
    )
    llm.config.use_cache = False
    copy = deepcopy(vlm)
    copy.llm = llm
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / VISION).tensors}
    wanted = vision_tensors(copy)
    assert stored.keys() == wanted.keys(), "a tensor was written under a name that is not read"
    fixed = "v.position_embd.weight"  # a table whose rows are ordered again, so not a view of the weight
    with torch.no_grad():
        for name, weight in wanted.items():
            data = torch.from_numpy(gguf.dequantize(stored[name].data, stored[name].tensor_type).copy())
            if name == fixed:
                copy.vision.tower.embeddings.position_embeddings.copy_(torch.cat([data[-1:], data[:-1]]).unsqueeze(0))
            else:
                weight.copy_(data.view(weight.shape))
    return copy


def limits(model: ModelConfig) -> str:
    """Describe where the engines show a model a different picture than training did."""
    size = model.tiles.size
    if model.tiles.max == 1:
        cut = (
            f"a picture larger than {size} pixels on a side is shown as two tiles there, where training showed one: "
            f"resize pictures to {size}x{size} before you ask"
        )
    else:
        cut = (
            f"pictures no larger than {size} pixels on both sides are one tile there, and of larger ones the grid is "
            "chosen by the area it wastes, not by its shape: where a grid differs from training's, so may the answer"
        )
    return f"limits of llama.cpp: {cut}. GELU is its approximation by tanh, and pictures may be resampled otherwise"
