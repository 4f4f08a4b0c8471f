"""Which file a data path means, and which one beside it validates or tests."""

import pytest

from vlm_tune.data.sets.paths import find_file, sibling
from vlm_tune.errors import DataError


@pytest.mark.parametrize(
    ("train", "part", "expected"),
    [
        ("train.jsonl", "val", "val.jsonl"),
        ("finetune_train.jsonl", "val", "finetune_val.jsonl"),
        ("pretrain_train.jsonl", "val", "pretrain_val.jsonl"),
        ("finetune_train.jsonl", "test", "test.jsonl"),
        ("mine.jsonl", "test", "test.jsonl"),
    ],
)
def test_the_sibling_of_a_training_file_is_found_by_its_name(tmp_path, train, part, expected):
    for name in (train, expected):
        (tmp_path / name).write_text("{}")
    assert sibling(str(tmp_path / train), part) == tmp_path / expected


def test_without_a_sibling_there_is_none(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}")
    assert sibling(str(tmp_path / "mine.jsonl"), "val") is None


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"trian.jsonl: no such file. Did you mean .*train.jsonl\?"):
        find_file(str(tmp_path / "trian.jsonl"))
