"""The sizes of all rows: equal to what training makes of them, found once, kept, and never those of other data."""

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import turns, write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import AugmentConfig, TooLong
from vlm_tune.data.sets import index as index_module
from vlm_tune.data.sets.dataset import Conversations, PictureSettings
from vlm_tune.data.sets.index import SIZES, index_key, measure_all, open_index, refuse_faults
from vlm_tune.data.sets.paths import find_file
from vlm_tune.errors import DataError
from vlm_tune.model.encoder import build_encoder

WORDS = ("a cat", " on\n", "the mat", "<image>", "\n\n", "猫", "<|im_end|>", "...", "1234", "é" * 9)
TEXT = st.lists(st.sampled_from(WORDS[:3] + WORDS[4:]), min_size=1, max_size=12).map(lambda words: "x" + "".join(words))
SIZES_OF_PICTURES = ((56, 56), (112, 56), (60, 200), (30, 20))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Give a folder with a picture of each size: 0.png, 1.png, ..."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES_OF_PICTURES):
        Image.new("RGB", size, (40 * number, 90, 120)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def open_rows(parts, pictures):
    """Give a function that opens rows as training does."""

    def opened(path: Path, *overrides: str) -> Conversations:
        given = [f"data.path={path}", f"data.image.root={pictures}", "model.tiles.size=56", "model.tiles.max=6"]
        config = load_config(["data=own", *parts, *given, *overrides])
        settings = PictureSettings(config.model.tiles, config.model.vision.normalize, AugmentConfig())
        return Conversations(path, config.data, build_encoder(config)[0], settings)

    return opened


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))


def row(number, picture=0, text="What is it?", answer="A cat."):
    if picture is None:
        return {"id": f"row_{number}", "conversations": turns((text, answer))}
    record = {"id": f"row_{number}", "image": f"{picture}.png"}
    return record | {"conversations": turns((f"<image>\n{text}", answer))}


def write(tmp_path, rows):
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


def never(*arguments):
    raise AssertionError("measured again")


# ---------------------------------------------------------------------------------------------------- the same sizes


@st.composite
def rows(draw):
    pairs = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    chosen = draw(st.lists(st.integers(0, len(SIZES_OF_PICTURES) - 1), max_size=3))
    pairs[0] = ("<image>" * len(chosen) + pairs[0][0], pairs[0][1])
    return {"images": [f"{number}.png" for number in chosen], "conversations": turns(*pairs)}


