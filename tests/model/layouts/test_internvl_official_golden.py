"""InternVL's original checkpoints give what InternVLChatModel gives, leave as they came, and load in transformers.

Recordings: tests/golden or VLM_TUNE_GOLDEN.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from vlm_tune.config.schema import Config, ModelConfig, Precision, Quantize, TilesConfig, TrainerConfig
from vlm_tune.data.batch import collate
from vlm_tune.data.example import Example
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.tiles import count_tiles, make_tiles, normalize
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import build_model
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl import official as internvl_official
from vlm_tune.model.layouts.internvl.official_config import read_config
from vlm_tune.model.layouts.internvl.processor import save_processor

GOLDEN = Path(os.environ.get("VLM_TUNE_GOLDEN", Path(__file__).parents[2] / "golden")) / "official_internvl"
NAMES = sorted(path.name for path in GOLDEN.glob("*") if path.is_dir())
V2 = [name for name in NAMES if not name.endswith("_v1")]


def settings_of(folder: Path) -> ModelConfig:
    config = read_config(folder)
    tiles = TilesConfig(size=config["force_image_size"], max=config["max_dynamic_patch"])
    return ModelConfig(path=str(folder), template=config["template"], tiles=tiles)


def load(folder: Path):
    torch.manual_seed(0)
    return internvl_official.load(folder, settings_of(folder), torch.float32, Quantize.none).vlm.eval()


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A checkpoint: its folder, our model, the recorded tensors and numbers."""
    folder = GOLDEN / request.param
    numbers = json.loads((folder / "expected.json").read_text())
    return folder, load(folder), load_file(folder / "expected.safetensors"), numbers


def examples_of(expected):
    for row, (ids, mask, labels) in enumerate(
        zip(expected["input_ids"], expected["attention_mask"], expected["labels"], strict=True)
    ):
        kept = mask.bool()
        yield Example(str(row), "golden", ids[kept].int().numpy(), labels[kept].int().numpy())


def batch_of(expected, vlm, packing: bool):
    examples = list(examples_of(expected))
    total = sum(example.num_supervised for example in examples)
    batch = collate(examples, [1 / total] * len(examples), packing)
    shown = expected["pixel_values"][expected["image_flags"].flatten() == 1]
    batch.features = vlm.vision(shown)
    return batch


