"""llava-hf folders: ours and plain transformers give the same tokens, features and logits, in both directions."""

import json

import numpy as np
import pytest
import torch
from llava_toys import save_llava
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_tune.config.parse import load_config
from vlm_tune.data.sample import Message, Picture, Sample
from vlm_tune.data.sets.dataset import Tiling
from vlm_tune.data.tiles import make_tiles, tile_limits
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.generate import Prompt, answer, embed_prompts
from vlm_tune.model.layouts.llava import hf as llava_hf
from vlm_tune.model.layouts.llava.processor import save_llava_processor

ONE = (
    "model.tiles={size: 56, max: 1, thumbnail: false, rule: resize}",
    "model.projector={kind: mlp2x_gelu, shuffle: 1}",
)
PAD = ("model.tiles={size: 56, max: 1, thumbnail: false, rule: pad}", ONE[1])
ANYRES = ("model.tiles={size: 56, max: 4, rule: anyres}", ONE[1])
KINDS = {
    "1.5": (False, {}, ONE),
    "1.5 siglip": (False, {"vision": "siglip_vision_model"}, ONE),
    "1.5 full": (False, {"vision_feature_select_strategy": "full"}, ONE),
    "1.5 last layer": (False, {"vision_feature_layer": -1}, ONE),
    "1.5 siglip last layer": (False, {"vision": "siglip_vision_model", "vision_feature_layer": -1}, ONE),
    "1.5 first layers": (False, {"vision_feature_layer": 1}, ONE),
    "1.5 no bias": (False, {"multimodal_projector_bias": False}, ONE),
    "1.5 tied": (False, {"tie_word_embeddings": True}, ONE),
    "1.5 qwen2": (False, {"text": "qwen2"}, ONE),
    "1.5 gemma": (False, {"text": "gemma"}, ONE),
    "next": (True, {}, ANYRES),
    "next siglip": (True, {"vision": "siglip_vision_model"}, ANYRES),
    "next mistral": (True, {"text": "mistral"}, ANYRES),
}
QUESTION = "What is in the picture?"


def configure(folder, overrides, *more):
    common = ["model=tiny", "model.template=v1", "model.vision.normalize=openai_clip", "data.path=x.jsonl"]
    return load_config([*common, f"model.path={folder}", "trainer.precision=fp32", *overrides, *more])


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    is_next, changes, overrides = KINDS[request.param]
    save_llava(folder, is_next, **changes)
    config = configure(folder, overrides)
    model = build_model(config)
    return folder, model.config, model


