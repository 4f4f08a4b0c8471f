"""Answer prompts: the encoder builds the tokens, transformers' own generation does the rest."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from vlm_tune.data.example import Example
from vlm_tune.model.build import DTYPES, Model, answer_settings, resolve_precision
from vlm_tune.model.parts.shards import release

SEEN = 32  # tiles that the encoder sees at a time: a pack holds about as many
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prompt:
    """An encoded conversation that waits for an answer, with its tiles (T, H, W, 3)."""

    example: Example
    tiles: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one, or by chance where the temperature is above 0."""

    temperature: float = 0.0
    top_p: float = 1.0  # share of the probability that is drawn from, the likeliest tokens first
    seed: int | None = None  # makes a drawn answer repeatable


GREEDY = Sampling()


class Writer:
    """One answer while it is written: `say` gets its text piece by piece, and ends it by returning False."""

    def __init__(self, model: Model, limit: int, say: Callable[[str], bool] = lambda _: True) -> None:
        self.model, self.limit, self.say = model, limit, say
        self.text, self.finish, self.num_tokens = "", "", 0

    def read(self, ids: list[int]) -> bool:
        """Take all tokens so far; return whether the answer is over: `finish` is stop, length or cancelled then.

        A character is said when all of its bytes are there. Pieces joined are the text that `answer` returns.
        """
        if not self.finish:
            self.num_tokens = len(ids)
            if ids[-1] in self.model.encoder.stop_ids:
                self.finish = "stop"
            elif len(ids) >= self.limit:
                self.finish = "length"
            text = answer_text(self.model, ids)
            text = text if self.finish else text.rstrip("\ufffd").rstrip()
            piece = text[len(self.text) :]
            self.text = text
            if piece and not self.say(piece):
                self.finish = "cancelled"
        return bool(self.finish)


@contextmanager
def answering(model: Model) -> Iterator[None]:
    """Switch to eval mode and the training arithmetic, and back to each module's own mode afterwards."""
    vlm = model.vlm
    modes = {module: module.training for module in vlm.modules()}
    vlm.eval()
    dtype = DTYPES[resolve_precision(model.config.trainer.precision)]
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


def write(model: Model, prompts: list[Prompt], writers: Sequence[Writer], sampling: Sampling = GREEDY) -> None:
    """Answer a batch of prompts, each token read by its prompt's writer at once."""

    def follow(ids: Tensor, scores: object, **_: object) -> Tensor:
        over = [writer.read(row) for writer, row in zip(writers, ids.tolist(), strict=True)]
        return torch.tensor(over, device=ids.device)

    seeded = torch.random.fork_rng() if sampling.seed is not None else nullcontext()
    with seeded:
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        answer_ids(model, prompts, max(writer.limit for writer in writers), sampling, [follow])
    for writer in writers:
        writer.finish = writer.finish or "length"  # the model's positions have ended


def answer_ids(
    model: Model,
    prompts: list[Prompt],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    criteria: Sequence[Callable[..., Tensor]] = (),
) -> Tensor:
    """Return the tokens of the answers, ends and padding included: (B, N); `criteria` may end rows early."""
    with answering(model):
        embeddings, mask = embed_prompts(model, prompts)
        ids: Tensor = model.vlm.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            generation_config=settings_of(model, prompts, max_new_tokens, sampling),
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=model.vlm.is_split,  # devices that share sharded weights stop together
        )
    return ids


def settings_of(
    model: Model, prompts: list[Prompt], max_new_tokens: int, sampling: Sampling = GREEDY
) -> GenerationConfig:
    """Describe answers that end where the conversations of the model do, or where its positions end."""
    settings = answer_settings(model.encoder.stop_ids)
    settings.max_new_tokens = min(max_new_tokens, room(model, prompts))
    if sampling.temperature > 0:
        settings.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    return settings


def room(model: Model, prompts: list[Prompt]) -> int:
    """Return how many tokens can follow the longest prompt; the last one needs no position, since nothing reads it."""
    last = model.encoder.settings.positions.end
    longest = max(len(prompt.example.input_ids) for prompt in prompts)
    return sys.maxsize if last is None else max(1, last - longest + 1)


def embed_prompts(model: Model, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Embed prompts side by side, padded on the left: (B, L, D) and their mask (B, L)."""
    vlm = model.vlm
    rows = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.example.input_ids.astype(np.int64)).to(vlm.device).unsqueeze(0)
        rows.append(ids)
    spreads = [spread for prompt in prompts for spread in prompt.example.spreads]
    packed = vlm.embed(torch.cat(rows, dim=1), None, see_once(model, prompts), spreads)[0]  # (L, D)
    lengths = [row.shape[1] for row in rows]
    width = max(lengths)
    embeddings = packed.new_zeros(len(rows), width, packed.shape[-1])
    mask = torch.zeros(len(rows), width, dtype=torch.long, device=vlm.device)
    for row, piece in enumerate(packed.split(lengths)):
        embeddings[row, width - len(piece) :] = piece
        mask[row, width - len(piece) :] = 1
    return embeddings, mask


def see_once(model: Model, prompts: list[Prompt]) -> Tensor | None:
    """Run the vision encoder on the tiles of all prompts, on equal ones once: (T, P, C), or None without tiles."""
    tiles = [tile for prompt in prompts for tile in prompt.tiles]
    if not tiles:
        return None
    keys = [tile.tobytes() for tile in tiles]
    distinct = dict(zip(keys, tiles, strict=True))
    place = {key: number for number, key in enumerate(distinct)}
    shown = torch.from_numpy(np.stack([*distinct.values()])).split(SEEN)
    features = torch.cat([model.vlm.see(each.to(model.vlm.device)) for each in shown])  # (distinct, P, C)
    return features[[place[key] for key in keys]]
