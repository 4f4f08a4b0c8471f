"""(5) The model: embed the text, insert the image features, run the language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from vlm_tune.data.batch import Batch, Cut
from vlm_tune.data.pictures.anyres import Spread
from vlm_tune.data.tiles import normalize
from vlm_tune.model.kernels.attention import Segments
from vlm_tune.model.kernels.exchange import of_all
from vlm_tune.model.kernels.last import last_layer
from vlm_tune.model.kernels.loss import supervised_loss, token_losses
from vlm_tune.model.kernels.packs_cpu import is_long, loss_in_parts, rounded_up
from vlm_tune.model.parts.experts import unevenness
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder


@dataclass(frozen=True)
class ImageTokens:
    """The special tokens around and in the place of a picture's features."""

    context: str = "<IMG_CONTEXT>"
    start: str = "<img>"
    end: str = "</img>"
    video: str = (
        "<video>"  # transformers' InternVL processor asks for one; the trainer itself writes frames as pictures
    )

    @property
    def all(self) -> list[str]:
        """The tokens that a tokenizer must know."""
        return [token for token in (self.start, self.end, self.context, self.video) if token]


@dataclass(frozen=True)
class View:
    """The encoder's input: tiles of this many pixels a side, normalised this way."""

    tile_size: int
    normalization: str