@given(st.lists(rows(), min_size=1, max_size=8), st.sampled_from(TooLong), st.sampled_from((8192, 60, 30)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes_from_headers_are_those_of_what_is_made(tmp_path, open_rows, records, policy, max_length):
    path = write(tmp_path, records)
    data = open_rows(path, "data.format=llava", f"data.on_too_long={policy.value}")
    data.encoder.settings = replace(data.encoder.settings, max_length=max_length)
    table, findings = measure_all(data, np.arange(len(data)), 0)
    left_out = {fault.where for fault in (*findings.faults, *findings.skipped)}
    assert len(table) + len(left_out) == len(records)
    for number, tokens, supervised, tiles, *_ in table.tolist():
        example = data.encode(number)
        made = data.make_tiles(data.sample(number), example)
        assert (len(example.input_ids), example.num_supervised, len(made)) == (tokens, supervised, tiles)
        assert len(example.input_ids) <= max_length
        assert int((example.input_ids == data.encoder.context_id).sum()) == 4 * tiles
    for number in set(range(len(records))) - set(table["row"].tolist()):
        with pytest.raises(DataError, match=r"train.jsonl:"):
            data.encode(number)


def test_several_processes_find_what_one_finds(tmp_path, open_rows, monkeypatch):
    records = [row(number, number % 5 if number % 9 else None, "why? " * (1 + number % 7)) for number in range(60)]
    data = open_rows(write(tmp_path, records), "data.format=llava", "data.max_length=60", "data.on_too_long=skip")
    assert {"<image>" in record["conversations"][0]["value"] for record in records} == {True, False}
    alone, found_alone = measure_all(data, np.arange(60), 0)
    monkeypatch.setattr(index_module, "CHUNK", 7)
    monkeypatch.setattr(index_module, "MANY", 1)
    state = torch.get_rng_state()
    together, found = measure_all(data, np.arange(60), 2)
    assert np.array_equal(alone, together)
    assert found.fault_rows == found_alone.fault_rows == [n for n in range(60) if n % 5 == 4 and n % 9]
    assert list(map(str, found.faults)) == list(map(str, found_alone.faults))
    assert list(map(str, found.skipped)) == list(map(str, found_alone.skipped))
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are not touched"


def test_the_shards_of_a_pattern_are_one_data_set(tmp_path, open_rows):
    for number in range(3):
        write_jsonl(tmp_path / f"train-{number}.jsonl", [row(number)])
    pattern = find_file(f"{tmp_path}/train-*.jsonl")
    before = index_key(open_rows(pattern))
    assert open_index(open_rows(pattern))[0]["row"].tolist() == [0, 1, 2]
    write_jsonl(tmp_path / "train-3.jsonl", [row(3)])
    assert index_key(open_rows(pattern)) != before
    assert open_index(open_rows(pattern))[0]["row"].tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- kept, or not


def test_a_second_start_measures_nothing(tmp_path, open_rows, monkeypatch):
    path = write(tmp_path, [row(number) for number in range(5)])
    first, _ = open_index(open_rows(path))
    monkeypatch.setattr(index_module, "measure_all", never)
    second, findings = open_index(open_rows(path))
    assert np.array_equal(first, second)
    assert findings.faults == []
    assert not second.flags.owndata, "the sizes are mapped, not read"
    assert not second.flags.writeable


@pytest.mark.parametrize(
    "override",
    [
        "model.template=internlm2_chat",
        "model.system=Be brief.",
        "model.tiles.max=3",
        "model.tiles.thumbnail=false",
        "model.tiles.rule=area",
        "data.format=sharegpt",
        "data.max_length=99",
        "data.on_too_long=skip",
        "data.image.exif=true",
        "data.image.max_pixels=9999",
        "data.image.root=.",
    ],
)
def test_another_setting_has_another_index(tmp_path, open_rows, override):
    path = write(tmp_path, [row(0)])
    assert index_key(open_rows(path, override)) != index_key(open_rows(path))


def test_settings_that_do_not_touch_the_sizes_keep_the_index(tmp_path, open_rows):
    path = write(tmp_path, [row(0)])
    others = ("data.workers=3", "data.augment.jpeg=true", "stage.pack_length=99", "seed=7")
    assert index_key(open_rows(path, *others)) == index_key(open_rows(path))


def test_another_tokenizer_has_another_index(tmp_path, open_rows, parts):
    path = write(tmp_path, [row(0)])
    folder = Path(parts[2].partition("=")[2])
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "llm").mkdir()
    for name, content in files.items():
        (tmp_path / "llm" / name).write_bytes(content)
    before = index_key(open_rows(path))
    assert index_key(open_rows(path, f"model.llm.path={tmp_path}/llm")) == before, "the same tokenizer elsewhere"
    spec = json.loads(files["tokenizer.json"])
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert index_key(open_rows(path, f"model.llm.path={tmp_path}/llm")) != before


def test_a_users_function_is_part_of_the_key(tmp_path, open_rows):
    path = write(tmp_path, [row(0)])
    own = tmp_path / "own.py"
    own.write_text("def read(record):\n    return record\n", encoding="utf-8")
    before = index_key(open_rows(path, f"data.format={own}:read"))
    own.write_text("def read(record):\n    return dict(record)\n", encoding="utf-8")
    assert index_key(open_rows(path, f"data.format={own}:read")) != before


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_changed_file_is_measured_again(tmp_path, open_rows, keeps_time):
    path = write(tmp_path, [row(0), row(1)])
    before, _ = open_index(open_rows(path))
    stat = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("A cat.", "A dog, I think."), encoding="utf-8")
    if keeps_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after, _ = open_index(open_rows(path))
    assert (after["supervised"] > before["supervised"]).all()


def test_what_a_killed_process_left_behind_is_no_index(tmp_path, open_rows, monkeypatch):
    data = open_rows(write(tmp_path, [row(0), row(1)]))

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module.np, "save", die)
        with pytest.raises(KeyboardInterrupt):
            open_index(data)
    assert not list(tmp_path.rglob(SIZES))
    table, _ = open_index(data)
    assert len(table) == 2


