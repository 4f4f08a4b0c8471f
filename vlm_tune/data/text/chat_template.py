"""Read a tokenizer's own chat template as a Template: rendered once with marks, cut at them, and checked."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from vlm_tune.data.sample import Message, Role, Sample
from vlm_tune.data.text.templates import Template, load_template, render
from vlm_tune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[Role, str]

QUESTION, ANSWER, SECOND_QUESTION, SECOND_ANSWER, SYSTEM = (f"\u27e6{word}\u27e7" for word in ("q", "a", "r", "b", "s"))
TWO_TURNS: tuple[Turn, ...] = (
    ("user", QUESTION),
    ("assistant", ANSWER),
    ("user", SECOND_QUESTION),
    ("assistant", SECOND_ANSWER),
)


def choose_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """Return the template of model.template: one of templates.yaml, or with `tokenizer` the tokenizer's own.

    Raises ConfigError for an unknown name, or a chat template that cannot be masked.
    """
    return read_chat_template(tokenizer) if name == "tokenizer" else load_template(name)


def read_chat_template(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """Turn the tokenizer's chat template into strings around the system prompt, questions and answers.

    The strings are the text between marks in a rendered conversation, so text of the user and of the template stay
    separate, and no row needs Jinja. Their output is compared with that of the chat template for conversations of one
    to three turns, with and without a system prompt, and for each prompt on the way.

    Raises ConfigError if turns cannot be written one after the other: if a template writes earlier turns differently
    from the last one (as Qwen3 does with its thoughts), a prompt is not the beginning of its conversation.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"model.template=tokenizer, but {tokenizer.name_or_path} has no chat template: name one")
    try:
        template = _cut(tokenizer)
    except ValueError as error:
        raise _unusable(tokenizer, f"turns do not follow one another ({error})") from error
    for trims in (False, True):
        template = replace(template, trims=trims)
        if all(_agrees(tokenizer, template, turns) for turns in _conversations(template)):
            return replace(template, reasoning=_cut_reasoning(tokenizer, template))
    raise _unusable(tokenizer, "its text for a conversation is not the sum of its turns")


def _cut(tokenizer: "PreTrainedTokenizerBase") -> Template:
    opening, middle, between, second_middle, closing = _split(tokenizer, TWO_TURNS)
    if middle != second_middle:
        raise ValueError(f"{middle!r} and {second_middle!r} stand before two answers")
    end = closing.rstrip()
    if not end or not between.startswith(closing):
        raise ValueError(f"an answer ends with {closing!r}, with {between!r} before the next question")
    header = between.removeprefix(closing)
    tail = _split(tokenizer, TWO_TURNS[:1])[1]  # of a question that no answer follows
    if not middle.startswith(tail):
        raise ValueError(f"{tail!r} ends a question, {middle!r} when an answer follows")
    template = Template(
        name="tokenizer",
        user=f"{header}{{question}}{tail}",
        assistant=middle.removeprefix(tail),
        end=end,
        after=closing.removeprefix(end),
        no_system=opening.removesuffix(header),
        first_user="" if opening.endswith(header) else f"{{question}}{tail}",
        has_bos=True,
    )
    before, after = _split_system(tokenizer)
    if not before + after:
        return template
    if opening.endswith(header) and after.endswith(header):
        return replace(template, system=f"{before}{{system}}{after.removesuffix(header)}")
    first_user = f"{{question}}{tail}"  # the header of the first question comes before the system prompt
    return replace(template, system=f"{before}{{system}}{after}", no_system=opening, first_user=first_user)


def _split(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn]) -> list[str]:
    """Render turns and return the text around their contents."""
    rest = _rendered(tokenizer, turns)
    pieces = []
    for _, mark in turns:
        piece, found, rest = rest.partition(mark)
        if not found:
            raise ValueError("a message is missing from the text")
        pieces.append(piece)
    return [*pieces, rest]


def _split_system(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Return the text before and after the system prompt; "" and "" if the template refuses one."""
    try:
        before, after, *_ = _split(tokenizer, (("system", SYSTEM), *TWO_TURNS))
    except (ConfigError, ValueError):
        return "", ""
    return before, after


def _cut_reasoning(tokenizer: "PreTrainedTokenizerBase", template: Template) -> str:
    """Return how the reasoning is written before each answer; "" if any answer is written without it."""
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER, "reasoning_content": SYSTEM},
    ]
    try:
        text = str(tokenizer.apply_chat_template([*turns, *turns], tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return ""
    found = [piece.partition(ANSWER)[0].removeprefix(template.assistant) for piece in text.split(template.assistant)]
    written = {piece for piece in found if SYSTEM in piece and QUESTION not in piece}
    return written.pop().replace(SYSTEM, "{reasoning}") if len(written) == 1 and text.count(SYSTEM) == 2 else ""


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], *, prompt: bool = False) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, TypeError, ValueError) as error:  # what a chat template raises to refuse a conversation
        raise _unusable(tokenizer, f"{type(error).__name__}: {error}") from error


def _conversations(template: Template) -> list[tuple[Turn, ...]]:
    """Return conversations to compare, with white space around their texts."""
    texts = ["\n first ", " second\n\n", "third", " fourth", "fifth ", "sixth"]
    turns: list[Turn] = [("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]
    plain = [tuple(turns[:end]) for end in range(1, len(turns) + 1)]
    if not template.system:
        return plain
    return plain + [(("system", " be kind\n"), *each) for each in plain]


def _agrees(tokenizer: "PreTrainedTokenizerBase", template: Template, turns: Sequence[Turn]) -> bool:
    sample = Sample("", tuple(Message(role, (text,)) for role, text in turns))
    is_prompt = turns[-1][0] == "user"
    ours = "".join(str(each.content) for each in render(template, sample, for_generation=is_prompt))
    if is_prompt and template.assistant.endswith(" "):
        ours = ours[:-1]  # as in our prompts: the space belongs to the first word of the answer
    return ours == _rendered(tokenizer, turns, prompt=is_prompt)


def _unusable(tokenizer: "PreTrainedTokenizerBase", reason: str) -> ConfigError:
    return ConfigError(
        f"model.template=tokenizer: the chat template of {tokenizer.name_or_path} cannot be masked, {reason}. "
        "Choose a template by name (data/text/templates.yaml)"
    )
