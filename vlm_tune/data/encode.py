"""(3) Turn a Sample into token ids and labels, built together, turn by turn, in one pass."""

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.data.example import NO_LOSS, Example, Lengths, common_prefix, num_in_pack
from vlm_tune.data.fit import EncoderSettings, Fit, Tiling, fault_of, fit_pictures, no_pictures, too_long, trim
from vlm_tune.data.sample import Sample
from vlm_tune.data.text.control import find_image_ids, find_stop_ids, refuse_control
from vlm_tune.data.text.long_rows import shortened
from vlm_tune.data.text.markup import find_markup
from vlm_tune.data.text.pieces import (
    ImageSlot,
    Item,
    count,
    drop_last_space,
    head_of,
    lay_out,
    place_features,
    tokenize,
)
from vlm_tune.data.text.templates import PLAIN_TEXT, Template, render
from vlm_tune.data.text.tokens import TextTokenizer
from vlm_tune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encode samples for one tokenizer, template and set of limits."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, settings: EncoderSettings | None = None
    ) -> None:
        self.template = template
        self.settings = settings or EncoderSettings()
        markup, edges = self.settings.markup, self.settings.image_tokens
        if markup is None:
            markup = find_markup(tokenizer, template, edges)
        self._tokens = TextTokenizer(tokenizer, self.settings.add_bos, markup)
        if self.settings.system and not template.system:
            raise ConfigError(f"model.system is set, but model.template={template.name} has no place for it: remove it")
        self.stop_ids = find_stop_ids(self._tokens, template)  # tokens that end generation
        self._image = find_image_ids(self._tokens, *edges)
        self.context_id = self._image.context  # None = takes no pictures
        refuse_control(self._tokens, self.stop_ids, self._image)

    @property
    def markup(self) -> dict[str, int]:
        """Return the added tokens that texts may contain, with their ids."""
        return self._tokens.markup

    def fingerprint(self) -> str:
        """Return everything that decides how many tokens a sample has: tokenizer, template, limits."""
        return f"{self._tokens.fingerprint()} {self.template} {self.settings}"

    def encode(self, sample: Sample, tiling: Tiling = no_pictures) -> Example:
        """Encode a sample for training: ids and labels (L,).

        `tiling(max_tiles)` returns the tiles of each picture. It is called with settings.max_tiles, and with smaller
        limits if data.on_too_long=fewer_tiles needs them.

        Raises DataError for a row that is too long or has no supervised token, SkippedSample if the policy is `skip`.
        """
        sample = self.shortened(sample)
        items = self._lay_out(sample)
        tokenize(items, self._tokens)
        num_fixed, num_supervised = count(items)
        fit = self._fit(sample, num_fixed, num_supervised, tiling)
        return self._trim(sample, fit) if fit.is_long else _assemble(sample, items, fit)

    def encode_all(self, sample: Sample, tiling: Tiling = no_pictures) -> list[Example]:
        """Encode a conversation, or both answers of a pair, the chosen one first, behind pictures of the same tiles.

        Raises what `encode` raises; for a pair it says which answer is meant.
        """
        branches = sample.branches
        if len(branches) == 1:
            return [self.encode(sample, tiling)]
        examples: list[Example] = []
        faults: dict[str, DataError] = {}
        for name, branch in zip(("chosen", "rejected"), branches, strict=True):
            try:
                examples.append(self.encode(branch, tiling))
            except DataError as error:
                faults[name] = error
        if faults:
            first = next(iter(faults.values()))
            which = "both answers" if len(faults) > 1 else f"the {next(iter(faults))} answer"
            raise type(first)(f"with {which}: {first.reason}", first.where, first.sample_id)
        return self._alike(examples, branches, tiling)

    def encode_alike(self, samples: Sequence[Sample], tiling: Tiling = no_pictures) -> list[Example]:
        """Encode conversations about the same pictures, which get the same tiles in each. Raises what `encode` does."""
        return self._alike([self.encode(sample, tiling) for sample in samples], samples, tiling)

    def _alike(self, examples: list[Example], samples: Sequence[Sample], tiling: Tiling) -> list[Example]:
        fewest = min(example.max_tiles for example in examples)
        if all(example.max_tiles == fewest for example in examples):
            return examples
        limited = copy(self)  # one conversation left less room for the pictures
        limited.settings = replace(self.settings, max_tiles=fewest)
        note = next(example.note for example in examples if example.max_tiles == fewest)
        return [replace(limited.encode(sample, tiling), note=note) for sample in samples]

    def shortened(self, sample: Sample) -> Sample:
        """Return the Beginning of a row that is far too long, else the sample itself."""
        if sample.rejected is not None:  # its two conversations are shortened, one by one
            return sample
        return shortened(sample, self._tokens, self.settings.limit.tokens)

    def encode_prompt(self, sample: Sample, tiling: Tiling = no_pictures) -> Example:
        """Encode a prompt for generation: its ids (L,) end with the header of the answer to the last question.

        Up to there they equal those of `encode`; what follows the last question is left out. No label carries loss.
        Raises DataError for a prompt that is too long (its text is never trimmed), and for plain text, which has no
        question.
        """
        if sample.is_plain:
            raise fault_of(sample, "plain text holds no question to answer: give rows of a conversation")
        num_asked = len(sample.messages)
        while num_asked and sample.messages[num_asked - 1].role == "assistant":
            num_asked -= 1
        asked = self.shortened(replace(sample, messages=sample.messages[:num_asked]))
        num_pictures = len(asked.pictures)
        items = self._lay_out(asked, for_generation=True)
        tokenize(items, self._tokens)
        num_fixed, _ = count(items)
        fit = fit_pictures(asked, num_fixed, lambda max_tiles: tiling(max_tiles)[:num_pictures], self.settings)
        if fit.is_long:
            raise too_long(asked, num_fixed, fit, self.settings)
        return _assemble(asked, items, fit)

    def encode_lengths(self, samples: Sequence[Sample], tilings: Sequence[Tiling]) -> list[Lengths | DataError]:
        """Count the tokens of many samples at once, as `encode` would one by one, in a fraction of its time.

        A faulty sample yields its error in place of its lengths, so that it does not stop the others.
        """
        samples = [self.shortened(sample) for sample in samples]
        layouts = [self._try_lay_out(sample) for sample in samples]
        tokenize(chain.from_iterable(items for items in layouts if isinstance(items, list)), self._tokens)
        return [
            items if isinstance(items, DataError) else self._try_measure(sample, items, tiling)
            for sample, items, tiling in zip(samples, layouts, tilings, strict=True)
        ]

    def _try_lay_out(self, sample: Sample) -> list[Item] | DataError:
        try:
            if self.settings.pairs is not (sample.rejected is not None):
                raise _no_fit(sample)
            if sample.rejected is not None:
                return []  # measured whole, answer by answer
            return self._lay_out(sample)
        except DataError as error:
            return error

    def _try_measure(self, sample: Sample, items: list[Item], tiling: Tiling) -> Lengths | DataError:
        num_fixed, num_supervised = count(items)
        try:
            if sample.rejected is not None:
                return _measure_pair(self.encode_all(sample, tiling), sample)
            fit = self._fit(sample, num_fixed, num_supervised, tiling)
            if not fit.is_long:
                num_image = sum(fit.num_tokens)
                head, num_head = head_of(items)
                sizes = num_fixed + num_image, num_supervised, fit.num_tiles, fit.max_tiles, fit.note
                return Lengths(*sizes, head, num_head + num_image)
            trimmed = self._trim(sample, fit)
        except DataError as error:
            return error
        num_tokens = len(trimmed.input_ids)
        return Lengths(num_tokens, trimmed.num_supervised, trimmed.num_tiles, fit.max_tiles, trimmed.note)

    def _lay_out(self, sample: Sample, for_generation: bool = False) -> list[Item]:
        template, system = (PLAIN_TEXT, None) if sample.is_plain else (self.template, self.settings.system)
        thought = self.settings.reasoning_loss
        segments = render(template, sample, system, for_generation=for_generation, reasoning_loss=thought)
        items = lay_out(segments, self._tokens, None if template.has_bos else self._tokens.bos_id, self._image)
        if for_generation and template.assistant.endswith(" "):
            drop_last_space(items)
        if sum(isinstance(item, ImageSlot) for item in items) != len(sample.pictures):
            raise fault_of(
                sample, f"a picture in a turn that model.template={template.name} leaves out: remove the turn"
            )
        return items

    def _fit(self, sample: Sample, num_fixed: int, num_supervised: int, tiling: Tiling) -> Fit:
        if num_supervised == 0:
            raise fault_of(sample, "no supervised token: the row needs an answer with text whose loss flag is not off")
        return fit_pictures(sample, num_fixed, tiling, self.settings)

    def _trim(self, sample: Sample, fit: Fit) -> Example:
        return trim(sample, fit, self.settings, self._tokens, self._encode_fitted)

    def _encode_fitted(self, sample: Sample, fit: Fit) -> Example:
        items = self._lay_out(sample)
        tokenize(items, self._tokens)
        return _assemble(sample, items, fit)


