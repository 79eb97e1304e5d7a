"""StarCoder 2: a decoder with layer norms, biases and an MLP without a gate."""

from attnlab.layers import AttentionConfig, Causal, LayerNormConfig, MLPConfig, Sliding
from attnlab.models import DecoderConfig
from attnlab.pretrained.families.base import Family, linear, norm
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def starcoder2(hf: HFConfig) -> DecoderConfig:
    """StarCoder 2 (Lozhkov et al. 2024, arXiv 2402.19173, section 6.2)."""
    window = hf.get("sliding_window")
    return DecoderConfig(
        depth=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        attention=AttentionConfig(
            hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"],
            bias=hf["use_bias"],
            dropout=hf.get("attention_dropout", 0.0),
        ),
        feed_forward=MLPConfig(hf["intermediate_size"], hf.activation("hidden_act"), hf["use_bias"]),
        norm=LayerNormConfig(hf["norm_epsilon"]),
        positions=hf.rotary(),
        pattern=(Causal() if window is None else Sliding(window),),
        vocab_size=hf["vocab_size"],
        tied=hf.get("tie_word_embeddings", True),
        dropout=hf.get("residual_dropout", 0.0),
    )


PARAM, HF = "layers/{layer}", "model.layers.{layer}"
TENSORS = (
    TensorMapping("embedding/table", "model.embed_tokens.weight"),
    *norm(f"{PARAM}/attention_norm", f"{HF}.input_layernorm"),
    *linear(f"{PARAM}/attention/query", f"{HF}.self_attn.q_proj", "(h d) e -> e h d"),
    *linear(f"{PARAM}/attention/key", f"{HF}.self_attn.k_proj", "(h d) e -> e h d"),
    *linear(f"{PARAM}/attention/value", f"{HF}.self_attn.v_proj", "(h d) e -> e h d"),
    TensorMapping(f"{PARAM}/attention/out/kernel", f"{HF}.self_attn.o_proj.weight", "e (h d) -> h d e"),
    TensorMapping(f"{PARAM}/attention/out/bias", f"{HF}.self_attn.o_proj.bias"),
    *norm(f"{PARAM}/feed_forward_norm", f"{HF}.post_attention_layernorm"),
    *linear(f"{PARAM}/feed_forward/up", f"{HF}.mlp.c_fc"),
    *linear(f"{PARAM}/feed_forward/down", f"{HF}.mlp.c_proj"),
    *norm("norm", "model.norm"),
    TensorMapping("readout/table", "lm_head.weight"),
)
FAMILIES = {
    "starcoder2": Family(
        starcoder2,
        TENSORS,
        "model.",
        "Starcoder2ForCausalLM",
        readout=TensorMapping("embedding/table", "lm_head.weight"),
    )
}
