"""Answer prompts: the encoder builds the tokens, transformers' own generation does the rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig

from vlm_tune.data.example import Example
from vlm_tune.model.build import Model, answer_settings
from vlm_tune.model.parts.shards import release

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prompt:
    """An encoded conversation that waits for an answer, with its tiles (T, H, W, 3)."""

    example: Example
    tiles: npt.NDArray[np.uint8]


@contextmanager
def answering(model: Model) -> Iterator[None]:
    """Switch to eval mode and the training arithmetic, and back to each module's own mode afterwards."""
    vlm = model.vlm
    modes = {module: module.training for module in vlm.modules()}
    vlm.eval()
    dtype = vlm.llm.dtype
    try:
        with torch.no_grad(), torch.autocast(vlm.device.type, dtype, enabled=dtype in HALF):
            vlm.gather()
            yield
    finally:
        release(vlm)
        for module, mode in modes.items():
            module.training = mode


def answer(model: Model, prompts: list[Prompt], max_new_tokens: int = 64) -> list[str]:
    """Answer a batch of prompts greedily; prompts are padded on the left, which their positions skip."""
    ids = answer_ids(model, prompts, max_new_tokens)
    return [answer_text(model, row.tolist()) for row in ids]


def answer_text(model: Model, ids: list[int]) -> str:
    """Decode an answer's tokens: without control tokens, with its markup (`<box>`).

    A tokenizer's own `skip_special_tokens` would drop both kinds: InternVL's marks every added token as special.
    """
    encoder = model.encoder
    special = {token_id for token_id, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    control = special.union(encoder.stop_ids) - set(encoder.markup.values())
    said = [token_id for token_id in ids if token_id not in control]
    return str(model.tokenizer.decode(said, skip_special_tokens=False)).strip()


def answer_ids(model: Model, prompts: list[Prompt], max_new_tokens: int) -> Tensor:
    """Return the tokens of the greedy answers, ends and padding included: (B, N)."""
    with answering(model):
        embeddings, mask = embed_prompts(model, prompts)
        ids: Tensor = model.vlm.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            generation_config=greedy(model, prompts, max_new_tokens),
            synced_gpus=model.vlm.is_split,  # devices that share sharded weights stop together
        )
    return ids


def greedy(model: Model, prompts: list[Prompt], max_new_tokens: int) -> GenerationConfig:
    """Describe greedy answers that end where the conversations of the model do, or where its positions end."""
    settings = answer_settings(model.encoder.stop_ids)
    last = model.encoder.settings.positions.end
    if last is not None:  # the last generated token needs no position: nothing reads it
        longest = max(len(prompt.example.input_ids) for prompt in prompts)
        max_new_tokens = max(1, min(max_new_tokens, last - longest + 1))
    settings.max_new_tokens = max_new_tokens
    return settings


def embed_prompts(model: Model, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Embed prompts side by side, padded on the left: (B, L, D) and their mask (B, L)."""
    vlm = model.vlm
    rows = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.example.input_ids.astype(np.int64)).to(vlm.device).unsqueeze(0)
        rows.append(ids)
    tiles = torch.from_numpy(np.concatenate([prompt.tiles for prompt in prompts])).to(vlm.device)
    spreads = [spread for prompt in prompts for spread in prompt.example.spreads]
    packed = vlm.embed(torch.cat(rows, dim=1), tiles, spreads=spreads)[0]  # (L, D)
    lengths = [row.shape[1] for row in rows]
    width = max(lengths)
    embeddings = packed.new_zeros(len(rows), width, packed.shape[-1])
    mask = torch.zeros(len(rows), width, dtype=torch.long, device=vlm.device)
    for row, piece in enumerate(packed.split(lengths)):
        embeddings[row, width - len(piece) :] = piece
        mask[row, width - len(piece) :] = 1
    return embeddings, mask
