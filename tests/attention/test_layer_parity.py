"""Parity of `attend` with the attention layers of transformers; see `test_parity`."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import (
    Llama3,
    YaRN,
    attend,
    causal,
    global_tokens,
    key_lengths,
    rotary,
    segments,
    softcap,
    t5_bias,
    window,
)
from tests.attention.test_parity import B, H, K, S, T, assert_same, normal, torch

pytestmark = pytest.mark.parity


WIDTH = 32  # model width of the layers; the head width is WIDTH / H unless set
EAGER = {"attn_implementation": "eager"}


def weights_of(layer, **kwargs):
    """Return random weights of a PyTorch layer by name, and other arrays."""
    weights = {n: 0.3 * normal(*w.shape, seed=i) for i, (n, w) in enumerate(layer.named_parameters())}
    return {**weights, "hidden": normal(B, T, WIDTH), **kwargs}


def call_layer(layer, x, *args, **kwargs):
    """Call a PyTorch layer with the weights in x; return its first result."""
    weights = {n: x[n] for n, _ in layer.named_parameters()}
    return torch.func.functional_call(layer.eval(), weights, args, kwargs)[0]


def dense(x, name, tokens):
    out = tokens @ x[f"{name}.weight"].T
    return out + x[f"{name}.bias"][None, None] if f"{name}.bias" in x else out


def split_heads(tokens, heads):
    return tokens.reshape(*tokens.shape[:2], heads, -1)


def merge_heads(out):
    return out.reshape(*out.shape[:2], -1)


@pytest.mark.parametrize("inverse", [False, True])
def test_gpt2(inverse):
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = gpt2.GPT2Config(n_embd=WIDTH, n_head=H, scale_attn_by_inverse_layer_idx=inverse, **EAGER)
    layer = gpt2.GPT2Attention(config, layer_idx=2)
    mask_bias = torch.full((T, T), -torch.inf).triu(1)

    def attnlab_results(x, backend):
        query, key, value = (
            split_heads(y, H)
            for y in jnp.split(x["hidden"] @ x["c_attn.weight"] + x["c_attn.bias"][None, None], 3, axis=-1)
        )
        scale = (WIDTH / H) ** -0.5 / (3 if inverse else 1)
        out = merge_heads(attend(query, key, value, mask=causal(), scale=scale, backend=backend))
        return (out @ x["c_proj.weight"] + x["c_proj.bias"][None, None],)

    def torch_results(x):
        return (call_layer(layer, x, x["hidden"], attention_mask=mask_bias),)

    assert_same(attnlab_results, torch_results, weights_of(layer))


def rotated_attention(x, positions, rope, **kwargs):
    """Attention layer with rotary embeddings and the parameter names of Llama."""
    query, key, value = (
        split_heads(dense(x, f"{n}_proj", x["hidden"]), heads) for n, heads in (("q", H), ("k", K), ("v", K))
    )
    query, key = (rotary(y, jnp.asarray(positions), **rope) for y in (query, key))
    return dense(x, "o_proj", merge_heads(attend(query, key, value, **kwargs)))


POSITIONS = np.arange(T)[None]  # positions of rows without padding
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "plain": ({"rope_type": "default", "rope_theta": 10_000.0}, {}),
    "llama3": (
        {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 64},
        {"theta": 500.0, "scaling": Llama3(8.0, 64)},
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_llama_with_left_padding(rope):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    hf_rope, rope = ROPES[rope]
    config = llama.LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=H, num_key_value_heads=K, rope_parameters=hf_rope, **EAGER
    )
    layer = llama.LlamaAttention(config, layer_idx=0)
    is_token = np.arange(T) >= np.array([[0], [23]])
    positions = np.maximum(is_token.cumsum(1) - 1, 0)

    def attnlab_results(x, backend):
        mask = causal() & segments(jnp.asarray(is_token, jnp.int32))
        return (rotated_attention(x, positions, rope, mask=mask, backend=backend) * is_token[..., None],)

    def torch_results(x):
        cos_sin = llama.LlamaRotaryEmbedding(config)(x["hidden"], torch.tensor(positions))
        mask = llama.create_causal_mask(config, x["hidden"], torch.tensor(is_token), None)
        # In transformers a padding query attends uniformly to all keys; in attnlab its output is 0.
        return (call_layer(layer, x, x["hidden"], cos_sin, mask) * torch.tensor(is_token)[..., None],)

    assert_same(attnlab_results, torch_results, weights_of(layer))


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_gemma2(layer_type):
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    config = gemma.Gemma2Config(
        hidden_size=WIDTH,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=12,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=3.0,
        sliding_window=20,
        num_hidden_layers=1,
        layer_types=[layer_type],
        **EAGER,
    )
    layer = gemma.Gemma2Attention(config, layer_idx=0)
    local = window(19) if layer_type == "sliding_attention" else window()
    kwargs = {"mask": causal() & local, "score": softcap(3.0), "scale": 5**-0.5}

    def attnlab_results(x, backend):
        return (rotated_attention(x, POSITIONS, {}, backend=backend, **kwargs),)

    def torch_results(x):
        cos_sin = gemma.Gemma2RotaryEmbedding(config)(x["hidden"], torch.tensor(POSITIONS))
        return (
            call_layer(layer, x, x["hidden"], cos_sin, text_mask(gemma, layer_type, config, x["hidden"])),
        )

    assert_same(attnlab_results, torch_results, weights_of(layer))


def text_mask(module, layer_type, config, hidden):
    """Return the mask that a transformers model passes to its layers of this type."""
    make = {
        "sliding_attention": module.create_sliding_window_causal_mask,
        "full_attention": module.create_causal_mask,
    }
    return make[layer_type](config, hidden, None, None)


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_gpt_oss(layer_type):
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = oss.GptOssConfig(
        hidden_size=WIDTH,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=12,
        sliding_window=20,
        num_hidden_layers=1,
        layer_types=[layer_type],
        **EAGER,
    )
    layer = oss.GptOssAttention(config, layer_idx=0)
    rope = {"theta": 150_000.0, "scaling": YaRN(32.0, 4096, truncate=False)}
    local = window(19) if layer_type == "sliding_attention" else window()

    def attnlab_results(x, backend):
        kwargs = {"mask": causal() & local, "sinks": x["sinks"], "backend": backend}
        return (rotated_attention(x, POSITIONS, rope, **kwargs),)

    def torch_results(x):
        cos_sin = oss.GptOssRotaryEmbedding(config)(x["hidden"], torch.tensor(POSITIONS))
        return (call_layer(layer, x, x["hidden"], cos_sin, text_mask(oss, layer_type, config, x["hidden"])),)

    assert_same(attnlab_results, torch_results, weights_of(layer))


@pytest.mark.parametrize("layer_type", ["encoder", "decoder", "cross"])
def test_t5(layer_type):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        d_model=WIDTH,
        d_kv=WIDTH // H,
        num_heads=H,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=50,
        dropout_rate=0.0,
        is_decoder=layer_type != "encoder",
        **EAGER,
    )
    layer = t5.T5Attention(config, has_relative_attention_bias=layer_type != "cross", layer_idx=0)
    mask_bias = torch.full((T, T), -torch.inf).triu(1)[None, None] if layer_type == "decoder" else None
    memory = {"memory": normal(B, S, WIDTH)} if layer_type == "cross" else {}

    def attnlab_results(x, backend):
        score, kv_input = None, x.get("memory", x["hidden"])
        if layer_type != "cross":
            table = x["relative_attention_bias.weight"]
            score = t5_bias(table, bidirectional=layer_type == "encoder", max_distance=50)
        query, key, value = (
            split_heads(dense(x, n, y), H) for n, y in (("q", x["hidden"]), ("k", kv_input), ("v", kv_input))
        )
        mask = causal() if layer_type == "decoder" else None
        out = attend(query, key, value, mask=mask, score=score, scale=1.0, backend=backend)
        return (dense(x, "o", merge_heads(out)),)

    def torch_results(x):
        return (call_layer(layer, x, x["hidden"], mask=mask_bias, key_value_states=x.get("memory")),)

    assert_same(attnlab_results, torch_results, weights_of(layer, **memory))


def test_longformer():
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = longformer.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=H, attention_window=[14], attention_probs_dropout_prob=0.0
    )
    layer = longformer.LongformerSelfAttention(config, layer_id=0)
    chosen, lengths = np.array([[0, 33], [5, 5]]), np.array([T, 51])
    is_global = (np.arange(T) == chosen[:, :, None]).any(1)
    is_padding = np.arange(T) >= lengths[:, None]

    def attnlab_results(x, backend):
        padding_mask = key_lengths(jnp.asarray(lengths), jnp.asarray(lengths))
        mask = (window(7, 7) | global_tokens(jnp.asarray(chosen))) & padding_mask

        def attention(names):
            projected = (split_heads(dense(x, n, x["hidden"]), H) for n in names)
            return merge_heads(attend(*projected, mask=mask, backend=backend))

        # Global queries, and no others, use separate projections of the queries and of all keys.
        global_out = attention(("query_global", "key_global", "value_global"))
        return (jnp.where(is_global[..., None], global_out, attention(("query", "key", "value"))),)

    def torch_results(x):
        masks = {"is_index_masked": is_padding, "is_index_global_attn": is_global}
        masks = {n: torch.tensor(m) for n, m in masks.items()}
        token_kinds = 10_000.0 * (masks["is_index_global_attn"].float() - masks["is_index_masked"].float())
        return (call_layer(layer, x, x["hidden"], token_kinds, is_global_attn=True, **masks),)

    assert_same(attnlab_results, torch_results, weights_of(layer))
