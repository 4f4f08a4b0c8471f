"""A run that started from InternVL's original layout leaves in it, in answers and in every weight it did not train."""

import json
import shutil

import pytest
import torch
from official_toys import write_official
from safetensors.torch import load_file

from vlm_tune.model.checkpoint import checkpoints


@pytest.fixture(scope="module")
def finished(toys, tmp_path_factory):
    """Fine-tune a small InternLM2-based model whose last layer of vision is unused; return its folder and the run."""
    from vlm_tune.cli import main

    base = write_official(tmp_path_factory.mktemp("base"), {"model_type": "internlm2", "bias": False}, select_layer=-2)
    runs = tmp_path_factory.mktemp("runs")
    paths = [f"model.path={base}", "model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5"]
    given = toys.arguments("stage=finetune", "stage.max_steps=2", *paths, "model.system=Be brief.", runs=runs)
    assert main(given) == 0
    return base, (runs / "latest").resolve()


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    from vlm_tune.cli import main

    base, run = finished
    out = tmp_path_factory.mktemp("out") / "model"
    assert main(["export", f"ckpt={run}", f"out={out}", "layout=official", "dtype=fp32"]) == 0
    return base, run, out


def test_the_exported_model_answers_as_the_trained_one(exported):
    report = json.loads((exported[2] / "parity.json").read_text())
    assert report["num_prompts"] > 0
    assert report["max_difference"] < 1e-4
    assert report["greedy_agreement"] == 1


def test_the_export_has_the_weights_of_the_folder_that_it_came_from(exported):
    base, run, out = exported
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert checkpoints(run)
    assert changed
    assert all(key.startswith(("mlp1.", "language_model.model.layers.")) for key in changed)


def test_the_export_says_how_it_was_trained_and_names_no_code(exported):
    config = json.loads((exported[2] / "config.json").read_text())
    assert (config["template"], config["system_message"]) == ("internvl2_5", "Be brief.")
    assert (config["select_layer"], config["max_dynamic_patch"], config["force_image_size"]) == (-2, 2, 56)
    assert "auto_map" not in config
    assert not list(exported[2].glob("*.py"))


def test_an_export_may_be_trained_on(exported, toys, tmp_path):
    base, _, out = exported
    moved = shutil.copytree(out, tmp_path / "moved")
    paths = [f"model.path={moved}", "model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5"]
    run = toys.staged("stage=finetune", *paths)
    assert torch.isfinite(run.model.vlm(run.batch([0, 1, 6])))
    assert base.is_dir()
