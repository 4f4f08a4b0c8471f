"""Templates as data, and the segments that a conversation becomes."""

import pytest

from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.text.templates import BOS, load_template, render, template_names
from vlm_tune.errors import ConfigError

HELLO = Sample("a", (Message("user", ("Hi",)), Message("assistant", ("Hello",), supervised=True)))


def text_of(segments):
    return "".join(each.content if isinstance(each.content, str) else "<image>" for each in segments)


@pytest.mark.parametrize("name", template_names())
def test_every_template_marks_what_it_holds(name):
    template = load_template(name)
    assert ("{question}" in template.user) != ("{pictures}" in template.user)
    assert not template.system or "{system}" in template.system
    assert template.end


@pytest.mark.parametrize("name", template_names())
def test_supervised_is_the_answer_and_its_end(name):
    template = load_template(name)
    assert text_of(each for each in render(template, HELLO) if each.supervised) == "Hello" + template.end


@pytest.mark.parametrize("name", template_names())
def test_text_of_the_user_is_never_control(name):
    control = text_of(each for each in render(load_template(name), HELLO) if each.is_control)
    assert "Hi" not in control
    assert "Hello" not in control


def test_two_templates_of_nearly_one_name_stay_apart():
    ours, xtuners = (text_of(render(load_template(name), HELLO, "")) for name in ("internlm2-chat", "internlm2_chat"))
    assert ours == "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\nHello<|im_end|>"
    assert xtuners == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


def test_unknown_template_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"model.template=internvl2.5 is not a template; nearest: internvl2_5.*tokenizer"
    ):
        load_template("internvl2.5")


def test_unknown_template_without_a_near_one_lists_all():
    with pytest.raises(ConfigError, match=r"known: chatml, internvl2_5, Hermes-2"):
        load_template("%%%")


def test_greeting_before_the_first_question_is_left_out_where_the_reference_does():
    greeted = Sample("a", (Message("assistant", ("Welcome",), supervised=True), *HELLO.messages))
    assert "Welcome" not in text_of(render(load_template("Hermes-2"), greeted))
    assert "Welcome" in text_of(render(load_template("internvl2_5"), greeted))


def test_plain_keeps_the_picture_and_drops_the_question():
    row = Sample("a", (Message("user", (Picture("a.jpg"), "\nDescribe.")), Message("assistant", ("A cat.",), True)))
    assert text_of(render(load_template("plain"), row)) == "<image>A cat.\n"


def test_xtuner_begins_anew_after_the_end_token():
    twice = Sample("a", HELLO.messages * 2)
    contents = [each.content for each in render(load_template("vicuna"), twice)]
    assert contents.count(BOS) == 1
    assert (
        contents.index("<EOS>")
        < contents.index("\n")
        < contents.index(BOS)
        < len(contents) - contents[::-1].index("Hi")
    )
    assert BOS not in [each.content for each in render(load_template("qwen_chat"), twice)]


def test_system_prompt_in_the_middle_stands_where_it_was_said():
    row = Sample("a", (*HELLO.messages, Message("system", ("Be kind.",)), *HELLO.messages))
    text = text_of(render(load_template("chatml"), row))
    assert text.index("Hello") < text.index("<|im_start|>system\nBe kind.<|im_end|>\n") < text.rindex("Hi")


def test_empty_system_prompts_are_left_out():
    row = Sample("a", (Message("system", ("",)), *HELLO.messages, Message("system", ("",)), *HELLO.messages))
    assert "system" not in text_of(render(load_template("Hermes-2"), row))
