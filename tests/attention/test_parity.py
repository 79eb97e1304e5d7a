"""`attend` beside other people's attention, forward and backward: that of torch, and of layers of transformers.

Both sides get the same arrays, and return the same results; all gradients of a sum of these are compared too.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import (
    Llama3,
    YaRN,
    alibi,
    attend,
    bias,
    causal,
    dilated,
    forgetting,
    global_tokens,
    key_lengths,
    neighbourhood,
    per_head,
    prefix,
    relative_bias,
    rotary,
    segments,
    shaw,
    softcap,
    t5_bias,
    temperature,
    window,
)

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

# Lengths of several tiles each, that no tile divides, and which differ.
B, T, S, H, K, D, DV = 2, 70, 93, 4, 2, 6, 3


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def qkv(s=S, k=K):
    return {"query": 2 * normal(B, T, H, D), "key": normal(B, s, k, D), "value": normal(B, s, k, DV)}


def assert_same(ours, theirs, arrays, tolerance=1e-5):
    """Holds `ours(x, backend)` to `theirs(x)`, tuples of results of the named arrays, on two backends.

    An error may be so great beside the greatest number of its array, or beside 1.
    """
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
    expected = theirs(leaves)
    weights = [normal(*x.shape) for x in expected]
    zero = torch.zeros(())
    loss = sum(
        (torch.where(x.isfinite(), x, zero) * torch.tensor(w)).sum()
        for x, w in zip(expected, weights, strict=True)
    )
    slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def run(arrays, backend):
        results = ours(arrays, backend)
        parts = zip(results, weights, strict=True)
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) * w) for x, w in parts), results

    @jax.jit
    def both(arrays):
        return [
            jax.value_and_grad(run, has_aux=True)(arrays, backend) for backend in ("reference", "blockwise")
        ]

    for (_, results), gradients in both({name: jnp.asarray(x) for name, x in arrays.items()}):
        found = {**dict(enumerate(results)), **gradients}
        for name, exact in {**dict(enumerate(expected)), **slopes}.items():
            exact = exact.detach().numpy()
            size = np.abs(exact[np.isfinite(exact)]).max()
            bound = tolerance * max(size, 1)
            np.testing.assert_allclose(found[name], exact, rtol=0, atol=bound, err_msg=str(name))


IDS = np.sort(np.random.default_rng(0).integers(1, 5, (B, S)))
LENGTHS = np.array([40, 81])


def near(i, j, cells, size, xp):
    """Whether j is in the run of `size` cells around i, which is shifted to end where the cells do."""
    middle = xp.clip(i, size // 2, cells - 1 - size // 2)
    return abs(middle - j) <= size // 2


# Of each mask: it as flex_attention takes it, of arrays and the library of both sides; it as attnlab names it.
MASKS = {
    "all": (lambda x, xp: lambda b, h, i, j: i + j >= 0, None),
    "causal": (lambda x, xp: lambda b, h, i, j: i >= j, causal()),
    "causal, aligned at the end": (lambda x, xp: lambda b, h, i, j: i + 23 >= j, causal(S - T)),
    "rows without keys": (lambda x, xp: lambda b, h, i, j: i - 9 >= j, causal(-9)),
    "window": (lambda x, xp: lambda b, h, i, j: (i >= j) & (i - j <= 7), causal() & window(7)),
    "prefix": (
        lambda x, xp: lambda b, h, i, j: (i >= j) | (j < x.lengths[b]),
        prefix(jnp.asarray(LENGTHS)),
    ),
    "documents": (
        lambda x, xp: lambda b, h, i, j: (i >= j) & (x.ids[b, i] == x.ids[b, j]),
        causal() & segments(jnp.asarray(IDS[:, :T]), jnp.asarray(IDS)),
    ),
    "padding": (
        lambda x, xp: lambda b, h, i, j: j < x.lengths[b],
        key_lengths(jnp.asarray(LENGTHS)),
    ),
    "dilated": (
        lambda x, xp: lambda b, h, i, j: (i >= j) & (i - j <= 30) & ((i - j) % 3 == 0),
        dilated(3, 30, 0),
    ),
    "neighbourhood": (
        lambda x, xp: lambda b, h, i, j: near(i // 10, j // 10, 7, 3, xp) & near(i % 10, j % 10, 10, 5, xp),
        neighbourhood((7, 10), (3, 5)),
    ),
    "of each head": (
        lambda x, xp: lambda b, h, i, j: ((h % 2 == 0) & (i >= j)) | ((h % 2 == 1) & (abs(i - j) <= 5)),
        per_head([causal(), window(5, 5)] * 2),
    ),
}


@pytest.fixture
def flex_attention(monkeypatch):
    """torch's `flex_attention` of (batch, length, heads, width): output and log-sum-exp, with gradients.

    It refuses them on CPUs, for which torch compiles no backward pass; uncompiled it has one.
    """
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)

    def run(query, key, value, mask=None, score=None, **more):
        if mask is not None:
            mask = flex.create_block_mask(mask, B, H, query.shape[1], key.shape[1], device="cpu")
        out, aux = flex.flex_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            score,
            mask,
            enable_gqa=True,
            return_aux=flex.AuxRequest(lse=True),
            **more,
        )
        return out.transpose(1, 2), aux.lse.transpose(1, 2)

    return run


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_flex_attention(name, flex_attention):
    written, named = MASKS[name]
    length = T if name == "neighbourhood" else S
    known = {"ids": IDS, "lengths": LENGTHS}

    def theirs(x):
        mask = written(SimpleNamespace(**{n: torch.tensor(a) for n, a in known.items()}), torch)
        return flex_attention(x["query"], x["key"], x["value"], mask) * 2

    def ours(x, backend):
        same = written(SimpleNamespace(**{n: jnp.asarray(a) for n, a in known.items()}), jnp)
        how = {"backend": backend, "return_lse": True}
        arrays = x["query"], x["key"], x["value"]
        return attend(*arrays, mask=same, **how) + attend(*arrays, mask=named, **how)

    assert_same(ours, theirs, qkv(s=length))


# Of each score: its arrays; it as flex_attention takes it; it as attnlab names it.
SCORES = {
    "alibi": (
        {"slopes": normal(H) ** 2},
        lambda x, xp: lambda s, b, h, i, j: s - x.slopes[h] * abs(i + 23 - j),
        lambda x: alibi(x.slopes, S - T),
    ),
    "softcap": (
        {},
        lambda x, xp: lambda s, b, h, i, j: 1.5 * xp.tanh(s / 1.5),
        lambda x: softcap(1.5),
    ),
    "bias": (
        {"bias": normal(B, 1, T, S)},
        lambda x, xp: lambda s, b, h, i, j: s + x.bias[b, 0, i, j],
        lambda x: bias(x.bias),
    ),
    "relative bias": (
        {"table": normal(21, H)},
        lambda x, xp: lambda s, b, h, i, j: s + x.table[xp.clip(j - i, -10, 10) + 10, h],
        lambda x: relative_bias(x.table),
    ),
    "shaw": (
        {"table": normal(21, D)},
        lambda x, xp: (
            lambda by_distance: (
                lambda s, b, h, i, j: s + by_distance[b, i, h, xp.clip(j - i, -10, 10) + 10] / math.sqrt(D)
            )
        )(xp.einsum("bthd,md->bthm", x.query, x.table)),
        lambda x: shaw(x.query, x.table),
    ),
    "temperature of each head": (
        {"factor": normal(H)},
        lambda x, xp: lambda s, b, h, i, j: s * x.factor[h],
        lambda x: temperature(x.factor[None, :, None, None]),
    ),
    "a cap, then alibi": (
        {"slopes": normal(H) ** 2},
        lambda x, xp: lambda s, b, h, i, j: 3.0 * xp.tanh(s / 3.0) - x.slopes[h] * abs(i - j),
        lambda x: [softcap(3.0), alibi(x.slopes)],
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_flex_attention(name, flex_attention):
    arrays, written, named = SCORES[name]

    def theirs(x):
        x = SimpleNamespace(**x)
        return flex_attention(x.query, x.key, x.value, lambda b, h, i, j: i >= j, written(x, torch)) * 2

    def ours(x, backend):
        x = SimpleNamespace(**x)
        how = {"mask": causal(), "backend": backend, "return_lse": True}
        arrays = x.query, x.key, x.value
        return attend(*arrays, score=written(x, jnp), **how) + attend(*arrays, score=named(x), **how)

    assert_same(ours, theirs, {**qkv(), **arrays})


def test_forgetting_and_a_scale_of_flex_attention(flex_attention):
    def theirs(x):
        sums = torch.nn.functional.logsigmoid(x["gates"]).cumsum(1)
        score = lambda s, b, h, i, j: s + sums[b, i, h] - sums[b, j, h]  # noqa: E731
        return flex_attention(x["query"], x["key"], x["value"], lambda b, h, i, j: i >= j, score, scale=0.7)

    def ours(x, backend):
        return attend(
            *(x[n] for n in ("query", "key", "value")),
            mask=causal(),
            score=forgetting(jax.nn.log_sigmoid(x["gates"])),
            scale=0.7,
            backend=backend,
            return_lse=True,
        )

    assert_same(ours, theirs, {**qkv(s=T), "gates": normal(B, T, H)})


ALLOWED = np.random.default_rng(0).random((B, H, T, S)) < 0.5
ALLOWED[:, :, 3] = False  # a query with no key

# Of each case: its arrays, but for query, key and value; what scaled_dot_product_attention takes, and what attend.
CASES = {
    "all": ({}, lambda x: {}, lambda x: {}),
    "scale": ({}, lambda x: {"scale": 0.3}, lambda x: {"scale": 0.3}),
    "causal": ({}, lambda x: {"is_causal": True}, lambda x: {"mask": causal()}),
    "boolean of each pair": (
        {},
        lambda x: {"attn_mask": torch.tensor(ALLOWED)},
        lambda x: {"mask": jnp.asarray(ALLOWED)},
    ),
    "boolean of two dimensions": (
        {},
        lambda x: {"attn_mask": torch.tensor(ALLOWED[0, 0])},
        lambda x: {"mask": ALLOWED[0, 0]},
    ),
    "bias": (
        {"bias": normal(H, T, S)},
        lambda x: {"attn_mask": x["bias"]},
        lambda x: {"score": bias(x["bias"])},
    ),
    "bias of keys": (
        {"bias": normal(B, 1, 1, S)},
        lambda x: {"attn_mask": x["bias"]},
        lambda x: {"score": bias(x["bias"])},
    ),
}


@pytest.mark.parametrize("kv_heads", [H, K])
@pytest.mark.parametrize("name", CASES)
def test_scaled_dot_product_attention(name, kv_heads):
    arrays, how_theirs, how_ours = CASES[name]

    def theirs(x):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x[n].transpose(1, 2) for n in ("query", "key", "value")),
            enable_gqa=kv_heads < H,
            **how_theirs(x),
        )
        return (out.transpose(1, 2),)

    def ours(x, backend):
        return (attend(x["query"], x["key"], x["value"], backend=backend, **how_ours(x)),)

    assert_same(ours, theirs, {**qkv(k=kv_heads), **arrays})


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
