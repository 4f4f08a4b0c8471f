"""How a sample fits: the tiles of its pictures, the limit of its tokens, and what data.on_too_long does beyond it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_tune.config.schema import TooLong
from vlm_tune.data.example import NO_LOSS, Example
from vlm_tune.data.pictures.anyres import Spread, count_tokens
from vlm_tune.data.sample import Sample
from vlm_tune.data.text.long_rows import Beginning, most_turns
from vlm_tune.data.text.positions import UNLIMITED, Limit, Positions
from vlm_tune.data.text.tokens import TextTokenizer
from vlm_tune.errors import DataError
from vlm_tune.words import counted

FEW = 8  # turns that trim_text leaves out one by one

Tiling = Callable[[int], Sequence[int] | Sequence[Spread]]
"""Returns the tiles of each picture of a sample, in the order of the text, if the sample may have that many in all.

A Spread also says how they lie, which decides the number of tokens if rows end with a newline.
"""


def no_pictures(max_tiles: int) -> tuple[int, ...]:
    """Return no tiles, for a sample without pictures."""
    return ()


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """How pictures appear in the token sequence, and how long that may be."""

    image_start: str = "<img>"  # "" = none (LLaVA: the image token alone, repeated)
    image_context: str = "<IMG_CONTEXT>"  # each is replaced by one feature; "" = the model takes no pictures
    image_end: str = "</img>"
    tokens_per_tile: int = 256
    newline: bool = False  # any-resolution pictures without padding, each row ending with a newline token (LLaVA-NeXT)
    max_tiles: int = 12
    max_length: int = 8192
    positions: Positions = UNLIMITED  # of the language model: a sample must not reach beyond their end
    on_too_long: TooLong = TooLong.error
    system: str | None = None  # system prompt for rows without one; None = the template's own
    add_bos: bool | None = None  # None = as the tokenizer itself does
    markup: tuple[str, ...] | None = None  # added tokens that texts may contain; None = all that control nothing
    reasoning_loss: bool = True  # the reasoning before an answer is supervised too
    pairs: bool = False  # the rows to train on are pairs of answers

    @property
    def image_tokens(self) -> tuple[str, str, str]:
        """Return the tokens before a picture, for each of its features, and after it."""
        return self.image_start, self.image_context, self.image_end

    @property
    def limit(self) -> Limit:
        """Return the most tokens that a sample may have."""
        return self.positions.limit(self.max_length)


class SkippedSample(DataError):
    """A row that data.on_too_long=skip leaves out."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The tiles of a sample that fits into max_length, or `is_long` if its text must be trimmed."""

    num_tiles: tuple[int, ...]
    num_tokens: tuple[int, ...]  # of each picture
    spreads: tuple[Spread, ...]
    max_tiles: int
    note: str = ""
    is_long: bool = False

    def first(self, num_pictures: int) -> "Fit":
        """Return the fit of the first pictures alone."""
        kept = slice(num_pictures)
        parts = self.num_tiles[kept], self.num_tokens[kept], self.spreads[kept]
        return replace(self, num_tiles=parts[0], num_tokens=parts[1], spreads=parts[2])


def fit_pictures(sample: Sample, num_fixed: int, tiling: Tiling, settings: EncoderSettings) -> Fit:
    """Choose the tiles of each picture so that a sample of `num_fixed` other tokens fits, as data.on_too_long says.

    Raises DataError for a sample that is too long, SkippedSample if the policy is `skip`.
    """
    fit = _tile(sample, tiling, settings.max_tiles, settings)
    room = settings.limit.tokens - num_fixed
    if sum(fit.num_tokens) <= room:
        return fit
    if settings.on_too_long is TooLong.trim_text:
        return replace(fit, is_long=True)
    if settings.on_too_long is TooLong.skip:
        num_tokens = f"{least_of(sample)}{num_fixed + sum(fit.num_tokens)}"
        raise SkippedSample(
            f"left out: {num_tokens} tokens, {settings.limit.name}, data.on_too_long=skip",
            sample.where,
            sample.id,
        )
    least = fit
    if settings.on_too_long is TooLong.fewer_tiles and fit.num_tiles:
        for max_tiles in range(settings.max_tiles - 1, 0, -1):
            fewer = _tile(sample, tiling, max_tiles, settings)
            if sum(fewer.num_tokens) <= room:
                note = f"fewer_tiles: {sum(fit.num_tiles)} -> {sum(fewer.num_tiles)} tiles"
                return replace(fewer, note=note)
            least = min(least, fewer, key=lambda each: sum(each.num_tokens))
    raise too_long(sample, num_fixed, least, settings)


