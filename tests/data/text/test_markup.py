"""Tokens that belong to what is said (<box>, <think>) are one token in a text, and those of control never are."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_tune.config.parse import load_config
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.sample import Message, Sample
from vlm_tune.data.text.markup import find_markup
from vlm_tune.data.text.templates import load_template
from vlm_tune.data.text.tokens import TextTokenizer
from vlm_tune.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer"
IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")
GROUNDING = ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
THINKING = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def golden(*added, special=False):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    tokenizer.add_tokens([AddedToken(each, special=special, normalized=False) for each in added])
    return tokenizer


def encoder(tokenizer, template="internvl2_5", **settings):
    return Encoder(tokenizer, load_template(template), EncoderSettings(**settings))


def encode(made, question, answer):
    messages = (Message("user", (question,)), Message("assistant", (answer,), supervised=True))
    return made.encode(Sample("a", messages, "a.jsonl:1"))


def supervised(example):
    return example.labels[example.labels != NO_LOSS].tolist()


@pytest.mark.parametrize("special", [True, False], ids=["special", "not special"])
@pytest.mark.parametrize(
    "answer",
    [
        "<ref>the kettle</ref><box>[[120, 80, 640, 910]]</box>",
        "<think>\nThe surface is green.\n</think>\n\nGreen.",
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
        "two <box>[[1, 2, 3, 4]]</box> and <box>[[5, 6, 7, 8]]</box>",
        "</think>",
        "text<think>text</think>text",
    ],
)
def test_markup_in_an_answer_is_what_the_tokenizer_makes_of_it(answer, special):
    tokenizer = golden(*THINKING, special=special)
    expected = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert supervised(encode(encoder(tokenizer), "Where?", answer)) == expected


def test_markup_in_a_question_and_a_system_text_is_one_token_too():
    tokenizer = golden()
    sample = Sample(
        "a",
        (
            Message("system", ("Answer with <box>",)),
            Message("user", ("What is in <box>[[1, 2, 3, 4]]</box>?",)),
            Message("assistant", ("A cup.",), supervised=True),
        ),
    )
    ids = encoder(tokenizer).encode(sample).input_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<box>")) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("</box>")) == 1


def test_a_prompt_has_the_tokens_of_training():
    made = encoder(golden())
    sample = Sample("a", (Message("user", ("Where is <ref>it</ref>?",)), Message("assistant", ("x",), supervised=True)))
    prompt = made.encode_prompt(sample).input_ids.tolist()
    assert made.encode(sample).input_ids.tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("template", ["internvl2_5", "internlm2-chat", "phi3-chat", "v1", "vicuna", "plain"])
def test_grounding_tokens_are_all_the_markup_of_internvl(template):
    assert list(find_markup(golden(), load_template(template), IMAGE_TOKENS)) == GROUNDING


@pytest.mark.parametrize(
    "token",
    [
        "<|vision_start|>",
        "<|image_pad|>",
        "<video>",
        "<|audio_bos|>",
        "<|begin_of_text|>",
        "<end_of_turn>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eos|>",
        "<pad>",
        "<start_of_turn>",
        "<|start_header_id|>",
    ],
)
def test_tokens_that_engines_act_upon_stay_text(token):
    tokenizer = golden(token, special=True)
    made = encoder(tokenizer)
    assert token not in made.markup
    assert tokenizer.convert_tokens_to_ids(token) not in encode(made, f"a {token}", f"{token} b").input_ids


def test_roles_of_the_tokenizers_own_chat_template_stay_text():
    tokenizer = golden("<role_u>", "<role_a>", "<thought>", special=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<role_u>{{ m.content }}<role_a>"
        "{% if m.role == 'assistant' %}<thought>{% endif %}{% endfor %}"
    )
    assert list(find_markup(tokenizer, load_template("vicuna"), IMAGE_TOKENS)) == [*GROUNDING, "<thought>"]


def test_a_list_in_the_configuration_is_the_only_markup():
    tokenizer = golden(*THINKING)
    made = encoder(tokenizer, markup=("<think>", "</think>"))
    ids = encode(made, "<box>", "<think></think>").input_ids
    assert list(made.markup) == ["<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert tokenizer.convert_tokens_to_ids("<box>") not in ids


def test_an_empty_list_leaves_all_text_as_it_is():
    tokenizer = golden()
    ids = encode(encoder(tokenizer, markup=()), "<box>", "<ref>it</ref>").input_ids
    assert not set(ids.tolist()) & set(tokenizer.convert_tokens_to_ids(GROUNDING))


@pytest.mark.parametrize("token", ["<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"])
def test_markup_that_would_break_its_row_is_refused(token):
    with pytest.raises(ConfigError, match=r"model.markup names '.+', which ends answers or stands for a picture"):
        encoder(golden(), markup=("<box>", token))


def test_markup_that_the_tokenizer_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"model.markup names '<bbox>', which is no added token of .*tokenizer"):
        encoder(golden(), markup=("<bbox>",))


def test_markup_is_a_key_of_the_model():
    config = load_config(["model.markup=['<think>','</think>']"])
    assert config.model.markup == ["<think>", "</think>"]


def test_markup_changes_the_name_of_an_encoder():
    names = {encoder(golden(), markup=markup).fingerprint() for markup in (None, (), ("<box>",), ("<box>", "</box>"))}
    assert len(names) == 4


@pytest.mark.parametrize("before", [["<one>"], ["<one>", "<two>", "<three>"]])
def test_kept_tokens_keep_their_ids_behind_control_tokens(before):
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.train_from_iterator(["a b c " * 9], trainers.BpeTrainer(vocab_size=270, show_progress=False))
    bare.add_special_tokens(before)
    bare.add_tokens(["    ", "<note>"])
    tokens = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=bare), markup=["<note>"])
    ids = tokens.plain([(True, "a    <note><one>")])[True, "a    <note><one>"].ids
    kept = [bare.token_to_id("    "), bare.token_to_id("<note>")]
    assert [each for each in ids if each in kept] == kept
    assert max(ids) == kept[-1]
