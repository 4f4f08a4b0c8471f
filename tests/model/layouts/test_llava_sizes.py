"""The LLaVA models of conf/model at true size, on no memory: parameters by part are the published ones."""

import pytest
import timm
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm_tune.config.parse import load_config
from vlm_tune.model.parts.projector import Projector, tokens_per_tile
from vlm_tune.model.parts.vision import VisionEncoder

CLIP_L = (
    "clip_vision_model",
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "patch_size": 14, "image_size": 336, "projection_dim": 768},
)


def decoder(hidden, intermediate, layers, heads, kv_heads, vocabulary):
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    return "llama", sizes | heads_ | {"tie_word_embeddings": False}


VICUNA_7B = decoder(4096, 11008, 32, 32, 32, 32064)
VICUNA_13B = decoder(5120, 13824, 40, 40, 40, 32064)
INTERNLM2_7B = decoder(4096, 14336, 32, 32, 8, 92544)  # mapped to Llama
LLAMA3_8B = decoder(4096, 14336, 32, 32, 8, 128256)

# Sources. llava-1.5-7b-hf as a whole: 7,063,427,072, the sum over the headers of its safetensors. Vicuna is Llama 2:
# 6,738,415,616 and 13,015,864,320 on the hub, to which llava-hf adds 64 rows in each of two tables. On the hub also
# internlm2-chat-7b, 7,737,708,544, and Meta-Llama-3-8B, 8,030,261,248. CLIP's ViT-L/14-336: 303,507,456, as the
# registry of the embedding benchmark MTEB has it for another model of that architecture (mlcd-vit-large-patch14-336).
CLIP, VICUNA_7B_SIZE, VICUNA_13B_SIZE = 303_507_456, 6_738_415_616 + 128 * 4096, 13_015_864_320 + 128 * 5120
WHOLE = {"llava_1_5_7b": 7_063_427_072}
PUBLISHED = {
    "llava_1_5_7b": (VICUNA_7B, (CLIP, 20_979_712, VICUNA_7B_SIZE)),
    "llava_1_5_13b": (VICUNA_13B, (CLIP, 31_467_520, VICUNA_13B_SIZE)),
    "llava_next_7b": (VICUNA_7B, (CLIP, 20_979_712 + 4096, VICUNA_7B_SIZE)),  # the newline
    "llava_internlm2_7b": (INTERNLM2_7B, (CLIP, 20_979_712, 7_737_708_544)),
    "llava_llama3_8b": (LLAMA3_8B, (CLIP, 20_979_712, 8_030_261_248)),
}


def count(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_by_part_equal_the_published_ones(name):
    text_config, wanted = PUBLISHED[name]
    model = load_config([f"model={name}", "data.path=x.jsonl"]).model
    with torch.device("meta"):
        tower = AutoModel.from_config(AutoConfig.for_model(CLIP_L[0], **CLIP_L[1]))
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(text_config[0], **text_config[1]))
        projector = Projector(model.projector, tower.config.hidden_size, llm.config.hidden_size)
    found = count(tower), count(projector), count(llm)
    assert found == wanted
    assert sum(found) == WHOLE.get(name, sum(wanted))
    vision = VisionEncoder(tower, model.vision.select_layer)
    assert tokens_per_tile(model.projector, vision.num_patches(model.tiles.size)) == 576
    assert count(vision) < count(tower) + sum(weight.numel() for weight in vision.unused.values()) == CLIP


def test_minigpt4_reads_the_last_layer_but_one_of_eva_by_32_queries():
    # MiniGPT-4 takes 39 of EVA ViT-g's 40 layers, 1,408 wide, and BLIP-2's Q-Former
    model = load_config(["model=minigpt4_7b", "data.path=x.jsonl"]).model
    with torch.device("meta"):
        tower = timm.create_model(model.vision.path.removeprefix("timm/").split(".")[0], num_classes=0)
        vision = VisionEncoder(tower, model.vision.select_layer)
        projector = Projector(model.projector, vision.width, 4096)
    assert (len(tower.blocks), vision.width, vision.num_patches(model.tiles.size)) == (39, 1408, 256)
    assert projector(torch.zeros(2, 256, 1408, device="meta")).shape == (2, 32, 4096)