class VisionLanguageModel(nn.Module):
    """Answer from pictures and text.

    One step: tiles (T, H, W, 3) -> vision encoder (T, P, C) -> projector (T, S, D); token ids (B, L) -> embeddings
    (B, L, D); features take the places of the context tokens; the language model makes hidden states (B, L, D); the
    head and the loss see the N supervised positions only.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        projector: Projector,
        llm: PreTrainedModel,
        context_id: int,
        view: View,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.llm = llm
        self.context_id = context_id
        self.normalization = view.normalization
        self.tile_size = view.tile_size
        self.neftune = 0.0  # alpha of the noise on text embeddings while training
        self.router_loss = 0.0  # weight of the loss of unevenly used experts while training
        self.is_blind = False  # answer with image features set to zero, to measure what pictures contribute
        self.is_split = False  # weights are gathered as they are used: all devices must use the same ones
        self.group: ProcessGroup | None = None  # of devices that share a pack: a batch that is cut is this one's share
        self.kept_patches = 0  # of a tile, where pictures come as kept features: the encoder does not run

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.projector.parameters()).device

    def gather(self) -> None:
        """Do nothing on its own: FSDP2 takes this for a forward pass, and gathers the weights that are in no layer."""

    def see(self, tiles: Tensor) -> Tensor:
        """Run the vision encoder: tiles (T, H, W, 3) uint8 -> features (T, P, C)."""
        is_trained = any(parameter.requires_grad for parameter in self.vision.parameters())
        pixels = normalize(tiles, self.normalization, self.vision.dtype)  # (T, 3, H, W)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            features = self.vision(pixels)  # (T, P, C)
        return features

    def project(self, features: Tensor, spreads: Sequence[Spread] = (), cut: Cut | None = None) -> Tensor:
        """Translate features (T, P, C) into tokens (T, S, D), or as many as any-resolution pictures have.

        Of a pack that is cut: from this device's features, and those of the others, to the tokens in its stretch.
        """
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(next(self.projector.parameters()).dtype)
        tokens = self.projector(features, () if cut else spreads)  # (T, S, D)
        if cut is not None:
            assert self.group is not None, "only a device of a group holds a share"
            tokens = self.projector.lay_out(of_all(tokens, self.group)[: cut.num_tiles], spreads)
            tokens = tokens.reshape(-1, tokens.shape[-1])[slice(*cut.seen)]
        return torch.zeros_like(tokens) if self.is_blind else tokens

    def embed(
        self,
        input_ids: Tensor,
        tiles: Tensor | None,
        features: Tensor | None = None,
        spreads: Sequence[Spread] = (),
        places: Tensor | None = None,
        cut: Cut | None = None,
    ) -> Tensor:
        """Embed token ids (B, L), with the features of tiles (T, H, W, 3) in their places: (B, L, D).

        `places` are those of a batch; where they are not given they are looked up, for which the CPU waits.
        """
        embeddings = self.llm.get_input_embeddings()(input_ids)  # (B, L, D)
        if features is None and tiles is not None and len(tiles):
            features = self.see(tiles)  # (T, P, C)
        if features is None:
            return embeddings
        if places is None:
            places = (input_ids.flatten() == self.context_id).nonzero()[:, 0]
        return merge_features(embeddings, places, self.project(features, spreads, cut))

    def forward(self, batch: Batch) -> Tensor:
        """Sum of weighted losses of a batch: a scalar in float32; of pairs, the log-probabilities (pairs, 2)."""
        seen = batch.tiles, batch.features, batch.spreads, batch.image_places, batch.cut
        embeddings = self.embed(batch.input_ids, *seen)
        if self.training and self.neftune:
            embeddings = embeddings + self._noise(batch).to(embeddings)
        must_see = self.is_split or (self.training and self._learns_to_see())
        if batch.tiles is None and batch.features is None and must_see:
            embeddings = embeddings + self._unused_features().to(embeddings.dtype)
        if is_long(embeddings, batch) and not self.is_split and not self._spreads:
            return loss_in_parts(self._loss, embeddings, batch, self.llm)
        return self._loss(embeddings, batch)

    def _loss(self, embeddings: Tensor, batch: Batch) -> Tensor:
        if not self._spreads:  # a router counts every token
            embeddings, batch = rounded_up(embeddings, batch)
        decoded, head = self._decode(embeddings, batch), self.llm.get_output_embeddings()
        rows = self._read(decoded, batch)
        if batch.answers is None:
            loss = supervised_loss(rows, head, batch.targets, batch.weights)
            if not self._spreads:
                return loss
            is_token = None if batch.segments else _is_token(batch.position_ids)
            uneven = unevenness(decoded.router_logits, self.llm.config, is_token)
            return loss + self.router_loss * uneven * batch.weights.sum()  # its share of the optimizer step
        losses = token_losses(rows, head, batch.targets)[: sum(batch.answers)].split(batch.answers)
        return -torch.stack([each.sum() for each in losses]).view(-1, 2)

    def read(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Run the language model on the embeddings (B, L, D) of a batch: (N, D) where a supervised token follows."""
        return self._read(self._decode(embeddings, batch), batch)

    @property
    def _spreads(self) -> bool:
        return self.training and self.router_loss > 0

    @property
    def _is_short(self) -> bool:
        """Whether the last layer reads supervised tokens alone; its router must see all where they are spread."""
        return getattr(last_layer(self.llm.get_decoder()), "reads_rows", False) and not self._spreads

    def _read(self, decoded: Any, batch: Batch) -> Tensor:
        hidden: Tensor = decoded.last_hidden_state.flatten(0, 1)  # (N, D), or (B*L, D)
        return hidden if self._is_short else hidden[batch.predicting]

    def _decode(self, embeddings: Tensor, batch: Batch) -> Any:
        segments = None
        if batch.segments is not None:
            segments = Segments(batch.segments, batch.parents, self.group if batch.cut else None)
        return self.llm.get_decoder()(
            inputs_embeds=embeddings,
            position_ids=batch.position_ids,
            segments=segments,
            use_cache=False,
            **({"reading": batch.predicting} if self._is_short else {}),
            **({"output_router_logits": True} if self._spreads else {}),
        )

    def _noise(self, batch: Batch) -> Tensor:
        """Draw NEFTune's noise for text: U(-m, m) with m = alpha/sqrt(l*D) in a sample of l tokens: (B, L, D).

        Source: Jain et al. 2023, "NEFTune: noisy embeddings improve instruction finetuning".
        """
        rows, width = batch.input_ids.shape
        lengths = torch.tensor(batch.segments or _is_token(batch.position_ids).sum(1).tolist())
        repeats = torch.tensor(batch.segments or [width] * rows)
        depth = self.llm.get_input_embeddings().embedding_dim
        bounds = (self.neftune / (lengths * depth).sqrt()).repeat_interleave(repeats, output_size=rows * width)
        is_text = batch.input_ids != self.context_id
        bounds = bounds.view(rows, width, 1).to(self.device) * is_text.unsqueeze(-1)  # (B, L, 1)
        return (torch.rand(rows, width, depth, device=self.device) * 2 - 1) * bounds  # (B, L, D)

    def _learns_to_see(self) -> bool:
        return any(weight.requires_grad for part in (self.vision, self.projector) for weight in part.parameters())

    def _unused_features(self) -> Tensor:
        """Run one blank tile with no effect: a rank without pictures must still take part in the gradient exchange.

        So does a run of one rank: the optimizer treats a gradient of zero and none at all differently. Where weights
        are split it runs exactly what the others run: their encoder rests when features are kept.
        """
        if self.is_split and self.kept_patches:
            shape = (1, self.kept_patches, self.vision.width)
            features = torch.zeros(shape, dtype=self.vision.dtype, device=self.device)
        else:
            tile = torch.zeros(1, self.tile_size, self.tile_size, 3, dtype=torch.uint8, device=self.device)
            features = self.see(tile)
        return self.project(features, [Spread(1, 1, self.tile_size, self.tile_size)]).sum() * 0.0


def _is_token(position_ids: Tensor) -> Tensor:
    """Tell the tokens of rows that are padded right, whose positions (B, L) are 0 there, from their padding: (B, L)."""
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    return places <= position_ids.amax(1, keepdim=True)


def merge_features(embeddings: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Put features (T, S, D), or (N, D), into embeddings (B, L, D) at N flat places: (B, L, D).

    Counts are checked for each sample when a batch is made; here the sum must fit, or features would move to a
    neighbour's places.
    """
    features = features.reshape(-1, embeddings.shape[-1])
    num_places, num_features = len(places), len(features)
    assert num_places == num_features, f"{num_places} places for {num_features} image features in the batch"
    return embeddings.flatten(0, 1).index_copy(0, places, features.to(embeddings.dtype)).view_as(embeddings)