def test_of_two_that_ask_at_once_one_measures(tmp_path, open_rows, monkeypatch):
    path = write(tmp_path, [row(number) for number in range(40)])
    opened = [open_rows(path) for _ in range(2)]
    measured, results = [], []
    monkeypatch.setattr(index_module, "measure_all", lambda *arguments: measured.append(1) or measure_all(*arguments))
    threads = [Thread(target=lambda data=data: results.append(open_index(data)[0])) for data in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1
    assert np.array_equal(*results)


def read_in_child(data, queue):
    queue.put(int(open_index(data)[0]["tokens"].sum()))


def test_a_process_that_is_not_forked_opens_the_same_index(tmp_path, open_rows):
    data = open_rows(write(tmp_path, [row(0), row(1)]))
    table, _ = open_index(data)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(data, queue))
    child.start()
    assert queue.get(timeout=120) == int(table["tokens"].sum())
    child.join()


# -------------------------------------------------------------------------------------------------------- faulty rows


def test_faults_are_kept_with_the_index(tmp_path, open_rows):
    records = [row(0), row(1, picture=9), row(2), {"id": "row_3", "conversations": turns(("Q", ""))}]
    path = write(tmp_path, records)
    _, first = open_index(open_rows(path, "data.format=llava"))
    _, again = open_index(open_rows(path, "data.format=llava"))
    assert again.fault_rows == first.fault_rows == [1, 3]
    assert list(map(str, again.faults)) == list(map(str, first.faults))
    assert (again.faults[0].where, again.faults[0].sample_id) == ("train.jsonl:2", "row_1")
    with pytest.raises(
        DataError, match=r"2 bad rows\n  train.jsonl:2 \(id \"row_1\"\): picture \"9.png\" is not there"
    ):
        refuse_faults(again, path)


def test_skipped_rows_and_notes_are_kept_with_the_index(tmp_path, open_rows):
    path = write(tmp_path, [row(0, answer="why? " * 60), row(1)])
    for policy, name in (("skip", "skipped"), ("trim_text", "notes")):
        limits = ("data.format=llava", "data.max_length=70", f"data.on_too_long={policy}", "model.tiles.max=1")
        first, again = (open_index(open_rows(path, *limits))[1] for _ in range(2))
        assert len(getattr(again, name)) == 1
        assert list(map(str, getattr(again, name))) == list(map(str, getattr(first, name)))


def test_a_mended_picture_mends_its_row_alone(tmp_path, open_rows, monkeypatch):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    records = [
        {**row(number), "image": name} for number, name in enumerate(("a.png", "late.png", "a.png", "never.png"))
    ]
    path, root = write(tmp_path, records), f"data.image.root={tmp_path}"
    table, findings = open_index(open_rows(path, root))
    assert (table["row"].tolist(), findings.fault_rows) == ([0, 2], [1, 3])
    Image.new("RGB", (112, 56)).save(tmp_path / "late.png")
    measured = []
    monkeypatch.setattr(
        index_module,
        "measure_all",
        lambda data, rows, *how: measured.append(rows.tolist()) or measure_all(data, rows, *how),
    )
    for _ in range(2):
        table, findings = open_index(open_rows(path, root))
        assert (table["row"].tolist(), table["tiles"].tolist()) == ([0, 1, 2], [1, 3, 1])
        assert findings.fault_rows == [3]
    assert measured == [[1, 3], [3]]


def refused(tmp_path, open_rows, rows):
    path = write(tmp_path, rows)
    _, findings = open_index(open_rows(path))
    with pytest.raises(DataError) as raised:
        refuse_faults(findings, path)
    return str(raised.value).splitlines()


def test_a_long_list_of_faults_is_cut_short_but_counted(tmp_path, open_rows):
    lines = refused(tmp_path, open_rows, [row(number, picture=number + 9) for number in range(25)])
    assert lines[0].endswith("25 bad rows")
    assert lines[-2:] == [
        "  ... and 5 more kinds",
        "  Mend them (`python -m vlm_tune check` lists all), or leave them out with data.on_bad_sample=skip",
    ]


def test_what_many_rows_say_alike_is_said_once(tmp_path, open_rows):
    rows = [row(number) | {"price": 3} for number in range(12)] + [row(12, picture=9), row(13, picture=9)]
    lines = refused(tmp_path, open_rows, rows)
    assert len(lines) == 4
    assert lines[1].startswith('  train.jsonl:1 (id "row_0"): "price" is not read in rows of llava')
    assert lines[1].endswith("(so do 11 more rows)")
    assert lines[2].endswith("(so does 1 more row)")
