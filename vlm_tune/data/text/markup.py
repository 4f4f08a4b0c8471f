"""Distinguish added tokens that belong to the content (`<box>`, `<think>`) from those that control a conversation."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from vlm_tune.data.text.templates import Template, load_template, template_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that engines act upon with any chat template: placeholders of pictures, and the ends of a text or a turn.
_ACTED_UPON = re.compile(
    r"(?i)image|img|vision|video|audio|speech|<\|?(begin|start|end)_?of_?(text|turn|message|document|sequence)\|?>"
    r"|<\|e(o[stm]|nd)_?(id)?\|>|<[be]o[st]>|<(pad|unk|mask)>"
)


def find_markup(
    tokenizer: "PreTrainedTokenizerBase", template: Template, image_tokens: Iterable[str] = ()
) -> tuple[str, ...]:
    """List the added tokens of a tokenizer that belong to content, that is, all but the control tokens.

    Control tokens are those that a chat template writes (the chosen one, the tokenizer's own, any of templates.yaml),
    the tokenizer's named ones (bos, eos, pad, unk ...), the model's image tokens, and names that engines act upon.

    Example (InternVL2-2B): <quad> </quad> <ref> </ref> <box> </box> <|plugin|> <|interpreter|> <|action_start|> ...
    """
    named = {getattr(tokenizer, name, None) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    control = {*named, *image_tokens}
    templates = [template, *map(load_template, template_names())]
    written = "\n".join([*(text for each in templates for text in _strings(each)), _own_turns(tokenizer)])
    added = sorted(tokenizer.added_tokens_decoder.items())
    return tuple(
        token.content
        for _, token in added
        if token.content.strip()  # runs of white space control nothing either, but need not be named
        and token.content not in control
        and token.content not in written
        and not _ACTED_UPON.search(token.content)
    )


def _strings(template: Template) -> Iterator[str]:
    for each in fields(template):
        value = getattr(template, each.name)
        if isinstance(value, str) and each.name not in ("name", "reasoning"):
            yield value


def _own_turns(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render a conversation with the tokenizer's own chat template, whose tokens say who speaks.

    It is a question only: some templates write thoughts into an answer, and the tokens around those are content.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return ""
