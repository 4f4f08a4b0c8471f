"""haotian-liu/LLaVA's own folders (LLaVA 1.5 and 1.6) <-> the model; no code of that project is run.

Language model and projector are in one set of files, under the names of LlavaLlamaForCausalLM. The encoder is another
folder, which config.json names; where it was trained too, its weights are among the others and count.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.data.tiles import anyres_grids
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels.isolation import check_language_model
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, find_folder, model_kind, read_json
from vlm_tune.model.layouts.found import Loaded, read_found, tower_config, vision_folder
from vlm_tune.model.layouts.keys import Names, all_weights, fill
from vlm_tune.model.layouts.pretrained import empty_llm, make_empty
from vlm_tune.model.layouts.weights import Shards, notes, write_shards
from vlm_tune.model.parts.llm import add_tokens, load_tokenizer
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder, load_tower, resample_positions, whole_tower
from vlm_tune.model.vlm import View, VisionLanguageModel

TEXT_KINDS = {"llama": "LlavaLlama", "mistral": "LlavaMistral", "qwen2": "LlavaQwen"}  # model_type -> class of LLaVA
VISION = "model.vision_tower.vision_tower.vision_model."
COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # in older files
PROJECTORS = {  # ours -> theirs
    "mlp2x_gelu": {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"},
    "linear": {"linear_1": "model.mm_projector"},
}
OWN_KEYS = ("mm_", "image_", "tune_", "freeze_", "unfreeze_", "use_mm_", "vision_", "tokenizer_", "_", "torch_dtype")
TOWER = "vision_tower"  # folder of the encoder inside an exported one


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Load an original folder; its language model gains a token that stands for pictures.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight.
    """
    found, config, stored = read_found(folder, model), read_json(folder), Shards.find(folder).shapes
    tower_folder = vision_folder(folder, config, model)
    has_vision = any(key.startswith(VISION) for key in stored)
    tower = make_empty(AutoModel, tower_config(tower_folder)) if has_vision else load_tower(tower_folder, dtype)
    llm = empty_llm(text_config(config, folder), dtype=dtype)
    projector = Projector(found.projector, tower.config.hidden_size, llm.config.hidden_size)
    view = View(model.tiles.size, found.normalize)
    vlm = VisionLanguageModel(VisionEncoder(tower), projector, llm, -1, view)
    computed = [key for key in stored if key.endswith(COMPUTED)]
    fill(vlm, folder, names_of(projector, has_vision), (dtype, quantize), known=computed)
    check_language_model(llm)
    if has_vision:
        positions = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.position_ids = torch.arange(positions).unsqueeze(0)  # no file holds them
    resample_positions(tower, model.tiles.size)
    vlm.vision = VisionEncoder(tower.eval(), found.select_layer, found.keeps_class)
    tokenizer = load_tokenizer(folder)
    add_tokens(tokenizer, llm, found.tokens.all)
    vlm.context_id = tokenizer.convert_tokens_to_ids(found.tokens.context)
    return Loaded(vlm, tokenizer, found, () if has_vision else tuple(notes(tower_folder)))


def names_of(projector: Projector, has_vision: bool = True) -> list[Names]:
    """Return LLaVA's names of the weights, including the encoder's if it has them."""
    layers = [Names(f"projector.{ours}.", f"{theirs}.") for ours, theirs in PROJECTORS[projector.config.kind].items()]
    vision = [Names("vision.tower.", VISION)] if has_vision else []
    return [*vision, Names("projector.newline", "model.image_newline"), *layers, Names("llm.", "")]


def text_config(config: dict[str, Any], folder: Path) -> Any:
    """Make the language model's own configuration from LLaVA's, which extends it."""
    known = {f"{name}ForCausalLM": kind for kind, name in TEXT_KINDS.items()}
    architecture = (config.get("architectures") or ["LlavaLlamaForCausalLM"])[0]
    if architecture not in known:
        raise ConfigError(f"{folder}: architectures={architecture}; of LLaVA there are {', '.join(known)}")
    left_out = ("model_type", "architectures", "transformers_version", "auto_map")
    own = {key: value for key, value in config.items() if key not in left_out and not key.startswith(OWN_KEYS)}
    return AutoConfig.for_model(known[architecture], **own)


# ---------------------------------------------------------------------------------------------------------------- out


def save(vlm: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, model: ModelConfig, folder: Path) -> None:
    """Write a merged model as an original folder, in the dtype that it has, including the encoder's weights.

    The picture token has no row in LLaVA's tables: it is removed again. Raises ConfigError for a model that this
    layout cannot hold.
    """
    refuse_misfit(vlm)
    weights = {name: each.to(vlm.llm.dtype) for name, each in all_weights(vlm, names_of(vlm.projector)).items()}
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    num_rows = len(weights[tables[0]])
    if num_rows == vlm.context_id + 1:
        num_rows -= 1
        weights |= {name: weights[name][:num_rows] for name in tables if name in weights}
    config = written_config(vlm, model, folder) | {"vocab_size": num_rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    write_shards(shapes, lambda name: weights[name].clone(), folder)


def refuse_misfit(vlm: VisionLanguageModel) -> None:
    """Raise ConfigError for a model whose parts LLaVA's own classes do not have."""
    config, projector, text = vlm.vision.whole_config, vlm.projector.config, vlm.llm.config.model_type
    reason = ""
    if config is None or config.model_type != "clip_vision_model":
        reason = "an encoder that is not CLIP"
    elif projector.kind not in PROJECTORS or projector.shuffle != 1 or not projector.bias:
        reason = f"a projector of kind={projector.kind}, shuffle={projector.shuffle}, bias={projector.bias}"
    elif text not in TEXT_KINDS:
        reason = f"a language model of type {text}, not {', '.join(TEXT_KINDS)}"
    if reason:
        raise ConfigError(f"the original LLaVA layout does not hold this model: it has {reason}. Use layout=parts")


def written_config(vlm: VisionLanguageModel, model: ModelConfig, folder: Path) -> dict[str, Any]:
    """Write LLaVA's config.json: that of the folder that training started from, or a new one that names its encoder."""
    base = find_folder(model.path, "model.path") if model.path is not None else None
    if base is not None and model_kind(base) == LLAVA_ORIGINAL:
        return read_json(base) | {"unfreeze_mm_vision_tower": True, "torch_dtype": str(vlm.llm.dtype)[6:]}
    whole_tower(vlm.vision).save_pretrained(folder / TOWER)
    vision, projector, text = vlm.vision, vlm.projector.config, vlm.llm.config
    depth = vision.whole_config.num_hidden_layers if vision.whole_config is not None else 0
    own = {
        "model_type": f"llava_{text.model_type}",
        "architectures": [f"{TEXT_KINDS[text.model_type]}ForCausalLM"],
        "torch_dtype": str(vlm.llm.dtype)[6:],
        "mm_vision_tower": TOWER,
        "mm_hidden_size": vision.width,
        "mm_projector_type": projector.kind,
        "mm_vision_select_layer": vision.select_layer - (depth + 1) * (vision.select_layer > 0),
        "mm_vision_select_feature": "cls_patch" if vision.keeps_class else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "spatial_unpad" if projector.newline else "flat",
        "image_aspect_ratio": model.tiles.rule.value if model.tiles.rule.value in ("pad", "anyres") else "square",
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # or LLaVA would load the encoder that it started from
    }
    if projector.newline:
        own["image_grid_pinpoints"] = [
            [columns * model.tiles.size, rows * model.tiles.size] for columns, rows in anyres_grids(model.tiles)
        ]
    return text.to_diff_dict() | own