def picture(width=100, height=70, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def prompt_of(config, encoder, *images):
    """Encode a question about pictures, as `chat` does."""
    parts = [part for _ in images for part in (Picture("x.png"), "\n")]
    sample = Sample("x", (Message("user", (*parts, QUESTION)), Message("assistant", ("",), supervised=True)), "x")
    tiles = config.model.tiles
    tiling = Tiling([image.size for image in images], [False] * len(images), tiles)
    example = encoder.encode_prompt(sample, tiling)
    limits = tile_limits([False] * len(images), tiles, example.max_tiles)
    normalization = config.model.vision.normalize
    made = [make_tiles(image, tiles, limit, normalization) for image, limit in zip(images, limits, strict=True)]
    return Prompt(example, np.concatenate(made))


def text_of(*images):
    """Write the same question as v1 writes it, with one mark a picture."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    return f"{system} USER: {'<image>' * len(images)}\n{QUESTION} ASSISTANT:"


@torch.no_grad()
def our_logits(model, prompt):
    embeddings, mask = embed_prompts(model, [prompt])
    model.vlm.eval()
    return model.vlm.llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[0]


@torch.no_grad()
def their_logits(plain, inputs):
    return plain(**inputs, use_cache=False).logits[0]


def processor_of(folder):
    """Load a saved processor with Pillow's resizing: torchvision's own, the default, differs by up to 2/255."""
    return AutoProcessor.from_pretrained(folder, backend="pil")


def converse(processor, image):
    """Let a saved processor do all: chat template, tokens, pixels."""
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    return processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("size", [(100, 70), (40, 200), (56, 56)])
def test_a_folder_of_transformers_has_its_own_tokens_and_logits(case, size):
    folder, config, model = case
    image = picture(*size)
    prompt = prompt_of(config, model.encoder, image)
    inputs = processor_of(folder)(images=image, text=text_of(image), return_tensors="pt")
    assert prompt.example.input_ids.tolist() == inputs["input_ids"][0].tolist()
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    torch.testing.assert_close(our_logits(model, prompt), their_logits(plain, inputs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_features_of_a_picture_are_those_of_transformers(case):
    folder, config, model = case
    image = picture(130, 60)
    prompt = prompt_of(config, model.encoder, image)
    inputs = processor_of(folder)(images=image, text=text_of(image), return_tensors="pt")
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    sizes = {name: inputs[name] for name in ("image_sizes",) if name in inputs}
    wanted = torch.cat(list(plain.get_image_features(pixel_values=inputs["pixel_values"], **sizes).pooler_output))
    tiles = torch.from_numpy(prompt.tiles)
    found = model.vlm.project(model.vlm.see(tiles), prompt.example.spreads).reshape(-1, 32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_an_export_is_loaded_by_plain_transformers_with_its_own_processor(case, tmp_path):
    _, config, model = case
    llava_hf.save(model.vlm, config.model.tiles, tmp_path)
    save_llava_processor(model.tokenizer, model.encoder, config.model, tmp_path)
    image = picture(90, 160)
    prompt = prompt_of(config, model.encoder, image)
    inputs = converse(processor_of(tmp_path), image)
    assert inputs["input_ids"][0].tolist() == prompt.example.input_ids.tolist()
    plain, found = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(our_logits(model, prompt), their_logits(plain.eval(), inputs), atol=1e-5, rtol=1e-5)


def test_a_round_trip_changes_no_weight(case, tmp_path):
    folder, config, model = case
    llava_hf.save(model.vlm, config.model.tiles, tmp_path)
    one, other = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    layers = [AutoModelForImageTextToText.from_pretrained(path).config for path in (folder, tmp_path)]
    assert layers[0].vision_config.num_hidden_layers == layers[1].vision_config.num_hidden_layers


def test_the_names_of_an_export_are_those_of_the_hub(case, tmp_path):
    # a freshly built LLaVA writes others, which other tools do not find
    _, config, model = case
    llava_hf.save(model.vlm, config.model.tiles, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"multi_modal_projector.linear_1.weight", "language_model.model.embed_tokens.weight"} <= names
    assert "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight" in names
    assert ("language_model.lm_head.weight" in names) is not model.vlm.llm.config.tie_word_embeddings
    assert ("image_newline" in names) == config.model.projector.newline
    allowed = ("multi_modal_projector.", "language_model.", "vision_tower.vision_model.", "image_newline")
    assert all(name.startswith(allowed) for name in names)


def test_counting_needs_no_weights(case):
    folder, config, model = case
    for weights in folder.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".hidden"))
    try:
        encoder, _ = build_encoder(config)
    finally:
        for weights in folder.glob("*.hidden"):
            weights.rename(weights.with_suffix(".safetensors"))
    assert encoder.settings == model.encoder.settings


def test_several_pictures_in_a_batch_get_their_own_tokens(case):
    _, config, model = case
    prompts = [prompt_of(config, model.encoder, picture(*size)) for size in ((100, 70), (60, 200), (30, 30))]
    together = answer(model, prompts, 6)
    assert together == [answer(model, [prompt], 6)[0] for prompt in prompts]


# ------------------------------------------------------------------------------------------ LLaVA 1.5's padded square


@pytest.mark.parametrize("size", [(100, 70), (40, 200), (56, 56), (33, 31)])
def test_padding_to_a_square_leaves_with_the_export(tmp_path, size):
    save_llava(tmp_path / "base")
    config = configure(tmp_path / "base", PAD)
    model = build_model(config)
    llava_hf.save(model.vlm, config.model.tiles, tmp_path / "out")
    save_llava_processor(model.tokenizer, model.encoder, config.model, tmp_path / "out")
    image = picture(*size)
    prompt = prompt_of(config, model.encoder, image)
    inputs = converse(processor_of(tmp_path / "out"), image)
    assert inputs["input_ids"][0].tolist() == prompt.example.input_ids.tolist()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(our_logits(model, prompt), their_logits(plain, inputs), atol=1e-5, rtol=1e-5)


def test_tiles_that_no_llava_processor_cuts_are_refused(tmp_path):
    save_llava(tmp_path / "base")
    config = configure(tmp_path / "base", ["model.tiles={size: 56, max: 6, rule: dynamic}", ONE[1]])
    model = build_model(config)
    llava_hf.save(model.vlm, config.model.tiles, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"cut no picture by model\.tiles\.rule=dynamic into up to 6 tiles"):
        save_llava_processor(model.tokenizer, model.encoder, config.model, tmp_path / "out")


@pytest.mark.parametrize("kind", ["1.5", "next"])
def test_a_longer_conversation_has_the_same_tokens_in_an_exported_processor(tmp_path, kind):
    is_next, _, overrides = KINDS[kind]
    save_llava(tmp_path / "base", is_next)
    config = configure(tmp_path / "base", overrides)
    model = build_model(config)
    llava_hf.save(model.vlm, config.model.tiles, tmp_path / "out")
    save_llava_processor(model.tokenizer, model.encoder, config.model, tmp_path / "out")
    images = [picture(100, 70), picture(60, 200)][: 1 if is_next else 2]  # of several, training shares the tiles
    shown = [{"type": "image", "image": image} for image in images]
    said = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", QUESTION)]
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    turns[1]["content"] = [*shown, *turns[1]["content"]]
    processor = processor_of(tmp_path / "out")
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    marks = [part for _ in images for part in (Picture("x.png"), "\n")]
    messages = [Message(role, (text,), supervised=role == "assistant") for role, text in (*said, ("assistant", ""))]
    messages[1] = Message("user", (*marks, "Hello"))
    tiling = Tiling([image.size for image in images], [False] * len(images), config.model.tiles)
    example = model.encoder.encode_prompt(Sample("x", tuple(messages), "x"), tiling)
    assert example.input_ids.tolist() == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize(("is_next", "overrides", "told"), [(False, ONE, 1), (True, ANYRES, 2)])
def test_what_a_processor_does_otherwise_is_said(tmp_path, is_next, overrides, told):
    save_llava(tmp_path / "base", is_next)
    config = configure(tmp_path / "base", overrides)
    model = build_model(config)
    llava_hf.save(model.vlm, config.model.tiles, tmp_path / "out")
    said = "\n".join(save_llava_processor(model.tokenizer, model.encoder, config.model, tmp_path / "out"))
    assert said.count("llava_hf: ") == told
    assert 'backend="pil"' in said
    assert ("training shared them" in said.replace("\n", " ")) == is_next


# ------------------------------------------------------------------------------------------------ what is not a LLaVA


@pytest.mark.parametrize(
    ("is_next", "changes", "overrides", "reason"),
    [
        (False, {"vision_feature_layer": [-2, -1]}, ONE, r"vision_feature_layer=\[-2, -1\] joins several layers"),
        (False, {"projector_hidden_act": "relu"}, ONE, "projector_hidden_act=relu"),
        (False, {"vision": "siglip_vision_model", "vision_feature_select_strategy": "default"}, ONE, "first patch"),
        (True, {}, ONE, r"set model\.tiles\.rule=anyres"),
        (True, {"vision_feature_select_strategy": "full"}, ANYRES, "class tokens between their tiles"),
    ],
)
def test_a_folder_that_would_be_read_wrong_is_refused(tmp_path, is_next, changes, overrides, reason):
    save_llava(tmp_path, is_next, **changes)
    config = configure(tmp_path, overrides)
    with pytest.raises(ConfigError, match=reason):
        build_model(config)
    with pytest.raises(ConfigError, match=reason):
        build_encoder(config)


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    save_llava(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("linear_2.weight"))
    weights["language_model.model.layers.9.mlp.up_proj.weight"] = weights.pop(gone)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*linear_2\.weight\n.*unexpected: .*layers\.9"):
        build_model(configure(tmp_path, ONE))


def test_a_folder_with_another_models_tokenizer_is_refused(tmp_path):
    save_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    with pytest.raises(CheckpointError, match="gives 7 as the image token"):
        build_model(configure(tmp_path, ONE))


def test_a_model_that_is_no_llava_is_not_written_as_one(toys):
    model = toys.model()
    with pytest.raises(ConfigError, match=r"layout=llava_hf: the model has an encoder of type internvl_vision"):
        llava_hf.native_config(model.vlm, load_config(toys.arguments()).model.tiles)


def test_a_quantized_base_keeps_encoder_and_projector_whole(tmp_path):
    save_llava(tmp_path)
    model = build_model(configure(tmp_path, ONE, "stage.quantize=nf4", "stage.train.llm=lora"))
    kinds = {type(module).__name__ for name, module in model.vlm.llm.named_modules() if name.endswith("q_proj")}
    assert kinds == {"Linear4bit"}
    assert type(model.vlm.projector.linear_1) is torch.nn.Linear
