"""From vision features to tokens of the language model: pixel shuffle, or a Q-Former, then a small network."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm_tune.config.schema import ProjectorConfig
from vlm_tune.data.pictures.anyres import NEWLINE, Spread, token_order
from vlm_tune.errors import ConfigError

HEAD_WIDTH = 64  # of a Q-Former


def pixel_shuffle(features: Tensor, shuffle: int, version: str = "v2") -> Tensor:
    """(T, P, C) -> (T, P/r^2, r^2*C): fold each r x r block of patches into one token.

    Channels are ordered (row in block, column in block, c). v1 gives the same tokens in transposed order.
    Source: InternVL `modeling_internvl_chat.py:pixel_shuffle`.

    >>> pixel_shuffle(torch.zeros(1, 1024, 8), 2).shape
    torch.Size([1, 256, 32])
    """
    if shuffle == 1:
        return features
    num_tiles, num_patches, width = features.shape
    side = int(num_patches**0.5)
    grid = features.view(num_tiles, side // shuffle, shuffle, side // shuffle, shuffle, width)
    order = (0, 3, 1, 2, 4, 5) if version == "v1" else (0, 1, 3, 2, 4, 5)
    tokens = grid.permute(*order).reshape(num_tiles, -1, shuffle**2 * width)  # (T, S, r*r*C)
    return tokens


def tokens_per_tile(config: ProjectorConfig, num_patches: int) -> int:
    """Return S, the tokens of a tile of `num_patches` patches."""
    return config.num_queries if config.kind == "qformer" else num_patches // config.shuffle**2


class QFormer(nn.Module):
    """Read the features of a tile with learned queries: (T, P, C) -> (T, S, width), whatever P is.

    Source: Li et al. 2023, "BLIP-2", with transformers' own Q-Former; every other layer looks at the features. They are
    normed first, as BLIP-2 norms them behind its encoder (`ln_vision`).
    """

    def __init__(self, config: ProjectorConfig, vision_width: int) -> None:
        super().__init__()
        width = config.qformer_width
        if width % HEAD_WIDTH:
            raise ConfigError(f"model.projector.qformer_width={width}: set a multiple of {HEAD_WIDTH}")
        sizes = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=config.qformer_layers,
            num_attention_heads=width // HEAD_WIDTH,
            intermediate_size=4 * width,
            encoder_hidden_size=vision_width,
        )
        self.queries = nn.Parameter(torch.randn(1, config.num_queries, width) * sizes.initializer_range)
        self.norm = nn.LayerNorm(vision_width)
        self.layers = Blip2QFormerModel(sizes)

    def forward(self, features: Tensor) -> Tensor:
        """(T, P, C) -> (T, S, width)."""
        queries = self.queries.expand(len(features), -1, -1)  # (T, S, _)
        read: Tensor = self.layers(query_embeds=queries, encoder_hidden_states=self.norm(features)).last_hidden_state
        return read


class Projector(nn.Module):
    """Map shuffled vision features to the language model's width: (T, S, r^2*C) -> (T, S, D).

    mlp         LayerNorm, Linear, GELU, Linear   (InternVL)
    mlp2x_gelu  Linear, GELU, Linear              (LLaVA 1.5)
    linear      Linear                            (LLaVA)
    qformer     Q-Former, Linear                  (BLIP-2, MiniGPT-4)
    """

    def __init__(self, config: ProjectorConfig, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.config = config
        self.reader = QFormer(config, vision_width) if config.kind == "qformer" else None
        width = config.qformer_width if self.reader is not None else vision_width * config.shuffle**2
        self.layer_norm = nn.LayerNorm(width) if config.kind == "mlp" else nn.Identity()
        self.linear_1 = nn.Linear(width, llm_width, bias=config.bias)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(llm_width, llm_width, bias=config.bias)
        self.newline = nn.Parameter(torch.randn(llm_width) * llm_width**-0.5) if config.newline else None
        if config.kind in ("linear", "qformer"):
            self.act, self.linear_2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        elif config.kind not in ("mlp", "mlp2x_gelu"):
            raise ConfigError(
                f"model.projector.kind={config.kind}: no such projector. There are: mlp, mlp2x_gelu, linear, qformer"
            )

    def forward(self, features: Tensor, spreads: Sequence[Spread] = ()) -> Tensor:
        """(T, P, C) -> (T, S, D), or the tokens of any-resolution pictures with their newlines: (_, D)."""
        if self.reader is not None:
            tokens = self.reader(features)  # (T, S, _)
        else:
            tokens = pixel_shuffle(features, self.config.shuffle, self.config.shuffle_version)  # (T, S, r*r*C)
        tokens = self.linear_2(self.act(self.linear_1(self.layer_norm(tokens))))  # (T, S, D)
        return self.lay_out(tokens, spreads) if spreads else tokens

    def lay_out(self, tokens: Tensor, spreads: Sequence[Spread]) -> Tensor:
        """Put the tokens (T, S, D) of whole any-resolution pictures in rows; those of others stay as they are."""
        return tokens if self.newline is None else arrange(tokens, self.newline, spreads)

    @torch.no_grad()
    def match_scale(self, embeddings: Tensor) -> None:
        """Scale a new projector's output to the spread of the token embeddings (V, D).

        Its first tokens then look like words to the language model: without this the first steps only shrink them.
        """
        last = self.linear_1 if isinstance(self.linear_2, nn.Identity) else self.linear_2
        width = last.in_features
        # a normalised input of unit variance passes GELU with a second moment of about 0.3 after a default Linear
        probe = torch.randn(256, width, generator=torch.Generator().manual_seed(0)).to(last.weight)
        probe *= 0.4 if last is self.linear_2 else 1.0
        spread = (probe @ last.weight.T).std()
        wanted = float(embeddings.float().std())  # a number: a quantized model's embeddings are on the GPU already
        last.weight.mul_(wanted / spread)
        if last.bias is not None:
            last.bias.zero_()
        if self.newline is not None:
            self.newline.mul_(wanted / self.newline.std())


def arrange(tokens: Tensor, newline: Tensor, spreads: Sequence[Spread]) -> Tensor:
    """Lay the tokens of any-resolution pictures out in rows: (T, S, D) and the newline (D,) -> (_, D)."""
    num_tiles, per_tile, _ = tokens.shape
    assert sum(spread.num_tiles for spread in spreads) == num_tiles, f"{num_tiles} tiles, but spreads for {spreads}"
    orders, start, last = [], 0, num_tiles * per_tile
    for spread in spreads:
        order = token_order(spread, per_tile)
        orders.append(np.where(order == NEWLINE, last, order + start))
        start += spread.num_tiles * per_tile
    known = torch.cat([tokens.flatten(0, 1), newline.to(tokens.dtype).unsqueeze(0)])
    return known.index_select(0, torch.from_numpy(np.concatenate(orders)).to(tokens.device))
