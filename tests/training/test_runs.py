"""What a run starts from and what it leaves: the earlier stage's weights, small checkpoints, whole reports."""

import json
import shutil

import pytest
import torch

from vlm_tune.config.parse import load_config, write_config
from vlm_tune.config.schema import Precision
from vlm_tune.errors import CheckpointError
from vlm_tune.model import trained
from vlm_tune.model.checkpoint import CHECKPOINTS, checkpoints, read_checkpoint, start_of, trained_weights
from vlm_tune.model.parts.stage import trained_parameters
from vlm_tune.model.trained import open_trained
from vlm_tune.training.resume import initial_checkpoint
from vlm_tune.training.run import train

SHORT = ("stage.max_steps=3", "stage.evaluate=false", "trainer.save_every=1", "trainer.keep=2", "trainer.num_chats=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_stage(toys, runs):
    def run(*more):
        return train(load_config(toys.arguments(*SHORT, *more, runs=runs)))

    return run


@pytest.fixture(scope="module")
def pretrained(run_stage):
    return run_stage("stage=pretrain", "stage.lr.projector=0.01")


@pytest.fixture(scope="module")
def finetuned(run_stage, pretrained):
    return run_stage("stage=finetune")


def state_of(run):
    return read_checkpoint(checkpoints(run)[-1])


def test_a_fine_tuning_starts_from_the_newest_pretraining(run_stage, pretrained):
    newer = run_stage("stage=pretrain", "stage.lr.projector=0.02")
    started = run_stage("stage=finetune")
    assert start_of(checkpoints(started)[-1]) == checkpoints(newer)[-1]


def test_it_starts_with_the_pretrained_weights(toys, runs, pretrained):
    # a rate of nothing leaves them as they were when the first step began
    still = ["stage.lr={projector: 1e-30, llm: 1e-30}", f"stage.init_from='{pretrained}'"]
    run = train(load_config(toys.arguments("stage=finetune", *SHORT, *still, runs=runs)))
    found, wanted = trained_weights(checkpoints(run)[-1]), trained_weights(checkpoints(pretrained)[-1])
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert wanted


def test_a_start_without_pretraining_is_an_error_that_names_the_command(toys, tmp_path):
    said = r"holds no pretrain run of model=tiny\. Run `python -m vlm_tune stage=pretrain model=tiny` first, name one"
    with pytest.raises(CheckpointError, match=said):
        train(load_config(toys.arguments("stage=finetune", runs=tmp_path)))
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves no folder"


def test_a_start_of_another_shape_is_refused(toys, tmp_path, pretrained):
    other = ["model.projector.shuffle=4", f"stage.init_from='{pretrained}'"]
    with pytest.raises(CheckpointError, match=r"it does not fit this model and stage\n  projector\."):
        train(load_config(toys.arguments("stage=finetune", *other, runs=tmp_path)))


@pytest.mark.parametrize("is_there", [True, False], ids=["a run", "no run"])
def test_a_whole_checkpoint_goes_on_from_its_earlier_run_if_there_is_one(finetuned, tmp_path, is_there):
    if is_there:
        shutil.copytree(finetuned, tmp_path / "before")
        write_config(load_config(["model=internvl2_2b", "stage=finetune"]), tmp_path / "before" / "config.yaml")
    start = initial_checkpoint(load_config(["model=internvl2_2b", "stage=mpo", f"runs='{tmp_path}'"]))
    assert start == (checkpoints(tmp_path / "before")[-1] if is_there else None)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(toys, stage, pretrained, finetuned):
    run = {"pretrain": pretrained, "finetune": finetuned}[stage]
    trained = dict(trained_parameters(toys.staged(f"stage={stage}").model.vlm))
    saved = state_of(run)["state_dict"]
    assert saved.keys() == {f"vlm.{name}" for name in trained}
    assert all(saved[f"vlm.{name}"].shape == weight.shape for name, weight in trained.items())


def test_a_checkpoint_is_no_larger_than_its_weights_and_their_moments(pretrained):
    weights = sum(weight.numel() for weight in trained_weights(checkpoints(pretrained)[-1]).values())
    assert checkpoints(pretrained)[-1].stat().st_size < 3 * 4 * weights + 40_000


@pytest.mark.parametrize("name", ["step_00000003.ckpt", "best.ckpt"])
def test_a_checkpoint_loads_as_weights_only(toys, runs, name):
    run = train(load_config(toys.arguments("stage=pretrain", *SHORT, "trainer.val_every=2", runs=runs)))
    assert torch.load(run / CHECKPOINTS / name, weights_only=True)["global_step"] in (2, 3)


def test_the_newest_checkpoints_are_kept(finetuned):
    assert [path.name for path in checkpoints(finetuned)] == ["step_00000002.ckpt", "step_00000003.ckpt"]


def test_nothing_half_written_is_left(finetuned):
    assert not [path for path in finetuned.rglob("*") if "partial" in path.name]


def test_frozen_parts_of_an_earlier_stage_come_from_its_checkpoint(run_stage, pretrained):
    # text alone is trained after the projector: the run's own checkpoint does not hold the projector
    run = run_stage("stage=sft", "data=own", f"stage.init_from='{pretrained}'")
    assert not [name for name in trained_weights(checkpoints(run)[-1]) if name.startswith("projector")]
    model, _ = open_trained(str(run), [])
    wanted = trained_weights(checkpoints(pretrained)[-1])
    found = dict(model.vlm.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_an_opened_model_answers_and_does_not_train(finetuned):
    model, _ = open_trained(str(finetuned), [])
    assert not list(trained_parameters(model.vlm))
    assert not any(module.training for module in model.vlm.modules())


@pytest.mark.parametrize(("precision", "where"), [(None, "meta"), (Precision.fp32, "cpu")], ids=["asked", "exported"])
def test_a_model_answers_where_it_would_train_and_is_exported_from_main_memory(
    finetuned, monkeypatch, precision, where
):
    monkeypatch.setattr(trained, "device_of", lambda config: torch.device("meta"))  # in the place of a GPU
    model, _ = open_trained(str(finetuned), [], precision)
    assert {each.device.type for each in (*model.vlm.parameters(), *model.vlm.buffers())} == {where}


def test_a_run_leaves_what_is_needed_to_read_and_repeat_it(finetuned):
    files = {path.name for path in finetuned.iterdir()}
    assert files >= {"config.yaml", "environment.json", "metrics.csv", "report.json", "report.html", "starts_from.txt"}


def test_bad_rows_are_left_out_when_asked_and_listed_with_their_reasons(toys, runs, tmp_path):
    rows = (toys.data / "train.jsonl").read_text(encoding="utf-8")
    bad = json.dumps(
        {"id": "lost", "image": "nowhere.png", "conversations": json.loads(rows.splitlines()[1])["conversations"]}
    )
    (tmp_path / "train.jsonl").write_text(rows + bad + "\n", encoding="utf-8")
    own = [
        f"data.path={tmp_path}/train.jsonl",
        f"data.image.root={toys.data}",
        "data.on_bad_sample=skip",
        "data.val=none",
    ]
    run = train(load_config(toys.arguments("stage=pretrain", *SHORT, *own, runs=runs)))
    (entry,) = map(json.loads, (run / "quarantine.jsonl").read_text(encoding="utf-8").splitlines())
    assert (entry["where"], entry["id"]) == ("train.jsonl:27", "lost")
    assert "nowhere.png" in entry["reason"]
    assert json.loads((run / "report.json").read_text(encoding="utf-8"))["data"]["skipped"] == 1


def test_text_alone_is_the_same_run_without_pictures(toys, runs, tmp_path):
    rows = [
        line for line in (toys.data / "train.jsonl").read_text(encoding="utf-8").splitlines() if "image" not in line
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    own = ["stage=sft", f"data.path={tmp_path}/train.jsonl", "data.val=none", "stage.lr.llm=0.02", "stage.max_steps=12"]
    run = train(load_config(toys.arguments(*SHORT, *own, runs=runs)))
    curve = json.loads((run / "report.json").read_text(encoding="utf-8"))["loss_curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
