"""The weight names of InternVL's original layout.

Sources: InternVL `tools/internvl_custom2hf.py`, `modeling_internlm2.py` (wqkv), transformers'
`convert_internvl_weights_to_hf.py`.
"""

from transformers import PreTrainedConfig

from vlm_tune.model.layouts.keys import Heads, Names

PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
VISION = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "lambda_": "ls",
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.q_proj": "attention.wqkv",
    "self_attn.k_proj": "attention.wqkv",
    "self_attn.v_proj": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}
INTERNVIT = (Names("", "", VISION),)  # an encoder's folder alone


def internlm2_names(text: PreTrainedConfig) -> list[Names]:
    """Name the weights of an InternLM2's folder alone, by the Llama configuration that describes it."""
    return [Names("", "", INTERNLM2, Heads.of(text))]


def official_names(text: PreTrainedConfig, is_internlm2: bool) -> list[Names]:
    """Name the weights of a whole InternVLChatModel with this language model."""
    projector = [Names(f"projector.{ours}", theirs) for ours, theirs in PROJECTOR.items()]
    words, heads = (INTERNLM2, Heads.of(text)) if is_internlm2 else ({}, None)
    llm = Names("llm.", "language_model.", words, heads)
    return [Names("vision.tower.", "vision_model.", VISION), *projector, llm]
