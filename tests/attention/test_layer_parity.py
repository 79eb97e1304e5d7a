"""`attend` beside the attention layers of transformers, forward and backward; see `test_parity`."""

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


WIDTH = 32  # of the layers of transformers, whose heads are WIDTH / H wide
EAGER = {"attn_implementation": "eager"}


def weights_of(layer, **more):
    """Random weights of a layer of torch by name, and other arrays."""
    weights = {n: 0.3 * normal(*w.shape, seed=i) for i, (n, w) in enumerate(layer.named_parameters())}
    return {**weights, "hidden": normal(B, T, WIDTH), **more}


def called(layer, x, *args, **more):
    """What a layer of torch returns first, its weights being those of `x`."""
    weights = {n: x[n] for n, _ in layer.named_parameters()}
    return torch.func.functional_call(layer.eval(), weights, args, more)[0]


def dense(x, name, tokens):
    out = tokens @ x[f"{name}.weight"].T
    return out + x[f"{name}.bias"][None, None] if f"{name}.bias" in x else out


def split(tokens, heads):
    return tokens.reshape(*tokens.shape[:2], heads, -1)


def joined(out):
    return out.reshape(*out.shape[:2], -1)


@pytest.mark.parametrize("inverse", [False, True])
def test_gpt2(inverse):
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = gpt2.GPT2Config(n_embd=WIDTH, n_head=H, scale_attn_by_inverse_layer_idx=inverse, **EAGER)
    layer = gpt2.GPT2Attention(config, layer_idx=2)
    seen = torch.full((T, T), -torch.inf).triu(1)

    def ours(x, backend):
        query, key, value = (
            split(y, H)
            for y in jnp.split(x["hidden"] @ x["c_attn.weight"] + x["c_attn.bias"][None, None], 3, axis=-1)
        )
        scale = (WIDTH / H) ** -0.5 / (3 if inverse else 1)
        out = joined(attend(query, key, value, mask=causal(), scale=scale, backend=backend))
        return (out @ x["c_proj.weight"] + x["c_proj.bias"][None, None],)

    def theirs(x):
        return (called(layer, x, x["hidden"], attention_mask=seen),)

    assert_same(ours, theirs, weights_of(layer))


def rotated_attention(x, positions, rope, **how):
    """Attention of a layer that turns its queries and keys, its projections named as Llama's are."""
    query, key, value = (
        split(dense(x, f"{n}_proj", x["hidden"]), heads) for n, heads in (("q", H), ("k", K), ("v", K))
    )
    query, key = (rotary(y, jnp.asarray(positions), **rope) for y in (query, key))
    return dense(x, "o_proj", joined(attend(query, key, value, **how)))


EACH = np.arange(T)[None]  # positions of rows without padding
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "plain": ({"rope_type": "default", "rope_theta": 10_000.0}, {}),
    "llama3": (
        {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 64},
        {"theta": 500.0, "scaling": Llama3(8.0, 64)},
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_llama_padded_on_the_left(rope):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs_rope, rope = ROPES[rope]
    config = llama.LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=H, num_key_value_heads=K, rope_parameters=theirs_rope, **EAGER
    )
    layer = llama.LlamaAttention(config, layer_idx=0)
    real = np.arange(T) >= np.array([[0], [23]])
    positions = np.maximum(real.cumsum(1) - 1, 0)

    def ours(x, backend):
        mask = causal() & segments(jnp.asarray(real, jnp.int32))
        return (rotated_attention(x, positions, rope, mask=mask, backend=backend) * real[..., None],)

    def theirs(x):
        turns = llama.LlamaRotaryEmbedding(config)(x["hidden"], torch.tensor(positions))
        mask = llama.create_causal_mask(config, x["hidden"], torch.tensor(real), None)
        # There a padded query, which nobody reads, sees all keys alike; here it sees none.
        return (called(layer, x, x["hidden"], turns, mask) * torch.tensor(real)[..., None],)

    assert_same(ours, theirs, weights_of(layer))


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_gemma2(kind):
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
        layer_types=[kind],
        **EAGER,
    )
    layer = gemma.Gemma2Attention(config, layer_idx=0)
    near = window(19) if kind == "sliding_attention" else window()
    how = {"mask": causal() & near, "score": softcap(3.0), "scale": 5**-0.5}

    def ours(x, backend):
        return (rotated_attention(x, EACH, {}, backend=backend, **how),)

    def theirs(x):
        turns = gemma.Gemma2RotaryEmbedding(config)(x["hidden"], torch.tensor(EACH))
        return (called(layer, x, x["hidden"], turns, text_mask(gemma, kind, config, x["hidden"])),)

    assert_same(ours, theirs, weights_of(layer))


