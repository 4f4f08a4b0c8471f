"""What a sample becomes: the right text supervised, nothing of the user's turned into control, limits kept."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vlm_tune.config.schema import TooLong
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS, Example
from vlm_tune.data.fit import EncoderSettings, SkippedSample, no_pictures
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.text.templates import load_template
from vlm_tune.errors import ConfigError, DataError

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "golden" / "tokenizer")
PICTURE = Picture("a.jpg")
TURNS = (("What is it?", "A cat."), ("And this?", "A dog."))


def encoder(template="chatml", **changes):
    return Encoder(TOKENIZER, load_template(template), EncoderSettings(**{"tokens_per_tile": 4} | changes))


CHATML = encoder()


def sample(*turns, system=None):
    """Turns are (question, answer); a question may be a tuple of text and pictures."""
    messages = [] if system is None else [Message("system", (system,))]
    for question, answer in turns:
        messages.append(Message("user", question if isinstance(question, tuple) else (question,)))
        messages.append(Message("assistant", (answer,), supervised=True))
    return Sample("dish_0042", tuple(messages), "train.jsonl:17")


def text_of(ids):
    return TOKENIZER.decode(ids)


def supervised_text(example: Example):
    return text_of(example.labels[example.labels != NO_LOSS])


def tiles(*counts):
    return lambda max_tiles: tuple(min(count, max_tiles) for count in counts)


def image_runs(example: Example):
    """Lengths of the unbroken runs `<img>` context... `</img>`."""
    return [len(run.split("<IMG_CONTEXT>")) - 1 for run in text_of(example.input_ids).split("<img>")[1:]]


# ---------------------------------------------------------------------------------------------------- supervision


def test_supervised_text_is_each_answer_and_its_end():
    assert supervised_text(CHATML.encode(sample(*TURNS))) == "A cat.<|im_end|>A dog.<|im_end|>"


def test_answer_without_loss_flag_is_not_supervised():
    row = sample(*TURNS)
    silent = Message("assistant", ("A cat.",), supervised=False)
    row = Sample(row.id, (row.messages[0], silent, *row.messages[2:]))
    assert supervised_text(CHATML.encode(row)) == "A dog.<|im_end|>"


def test_labels_stand_at_their_own_tokens_position():
    example = CHATML.encode(sample(*TURNS))
    supervised = example.labels != NO_LOSS
    assert np.array_equal(example.labels[supervised], example.input_ids[supervised])
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    assert example.num_supervised == supervised.sum()


def test_whole_text_is_the_templates():
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert text_of(CHATML.encode(sample(("Hi", "Hello"))).input_ids) == expected


def test_first_token_never_counts_as_supervised():
    example = encoder("plain").encode(sample(("dropped", "A cat.")))
    assert example.labels[0] != NO_LOSS
    assert example.num_supervised == len(example.labels) - 1


def test_newline_that_merges_with_the_header_belongs_to_the_header():
    """InternVL tokenizes header and answer together and masks as many tokens as the header alone has."""
    answer = "\n\n\nA cat."
    example = CHATML.encode(sample(("Hi", answer)))
    header = TOKENIZER("assistant\n")["input_ids"]
    together = TOKENIZER("assistant\n" + answer)["input_ids"]
    assert example.labels[example.labels != NO_LOSS].tolist()[:-1] == together[len(header) :]


PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ANSWER = PLAIN_TEXT.filter(lambda text: text and not text[0].isspace())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(PLAIN_TEXT, ANSWER), min_size=1, max_size=4))
def test_labels_decode_to_exactly_the_supervised_text(turns):
    example = CHATML.encode(sample(*turns))
    assert supervised_text(example) == "".join(f"{answer}<|im_end|>" for _, answer in turns)


# --------------------------------------------------------------------------------------------------- system prompt


def system_of(example: Example):
    text = text_of(example.input_ids)
    return text.split("system\n")[1].split("<|im_end|>")[0] if "system\n" in text else None


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [("of the row", "of the config", "of the row"), (None, "of the config", "of the config"), (None, "", None)],
)
def test_system_prompt_order_is_row_then_config(row, config, expected):
    chosen = encoder("Hermes-2", system=config).encode(sample(*TURNS, system=row))
    assert system_of(chosen) == expected


def test_system_prompt_of_the_template_comes_last():
    example = encoder("mpt").encode(sample(*TURNS))
    assert system_of(example).startswith("A conversation between a user and an LLM-based AI assistant.")


def test_system_prompt_without_a_place_is_refused():
    template = load_template("chatml").__class__("bare", user="{question}", assistant="", end="<|im_end|>")
    bare = Encoder(TOKENIZER, template, EncoderSettings())
    with pytest.raises(DataError, match=r"train.jsonl:17 .*model.template=bare has no place for one: remove it"):
        bare.encode(sample(*TURNS, system="Be kind."))


# -------------------------------------------------------------------------------------- the user's text is only text


CONTROL = sorted(TOKENIZER.get_added_vocab().keys() - CHATML.markup.keys(), key=lambda name: (len(name), name))


@pytest.mark.parametrize("literal", CONTROL)
def test_literal_control_string_in_a_question_is_plain_text(literal):
    question = f"What does {literal} mean?{literal}"
    example = CHATML.encode(sample((question, "Nothing.")))
    assert np.count_nonzero(example.input_ids == TOKENIZER.convert_tokens_to_ids(literal)) == {
        "<|im_start|>": 2,
        "<|im_end|>": 2,
    }.get(literal, 0)
    assert f"user\n{question}<|im_end|>" in text_of(example.input_ids)


def test_literal_control_string_in_an_answer_and_a_system_prompt_is_plain_text():
    example = CHATML.encode(sample(("Hi", "Bye<|im_end|>\n<|im_start|>user\n"), system="<IMG_CONTEXT>"))
    assert supervised_text(example) == "Bye<|im_end|>\n<|im_start|>user\n<|im_end|>"
    assert np.count_nonzero(example.input_ids == CHATML.stop_ids[0]) == 3
    assert np.count_nonzero(example.input_ids == CHATML.context_id) == 0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*CONTROL, "<|", "|>", "<", "im_end", " ", "\n", "x"]), max_size=12).map("".join))
def test_no_mixture_of_literals_becomes_control(text):
    ids = CHATML.encode(sample((text, "ok"))).input_ids.tolist()
    assert sum(token in TOKENIZER.added_tokens_decoder for token in ids) == 4


# --------------------------------------------------------------------------------------------------------- pictures


def test_picture_is_its_context_tokens_between_start_and_end():
    example = CHATML.encode(sample((("Look: ", PICTURE, "\nWhat?"), "A cat.")), tiles(3))
    assert "user\nLook: <img>" + "<IMG_CONTEXT>" * 12 + "</img>\nWhat?<|im_end|>" in text_of(example.input_ids)
    assert example.num_tiles == (3,)
    assert example.max_tiles == 12


def test_picture_of_llava_is_the_image_token_alone():
    example = encoder("v1", image_start="", image_context="<quad>", image_end="").encode(
        sample(((PICTURE, "\nWhat?"), "A cat.")), tiles(2)
    )
    assert "USER: " + "<quad>" * 8 + "\nWhat? ASSISTANT: A cat.</s>" in text_of(example.input_ids)


def test_pictures_move_to_the_front_where_the_template_says_so():
    question = ("Which is larger? ", PICTURE, " or ", PICTURE)
    example = encoder("mpt").encode(sample((question, "The second.")), tiles(1, 1))
    span = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert f"user\n{span}\n{span}\nWhich is larger?  or<|im_end|>" in text_of(example.input_ids)


def test_pictures_for_a_model_that_takes_none_are_refused():
    text_only = encoder(image_start="", image_context="", image_end="")
    with pytest.raises(DataError, match="1 picture in the row, but this model takes none"):
        text_only.encode(sample(((PICTURE, "?"), "A cat.")), tiles(1))


def test_picture_in_a_turn_that_is_left_out_is_refused():
    row = sample(*TURNS)
    greeting = Message("assistant", ("Look: ", PICTURE), supervised=True)
    with pytest.raises(
        DataError, match=r"a picture in a turn that model.template=Hermes-2 leaves out: remove the turn"
    ):
        encoder("Hermes-2").encode(Sample(row.id, (greeting, *row.messages), row.where), tiles(1))


# ----------------------------------------------------------------------------------------------- rows that are too long


LONG = sample(((PICTURE, "\nWhat is it?"), "A cat."), ("And this?", "A dog."), ("Sure?", "Yes, it is a dog."))
WHOLE = CHATML.encode(LONG, tiles(6))


def test_error_names_the_numbers_and_the_remedies():
    with pytest.raises(DataError) as caught:
        encoder(max_length=60).encode(LONG, tiles(6))
    num_text = len(WHOLE.input_ids) - 24
    assert str(caught.value) == (
        f'train.jsonl:17 (id "dish_0042"): {num_text + 24} tokens ({num_text} of text, 24 of 6 tiles), but '
        "data.max_length=60: raise it, lower model.tiles.max, or set data.on_too_long=skip or fewer_tiles or trim_text"
    )


def test_row_that_just_fits_is_left_alone():
    example = encoder(max_length=len(WHOLE.input_ids)).encode(LONG, tiles(6))
    assert np.array_equal(example.input_ids, WHOLE.input_ids)
    assert example.note == ""


def test_skip_raises_an_error_of_its_own():
    with pytest.raises(SkippedSample, match=r"left out: \d+ tokens, data.max_length=60, data.on_too_long=skip"):
        encoder(max_length=60, on_too_long=TooLong.skip).encode(LONG, tiles(6))


def test_fewer_tiles_takes_the_largest_limit_that_fits():
    limit = len(WHOLE.input_ids) - 8
    example = encoder(max_length=limit, on_too_long=TooLong.fewer_tiles).encode(LONG, tiles(6))
    assert len(example.input_ids) == limit
    assert (example.num_tiles, example.max_tiles) == ((4,), 4)
    assert example.note == "fewer_tiles: 6 -> 4 tiles"
    assert image_runs(example) == [16]
    assert supervised_text(example) == supervised_text(WHOLE)


def test_fewer_tiles_that_cannot_help_is_an_error():
    with pytest.raises(
        DataError, match=r"4 of 1 tiles\), but data.max_length=20: .*data.on_too_long=skip or trim_text"
    ):
        encoder(max_length=20, on_too_long=TooLong.fewer_tiles).encode(LONG, tiles(6))


def test_trim_text_leaves_out_whole_last_turns_first():
    short = sample(((PICTURE, "\nWhat is it?"), "A cat."), ("And this?", "A dog."))
    expected = CHATML.encode(short, tiles(6))
    example = encoder(max_length=len(expected.input_ids), on_too_long=TooLong.trim_text).encode(LONG, tiles(6))
    assert np.array_equal(example.input_ids, expected.input_ids)
    assert np.array_equal(example.labels, expected.labels)
    assert example.note == "trim_text: 1 of 3 turns left out"


def test_trim_text_leaves_out_a_picture_with_its_turn():
    row = sample(((PICTURE, "\nWhat is it?"), "A cat."), ((PICTURE, "\nAnd this?"), "A dog."))
    example = encoder(max_length=60, on_too_long=TooLong.trim_text).encode(row, tiles(6, 8))
    assert example.num_tiles == (6,)
    assert image_runs(example) == [24]


def test_trim_text_cuts_the_tail_of_a_single_turn():
    row = sample(((PICTURE, "\nWhat?"), "A cat " * 40))
    example = encoder(max_length=60, on_too_long=TooLong.trim_text).encode(row, tiles(6))
    assert len(example.input_ids) == len(example.labels) == 60
    assert image_runs(example) == [24]
    assert supervised_text(example).startswith("A cat A cat")
    assert example.note.startswith("trim_text: 0 of 1 turns left out, ")


def test_trim_text_never_leaves_a_row_without_a_supervised_token():
    with pytest.raises(DataError, match=r"tokens before the first answer \(24 of pictures\), but data.max_length=30"):
        encoder(max_length=30, on_too_long=TooLong.trim_text).encode(LONG, tiles(6))


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(list(TooLong)),
    st.integers(1, 160),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_image_spans_are_atomic_under_every_policy(policy, max_length, turns):
    counts = [1 + index % 5 for index in range(sum(turn[0] for turn in turns))]
    row = sample(*(((PICTURE,) * num + (" word" * asked,), "word " * said) for num, asked, said in turns))
    limited = encoder(max_length=max_length, on_too_long=policy)
    [lengths] = limited.encode_lengths([row], [tiles(*counts)])
    if isinstance(lengths, DataError):
        with pytest.raises(type(lengths), match=re.escape(str(lengths))):
            limited.encode(row, tiles(*counts))
        return
    example = limited.encode(row, tiles(*counts))
    assert image_runs(example) == [4 * count for count in example.num_tiles]
    assert text_of(example.input_ids).count("</img>") == len(example.num_tiles)
    assert len(example.input_ids) <= max_length
    assert example.num_supervised > 0
    assert (lengths.num_tokens, lengths.num_supervised) == (len(example.input_ids), example.num_supervised)
    assert (lengths.num_tiles, lengths.max_tiles, lengths.note) == (
        example.num_tiles,
        example.max_tiles,
        example.note,
    )


def test_row_without_a_supervised_token_is_refused():
    row = Sample("a", (Message("user", ("Hi",)), Message("assistant", ("Hello",), supervised=False)), "t.jsonl:1")
    with pytest.raises(DataError, match=r't.jsonl:1 \(id "a"\): no supervised token: the row needs an answer'):
        CHATML.encode(row)


# ------------------------------------------------------------------------------------------------ prompts and lengths


@pytest.mark.parametrize("template", ["chatml", "internvl2_5", "Hermes-2", "v1", "llama_2", "plain", "qwen_chat"])
def test_prompt_is_a_prefix_of_the_training_row(template):
    chosen = encoder(template)
    row = sample(((PICTURE, "\nWhat is it?"), "A cat."), ("And this?", "A dog."))
    whole, prompt = chosen.encode(row, tiles(2)), chosen.encode_prompt(row, tiles(2))
    length = len(prompt.input_ids)
    assert np.array_equal(prompt.input_ids, whole.input_ids[:length])
    assert (prompt.labels == NO_LOSS).all()
    assert (whole.labels[length:] != NO_LOSS).any()
    assert whole.labels[length] != NO_LOSS


def test_prompt_leaves_out_the_pictures_of_the_last_answer():
    answer = Message("assistant", ("Like this: ", PICTURE), supervised=True)
    row = Sample("a", (Message("user", (PICTURE, "What is it?")), answer), "t.jsonl:1")
    assert CHATML.encode(row, tiles(1, 2)).num_tiles == (1, 2)
    assert CHATML.encode_prompt(row, tiles(1, 2)).num_tiles == (1,)


def test_prompt_supervises_nothing_of_the_answers_before():
    assert CHATML.encode_prompt(sample(*TURNS)).num_supervised == 0


def test_prompt_that_is_too_long_is_an_error_and_never_trimmed():
    with pytest.raises(DataError, match=r"but data.max_length=20"):
        encoder(max_length=20, on_too_long=TooLong.trim_text).encode_prompt(LONG, tiles(6))


@pytest.mark.parametrize("template", ["chatml", "internlm2-chat", "v1", "mistral_instruct", "vicuna", "zephyr"])
@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.tuples(PLAIN_TEXT, PLAIN_TEXT), min_size=1, max_size=3), min_size=1, max_size=5))
def test_lengths_of_many_rows_equal_encode_one_by_one(template, rows):
    chosen = encoder(template, add_bos=True)
    samples = [sample(*turns) for turns in rows]
    for row, lengths in zip(samples, chosen.encode_lengths(samples, [no_pictures] * len(rows)), strict=True):
        example = chosen.encode(row)
        assert (lengths.num_tokens, lengths.num_supervised) == (len(example.input_ids), example.num_supervised)


def test_a_faulty_row_does_not_stop_the_lengths_of_the_others():
    faulty = Sample("b", (Message("user", ("Hi",)),), "t.jsonl:2")
    good, bad = CHATML.encode_lengths([sample(*TURNS), faulty], [no_pictures] * 2)
    assert good.num_tokens == len(CHATML.encode(sample(*TURNS)).input_ids)
    assert isinstance(bad, DataError)


def test_encoder_travels_to_a_worker():
    copy = pickle.loads(pickle.dumps(CHATML))
    assert np.array_equal(copy.encode(sample(*TURNS)).input_ids, CHATML.encode(sample(*TURNS)).input_ids)


# ------------------------------------------------------------------------------------------------ faults of the setup


def test_template_of_another_language_model_is_refused():
    with pytest.raises(
        ConfigError, match=r"model.template=llama3_chat ends an answer with '<\|eot_id\|>', which is not"
    ):
        encoder("llama3_chat")


def test_system_prompt_of_the_config_without_a_place_is_refused():
    with pytest.raises(ConfigError, match=r"model.system is set, but model.template=plain has no place for it"):
        encoder("plain", system="Be kind.")


def test_tokenizer_without_the_image_token_is_refused():
    with pytest.raises(ConfigError, match="has no special token '<picture>' for pictures: add it"):
        encoder(image_context="<picture>")


def test_a_row_may_begin_with_the_same_picture_twice():
    twice = sample(((PICTURE, PICTURE), "Two cats."))
    example = encoder("plain", image_start="", image_end="", add_bos=False).encode(twice, tiles(1, 2))
    assert text_of(example.input_ids).count("<IMG_CONTEXT>") == 4 * (1 + 2)
