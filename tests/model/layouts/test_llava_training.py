"""LLaVA folders are trained, counted, kept and exported as any other model, any-resolution pictures too."""

from dataclasses import replace

import pytest
import torch
from llava_toys import save_llava
from test_llava_hf import ONE, configure, converse, our_logits, picture, processor_of, prompt_of, their_logits
from toys import TOKENIZER
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm_tune.inspection.inspect_row import look
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.layouts import parts
from vlm_tune.model.layouts.llava import hf as llava_hf
from vlm_tune.model.layouts.llava.processor import save_llava_processor

RULES = {"pad": "model.tiles={size: 56, max: 1, rule: pad}", "anyres": "model.tiles={size: 56, max: 4, rule: anyres}"}
ROWS = [0, 1, 6, 2]  # with pictures of several sizes, and one without


def overrides(folder, rule):
    own = ["model.template=v1", "model.vision.normalize=openai_clip", "model.vision.path=null", "model.llm.path=null"]
    layers = "model.vision.targets=[q_proj, v_proj]"
    return [f"model.path={folder}", RULES[rule], "stage.pack_length=1024", layers, *own]


@pytest.fixture(scope="module", params=RULES)
def trained(request, toys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder, request.param == "anyres")
    staged = toys.staged("stage=finetune", "stage.lora.dropout=0", *overrides(folder, request.param))
    staged.model.vlm.eval()
    return staged


@torch.no_grad()
def test_the_loss_of_a_pack_is_the_sum_of_its_samples(trained):
    vlm = trained.model.vlm
    whole = float(vlm(trained.batch(ROWS, step_weight=1.0)))
    padded = float(vlm(trained.batch(ROWS, packing=False, step_weight=1.0)))
    alone = sum(float(vlm(trained.batch([row], step_weight=1.0))) for row in ROWS)
    assert whole == pytest.approx(alone, rel=1e-5)
    assert padded == pytest.approx(alone, rel=1e-5)


@torch.no_grad()
def test_kept_features_stand_for_tiles(trained):
    vlm, batch = trained.model.vlm, trained.batch(ROWS)
    kept = replace(batch, tiles=None, features=vlm.see(batch.tiles))
    assert float(vlm(kept)) == pytest.approx(float(vlm(batch)), rel=1e-6)


@torch.no_grad()
def test_another_picture_gives_another_loss(trained):
    vlm, batch = trained.model.vlm, trained.batch(ROWS)
    assert abs(float(vlm(batch)) - float(vlm(replace(batch, tiles=255 - batch.tiles)))) > 1e-3


def test_each_place_has_one_feature(trained):
    vlm, batch = trained.model.vlm, trained.batch(ROWS)
    places = int((batch.input_ids == vlm.context_id).sum())
    assert vlm.project(vlm.see(batch.tiles), batch.spreads).numel() == places * 32
    index = trained.data.train.index
    assert batch.num_tokens == sum(int(index.tokens[row]) for row in ROWS)


def test_every_weight_of_the_projector_learns_even_from_text(trained):
    vlm = trained.model.vlm
    for rows in ([0, 1], [6]):
        vlm.train()
        vlm.zero_grad()
        vlm(trained.batch(rows)).backward()
        vlm.eval()
        assert all(weight.grad is not None for weight in vlm.projector.parameters())
    vlm.zero_grad()


def test_a_blind_model_sees_no_difference(trained, monkeypatch):
    vlm, batch = trained.model.vlm, trained.batch(ROWS)
    monkeypatch.setattr(vlm, "is_blind", True)
    with torch.no_grad():
        assert torch.equal(vlm(batch), vlm(replace(batch, tiles=255 - batch.tiles)))


def test_a_row_is_shown_token_by_token(trained):
    encoder, tokenizer = build_encoder(trained.config)
    seen = look(trained.config, encoder, tokenizer, 0)
    tiles = [token.tile for token in seen.tokens if token.tile]
    assert sorted(set(tiles)) == list(range(1, sum(seen.example.num_tiles) + 1))


@pytest.mark.parametrize("rule", RULES)
def test_a_run_trains_and_leaves_as_a_folder_of_transformers(toys, tmp_path, run_cli, rule):
    save_llava(tmp_path / "base", rule == "anyres")
    arguments = toys.arguments("stage=finetune", *overrides(tmp_path / "base", rule), runs=tmp_path / "runs")
    assert run_cli(*arguments).code == 0
    run = next(folder for folder in (tmp_path / "runs").iterdir() if (folder / "config.yaml").exists())
    done = run_cli("export", f"ckpt={run}", f"out={tmp_path}/out", "layout=llava_hf", "dtype=fp32")
    assert done.code == 0, done.err
    assert "logits differ by" in done.out.replace("\n", " ")
    plain, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").state_dict()
    changed = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model" in name and "q_proj" in name for name in changed)
    assert ("model.image_newline" in changed) == (rule == "anyres")
    assert not any("vision_tower" in name for name in changed)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(TOKENIZER)) + 1


@pytest.mark.parametrize("rule", RULES)
def test_parts_that_never_met_leave_as_a_folder_of_transformers(toys, tmp_path, rule):
    """CLIP, a new projector and a language model, as LLaVA itself began; the new newline goes along."""
    save_llava(tmp_path / "base")
    tower = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").model.vision_tower
    tower.save_pretrained(tmp_path / "clip")
    newline = str(rule == "anyres").lower()
    joined = [f"model.vision.path={tmp_path}/clip", "model.vision.select_layer=-2", "model.template=v1", RULES[rule]]
    joined += [f"model.projector={{kind: mlp2x_gelu, shuffle: 1, newline: {newline}}}", "stage.pack_length=1024"]
    joined.append("model.vision.normalize=openai_clip")
    staged = toys.staged("stage=pretrain", *joined)
    model, config = staged.model, staged.config
    assert torch.isfinite(model.vlm(staged.batch(ROWS)))
    llava_hf.save(model.vlm, config.model.tiles, tmp_path / "out")
    save_llava_processor(model.tokenizer, model.encoder, config.model, tmp_path / "out")
    image = picture(120, 60)
    prompt = prompt_of(config, model.encoder, image)
    inputs = converse(processor_of(tmp_path / "out"), image)
    assert inputs["input_ids"][0].tolist() == prompt.example.input_ids.tolist()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(our_logits(model, prompt), their_logits(plain, inputs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_parts_keep_what_a_llava_reads(tmp_path):
    """Written side by side, a LLaVA keeps its layer, its class token and its token for pictures."""
    save_llava(tmp_path / "base", vision_feature_select_strategy="full", multimodal_projector_bias=False)
    one = configure(tmp_path / "base", ONE)
    model = build_model(one)
    parts.save(model.vlm, model.tokenizer, tmp_path / "parts")
    other = configure(tmp_path / "parts", ONE)
    again = build_model(other)
    prompts = [prompt_of(config, each.encoder, picture()) for config, each in ((one, model), (other, again))]
    assert prompts[0].example.input_ids.tolist() == prompts[1].example.input_ids.tolist()
    torch.testing.assert_close(our_logits(again, prompts[1]), our_logits(model, prompts[0]), atol=1e-5, rtol=1e-5)
    assert build_encoder(other)[0].settings == again.encoder.settings == model.encoder.settings
