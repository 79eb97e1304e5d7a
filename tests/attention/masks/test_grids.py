import numpy as np
import pytest

from attnlab.attention import neighbourhood, sliding_tile, tile_order


def test_neighbourhood_has_equal_key_counts():
    for shape, window, dilation in (((5, 6), (3, 5), 1), ((4, 7), (1, 3), (2, 2)), ((3, 4, 5), (3, 1, 3), 1)):
        size = int(np.prod(shape))
        allowed = np.asarray(neighbourhood(shape, window, dilation).materialize(size, size))[0, 0]
        assert set(allowed.sum(1)) == {int(np.prod(window))}


def test_sliding_tile_in_row_major_order():
    shape, tile, window = (4, 6), (2, 3), (1, 1)
    order = tile_order(shape, tile)
    assert sorted(order) == list(range(24))
    by_tiles = np.asarray(sliding_tile(shape, tile, window).materialize(24, 24))[0, 0]
    by_rows = np.zeros((24, 24), bool)
    by_rows[np.ix_(order, order)] = by_tiles
    for query in range(24):
        for key in range(24):
            (y, x), (y2, x2) = divmod(query, 6), divmod(key, 6)
            assert by_rows[query, key] == (y // 2 == y2 // 2 and x // 3 == x2 // 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 4), ("odd", "(4,)")),
        ((8, 9), ("odd", "(9,)")),
        ((8, 3, 3), ("dilation (3,)",)),
        (((8, 8), (3,)), ("the same number of axes", "(3,)")),
    ],
)
def test_neighbourhood_rejects_invalid_windows(refuses, arguments, words):
    with refuses("neighbourhood", *words):
        neighbourhood(*arguments)


def test_sliding_tile_rejects_tiles_that_do_not_divide_grid(refuses):
    with refuses("(3, 2)", "(8, 8)"):
        sliding_tile((8, 8), (3, 2), (1, 1))
