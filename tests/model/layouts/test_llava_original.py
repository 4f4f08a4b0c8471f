"""LLaVA's own folders: loaded they are the model that transformers converts them to; written and read they stay so."""

import json

import pytest
import torch
from llava_toys import VOCABULARY, save_llava, write_original
from safetensors.torch import load_file, save_file
from test_llava_hf import ANYRES, ONE, configure, our_logits, picture, prompt_of
from toys import TOKENIZER
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.layouts.llava import hf as llava_hf
from vlm_tune.model.layouts.llava import original as llava_original

KINDS = {
    "1.5": (False, "llama", ONE, True),
    "1.5 with the encoder elsewhere": (False, "llama", ONE, False),
    "1.6": (True, "llama", ANYRES, True),
    "1.6 mistral": (True, "mistral", ANYRES, True),
}


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    is_next, text, overrides, has_vision = KINDS[request.param]
    original, hub = write_original(tmp_path_factory.mktemp("llava"), is_next, text, has_vision)
    config = configure(original, overrides)
    return original, hub, config, build_model(config), overrides


def test_the_logits_are_those_of_the_folder_that_transformers_reads(case):
    _, hub, config, model, overrides = case
    other_config = configure(hub, overrides)
    other = build_model(other_config)
    for size in ((100, 70), (40, 200)):
        ours, theirs = (
            prompt_of(each, one.encoder, picture(*size)) for each, one in ((config, model), (other_config, other))
        )
        assert ours.example.input_ids.tolist() == theirs.example.input_ids.tolist()
        rows = len(AutoTokenizer.from_pretrained(TOKENIZER))
        found, wanted = our_logits(model, ours), our_logits(other, theirs)
        torch.testing.assert_close(found[:, :rows], wanted[:, :rows], atol=1e-5, rtol=1e-5)


def test_a_round_trip_changes_no_weight(case, tmp_path):
    original, _, config, model, _ = case
    llava_original.save(model.vlm, model.tokenizer, config.model, tmp_path)
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() <= after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert all("vision_tower" in name for name in after.keys() - before.keys())
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path))
    assert one == {name: value for name, value in other.items() if name in one}


def test_the_original_leaves_as_a_folder_of_transformers(case, tmp_path):
    _, hub, config, model, _ = case
    llava_hf.save(model.vlm, config.model.tiles, tmp_path)
    one, other = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (hub, tmp_path))
    assert one.keys() == other.keys()
    rows = len(AutoTokenizer.from_pretrained(TOKENIZER))
    assert all(torch.equal(one[name][:rows], other[name][:rows]) for name in one if len(one[name]) == VOCABULARY)
    assert all(torch.equal(one[name], other[name]) for name in one if len(one[name]) != VOCABULARY)


def test_a_folder_of_transformers_leaves_as_an_original(tmp_path):
    save_llava(tmp_path / "hub", True)
    config = configure(tmp_path / "hub", ANYRES)
    model = build_model(config)
    llava_original.save(model.vlm, model.tokenizer, config.model, tmp_path / "out")
    config_again = configure(tmp_path / "out", ANYRES)
    again = build_model(config_again)
    prompt = prompt_of(config, model.encoder, picture())
    assert (
        prompt_of(config_again, again.encoder, picture()).example.input_ids.tolist()
        == prompt.example.input_ids.tolist()
    )
    torch.testing.assert_close(our_logits(again, prompt), our_logits(model, prompt), atol=1e-5, rtol=1e-5)
    pinpoints = json.loads((tmp_path / "out" / "config.json").read_text())["image_grid_pinpoints"]
    assert sorted(pinpoints) == [[56, 112], [56, 168], [112, 56], [112, 112], [168, 56]]


def test_counting_needs_no_weights(case, tmp_path):
    original, _, config, model, _ = case
    hidden = (original / "model.safetensors").rename(tmp_path / "hidden")
    try:
        encoder, _ = build_encoder(config)
    finally:
        hidden.rename(original / "model.safetensors")
    assert encoder.settings == model.encoder.settings
    assert encoder.context_id == model.encoder.context_id == model.vlm.context_id


def test_bin_files_are_read_as_tensors_only_and_say_so(tmp_path):
    original, _ = write_original(tmp_path, as_bin=True)
    model = build_model(configure(original, ONE))
    assert "read as tensors only" in " ".join(model.notes)
    weights = torch.load(original / "pytorch_model.bin", weights_only=True)
    assert torch.equal(model.vlm.projector.linear_2.weight, weights["model.mm_projector.2.weight"])


def test_the_encoder_among_the_weights_counts(tmp_path):
    original, _ = write_original(tmp_path)
    weights = load_file(original / "model.safetensors")
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    weights[name] = weights[name] + 1
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    model = build_model(configure(original, ONE))
    assert torch.equal(model.vlm.vision.tower.encoder.layers[0].mlp.fc1.weight, weights[name])


def test_rotary_frequencies_of_older_files_are_no_fault(tmp_path):
    original, _ = write_original(tmp_path)
    weights = load_file(original / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    assert build_model(configure(original, ONE)).vlm.context_id == len(AutoTokenizer.from_pretrained(TOKENIZER))


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    original, _ = write_original(tmp_path)
    weights = load_file(original / "model.safetensors")
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("model.mm_projector.2.weight")
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mm_projector\.2\.weight: missing\n.*layers\.9.*: unexpected"):
        build_model(configure(original, ONE))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type=mlp3x_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=true"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio=anyres_max_9"),
        ({"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}, r"set model\.tiles\.rule=anyres"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "architectures=LlavaMptForCausalLM"),
        ({"mm_vision_tower": "/nowhere/clip"}, "mm_vision_tower=/nowhere/clip: no such folder"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path, changes, reason):
    original, _ = write_original(tmp_path, **changes)
    with pytest.raises(ConfigError, match=reason):
        build_model(configure(original, ONE))


def test_another_encoder_than_clip_is_not_written(tmp_path):
    save_llava(tmp_path / "hub", vision="siglip_vision_model")
    config = configure(tmp_path / "hub", ONE)
    model = build_model(config)
    with pytest.raises(ConfigError, match="does not hold this model: it has an encoder that is not CLIP"):
        llava_original.save(model.vlm, model.tokenizer, config.model, tmp_path / "out")


def test_a_quantized_base_is_packed(tmp_path):
    original, _ = write_original(tmp_path)
    model = build_model(configure(original, ONE, "stage.quantize=nf4", "stage.train.llm=lora"))
    assert type(model.vlm.llm.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
