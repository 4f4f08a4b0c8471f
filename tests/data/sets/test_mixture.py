"""Several data sets as one: each with its own folder, dialect and limit, as often as its file says, and no oftener."""

import json
from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
import yaml
from PIL import Image
from toys import turns, write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.sets.meta import MetaEntry, read_meta
from vlm_tune.data.sets.mixture import Mixture, is_augmented
from vlm_tune.data.sizes import Index
from vlm_tune.errors import CheckpointError, ConfigError, DataError
from vlm_tune.model.encoder import build_encoder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give three sets: 10 rows of pictures, 6 of text in another dialect, 4 of wide pictures elsewhere."""
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    for name, size in (("here", (56, 56)), ("there", (224, 56))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, (200, 60, 60)).save(tmp_path / name / "a.png")
    shown = turns(("<image>\nWhat is it?", "A dish."))
    write_jsonl(
        tmp_path / "dishes.jsonl", [named("dish", n) | {"image": "a.png", "conversations": shown} for n in range(10)]
    )
    write_jsonl(
        tmp_path / "chats.jsonl", [named("chat", n) | {"instruction": "Hi", "output": "Hello"} for n in range(6)]
    )
    write_jsonl(
        tmp_path / "wide.jsonl", [named("wide", n) | {"image": "a.png", "conversations": shown} for n in range(4)]
    )
    return tmp_path


def named(name, number):
    return {"id": f"{name}_{number}"}


META = {
    "dishes": {"root": "here", "annotation": "dishes.jsonl", "repeat_time": 0.5},
    "chats": {"root": "", "annotation": "chats.jsonl", "repeat_time": 3.5},
    "wide": {"root": "there", "annotation": "wide.jsonl", "max_dynamic_patch": 2, "data_augment": True},
}
WEIGHTED = [
    {"name": "dishes", "root": "here", "annotation": "dishes.jsonl", "weight": 1},
    {"annotation": "chats.jsonl", "weight": 3, "format": "alpaca"},
]


@pytest.fixture
def start(parts, folder):
    """Give a function that writes a mixture and sets its data module up."""

    def setup(content, *overrides, name="meta.json"):
        path = folder / name
        text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
        path.write_text(text, encoding="utf-8")
        ours = ["model.tiles.size=56", "model.tiles.max=4", "data.val=none", "stage.pack_length=64"]
        config = load_config(["data=own", *parts, f"data.path={path}", *ours, *overrides])
        data = DataModule(config, build_encoder(config)[0])
        data.setup()
        return data

    return setup


def epoch_of(data, epoch=0):
    """Count how often each row comes in an epoch, by its id."""
    batches = takewhile(lambda batch: batch.epoch <= epoch, data.stream())
    entries = [entry for batch in batches if batch.epoch == epoch for entry in batch.rows]
    return Counter(id_of(data.train, entry) for entry in entries)


def id_of(part, entry):
    """Read the id of an index's entry."""
    data, row = part.data.locate(int(part.index.rows[entry]))
    return data.sample(row).id


def totals(counts):
    return Counter(name.partition("_")[0] for name in counts.elements())


def test_prefixes_are_not_shared_where_a_set_augments_its_pictures(start):
    with pytest.raises(ConfigError, match=r"share_prefix=on, but .*meta.json augments pictures, each row its own: set"):
        start(META, "stage.share_prefix=on")
    assert not start(META, "stage.share_prefix=auto").settings(1).share_prefix


# ---------------------------------------------------------------------------------------------------------- how often


def test_repeat_time_is_honoured_in_full(start):
    counts = epoch_of(start(META))
    assert counts == (
        {f"dish_{n}": 1 for n in range(5)}  # half of them: the first
        | {f"chat_{n}": 4 if n < 3 else 3 for n in range(6)}  # three times, and half of them once more
        | {f"wide_{n}": 1 for n in range(4)}
    )
    assert epoch_of(start(META), epoch=2) == counts


def test_weights_are_shares_of_an_epoch_as_long_as_all_sets(start):
    data = start(WEIGHTED, name="meta.yaml")
    first, second = (epoch_of(data, epoch) for epoch in (0, 1))
    assert totals(first) == totals(second) == {"dish": 4, "chat": 12}
    assert {first[f"chat_{n}"] for n in range(6)} == {2}
    assert {name for name in first if name.startswith("dish")} != {name for name in second if name.startswith("dish")}


def test_the_seed_decides_the_order(start):
    orders = [
        [batch.rows for batch in takewhile(lambda batch: batch.epoch == 0, start(WEIGHTED, seed).stream())]
        for seed in ("seed=1", "seed=1", "seed=2")
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("size", "repeat", "count"), [(100, 0.29, 29), (3, 0.1, 1), (10, 2.5, 25), (7, 1, 7), (0, 2.5, 0), (30, 0.1, 3)]
)
def test_counts_of_a_repeat_time(folder, size, repeat, count):
    entry = MetaEntry("a", folder, folder, repeat_time=repeat)
    mixture = Mixture(folder, [entry, MetaEntry("b", folder, folder)], [[None] * 100, [None] * 5])
    rows = np.array([*range(size), *range(100, 105)], np.int64)
    assert mixture.draw(Index(rows, rows, rows, rows, rows, rows, rows, rows)).counts == (count, 5)


def test_rows_of_the_validation_part_are_never_trained_on(start):
    data = start(META, "data.val=auto", "data.val_share=0.3")
    held_out = {id_of(data.val, entry) for entry in range(len(data.val.index))}
    assert len(held_out) == len(data.val.index) == 6
    assert not held_out & set(epoch_of(data))


