"""The control tokens of a template and a model, found in the tokenizer and kept out of texts."""

from vlm_tune.data.text.pieces import ImageIds
from vlm_tune.data.text.templates import Template
from vlm_tune.data.text.tokens import TextTokenizer
from vlm_tune.errors import ConfigError


def find_stop_ids(tokens: TextTokenizer, template: Template) -> tuple[int, ...]:
    """Return the tokens that end generation: the template's, then the tokenizer's own."""
    stop = template.stop
    parts = tokens.control(stop) if stop else ()
    if stop and not isinstance(parts[-1], int):
        raise ConfigError(
            f"model.template={template.name} ends an answer with {stop!r}, which is not one token of the tokenizer "
            f"{tokens.name}: choose the template of this language model, or model.template=tokenizer"
        )
    ids = [part for part in (*parts[-1:], tokens.eos_id) if isinstance(part, int)]
    return tuple(dict.fromkeys(ids))


def find_image_ids(tokens: TextTokenizer, start: str, context: str, end: str) -> ImageIds:
    """Return the tokens of a picture; "" means none. Raise ConfigError for one that the tokenizer lacks."""
    ids = {content: tokens.token_id(content) for content in (start, context, end) if content}
    for content, token_id in ids.items():
        if token_id is None:
            raise ConfigError(f"the tokenizer {tokens.name} has no special token {content!r} for pictures: add it")
    edges = [tuple(token_id for token_id in (ids.get(each),) if token_id is not None) for each in (start, end)]
    return ImageIds(edges[0], ids.get(context), edges[1])


def refuse_control(tokens: TextTokenizer, stop_ids: tuple[int, ...], image: ImageIds) -> None:
    """Refuse a model.markup that names a token that ends turns or represents pictures."""
    control = {*stop_ids, tokens.bos_id, image.context, *image.start, *image.end}
    if clash := next((content for content, token_id in tokens.markup.items() if token_id in control), ""):
        raise ConfigError(
            f"model.markup names {clash!r}, which ends answers or stands for a picture: a text that holds it would "
            "break its own row. Remove it from the list"
        )
