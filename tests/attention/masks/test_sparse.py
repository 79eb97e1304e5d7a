import numpy as np

from attnlab.attention import bigbird


def chosen(mask):
    return np.asarray(mask.allowed)[0, 0]


def test_bigbird_sees_neighbours_the_first_blocks_and_as_many_others_as_asked():
    allowed = chosen(bigbird(95, 8, neighbours=1, globals=2, random=3))
    assert allowed.shape == (12, 12)
    for query in range(12):
        due = {key for key in range(12) if abs(query - key) <= 1 or query < 2 or key < 2}
        seen = set(np.flatnonzero(allowed[query]))
        assert due <= seen
        assert len(seen - due) == min(3, 12 - len(due))


def test_bigbird_is_the_same_for_one_seed_and_another_for_another():
    first, again, other = (chosen(bigbird(160, 8, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_random_blocks_are_spread_evenly():
    # Of 40 keys that may be drawn, each is drawn by a tenth of all queries: 12 of 120, give or take 3.3.
    drawn = sum(chosen(bigbird(40 * 4, 4, neighbours=-0, globals=0, random=4, seed=s)) for s in range(3))
    counts = drawn.sum(0) - 3  # less its own block
    assert abs(counts.mean() - 12) < 1e-9
    assert (abs(counts - 12) < 5 * 3.3).all()
