"""A short run validates, saves and is found again; a longer one goes on from it; a failed one takes no name."""

import csv
import json

import pytest
import torch

from vlm_tune.config.parse import describe_sources, load_config
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, read_checkpoint
from vlm_tune.training.intervals import describe, every
from vlm_tune.training.run import train

SHORT = ("stage=finetune", "stage.init_from=none", "stage.max_steps=3", "stage.evaluate=false", "trainer.num_chats=0")


def validated_steps(run):
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]]


@pytest.fixture(scope="module")
def short(toys, tmp_path_factory):
    """Train 3 steps of a run whose first validation and checkpoint would come at step 50."""
    runs = tmp_path_factory.mktemp("runs")
    return train(load_config(toys.arguments(*SHORT, "trainer.val_every=50", "trainer.save_every=50", runs=runs)))


def test_a_run_shorter_than_val_every_is_validated_at_its_end(short):
    assert validated_steps(short) == [3]
    assert read_checkpoint(short / CHECKPOINTS / "best.ckpt")["global_step"] == 3
    assert json.loads((short / "report.json").read_text(encoding="utf-8"))["best"]["step"] == 3


def test_the_last_step_is_validated_once(toys, tmp_path):
    run = train(load_config(toys.arguments(*SHORT, "trainer.val_every=3", runs=tmp_path)))
    assert validated_steps(run) == [3]


def test_a_run_without_validation_rows_ends_well(toys, tmp_path):
    run = train(load_config(toys.arguments(*SHORT, "data.val=none", runs=tmp_path)))
    assert validated_steps(run) == []
    assert [path.name for path in checkpoints(run)][-1] == "step_00000003.ckpt"


@pytest.mark.parametrize(
    ("given", "max_steps", "steps"),
    [(None, 27, 6), (None, 1, 1), (None, 4, 1), (None, 1000, 200), (None, 99999, 200), (50, 27, 50), (0, 27, 0)],
)
def test_an_interval_left_open_is_a_fifth_of_the_run(given, max_steps, steps):
    assert every(given, max_steps) == steps


@pytest.mark.parametrize("model", ["demo", "demo_cnn", "tiny"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "sft"])
def test_no_file_sets_an_interval_that_does_not_know_the_rows(model, stage):
    trainer = load_config([f"stage={stage}", f"model={model}", "data.path=mine.jsonl"]).trainer
    assert trainer.val_every is None
    assert trainer.save_every is None
    assert trainer.chat_every in (None, 0)


def test_the_start_of_a_run_says_what_follows_from_its_length():
    text = describe(load_config(["data.path=mine.jsonl", "trainer.save_every=9"]).trainer, 27)
    assert text.startswith(
        "27 optimizer steps: validation every 6 and at the end, a checkpoint every 9, sample answers"
    )
    assert "from the length of the run: trainer.val_every=6, trainer.chat_every=6" in text


def test_the_start_of_a_run_says_which_settings_come_from_where():
    given = ["data.path=mine.jsonl", "stage.lr.llm=3e-5"]
    line, tuned, rest = describe_sources(given, load_config(given)).splitlines()
    assert line == "settings of the command line: data.path=mine.jsonl stage.lr.llm=3e-5"
    assert tuned.startswith("settings of conf/tuned/demo_finetune.yaml (~tuned leaves them out): stage.lr.projector=")
    assert "stage.lr.llm" not in tuned
    assert rest == "all others: conf/stage/finetune.yaml, conf/model/demo.yaml, and defaults"


@pytest.mark.parametrize("given", [["~tuned"], ["model=tiny"]])
def test_settings_that_are_not_taken_are_not_named(given):
    assert "conf/tuned" not in describe_sources(given, load_config(given))


def test_a_run_of_an_experiment_names_its_file_and_none_that_is_not_there():
    given = ["experiment=grounding"]
    *_, rest = describe_sources(given, load_config(given)).splitlines()
    assert rest == "all others: conf/experiment/grounding.yaml, conf/model/demo.yaml, and defaults"


def test_a_choice_of_ones_own_is_named_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/stage").mkdir(parents=True)
    (tmp_path / "conf/stage/mine.yaml").write_text("# @package _global_\nstage: {name: mine, init_from: none}\n")
    given = ["stage=mine"]
    *_, rest = describe_sources(given, load_config(given)).splitlines()
    assert rest == "all others: conf/stage/mine.yaml, conf/model/demo.yaml, and defaults"


# -------------------------------------------------------------------------------------------------- runs/latest


def test_latest_is_the_newest_run_with_a_checkpoint(toys, short, run_cli):
    latest = short.parent / "latest"
    assert latest.resolve() == short
    done = run_cli(*toys.arguments(*SHORT, "stage.lr.projector=1e38", "stage.warmup=0", runs=short.parent))
    assert done.code == 2
    assert len([path for path in short.parent.iterdir() if path.is_dir() and not path.is_symlink()]) == 2
    assert latest.resolve() == short


def test_a_disk_without_links_stops_no_run(toys, tmp_path, capsys):
    (tmp_path / "latest").mkdir()  # a folder cannot be replaced by a link
    run = train(load_config(toys.arguments(*SHORT, runs=tmp_path)))
    assert (run / "report.json").is_file()
    assert "cannot name this run" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- a longer run


@pytest.fixture
def resumed(toys, short, tmp_path, capsys):
    """Give a function that goes on with a copy of the short run."""
    import shutil

    shutil.copytree(short, tmp_path / short.name)

    def resume(*more):
        given = {each.partition("=")[0]: each for each in (*SHORT, *more)}.values()
        run = train(load_config(toys.arguments(*given, "resume=last", runs=tmp_path)))
        return run, capsys.readouterr().out

    return resume


def test_max_steps_may_be_raised(resumed):
    run, said = resumed("stage.max_steps=7")
    assert read_checkpoint(checkpoints(run)[-1])["global_step"] == 7
    assert "stage.max_steps: 3 then, 7 now. From here on the learning rate follows the longer run's schedule" in said


def test_a_longer_run_has_the_rates_of_one_that_was_planned_so(toys, resumed, tmp_path):
    run, _ = resumed("stage.max_steps=7", "trainer.val_every=2")
    given = {each.partition("=")[0]: each for each in (*SHORT, "stage.max_steps=7")}.values()
    planned = train(load_config(toys.arguments(*given, runs=tmp_path / "planned")))
    ours, theirs = (json.loads((each / "report.json").read_text())["loss_curve"] for each in (run, planned))
    assert [point["step"] for point in ours] == [point["step"] for point in theirs] == list(range(1, 8))
    assert [point["lr"] for point in ours[4:]] == [point["lr"] for point in theirs[4:]]


@pytest.mark.parametrize("change", ["trainer.save_every=1", "trainer.val_every=1"])
def test_an_interval_may_change_on_resume(resumed, short, change):
    run, _ = resumed(change)
    weights = [read_checkpoint(checkpoints(each)[-1])["state_dict"] for each in (run, short)]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


@pytest.mark.parametrize("change", ["stage.max_steps=2", "trainer.max_val_rows=3", "stage.warmup=0.5"])
def test_what_changes_the_run_stays_refused(resumed, change):
    with pytest.raises(Exception, match=r"resume=last: 1 setting differs"):
        resumed(change)
