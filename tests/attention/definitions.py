"""Every mask with its definition: a plain Python function of one batch row, head, query and key."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attnlab import attention as a
from attnlab.attention.masks.base import Mask, as_mask

B, H, T, S = 2, 3, 7, 12  # self-attention has S queries


class Case(NamedTuple):
    """A mask, its definition `allows(b, h, i, j)`, and its number of queries. There are S keys."""

    mask: Mask
    allows: Callable[[int, int, int, int], bool]
    queries: int


CASES: dict[str, Callable[[], Case]] = {}


def case(function):
    """Register a function that returns a mask, its definition and optionally its query count."""

    @functools.cache
    def make():
        mask, allows, *queries = function()
        return Case(mask, allows, *(queries or [S]))

    CASES[function.__name__] = make
    return make


def evaluate_pairs(allows, batch, heads, queries, keys) -> np.ndarray:
    """Evaluate a definition at every pair of these indices, (B, H, T, S)."""
    return np.array(
        [[[[bool(allows(b, h, i, j)) for j in keys] for i in queries] for h in heads] for b in batch]
    )


@functools.cache
def expected_mask(name: str) -> np.ndarray:
    """Evaluate the definition of a case at every pair, (B, H, T, S)."""
    _, allows, queries = CASES[name]()
    return evaluate_pairs(allows, range(B), range(H), range(queries), range(S))


@case
def causal():
    return a.causal(), lambda b, h, i, j: j <= i


@case
def causal_aligned_at_the_end():
    # The last query attends to every key.
    return a.causal(S - T), lambda b, h, i, j: (T - 1 - i) <= (S - 1 - j), T


@case
def causal_with_fully_masked_first_queries():
    return a.causal(-3), lambda b, h, i, j: j <= i - 3


@case
def window():
    return a.window(2, 1, 3), lambda b, h, i, j: i + 3 - 2 <= j <= i + 3 + 1, T


@case
def window_to_the_left():
    return a.window(3, None), lambda b, h, i, j: i - j <= 3


@case
def window_to_the_right():
    return a.window(None, 0, jnp.int32(2)), lambda b, h, i, j: j - i - 2 <= 0, T


@case
def segments():
    ids = [[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]]
    return a.segments(jnp.array(ids)), lambda b, h, i, j: ids[b][i] == ids[b][j] > 0


@case
def segments_of_queries_and_keys():
    queries = [[1, 1, 1, 2, 3, 3, 0], [0, 0, 1, 1, 2, 2, 2]]
    keys = [[1] * 4 + [2] * 4 + [3] * 4, [0] * 4 + [1] * 4 + [2] * 4]
    return (
        a.segments(jnp.array(queries), jnp.array(keys)),
        lambda b, h, i, j: queries[b][i] == keys[b][j] and keys[b][j] != 0,
        T,
    )


@case
def prefix():
    return a.prefix(5), lambda b, h, i, j: j < 5 or j <= i


@case
def prefix_of_each_row():
    lengths = [2, 9]
    return a.prefix(jnp.array(lengths), offset=2), lambda b, h, i, j: j < lengths[b] or j <= i + 2, T


@case
def key_lengths():
    lengths = [4, 11]
    return a.key_lengths(jnp.array(lengths)), lambda b, h, i, j: j < lengths[b], T


@case
def key_and_query_lengths():
    keys, queries = [4, 11], [7, 3]
    mask = a.key_lengths(jnp.array(keys), jnp.array(queries))
    return mask, lambda b, h, i, j: i < queries[b] and j < keys[b], T


@case
def chunked():
    return a.chunked(5), lambda b, h, i, j: j <= i and math.floor(i / 5) == math.floor(j / 5)


@case
def chunked_from_an_offset():
    return a.chunked(3, 5), lambda b, h, i, j: j <= i + 5 and math.floor((i + 5) / 3) == math.floor(j / 3), T


@case
def block_causal():
    return a.block_causal(3, 2), lambda b, h, i, j: math.floor(j / 3) <= math.floor((i + 2) / 3), T


@case
def block_diffusion():
    # Six noised tokens, then the same six tokens clean, in blocks of two.
    def allows(b, h, i, j):
        clean_query, clean_key = i >= 6, j >= 6
        query, key = i % 6 // 2, j % 6 // 2
        if not clean_key:
            return not clean_query and query == key
        return key <= query if clean_query else key < query

    return a.block_diffusion(6, 2), allows


@case
def sinks_and_window():
    return a.sinks_and_window(2, 3), lambda b, h, i, j: j <= i and (j < 2 or i - j <= 3)


@case
def sinks_and_window_while_decoding():
    return (
        a.sinks_and_window(4, 1, jnp.int32(2)),
        lambda b, h, i, j: j <= i + 2 and (j < 4 or i + 2 - j <= 1),
        T,
    )


@case
def islands():
    ids = [[0, 1, 1, 1, 0, 0, 2, 2, 0, 0, 0, 0], [5, 5, 5, 3, 3, 3, 3, 3, 0, 0, 5, 5]]

    def allows(b, h, i, j):
        return j <= i or (ids[b][i] > 0 and all(ids[b][x] == ids[b][i] for x in range(i, j + 1)))

    return a.islands(jnp.array(ids)), allows


@case
def islands_while_decoding():
    ids = [0, 0, 0, 0, 4, 4, 4, 0, 0, 4, 4, 4]

    def allows(b, h, i, j):
        i = i + 3
        return j <= i or (ids[i] > 0 and all(ids[x] == ids[i] for x in range(i, j + 1)))

    return a.islands(jnp.array([ids]), offset=3), allows, T


@case
def shared_prefix():
    ids = [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3]]
    return a.shared_prefix(jnp.array(ids)), lambda b, h, i, j: j <= i and ids[b][j] in (0, ids[b][i])


@case
def media():
    markers = [[0, 1, 0, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0, 0]]

    def allows(b, h, i, j):
        images = [n for n, position in enumerate(p for p in range(T) if markers[b][p]) if position <= i]
        return bool(images) and j in range(4 * images[-1], 4 * images[-1] + 4)

    return a.media(jnp.array(markers, bool), 4), allows, T


@case
def dilated():
    return (
        a.dilated(3, 6, 4, 2),
        lambda b, h, i, j: i + 2 - 6 <= j <= i + 2 + 4 and abs(i + 2 - j) % 3 == 0,
        T,
    )


@case
def dilated_without_end():
    return a.dilated(2, None, 0), lambda b, h, i, j: j <= i and (i - j) % 2 == 0


@case
def strided():
    return a.strided(3), lambda b, h, i, j: j in range(max(0, i - 3), i + 1) or (j <= i and (i - j) % 3 == 0)


@case
def strided_from_an_offset():
    return (
        a.strided(2, 4),
        lambda b, h, i, j: j in range(max(0, i + 4 - 2), i + 5) or (j <= i + 4 and (i + 4 - j) % 2 == 0),
        T,
    )


@case
def global_tokens():
    return a.global_tokens((1, 7, 1)), lambda b, h, i, j: i in (1, 7) or j in (1, 7)


@case
def global_tokens_of_each_row():
    positions = [[3, 4, 5, 6, 7, 8], [3, 8, 9, 9, 9, 9]]
    mask = a.global_tokens(jnp.array(positions), offset=5)
    return mask, lambda b, h, i, j: i + 5 in positions[b] or j in positions[b], T


@case
def blocks():
    chosen = np.random.default_rng(0).random((B, H, 4, 4)) < 0.6
    return a.blocks(jnp.asarray(chosen), 3), lambda b, h, i, j: chosen[b, h, i // 3, j // 3]


@case
def blocks_that_cover_part_of_the_tokens():
    chosen = [[True, False], [True, True]]
    mask = a.blocks(np.array(chosen), 4)
    return mask, lambda b, h, i, j: i < 8 and j < 8 and chosen[i // 4][j // 4]


PARENTS = [[-1, 0, 0, 1, 2, 2, 4], [-1, -1, 1, 2, 3, 0, 5]]


def self_and_ancestors(parents, node):
    """Return a node and its ancestors."""
    return [] if node < 0 else [node, *self_and_ancestors(parents, parents[node])]


@case
def tree():
    return (
        a.tree(tuple(PARENTS[0]), 5),
        lambda b, h, i, j: j < 5 or j - 5 in self_and_ancestors(PARENTS[0], i),
        T,
    )


@case
def tree_of_each_row():
    prefixes = [5, 2]
    mask = a.tree(jnp.array(PARENTS), jnp.array(prefixes))
    return mask, lambda b, h, i, j: j < prefixes[b] or j - prefixes[b] in self_and_ancestors(PARENTS[b], i), T


def near(cells, window, step, i, j):
    """Return whether j is in the `window` cells, `step` apart, whose centre is nearest to i."""
    reachable = range(i % step, cells, step)
    runs = [reachable[n : n + window] for n in range(len(reachable) - window + 1)]
    return j in min(runs, key=lambda run: abs(run[0] + run[-1] - 2 * i))


@case
def neighbourhood():
    return a.neighbourhood(S, 5), lambda b, h, i, j: near(S, 5, 1, i, j)


@case
def neighbourhood_dilated():
    return a.neighbourhood(S, 3, 3), lambda b, h, i, j: near(S, 3, 3, i, j)


@case
def neighbourhood_in_two_dimensions():
    def allows(b, h, i, j):
        return near(3, 1, 1, i // 4, j // 4) and near(4, 3, 1, i % 4, j % 4)

    return a.neighbourhood((3, 4), (1, 3)), allows


@case
def neighbourhood_dilated_along_one_of_two():
    def allows(b, h, i, j):
        return near(6, 3, 2, i // 2, j // 2)

    return a.neighbourhood((6, 2), (3, 2), (2, 1)), allows


@case
def neighbourhood_in_three_dimensions():
    def allows(b, h, i, j):
        at_i, at_j = (np.unravel_index(x, (2, 2, 3)) for x in (i, j))
        return at_i[0] == at_j[0] and near(3, 1, 1, at_i[2], at_j[2])

    return a.neighbourhood((2, 2, 3), (1, 2, 1)), allows


@case
def sliding_tile():
    # Tiles of two by one cells in a grid of six by two; tokens are ordered tile by tile.
    def allows(b, h, i, j):
        at_i, at_j = (np.unravel_index(x // 2, (3, 2)) for x in (i, j))
        return near(3, 1, 1, at_i[0], at_j[0])

    return a.sliding_tile((6, 2), (2, 1), (1, 2)), allows


@case
def per_head():
    causal, window = a.causal(), a.window(1, 1)
    return a.per_head([causal, window, causal]), lambda b, h, i, j: abs(i - j) <= 1 if h == 1 else j <= i


@case
def shifted_of_each_row():
    starts = [0, 4]

    def allows(b, h, i, j):
        i, j = i + 5 - starts[b], j - starts[b]
        return 0 <= j <= i and i // 3 == j // 3

    return a.shift_mask(a.chunked(3, 5), jnp.array(starts)), allows, T


@case
def shifted_islands():
    ids, starts = [0, 1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 3], [3, 1]

    def allows(b, h, i, j):
        i, j = i - starts[b], j - starts[b]
        island = i >= 0 and j >= 0 and ids[i] > 0 and {ids[x] for x in range(i, j + 1)} == {ids[i]}
        return j >= 0 and (j <= i or island)

    return a.shift_mask(a.islands(jnp.array([ids])), jnp.array(starts)), allows


@case
def shifted_blocks():
    chosen, starts = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]], bool), [3, 1]

    def allows(b, h, i, j):
        i, j = i - starts[b], j - starts[b]
        return i >= 0 and j >= 0 and chosen[i // 4, j // 4]

    return a.shift_mask(a.blocks(chosen, 4), jnp.array(starts)), allows


@case
def shifted_of_a_function():
    mask = a.shift_mask(a.prefix(3) & (lambda b, h, q, k: (q + k) % (h + 2) != 0), 2)
    return mask, lambda b, h, i, j: j >= 2 and (j < 5 or j <= i) and (i + j - 4) % (h + 2) != 0


@case
def dense():
    allowed = np.random.default_rng(1).random((B, H, T, S)) < 0.5
    return as_mask(jnp.asarray(allowed)), lambda b, h, i, j: allowed[b, h, i, j], T


@case
def dense_of_two_dimensions():
    allowed = np.random.default_rng(2).random((T, S)) < 0.8
    return as_mask(allowed), lambda b, h, i, j: allowed[i, j], T


@case
def function():
    limit = [3, 8]
    captured = jnp.array(limit)
    return a.mask_fn(
        lambda b, h, q, k: (k < captured[b]) & ((q + k) % (h + 1) == 0)
    ), lambda b, h, i, j: j < limit[b] and (i + j) % (h + 1) == 0
