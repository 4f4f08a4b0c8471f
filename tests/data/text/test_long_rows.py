"""A row that is far too long costs what its beginning costs, and becomes what it would have become."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from vlm_tune.config.schema import TooLong
from vlm_tune.data import fit as fit_module
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import Lengths
from vlm_tune.data.fit import EncoderSettings, SkippedSample, no_pictures
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.text import long_rows
from vlm_tune.data.text.templates import load_template
from vlm_tune.errors import DataError

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "golden" / "tokenizer")
WORDS = ("a cat", " sat\n", "  ", "猫", "the mat", "1234", "\n\n", "aaaa", "é", "—", "<|im_end|>")
LIMIT = 200


def encoder(policy: TooLong, template: str = "chatml", max_length: int = LIMIT) -> Encoder:
    settings = EncoderSettings(tokens_per_tile=4, max_length=max_length, on_too_long=policy)
    return Encoder(TOKENIZER, load_template(template), settings)


def words(seed: int, count: int) -> str:
    return "x" + "".join(random.Random(seed).choices(WORDS, k=count))


def sample(*turns: tuple[str, str], is_plain: bool = False) -> Sample:
    messages = [each for q, a in turns for each in (Message("user", (q,)), Message("assistant", (a,), supervised=True))]
    return Sample("7", tuple(messages[1:] if is_plain else messages), "a.jsonl:1", is_plain)


SAMPLES = {
    "words": sample(("Q", words(1, 9000))),
    "one word": sample(("Q", "a" * 40_000)),
    "spaces": sample(("Q", "x" + " " * 40_000)),
    "no spaces": sample(("Q", "猫é" * 20_000)),
    "document": sample(("", words(2, 9000)), is_plain=True),
    "many turns": sample(*((words(n, 5), words(n + 1, 5)) for n in range(120))),
    "a long answer behind short ones": sample(*(("Q", "A"),) * 3, ("Q", words(3, 9000)), ("Q", "A")),
    "a long question behind short ones": sample(*(("Q", "A"),) * 3, (words(3, 9000), "A"), ("Q", "A")),
    "trained on late": Sample(
        "7",
        (*(Message(role, (words(4, 5),)) for _ in range(600) for role in ("user", "assistant")),
         Message("user", ("Q",)), Message("assistant", ("A",), supervised=True)),
        "a.jsonl:1",
    ),
    "a picture behind": Sample(
        "7",
        (Message("user", ("Q",)), Message("assistant", (words(5, 9000),), supervised=True),
         Message("user", (Picture("a.png"), "Q")), Message("assistant", ("A",), supervised=True)),
        "a.jsonl:1",
    ),
}  # fmt: skip


def tiling(each: Sample):
    return lambda max_tiles: (1,) * len(each.pictures)


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize every row whole, and try its turns one by one."""
    monkeypatch.setattr(long_rows, "LONG", 1 << 40)
    monkeypatch.setattr(fit_module, "FEW", 1 << 40)


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
@pytest.mark.parametrize("name", SAMPLES)
def test_trimming_a_beginning_is_trimming_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, template: str) -> None:
    made = encoder(TooLong.trim_text, template)
    each = SAMPLES[name]

    def outcome() -> tuple[object, ...]:
        try:
            example = made.encode(each, tiling(each))
        except DataError as error:
            return (error.reason.partition("before the first answer")[1],)
        return example.input_ids.tolist(), example.labels.tolist(), example.num_tiles, example.note.partition(",")[0]

    monkeypatch.setattr(long_rows, "LONG", 2000)
    assert made.shortened(each) is not each
    found = outcome()
    whole(monkeypatch)
    assert found == outcome()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_lengths_of_a_beginning_are_those_that_are_trained_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(long_rows, "LONG", 2000)
    made, each = encoder(TooLong.trim_text), SAMPLES[name]
    (lengths,) = made.encode_lengths([each], [tiling(each)])
    if isinstance(lengths, Lengths):
        example = made.encode(each, tiling(each))
        assert (lengths.num_tokens, lengths.num_supervised) == (len(example.input_ids), example.num_supervised)
    else:
        with pytest.raises(DataError, match="before the first answer"):
            made.encode(each, tiling(each))


@pytest.mark.parametrize("policy", [TooLong.error, TooLong.skip, TooLong.fewer_tiles])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_row_that_is_too_long_is_said_to_be(monkeypatch: pytest.MonkeyPatch, name: str, policy: TooLong) -> None:
    monkeypatch.setattr(long_rows, "LONG", 2000)
    made, each = encoder(policy), SAMPLES[name]
    (outcome,) = made.encode_lengths([each], [tiling(each)])
    assert isinstance(outcome, SkippedSample if policy is TooLong.skip else DataError)
    assert "at least " in outcome.reason
    assert f"data.max_length={LIMIT}" in outcome.reason


def test_a_long_row_that_fits_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "LONG", 2000)
    made, each = encoder(TooLong.error, max_length=1 << 20), SAMPLES["words"]
    assert made.shortened(each) is each
    found = made.encode(each).input_ids
    whole(monkeypatch)
    assert np.array_equal(found, made.encode(each).input_ids)


@pytest.mark.parametrize("policy", [TooLong.error, TooLong.trim_text])
def test_sixty_megabytes_take_seconds(policy: TooLong) -> None:
    """Tokenized whole, they take minutes and 15 GB."""
    made = encoder(policy, max_length=8192)
    text = "line of text 12 " * 3_750_000
    turns = sample(*((f"{text[:300]} {n}?", text[:300]) for n in range(100_000)))
    start = time.perf_counter()
    for each in (sample(("Q", text)), sample((text, "A")), turns):
        made.encode_lengths([each], [no_pictures])
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("policy", TooLong)
def test_a_question_of_sixty_megabytes_is_refused_in_seconds(policy: TooLong) -> None:
    asked = sample(("a cat sat on the mat. " * 2_700_000, "yes"))
    start = time.monotonic()
    with pytest.raises(DataError, match=r"at least \d+ tokens"):
        encoder(policy).encode_prompt(asked)
    assert time.monotonic() - start < 20
