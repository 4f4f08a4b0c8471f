"""Mistakes of the command line are answered at once, with the line that works, before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_tune.cli import VERBS
from vlm_tune.config.hints import OWN_NAMES
from vlm_tune.config.parse import GROUPS, known_keys, options
from vlm_tune.config.usage import USAGE

ROOT = Path(__file__).parents[1]
SLOW = ("torch", "lightning", "transformers")

AT_ONCE = [
    ("stage.lora.rnak=8", "ConfigError: stage.lora.rnak: no such key. Did you mean stage.lora.rank?"),
    ("stage.lora.rank=many", "ConfigError: stage.lora.rank: Value 'many' of type 'str'"),
    ("trainer=8", "ConfigError: trainer=8: no such trainer. There are: default"),
    (
        "stage=lora",
        "There are: dpo, finetune, finetune_full, mpo, pretrain, qlora, sft. Here, write stage=finetune, which trains",
    ),
    ("data.path={folder}/pictures", "holds no data file but 2 pictures. Write a file of rows that names them"),
    ("data.path={folder}/nowhere.jsonl", "nowhere.jsonl: no such file."),
    (
        "data.path={folder}/rows.jsonl logger.names=[comet]",
        "logger.names=['comet']: no such logger. There are: tenso",
    ),
    ("data.path={folder}/rows.jsonl resume={folder}", "the folder holds no checkpoint. Name a run folder or a .ckpt"),
    ("data.path={folder}/rows.jsonl runs={folder} resume=last", "holds no run of stage=finetune model=demo with a che"),
    ("data.path={folder}/rows.jsonl runs={folder} model=tiny", "ConfigError: model=tiny names no weights"),
    ("data.path={folder}/rows.jsonl model.llm.path=/nowhere", "ConfigError: model.llm.path=/nowhere: no such folder."),
    ("data.path={folder}/rows.jsonl data.format=llama", "ConfigError: data.format=llama is unknown: did you mean llav"),
    ("chat ckpt={folder}/nowhere", "nowhere: no such run folder or checkpoint. `ls runs` shows the runs"),
    ("evaluate ckpt={folder}/nowhere", "nowhere: no such run folder or checkpoint. `ls runs` shows the runs"),
    ("export out={folder}/new layout=onnx", "ConfigError: layout=onnx: no such layout. There are: auto, hf, official"),
    ("export out={folder} ckpt={folder}/nowhere", "the folder is not empty. Name a new one: nothing is overwritten"),
    ("--model x", "ConfigError: --model: keys are written without dashes. Write model=x"),
]


def spoken_by_a_process(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; the interpreter lists what was imported."""
    command = [sys.executable, "-X", "importtime", "-m", "vlm_tune", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder with a file of rows and a folder of pictures."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "pictures").mkdir()
    for name in ("a.jpg", "b.png"):
        (folder / "pictures" / name).write_bytes(b"")
    (folder / "rows.jsonl").write_text('{"text": "hello"}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize(("line", "said"), AT_ONCE, ids=[line for line, _ in AT_ONCE])
def test_a_mistake_is_answered_before_torch_is_imported(folder, line, said):
    done = spoken_by_a_process([each.format(folder=folder) for each in line.split()])
    spoken = [each for each in done.stderr.splitlines() if not each.startswith("import time:")]
    imported = {each.rpartition("|")[2].strip() for each in done.stderr.splitlines() if each.startswith("import time:")}
    assert done.returncode == 2
    assert said in "\n".join(spoken)
    assert "vlm_tune.cli" in imported
    assert not imported & set(SLOW)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model=internvl2_2b", "--model=internvl2_2b: keys are written without dashes. Write model=internvl2_2b"),
        ("--resume", "Write resume=last"),
        ("--resume runs/latest", "Write resume=runs/latest"),
        ("--learning-rate 1e-4", "Write stage.lr.llm=1e-4 (and stage.lr.projector"),
        ("--stage.epochs 3", "Write stage.epochs=3"),
        ("inspect --row 3", "Write row=3"),
        ("--nonsense", "See `python -m vlm_tune help train`"),
        ("finetune", "finetune: no such verb. There are: train, "),
        ("finetune", ". Write stage=finetune"),
        ("demo", ". Write model=demo or data=demo"),
        ("my.jsonl", ". Write data.path=my.jsonl"),
        ("train finetune", ". Write stage=finetune"),
        ("check my.jsonl", ". Write data.path=my.jsonl"),
        ("chat runs/latest", ". Write ckpt=runs/latest"),
        ("chat photo.JPG", ". Write image=photo.JPG"),
        ("export my_run", ". Write ckpt=my_run"),
        ("trian", ". Did you mean train?"),
        ("chat ckpt", ". Write ckpt=ckpt"),
        ("chat img=x.jpg", ". Did you mean image?"),
        (
            "stage.lr=1e-4",
            "stage.lr holds keys of its own. Set one of them: stage.lr.vision=VALUE, stage.lr.projector=",
        ),
        ("stage.train=lora", "stage.train holds keys of its own. Set one of them: stage.train.vision=VALUE"),
        ("lr=1e-4", "lr: no such key. Write stage.lr.llm=1e-4"),
        ("learning_rate=1e-4", "learning_rate: no such key. Write stage.lr.llm=1e-4"),
        ("batch_size=4", "Write trainer.global_batch=4"),
        ("epochs=3", "Write stage.epochs=3"),
        ("trainer.max_steps=3", "Write stage.max_steps=3"),
        ("per_device_train_batch_size=2", "Write trainer.micro_batch=2"),
        ("output_dir=out", "Write runs=out"),
        ("model_name_or_path=me/mine", "Write model.path=me/mine"),
        ("dataset=mine.jsonl", "Write data.path=mine.jsonl"),
        ("data=mine.jsonl", "Here, a file of rows is named so: data.path=mine.jsonl"),
        ("model=me/mine", "Here, a model's folder or hub id is named so: model.path=me/mine"),
        (
            "stage=rlhf",
            "Here, only pretraining, supervised fine-tuning and preference tuning (stage=dpo, stage=mpo) are done",
        ),
        (
            "chat lr=3",
            "ckpt, image, tools, base, temperature, top_p, seed, and"
            " keys of the run (data.test=...). Write stage.lr.llm=3",
        ),
        ("configs x=1", "configs has no keys"),
    ],
)
def test_what_is_written_out_of_habit_gets_the_line_that_works(run_cli, line, said):
    done = run_cli(*line.split())
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize("name", sorted(OWN_NAMES))
def test_a_hint_names_keys_that_there_are(name):
    line = OWN_NAMES[name]
    key, sign, value = line.partition(" ")[0].rstrip(",").partition("=")
    if sign:
        assert key in known_keys() or (key in GROUPS and value in (*options(key), "NAME"))
    else:
        assert line.startswith("nothing: ")


@pytest.mark.parametrize("name", sorted(OWN_NAMES))
def test_a_hint_hides_no_key_of_ours(name):
    assert name not in known_keys()


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("asked", ["{} --help", "help {}", "{} -h"])
def test_help_by_verb_shows_its_keys_and_an_example(run_cli, verb, asked):
    done = run_cli(*asked.format(verb).split())
    assert done.code == 0
    assert f"python -m vlm_tune {verb}" in done.out
    assert all(f"\n  {key} " in done.out for key in USAGE[verb].keys)


@pytest.mark.parametrize("asked", [["--version"], ["-V"], ["version"]])
def test_the_version_is_said(run_cli, asked):
    assert run_cli(*asked).out == "vlm_tune 0.1.0\n"


def test_every_verb_has_its_help():
    assert list(USAGE) == list(VERBS)


def test_a_package_that_is_missing_is_named(run_cli, monkeypatch):
    def lacking(arguments):
        raise ModuleNotFoundError("No module named 'lightning'", name="lightning")

    monkeypatch.setitem(VERBS, "train", lacking)
    done = run_cli("stage=finetune")
    assert done.code == 2
    assert done.err.startswith("ConfigError: the package lightning is not installed. Install vlm_tune with all that it")
