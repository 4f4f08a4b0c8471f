"""Write a conversation as the text that a language model was trained on: templates are strings in templates.yaml."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import NamedTuple

import yaml

from vlm_tune.data.sample import Message, Part, Picture, Sample
from vlm_tune.errors import ConfigError, DataError

BOS = "<BOS>"  # in control text: the tokenizer's own first token, or nothing if it has none
EOS = "<EOS>"  # in control text: the tokenizer's own end token


@dataclass(frozen=True, slots=True)
class Template:
    """The strings around the texts of a conversation. A turn is `user` + `assistant` + answer + `end` + `after`.

    Only the answer and `end` are supervised.
    """

    name: str
    user: str  # holds {question} (text, with pictures in their places) or {pictures} (without the text)
    assistant: str  # header of an answer; generation starts after it
    end: str  # closes an answer; its last token ends generation
    after: str = ""  # follows `end`, no loss
    system: str = ""  # holds {system}; empty = no place for a system prompt
    default_system: str | None = None
    no_system: str = ""  # written in place of `system` if the conversation has no system prompt
    first_user: str = ""  # `user` of the first turn, if it differs
    drops_greeting: bool = False  # an answer before the first question is left out
    pictures_first: bool = False  # LLaVA: pictures move to the front of their turn, a newline after each
    trims: bool = False  # white space around a message is left out
    is_xtuner: bool = False  # pictures first; <BOS> again after <EOS>; question, answer, `after` tokenized separately
    has_bos: bool = False  # the strings hold the tokenizer's first token: none is put in front
    reasoning: str = "<think>\n{reasoning}\n</think>\n\n"  # written before an answer with reasoning; "" = no place

    @property
    def stop(self) -> str:
        """Return the text that ends generation."""
        return self.end.strip()


PLAIN_TEXT = Template(name="text", user="", assistant="", end=EOS)  # of rows without turns: the text and its end


class Segment(NamedTuple):
    """A stretch of a conversation: control text, text of the user, or a picture.

    Control text comes from the template and may become special tokens; text of the user never does.
    """

    content: str | Picture
    is_control: bool = False
    supervised: bool = False
    starts_piece: bool = False  # tokenized separately from what comes before


def load_template(name: str) -> Template:
    """Return the template of that name in templates.yaml.

    Raises ConfigError for an unknown name, with the nearest ones.
    """
    templates = _read_templates()
    if name not in templates:
        near = difflib.get_close_matches(name, templates, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(templates)}"
        raise ConfigError(f"model.template={name} is not a template; {hint}, or `tokenizer` for the tokenizer's own")
    return templates[name]


def template_names() -> tuple[str, ...]:
    """List the names that `load_template` knows."""
    return tuple(_read_templates())


@cache
def _read_templates() -> dict[str, Template]:
    text = resources.files("vlm_tune.data.text").joinpath("templates.yaml").read_text(encoding="utf-8")
    return {name: Template(name=name, **fields) for name, fields in yaml.safe_load(text).items()}


def render(
    template: Template,
    sample: Sample,
    system: str | None = None,
    *,
    for_generation: bool = False,
    reasoning_loss: bool = True,
) -> list[Segment]:
    """Return the segments of a sample, in order.

    The system prompt is the row's, else `system`, else the template's; an empty one is left out. With
    `for_generation` the header of an answer follows the sample, and nothing is supervised. The reasoning of an answer
    is supervised if the answer is, but never without `reasoning_loss`.

    Example (template chatml, question "Hi", answer "Hello"; c = control, * = supervised):
        c"<|im_start|>user\\n" "Hi" c"<|im_end|>\\n" c"<|im_start|>assistant\\n" *"Hello" c*"<|im_end|>" c"\\n"

    Raises DataError for a system prompt or reasoning that the template has no place for.
    """
    writer = _Writer()
    messages = _prepare(template, sample, system, for_generation)
    if not messages or messages[0].role != "system":
        writer.control(template.no_system)
    num_turns = 0
    previous = ""
    for message in messages:
        if template.is_xtuner and previous in ("", "assistant"):
            if previous and template.end.endswith(EOS):
                writer.control(BOS)
            writer.start_piece()
        if message.role == "system":
            writer.framed(template.system, "{system}", message.parts)
        elif message.role == "user":
            num_turns += 1
            _write_question(writer, template, message.parts, num_turns)
        else:
            if template.is_xtuner and previous != "user":  # XTuner's turns are pairs
                num_turns += 1
                _write_question(writer, template, (), num_turns)
            writer.control(template.assistant)
            if not for_generation or message is not messages[-1]:
                _write_answer(writer, template, message, reasoning_loss)
        previous = message.role
    return writer.segments


class _Writer:
    """Collect segments, dropping empty text."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._starts_piece = False

    def start_piece(self) -> None:
        self._starts_piece = True

    def add(self, content: Part, is_control: bool, supervised: bool) -> None:
        if content:
            self.segments.append(Segment(content, is_control, supervised, self._starts_piece))
            self._starts_piece = False

    def control(self, text: str, supervised: bool = False) -> None:
        self.add(text, True, supervised)

    def framed(self, frame: str, mark: str, parts: Sequence[Part]) -> None:
        """Write the frame with the parts in place of the mark."""
        before, _, after = frame.partition(mark)
        self.control(before)
        for part in parts:
            self.add(part, False, False)
        self.control(after)


