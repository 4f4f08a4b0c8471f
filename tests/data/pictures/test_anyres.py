"""An any-resolution picture has as many tokens as LLaVA-NeXT gives it, and each stands where LLaVA-NeXT puts it."""

import random

import numpy as np
import pytest
import torch
from toys import TOKENIZER
from transformers import AutoTokenizer, LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextModel, LlavaNextProcessor

from vlm_tune.config.schema import TileRule, TilesConfig, TooLong
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import Lengths
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.pictures.anyres import NEWLINE, Spread, count_tokens, token_order
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.sets.dataset import Tiling
from vlm_tune.data.text.templates import load_template
from vlm_tune.data.tiles import anyres_grids, picture_spreads
from vlm_tune.errors import DataError
from vlm_tune.inspection.inspect_row import tile_numbers

TILES = TilesConfig(size=336, max=4, rule=TileRule.anyres)
PER_TILE = 576
EXTREME = [(1, 1), (336, 336), (337, 336), (5000, 3), (3, 5000), (672, 672), (1008, 336), (1920, 1080)]
_chance = random.Random(0)
SIZES = EXTREME + [(_chance.randint(20, 3000), _chance.randint(20, 3000)) for _ in range(52)]
MANY = EXTREME + [(_chance.randint(1, 4000), _chance.randint(1, 4000)) for _ in range(3000)]


@pytest.fixture(scope="module")
def processor():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(pictures, tokenizer, **options)


def spread_of(width, height, max_tiles=None):
    return picture_spreads([(width, height)], [False], TILES, max_tiles)[0]


def test_counts_equal_those_of_the_processor_of_transformers(processor):
    assert len(SIZES) >= 50
    theirs = processor._get_num_multimodal_tokens([(height, width) for width, height in SIZES]).num_image_tokens
    assert [count_tokens(spread_of(*size), PER_TILE) for size in SIZES] == theirs


def test_the_order_has_as_many_places_as_were_counted():
    for size in MANY:
        for max_tiles in (1, 2, 4):
            spread = spread_of(*size, max_tiles)
            assert len(token_order(spread, PER_TILE)) == count_tokens(spread, PER_TILE), size


@pytest.mark.parametrize("size", SIZES[:20])
def test_tokens_stand_where_transformers_puts_them(size):
    """Give every token its own number, and let transformers pack them."""
    spread = spread_of(*size)
    packer = object.__new__(LlavaNextModel)
    torch.nn.Module.__init__(packer)
    packer.config = LlavaNextConfig()
    tokens = torch.arange(float(spread.num_tiles * PER_TILE)).view(spread.num_tiles, PER_TILE, 1)
    sizes = torch.tensor([[size[1], size[0]]])
    packed, _ = packer.pack_image_features([tokens], sizes, "default", torch.tensor([float(NEWLINE)]))
    assert packed[0][:, 0].tolist() == token_order(spread, PER_TILE).tolist()


def test_a_base_tile_alone_ends_with_a_newline():
    assert token_order(Spread(1, 1, 30, 20), 4).tolist() == [0, 1, 2, 3, NEWLINE]


def test_by_hand():
    # two tiles of 2 x 2 tokens side by side; the picture fills half of the height
    assert token_order(Spread(2, 1, 40, 20), 4).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    assert token_order(Spread(1, 2, 20, 20), 4).tolist() == [0, 1, 2, 3, 6, 7, NEWLINE, 8, 9, NEWLINE]


def test_the_grids_are_the_five_of_llava_next():
    assert sorted(anyres_grids(TILES)) == [(1, 2), (1, 3), (2, 1), (2, 2), (3, 1)]


# ----------------------------------------------------------------------------------------------- the encoder counts so


def encoder(**changes):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    names = {"image_start": "", "image_context": "<image>", "image_end": "", "tokens_per_tile": 16, "newline": True}
    return Encoder(tokenizer, load_template("v1"), EncoderSettings(**names | {"max_tiles": 4} | changes))


def sample(num_pictures):
    parts = [Picture(f"{number}.png") for number in range(num_pictures)]
    turns = Message("user", (*parts, "What?")), Message("assistant", ("A cat.",), supervised=True)
    return Sample("x", turns, "x.jsonl:1")


def tiling(*sizes):
    return Tiling(list(sizes), [False] * len(sizes), TILES)


@pytest.mark.parametrize("sizes", [[(640, 480)], [(640, 480), (100, 900)], [(50, 60)] * 3])
def test_the_encoder_keeps_a_place_for_each_token(sizes):
    own = encoder()
    example = own.encode(sample(len(sizes)), tiling(*sizes))
    spreads = tiling(*sizes)(4)
    assert example.spreads == spreads
    assert example.num_tiles == tuple(spread.num_tiles for spread in spreads)
    places = int(np.count_nonzero(example.input_ids == own.context_id))
    assert places == sum(count_tokens(spread, 16) for spread in spreads)


def test_lengths_equal_those_of_the_encoded_rows():
    own, rows = encoder(), [[(640, 480)], [], [(100, 900), (30, 30)]]
    samples, tilings = [sample(len(sizes)) for sizes in rows], [tiling(*sizes) for sizes in rows]
    for lengths, one, tiles in zip(own.encode_lengths(samples, tilings), samples, tilings, strict=True):
        example = own.encode(one, tiles)
        assert isinstance(lengths, Lengths)
        assert (lengths.num_tokens, lengths.num_tiles) == (len(example.input_ids), example.num_tiles)


def test_fewer_tiles_are_counted_with_their_newlines():
    whole = encoder().encode(sample(1), tiling((640, 480)))
    limit = len(whole.input_ids) - 1
    shorter = encoder(max_length=limit, on_too_long=TooLong.fewer_tiles).encode(sample(1), tiling((640, 480)))
    assert len(shorter.input_ids) <= limit
    assert sum(shorter.num_tiles) < sum(whole.num_tiles)
    assert shorter.spreads == spread_tuple((640, 480), shorter.max_tiles)


def spread_tuple(size, max_tiles):
    return (spread_of(*size, max_tiles),)


def test_a_row_that_is_too_long_says_what_its_pictures_take():
    with pytest.raises(DataError, match=r"of text, 88 of 5 tiles\)"):
        encoder(max_length=60).encode(sample(1), tiling((640, 640)))


def test_each_token_is_shown_with_its_own_tile():
    example = encoder(tokens_per_tile=4).encode(sample(2), tiling((40, 20), (20, 20)))
    numbers = list(tile_numbers(example, 4))
    assert len(numbers) == int(np.count_nonzero(example.input_ids == encoder().context_id))
    assert numbers[:14] == [1, 1, 1, 1, 2, 2, 3, 3, 3, 2, 2, 3, 3, 3]
    assert numbers[14:18] == [4, 4, 4, 4]
