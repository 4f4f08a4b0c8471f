"""`inspect` shows what the model sees of a row: its tiles, its tokens by kind, and its pack."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import TileRule, TilesConfig
from vlm_tune.data.example import NO_LOSS
from vlm_tune.inspection.inspect_row import CONTEXT, IMAGE, SUPERVISED, canvas_of, look, runs_of, texts_of
from vlm_tune.inspection.inspect_text import draw_grid, facts
from vlm_tune.model.encoder import build_encoder

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"
EVIL = "<script>alert(1)</script>"
TURNS = [
    {"from": "human", "value": f"<image>\nWhat is <b>this</b>? {EVIL}"},
    {"from": "gpt", "value": "麻婆豆腐 [red]tofu[/red]."},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write three rows: one with a wide picture, one of text, and one that is faulty."""
    noise = np.random.default_rng(0).integers(0, 256, (28, 112, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    text = [{"from": "human", "value": "Name a spice."}, {"from": "gpt", "value": "Cumin."}]
    rows = [{"id": EVIL, "image": "wide.png", "conversations": TURNS}, {"id": "text", "conversations": text}]
    rows.append({"id": "bad", "image": "gone.png", "conversations": TURNS})
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def seen(file, parts):
    config = load_config([f"data.path={file}", "data.val=none", "model.tiles.max=4", *parts])
    return look(config, *build_encoder(config), 0)


def test_each_token_has_its_kind_and_every_tile_its_tokens(seen):
    kinds = [token.kind for token in seen.tokens]
    assert [kind == SUPERVISED for kind in kinds] == (seen.example.labels != NO_LOSS).tolist()
    assert kinds[0] == CONTEXT
    tiles = [(tile, len(run)) for kind, tile, run in runs_of(seen.tokens) if kind == IMAGE and tile]
    assert tiles == [(number, 1) for number in range(1, 6)]  # 28 pixels, patches of 14, shuffle 2: one token a tile
    said = "".join(token.text for token in seen.tokens if token.kind == SUPERVISED)
    assert said == "麻婆豆腐 [red]tofu[/red].<|im_end|>"


def test_the_text_of_all_tokens_is_the_text_of_the_row():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = "a 麻婆豆腐 🌾  b\n\tü"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(texts_of(ids, tokenizer)).strip() == text
    assert "\ufffd" not in "".join(texts_of(ids, tokenizer))


def test_pictures_are_cut_as_training_does(seen):
    picture = seen.pictures[0]
    assert (picture.grid, picture.overview, len(picture.tiles)) == ((4, 1), 4, 5)
    noise = np.asarray(picture.image)
    np.testing.assert_array_equal(np.concatenate(list(picture.tiles[:4]), axis=1), noise)
    assert draw_grid(picture) == ["[ 1  ] [ 2  ] [ 3  ] [ 4  ]", "[ 5  ] whole picture"]


@pytest.mark.parametrize(
    ("rule", "grid", "canvas"),
    [
        (TileRule.dynamic, (2, 1), (0, 0, 100, 50)),
        (TileRule.resize, (1, 1), (0, 0, 100, 50)),
        (TileRule.pad, (1, 1), (0, -25, 100, 100)),
        (TileRule.anyres, (2, 2), (0, -25, 100, 100)),
        (TileRule.anyres, (3, 1), (-25, 0, 150, 50)),
        (TileRule.anyres, (1, 1), (0, 0, 100, 50)),
    ],
)
def test_the_grid_covers_the_picture_and_what_is_padded(rule, grid, canvas):
    assert canvas_of((100, 50), grid, TilesConfig(size=28, rule=rule)) == pytest.approx(canvas)


def test_the_pack_holds_the_good_rows_of_the_step(seen):
    assert seen.pack is not None
    assert {row.where for row in seen.pack.rows} == {"train.jsonl:1", "train.jsonl:2"}
    this = next(row for row in seen.pack.rows if row.is_this)
    sizes = (len(seen.example.input_ids), seen.example.num_supervised, 5)
    assert (this.where, (this.tokens, this.supervised, this.tiles)) == ("train.jsonl:1", sizes)
    assert (seen.pack.is_packed, seen.pack.step) == (True, 1)


def test_a_row_of_the_validation_part_is_found_there(file, parts):
    rows = file.read_text().splitlines()[1:2] * 20
    file.write_text("".join(f"{row}\n" for row in rows))
    config = load_config([f"data.path={file}", "data.val_share=0.5", *parts])
    steps = [look(config, *build_encoder(config), row).pack.step for row in (0, 1, 2, 3, 4, 5)]
    assert 0 in steps
    assert 1 in steps


def test_padded_batches_are_shown_as_such(run_cli, file, parts):
    arguments = ("data.val=none", "stage.packing=false", "trainer.global_batch=2", "trainer.micro_batch=2", *parts)
    finished = run_cli("inspect", f"data.path={file}", "row=1", "--text", *arguments)
    assert "each padded to" in finished.out


def test_the_page_is_one_file_and_escapes_the_data(run_cli, file, parts, tmp_path):
    out = tmp_path / "row.html"
    finished = run_cli("inspect", f"data.path={file}", "row=0", f"out={out}", "data.val=none", *parts)
    page = out.read_text()
    assert (finished.code, EVIL in page) == (0, False)
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 6  # the picture and its five tiles
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert re.search(r'class="supervised" title="[^"]*id \d+', page)
    assert "train.jsonl:1" in finished.out


def test_the_text_shows_the_same(run_cli, file, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = run_cli("inspect", f"data.path={file}", "row=0", "--text", "data.val=none", *parts)
    assert finished.code == 0
    for words in (EVIL, "[red]tofu[/red]", "supervised", "tile 5", "4 x 1 and the whole picture", "optimizer step 1"):
        assert words in finished.out
    assert not list(tmp_path.glob("*.html"))


def test_a_row_is_found_by_the_place_that_messages_name(run_cli, file, parts):
    texts = [
        run_cli("inspect", f"data.path={file}", f"row={row}", "--text", *parts).out for row in (1, "train.jsonl:2")
    ]
    assert texts[0] == texts[1]
    assert 'train.jsonl:2 (id "text"), row 1 from 0' in texts[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("3", "row=3: train.jsonl has 3 rows, counted from 0: row=0 to row=2"),
        ("-1", "row=-1: give the number of a row, counted from 0"),
        ("2", 'train.jsonl:3 (id "bad"): picture "gone.png" is not there'),
        ("train.jsonl:3", 'train.jsonl:3 (id "bad"): picture "gone.png" is not there'),
        ("train.jsonl:4", "row=train.jsonl:4: no row has that place; the first is train.jsonl:1"),
        ("second", "row=second: give the number of a row, counted from 0, or its place as in train.jsonl:17"),
    ],
)
def test_a_row_that_cannot_be_shown_is_an_error(run_cli, file, parts, row, words):
    finished = run_cli("inspect", f"data.path={file}", f"row={row}", *parts)
    assert finished.code == 2
    assert words in finished.err


def test_a_page_that_cannot_be_written_is_an_error(run_cli, file, parts, tmp_path):
    finished = run_cli("inspect", f"data.path={file}", "row=1", "data.val=none", f"out={tmp_path}", *parts)
    assert finished.code == 2
    assert f"out={tmp_path}: Is a directory. Name a file" in finished.err


def test_markup_in_the_texts_is_named_with_its_counts(tmp_path, parts):
    turns = [
        {"from": "human", "value": "Where is <ref>it</ref>?"},
        {"from": "gpt", "value": "<box>[[1, 2, 3, 4]]</box>"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    config = load_config([f"data.path={path}", "data.val=none", *parts])
    seen = look(config, *build_encoder(config), 0)
    assert facts(seen)["markup"] == "<ref> 1, </ref> 1, <box> 1, </box> 1: one token each"


def test_rows_of_one_picture_are_shown_as_sharing_its_tokens(run_cli, file, parts, tmp_path):
    row = json.loads(file.read_text().splitlines()[0])
    asked = [row | {"id": str(n), "conversations": [TURNS[0], {"from": "gpt", "value": "Tofu." * n}]} for n in (1, 2)]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    settings = (f"data.path={file}", "data.val=none", "model.tiles.max=4", "stage.share_prefix=on", *parts)
    config = load_config(list(settings))
    pack = look(config, *build_encoder(config), 0).pack
    first, second = pack.rows
    assert (first.shared, first.tiles, second.tiles) == (0, 5, 0)
    whole = [len(look(config, *build_encoder(config), n).example.input_ids) for n in (0, 1)]
    assert first.tokens + second.tokens + second.shared == sum(whole)
    assert second.shared > second.tokens  # the picture and the question are the most of it
    told = ("inspect", "row=1", *settings)
    assert "share the tokens" in run_cli(*told, "--text").out
    run_cli(*told, f"out={tmp_path / 'row.html'}")
    assert '<th class="number">shared</th>' in (tmp_path / "row.html").read_text()
