"""A .mkv whose lengths were not known when it was written shows neither that it is whole nor that it is cut."""

import io

import pytest

from vlm_tune.data.pictures.videos import _shows_to_be_whole
from vlm_tune.data.pictures.whole_files import is_whole

HEADER, SEGMENT, CLUSTER = b"\x1aE\xdf\xa3", b"\x18S\x80g", b"\x1fC\xb6u"
UNKNOWN = b"\x01" + b"\xff" * 7


def element(name, content, length=None):
    return name + (length or (1 << 56 | len(content)).to_bytes(8)) + content


CLUSTERS = element(CLUSTER, b"x" * 40) + element(CLUSTER, b"y" * 40)
WHOLE = element(HEADER, b"webm") + element(SEGMENT, CLUSTERS)
LIVE = element(HEADER, b"webm") + element(SEGMENT, element(CLUSTER, b"x" * 40, UNKNOWN), UNKNOWN)
FILES = {  # name -> (bytes, is not known to be cut, shows to be whole)
    "whole": (WHOLE, True, True),
    "cut": (WHOLE[:-1], False, False),
    "cut between clusters": (WHOLE[:-52], False, False),
    "live": (LIVE, True, False),
    "live, cut": (LIVE[:-10], True, False),
}


@pytest.mark.parametrize("name", FILES)
def test_only_a_file_that_ends_before_its_lengths_is_known_to_be_cut(name):
    content, expected, _ = FILES[name]
    assert is_whole("matroska", io.BytesIO(content)) == expected


@pytest.mark.parametrize("name", FILES)
def test_only_a_file_that_tells_all_lengths_shows_to_be_whole(name):
    content, _, expected = FILES[name]
    assert _shows_to_be_whole(io.BytesIO(content)) == expected
