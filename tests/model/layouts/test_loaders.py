"""Every kind of folder that is read has a reader of its small files and a loader of its weights."""

from vlm_tune.model.build import LOADERS
from vlm_tune.model.layouts.found import READERS


def test_each_layout_has_a_reader_and_a_loader():
    assert LOADERS.keys() == READERS.keys()
