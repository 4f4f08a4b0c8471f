"""The tokenizer's own chat template, read as strings: the same text and tokens, or a refusal."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.sample import Message, Sample
from vlm_tune.data.text.chat_template import choose_template, read_chat_template
from vlm_tune.data.text.templates import load_template
from vlm_tune.errors import ConfigError

TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": "{% for message in messages %}" + TURN + "{% endfor %}" + ASSISTANT,
    "default system prompt, as Qwen2 and SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}" + TURN + "{% endfor %}" + ASSISTANT
    ),
    "trimmed, first token, no system prompt, as Gemma": (
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% set role = 'model' if message['role'] == "
        "'assistant' else message['role'] %}{{ '<|user|>' + role + '\n' + message['content'] | trim + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>model\n' }}{% endif %}"
    ),
    "first token inside the first turn, as Llama 3": (
        "{% for message in messages %}{% set text = '<|user|>' + message['role'] + '\n\n' + message['content'] | trim "
        "+ '<|end|>' %}{{ bos_token + text if loop.index0 == 0 else text }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|user|>assistant\n\n' }}{% endif %}"
    ),
    "header that ends a question, as Mistral": (
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "system prompt inside the first question, as Llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' }}"
        "{% if loop.first and told is defined %}{{ '<<SYS>>\n' + told + '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
CASES = [(name, None) for name in CHAT_TEMPLATES]
CASES += [(name, "Be kind.") for name in CHAT_TEMPLATES if not name.endswith(("Gemma", "Mistral"))]  # these refuse one
TURNS = [("user", "What is it?"), ("assistant", "A cat."), ("user", "And <this>?"), ("assistant", "A dog.\n\nSure.")]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "golden" / "tokenizer")


def sample_of(turns):
    return Sample("a", tuple(Message(role, (text,), supervised=role == "assistant") for role, text in turns))


@pytest.mark.parametrize(("name", "system"), CASES)
def test_tokens_are_those_of_the_chat_template(name, system, tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    turns = TURNS if system is None else [("system", system), *TURNS]
    messages = [{"role": role, "content": text} for role, text in turns]
    encoder = Encoder(tokenizer, choose_template("tokenizer", tokenizer), EncoderSettings(add_bos=True))
    example = encoder.encode(sample_of(turns))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encoder.encode_prompt(sample_of(turns)).input_ids) == prompt


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_supervised_are_the_answers_and_their_end_tokens(name, tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    example = Encoder(tokenizer, read_chat_template(tokenizer)).encode(sample_of(TURNS))
    text = tokenizer.decode(example.labels[example.labels != NO_LOSS])
    end = text[-len(text.rpartition("Sure.")[2]) :]
    assert tokenizer.convert_tokens_to_ids(end.strip()) is not None
    assert text.replace(" A", "A") == f"A cat.{end}A dog.\n\nSure.{end}"


def test_text_of_the_user_is_not_control_in_it_either(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    example = Encoder(tokenizer, read_chat_template(tokenizer)).encode(sample_of([("user", "<|im_end|>"), TURNS[1]]))
    assert (example.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 2


def test_template_that_treats_the_last_answer_otherwise_is_refused(tokenizer):
    thinking = "{% if loop.last and message.role == 'assistant' %}{{ '<think>' }}{% endif %}"
    tokenizer.chat_template = "{% for message in messages %}" + thinking + TURN + "{% endfor %}" + ASSISTANT
    with pytest.raises(
        ConfigError, match=r"cannot be masked, turns do not follow one another .*Choose a template by name"
    ):
        read_chat_template(tokenizer)


def test_template_that_rewrites_messages_is_refused(tokenizer):
    shouting = TURN.replace("message['content']", "message['content'].replace('first', 'FIRST')")
    tokenizer.chat_template = "{% for message in messages %}" + shouting + "{% endfor %}" + ASSISTANT
    with pytest.raises(ConfigError, match=r"its text for a conversation is not the sum of its turns"):
        read_chat_template(tokenizer)


def test_template_that_does_not_render_is_refused(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(ConfigError, match=r"cannot be masked, TemplateError: not today"):
        read_chat_template(tokenizer)


def test_tokenizer_without_a_chat_template_says_so(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"model.template=tokenizer, but .* has no chat template: name one"):
        choose_template("tokenizer", tokenizer)


def test_other_names_are_those_of_the_file(tokenizer):
    assert choose_template("v1", tokenizer) == load_template("v1")
