"""Files next to exported weights: tokenizer, chat template and picture settings, as trained."""

from pathlib import Path

from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerBase,
)

from vlm_tune.config.schema import ModelConfig, TileRule
from vlm_tune.data.encode import Encoder
from vlm_tune.data.text.templates import BOS, EOS, Template
from vlm_tune.data.tiles import find_normalization
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.pretrained import read_settings
from vlm_tune.model.vlm import ImageTokens


def save_processor(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, model: ModelConfig, folder: Path) -> None:
    """Write a native InternVL processor that makes the tokens and tiles of training.

    Raises ConfigError for a tile rule that transformers' processor does not know.
    """
    tiles = model.tiles
    if tiles.rule is not TileRule.dynamic and tiles.max > 1:
        raise ConfigError(f"layout=hf: transformers' processor has no tile rule {tiles.rule.value}: use layout=parts")
    mean, std = find_normalization(model.vision.normalize)
    pictures = GotOcr2ImageProcessorPil(
        size={"height": tiles.size, "width": tiles.size},
        crop_to_patches=tiles.max > 1,
        min_patches=tiles.min,
        max_patches=tiles.max,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )
    tokens = ImageTokens()
    named = {"start_image_token": tokens.start, "end_image_token": tokens.end, "context_image_token": tokens.context}
    tokenizer.save_pretrained(folder)
    # the processor asks for these by name, and only a tokenizer that is loaded with them knows them by name
    tokenizer = read_settings(AutoTokenizer, folder, extra_special_tokens={**named, "video_token": tokens.video})
    context = tokens.context
    template = jinja_template(encoder.template, tokenizer, model.system, show_content(context), show_pictures(context))
    tokenizer.chat_template = template
    processor = InternVLProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": tiles.size, "width": tiles.size}),
        image_seq_length=encoder.settings.tokens_per_tile,
        chat_template=template,
    )
    processor.save_pretrained(folder)


def show_content(context: str) -> str:
    """Write the Jinja text that renders what a message says; `context` is a picture, followed by a line break."""
    return (
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{ '{context}\\n' }}}}"
        "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


def show_pictures(context: str) -> str:
    """Write the Jinja text that renders a message's pictures alone, for a template that shows no question."""
    return (
        "{%- if message['content'] is not string -%}{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{ '{context}' }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}"
    )


def jinja_template(
    template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None, content: str, pictures: str = ""
) -> str:
    """Write a template of ours as the Jinja text that transformers renders.

    `content` renders what a message says, `pictures` its pictures alone.
    """
    bos = tokenizer.bos_token_id
    opens = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    marks = {BOS: str(tokenizer.bos_token) if opens else "", EOS: str(tokenizer.eos_token or "")}

    def say(text: str) -> str:
        for mark, token in marks.items():
            text = text.replace(mark, token)
        parts = [f"{{{{ {part!r} }}}}" for part in text.split("{round}")]  # counted from 1
        return "{{ count.turn }}".join(parts)

    def question(frame: str) -> str:
        slot, shown = ("{pictures}", pictures) if "{pictures}" in frame else ("{question}", content)
        before, _, after = frame.partition(slot)
        return say(before) + shown + say(after)

    default = system if system is not None else template.default_system or ""
    opening, _, closing = template.system.partition("{system}")
    unsaid = opening + default + closing if default else template.no_system
    again = marks[BOS] if template.is_xtuner and template.end.endswith(EOS) else ""  # XTuner opens each turn again
    user = question(again + template.user)
    if template.first_user or again:
        first = question(template.first_user or template.user)
        user = f"{{%- if count.turn == 1 -%}}{first}{{%- else -%}}{user}{{%- endif -%}}"
    turns = {
        "system": "" if "{pictures}" in template.user else say(opening) + content + say(closing),
        "user": "{%- set count.turn = count.turn + 1 -%}" + user,
        "assistant": say(template.assistant) + content + say(template.end + template.after),
    }
    branches = [f"{{%- if message['role'] == {role!r} -%}}{text}{{%- endif -%}}" for role, text in turns.items()]
    return (
        "{%- set count = namespace(turn=0) -%}"
        f"{{%- if messages[0]['role'] != 'system' -%}}{say(unsaid)}{{%- endif -%}}"
        f"{{%- for message in messages -%}}{''.join(branches)}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{say(template.assistant.removesuffix(' '))}{{%- endif -%}}"
    )
