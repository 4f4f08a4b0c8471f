"""Hostile rows, pictures, checkpoints and folders: each ends soon in an error of our own, and none of them is run."""

import json
import os
import resource
import shutil
import socket
import struct
import sys
import time
import zlib

import pytest
import torch
from toys import turns

from vlm_tune.cli import main
from vlm_tune.config.parse import read_config
from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.rows.rows import open_rows
from vlm_tune.data.sample import Picture
from vlm_tune.data.sets.meta import read_meta
from vlm_tune.errors import DataError, VlmTuneError

QUIET = ("stage=finetune", "stage.init_from=none", "stage.max_steps=1", "stage.evaluate=false", "trainer.num_chats=0")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *more):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0" * 8))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(500_000_000), 9)  # half a megabyte that would be 500


@pytest.fixture
def _seconds_and_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "400 MB"


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.usefixtures("_seconds_and_memory")
@pytest.mark.parametrize(
    "content",
    [
        png(8, 1, chunk(b"zTXt", b"k\0\0" + BOMB)),
        png(8, 1, chunk(b"iCCP", b"k\0\0" + BOMB)),
        png(8, 1, chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)),
        png(2**31 - 1, 2**31 - 1),
        png(60_000, 60_000),
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(100),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        b"BM" + struct.pack("<IIIIii", 100, 0, 54, 40, 2**30, 2**30) + bytes(100),
    ],
    ids=["text", "profile", "long text", "a size of 31 bits", "60000 x 60000", "a chunk of 2 GB", "gif", "bmp"],
)
def test_a_header_that_promises_too_much_is_an_error_or_a_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    reader = ImageReader(ImageConfig(), tmp_path)
    try:
        seen = reader.open_picture(Picture("a.png"), "row 1", None).size
    except DataError as error:
        seen = str(error)
    assert seen == (8, 1) or seen.startswith('row 1: picture "a.png"')


def special(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        path.symlink_to(f"/dev/{kind}")


SPECIAL = ("pipe", "folder", "socket", "zero", "stdin", "full")


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_no_picture(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    special(kind, tmp_path / "a.png")
    with pytest.raises(DataError, match=r'row 1: picture "a\.png" (is not a file|is a symbolic link out of)'):
        ImageReader(ImageConfig(), tmp_path).read_size(Picture("a.png"), "row 1", None)


# ----------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "folder"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.tar", "a.csv"])
def test_a_special_file_holds_no_rows(tmp_path, kind, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    special(kind, tmp_path / name)
    with pytest.raises(DataError, match="not a file"):
        open_rows(tmp_path / name, tmp_path / "cache")


@pytest.mark.parametrize(
    "row",
    [
        '{"id": ' + "9" * 5000 + "}",
        '{"a": ' * 50_000 + "1" + "}" * 50_000,
        "[" * 100_000,
        '{"id": "' + "\\ud800" * 100 + '"}',
        '{"conversations": ' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=["a number of 5000 digits", "objects in objects", "lists in lists", "half characters", "a deep conversation"],
)
def test_json_of_any_depth_and_length_is_named_with_its_line(toys, tmp_path, run_cli, row):
    good = {"id": "x", "conversations": turns(("Say it.", "it"))}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(good)}\n{row}\n", encoding="utf-8")
    done = run_cli(
        *toys.arguments(*QUIET, f"data.path={tmp_path}/train.jsonl", "data.val=none", runs=tmp_path / "runs")
    )
    assert done.code == 2
    assert "train.jsonl:2" in done.err


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' * 50_000, '{"a": {"length": ' + "9" * 5000 + "}}"],
    ids=["lists", "objects", "digits"],
)
def test_a_mixture_of_any_depth_is_named(tmp_path, text):
    (tmp_path / "meta.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"meta\.json"):
        read_meta(tmp_path / "meta.json")


def test_a_terminal_is_not_written_to_by_a_row(toys, tmp_path, run_cli):
    row = {"id": "\x1b[2J\x1b]0;title\x07\x9b1m", "conversations": turns(("<image>", "a"))}
    (tmp_path / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    done = run_cli(
        *toys.arguments(*QUIET, f"data.path={tmp_path}/train.jsonl", "data.val=none", runs=tmp_path / "runs")
    )
    assert done.code == 2
    assert "\\x1b[2J\\x1b]0;title\\x07\\x9b1m" in done.err
    assert not set(done.err) & {"\x1b", "\x07", "\x9b"}


# ---------------------------------------------------------------------------------------------------- runs and folders


YAML = {
    "code": "!!python/object/apply:os.system ['touch {sprung}']\n",
    "a new object": "model: !!python/object/new:os.system ['touch {sprung}']\n",
    "a target": "model: {{_target_: os.system, command: 'touch {sprung}'}}\n",
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "depth": "a: " + "[" * 20_000 + "\n",
    "a resolver": "model: {{system: '${{oc.env:HOME}}'}}\n",
}


@pytest.mark.usefixtures("_seconds_and_memory")
@pytest.mark.parametrize("kind", YAML)
def test_a_runs_settings_run_nothing_and_end_soon(tmp_path, kind):
    sprung = tmp_path / "sprung"
    text = YAML[kind].format(sprung=sprung) if "{" in YAML[kind] else YAML[kind]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(VlmTuneError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' * 50_000, '{"vocab_size": ' + "9" * 5000 + "}", "\x00" * 100],
    ids=["lists", "objects", "digits", "zeros"],
)
def test_json_of_any_depth_in_a_model_folder_is_named(toys, tmp_path, run_cli, name, text):
    if (name, text[0]) == ("generation_config.json", "\x00"):
        pytest.skip("a file that is no JSON at all is none to the library, and our own stop tokens take its place")
    shutil.copytree(toys.llm, tmp_path / "llm")
    (tmp_path / "llm" / name).write_text(text, encoding="utf-8")
    done = run_cli(*toys.arguments(*QUIET, f"model.llm.path={tmp_path}/llm", runs=tmp_path / "runs"))
    assert done.code == 2
    assert str(tmp_path / "llm") in done.err


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("verb", ["evaluate", "export", "resume", "init"])
def test_code_in_a_checkpoint_is_run_by_no_verb(toys, tmp_path, run_cli, verb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(toys.arguments(*QUIET, runs=tmp_path / "runs")) == 0
    (run,) = {path.resolve() for path in (tmp_path / "runs").iterdir()}
    checkpoint = run / "checkpoints" / "step_00000001.ckpt"
    torch.save({"state_dict": {}, "trap": Trap()}, checkpoint)
    done = {
        "evaluate": lambda: run_cli("evaluate", f"ckpt={run}"),
        "export": lambda: run_cli("export", f"ckpt={run}", f"out={tmp_path}/out"),
        "resume": lambda: run_cli(*toys.arguments(*QUIET, f"resume='{checkpoint}'", runs=tmp_path / "runs")),
        "init": lambda: run_cli(
            *toys.arguments(*QUIET[:1], *QUIET[2:], f"stage.init_from='{run}'", runs=tmp_path / "new")
        ),
    }[verb]()
    assert done.code == 2
    assert "it holds objects other than weights and is not loaded, for safety" in done.err
    assert not (tmp_path / "sprung").exists()


def test_this_python_has_a_limit_for_digits():
    assert sys.get_int_max_str_digits() > 0  # what the rows of 5000 digits above are refused by
