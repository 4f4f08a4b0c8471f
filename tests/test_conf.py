"""Every configuration that the project ships composes and parses; every fault of one names the key and a remedy."""

import ast
import re
from dataclasses import is_dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import get_type_hints

import pytest

from vlm_tune.config.checks import find_problems
from vlm_tune.config.parse import load_config, options, read_config, write_config
from vlm_tune.config.schema import Config, Precision, Quantize, Strategy, Train
from vlm_tune.errors import ConfigError

STAGES, MODELS, DATA = options("stage"), options("model"), options("data")
PACKAGE = Path(__file__).parents[1] / "vlm_tune"
CANONICAL = {
    "stage": {"pretrain", "finetune", "finetune_full", "qlora", "sft", "dpo", "mpo"},
    "model": {"internvl2_2b", "internvl2_5_8b", "internvl3_2b", "llava_1_5_7b", "llava_next_7b"}
    | {"demo", "demo_cnn", "tiny"},
}


def compose(*overrides: str) -> Config:
    return load_config(list(overrides))


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides))
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- what is shipped


def check_combination(stage: str, model: str, data: str) -> None:
    path = ["data.path=x.jsonl"] if data == "own" else []
    config = compose(f"stage={stage}", f"model={model}", f"data={data}", *path)
    assert (config.stage.name, config.model.name) == (stage, model)
    assert config.data.path == "x.jsonl" if path else config.data.path.startswith("recipe:")


@pytest.mark.parametrize(("stage", "model"), product(STAGES, MODELS))
def test_every_stage_composes_with_every_model_and_every_data(stage, model):
    # Data moves on with stage and model, so that all pairs of two groups occur; no file depends on all three.
    check_combination(stage, model, DATA[(STAGES.index(stage) + MODELS.index(model)) % len(DATA)])


def test_the_combinations_above_hold_all_pairs():
    chosen = {(i, j, (i + j) % len(DATA)) for i, j in product(range(len(STAGES)), range(len(MODELS)))}
    assert {(j, k) for _, j, k in chosen} == set(product(range(len(MODELS)), range(len(DATA))))
    assert {(i, k) for i, _, k in chosen} == set(product(range(len(STAGES)), range(len(DATA))))


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_every_combination_of_the_three_composes(data):
    for stage, model in product(STAGES, MODELS):
        check_combination(stage, model, data)


@pytest.mark.parametrize("group", sorted(CANONICAL))
def test_the_canonical_names_are_there(group):
    assert set(options(group)) >= CANONICAL[group]


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name):
    compose(f"experiment={name}")


@pytest.mark.parametrize("group", ["trainer", "strategy", "logger"])
def test_every_other_choice_composes(group):
    for name in options(group):
        compose(f"{group}={name}")


@pytest.mark.parametrize("name", options("tuned"))
def test_a_tuned_file_is_of_a_stage_and_model_that_exist(name):
    assert name in {f"{model}_{stage}" for model, stage in product(MODELS, STAGES)}


@pytest.mark.parametrize("name", options("tuned"))
def test_a_tuned_file_is_in_force(name):
    model, stage = next((model, stage) for model, stage in product(MODELS, STAGES) if name == f"{model}_{stage}")
    other = compose(f"stage={stage}", f"model={model}", "~tuned")
    assert compose(f"stage={stage}", f"model={model}") != other


def test_the_command_line_wins_over_a_tuned_file():
    config = compose("stage=finetune", "model=demo", "stage.lr.llm=3e-7", "stage.lora.rank=5")
    assert (config.stage.lr.llm, config.stage.lora.rank) == (3e-7, 5)


def test_a_stage_brings_its_data_and_the_command_line_wins():
    assert compose("stage=sft").data.path == "recipe:chat_text/train.jsonl"
    assert compose("stage=sft", "data=easy_vqa").data.path == "recipe:easy_vqa/train.jsonl"


