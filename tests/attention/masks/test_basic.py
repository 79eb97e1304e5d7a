import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention
from attnlab.attention.backends.blockwise import blockwise
from attnlab.attention.masks import basic, grids, intervals, sparse
from attnlab.attention.masks.base import BlockGrid
from attnlab.attention.pairwise import pair_indices
from tests.attention.definitions import CASES, B, H, S, expected_mask
from tests.attention.inputs import qkv

every_mask = pytest.mark.parametrize("name", CASES)


def device_part(mask, batch=0, head=0, query=0, key=0, *, queries):
    """Return the part of a mask on a device whose part starts at these indices, and that offset."""
    offset = batch, head, query, key
    part = mask.slice_block(
        batch=(batch, B - batch), heads=(head, H - head), queries=(query, queries - query)
    )
    return part.slice_block(keys=(key, S - key)), offset


@every_mask
def test_materialize_matches_definition(name):
    mask, _, queries = CASES[name]()
    got = mask.materialize(queries, S, B, H)
    np.testing.assert_array_equal(np.broadcast_to(got, (B, H, queries, S)), expected_mask(name))
    assert mask.density(queries, S, B, H) == pytest.approx(expected_mask(name).mean(), abs=1e-12)


@every_mask
def test_traced_slices_match_full_mask(name):
    mask, _, queries = CASES[name]()
    part, (batch, head, query, key) = device_part(mask, 1, 1, 2, 5, queries=queries)

    @jax.jit
    def evaluate(mask, query):
        at = [batch + jnp.arange(B - batch), head + jnp.arange(H - head)]
        return mask.evaluate(pair_indices(*at, query + jnp.arange(queries - 2), key + jnp.arange(S - key)))

    expected = expected_mask(name)[batch:, head:, query:, key:]
    got = evaluate(part, jnp.int32(query))
    np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


GRIDS = {(0, 0, 0, 0): (4, 5), (0, 1, 0, 3): (5, 3), (1, 1, 2, 5): (3, 4)}  # offset, and block sizes


@every_mask
def test_block_summary_matches_pair_counts(name):
    mask, _, queries = CASES[name]()
    expected_masks = [expected_mask(name)[tuple(slice(n, None) for n in offset)] for offset in GRIDS]
    grids = [
        BlockGrid(*x.shape[2:], *block_sizes, *x.shape[:2], offset)
        for x, (offset, block_sizes) in zip(expected_masks, GRIDS.items(), strict=True)
    ]
    parts = [device_part(mask, *offset, queries=queries)[0] for offset in GRIDS]
    summaries = jax.jit(
        lambda parts: [part.block_summary(grid) for part, grid in zip(parts, grids, strict=True)]
    )(parts)
    for summary, grid, allowed in zip(summaries, grids, expected_masks, strict=True):
        for actual, count in zip(summary, (np.any, np.all), strict=True):
            expected = reduce_blocks(allowed, grid.block_q, grid.block_kv, count)
            np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


def reduce_blocks(pairs, block_q, block_kv, count):
    """Reduce the pairs of each block by `count`, which is `np.any` or `np.all`."""
    return np.stack(
        [
            np.stack(
                [
                    count(pairs[:, :, q : q + block_q, k : k + block_kv], axis=(2, 3))
                    for k in range(0, pairs.shape[3], block_kv)
                ],
                axis=-1,
            )
            for q in range(0, pairs.shape[2], block_q)
        ],
        axis=-2,
    )


@every_mask
def test_blockwise_attention_matches_softmax_over_pairs(name):
    mask, _, queries = CASES[name]()
    query, key, value = qkv(0, b=B, t=queries, s=S, h=H, k=1, d=4, dv=2)
    out, lse = jax.jit(functools.partial(blockwise, block_sizes=(4, 4)))(query, key, value, mask=mask)
    scores = np.einsum("bthd,bsd->bhts", *(np.asarray(x, np.float64) for x in (query, key[:, :, 0])))
    weights = np.exp(scores) * expected_mask(name)
    total = weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bsd->bthd", weights / np.where(total, total, 1), value[:, :, 0])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total[..., 0]).swapaxes(1, 2), rtol=1e-5, atol=1e-5)


CLASSES = [
    mask_class
    for module in (basic, intervals, sparse, grids)
    for mask_class in vars(module).values()
    if getattr(mask_class, "__module__", "") == module.__name__ and "query 0" in (mask_class.__doc__ or "")
]


@pytest.mark.parametrize("mask_class", CLASSES)
def test_draw_matches_docstring(mask_class):
    call = re.search(r"(\w+\([^\n]*\)):\n\n +keys ", mask_class.__doc__).group(1)
    drawing = re.findall(r"query \d+ +([x. ]+)$", mask_class.__doc__, re.MULTILINE)
    mask = eval(call, {"jnp": jnp, **vars(attention)})
    assert isinstance(mask, mask_class)
    assert mask.draw(len(drawing), len(drawing[0].split())).splitlines() == drawing


