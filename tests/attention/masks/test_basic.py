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
from tests.attention.definitions import CASES, B, H, S, whole
from tests.attention.inputs import qkv

every_kind = pytest.mark.parametrize("name", CASES)


def device_part(mask, batch=0, head=0, query=0, key=0, *, queries):
    """A mask as a device has it whose part begins there, and that beginning."""
    offset = batch, head, query, key
    part = mask.slice_block(
        batch=(batch, B - batch), heads=(head, H - head), queries=(query, queries - query)
    )
    return part.slice_block(keys=(key, S - key)), offset


@every_kind
def test_allows_the_pairs_of_its_definition(name):
    mask, _, queries = CASES[name]()
    got = mask.materialize(queries, S, B, H)
    np.testing.assert_array_equal(np.broadcast_to(got, (B, H, queries, S)), whole(name))
    assert mask.density(queries, S, B, H) == pytest.approx(whole(name).mean(), abs=1e-12)


@every_kind
def test_parts_are_parts_of_the_whole_when_traced(name):
    mask, _, queries = CASES[name]()
    part, (batch, head, query, key) = device_part(mask, 1, 1, 2, 5, queries=queries)

    @jax.jit
    def evaluate(mask, query):
        at = [batch + jnp.arange(B - batch), head + jnp.arange(H - head)]
        return mask.evaluate(pair_indices(*at, query + jnp.arange(queries - 2), key + jnp.arange(S - key)))

    expected = whole(name)[batch:, head:, query:, key:]
    got = evaluate(part, jnp.int32(query))
    np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


GRIDS = {(0, 0, 0, 0): (4, 5), (0, 1, 0, 3): (5, 3), (1, 1, 2, 5): (3, 4)}  # offset, and block sizes


@every_kind
def test_block_summary_is_what_counting_pairs_gives(name):
    mask, _, queries = CASES[name]()
    wholes = [whole(name)[tuple(slice(n, None) for n in offset)] for offset in GRIDS]
    grids = [
        BlockGrid(*x.shape[2:], *block_sizes, *x.shape[:2], offset)
        for x, (offset, block_sizes) in zip(wholes, GRIDS.items(), strict=True)
    ]
    parts = [device_part(mask, *offset, queries=queries)[0] for offset in GRIDS]
    summaries = jax.jit(
        lambda parts: [part.block_summary(grid) for part, grid in zip(parts, grids, strict=True)]
    )(parts)
    for summary, grid, allowed in zip(summaries, grids, wholes, strict=True):
        for ours, count in zip(summary, (np.any, np.all), strict=True):
            expected = counted(allowed, grid.block_q, grid.block_kv, count)
            np.testing.assert_array_equal(np.broadcast_to(ours, expected.shape), expected)


def counted(pairs, block_q, block_kv, count):
    """`count`, any or all, of the pairs of each block."""
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


@every_kind
def test_attention_by_blocks_is_a_softmax_over_the_pairs(name):
    mask, _, queries = CASES[name]()
    query, key, value = qkv(0, b=B, t=queries, s=S, h=H, k=1, d=4, dv=2)
    out, lse = jax.jit(functools.partial(blockwise, block_sizes=(4, 4)))(query, key, value, mask=mask)
    scores = np.einsum("bthd,bsd->bhts", *(np.asarray(x, np.float64) for x in (query, key[:, :, 0])))
    weights = np.exp(scores) * whole(name)
    total = weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bsd->bthd", weights / np.where(total, total, 1), value[:, :, 0])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total[..., 0]).swapaxes(1, 2), rtol=1e-5, atol=1e-5)


CLASSES = [
    kind
    for module in (basic, intervals, sparse, grids)
    for kind in vars(module).values()
    if getattr(kind, "__module__", "") == module.__name__ and "query 0" in (kind.__doc__ or "")
]


@pytest.mark.parametrize("kind", CLASSES)
def test_is_drawn_as_its_docstring_shows(kind):
    call = re.search(r"(\w+\([^\n]*\)):\n\n +keys ", kind.__doc__).group(1)
    drawing = re.findall(r"query \d+ +([x. ]+)$", kind.__doc__, re.MULTILINE)
    mask = eval(call, {"jnp": jnp, **vars(attention)})
    assert isinstance(mask, kind)
    assert mask.draw(len(drawing), len(drawing[0].split())).splitlines() == drawing


def test_every_class_of_masks_is_drawn():
    masks = {
        kind
        for module in (basic, intervals, sparse, grids)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, attention.Mask) and kind.__module__ == module.__name__
    }
    assert masks - set(CLASSES) == {intervals.IntervalMask}


def test_an_offset_may_be_traced():
    @jax.jit
    def at(offset):
        masks = attention.causal(offset), attention.window(2, 1, offset), attention.strided(2, offset)
        return [mask.materialize(3, 9) for mask in masks]

    for offset in (0, 4):
        for ours, theirs in zip(at(offset), map(np.asarray, at.__wrapped__(offset)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_mask_of_known_arrays_is_known_inside_of_a_compiled_function():
    made = []

    @jax.jit
    def step():
        ids = np.array([[0, 0, 1, 1]])
        made.extend([attention.islands(ids), attention.shared_prefix(ids), attention.media(ids > 0, 2)])
        made.extend(
            [attention.tree((-1, 0)), attention.global_tokens((1,)), attention.blocks(ids[0, :2, None], 2)]
        )

    step()
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(made))


def test_a_mask_for_each_example_under_vmap():
    ids = jnp.array([[[0, 1, 1, 0]], [[2, 2, 0, 3]]])
    got = jax.vmap(lambda x: attention.islands(x).materialize(4, 4))(ids)
    for one, example in zip(got, ids, strict=True):
        np.testing.assert_array_equal(one, attention.islands(example).materialize(4, 4))


def test_mistakes(refuses):
    with refuses("size", "at least 1", "0"):
        attention.chunked(0)
    with refuses("left", "at least 0", "-1"):
        attention.sinks_and_window(1, -1)
    with refuses("earlier node", "[0, 1]"):
        attention.tree((0, 1))
    with refuses("per_head", "empty"):
        attention.per_head([])
    with refuses("shift_mask", "4 queries"):
        attention.shift_mask(attention.segments(jnp.ones((1, 4), int)), 1)


def test_masks_of_arrays_that_are_laid_out_over_devices(mesh_of):
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
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_masks_of_text_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.masking_utils")
    ids = [[0, 1, 1, 1, 0, 2, 2, 0, 0, 3, 3, 3], [1, 1, 2, 2, 2, 0, 0, 0, 4, 4, 0, 5]]
    groups = theirs.blockwise_overlay(torch.tensor(ids) - 1)
    documents = theirs.packed_sequence_mask_function(torch.tensor(np.sort(ids) + 1))
    same = [
        (attention.window(3, 0), theirs.sliding_window_causal_mask_function(4)),
        (attention.window(2, 2), theirs.sliding_window_bidirectional_mask_function(2)),
        (attention.chunked(5), theirs.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64))),
        (attention.islands(jnp.array(ids)), theirs.or_masks(theirs.causal_mask_function, groups)),
        (attention.segments(jnp.array(np.sort(ids) + 1)), documents),
    ]
    indices = [
        torch.arange(n).reshape([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate((2, 1, S, S))
    ]
    for ours, function in same:
        expected = torch.broadcast_to(torch.as_tensor(function(*indices)), (2, 1, S, S)).numpy()
        np.testing.assert_array_equal(np.broadcast_to(ours.materialize(S, S), expected.shape), expected)