def _tile(sample: Sample, tiling: Tiling, max_tiles: int, settings: EncoderSettings) -> Fit:
    num_pictures = len(sample.pictures)
    if num_pictures and not settings.image_context:
        raise fault_of(sample, f"{counted(num_pictures, 'picture')} in the row, but this model takes none: remove them")
    tiled: tuple[int | Spread, ...] = tuple(tiling(max_tiles))
    if isinstance(sample, Beginning):
        tiled = tiled[:num_pictures]
    per_tile = settings.tokens_per_tile
    assert len(tiled) == num_pictures, f"the tiling gives {len(tiled)} pictures, the row has {num_pictures}"
    num_tiles = tuple(each if isinstance(each, int) else each.num_tiles for each in tiled)
    if not settings.newline:
        return Fit(num_tiles, tuple(per_tile * number for number in num_tiles), (), max_tiles)
    spreads = tuple(each for each in tiled if isinstance(each, Spread))
    assert len(spreads) == num_pictures, "a picture whose rows end with a newline has a Spread"
    return Fit(num_tiles, tuple(count_tokens(spread, per_tile) for spread in spreads), spreads, max_tiles)


def trim(
    sample: Sample,
    fit: Fit,
    settings: EncoderSettings,
    tokens: TextTokenizer,
    encode: Callable[[Sample, Fit], Example],
) -> Example:
    """Leave out the last turns, and if one turn alone is too long, the end of its text.

    `encode` returns ids and labels of a sample whose pictures have their tiles. Raises DataError if no supervised token
    would be left, or a picture would be cut.
    """
    max_length = settings.limit.tokens
    answers = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
    num_answers = sample.num_answers if isinstance(sample, Beginning) else len(answers)
    most = most_turns(sample, tokens, max_length) if len(answers) > FEW else len(answers)
    shortest: Example | None = None
    for num_turns in range(most, 0, -1):
        shorter = replace(sample, messages=sample.messages[: answers[num_turns - 1] + 1])
        example = encode(shorter, fit.first(len(shorter.pictures)))
        if example.num_supervised == 0:
            break
        left_out = num_answers - num_turns
        shortest = replace(example, note=f"trim_text: {left_out} of {num_answers} turns left out")
        if len(example.input_ids) <= max_length:
            return shortest
    assert shortest is not None  # the whole sample holds a supervised token
    return _cut(sample, shortest, settings, tokens)


def _cut(sample: Sample, example: Example, settings: EncoderSettings, tokens: TextTokenizer) -> Example:
    limit = settings.limit
    note = f"{example.note}, {least_of(sample)}{len(example.input_ids) - limit.tokens} tokens cut"
    ids, labels = example.input_ids[: limit.tokens], example.labels[: limit.tokens]
    cut = replace(example, input_ids=ids, labels=labels, note=note)
    context_id = tokens.token_id(settings.image_context)
    num_image = np.count_nonzero(example.input_ids == context_id)
    if cut.num_supervised == 0 or np.count_nonzero(ids == context_id) != num_image:
        first = f"{least_of(sample)}{np.argmax(example.labels != NO_LOSS)}"
        raise fault_of(
            sample,
            f"{first} tokens before the first answer ({num_image} of pictures), but {limit.name}: no text to train on "
            f"is left after trimming: {limit.remedy}, lower model.tiles.max or set data.on_too_long=skip",
        )
    return cut


def too_long(sample: Sample, num_fixed: int, fit: Fit, settings: EncoderSettings) -> DataError:
    """Return the error for a sample that is still too long: its tokens, the limit, and the ways out."""
    num_image = sum(fit.num_tokens)
    pictures = f" ({num_fixed} of text, {num_image} of {sum(fit.num_tiles)} tiles)" if num_image else ""
    lower = ", lower model.tiles.max" if num_image else ""
    useless = {TooLong.error, settings.on_too_long} | (set() if num_image else {TooLong.fewer_tiles})
    policies = " or ".join(policy.value for policy in TooLong if policy not in useless)
    return fault_of(
        sample,
        f"{least_of(sample)}{num_fixed + num_image} tokens{pictures}, but {settings.limit.name}: "
        f"{settings.limit.remedy}{lower}, or set data.on_too_long={policies}",
    )


def least_of(sample: Sample) -> str:
    """Return "at least " if only the beginning of a row was counted, else ""."""
    return "at least " if isinstance(sample, Beginning) else ""


def fault_of(sample: Sample, reason: str) -> DataError:
    """Return the error to raise for a sample, with its location and id."""
    return DataError(reason, sample.where, sample.id)