def test_golden_image_features(case):
    _, vlm, expected, _ = case
    with torch.no_grad():
        features = vlm.project(vlm.vision(expected["pixel_values"]))
    torch.testing.assert_close(features, expected["image_features"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_golden_output_of_the_whole_encoder(name, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    config = read_config(folder) | {"select_layer": -1}  # so that no layer is cut off
    (folder / "config.json").write_text(json.dumps(config))
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output = load(folder).vision.tower(expected["pixel_values"]).last_hidden_state
    torch.testing.assert_close(output, expected["vision_last_hidden_state"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_golden_logits(case, packing):
    _, vlm, expected, _ = case
    kept = expected["attention_mask"].bool()
    with torch.no_grad():
        batch = batch_of(expected, vlm, packing)
        hidden = hidden_states(vlm, batch)
        logits = vlm.llm.get_output_embeddings()(hidden)
    logits = logits[0] if packing else logits[kept]
    torch.testing.assert_close(logits, expected["logits"][kept], atol=1e-5, rtol=0)


def hidden_states(vlm, batch):
    found = []
    hook = vlm.llm.get_decoder().register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
    vlm(batch)
    hook.remove()
    return found[0]


def test_golden_loss(case):
    _, vlm, expected, numbers = case
    with torch.no_grad():
        loss = vlm(batch_of(expected, vlm, packing=True))
    assert float(loss) == pytest.approx(numbers["loss"], abs=1e-5)


def test_golden_gradient_norms(case):
    folder, vlm, expected, numbers = case
    vlm.zero_grad()
    vlm(batch_of(expected, vlm, packing=True)).backward()
    gradients = {name: parameter.grad for name, parameter in vlm.named_parameters()}
    table = internvl_official.original_entries(vlm, read_config(folder))
    norms = {entry.stored: float(entry.join([gradients[name] for name in entry.ours]).norm()) for entry in table}
    assert norms.keys() == numbers["grad_norms"].keys()
    assert norms == pytest.approx(numbers["grad_norms"], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shard", ["1GB", "1MB"])
def test_golden_round_trip_is_bit_equal(name, shard, tmp_path):
    folder, model = GOLDEN / name, settings_of(GOLDEN / name)
    loaded = internvl_official.load(folder, model, torch.float32, Quantize.none)
    template = encoder_of(folder).template
    internvl_official.save(loaded.vlm, template, model, tmp_path, shard=shard)
    before = load_file(folder / "model.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    after = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert len(files) == 1 if shard == "1GB" else len(files) >= 3
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    wanted = {key: value for key, value in read_config(folder).items() if key != "auto_map"}
    assert wanted.items() <= read_config(tmp_path).items()


def encoder_of(folder):
    return build_model(whole(folder)).encoder


def whole(folder, **model):
    trainer = TrainerConfig(precision=Precision.fp32)
    return Config(model=replace(settings_of(folder), **model), trainer=trainer)


@pytest.mark.parametrize("shard", ["1GB", "1MB"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_written_folder_loads_alike(name, shard, tmp_path):
    folder, model = GOLDEN / name, settings_of(GOLDEN / name)
    loaded = internvl_official.load(folder, model, torch.float32, Quantize.none)
    internvl_official.save(loaded.vlm, encoder_of(folder).template, model, tmp_path, shard=shard)
    loaded.tokenizer.save_pretrained(tmp_path)
    first, second = dict(loaded.vlm.named_parameters()), dict(load(tmp_path).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("asked", [True, False])
def test_golden_code_is_named_only_when_asked(asked, tmp_path):
    folder, model = GOLDEN / V2[0], settings_of(GOLDEN / V2[0])
    loaded = internvl_official.load(folder, model, torch.float32, Quantize.none)
    internvl_official.save(loaded.vlm, encoder_of(folder).template, model, tmp_path, auto_map=asked)
    assert ("auto_map" in read_config(tmp_path)) == asked
    assert not list(tmp_path.glob("*.py"))


# ------------------------------------------------------------------------------------------------- to transformers' own


@pytest.mark.parametrize("name", V2)
def test_golden_native_folder_answers_alike_in_transformers(name, tmp_path):
    config = whole(GOLDEN / name)
    model = build_model(config)
    internvl_hf.save(model.vlm, tmp_path)
    save_processor(model.tokenizer, model.encoder, config.model, tmp_path)
    picture = Image.effect_noise((130, 70), 90).convert("RGB")

    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    native = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()

    num_tiles = count_tiles(*picture.size, config.model.tiles)
    sample = Sample("x", (Message("user", (Picture("p"), "\nWhat is this?")),))
    example = model.encoder.encode_prompt(sample, lambda limit: [num_tiles])
    assert num_tiles > 1
    assert inputs["input_ids"][0].tolist() == example.input_ids.tolist()
    with torch.no_grad():
        theirs = native(**inputs).logits
        features = model.vlm.eval().vision(inputs["pixel_values"])
        embeddings = model.vlm.embed(inputs["input_ids"], None, features)
        ours = model.vlm.llm(inputs_embeds=embeddings, use_cache=False).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_golden_native_processor_cuts_the_pixels_of_training_with_pillow(tmp_path):
    # the folder cannot name its backend, and torchvision, transformers' default, resizes a little otherwise
    config = whole(GOLDEN / V2[0])
    model = build_model(config)
    save_processor(model.tokenizer, model.encoder, config.model, tmp_path)
    pictures = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = Image.effect_noise((130, 70), 90).convert("RGB")
    ours = normalize(torch.from_numpy(make_tiles(picture, config.model.tiles)), "imagenet", torch.float32)
    theirs = pictures(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def test_golden_pixel_shuffle_v1_is_refused_by_the_native_layout(tmp_path):
    folder = GOLDEN / next(name for name in NAMES if name.endswith("_v1"))
    with pytest.raises(ConfigError, match="shuffle_version=v1"):
        internvl_hf.save(load(folder), tmp_path)
