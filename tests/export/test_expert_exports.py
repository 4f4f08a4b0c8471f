"""What adapters of experts learned, in every layout: merged, or as a folder of peft, with the answers of the run."""

import json

import pytest
import torch
from official_toys import MIXTURE, write_official
from safetensors.torch import load_file

from vlm_tune.cli import main

LAYOUTS = ["hf", "official", "adapter"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("mixture"), MIXTURE)


@pytest.fixture(scope="module")
def run(base, toys, tmp_path_factory):
    """Train attention and experts for some steps at a rate that moves the answers."""
    whole = (f"model.path={base}", "model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5")
    given = ("stage.init_from=none", "stage.evaluate=false", "stage.lr={projector: 0.01, llm: 0.01}")
    experts = ("model.llm.targets=[q_proj,v_proj,gate_up_proj,down_proj]", "stage.lora.dropout=0", "stage.max_steps=3")
    runs = tmp_path_factory.mktemp("runs")
    assert (
        main(["stage=finetune", *toys.arguments(*whole, *given, *experts, "stage.router_loss=0.001", runs=runs)]) == 0
    )
    return (runs / "latest").resolve()


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Write the run in each layout."""
    root = tmp_path_factory.mktemp("exported")
    for layout in LAYOUTS:
        assert main(["export", f"ckpt={run}", f"out={root / layout}", f"layout={layout}"]) == 0
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_mixture_answers_as_the_run(exported, layout):
    report = json.loads((exported / layout / "parity.json").read_text())
    assert report["greedy_agreement"] == 1
    assert report.get("from_the_folder_alone", 1) == 1


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_merged_experts_are_stored_one_by_one_and_have_changed(exported, base, layout):
    before, after = (load_file(folder / "model.safetensors") for folder in (base, exported / layout))
    before, after = ({name: each for name, each in stored.items() if "language" in name} for stored in (before, after))
    assert before.keys() == after.keys()
    changed = {name.partition("layers.")[2][2:] for name in before if not torch.equal(before[name], after[name])}
    assert {f"mlp.experts.{expert}.down_proj.weight" for expert in range(6)} & changed
    assert {f"mlp.experts.{expert}.gate_proj.weight" for expert in range(6)} & changed
    assert "mlp.gate.weight" not in changed


def test_the_adapter_names_the_weights_of_experts(exported):
    settings = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert {name.rpartition("layers.")[2] for name in settings["target_parameters"]} == {
        f"{layer}.mlp.experts.{weight}" for layer in (0, 1) for weight in ("gate_up_proj", "down_proj")
    }
