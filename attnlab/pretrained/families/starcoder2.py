"""StarCoder 2: a decoder with layer norms, biases and an MLP without a gate."""

from attnlab.layers import AttentionConfig, Causal, LayerNormConfig, MLPConfig, Sliding
from attnlab.models import DecoderConfig
from attnlab.pretrained.families.base import Family, linear, norm
from attnlab.pretrained.hf_config import HFConfig
from attnlab.pretrained.tensor_mapping import TensorMapping


def starcoder2(s: HFConfig) -> DecoderConfig:
    """StarCoder 2 (Lozhkov et al. 2024, arXiv 2402.19173, section 6.2)."""
    window = s.get("sliding_window")
    return DecoderConfig(
        depth=s["num_hidden_layers"],
        width=s["hidden_size"],
        attention=AttentionConfig(
            s["num_attention_heads"],
            kv_heads=s["num_key_value_heads"],
            bias=s["use_bias"],
            dropout=s.get("attention_dropout", 0.0),
        ),
        feed_forward=MLPConfig(s["intermediate_size"], s.activation("hidden_act"), s["use_bias"]),
        norm=LayerNormConfig(s["norm_epsilon"]),
        positions=s.rotary(),
        pattern=(Causal() if window is None else Sliding(window),),
        vocab_size=s["vocab_size"],
        tied=s.get("tie_word_embeddings", True),
        dropout=s.get("residual_dropout", 0.0),
    )


OURS, THEIRS = "layers/{layer}", "model.layers.{layer}"
TENSORS = (
    TensorMapping("embedding/table", "model.embed_tokens.weight"),
    *norm(f"{OURS}/attention_norm", f"{THEIRS}.input_layernorm"),
    *linear(f"{OURS}/attention/query", f"{THEIRS}.self_attn.q_proj", "(h d) e -> e h d"),
    *linear(f"{OURS}/attention/key", f"{THEIRS}.self_attn.k_proj", "(h d) e -> e h d"),
    *linear(f"{OURS}/attention/value", f"{THEIRS}.self_attn.v_proj", "(h d) e -> e h d"),
    TensorMapping(f"{OURS}/attention/out/kernel", f"{THEIRS}.self_attn.o_proj.weight", "e (h d) -> h d e"),
    TensorMapping(f"{OURS}/attention/out/bias", f"{THEIRS}.self_attn.o_proj.bias"),
    *norm(f"{OURS}/feed_forward_norm", f"{THEIRS}.post_attention_layernorm"),
    *linear(f"{OURS}/feed_forward/up", f"{THEIRS}.mlp.c_fc"),
    *linear(f"{OURS}/feed_forward/down", f"{THEIRS}.mlp.c_proj"),
    *norm("norm", "model.norm"),
    TensorMapping("readout/table", "lm_head.weight"),
)
FAMILIES = {
    "starcoder2": Family(
        starcoder2, TENSORS, "model.", "Starcoder2ForCausalLM", ignored=(r"lm_head\.weight",)
    )
}
