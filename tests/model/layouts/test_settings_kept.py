"""A configuration is nobody's to change: what a folder decides is joined with it in a new one."""

from copy import deepcopy
from dataclasses import replace

import pytest
from layout_toys import write_layouts
from test_llava_hf import ANYRES, ONE, PAD

from vlm_tune.config.parse import load_config, read_config
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder, joined
from vlm_tune.model.layouts import parts
from vlm_tune.training.run import train

WHOLE = ("model.vision.path=null", "model.llm.path=null")
LLAVA = ("model.template=v1", "model.vision.normalize=openai_clip")
OTHER = ("model.projector.shuffle=4", "model.vision.select_layer=2")  # what each folder says otherwise
KINDS = {  # what is set beside the folder
    "joined": (),
    "parts": (*OTHER, "model.vision.normalize=siglip"),
    "internvl": OTHER,
    "internvl_chat": (*OTHER, "model.template=internvl2_5"),
    "llava": (ONE[0], *LLAVA),
    "llava_next": (ANYRES[0], *LLAVA),
    "llava_original": (PAD[0], *LLAVA),
}


@pytest.fixture(scope="module")
def folders(toys, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    plain = write_layouts(toys, root, "internlm2")
    parts.save(plain.vlm, plain.tokenizer, root / "parts")
    return root


@pytest.fixture(params=KINDS)
def case(request, toys, folders):
    kind = request.param
    whole = () if kind == "joined" else (f"model.path={folders / kind}", *WHOLE)
    config = load_config(toys.arguments("stage=pretrain", *whole, *KINDS[kind]))
    return config, deepcopy(config)


def test_a_loaded_model_leaves_the_configuration_as_it_was(case):
    config, before = case
    build_model(config)
    assert config == before


def test_an_encoder_leaves_the_configuration_as_it_was(case):
    config, before = case
    build_encoder(config)
    assert config == before


def test_a_model_and_its_small_files_give_the_same_joined_configuration(case):
    config, _ = case
    model = build_model(config)
    assert joined(config) == model.config == joined(model.config)
    assert model.config.model.projector == model.vlm.projector.config
    assert model.config.model.vision.normalize == model.vlm.normalization
    assert build_encoder(config)[0].fingerprint() == model.encoder.fingerprint()


@pytest.mark.parametrize("case", ["parts"], indirect=True)  # whose folder decides the most
def test_a_run_leaves_the_configuration_as_it_was_and_writes_the_joined_one(case, tmp_path):
    config = replace(case[0], runs=str(tmp_path / "runs"), stage=replace(case[0].stage, max_steps=1))
    before = deepcopy(config)
    run = train(config)
    assert config == before
    assert read_config(run / "config.yaml").model == joined(config).model
