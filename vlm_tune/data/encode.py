"""(3) Turn a Sample into token ids and labels, built together, turn by turn, in one pass."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Encoding

from vlm_tune.data.fit import EncoderSettings, Fit, Tiling, fault_of, fit_pictures, least_of, no_pictures, too_long
from vlm_tune.data.pictures.anyres import Spread
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.data.text.long_rows import Beginning, most_turns, shortened
from vlm_tune.data.text.markup import find_markup
from vlm_tune.data.text.pieces import Item, drop_last_space, is_supervised_first, keys_of, lay_out
from vlm_tune.data.text.templates import PLAIN_TEXT, Template, render
from vlm_tune.data.text.tokens import PlainKey, TextTokenizer
from vlm_tune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100  # label of a token that is not supervised
FEW = 8  # turns that trim_text leaves out one by one


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one encoded sample of L tokens."""

    id: str
    where: str
    input_ids: np.ndarray  # (L,) int32
    labels: np.ndarray  # (L,) int32, each at its own token's position (not shifted); -100 = no loss
    num_tiles: tuple[int, ...] = ()  # of each picture; fewer than the sample's pictures where trim_text left turns out
    max_tiles: int = 0  # the limit that `num_tiles` was made with
    note: str = ""  # what data.on_too_long did to the row: "fewer_tiles: 13 -> 7 tiles"
    spreads: tuple[Spread, ...] = ()  # how the tiles of each picture lie, where that decides its tokens

    @property
    def num_supervised(self) -> int:
        """Count the tokens that carry loss; the first one never does, as nothing before it could predict it."""
        return int(np.count_nonzero(self.labels[1:] != NO_LOSS))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Hold what an index needs of an encoded sample, without its tokens."""

    num_tokens: int
    num_supervised: int
    num_tiles: tuple[int, ...] = ()
    max_tiles: int = 0
    note: str = ""


class Encoder:
    """Encode samples for one tokenizer, template and set of limits."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, settings: EncoderSettings | None = None
    ) -> None:
        self.template = template
        self.settings = settings or EncoderSettings()
        markup = self.settings.markup
        if markup is None:
            edges = self.settings.image_start, self.settings.image_context, self.settings.image_end
            markup = find_markup(tokenizer, template, edges)
        self._tokens = TextTokenizer(tokenizer, self.settings.add_bos, markup)
        if self.settings.system and not template.system:
            raise ConfigError(f"model.system is set, but model.template={template.name} has no place for it: remove it")
        name = tokenizer.name_or_path
        self.stop_ids = self._find_stop_ids(name)
        self.context_id = self._find_token(self.settings.image_context, name)  # None = takes no pictures
        self._start_ids = self._image_edge(self.settings.image_start, name)
        self._end_ids = self._image_edge(self.settings.image_end, name)
        self._refuse_control()

    @property
    def markup(self) -> dict[str, int]:
        """Name the added tokens that texts may write, with their ids."""
        return self._tokens.markup

    def fingerprint(self) -> str:
        """Name all that decides how many tokens a sample has: tokenizer, template, limits."""
        return f"{self._tokens.fingerprint()} {self.template} {self.settings}"

    def encode(self, sample: Sample, tiling: Tiling = no_pictures) -> Example:
        """Encode a sample for training: ids and labels (L,).

        `tiling(max_tiles)` gives the tiles of each picture. It is called with settings.max_tiles, and with smaller
        limits where data.on_too_long=fewer_tiles needs them.

        Raises DataError for a row without a supervised token or too long, SkippedSample where the policy is `skip`.
        """
        sample = self.shortened(sample)
        items = self._lay_out(sample)
        encodings = self._tokens.plain(keys_of(items))
        num_fixed, num_supervised = self._count(items, encodings)
        _check_supervised(sample, num_supervised)
        fit = fit_pictures(sample, num_fixed, tiling, self.settings)
        if fit.is_long:
            return self._trim(sample, fit)
        return self._assemble(sample, items, encodings, fit)

    def shortened(self, sample: Sample) -> Sample:
        """Return a Beginning of a row that is far too long, else the sample itself."""
        return shortened(sample, self._tokens, self.settings.limit.tokens)

    def encode_prompt(self, sample: Sample, tiling: Tiling = no_pictures) -> Example:
        """Encode the question for generation: ids (L,) end after the header of the answer to the last question.

        Up to there they are those of `encode`; what follows the last question is left out. No label carries loss.
        Raises DataError for a prompt that is too long (its text is never trimmed), and for plain text, which asks
        nothing.
        """
        if sample.is_plain:
            raise fault_of(sample, "plain text holds no question to answer: give rows of a conversation")
        num_asked = len(sample.messages)
        while num_asked and sample.messages[num_asked - 1].role == "assistant":
            num_asked -= 1
        asked = self.shortened(replace(sample, messages=sample.messages[:num_asked]))
        num_pictures = len(asked.pictures)
        items = self._lay_out(asked, for_generation=True)
        encodings = self._tokens.plain(keys_of(items))
        num_fixed, _ = self._count(items, encodings)
        fit = fit_pictures(asked, num_fixed, lambda max_tiles: tiling(max_tiles)[:num_pictures], self.settings)
        if fit.is_long:
            raise too_long(asked, num_fixed, fit, self.settings)
        return self._assemble(asked, items, encodings, fit)

    def encode_lengths(self, samples: Sequence[Sample], tilings: Sequence[Tiling]) -> list[Lengths | DataError]:
        """Count the tokens of many samples at once, equal to `encode` one by one, in a fraction of its time.

        A faulty sample gives its error in place of its lengths, so that it does not stop the others.
        """
        results: list[Lengths | DataError] = []
        samples = [self.shortened(sample) for sample in samples]
        layouts = [self._try_lay_out(sample) for sample in samples]
        encodings = self._tokens.plain(key for items in layouts if isinstance(items, list) for key in keys_of(items))
        for sample, items, tiling in zip(samples, layouts, tilings, strict=True):
            try:
                results.append(
                    items if isinstance(items, DataError) else self._lengths(sample, items, encodings, tiling)
                )
            except DataError as error:
                results.append(error)
        return results

    def _try_lay_out(self, sample: Sample) -> list[Item] | DataError:
        try:
            return self._lay_out(sample)
        except DataError as error:
            return error

    def _lengths(
        self, sample: Sample, items: list[Item], encodings: dict[PlainKey, Encoding], tiling: Tiling
    ) -> Lengths:
        num_fixed, num_supervised = self._count(items, encodings)
        _check_supervised(sample, num_supervised)
        fit = fit_pictures(sample, num_fixed, tiling, self.settings)
        if fit.is_long:
            trimmed = self._trim(sample, fit)
            return Lengths(
                len(trimmed.input_ids), trimmed.num_supervised, trimmed.num_tiles, fit.max_tiles, trimmed.note
            )
        num_tokens = num_fixed + sum(fit.num_tokens)
        return Lengths(num_tokens, num_supervised, fit.num_tiles, fit.max_tiles, fit.note)

    def _lay_out(self, sample: Sample, for_generation: bool = False) -> list[Item]:
        template, system = (PLAIN_TEXT, None) if sample.is_plain else (self.template, self.settings.system)
        thought = self.settings.reasoning_loss
        segments = render(template, sample, system, for_generation=for_generation, reasoning_loss=thought)
        bos_id = None if template.has_bos else self._tokens.bos_id
        items = lay_out(segments, self._tokens, bos_id, splits_at_pictures=not self._start_ids)
        if for_generation and template.assistant.endswith(" "):
            items = drop_last_space(items)
        if sum(isinstance(item, Picture) for item in items) != len(sample.pictures):
            raise fault_of(
                sample, f"a picture in a turn that model.template={template.name} leaves out: remove the turn"
            )
        return items

    def _count(self, items: list[Item], encodings: dict[PlainKey, Encoding]) -> tuple[int, int]:
        """Count the tokens without those of the tiles, and the supervised ones."""
        num_fixed = num_supervised = 0
        for item in items:
            if isinstance(item, Picture):
                num_fixed += len(self._start_ids) + len(self._end_ids)
            elif isinstance(item, tuple):
                num_fixed += 1
                num_supervised += item[1]
            else:
                encoding = encodings[item.opens, item.text]
                num_fixed += len(encoding)
                num_supervised += sum(end - start for start, end, supervised in item.spans(encoding) if supervised)
        if items and num_supervised and is_supervised_first(items[0]):
            num_supervised -= 1
        return num_fixed, num_supervised

    def _assemble(self, sample: Sample, items: list[Item], encodings: dict[PlainKey, Encoding], fit: Fit) -> Example:
        """Put ids and labels together, each token beside its label."""
        ids, labels = array("i"), array("i")

        def add(tokens: Sequence[int], supervised: bool) -> None:
            ids.extend(tokens)
            labels.extend(tokens if supervised else [NO_LOSS] * len(tokens))

        num_tokens = iter(fit.num_tokens)
        for item in items:
            if isinstance(item, Picture):
                add((*self._start_ids, *[self.context_id or 0] * next(num_tokens), *self._end_ids), False)
            elif isinstance(item, tuple):
                add(item[:1], item[1])
            else:
                encoding = encodings[item.opens, item.text]
                tokens = encoding.ids
                for start, end, supervised in item.spans(encoding):
                    add(tokens[start:end], supervised)
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

    def _trim(self, sample: Sample, fit: Fit) -> Example:
        """Leave out last turns, and where one turn alone is too long, the tail of its text."""
        max_length = self.settings.limit.tokens
        answers = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
        num_answers = sample.num_answers if isinstance(sample, Beginning) else len(answers)
        most = most_turns(sample, self._tokens, max_length) if len(answers) > FEW else len(answers)
        shortest: Example | None = None
        for num_turns in range(most, 0, -1):
            shorter = replace(sample, messages=sample.messages[: answers[num_turns - 1] + 1])
            kept = fit.first(len(shorter.pictures))
            items = self._lay_out(shorter)
            example = self._assemble(shorter, items, self._tokens.plain(keys_of(items)), kept)
            if example.num_supervised == 0:
                break
            left_out = num_answers - num_turns
            shortest = replace(example, note=f"trim_text: {left_out} of {num_answers} turns left out")
            if len(example.input_ids) <= max_length:
                return shortest
        assert shortest is not None  # `encode` found a supervised token
        num_cut = len(shortest.input_ids) - max_length
        note = f"{shortest.note}, {least_of(sample)}{num_cut} tokens cut"
        cut = replace(
            shortest, input_ids=shortest.input_ids[:max_length], labels=shortest.labels[:max_length], note=note
        )
        num_image = np.count_nonzero(shortest.input_ids == self.context_id)
        if cut.num_supervised == 0 or np.count_nonzero(cut.input_ids == self.context_id) != num_image:
            first = f"{least_of(sample)}{np.argmax(shortest.labels != NO_LOSS)}"
            raise fault_of(
                sample,
                f"{first} tokens before the first answer ({num_image} of pictures), but {self.settings.limit.name}: no "
                f"text to train on is left after trimming: {self.settings.limit.remedy}, lower model.tiles.max or set "
                "data.on_too_long=skip",
            )
        return cut

    def _refuse_control(self) -> None:
        """Keep texts from writing what ends a turn or stands for a picture, whatever model.markup says."""
        control = {*self.stop_ids, self._tokens.bos_id, self.context_id, *self._start_ids, *self._end_ids}
        if clash := next((content for content, token_id in self.markup.items() if token_id in control), ""):
            raise ConfigError(
                f"model.markup names {clash!r}, which ends answers or stands for a picture: a text that holds it "
                "would break its own row. Remove it from the list"
            )

    def _find_stop_ids(self, tokenizer_name: str) -> tuple[int, ...]:
        """Return the tokens that end generation: the template's, then the tokenizer's own."""
        stop = self.template.stop
        parts = self._tokens.control(stop) if stop else ()
        if stop and not isinstance(parts[-1], int):
            raise ConfigError(
                f"model.template={self.template.name} ends an answer with {stop!r}, which is not one token of the "
                f"tokenizer {tokenizer_name}: choose the template of this language model, or model.template=tokenizer"
            )
        ids = [part for part in (*parts[-1:], self._tokens.eos_id) if isinstance(part, int)]
        return tuple(dict.fromkeys(ids))

    def _find_token(self, content: str, tokenizer_name: str) -> int | None:
        if not content:
            return None
        token_id = self._tokens.token_id(content)
        if token_id is None:
            raise ConfigError(f"the tokenizer {tokenizer_name} has no special token {content!r} for pictures: add it")
        return token_id

    def _image_edge(self, content: str, tokenizer_name: str) -> tuple[int, ...]:
        token_id = self._find_token(content, tokenizer_name)
        return () if token_id is None else (token_id,)


def _check_supervised(sample: Sample, num_supervised: int) -> None:
    if num_supervised == 0:
        raise fault_of(sample, "no supervised token: the row needs an answer with text whose loss flag is not off")