def _prepare(template: Template, sample: Sample, system: str | None, for_generation: bool) -> list[Message]:
    """Choose the system prompt, and leave out what this template, or generation, has no place for."""
    kept = list(sample.messages)
    if for_generation:  # a place for the answer, and nothing supervised before it
        kept = [replace(each, supervised=False) for each in [*kept, Message("assistant", ())]]
    if not kept or kept[0].role != "system":
        chosen = template.default_system if system is None else system
        kept.insert(0, Message("system", (chosen or "",)))
    kept = [each for each in kept if each.role != "system" or any(each.parts)]
    if "{pictures}" in template.user:
        kept = [each for each in kept if each.role != "system"]
    elif not template.system and any(each.role == "system" for each in kept):
        reason = f"a system prompt, but model.template={template.name} has no place for one: remove it"
        raise DataError(reason, sample.where, sample.id)
    if not template.reasoning and any(each.reasoning for each in kept):
        reason = f"reasoning beside an answer, but model.template={template.name} has no place for it: remove it"
        raise DataError(reason, sample.where, sample.id)
    first = next((index for index, message in enumerate(kept) if message.role != "system"), None)
    has_question = any(each.role == "user" for each in kept)  # without one, the answer is no greeting
    if template.drops_greeting and has_question and first is not None and kept[first].role == "assistant":
        kept.pop(first)
    if template.trims:
        kept = [replace(each, parts=_trim(each.parts)) for each in kept]
    return kept


def _trim(parts: Sequence[Part]) -> tuple[Part, ...]:
    trimmed = list(parts)
    if trimmed and isinstance(trimmed[0], str):
        trimmed[0] = trimmed[0].lstrip()
    if trimmed and isinstance(trimmed[-1], str):
        trimmed[-1] = trimmed[-1].rstrip()
    return tuple(trimmed)


def _write_question(writer: _Writer, template: Template, parts: Sequence[Part], turn: int) -> None:
    frame = template.first_user if turn == 1 and template.first_user else template.user
    pictures = [part for part in parts if isinstance(part, Picture)]
    if "{pictures}" in frame:
        writer.framed(frame, "{pictures}", pictures)
        return
    if pictures and (template.pictures_first or template.is_xtuner):
        text = "".join(part for part in parts if isinstance(part, str)).strip()
        front = [part for picture in pictures for part in (picture, "\n")]
        parts = [*front, text] if text else front[:-1]
    writer.framed(frame.replace("{round}", str(turn)), "{question}", parts)


def _write_answer(writer: _Writer, template: Template, message: Message, reasoning_loss: bool) -> None:
    if template.is_xtuner:
        writer.start_piece()
    if message.reasoning:  # as text, not control: marks that are no tokens of the tokenizer are split, as in an answer
        thought = template.reasoning.replace("{reasoning}", message.reasoning.strip("\n"))
        writer.add(thought, False, message.supervised and reasoning_loss)
    for part in message.parts:
        writer.add(part, False, message.supervised and isinstance(part, str))
    writer.control(template.end, message.supervised)
    if template.is_xtuner:
        writer.start_piece()
    writer.control(template.after)
