"""The vision encoder: any ViT of transformers, or any network of timm, as pixels -> patch features."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.folders import check_part, read_json
from vlm_tune.model.layouts.pretrained import load_pretrained, make_empty, read_settings, reading, refuse_missing
from vlm_tune.model.layouts.weights import read_tensors

# Where a tower keeps its layers. Its final norm and pooling head, of these names, come after them.
LAYER_LISTS = ("encoder.layer", "encoder.layers", "model.layer", "layers", "blocks")
PART = "the vision encoder"
NORMS = ("layernorm", "post_layernorm", "norm")


class VisionEncoder(nn.Module):
    """Encode tiles as patch features: (T, 3, H, W) -> (T, P, C), class token dropped unless `keeps_class`.

    Layers after `select_layer` are never run: they are cut off when the encoder is made, and so is a pooling head.
    Their weights stay in `unused`, so that `whole_tower` gives back the encoder that was loaded.
    """

    def __init__(self, tower: Any, select_layer: int = -1, keeps_class: bool = False) -> None:
        super().__init__()
        self.tower = tower
        self.select_layer = select_layer
        self.keeps_class = keeps_class
        self.is_timm = not hasattr(tower, "config")
        if self.is_timm:  # called as a module, or ZeRO-3 would not gather the position table
            tower.forward = tower.forward_features
        self.width = int(tower.num_features if self.is_timm else tower.config.hidden_size)
        self.whole_config = None if self.is_timm else deepcopy(tower.config)
        self.unused: dict[str, Tensor] = drop_head(tower) | cut_layers(tower, select_layer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the tower computes."""
        return next(self.tower.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """(T, 3, H, W) -> (T, P, C)."""
        if self.is_timm:
            features = self.tower(pixels)
            if features.ndim == 4:  # a convolutional network
                features = features.flatten(2).transpose(1, 2)  # (T, P, C)
            return features[:, getattr(self.tower, "num_prefix_tokens", 0) :]
        num_patches = (pixels.shape[-1] // self.patch_size) ** 2
        inputs = patchify(pixels, self.patch_size) if self.tower.config.model_type == NAFLEX else {PIXELS: pixels}
        features = self.tower(**inputs).last_hidden_state
        return features if self.keeps_class else features[:, features.shape[1] - num_patches :]

    def freeze_unread(self) -> None:
        """Freeze the weights that no feature depends on: several devices would wait for their gradients."""
        pooled: tuple[str, ...] = ("attn_pool.", "fc_norm.", "head.") if self.is_timm else ()
        if not self.is_timm and self.tower.config.model_type == "clip_vision_model":
            pooled = ("post_layernorm.", "vision_model.post_layernorm.")
        for name, weight in self.tower.named_parameters():
            if name.startswith(pooled) or name.endswith("embeddings.mask_token"):
                weight.requires_grad_(False)

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side."""
        size = self.tower.config.patch_size
        return int(size[0] if isinstance(size, list | tuple) else size)

    def num_patches(self, tile_size: int) -> int:
        """Count the patches of a tile of `tile_size` pixels, by a dry run for networks without a patch size."""
        if not self.is_timm:
            return (tile_size // self.patch_size) ** 2 + self.keeps_class
        with torch.no_grad():
            tile = torch.zeros(1, 3, tile_size, tile_size, dtype=self.dtype, device=next(self.parameters()).device)
            return self(tile).shape[1]


PIXELS, NAFLEX = "pixel_values", "siglip2_vision_model"


def patchify(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """Cut tiles into the rows of pixels that SigLIP 2's variable-resolution encoder takes: (T, 3, H, W) -> (T, P, _).

    Source: transformers `image_processing_siglip2.py:convert_image_to_patches`.
    """
    num_tiles, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    grid = pixels.reshape(num_tiles, 3, rows, patch, columns, patch)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(num_tiles, rows * columns, -1)  # (T, P, _)
    shapes = torch.tensor([[rows, columns]] * num_tiles, device=pixels.device)
    mask = torch.ones(num_tiles, rows * columns, dtype=torch.int32, device=pixels.device)
    return {PIXELS: patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def drop_head(tower: Any) -> dict[str, Tensor]:
    """Remove the head that pools a tile to one vector, which nothing here uses; return its weights by name."""
    if not getattr(tower, "use_head", False):
        return {}
    removed = {f"head.{name}": weight for name, weight in tower.head.state_dict().items()}
    tower.use_head, tower.config.vision_use_head = False, False
    del tower.head
    return removed


def cut_layers(tower: Any, select_layer: int) -> dict[str, Tensor]:
    """Remove the layers after `select_layer`, an index into the hidden states (0 = embeddings, -1 = last, normed).

    Return the removed weights by name. Raise ConfigError for a layer that is not there, or a network without a list
    of layers.
    """
    if select_layer == -1:
        return {}
    path, layers = _find_layers(tower, "model.vision.select_layer")
    keep = select_layer if select_layer >= 0 else len(layers) + 1 + select_layer
    if not 0 < keep <= len(layers):
        raise ConfigError(f"model.vision.select_layer={select_layer}: the encoder has {len(layers)} layers")
    whole = tower.state_dict()
    owner, _, name = path.rpartition(".")
    setattr(tower.get_submodule(owner), name, layers[:keep])
    for norm in NORMS:  # hidden states are taken before the final norm
        if isinstance(getattr(tower, norm, None), nn.Module):
            setattr(tower, norm, nn.Identity())
    if hasattr(tower, "config"):
        tower.config.num_hidden_layers = keep
        if hasattr(tower.config, "use_mean_pooling"):
            tower.config.use_mean_pooling = True  # InternViT's word for "no final norm"
    return {name: weight for name, weight in whole.items() if name not in tower.state_dict()}


def layer_list(tower: Any, key: str) -> nn.ModuleList | nn.Sequential:
    """Return a transformer's layers, first to last; raise ConfigError in the name of `key` when it has none."""
    return _find_layers(tower, key)[1]


def _find_layers(tower: Any, key: str) -> tuple[str, Any]:
    for path in LAYER_LISTS:
        try:
            layers = tower.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList) or (isinstance(layers, nn.Sequential) and hasattr(layers[0], "attn")):
            return path, layers
    raise ConfigError(f"{key}: {type(tower).__name__} has no list of transformer layers; leave this key at its default")


def whole_tower(vision: VisionEncoder) -> Any:
    """Put the encoder together with the layers that are not run, for saving; in the dtype of the trained ones."""
    assert vision.whole_config is not None, "a network of timm is saved by its weights"
    from transformers import AutoModel

    config = vision.whole_config if vision.unused else vision.tower.config
    tower = make_empty(AutoModel, config, dtype=vision.dtype)
    tower.load_state_dict(whole_weights(vision), assign=True)
    return tower


def whole_weights(vision: VisionEncoder) -> dict[str, Tensor]:
    """Join the weights that run and those that do not, by their own library's names."""
    unused = {name: weight.detach().cpu().to(vision.dtype) for name, weight in vision.unused.items()}
    return vision.tower.state_dict() | unused  # type: ignore[no-any-return]


def resample_positions(tower: Any, tile_size: int) -> None:
    """Resize the position table once, bicubically, when tiles differ in size from the encoder's own pictures.

    Source: InternVL `modeling_intern_vit.py:_get_pos_embed` and transformers' `interpolate_pos_encoding`.
    """
    if hasattr(tower, "set_input_size"):  # a transformer of timm
        tower.set_input_size(img_size=tile_size)
        return
    embeddings: Any = getattr(tower, "embeddings", None)
    config = getattr(tower, "config", None)
    if embeddings is None or config is None or config.model_type == NAFLEX:  # which resizes its table for each picture
        return
    patch = config.patch_size
    side = tile_size // int(patch[0] if isinstance(patch, list | tuple) else patch)
    is_pair = isinstance(config.image_size, list | tuple)
    config.image_size = [tile_size, tile_size] if is_pair else tile_size
    embeddings.image_size = (tile_size, tile_size) if is_pair else tile_size
    table = getattr(embeddings, "position_embeddings", None)
    lookup = getattr(embeddings, "position_embedding", None)
    if isinstance(table, nn.Parameter):  # (1, class + patches, C): InternViT, DINOv2
        if _side(table[0]) != side:
            embeddings.position_embeddings = nn.Parameter(_resized(table[0], side).unsqueeze(0), requires_grad=False)
    elif isinstance(lookup, nn.Embedding) and _side(lookup.weight) != side:  # (class + patches, C): CLIP, SigLIP
        lookup.weight = nn.Parameter(_resized(lookup.weight, side), requires_grad=False)
        lookup.num_embeddings = embeddings.num_positions = len(lookup.weight)
        embeddings.num_patches = side * side
        embeddings.position_ids = torch.arange(len(lookup.weight), device=lookup.weight.device).unsqueeze(0)


def _side(table: Tensor) -> int:
    return int(len(table) ** 0.5)


def _resized(table: Tensor, side: int) -> Tensor:
    """Resize a square of positions to side x side; a class token's position in front stays as it is."""
    old = _side(table)
    first = len(table) - old * old
    grid = table[first:].detach().float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)
    return torch.cat([table[:first].detach(), patches])


def load_tower(folder: Path, dtype: torch.dtype) -> Any:
    """Load an encoder from a folder of transformers' or timm's layout; no code comes out of the folder."""
    config = read_json(folder)
    if "architecture" in config:
        import timm

        weights = read_tensors(folder / "model.safetensors")
        with reading(folder):
            tower = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
            refuse_missing(sorted(tower.state_dict().keys() - weights.keys()), PART, folder)
            tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
        return tower.to(dtype)
    from transformers import AutoConfig, AutoModel

    check_part(folder, "model.vision")
    parsed = read_settings(AutoConfig, folder)
    if hasattr(parsed, "vision_config"):  # a CLIP or SigLIP folder holds a text tower too
        parsed = parsed.vision_config
    return load_pretrained(AutoModel, folder, part=PART, config=parsed, dtype=dtype, attn_implementation=attention.NAME)
