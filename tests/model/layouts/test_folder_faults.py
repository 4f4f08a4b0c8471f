"""A folder whose files lie, are cut off or contradict one another is an error that names the file, with exit code 2."""

import errno
import json
import shutil
import struct

import pytest
import torch
from llava_toys import save_llava
from official_toys import write_official
from safetensors.torch import load_file, save_file

from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.pretrained import reading

LLAVA = ("model.tiles={size: 56, max: 1, thumbnail: false, rule: pad}", "model.vision.normalize=openai_clip")
MORE = {"native": (), "official": ("model.template=internvl2_5",), "llava": LLAVA}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(toys, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    plain = toys.model()
    internvl_hf.save(plain.vlm, root / "native")
    plain.tokenizer.save_pretrained(root / "native")
    write_official(root / "official", {"model_type": "internlm2", "bias": False})
    save_llava(root / "llava")
    return root


@pytest.fixture(params=MORE)
def copy(request, folders, tmp_path):
    """A folder to spoil."""
    return request.param, shutil.copytree(folders / request.param, tmp_path / request.param)


@pytest.fixture
def refused(toys, tmp_path, run_cli):
    """Give a function that starts a run on a folder and returns what it is refused with."""

    def start(kind, folder):
        whole = (f"model.path={folder}", "model.vision.path=null", "model.llm.path=null")
        done = run_cli("stage=pretrain", *toys.arguments(*whole, *MORE[kind], runs=tmp_path / "runs"))
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        return " ".join(done.err.split())

    return start


def read_header(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def lie(key, value):
    def spoil(path):
        header, body = read_header(path)
        name = next(name for name in header if name.endswith("q_proj.weight") or name.endswith("wqkv.weight"))
        header[name][key] = value
        write_header(path, header, body)

    return spoil


def cut(count):
    return lambda path: path.write_bytes(path.read_bytes()[:count])


def long_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


LIES = {
    "another dtype of that size": (lie("dtype", "I32"), "I32, whole numbers, for weights. Copy it anew"),
    "a dtype of another size": (lie("dtype", "F64"), "not a readable safetensors file"),
    "a dtype that is none": (lie("dtype", "F12"), "not a readable safetensors file"),
    "another shape": (lie("shape", [3, 3]), "not a readable safetensors file"),
    "offsets beyond the file": (lie("data_offsets", [0, 10**15]), "not a readable safetensors file"),
    "offsets that run backwards": (lie("data_offsets", [8, 0]), "not a readable safetensors file"),
    "a header longer than the file": (long_header, "not a readable safetensors file"),
    "cut off": (cut(-10), "not a readable safetensors file"),
    "cut off in the header": (cut(100), "not a readable safetensors file"),
    "empty": (cut(0), "not a readable safetensors file"),
}


@pytest.mark.parametrize("lie", LIES)
def test_weights_that_lie_are_named(copy, refused, lie):
    kind, folder = copy
    spoil, said = LIES[lie]
    spoil(folder / WEIGHTS)
    error = refused(kind, folder)
    assert said in error
    assert str(folder / WEIGHTS) in error


INDEXES = {
    "a shard that is missing": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: not a readable"),
    "a shard elsewhere": ({"weight_map": {"a": "../model.safetensors"}}, "does not name a shard beside it"),
    "a number": ({"weight_map": {"a": 3}}, "does not name a shard beside it"),
    "no map": ({}, "does not name a shard beside it"),
    "a list": ([], "it holds a list, not a JSON object"),
    "keys that are not there": ({"weight_map": {"a": WEIGHTS}}, "not where the index says"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_that_lies_is_named(copy, refused, what):
    kind, folder = copy
    content, said = INDEXES[what]
    (folder / INDEX).write_text(json.dumps(content))
    assert said in refused(kind, folder)


def test_an_index_that_names_a_key_twice_is_refused(copy, refused):
    kind, folder = copy
    (folder / INDEX).write_text('{"weight_map": {"a": "model.safetensors", "a": "other.safetensors"}}')
    assert "a key stands twice: a" in refused(kind, folder)


def test_a_weight_in_two_shards_is_refused(copy, refused):
    kind, folder = copy
    weights = load_file(folder / WEIGHTS)
    names = list(weights)
    shards = {"one.safetensors": names[:3], "two.safetensors": names[2:]}
    for name, inside in shards.items():
        save_file({key: weights[key].clone() for key in inside}, folder / name, metadata={"format": "pt"})
    places = {key: name for name, inside in shards.items() for key in inside}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    error = refused(kind, folder)
    assert names[2] in error
    assert "in two shards, one.safetensors and two.safetensors" in error


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("what", ["code", "a list", "text", "nothing"])
def test_a_bin_file_that_holds_no_weights_is_refused(copy, refused, tmp_path, what):
    kind, folder = copy
    (folder / WEIGHTS).unlink()
    if what == "nothing":
        (folder / "pytorch_model.bin").write_bytes(b"")
    else:
        held = {"code": Trap(tmp_path / "was_run"), "a list": [torch.zeros(2)], "text": {"a": "b"}}[what]
        torch.save(held, folder / "pytorch_model.bin")
    assert f"{folder / 'pytorch_model.bin'}: " in refused(kind, folder)
    assert not (tmp_path / "was_run").exists()


def test_a_bin_file_of_the_older_form_is_read(folders, toys, tmp_path):
    folder = shutil.copytree(folders / "native", tmp_path / "native")
    weights = load_file(folder / WEIGHTS)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / WEIGHTS).unlink()
    whole = (f"model.path={folder}", "model.vision.path=null", "model.llm.path=null")
    table = next(weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(toys.model(*whole).vlm.llm.get_input_embeddings().weight, table)


SMALL_FILES = {"cut off": "{", "empty": "", "a list": "[1]", "bytes": "\x00\x01", "twice": '{"a": 1, "a": 2}'}


@pytest.mark.parametrize("what", SMALL_FILES)
def test_a_config_that_is_no_json_object_is_named(copy, refused, what):
    kind, folder = copy
    (folder / "config.json").write_text(SMALL_FILES[what])
    error = refused(kind, folder)
    assert f"{folder / 'config.json'}: " in error
    assert "Copy it anew" in error


def test_a_config_in_another_encoding_is_named(copy, refused):
    kind, folder = copy
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert f"{folder / 'config.json'}: not readable as JSON" in refused(kind, folder)


@pytest.mark.parametrize("size", [10**12, 0, -4, "32", 2.5, True, {}, float("nan")], ids=str)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
def test_sizes_that_no_model_has_are_listed(copy, refused, key, size):
    kind, folder = copy
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][key] = size
    (folder / "config.json").write_text(json.dumps(config))
    assert f"vision_config.{key}={size} is no size from 1 to" in refused(kind, folder)


def damaged(change):
    def spoil(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def bad_pattern(content):
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}


TOKENIZERS = {
    "no JSON": lambda path: path.write_text("{"),
    "a pattern that is none": damaged(bad_pattern),
    "a model of no kind": damaged(lambda content: content["model"].update(type="None")),
    "merges of pieces that are not there": damaged(lambda content: content["model"]["merges"].append(["zq", "qz"])),
    "no model": damaged(lambda content: content.pop("model")),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_compiled_is_refused(copy, refused, what):
    kind, folder = copy
    TOKENIZERS[what](folder / "tokenizer.json")
    error = refused(kind, folder)
    assert f"{folder}: its files cannot be read as a model's" in error
    assert "the tokenizer's files" in error


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), ValueError("No space left")])
def test_a_disk_that_is_full_is_no_fault_of_the_folder_that_is_read(tmp_path, fault):
    with pytest.raises(OSError, match="No space left on device"), reading(tmp_path):
        raise fault
