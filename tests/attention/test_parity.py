"""`attend` beside torch's attention, forward and backward: FlexAttention and scaled dot products.

Both sides get the same arrays, and return the same results; all gradients of a sum of these are compared too.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import (
    alibi,
    attend,
    bias,
    causal,
    dilated,
    forgetting,
    key_lengths,
    neighbourhood,
    per_head,
    prefix,
    relative_bias,
    segments,
    shaw,
    softcap,
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
