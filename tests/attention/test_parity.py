"""Parity of `attend` with PyTorch: FlexAttention and scaled_dot_product_attention.

Both get the same arrays; their results and all gradients of a weighted sum of the results are
compared.
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

# Different lengths, each several blocks long and no multiple of a block.
B, T, S, H, K, D, DV = 2, 70, 93, 4, 2, 6, 3


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def qkv(s=S, k=K):
    return {"query": 2 * normal(B, T, H, D), "key": normal(B, s, k, D), "value": normal(B, s, k, DV)}


def assert_same(attnlab_results, torch_results, arrays, tolerance=1e-5):
    """Compare `attnlab_results(x, backend)` with `torch_results(x)` on two backends.

    Both return tuples of results of the arrays x. Errors are relative to the greatest absolute
    value of each array, or to 1 if that is greater.
    """
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
    expected = torch_results(leaves)
    weights = [normal(*x.shape) for x in expected]
    zero = torch.zeros(())
    loss = sum(
        (torch.where(x.isfinite(), x, zero) * torch.tensor(w)).sum()
        for x, w in zip(expected, weights, strict=True)
    )
    torch_gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def run(arrays, backend):
        results = attnlab_results(arrays, backend)
        parts = zip(results, weights, strict=True)
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) * w) for x, w in parts), results

    @jax.jit
    def both(arrays):
        return [
            jax.value_and_grad(run, has_aux=True)(arrays, backend) for backend in ("reference", "blockwise")
        ]

    for (_, results), gradients in both({name: jnp.asarray(x) for name, x in arrays.items()}):
        actual = {**dict(enumerate(results)), **gradients}
        for name, exact in {**dict(enumerate(expected)), **torch_gradients}.items():
            exact = exact.detach().numpy()
            size = np.abs(exact[np.isfinite(exact)]).max()
            bound = tolerance * max(size, 1)
            np.testing.assert_allclose(actual[name], exact, rtol=0, atol=bound, err_msg=str(name))


IDS = np.sort(np.random.default_rng(0).integers(1, 5, (B, S)))
LENGTHS = np.array([40, 81])


def near(i, j, cells, size, xp):
    """Return whether j is in the window of `size` cells around i, shifted inwards at the edges."""
    middle = xp.clip(i, size // 2, cells - 1 - size // 2)
    return abs(middle - j) <= size // 2


# For each mask: the mask_mod of flex_attention, given arrays and the array library; and the mask of
# attnlab.
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
    """Return `flex_attention` for (batch, length, heads, width) arrays: output and log-sum-exp.

    PyTorch rejects gradients on CPUs, because it cannot compile the backward pass there. The
    uncompiled function has a backward pass, so the check is disabled.
    """
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)

    def run(query, key, value, mask=None, score=None, **kwargs):
        if mask is not None:
            mask = flex.create_block_mask(mask, B, H, query.shape[1], key.shape[1], device="cpu")
        out, aux = flex.flex_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            score,
            mask,
            enable_gqa=True,
            return_aux=flex.AuxRequest(lse=True),
            **kwargs,
        )
        return out.transpose(1, 2), aux.lse.transpose(1, 2)

    return run


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_flex_attention(name, flex_attention):
    formula, builtin = MASKS[name]
    length = T if name == "neighbourhood" else S
    constants = {"ids": IDS, "lengths": LENGTHS}

    def torch_results(x):
        mask = formula(SimpleNamespace(**{n: torch.tensor(a) for n, a in constants.items()}), torch)
        return flex_attention(x["query"], x["key"], x["value"], mask) * 2

    def attnlab_results(x, backend):
        same = formula(SimpleNamespace(**{n: jnp.asarray(a) for n, a in constants.items()}), jnp)
        kwargs = {"backend": backend, "return_lse": True}
        arrays = x["query"], x["key"], x["value"]
        return attend(*arrays, mask=same, **kwargs) + attend(*arrays, mask=builtin, **kwargs)

    assert_same(attnlab_results, torch_results, qkv(s=length))


# For each score: its arrays; the score_mod of flex_attention; and the score of attnlab.
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
    arrays, formula, builtin = SCORES[name]

    def torch_results(x):
        x = SimpleNamespace(**x)
        return flex_attention(x.query, x.key, x.value, lambda b, h, i, j: i >= j, formula(x, torch)) * 2

    def attnlab_results(x, backend):
        x = SimpleNamespace(**x)
        kwargs = {"mask": causal(), "backend": backend, "return_lse": True}
        arrays = x.query, x.key, x.value
        return attend(*arrays, score=formula(x, jnp), **kwargs) + attend(*arrays, score=builtin(x), **kwargs)

    assert_same(attnlab_results, torch_results, {**qkv(), **arrays})


def test_forgetting_and_scale_of_flex_attention(flex_attention):
    def torch_results(x):
        sums = torch.nn.functional.logsigmoid(x["gates"]).cumsum(1)
        score = lambda s, b, h, i, j: s + sums[b, i, h] - sums[b, j, h]  # noqa: E731
        return flex_attention(x["query"], x["key"], x["value"], lambda b, h, i, j: i >= j, score, scale=0.7)

    def attnlab_results(x, backend):
        return attend(
            *(x[n] for n in ("query", "key", "value")),
            mask=causal(),
            score=forgetting(jax.nn.log_sigmoid(x["gates"])),
            scale=0.7,
            backend=backend,
            return_lse=True,
        )

    assert_same(attnlab_results, torch_results, {**qkv(s=T), "gates": normal(B, T, H)})


ALLOWED = np.random.default_rng(0).random((B, H, T, S)) < 0.5
ALLOWED[:, :, 3] = False  # a query with no key

# For each case: its arrays besides query, key and value; the arguments of
# scaled_dot_product_attention; and the arguments of attend.
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
    arrays, torch_kwargs, attnlab_kwargs = CASES[name]

    def torch_results(x):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x[n].transpose(1, 2) for n in ("query", "key", "value")),
            enable_gqa=kv_heads < H,
            **torch_kwargs(x),
        )
        return (out.transpose(1, 2),)

    def attnlab_results(x, backend):
        return (attend(x["query"], x["key"], x["value"], backend=backend, **attnlab_kwargs(x)),)

    assert_same(attnlab_results, torch_results, {**qkv(k=kv_heads), **arrays})
