"""A mixture of experts (InternVL3.5-30B-A3B): it computes as plain transformers does, and keeps both public layouts."""

import pytest
import torch
from official_toys import MIXTURE, small_model, write_official
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from vlm_tune.config.schema import Quantize
from vlm_tune.data.text.templates import load_template
from vlm_tune.data.tiles import normalize
from vlm_tune.errors import CheckpointError
from vlm_tune.model.layouts import native
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl import official as internvl_official
from vlm_tune.model.vlm import VisionLanguageModel

WHOLE = ("model.vision.path=null", "model.llm.path=null", "model.template=internvl2_5", "model.tiles.max=2")
NONE = Quantize.none
LAYOUTS = {"official": internvl_official, "hf": native}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in the original layout and in that of transformers."""
    root = tmp_path_factory.mktemp("mixture")
    loaded = internvl_official.load(write_official(root / "official", MIXTURE), small_model(), torch.float32, NONE)
    save("hf", loaded.vlm, root / "hf")
    loaded.tokenizer.save_pretrained(root / "hf")
    return root


def save(layout: str, vlm: VisionLanguageModel, folder) -> None:
    if layout == "hf":
        internvl_hf.save(vlm, folder)
    else:
        internvl_official.save(vlm, load_template("internvl2_5"), small_model(), folder)


# --------------------------------------------------------------------------------------------------------- the layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stored_layouts_hold_one_tensor_an_expert(layout, folders):
    stored = load_file(folders / layout / "model.safetensors")
    prefix = "language_model.model.layers.1.mlp."
    found = {key.removeprefix(prefix): tuple(each.shape) for key, each in stored.items() if key.startswith(prefix)}
    wanted = {f"experts.{e}.{word}_proj.weight": (24, 64) for e in range(6) for word in ("gate", "up")}
    wanted |= {f"experts.{expert}.down_proj.weight": (64, 24) for expert in range(6)}
    assert found == wanted | {"gate.weight": (6, 64)}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_each_layout_becomes_each_other_bit_for_bit(source, target, folders, tmp_path):
    vlm = LAYOUTS[source].load(folders / source, small_model(), torch.float32, NONE).vlm
    save(target, vlm, tmp_path)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path, folders / target))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_missing_expert_is_named(folders, tmp_path):
    weights = load_file(folders / "official" / "model.safetensors")
    del weights[name := "language_model.model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders / "official" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"{name}: missing".replace(".", r"\.")):
        internvl_official.load(tmp_path, small_model(), torch.float32, NONE)


# ------------------------------------------------------------------------------------------------- plain transformers


def test_logits_loss_and_every_gradient_are_those_of_plain_transformers(toys, folders):
    train = "stage.train={vision: full, projector: full, llm: full}"
    run = toys.staged("stage=finetune", train, f"model.path={folders / 'official'}", *WHOLE)
    vlm, batch = run.model.vlm, run.batch([0])
    plain = InternVLForConditionalGeneration.from_pretrained(folders / "hf", attn_implementation="eager").train()
    pixels = normalize(batch.tiles, "imagenet", torch.float32)
    wanted = plain(input_ids=batch.input_ids, pixel_values=pixels).logits[0]
    with torch.no_grad():
        embeddings = vlm.embed(batch.input_ids, batch.tiles)
        torch.testing.assert_close(vlm.llm(inputs_embeds=embeddings).logits[0], wanted, atol=1e-5, rtol=1e-5)
    loss = vlm(batch)
    wanted_loss = torch.nn.functional.cross_entropy(wanted[batch.predicting], batch.targets)
    torch.testing.assert_close(loss, wanted_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    wanted_loss.backward()
    ours = {theirs(name): each.grad for name, each in vlm.named_parameters()}
    gradients = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"} <= {
        name.removeprefix("model.language_model.layers.1.") for name in gradients
    }
    assert ours.keys() >= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def theirs(name: str) -> str:
    for ours, plain in (
        ("vision.tower.", "model.vision_tower."),
        ("projector.", "model.multi_modal_projector."),
        ("llm.model.", "model.language_model."),
        ("llm.lm_head.", "lm_head."),
    ):
        if name.startswith(ours):
            return plain + name.removeprefix(ours)
    raise AssertionError(name)
