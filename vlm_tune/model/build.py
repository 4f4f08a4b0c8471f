"""Build a model from its configuration: find the weights, load each part, join the parts."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from vlm_tune.config.schema import Config, ModelConfig, Precision, Quantize
from vlm_tune.data.encode import Encoder
from vlm_tune.data.text.positions import Positions
from vlm_tune.model.encoder import make_encoder
from vlm_tune.model.kernels.exchange import check_heads
from vlm_tune.model.kernels.isolation import check_rope
from vlm_tune.model.layouts import native, parts
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, find_folder, require_weights
from vlm_tune.model.layouts.found import Found, Loaded, layout_of
from vlm_tune.model.layouts.internvl import official as internvl_official
from vlm_tune.model.layouts.llava import original as llava_original
from vlm_tune.model.layouts.pretrained import reading
from vlm_tune.model.layouts.weights import notes
from vlm_tune.model.vlm import VisionLanguageModel

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}

LOADERS = {  # by the result of `layout_of`
    "parts": parts.load,
    **dict.fromkeys(native.CLASSES, native.load),
    "internvl_chat": internvl_official.load,
    LLAVA_ORIGINAL: llava_original.load,
}


@dataclass
class Model:
    """A loaded model with what belongs to it: the tokenizer and the encoder of conversations.

    `config` is the configuration that it was built from, joined with what its folder says.
    """

    vlm: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    config: Config
    notes: tuple[str, ...] = ()  # what the user should know about how it was read


def build_model(config: Config) -> Model:
    """Load a whole checkpoint, or join a vision encoder and a language model with a new projector."""
    dtype = DTYPES[resolve_precision(config.trainer.precision)]
    vlm, tokenizer, found, told = load_weights(config.model, dtype, config.stage.quantize)
    config = replace(config, model=found.over(config.model))
    check_rope(vlm.llm, config)
    check_heads(vlm.llm, config)
    num_patches = vlm.vision.num_patches(config.model.tiles.size)
    positions = Positions.of(vlm.llm.config.get_text_config())
    encoder = make_encoder(config, tokenizer, found.tokens, num_patches, positions)
    vlm.llm.generation_config = answer_settings(encoder.stop_ids)  # type: ignore[assignment]
    return Model(vlm, tokenizer, encoder, config, (*told, *slow_arithmetic(config)))


def answer_settings(stop_ids: tuple[int, ...]) -> GenerationConfig:
    """Describe how the model answers, here and from an exported folder: greedily, until a token that ends an answer.

    The settings that a folder came with are dropped: transformers would apply a repetition penalty, beams or a
    minimum length to greedy answers too.
    """
    ends = list(stop_ids) or None
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends and ends[0], use_cache=True)


def load_weights(model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Find the weights that a model's configuration names, and load them in the layout that they have."""
    require_weights(model)
    if model.path is not None:
        folder = find_folder(model.path, "model.path")
        layout = layout_of(folder)
        with reading(folder):
            loaded = LOADERS[layout](folder, model, dtype, quantize)
        return loaded._replace(notes=(*notes(folder), *loaded.notes))
    vision = find_folder(str(model.vision.path), "model.vision.path")
    llm = find_folder(str(model.llm.path), "model.llm.path")
    return parts.join(vision, llm, Found.given(model), model.tiles.size, (dtype, quantize))


def device_of(config: Config) -> torch.device:
    """Return where a model computes: on the GPU, unless there is none or the CPU was asked for."""
    is_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    return torch.device("cuda" if is_gpu else "cpu")


def resolve_precision(precision: Precision) -> Precision:
    """Choose bf16 if the hardware supports it, else float32."""
    if precision is not Precision.auto:
        return precision
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, it is slower than float32
        return Precision.bf16 if has_bf16 else Precision.fp16
    return Precision.bf16 if "avx512_bf16" in _cpu_flags() else Precision.fp32


def slow_arithmetic(config: Config) -> list[str]:
    """Say by how much bf16 is slower than float32 here, if it was asked for on a processor without units for it."""
    is_asked = config.trainer.precision is Precision.bf16 and resolve_precision(Precision.auto) is Precision.fp32
    if not is_asked:
        return []
    taken = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
    return [
        f"trainer.precision=bf16, but this processor has no bf16 units: a matrix product takes {taken:.1f} times as "
        "long as in float32, measured now. Set trainer.precision=fp32"
    ]


def product_seconds(dtype: torch.dtype) -> float:
    """Time a product of matrices (128, 512) and (512, 512): the faster of two, as the first one warms up."""
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.exists() else ""
