"""What lies beside exported weights: tokenizer, chat template and picture settings, as trained."""

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
from vlm_tune.data.templates import Template
from vlm_tune.data.tiles import find_normalization
from vlm_tune.errors import ConfigError
from vlm_tune.model.pretrained import read_settings
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
    template = jinja_template(encoder.template, model.system, show_content(tokens.context))
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
    """Write the Jinja text that renders what a message says; `context` stands for a picture, a line break behind it."""
    return (
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{ '{context}\\n' }}}}"
        "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


def jinja_template(template: Template, system: str | None, content: str) -> str:
    """Write a template of ours as the Jinja text that transformers renders; `content` renders what a message says."""
    default = system if system is not None else template.default_system or ""
    before, _, after = template.user.partition("{question}")
    opening, _, closing = template.system.partition("{system}")
    unsaid = opening + default + closing if default else template.no_system
    turns = {
        "system": (opening, closing),
        "user": (before, after),
        "assistant": (template.assistant, template.end + template.after),
    }
    branches = [
        f"{{%- if message['role'] == {role!r} -%}}{{{{ {head!r} }}}}{content}{{{{ {tail!r} }}}}{{%- endif -%}}"
        for role, (head, tail) in turns.items()
    ]
    return (
        f"{{%- if messages[0]['role'] != 'system' -%}}{{{{ {unsaid!r} }}}}{{%- endif -%}}"
        f"{{%- for message in messages -%}}{''.join(branches)}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{ {template.assistant.removesuffix(' ')!r} }}}}{{%- endif -%}}"
    )