def test_the_default_is_the_fine_tuning_of_the_demo():
    config = compose()
    assert (config.stage.name, config.model.name, config.data.path) == (
        "finetune",
        "demo",
        "recipe:demo/finetune_train.jsonl",
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_of_ones_own_is_not_tested_on_the_demo(stage):
    assert load_config([f"stage={stage}", "data.path=mine.jsonl"]).data.test == "auto"


def test_a_configuration_survives_its_own_file(tmp_path):
    config = compose("stage=qlora", "model=internvl2_2b", "resume_allow=[stage.lr.llm]")
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_overrides_are_laid_over_a_written_configuration(tmp_path):
    write_config(compose(), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", ["data.test=mine.jsonl"]).data.test == "mine.jsonl"


@pytest.mark.parametrize(
    ("written", "meant"), [("true", True), ("false", False), ("mlp", "mlp"), ("offload", "offload")]
)
def test_a_way_of_checkpointing_is_a_switch_or_a_name(tmp_path, written, meant):
    config = compose(f"stage.gradient_checkpointing.llm={written}")
    assert config.stage.gradient_checkpointing.llm == meant
    assert compose(f"stage.gradient_checkpointing={{llm: {written}}}") == config
    path = tmp_path / "config.yaml"
    write_config(config, path)
    assert f"    llm: {written}\n" in path.read_text(encoding="utf-8")  # as runs of before wrote it
    assert read_config(path) == config
    assert read_config(path, ["stage.gradient_checkpointing.llm=true"]).stage.gradient_checkpointing.llm is True


# ----------------------------------------------------------------------------------------------------------- its faults


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stage.lora.rnak=8", "stage.lora.rnak: no such key. Did you mean stage.lora.rank?"),
        ("trainer.global_batchs=8", "trainer.global_batchs: no such key. Did you mean trainer.global_batch?"),
        ("+stage.lora.rnak=8", "stage.lora.rnak: no such key. Did you mean stage.lora.rank?"),
        ("zzzzzz=1", "zzzzzz: no such key. docs/configuration.md lists all keys"),
        ("stage=finetun", "stage=finetun: no such stage. There are: dpo, finetune, "),
        ("model=internvl9", "model=internvl9: no such model. There are: demo, "),
        ("stage.lora.rank=many", "stage.lora.rank: Value 'many' of type 'str' could not be converted to Integer"),
        ("stage.train.llm=half", "stage.train.llm: Invalid value 'half', expected one of [frozen, lora, full]"),
        ("data.on_bad_sample=ignore", "data.on_bad_sample: Invalid value 'ignore', expected one of [error, skip]"),
        ("data=own", "data.path is not set. Give it on the command line: data.path=VALUE"),
        ("stage.lora.rank", "stage.lora.rank: not of the form key=value"),
        ("data.path=a,b=c", "data.path=a,b=c: not of the form key=value. Quote a value with special characters"),
    ],
)
def test_a_fault_of_the_command_line_names_the_key_and_a_way_out(override, said):
    message = fault(override)
    assert said in message
    assert "HYDRA_FULL_ERROR" not in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stage.train={vision: frozen, projector: frozen, llm: frozen}",
            r"stage finetune trains nothing: set vision, ",
        ),
        ("stage.lora.rank=0", r"stage\.train\.llm=lora but stage\.lora\.rank=0: set a rank of 1 or more, or "),
        ("stage.lr.projector=0", r"stage\.lr\.projector=0\.0 but the part is trained: set a rate above 0"),
        ("stage.train.projector=lora", r"stage\.train\.projector=lora: the projector is small and new; set it to full"),
        ("stage.warmup=1.5", r"stage\.warmup=1\.5 is out of range: choose a value from 0 to 1"),
        ("stage.lora.dropout=1", r"stage\.lora\.dropout=1\.0 is out of range"),
        ("data.augment.crop=0", r"data\.augment\.crop=0\.0 is out of range"),
        ("trainer.global_batch=0", r"trainer\.global_batch=0: set it to 1 or more"),
        ("model.tiles.min=9", r"model\.tiles\.min=9 is above model\.tiles\.max=\d+: lower it"),
        ("data.workers=-1", r"data\.workers=-1: set 0 or more"),
        ("stage.pack_tiles=2 model.tiles.max=12", r"model\.tiles\.max=12 makes up to 13 tiles of one picture, "),
        ("trainer.global_batch=6 trainer.devices=4", r"trainer\.global_batch=6 does not divide by .*=4: choose a mult"),
        (
            "stage=qlora strategy=fsdp",
            r"strategy=fsdp splits weights, stage\.quantize=nf4 packs them: use strategy=ddp",
        ),
        ("stage=qlora stage.train.llm=full", r"stage\.quantize=nf4 stores a frozen base but stage\.train\.llm=full"),
        ("trainer.precision=fp16 trainer.accelerator=cpu", r"trainer\.precision=fp16 needs a GPU: set .*=bf16 or fp32"),
        ("stage.gradient_checkpointing.llm=all", r"llm=all: there are false, mlp, true and offload"),
        ("stage.gradient_checkpointing.llm=mlp strategy=zero3", r"llm=mlp, but strategy=zero3 empties weights after"),
        (
            "stage.gradient_checkpointing.llm=offload trainer.accelerator=cpu",
            r"llm=offload is for a GPU's memory, but trainer\.accelerator=cpu: set true, which does the same there",
        ),
        ("stage.epochs=0", r"stage\.epochs=0\.0 and stage\.max_steps=-1: set one of them above 0"),
    ],
)
def test_a_contradiction_is_an_error_with_a_way_out(override, said):
    overrides = [override] if override.startswith("stage.train={") else override.split()
    assert re.search(said, fault("model=tiny", *overrides))


def test_all_contradictions_are_listed_at_once():
    lines = fault("stage.lora.rank=0", "trainer.keep=0", "stage.warmup=2").splitlines()
    assert lines[0] == "3 problems"
    assert [line.split("=")[0].strip() for line in lines[1:]] == ["stage.train.llm", "stage.warmup", "trainer.keep"]


def test_the_defaults_of_the_schema_hold_no_contradiction():
    assert find_problems(Config()) == []


def test_a_broken_yaml_file_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: [1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))}/config\.yaml: "):
        read_config(tmp_path / "config.yaml")


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config\.yaml: no such file\. Name a run folder, for example ckpt=runs/latest"
    ):
        read_config(tmp_path / "config.yaml")


# ---------------------------------------------------------------------------------------------------------- the schema


def schema_fields(owner: type, prefix: str = "") -> list[str]:
    found = []
    for name, kind in get_type_hints(owner).items():
        found += schema_fields(kind, f"{prefix}{name}.") if is_dataclass(kind) else [f"{prefix}{name}"]
    return found


@cache
def names_read() -> set[str]:
    """Collect the attributes that the package reads anywhere but in the schema itself."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py") if path.name != "schema.py"]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("key", schema_fields(Config))
def test_every_knob_is_read_somewhere(key):
    name = key.rpartition(".")[2]
    by_part = {"vision", "projector", "llm"}  # read by getattr, part by part
    assert name in names_read() | by_part, f"{key} has no effect: nothing reads it"


@pytest.mark.parametrize("closed", [Train, Quantize, Precision, Strategy], ids=lambda closed: closed.__name__)
def test_a_choice_is_written_as_it_is_named(closed):
    assert all(choice.name == choice.value for choice in closed)
