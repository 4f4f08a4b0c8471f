"""Both answers of a pair are encoded behind the same pictures, and measured as they stand in a pack."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from vlm_tune.config.schema import TooLong
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import common_prefix
from vlm_tune.data.fit import EncoderSettings, SkippedSample
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.text.templates import load_template
from vlm_tune.errors import DataError

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"
ASKED = Message("user", (Picture("a.png"), "\nWhat is it?"))
SHORT, LONG = (Message("assistant", (text,), supervised=True) for text in ("It is a cat.", "It is a " + "dog, a " * 20))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def encoder(tokenizer, **changes):
    sizes = {"tokens_per_tile": 10, "max_tiles": 6, "max_length": 500, "pairs": True}
    return Encoder(tokenizer, load_template("chatml"), EncoderSettings(**sizes | changes))


def tiling(most):
    return (most,)


@pytest.mark.parametrize("messages", [(SHORT, LONG), (LONG, SHORT)], ids=["long rejected", "long chosen"])
def test_both_get_the_tiles_that_leave_room_for_the_longer(tokenizer, messages):
    sample = Sample("a", (ASKED, messages[0]), "rows:1", rejected=messages[1])
    encode = encoder(tokenizer, max_length=150, on_too_long=TooLong.fewer_tiles)
    alone = [encode.encode(each, tiling) for each in sample.branches]
    chosen, rejected = encode.encode_all(sample, tiling)
    assert chosen.num_tiles == rejected.num_tiles == min(each.num_tiles for each in alone)
    assert chosen.max_tiles == rejected.max_tiles < 6
    assert len({each.num_tiles for each in alone}) == 2
    assert chosen.note == rejected.note == next(each.note for each in alone if each.note)


def test_a_pair_is_measured_as_it_stands_in_a_pack(tokenizer):
    sample = Sample("a", (ASKED, SHORT), "rows:1", rejected=LONG)
    encode = encoder(tokenizer)
    (lengths,) = encode.encode_lengths([sample], [tiling])
    chosen, rejected = (each.input_ids for each in encode.encode_all(sample, tiling))
    shared = common_prefix([chosen, rejected])
    assert np.array_equal(chosen[:shared], rejected[:shared])
    assert chosen[shared] != rejected[shared]
    assert (lengths.num_tokens, lengths.num_shared) == (len(chosen) + len(rejected) - shared, shared)
    assert shared > 60  # the picture's tokens at least
    assert not lengths.head


def test_an_answer_is_trimmed_by_itself(tokenizer):
    sample = Sample("a", (ASKED, SHORT), "rows:1", rejected=LONG)
    chosen, rejected = encoder(tokenizer, max_length=100, on_too_long=TooLong.trim_text).encode_all(sample, tiling)
    assert (chosen.note, len(rejected.input_ids)) == ("", 100)


@pytest.mark.parametrize(("policy", "kind"), [(TooLong.error, DataError), (TooLong.skip, SkippedSample)])
def test_the_answer_that_is_too_long_is_named(tokenizer, policy, kind):
    sample = Sample("a", (ASKED, SHORT), "rows:1", rejected=LONG)
    (fault,) = encoder(tokenizer, max_length=100, on_too_long=policy).encode_lengths([sample], [tiling])
    assert type(fault) is kind
    assert fault.reason.startswith("with the rejected answer: ")


def test_answers_of_the_same_tokens_are_refused(tokenizer):
    cut = Message("assistant", (LONG.text + "fox",), supervised=True)
    sample = Sample("a", (ASKED, LONG), "rows:1", rejected=cut)
    (fault,) = encoder(tokenizer, max_length=100, on_too_long=TooLong.trim_text).encode_lengths([sample], [tiling])
    assert "the same tokens" in fault.reason


@pytest.mark.parametrize(("pairs", "rejected"), [(True, None), (False, LONG)], ids=["conversation", "pair"])
def test_a_row_of_the_other_kind_is_refused(tokenizer, pairs, rejected):
    sample = Sample("a", (ASKED, SHORT), "rows:1", rejected=rejected)
    (fault,) = encoder(tokenizer, pairs=pairs).encode_lengths([sample], [tiling])
    assert "but this stage trains on" in fault.reason