def test_every_mask_class_has_a_drawing():
    masks = {
        mask_class
        for module in (basic, intervals, sparse, grids)
        for mask_class in vars(module).values()
        if isinstance(mask_class, type)
        and issubclass(mask_class, attention.Mask)
        and mask_class.__module__ == module.__name__
    }
    assert masks - set(CLASSES) == {intervals.IntervalMask}


def test_traced_offset():
    @jax.jit
    def at(offset):
        masks = attention.causal(offset), attention.window(2, 1, offset), attention.strided(2, offset)
        return [mask.materialize(3, 9) for mask in masks]

    for offset in (0, 4):
        for actual, desired in zip(at(offset), map(np.asarray, at.__wrapped__(offset)), strict=True):
            np.testing.assert_array_equal(actual, desired)


def test_static_masks_stay_static_under_jit():
    masks = []

    @jax.jit
    def step():
        ids = np.array([[0, 0, 1, 1]])
        masks.extend([attention.islands(ids), attention.shared_prefix(ids), attention.media(ids > 0, 2)])
        masks.extend(
            [
                attention.tree((-1, 0)),
                attention.global_tokens((1,)),
                attention.blocks(ids[0, :2, None] == 0, 2),
            ]
        )

    step()
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(masks))


def test_masks_under_vmap():
    ids = jnp.array([[[0, 1, 1, 0]], [[2, 2, 0, 3]]])
    got = jax.vmap(lambda x: attention.islands(x).materialize(4, 4))(ids)
    for mask, example in zip(got, ids, strict=True):
        np.testing.assert_array_equal(mask, attention.islands(example).materialize(4, 4))


def test_rejects_invalid_arguments(refuses):
    with refuses("size", "at least 1", "0"):
        attention.chunked(0)
    with refuses("left", "at least 0", "-1"):
        attention.sinks_and_window(1, -1)
    with refuses("earlier node", "[0, 1]"):
        attention.tree((0, 1))
    with refuses("per_head", "one mask per query head"):
        attention.per_head([])
    with refuses("shift_mask", "4 queries"):
        attention.shift_mask(attention.segments(jnp.ones((1, 4), int)), 1)


def test_masks_with_sharded_arrays(mesh_of):
    ids = jnp.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 3, 3]])
    query, key, value = qkv(0, b=4, t=6, s=6, h=2, k=2, d=4, dv=2)

    @jax.jit
    def run(query, key, value, ids):
        masks = [
            attention.islands(ids),
            attention.shared_prefix(ids),
            attention.media(ids > 0, 1) | attention.prefix(ids[:, 2]),
            attention.key_lengths(ids[:, 3], ids[:, 4] + 2),
            attention.tree(jnp.minimum(ids, 1) - 1, ids[:, 1]),
            attention.global_tokens(ids),
            attention.blocks(ids[:, None, :3, None] < ids[:, None, None, :3], 2),
            attention.per_head([attention.segments(ids), attention.causal()]),
        ]
        return [attention.attend(query, key, value, mask=mask, backend="reference") for mask in masks]

    expected = run(query, key, value, ids)
    mesh = mesh_of("fsdp:2,tensor:2")
    rows = jax.NamedSharding(mesh, jax.P("fsdp", None))
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", None, "tensor", None)))
        for x in (query, key, value)
    ]
    with jax.set_mesh(mesh):
        got = run(*placed, jax.device_put(ids, rows))
    for actual, desired in zip(got, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_masks_match_transformers():
    torch = pytest.importorskip("torch")
    hf_masks = pytest.importorskip("transformers.masking_utils")
    ids = [[0, 1, 1, 1, 0, 2, 2, 0, 0, 3, 3, 3], [1, 1, 2, 2, 2, 0, 0, 0, 4, 4, 0, 5]]
    groups = hf_masks.blockwise_overlay(torch.tensor(ids) - 1)
    documents = hf_masks.packed_sequence_mask_function(torch.tensor(np.sort(ids) + 1))
    same = [
        (attention.window(3, 0), hf_masks.sliding_window_causal_mask_function(4)),
        (attention.window(2, 2), hf_masks.sliding_window_bidirectional_mask_function(2)),
        (attention.chunked(5), hf_masks.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64))),
        (attention.islands(jnp.array(ids)), hf_masks.or_masks(hf_masks.causal_mask_function, groups)),
        (attention.segments(jnp.array(np.sort(ids) + 1)), documents),
    ]
    indices = [
        torch.arange(n).reshape([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate((2, 1, S, S))
    ]
    for actual, function in same:
        expected = torch.broadcast_to(torch.as_tensor(function(*indices)), (2, 1, S, S)).numpy()
        np.testing.assert_array_equal(np.broadcast_to(actual.materialize(S, S), expected.shape), expected)