def text_mask(module, kind, config, hidden):
    """The mask that a model of transformers gives to its layers of a kind."""
    make = {
        "sliding_attention": module.create_sliding_window_causal_mask,
        "full_attention": module.create_causal_mask,
    }
    return make[kind](config, hidden, None, None)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_gpt_oss(kind):
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = oss.GptOssConfig(
        hidden_size=WIDTH,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=12,
        sliding_window=20,
        num_hidden_layers=1,
        layer_types=[kind],
        **EAGER,
    )
    layer = oss.GptOssAttention(config, layer_idx=0)
    rope = {"theta": 150_000.0, "scaling": YaRN(32.0, 4096, truncate=False)}
    near = window(19) if kind == "sliding_attention" else window()

    def ours(x, backend):
        how = {"mask": causal() & near, "sinks": x["sinks"], "backend": backend}
        return (rotated_attention(x, EACH, rope, **how),)

    def theirs(x):
        turns = oss.GptOssRotaryEmbedding(config)(x["hidden"], torch.tensor(EACH))
        return (called(layer, x, x["hidden"], turns, text_mask(oss, kind, config, x["hidden"])),)

    assert_same(ours, theirs, weights_of(layer))


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_t5(kind):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        d_model=WIDTH,
        d_kv=WIDTH // H,
        num_heads=H,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=50,
        dropout_rate=0.0,
        is_decoder=kind != "encoder",
        **EAGER,
    )
    layer = t5.T5Attention(config, has_relative_attention_bias=kind != "cross", layer_idx=0)
    seen = torch.full((T, T), -torch.inf).triu(1)[None, None] if kind == "decoder" else None
    memory = {"memory": normal(B, S, WIDTH)} if kind == "cross" else {}

    def ours(x, backend):
        score, read = None, x.get("memory", x["hidden"])
        if kind != "cross":
            table = x["relative_attention_bias.weight"]
            score = t5_bias(table, bidirectional=kind == "encoder", max_distance=50)
        query, key, value = (
            split(dense(x, n, y), H) for n, y in (("q", x["hidden"]), ("k", read), ("v", read))
        )
        mask = causal() if kind == "decoder" else None
        out = attend(query, key, value, mask=mask, score=score, scale=1.0, backend=backend)
        return (dense(x, "o", joined(out)),)

    def theirs(x):
        return (called(layer, x, x["hidden"], mask=seen, key_value_states=x.get("memory")),)

    assert_same(ours, theirs, weights_of(layer, **memory))


def test_longformer():
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = longformer.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=H, attention_window=[14], attention_probs_dropout_prob=0.0
    )
    layer = longformer.LongformerSelfAttention(config, layer_id=0)
    chosen, lengths = np.array([[0, 33], [5, 5]]), np.array([T, 51])
    is_global = (np.arange(T) == chosen[:, :, None]).any(1)
    is_padding = np.arange(T) >= lengths[:, None]

    def ours(x, backend):
        lengths_given = key_lengths(jnp.asarray(lengths), jnp.asarray(lengths))
        mask = (window(7, 7) | global_tokens(jnp.asarray(chosen))) & lengths_given

        def attention(names):
            projected = (split(dense(x, n, x["hidden"]), H) for n in names)
            return joined(attend(*projected, mask=mask, backend=backend))

        # Global queries, and they alone, go by projections of their own, of themselves and of all keys.
        whole = attention(("query_global", "key_global", "value_global"))
        return (jnp.where(is_global[..., None], whole, attention(("query", "key", "value"))),)

    def theirs(x):
        masks = {"is_index_masked": is_padding, "is_index_global_attn": is_global}
        masks = {n: torch.tensor(m) for n, m in masks.items()}
        sorts = 10_000.0 * (masks["is_index_global_attn"].float() - masks["is_index_masked"].float())
        return (called(layer, x, x["hidden"], sorts, is_global_attn=True, **masks),)

    assert_same(ours, theirs, weights_of(layer))
