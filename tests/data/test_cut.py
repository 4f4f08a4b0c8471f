"""The shares of a pack are the pack: every token, tile, weight and place is in one of them, at the same position."""

import pytest
import torch

from vlm_tune.data.batch import cut

ROWS = {"pictures": (0, 1, 2, 6), "text": (6, 13)}  # each seventh toy row has no picture


@pytest.fixture(scope="module")
def packs(toys):
    staged = toys.staged("data.feature_cache=off")
    return {name: staged.batch(list(rows)) for name, rows in ROWS.items()}


def shares_of(batch, parts):
    return [cut(batch, number, parts) for number in range(parts)]


def starts(shares):
    width = shares[0].input_ids.shape[1]
    return [(share, number * width) for number, share in enumerate(shares)]


@pytest.fixture(params=[2, 3, 4, 7])
def parts(request):
    return request.param


@pytest.fixture(params=ROWS)
def pack(request, packs):
    return packs[request.param]


@pytest.mark.parametrize("name", ["input_ids", "position_ids"])
def test_tokens_keep_their_order_and_positions(pack, parts, name):
    joined = torch.cat([getattr(share, name) for share in shares_of(pack, parts)], dim=1)
    whole = getattr(pack, name)
    assert torch.equal(joined[:, : whole.shape[1]], whole)
    assert not joined[:, whole.shape[1] :].any()


def test_shares_are_of_one_size(pack, parts):
    shares = shares_of(pack, parts)
    assert len({share.input_ids.shape for share in shares}) == 1
    assert len({share.num_tiles for share in shares}) == 1


def test_stretches_of_a_share_are_those_of_the_pack_and_fill_all_shares(pack, parts):
    shares = shares_of(pack, parts)
    for share in shares:
        assert share.segments[: len(pack.segments)] == pack.segments
        assert sum(share.segments) == parts * share.input_ids.shape[1]


def test_a_supervised_token_is_in_one_share_with_its_weight(pack, parts):
    found = [
        torch.stack([share.predicting + start, share.targets, share.weights.double()])
        for share, start in starts(shares_of(pack, parts))
    ]
    wanted = torch.stack([pack.predicting, pack.targets, pack.weights.double()])
    assert torch.equal(torch.cat(found, dim=1), wanted)


def test_an_image_token_is_in_the_share_that_holds_its_place(packs, parts):
    pack = packs["pictures"]
    found = []
    for share, start in starts(shares_of(pack, parts)):
        first, last = share.cut.seen
        assert torch.equal(share.image_places + start, pack.image_places[first:last])
        found.append(share.image_places + start)
    assert torch.equal(torch.cat(found), pack.image_places)


def test_tiles_are_shared_out_and_blank_ones_come_last(packs, parts):
    pack = packs["pictures"]
    joined = torch.cat([share.tiles for share in shares_of(pack, parts)])
    assert torch.equal(joined[: len(pack.tiles)], pack.tiles)
    assert not joined[len(pack.tiles) :].any()


def test_tokens_are_counted_once(pack, parts):
    assert sum(share.num_tokens for share in shares_of(pack, parts)) == pack.num_tokens