# -------------------------------------------------------------------------------------------------- each in its own way


def test_each_set_has_its_folder_dialect_and_tile_limit(start):
    data = start(META)
    assert [each.format for each in data.train.data.sets] == ["llava", "alpaca", "llava"]
    tiles = dict(zip(data.train.index.rows.tolist(), data.train.index.tiles.tolist(), strict=True))
    assert [tiles[row] for row in (0, 10, 16)] == [1, 0, 3]  # two and a thumbnail, of the four that would fit
    assert start({"wide": META["wide"] | {"max_dynamic_patch": 4}}).train.index.tiles.tolist() == [5] * 4


def test_batches_are_made_of_all_sets(start):
    data = start(META, "trainer.global_batch=1")
    batches = list(takewhile(lambda batch: batch.cursor[0] == 0, data.train_dataloader()))
    assert {name.partition("_")[0] for batch in batches for name in batch.sample_ids} == {"dish", "chat", "wide"}
    for batch in batches:
        wanted = sum({"dish": 1, "chat": 0, "wide": 3}[name.partition("_")[0]] for name in batch.sample_ids)
        assert (0 if batch.tiles is None else len(batch.tiles)) == wanted


def test_degradation_belongs_to_its_set(start):
    data = start(META)
    assert [each.pictures.augment.jpeg for each in data.train.data.sets] == [False, False, True]
    assert is_augmented(data.train.data)
    assert not is_augmented(start({"dishes": META["dishes"]}).train.data)


def test_a_single_file_is_no_mixture(start, folder):
    data = start(META, f"data.path={folder}/chats.jsonl")
    assert data.settings(1).draw is None
    assert epoch_of(data) == {f"chat_{n}": 1 for n in range(6)}


def test_a_set_may_be_a_recipes_file(folder, monkeypatch):
    monkeypatch.setattr("vlm_tune.data.sets.paths.run_recipe", lambda name: folder / name)
    path = folder / "meta.json"
    path.write_text(json.dumps([{"annotation": "recipe:here/a.png"}]), encoding="utf-8")
    entry = read_meta(path)[0]
    assert (entry.name, entry.annotation, entry.root) == ("1", folder / "here" / "a.png", folder / "here")


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_resumed_mixture_goes_on_where_it_was(start):
    data = start(WEIGHTED, "trainer.global_batch=1")
    straight = list(islice(data.stream(), 9))
    data.cursor = straight[4].after
    resumed = start(WEIGHTED, "trainer.global_batch=1")
    resumed.load_state_dict(data.state_dict())
    assert list(islice(resumed.stream(), 4)) == straight[5:]


def test_a_changed_mixture_cannot_be_resumed(start):
    state = start(META).state_dict()
    changed = META | {"chats": META["chats"] | {"repeat_time": 3}}
    with pytest.raises(CheckpointError, match=r"as many rows .* but not the same sizes or mixture"):
        start(changed).load_state_dict(state)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": "own.py:read"}, r'"format" is \'own.py:read\': name a function of your own with data.format='),
        ({"format": "lava"}, r'"format" is \'lava\'. Known: auto, llava'),
        ({"weight": 0}, r'"weight" is 0. Write a number above 0.'),
        ({"weight": 1, "repeat_time": 2}, r'both "weight" and "repeat_time". Keep one of them.'),
        ({"root": 3}, r'"root" is not text. Write a path.'),
    ],
)
def test_a_faulty_entry(start, fields, reason):
    with pytest.raises(DataError, match=f"meta.json: 1: {reason}"):
        start([{"annotation": "chats.jsonl"} | fields])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [WEIGHTED[0], {"annotation": "chats.jsonl"}],
            r"2: \"weight\" is missing here. Give one to every set, or to none.",
        ),
        ([WEIGHTED[0], WEIGHTED[0]], r'two sets have the name "dishes". Give each its own.'),
        ([], "not a meta file"),
        ("a: [", "not YAML: "),
    ],
)
def test_a_faulty_file(folder, content, reason):
    path = folder / "meta.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(DataError, match=f"meta.yaml: {reason}"):
        read_meta(path)


def test_a_tile_limit_that_no_pack_can_hold(start):
    with pytest.raises(DataError, match=r'wide: "max_dynamic_patch" makes up to 3 tiles of one picture, stage.pack_ti'):
        start(META, "stage.pack_tiles=2", "model.tiles.max=1")


def test_a_tile_limit_below_the_models_least(start):
    with pytest.raises(DataError, match=r'wide: "max_dynamic_patch" is 2, below model.tiles.min=3: raise it.'):
        start(META, "model.tiles.min=3")


def test_faults_of_all_sets_are_listed(start, folder):
    for name in ("here", "there"):
        (folder / name / "a.png").unlink()
    with pytest.raises(DataError) as raised:
        start(META)
    assert "14 bad rows" in str(raised.value)
    assert "dishes.jsonl:1 " in str(raised.value)
    assert "wide.jsonl:1 " in str(raised.value)


def test_faulty_rows_that_are_left_out_are_counted_out(start, folder):
    (folder / "there" / "a.png").unlink()
    data = start(META, "data.on_bad_sample=skip")
    assert totals(epoch_of(data)) == {"dish": 5, "chat": 21}
    data.write_quarantine(folder / "quarantine.jsonl")
    assert len((folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()) == 4