def _no_fit(sample: Sample) -> DataError:
    if sample.rejected is None:
        return fault_of(
            sample,
            "one answer, but this stage trains on pairs (stage.preference): give the row a rejected answer too "
            "(docs/preferences.md), or take stage=finetune",
        )
    return fault_of(
        sample,
        "a pair of answers, but this stage trains on conversations: take stage=dpo or stage=mpo, or keep one answer",
    )


def _measure_pair(examples: list[Example], sample: Sample) -> Lengths:
    """Count the tokens of a pair as it stands in a pack."""
    ids, first = [example.input_ids for example in examples], examples[0]
    if np.array_equal(ids[0], ids[1]):
        raise fault_of(sample, "both answers of the pair have the same tokens: there is nothing to prefer")
    num_supervised = sum(example.num_supervised for example in examples)
    note = next((example.note for example in examples if example.note), "")
    sizes = num_in_pack(ids), num_supervised, first.num_tiles, first.max_tiles
    return Lengths(*sizes, note, num_shared=common_prefix(ids))


def _assemble(sample: Sample, items: list[Item], fit: Fit) -> Example:
    """Build ids and labels together, item by item."""
    place_features(items, fit.num_tokens)
    ids, labels = array("i"), array("i")
    for item in items:
        tokens = item.ids()
        start = len(ids)
        ids.extend(tokens)
        for number, supervised in item.spans():
            labels.extend(ids[start : start + number] if supervised else [NO_LOSS] * number)
            start += number
    return Example(
        id=sample.id,
        where=sample.where,
        input_ids=np.frombuffer(ids, dtype=np.int32),  # (L,)
        labels=np.frombuffer(labels, dtype=np.int32),  # (L,)
        num_tiles=fit.num_tiles,
        max_tiles=fit.max_tiles,
        note=fit.note,
        spreads=fit.spreads,
    )
