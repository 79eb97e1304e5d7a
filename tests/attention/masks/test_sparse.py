import numpy as np

from attnlab.attention import bigbird


def allowed_blocks(mask):
    return np.asarray(mask.allowed)[0, 0]


def test_bigbird_block_counts():
    allowed = allowed_blocks(bigbird(95, 8, neighbours=1, globals=2, random=3))
    assert allowed.shape == (12, 12)
    for query in range(12):
        required = {key for key in range(12) if abs(query - key) <= 1 or query < 2 or key < 2}
        attended = set(np.flatnonzero(allowed[query]))
        assert required <= attended
        assert len(attended - required) == min(3, 12 - len(required))


def test_bigbird_depends_only_on_seed():
    first, again, other = (allowed_blocks(bigbird(160, 8, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_bigbird_random_blocks_are_uniform():
    # Each of 40 key blocks is drawn with probability 1/10 by 120 query blocks: 12 +- 3.3 times.
    drawn = sum(
        allowed_blocks(bigbird(40 * 4, 4, neighbours=-0, globals=0, random=4, seed=s)) for s in range(3)
    )
    counts = drawn.sum(0) - 3  # without each query's own block
    assert abs(counts.mean() - 12) < 1e-9
    assert (abs(counts - 12) < 5 * 3.3).all()
