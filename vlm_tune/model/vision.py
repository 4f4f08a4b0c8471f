"""The vision encoder: any ViT of transformers, or any network of timm, as pixels -> patch features."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm_tune.errors import ConfigError


class VisionEncoder(nn.Module):
    """Encode tiles as patch features: (T, 3, H, W) -> (T, P, C), class token dropped.

    Layers after `select_layer` are never run: they are cut off when the encoder is made.
    """

    def __init__(self, tower: Any, select_layer: int = -1) -> None:
        super().__init__()
        self.tower = tower
        self.is_timm = not hasattr(tower, "config")
        self.width = int(tower.num_features if self.is_timm else tower.config.hidden_size)
        if not self.is_timm:
            cut_layers(tower, select_layer)

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the tower."""
        return next(self.tower.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """(T, 3, H, W) -> (T, P, C)."""
        if self.is_timm:
            features = self.tower.forward_features(pixels)
            if features.ndim == 4:  # a convolutional network
                features = features.flatten(2).transpose(1, 2)  # (T, P, C)
            return features[:, getattr(self.tower, "num_prefix_tokens", 0) :]
        features = self.tower(pixels).last_hidden_state
        num_patches = (pixels.shape[-1] // self.patch_size) ** 2
        return features[:, features.shape[1] - num_patches :]

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side."""
        size = self.tower.config.patch_size
        return int(size[0] if isinstance(size, list | tuple) else size)

    def num_patches(self, tile_size: int) -> int:
        """Count the patches of a tile of `tile_size` pixels, by a dry run for networks without a patch size."""
        if not self.is_timm:
            return (tile_size // self.patch_size) ** 2
        with torch.no_grad():
            tile = torch.zeros(1, 3, tile_size, tile_size, dtype=self.dtype, device=next(self.parameters()).device)
            return self(tile).shape[1]


def cut_layers(tower: Any, select_layer: int) -> None:
    """Remove the layers after `select_layer`, an index into the hidden states (0 = embeddings, -1 = last, normed)."""
    if select_layer == -1:
        return
    owner, name = _find_layers(tower, "model.vision.select_layer")
    layers = getattr(owner, name)
    keep = select_layer if select_layer >= 0 else len(layers) + 1 + select_layer
    if not 0 < keep <= len(layers):
        raise ConfigError(f"model.vision.select_layer={select_layer}: the encoder has {len(layers)} layers")
    setattr(owner, name, layers[:keep])
    tower.config.num_hidden_layers = keep
    for holder in (tower, getattr(tower, "vision_model", None)):
        for norm in ("layernorm", "post_layernorm"):  # hidden states are taken before the final norm
            if holder is not None and hasattr(holder, norm):
                setattr(holder, norm, nn.Identity())


def layer_list(tower: Any, key: str) -> nn.ModuleList | nn.Sequential:
    """Return a transformer's layers, first to last; raise ConfigError in the name of `key` when it has none."""
    owner, name = _find_layers(tower, key)
    layers: nn.ModuleList | nn.Sequential = getattr(owner, name)
    return layers


def _find_layers(tower: Any, key: str) -> tuple[nn.Module, str]:
    paths = ("encoder.layer", "encoder.layers", "vision_model.encoder.layers", "model.layer", "layers", "blocks")
    for path in paths:
        holder_path, _, name = path.rpartition(".")
        try:
            holder = tower.get_submodule(holder_path)
        except AttributeError:
            continue
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList) or (isinstance(layers, nn.Sequential) and hasattr(layers[0], "attn")):
            return holder, name
    raise ConfigError(f"{key}: {type(tower).__name__} has no list of transformer layers; leave this key at its default")


def resample_positions(tower: Any, tile_size: int) -> None:
    """Resize the position table once, bicubically, when tiles differ in size from the encoder's own pictures.

    Source: InternVL `modeling_intern_vit.py:_get_pos_embed` and transformers' `interpolate_pos_encoding`.
    """
    embeddings: Any = getattr(tower, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Parameter):
        return
    patch = tower.config.patch_size
    side = tile_size // int(patch[0] if isinstance(patch, list | tuple) else patch)
    old = int((table.shape[1] - 1) ** 0.5)
    tower.config.image_size = [tile_size, tile_size]
    embeddings.image_size = (tile_size, tile_size)
    if old == side:
        return
    grid = table[:, 1:].detach().float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1).to(table.dtype)
    embeddings.position_embeddings = nn.Parameter(torch.cat([table[:, :1], patches], dim=1), requires_grad=False)


def load_tower(folder: Path, dtype: torch.dtype) -> Any:
    """Load an encoder from a folder of transformers' or timm's layout; no code comes out of the folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in config:
        import timm
        from safetensors.torch import load_file

        tower = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
        weights = load_file(folder / "model.safetensors")
        known = tower.state_dict()
        tower.load_state_dict({name: weight for name, weight in weights.items() if name in known})
        return tower.to(dtype)
    from transformers import AutoConfig, AutoModel

    parsed = AutoConfig.from_pretrained(folder)
    if hasattr(parsed, "vision_config"):  # a CLIP or SigLIP folder holds a text tower too
        parsed = parsed.vision_config
    return AutoModel.from_pretrained(folder, config=parsed, dtype=dtype)
